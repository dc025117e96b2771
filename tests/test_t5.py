"""t5.py against transformers and huggingface_hub, and on damaged files and misbehaving servers."""

import contextlib
import hashlib
import http.server
import json
import pickle
import random
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import t5
from conftest import TOY, damage, half, random_text
from t5 import EOS, PAD, T5, Dropout, Linear, T5Config, Tokenizer, UserError
from t5 import download, packed_weights, pad_sequences

FAMILIES = {"T5 1.0": ("relu", True), "T5 1.1 and FlanT5": ("gated-gelu", False),
            "T5 1.1 with relu": ("relu", False)}
SHAPE = dict(vocab_size=300, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_decoder_layers=2,
             num_heads=4)

def small(**changes):
    """Return a random FlanT5."""
    torch.manual_seed(0)
    options = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0)
    return T5(T5Config(**SHAPE | options | changes)).eval()

def inputs():
    """Return sources of four lengths with padding, their mask, and targets."""
    torch.manual_seed(1)
    lengths = 150, 70, 20, 1  # beyond the last bucket of relative positions, and a lone token
    input_ids = pad_sequences([torch.randint(2, 300, (n,)).tolist() for n in lengths])
    return input_ids, (input_ids != PAD).long(), torch.randint(2, 300, (4, 30))

def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()

# --- the model against transformers ---

@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, transformers, tmp_path_factory):
    """A random checkpoint that transformers wrote, and its model as transformers reads it."""
    activation, tied = FAMILIES[request.param]
    torch.manual_seed(0)
    config = transformers.T5Config(**SHAPE, feed_forward_proj=activation, tie_word_embeddings=tied)
    config.decoder_start_token_id = PAD
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms that are not 1
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 48))
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder)
    return folder, transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()

def their_logits(model):
    names = "input_ids", "attention_mask", "decoder_input_ids"
    return model(**dict(zip(names, inputs()))).logits

def test_logits_equal_those_of_transformers_with_padding(reference):
    folder, theirs = reference
    assert relative_error(T5.from_pretrained(folder)(*inputs()), their_logits(theirs)) < 1e-5

@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_those_of_transformers(reference, training):
    folder, theirs = reference
    ours = T5.from_pretrained(folder, dropout_rate=0.0).train(training)
    weight = torch.randn(4, 30, 300)
    theirs.zero_grad()
    (their_logits(theirs) * weight).sum().backward()
    (ours(*inputs()) * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = ours.hf_tensors(of=lambda parameter: parameter.grad)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name

def test_greedy_tokens_equal_those_of_transformers(reference):
    folder, theirs = reference
    input_ids, mask, _ = inputs()
    expected = theirs.generate(input_ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    found = T5.from_pretrained(folder).generate(input_ids, max_new_tokens=60)
    assert torch.equal(found, expected[:, 1:])  # theirs begin with the start token

def test_a_logits_processor_sees_and_steers_what_one_of_transformers_does(reference):
    folder, theirs = reference
    input_ids, mask, _ = inputs()

    def no_token_twice(rows, logits):
        return logits.scatter(1, rows, -torch.inf) if rows.shape[1] else logits

    expected = theirs.generate(
        input_ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        logits_processor=[lambda rows, logits: no_token_twice(rows[:, 1:], logits)])[:, 1:]
    found = T5.from_pretrained(folder).generate(
        input_ids, max_new_tokens=20, logits_processor=lambda rows, logits: no_token_twice(
            rows, logits.index_fill(1, torch.tensor([EOS]), -torch.inf)))
    assert torch.equal(found, expected) and all(len(set(row)) == 20 for row in found.tolist())

def test_transformers_loads_what_it_saves_with_the_same_logits(reference, transformers, tmp_path):
    ours = T5.from_pretrained(reference[0])
    ours.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert relative_error(their_logits(theirs), ours(*inputs())) < 1e-5
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), ours(*inputs()))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_kind_of_file_is_read_in_every_dtype(reference, tmp_path, kind, dtype, shards):
    from safetensors.torch import save_file

    folder, theirs = reference
    stored = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    if kind == "model.safetensors":  # in which tensors cannot share memory
        stored = {name: tensor.clone() for name, tensor in stored.items()}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    stored[unused] = torch.ones(32, 4)  # as in the first T5s
    stored["encoder.embed_tokens.weight"] = stored.pop("shared.weight")  # a copy's name
    names, weight_map = list(stored), {}
    for i in range(shards):
        file = kind if shards == 1 else f"shard-{i}"
        weight_map |= {name: file for name in names[i::shards]}
        write = save_file if kind == "model.safetensors" else torch.save
        write({name: stored[name] for name in names[i::shards]}, tmp_path / file)
    if shards > 1:
        (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(folder / "config.json", tmp_path)
    for wanted in {dtype, torch.float32}:
        model = T5.from_pretrained(tmp_path, dtype=wanted)
        expected = T5.from_pretrained(folder).to(dtype).to(wanted).state_dict()
        assert model.shared.weight.dtype == wanted and not model.training
        assert all(torch.equal(found, expected[name]) for name, found in model.state_dict().items())

def test_shards_that_transformers_wrote_are_read(reference, tmp_path):
    folder, theirs = reference
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found, expected = (T5.from_pretrained(path)(*inputs()) for path in (tmp_path, folder))
    assert torch.equal(found, expected)

def test_random_weights_have_the_spread_of_transformers(transformers):
    options = SHAPE | dict(d_model=256, d_kv=64, d_ff=512, feed_forward_proj="gated-gelu")
    config = transformers.T5Config(**options, tie_word_embeddings=False)
    theirs = transformers.T5ForConditionalGeneration(config).state_dict()
    theirs["lm_head.weight"] = torch.randn(300, 256) * 256**-0.5  # here like any other matrix
    for name, tensor in T5(T5Config(**options, tie_word_embeddings=False)).hf_tensors().items():
        if "layer_norm" not in name:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.2), name

