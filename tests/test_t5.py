"""t5.py against transformers, which nobody here wrote; then what files and generation promise."""

import json
import pickle
import shutil

import pytest
import torch

import t5
from data.download import InputError
from t5 import EOS, PAD, T5, T5Config, Tokenizer, pad

FAMILIES = {"T5 1.0": ("relu", True), "T5 1.1 and FlanT5": ("gated-gelu", False), "T5 1.1, relu": ("relu", False)}
SHAPE = dict(vocab_size=300, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_decoder_layers=2, num_heads=4)


def inputs():
    """Sources of four lengths with padding, and targets."""
    torch.manual_seed(1)
    lengths = 150, 70, 20, 1  # beyond the last bucket of relative positions, and a lone token
    input_ids = pad([torch.randint(2, 300, (n,)).tolist() for n in lengths])
    return input_ids, (input_ids != PAD).long(), torch.randint(2, 300, (4, 30))


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, transformers, tmp_path_factory):
    """A random checkpoint that transformers wrote, and its model as transformers reads it."""
    activation, tied = FAMILIES[request.param]
    torch.manual_seed(0)
    config = transformers.T5Config(**SHAPE, feed_forward_proj=activation, tie_word_embeddings=tied)
    config.decoder_start_token_id = PAD
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms that are not 1
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 48))
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder)
    return folder, transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_logits_equal_those_of_transformers_with_padding(reference):
    folder, theirs = reference
    input_ids, mask, decoder_input_ids = inputs()
    expected = theirs(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids).logits
    assert relative_error(T5.from_pretrained(folder)(input_ids, mask, decoder_input_ids), expected) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_those_of_transformers(reference, training):
    folder, theirs = reference
    ours = T5.from_pretrained(folder, dropout_rate=0.0).train(training)
    input_ids, mask, decoder_input_ids = inputs()
    weight = torch.randn(4, 30, 300)
    theirs.zero_grad()
    logits = theirs(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids).logits
    (logits * weight).sum().backward()
    (ours(input_ids, mask, decoder_input_ids) * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = ours.hf_tensors(of=lambda parameter: parameter.grad)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


def test_greedy_tokens_equal_those_of_transformers(reference):
    folder, theirs = reference
    input_ids, mask, _ = inputs()
    options = dict(do_sample=False, num_beams=1, eos_token_id=EOS, pad_token_id=PAD)
    expected = theirs.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=60, **options)
    assert torch.equal(T5.from_pretrained(folder).generate(input_ids, mask, max_new_tokens=60), expected[:, 1:])


def test_a_logits_processor_sees_and_steers_what_one_of_transformers_does(reference, transformers):
    folder, theirs = reference
    input_ids, mask, _ = inputs()

    def no_token_twice(rows, logits):
        return logits.scatter(1, rows, -torch.inf) if rows.shape[1] else logits

    expected = theirs.generate(
        input_ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        logits_processor=[lambda rows, logits: no_token_twice(rows[:, 1:], logits)],  # theirs begin with the start token
    )[:, 1:]  # fmt: skip
    no_end = lambda rows, logits: no_token_twice(rows, logits.index_fill(1, torch.tensor([EOS]), -torch.inf))
    ours = T5.from_pretrained(folder).generate(input_ids, mask, max_new_tokens=20, logits_processor=no_end)
    assert torch.equal(ours, expected) and all(len(set(row)) == 20 for row in ours.tolist())


def test_transformers_loads_what_it_saves_with_the_same_logits(reference, transformers, tmp_path):
    folder, theirs = reference
    ours = T5.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    input_ids, mask, decoder_input_ids = inputs()
    found = again(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids).logits
    assert relative_error(found, ours(input_ids, mask, decoder_input_ids)) < 1e-5
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), ours(*inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_reads_every_kind_of_file_in_every_dtype(reference, tmp_path, kind, dtype):
    folder, theirs = reference
    stored = {name: tensor.to(dtype) for name, tensor in T5.from_pretrained(folder).hf_tensors().items()}
    shutil.copy(folder / "config.json", tmp_path)
    stem = "model.safetensors" if "safetensors" in kind else "pytorch_model.bin"
    write = t5.write_safetensors if "safetensors" in kind else lambda tensors, path: torch.save(tensors, path)
    if "shards" in kind:
        names = list(stored)
        shards = {f"shard-{i}": names[i::3] for i in range(3)}
        for shard, chosen in shards.items():
            write({name: stored[name].clone() for name in chosen}, tmp_path / shard)
        weight_map = {name: shard for shard, chosen in shards.items() for name in chosen}
        (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        write(stored, tmp_path / stem)
    found = T5.from_pretrained(tmp_path, dtype=dtype).hf_tensors()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_reads_shards_that_transformers_wrote(reference, tmp_path):
    folder, theirs = reference
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), T5.from_pretrained(folder)(*inputs()))


def test_a_tied_head_without_scaling_survives_a_round_trip(tmp_path):
    model = T5(T5Config(**SHAPE, tie_word_embeddings=True, scale_decoder_outputs=False)).eval()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.shared.weight
    assert torch.equal(again(*inputs()), model(*inputs()))