# --- files ---

def test_a_tied_head_without_scaling_survives_a_round_trip(tmp_path):
    model = T5(T5Config(**SHAPE, scale_decoder_outputs=False)).eval()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.shared.weight
    assert torch.equal(again(*inputs()), model(*inputs()))

def test_a_head_that_differs_from_the_embedding_by_a_rounding_stays_untied(tmp_path):
    model = small()
    model.lm_head.weight.data = model.shared.weight.data.bfloat16().float()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.shared.weight)

def test_mapped_weights_are_independent_of_the_file_and_of_each_other(tmp_path):
    small().save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    before = model.lm_head.weight._version
    with torch.no_grad():
        model.shared.weight.mul_(2)
    assert model.lm_head.weight._version == before  # autograd sees no change
    assert torch.equal(T5.from_pretrained(tmp_path).shared.weight * 2, model.shared.weight)

def test_a_dtype_that_no_checkpoint_has_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="torch.float64"):
        small().double().save_pretrained(tmp_path)

# --- generation ---

def test_decoding_with_the_cache_equals_decoding_without():
    model, (input_ids, mask, _) = small(), inputs()
    ids = torch.full((4, 1), PAD)
    for _ in range(25):
        ids = torch.cat([ids, model(input_ids, mask, ids)[:, -1:].argmax(-1)], dim=1)
    found = model.generate(input_ids, mask, max_new_tokens=25)
    for row, expected in zip(found.tolist(), ids[:, 1:].tolist()):
        end = expected.index(EOS) + 1 if EOS in expected else len(expected)
        assert row[:end] == expected[:end]

def test_rows_that_end_leave_the_batch_without_changing_the_others():
    model = small()
    with torch.no_grad():  # make </s> probable, so that rows end at different steps
        model.lm_head.weight[EOS] = model.lm_head.weight.abs().mean(0) * 2.5
    prompts = torch.randint(2, 300, (16, 12), generator=torch.Generator().manual_seed(3))
    together = model.generate(prompts, max_new_tokens=40)
    ends = [(row == EOS).nonzero()[0, 0].item() if EOS in row else 40 for row in together]
    assert len(set(ends)) > 3
    for prompt, row, end in zip(prompts, together, ends):
        alone = model.generate(prompt[None], max_new_tokens=40)[0]
        assert torch.equal(alone[: end + 1], row[: end + 1]) and not row[end + 1 :].any()

def test_a_finished_row_costs_nothing_and_decoding_ends_with_the_last_one():
    model, tokens, sizes = small(), iter([[5, 1, 5], [5, 7], [1, 7], [1]]), []

    def forced(x):
        sizes.append(len(x))
        return F.one_hot(torch.tensor(next(tokens)), 300).float()[:, None]

    model.logits = forced
    found = model.generate(torch.randint(2, 300, (3, 8)), max_new_tokens=50)
    assert found.tolist() == [[5, 5, 1, 0], [1, 0, 0, 0], [5, 7, 7, 1]] and sizes == [3, 2, 2, 1]

def test_samples_repeat_for_a_seed_and_follow_the_distribution():
    model, prompt = small(), torch.tensor([[5, 6, 7, EOS]])

    def draw(seed, top_k=0):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, max_new_tokens=1, num_samples=4000, temperature=2.0,
                              top_k=top_k, generator=generator)[:, 0]

    assert torch.equal(draw(0), draw(0))
    logits = model(prompt, torch.ones_like(prompt), torch.tensor([[PAD]]))[0, 0]
    expected = (logits / 2.0).softmax(-1)
    found = torch.bincount(draw(0), minlength=300) / 4000
    assert (found - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()
    assert set(draw(1, top_k=2).tolist()) == set(expected.topk(2).indices.tolist())

def test_samples_of_a_prompt_are_adjacent():
    model, prompts = small(), torch.randint(2, 300, (3, 8))
    found = model.generate(prompts, max_new_tokens=5, num_samples=2)
    assert torch.equal(found, model.generate(prompts.repeat_interleave(2, 0), max_new_tokens=5))

def test_generation_turns_dropout_off_and_training_mode_on_again():
    model, prompt = small(dropout_rate=0.5).train(), torch.randint(2, 300, (2, 8))
    found = model.generate(prompt, max_new_tokens=8)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=8)) and model.training

def test_a_model_can_be_trained_on_what_it_generated():
    model, prompt = small(), torch.randint(2, 300, (2, 8))
    ids = model.generate(prompt, max_new_tokens=8)
    ids[:, 0] = 5
    model.train()(prompt, prompt != PAD, ids).sum().backward()
    assert model.shared.weight.grad[5].abs().sum() > 0

def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        model = small(dropout_rate=0.1).train()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = switch
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(*gradients))

@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_within_its_rounding(autocast):
    model = small() if autocast else small().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, tokens = model(*inputs()), model.generate(inputs()[0], max_new_tokens=4)
    assert relative_error(found.float(), small()(*inputs())) < 0.03 and tokens.shape == (4, 4)

def test_a_row_of_padding_gives_no_nan_and_is_decoded_as_forward_would():
    model, sources = small(), torch.tensor([[5, 6, EOS] + [PAD] * 3, [PAD] * 6])
    logits = model(sources, sources != PAD, torch.full((2, 1), PAD))[:, 0]
    assert logits.isfinite().all()
    assert torch.equal(model.generate(sources, max_new_tokens=1)[:, 0], logits.argmax(-1))

# --- layers for the CPU ---

@pytest.mark.parametrize("rows", [1, 8, 65])
def test_packed_weights_multiply_as_pytorch_does_for_weights_of_every_size(rows):
    torch.manual_seed(0)
    layer, x = Linear(48, 300), torch.randn(rows, 1, 48)
    layer.weight.data = torch.randn(300, 48) * 10.0 ** torch.linspace(-7, 4, 300)[:, None]
    expected = F.linear(x.double(), layer.weight.double())
    scale = x.double().norm(dim=-1, keepdim=True) * layer.weight.double().norm(dim=-1)
    with torch.no_grad(), packed_weights(layer):
        found = layer(x)
    assert found.dtype == torch.float32 and ((found - expected).abs() <= 1e-6 * scale).all()

def test_packed_layers_have_gradients_and_autocast_and_follow_their_weights_afterwards():
    layer, x = Linear(8, 8), torch.randn(3, 8)
    with packed_weights(torch.nn.ModuleList([layer])), packed_weights(layer):
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.weight.grad, x.sum(0).expand(8, 8))
    with torch.no_grad():
        with contextlib.suppress(KeyError), packed_weights(layer):
            raise KeyError
        layer.weight.zero_()
        assert not layer(x).any()

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_in_another_dtype_are_not_packed(dtype):
    layer, x = Linear(8, 8).to(dtype), torch.randn(3, 8, dtype=dtype)
    with torch.no_grad(), packed_weights(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight))