def damaged(reference, tmp_path, change):
    """A copy of the reference's folder whose tensors have been changed."""
    tensors = T5.from_pretrained(reference[0]).hf_tensors()
    change(tensors)
    shutil.copy(reference[0] / "config.json", tmp_path)
    t5.write_safetensors(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_head_that_differs_from_the_embedding_by_a_rounding_stays_a_head_of_its_own(reference, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"].bfloat16()

    again = T5.from_pretrained(damaged(reference, tmp_path, change))
    assert torch.equal(again.lm_head.weight, again.shared.weight.bfloat16().float())
    assert not (torch.equal(again.lm_head.weight, again.shared.weight) or again.config.tie_word_embeddings)


@pytest.mark.parametrize("key, value", [("eos_token_id", 2), ("decoder_start_token_id", 1), ("dense_act_fn", "silu")])
def test_a_model_that_ends_or_begins_or_computes_in_another_way_is_refused(tmp_path, key, value):
    T5(T5Config(**SHAPE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"config.json: {key} is {value!r}"):
        T5.from_pretrained(tmp_path)


def test_a_dtype_that_no_checkpoint_has_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="torch.float64"):
        T5(T5Config(**SHAPE)).double().save_pretrained(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(reference, tmp_path):
    def change(tensors):
        del tensors["encoder.final_layer_norm.weight"]
        tensors["decoder.adapter.weight"] = torch.ones(3)
        tensors["decoder.final_layer_norm.weight"] = torch.ones(7)

    with pytest.raises(InputError) as error:
        T5.from_pretrained(damaged(reference, tmp_path, change))
    for part in (
        str(tmp_path),
        "missing encoder.final_layer_norm.weight",
        "unknown decoder.adapter.weight",
        "decoder.final_layer_norm.weight has shape (7,), config.json says (48,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("cut", [4, 100, -1000])
def test_a_truncated_safetensors_file_is_refused(reference, tmp_path, cut):
    file = damaged(reference, tmp_path, lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        T5.from_pretrained(tmp_path)


class RunsCode:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(reference, tmp_path, capsys):
    shutil.copy(reference[0] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": RunsCode()}))
    with pytest.raises(InputError, match="pytorch_model.bin"):
        T5.from_pretrained(tmp_path)
    assert "ran" not in capsys.readouterr().out


def small(**changes):
    torch.manual_seed(0)
    options = SHAPE | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0) | changes
    return T5(T5Config(**options)).eval()


def test_random_weights_have_the_spread_t5_was_pretrained_from(transformers):
    """Each kind of weight, against the reference's own initialization; our head counts as a matrix."""
    options = dict(SHAPE, d_model=256, d_kv=64, d_ff=512, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ours = T5(T5Config(**options)).hf_tensors()
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).state_dict()
    for name, tensor in ours.items():
        if "layer_norm" not in name and name != "lm_head.weight":
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.2), name
    assert ours["lm_head.weight"].std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_decoding_with_the_cache_equals_decoding_without():
    model, (input_ids, mask, _) = small(), inputs()
    ids = torch.full((4, 1), PAD)
    for _ in range(25):
        ids = torch.cat([ids, model(input_ids, mask, ids)[:, -1:].argmax(-1)], dim=1)
    found = model.generate(input_ids, mask, max_new_tokens=25)
    for row, expected in zip(found.tolist(), ids[:, 1:].tolist()):
        end = expected.index(EOS) + 1 if EOS in expected else len(expected)
        assert row[:end] == expected[:end]


def ends_early(model):
    """Make </s> likely, so that rows end at different steps."""
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.abs().mean(0) * 2.5
    return model


def test_rows_that_end_leave_the_batch_without_changing_the_others():
    model, generator = ends_early(small()), torch.Generator().manual_seed(3)
    prompts = torch.randint(2, 300, (16, 12), generator=generator)
    together = model.generate(prompts, max_new_tokens=40)
    ends = [(row == EOS).nonzero()[0, 0].item() if EOS in row else 40 for row in together]
    assert len(set(ends)) > 3
    for prompt, row, end in zip(prompts, together, ends):
        alone = model.generate(prompt[None], max_new_tokens=40)[0]
        assert torch.equal(alone[: end + 1], row[: end + 1]) and not row[end + 1 :].any()


def test_a_finished_row_costs_nothing_and_decoding_ends_with_the_last_one():
    model, ends, sizes = small(), iter([[5, 1, 5], [5, 7], [1, 7], [1]]), []

    def forced(x):
        tokens = torch.tensor(next(ends))
        sizes.append(len(x))
        return torch.nn.functional.one_hot(tokens, 300).float()[:, None]

    model.logits = forced
    found = model.generate(torch.randint(2, 300, (3, 8)), max_new_tokens=50)
    assert found.tolist() == [[5, 5, 1, 0], [1, 0, 0, 0], [5, 7, 7, 1]] and sizes == [3, 2, 2, 1]


def test_samples_repeat_for_a_seed_and_follow_the_distribution():
    model, prompt = small(), torch.tensor([[5, 6, 7, EOS]])
    draw = lambda seed, **options: model.generate(
        prompt, max_new_tokens=1, num_samples=4000, generator=torch.Generator().manual_seed(seed), **options
    )
    first = draw(0, temperature=2.0)
    assert first.shape == (4000, 1) and torch.equal(first, draw(0, temperature=2.0))
    expected = (model(prompt, torch.ones_like(prompt), torch.tensor([[PAD]]))[0, 0] / 2.0).softmax(-1)
    found = torch.bincount(first[:, 0], minlength=300) / 4000
    assert (found - expected).abs().max() < 5 * (expected.max() * (1 - expected.max()) / 4000).sqrt()
    assert set(draw(1, temperature=2.0, top_k=2)[:, 0].tolist()) == set(expected.topk(2).indices.tolist())


def test_samples_of_a_prompt_stand_beside_each_other():
    model = small()
    prompts = torch.randint(2, 300, (3, 8))
    assert torch.equal(
        model.generate(prompts, max_new_tokens=5, num_samples=2), model.generate(prompts.repeat_interleave(2, 0), max_new_tokens=5)
    )


def test_generation_turns_dropout_off_and_training_mode_back_on():
    model = small(dropout_rate=0.5).train()
    prompt = torch.randint(2, 300, (2, 8))
    assert torch.equal(model.generate(prompt, max_new_tokens=8), model.generate(prompt, max_new_tokens=8))
    assert model.training


def test_a_model_can_be_trained_on_what_it_generated():
    model, prompt = small(), torch.randint(2, 300, (2, 8))
    ids = model.generate(prompt, max_new_tokens=8)
    ids[:, 0] = 5
    model.train()(prompt, prompt != PAD, ids).sum().backward()
    assert model.shared.weight.grad[5].abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        torch.manual_seed(0)
        model = small(dropout_rate=0.1).train()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = switch
        torch.manual_seed(5)
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(*gradients))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_within_its_rounding(autocast):
    model, exact = small(), small()(*inputs())
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found, tokens = model(*inputs()), model.generate(inputs()[0], max_new_tokens=4)
    else:
        found, tokens = model.bfloat16()(*inputs()), model.generate(inputs()[0], max_new_tokens=4)
    assert relative_error(found.float(), exact) < 0.03 and tokens.shape == (4, 4)


def test_a_source_of_padding_alone_gives_no_nan():
    assert small()(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4), torch.tensor([[PAD, 5]])).isfinite().all()


def test_a_row_of_padding_alone_is_decoded_as_the_whole_model_would():
    model, sources = small(), torch.tensor([[5, 6, EOS] + [PAD] * 3, [PAD] * 6])
    first = model(sources, sources != PAD, torch.full((2, 1), PAD))[:, 0].argmax(-1)
    assert torch.equal(model.generate(sources, max_new_tokens=1)[:, 0], first)


def test_loaded_weights_have_nothing_to_do_with_each_other_for_autograd(tmp_path):
    small().save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    before = model.lm_head.weight._version
    with torch.no_grad():
        model.shared.weight.mul_(2)
    assert model.lm_head.weight._version == before
    assert torch.equal(T5.from_pretrained(tmp_path).shared.weight * 2, model.shared.weight)  # the file is as it was


def test_the_tokenizer_agrees_with_transformers(real, transformers):
    folder = real / "tokenizers" / "t5"
    ours = Tokenizer(folder)
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    assert len(ours.pieces) == 32000
    for line in (real / "datasets" / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]:
        for text in json.loads(line).values():
            ids = ours.encode(text)
            assert ids == theirs(text).input_ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_decoding_passes_over_ids_without_a_piece(real):
    tokenizer = Tokenizer(real / "tokenizers" / "t5" / "spiece.model")
    assert tokenizer.decode(torch.tensor([*tokenizer.encode("two clips"), 32100, 32127, PAD])) == "two clips"


def test_a_tokenizer_with_more_pieces_than_the_model_has_ids_is_refused(real, tmp_path):
    small().save_pretrained(tmp_path)
    shutil.copy(real / "tokenizers" / "t5" / "spiece.model", tmp_path)
    with pytest.raises(InputError, match="32000 pieces, the model only 300 ids"):
        t5.load_pretrained(tmp_path)


def test_a_folder_without_tokenizer_says_so(tmp_path):
    with pytest.raises(InputError, match="no spiece.model"):
        Tokenizer(tmp_path)


def test_the_command_generates(run, real, tmp_path):
    small(vocab_size=32128).save_pretrained(tmp_path)
    shutil.copy(real / "tokenizers" / "t5" / "spiece.model", tmp_path)
    done = run("t5.py", tmp_path, "two clips", "--max-new-tokens", 5, "--device", "cpu")
    assert done.returncode == 0 and done.stdout.strip()
    done = run("t5.py", tmp_path / "nowhere", "two clips")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "nowhere" in done.stderr