def test_a_packed_model_generates_the_same_tokens():
    model, (input_ids, mask, _) = small(), inputs()
    expected = model.generate(input_ids, mask, max_new_tokens=20)
    with packed_weights(model.decoder, model.lm_head):
        assert torch.equal(model.generate(input_ids, mask, max_new_tokens=20), expected)

def test_dropout_drops_at_its_rate_independently_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)
    y = Dropout(0.1)(x)
    dropped = (y == 0).double()
    assert dropped.mean().item() == pytest.approx(0.1, abs=4 * (0.09 / x.numel()) ** 0.5)
    assert y.mean().item() == pytest.approx(1, abs=2e-3) and len(y.unique()) == 2
    for axis in (0, 1):  # the drops of a row or a column vary as independent ones do
        expected = (0.09 / x.shape[axis]) ** 0.5
        assert dropped.mean(axis).std().item() == pytest.approx(expected, rel=0.1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())

def test_dropout_does_nothing_in_evaluation_or_at_rate_0():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)

# --- the tokenizer ---

def test_the_tokenizer_agrees_with_transformers(real, transformers):
    folder = real / "tokenizers" / "t5"
    ours, theirs = Tokenizer(folder), transformers.T5Tokenizer.from_pretrained(folder)
    assert len(ours.pieces) == 32000
    lines = (real / "datasets" / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for text in [text for line in lines for text in json.loads(line).values()]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids and ours.decode(ids) == theirs.decode(ids, **options)

def test_decoding_leaves_out_ids_without_a_piece(real):
    tokenizer = Tokenizer(real / "tokenizers" / "t5" / "spiece.model")
    ids = [*tokenizer.encode("two clips"), 32100, 32127, PAD]
    assert tokenizer.decode(torch.tensor(ids)) == "two clips"

@pytest.mark.parametrize("vocabulary", ["toy", "T5's"])
def test_every_text_has_ids_and_a_text_again(vocabulary, request):
    tokenizer = Tokenizer(TOY / "student" if vocabulary == "toy" else
                          request.getfixturevalue("real") / "tokenizers" / "t5")
    rng = random.Random(0)
    texts = ["", " ", "\0", "x" * 100_000, "5 " * 50_000, "\u0301" * 20_000, "😀" * 20_000]
    for text in texts + [random_text(rng) for _ in range(2000)]:
        ids = tokenizer.encode(text)
        assert ids[-1] == EOS and all(0 <= i < len(tokenizer.pieces) for i in ids)
        assert len(tokenizer.split(text)) == len(ids) - 1
        tokenizer.decode(ids).encode("utf-8")  # complete characters

def test_a_vocabulary_with_more_pieces_than_the_model_has_ids_is_refused(real, tmp_path):
    small().save_pretrained(tmp_path)
    Tokenizer(real / "tokenizers" / "t5").save(tmp_path)
    with pytest.raises(UserError, match="spiece.model: 32000 pieces, .* only 300 ids"):
        t5.load_pretrained(tmp_path)

# --- damaged files ---

NESTED = b"[" * 200_000
NORM = "encoder.final_layer_norm.weight"  # (128,)
INDEX = "model.safetensors.index.json"

@pytest.fixture
def student(tmp_path):
    """A folder with a copy of the toy student."""
    return shutil.copytree(TOY / "student", tmp_path / "student")

@pytest.fixture
def message(student, refused):
    """message() loads the student, which must fail; return the error message."""
    return lambda: refused(t5, "student", "text", "--device", "cpu")

def change_json(function):
    """Return a damage to a JSON file: function(object) changes it."""

    def change(content):
        loaded = json.loads(content)
        function(loaded)
        return json.dumps(loaded)

    return change

def change_header(function):
    """Return a damage to a safetensors file: function(header) changes it."""

    def change(content):
        end = 8 + int.from_bytes(content[:8], "little")
        header = change_json(function)(content[8:end]).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]

    return change

def test_a_missing_file_of_a_model_is_named(student, message):
    for name in ("spiece.model", "model.safetensors", "config.json"):
        (student / name).rename(student / "elsewhere")
        assert f"no {name}" in message()
        (student / "elsewhere").rename(student / name)

@pytest.mark.parametrize("name, content", [
    ("config.json", half), ("config.json", b""), ("config.json", b'{"d_model": "\xff"}'),
    ("config.json", b"[]"), ("config.json", NESTED),
    ("spiece.model", half), ("spiece.model", b""), ("spiece.model", b"<html>"),
    ("spiece.model", random.Random(0).randbytes(20_000)),
    ("model.safetensors", half), ("model.safetensors", lambda content: content[:-9]),
    ("model.safetensors", lambda content: content[:300]),
    ("model.safetensors", b""), ("model.safetensors", b"\1\0\0\0"),
    ("model.safetensors", b"\4" + bytes(7) + b"abcd"), ("model.safetensors", bytes(8) + NESTED),
    ("model.safetensors", len(NESTED).to_bytes(8, "little") + NESTED),
    ("model.safetensors", lambda content: bytes(7) + b"\x40" + content[8:]),  # 4 EB of header
    ("model.safetensors", lambda content: b"\xff" * 8 + content[8:]),
])
def test_a_damaged_file_of_a_model_is_named(student, message, name, content):
    damage(student / name, content)
    assert f"{name}: not a" in message()

@pytest.mark.parametrize("changes", [
    dict(model_type="bert"), dict(eos_token_id=2), dict(decoder_start_token_id=1),
    dict(dense_act_fn="silu"), dict(feed_forward_proj="swish"), dict(d_model=-1),
    dict(d_model="512"), dict(num_layers=10**9), dict(num_layers=100_000),
    dict(num_decoder_layers="2"), dict(d_ff=7), dict(relative_attention_num_buckets=1),
    dict(vocab_size=262_143, d_model=262_143),  # 256 GB
])
def test_a_config_of_something_else_is_refused(student, message, changes):
    damage(student / "config.json", change_json(lambda config: config.update(changes)))
    assert "config.json" in message()

@pytest.mark.parametrize("values, part", [
    (dict(dtype="F8_E4M3"), "F8_E4M3"), (dict(dtype=None), "model.safetensors"),
    (dict(data_offsets=[-512, 0]), NORM), (dict(data_offsets=[0, 512]), "wrong offsets"),
    (dict(data_offsets=[2**40, 2**40 + 512]), "wrong offsets"), (dict(data_offsets="ab"), "s: not"),
    (dict(shape=[-8, -16]), "model.safetensors"), (dict(shape=[2**40, 2**40]), NORM),
    (dict(shape="ab"), "model.safetensors"), (dict(shape=[1, 128]), "encoder.final_norm.weight"),
])
def test_a_tensor_that_is_not_as_its_file_or_config_says_is_refused(student, message, values, part):
    change = change_header(lambda header: header[NORM].update(values))
    damage(student / "model.safetensors", change)
    assert part in message()

def test_missing_and_unknown_tensors_are_named(student, message):
    damage(student / "model.safetensors", change_header(lambda header: header.update(
        {"decoder.adapter.weight": header.pop(NORM)})))
    assert re.search("(?i)missing.* .encoder.final_norm.weight.*decoder.adapter", message())

@pytest.mark.parametrize("spaces", range(4))
def test_tensors_may_begin_at_any_byte_of_a_file(student, spaces):
    expected = T5.from_pretrained(student)(*inputs())
    damage(student / "model.safetensors", change_header(lambda header: header.update(
        __metadata__={"": " " * spaces})))
    assert torch.equal(T5.from_pretrained(student)(*inputs()), expected)

@pytest.mark.parametrize("name, content, part", [
    ("part-0", half, "part-0: not a complete shard"), ("outside", "", "no part-1"),
    (INDEX, half, INDEX), (INDEX, '{"weight_map": ["a"]}', INDEX), (INDEX, "[]", INDEX),
    (INDEX, '{"weight_map": {"a": 1}}', INDEX), (INDEX, '{"weight_map": {}}', "0 tensors"),
    (INDEX, '{"weight_map": {"a": "../outside"}}', "no outside"),
    (INDEX, '{"weight_map": {"a": ".."}}', "student"),
])
def test_a_damaged_index_or_shard_is_named(student, message, name, content, part):
    tensors = T5.from_pretrained(student).hf_tensors()
    (student / "model.safetensors").rename(student.parent / "outside")
    weight_map = {name: f"part-{i % 2}" for i, name in enumerate(tensors)}
    for shard in ("part-0", "part-1"):
        some = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        t5.write_safetensors(some, student / shard)
    damage(student / INDEX, json.dumps({"weight_map": weight_map}))
    T5.from_pretrained(student)
    damage(student / name, content)
    if name == "outside":
        (student / "part-1").unlink()
    assert part in message()

class RunsCode:
    def __reduce__(self):
        return Path.mkdir, (Path("code-ran"),)

@pytest.mark.parametrize("content", [
    pickle.dumps({"shared.weight": RunsCode()}, 2), {"shared.weight": RunsCode()}, b"", b"<html>",
    {"shared.weight": torch.ones(2, dtype=torch.int64)}, {"a": "b"}, [torch.ones(2)], None,
])
def test_a_pickle_of_anything_but_weights_is_refused_and_runs_no_code(student, message, content):
    (student / "model.safetensors").unlink()
    path = student / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert "student" in message() and not Path("code-ran").exists()

@pytest.mark.parametrize("options", [{}, dict(pad_id=0, eos_id=1, unk_id=3, bos_id=-1)])
def test_a_vocabulary_that_is_not_t5s_is_refused(student, message, options):
    lines = (TOY / "gsm8k" / "train.jsonl").read_text()[:50_000].splitlines()
    with open(student / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=150,
            hard_vocab_limit=False, minloglevel=2, **options)
    assert "spiece.model: not a T5 vocabulary" in message()

# --- downloads ---

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "c0ffee" * 6 + "babe"
SMALL = "/google/flan-t5-small/resolve/main"

class Server(http.server.ThreadingHTTPServer):
    """A server on this machine: files = {path: bytes}, as on the hub also under their commit.

    faults = {path: [one per GET]}: an HTTP status, an address to redirect to, or a word below.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def find(self, path):
        """Return the bytes of a path or, as the hub's API does, the list of a model's files."""
        if not path.startswith("/api/models/"):
            return self.server.files.get(path)
        folder = path.removeprefix("/api/models").replace("/revision/", "/resolve/")
        folder = folder.replace("?blobs=true", "/")
        files = {name.removeprefix(folder): content for name, content in self.server.files.items()
                 if name.startswith(folder)}
        siblings = [{"rfilename": name, "size": len(content),
                     "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                     if len(content) > 1000 else None} for name, content in files.items()]
        return files and json.dumps({"sha": COMMIT, "siblings": siblings}).encode()

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        path = self.path.replace(COMMIT, "main")
        faults = self.server.faults.get(path) if self.command == "GET" else None
        fault, content = faults.pop(0) if faults else "", self.find(path)
        if isinstance(fault, int) or not content:
            return self.send_error(fault or 404)
        if fault == "nonsense":
            return self.wfile.write(b"\0\1 no HTTP at all\r\n\r\n")
        start = int(re.search(r"\d+", self.headers.get("Range", "0"))[0])
        start = {"no ranges": 0, "another range": start // 2}.get(fault, start)
        if start >= len(content):
            return self.send_error(416)
        content = content[start : start + 1000 if fault == "claims less" else None]
        redirect = re.match("/|[a-z]+:", fault)
        self.send_response(302 if redirect else 206 if start else 200)
        self.send_header("Location", fault)
        self.send_header("Content-Type", "text/html" if fault == "html" else "text/plain")
        self.send_header("Content-Length", 0 if redirect else len(content))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET" and not redirect:
            self.wfile.write(content[:1000] if fault == "cut" else content)

    do_HEAD = do_GET

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(t5.time, "sleep", lambda seconds: None)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()

other_server = server

@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A hub with the toy student by the name of flan-t5-small, an empty cache, and a token."""
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for path in (TOY / "student").iterdir():
        server.files[f"{SMALL}/{path.name}"] = path.read_bytes()
    server.files[f"{SMALL}/pytorch_model.bin"] = b"not needed"
    return server

def test_a_broken_download_resumes_where_it_broke(server, tmp_path):
    server.files["/f"], server.faults["/f"] = CONTENT, ["cut", 503, "cut"]
    assert download(f"{server.url}/f", tmp_path / "f", SHA256).read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=2000-"]
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]

def test_an_interrupted_download_leaves_a_part_that_the_next_one_continues(server, tmp_path):
    server.files["/f"], server.faults["/f"] = CONTENT, ["cut"] * 4
    with pytest.raises(UserError, match="4,000 of 5,120 bytes"):
        download(f"{server.url}/f", tmp_path / "f", size=len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["f.part"]
    download(f"{server.url}/f", tmp_path / "f")
    assert server.requests[-1][1]["Range"] == "bytes=4000-"
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert download("http://nowhere.invalid/", tmp_path / "f") == tmp_path / "f"  # no request

@pytest.mark.parametrize("faults", [
    ["nonsense"], ["cut"], ["html"], [429], [500], ["claims less"], ["another range"],
    ["no ranges"] * 3])
@pytest.mark.parametrize("known", [{}, dict(sha256=SHA256), dict(size=len(CONTENT))])
def test_a_fault_is_overcome(server, tmp_path, faults, known):
    if not known and faults[0] in ("another range", "claims less"):
        return  # nothing shows these
    server.files["/f"], server.faults["/f"] = CONTENT, ["cut", *faults]
    assert download(f"{server.url}/f", tmp_path / "f", **known).read_bytes() == CONTENT

@pytest.mark.parametrize("part", [b"other" * 10, CONTENT + b"more", CONTENT])
def test_a_part_of_another_file_is_not_continued(server, tmp_path, part):
    server.files["/f"] = CONTENT
    (tmp_path / "f.part").write_bytes(part)
    assert download(f"{server.url}/f", tmp_path / "f", SHA256).read_bytes() == CONTENT

@pytest.mark.parametrize("faults, requests", [
    ([401], 1), ([403], 1), ([404], 1), ([503] * 9, 4), (["html"] * 9, 4), (["cut"] * 9, 4),
    (["file:///etc/hostname"] * 9, 4), (["ftp://127.0.0.1:9/f"] * 9, 4), (["/f"] * 99, None)])
def test_a_failed_download_leaves_no_file_and_states_what_is_needed(
        server, tmp_path, faults, requests):
    server.files["/f"], server.faults["/f"] = CONTENT, faults
    with pytest.raises(UserError) as error:
        download(f"{server.url}/f", tmp_path / "f")
    assert f"{server.url}/f" in str(error.value) and f"copy the file to {tmp_path}/f" in str(error.value)
    assert not (tmp_path / "f").exists() and len(server.requests) == (requests or len(server.requests))

@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", b""])
def test_a_wrong_checksum_is_refused(server, tmp_path, content):
    server.files["/f"] = content
    with pytest.raises(UserError, match="SHA-256"):
        download(f"{server.url}/f", tmp_path / "f", SHA256)
    assert not any(tmp_path.iterdir())

# --- the hub ---

def snapshot(home):
    return home / "hub" / "models--google--flan-t5-small" / "snapshots" / COMMIT

def test_a_model_is_downloaded_once_to_where_huggingface_hub_finds_it(
        hub, tmp_path, monkeypatch, transformers):
    import huggingface_hub

    t5.load_pretrained("google/flan-t5-small")
    folder, count = snapshot(tmp_path / "cache"), len(hub.requests)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "spiece.model"]
    found = huggingface_hub.snapshot_download(
        "google/flan-t5-small", cache_dir=tmp_path / "cache" / "hub", local_files_only=True)
    assert Path(found) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    t5.load_pretrained("google/flan-t5-small")
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        Tokenizer("google/flan-t5-base")
    assert len(hub.requests) == count

def test_a_model_that_huggingface_hub_downloaded_is_found_without_a_request(
        hub, tmp_path, monkeypatch, transformers):
    import huggingface_hub

    for name in ("config.json", "model.safetensors", "spiece.model"):
        huggingface_hub.hf_hub_download("google/flan-t5-small", name, endpoint=hub.url,
                                        cache_dir=tmp_path / "other", token="hf_secret")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    count = len(hub.requests)
    assert t5.load_pretrained("google/flan-t5-small") and len(hub.requests) == count

def test_a_cached_model_is_completed_from_its_own_commit(hub, tmp_path):
    Tokenizer("google/flan-t5-small")
    T5.from_pretrained("google/flan-t5-small")
    listings = [path for path, _ in hub.requests if path.startswith("/api")]
    assert [re.search("revision/(.*)[?]", path)[1] for path in listings] == ["main", COMMIT, COMMIT]

def test_shards_and_pickles_are_downloaded_if_a_model_has_no_single_safetensors_file(hub):
    model = T5.from_pretrained(TOY / "student")
    
def test_a_file_is_checked_by_the_hubs_sha256_and_the_token_stays_on_the_hub(
        hub, other_server, tmp_path):
    path = f"{SMALL}/model.safetensors"
    hub.faults[path] = [other_server.url + path] * 9
    other_server.files[path] = hub.files[path][:-1] + b"x"
    with pytest.raises(UserError, match="SHA-256"):
        T5.from_pretrained("google/flan-t5-small")
    other_server.files[path], other_server.faults[path] = hub.files[path], ["claims less", "cut"]
    assert T5.from_pretrained("google/flan-t5-small")
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in hub.requests)
    assert not any("Authorization" in headers for _, headers in other_server.requests)

def test_the_token_is_sent_again_along_a_redirect_on_the_hub(hub):
    for path in (f"{SMALL}/spiece.model", "/api/models/google/flan-t5-small/revision/main?blobs=true"):
        old = path.replace("google/flan-t5-small", "old-name")
        hub.files[old], hub.faults[old] = b"-", [path]
    assert Tokenizer("old-name")
    assert {headers.get("Authorization") for _, headers in hub.requests} == {"Bearer hf_secret"}

def test_the_token_is_not_sent_unencrypted(hub):
    request = urllib.request.Request("https://hub.example/f")
    request.add_unredirected_header("Authorization", "Bearer hf_secret")
    new = t5.Redirects().redirect_request(request, None, 302, "", {}, "http://hub.example/f")
    assert not new.has_header("Authorization")

@pytest.mark.parametrize("token", ["hf_secret\nx: y", "hf_\u2713secret"])
def test_a_token_that_cannot_be_one_is_not_shown(hub, token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="^((?!secret).)*$"):
        Tokenizer("google/flan-t5-small")

def test_a_refused_token_is_not_shown_and_the_message_names_the_variable(hub):
    hub.faults["/api/models/google/flan-t5-small/revision/main?blobs=true"] = [401]
    with pytest.raises(UserError, match="^((?!secret).)*HF_TOKEN((?!secret).)*$"):
        Tokenizer("google/flan-t5-small")

def test_the_token_of_a_login_is_used_without_its_line_end(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    damage(tmp_path / "cache" / "token", "hf_stored\n")
    Tokenizer("google/flan-t5-small")
    assert {headers["Authorization"] for _, headers in hub.requests} == {"Bearer hf_stored"}

@pytest.mark.parametrize("endpoint", [
    "hub.example", "http://[", "http://127.0.0.1:9", "http://127.0.0.1:99999", "http://a:b"])
def test_a_wrong_endpoint_is_an_error_that_names_it(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=f"cannot read {re.escape(endpoint)}"):
        Tokenizer("google/flan-t5-small")

@pytest.mark.parametrize("listing", [b"<html>", b"[]", b"{}", b'{"sha": 5, "siblings": []}'])
def test_a_listing_that_is_none_is_an_error(hub, listing):
    pass

def test_an_index_cannot_point_out_of_the_folder(hub, tmp_path):
    hub.files[f"{SMALL}/{INDEX}"] = b'{"weight_map": {"a": "../../../../evil", "b": "/evil"}}'
    del hub.files[f"{SMALL}/model.safetensors"]
    hub.files[f"{SMALL}/evil"] = hub.files[f"{SMALL}/../../../../evil"] = b"evil"
    with pytest.raises(UserError, match="evil: not a complete shard"):
        T5.from_pretrained("google/flan-t5-small")
    assert list(tmp_path.rglob("evil*")) == [snapshot(tmp_path / "cache") / "evil"]

@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "a/b/c", "", "a b"])
def test_what_is_neither_a_folder_nor_a_name_is_refused_without_a_request(hub, name):
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer(name)
    assert not hub.requests
