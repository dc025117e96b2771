"""t5.py against transformers and huggingface_hub, and on damaged files and misbehaving servers."""

import contextlib
import copy
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import t5
from conftest import ROOT, TOY, damage, half, random_text
from t5 import EOS, PAD, T5, UNK, Dropout, Linear, T5Config, Tokenizer, UserError
from t5 import download, packed_weights, pad_sequences

FAMILIES = {"T5 1.0": ("relu", True), "T5 1.1 and FlanT5": ("gated-gelu", False),
            "T5 1.1 with relu": ("relu", False)}
SHAPE = dict(vocab_size=300, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_decoder_layers=2,
             num_heads=4)
INDEX = "model.safetensors.index.json"
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

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
    """Return a random checkpoint that transformers wrote, and its model as it reads it."""
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

@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_equal_those_of_transformers_with_padding(reference, training):
    folder, theirs = reference
    ours = T5.from_pretrained(folder, dropout_rate=0.0).train(training)
    theirs.zero_grad()
    expected, found, weight = their_logits(theirs), ours(*inputs()), torch.randn(4, 30, 300)
    assert relative_error(found, expected) < 1e-5
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = ours.hf_tensors(of=lambda parameter: parameter.grad)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name

def no_token_twice(rows, logits):
    return logits.scatter(1, rows, -torch.inf) if rows.shape[1] else logits

@pytest.mark.parametrize("processor", [None, no_token_twice])
def test_greedy_tokens_equal_those_of_transformers(reference, processor):
    folder, theirs = reference
    input_ids, mask, _ = inputs()
    after_start = [lambda rows, logits: processor(rows[:, 1:], logits)] if processor else None
    expected = theirs.generate(input_ids, attention_mask=mask, max_new_tokens=60, do_sample=False,
                               logits_processor=after_start)[:, 1:]
    ours = T5.from_pretrained(folder)
    found = ours.generate(input_ids, max_new_tokens=60, logits_processor=processor)
    assert torch.equal(found, expected)

def test_transformers_loads_what_it_saves_with_the_same_logits(reference, transformers, tmp_path):
    ours = T5.from_pretrained(reference[0])
    ours.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert relative_error(their_logits(theirs), ours(*inputs())) < 1e-5
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), ours(*inputs()))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_every_kind_of_file_is_read_in_every_dtype(reference, tmp_path, kind, dtype):
    folder, theirs = reference
    theirs = copy.deepcopy(theirs).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if "shards" in kind else "1GB")
    assert ("shards" in kind) == (tmp_path / INDEX).exists()
    if "bin" in kind:
        for path in tmp_path.glob("model*"):
            path.unlink()
        tensors = theirs.state_dict() | {UNUSED: torch.ones(1)}
        shards = {"pytorch_model.bin": tensors}
        if "shards" in kind:
            shared = tensors.pop("shared.weight")  # by the name of its copy
            shards = {"part-0": tensors, "part-1": {"encoder.embed_tokens.weight": shared}}
            damage(tmp_path / "pytorch_model.bin.index.json",
                   json.dumps({"weight_map": dict(enumerate(shards))}))
        for shard, some in shards.items():
            torch.save(some, tmp_path / shard)
    for wanted in (dtype, torch.float32):
        model = T5.from_pretrained(tmp_path, dtype=wanted)
        expected = T5.from_pretrained(folder).to(dtype).to(wanted).state_dict()
        assert model.shared.weight.dtype == wanted and not model.training
        assert all(torch.equal(found, expected[name]) for name, found in model.state_dict().items())

@pytest.mark.parametrize("settings", [
    {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True},
    {"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "gelu"}])
def test_the_activation_is_the_one_that_transformers_uses(transformers, tmp_path, settings):
    """The first settings are those of FlanT5's first upload."""
    ours = small(feed_forward_proj=settings["feed_forward_proj"])
    for name, parameter in ours.named_parameters():
        if ".ff.w" in name:
            parameter.data *= 3  # the two kinds of GELU differ by up to 5e-4
    ours.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["dense_act_fn"], stored["feed_forward_proj"]
    damage(tmp_path / "config.json", json.dumps(stored | settings))
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = T5.from_pretrained(tmp_path)
    assert relative_error(ours(*inputs()), their_logits(theirs)) < 1e-5
    ours.save_pretrained(tmp_path)
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), ours(*inputs()))

def test_random_weights_have_the_spread_of_transformers(transformers):
    torch.manual_seed(0)
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

@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_the_weights_of_wrapped_models_are_found(tmp_path, prefix, wrapper):
    model = small()
    model.save_pretrained(tmp_path)
    tensors = {prefix + name: tensor for name, tensor in model.hf_tensors().items()}
    if wrapper is None:
        t5.write_safetensors(tensors, tmp_path / "model.safetensors")
        assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), model(*inputs()))
    (tmp_path / "model.safetensors").unlink()
    checkpoint = {wrapper: tensors, "step": 3} if wrapper else tensors
    torch.save(checkpoint, tmp_path / "pytorch_model.bin")
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), model(*inputs()))

def test_the_weights_of_a_model_with_compiled_blocks_are_found(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    tensors = {re.sub(r"(block\.\d+)", r"\1._orig_mod", name): tensor
               for name, tensor in model.hf_tensors().items()}
    t5.write_safetensors(tensors, tmp_path / "model.safetensors")
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), model(*inputs()))

# --- generation ---

def test_rows_that_end_leave_the_batch_without_changing_the_others():
    model = small()
    with torch.no_grad():  # make </s> probable, so that rows end at different steps
        model.lm_head.weight[EOS] = model.lm_head.weight.abs().mean(0) * 2.5
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(2, 300, (16, 150), generator=generator)  # encoded in two chunks
    together = model.generate(prompts, max_new_tokens=40)
    ends = [(row == EOS).nonzero()[0, 0].item() if EOS in row else 40 for row in together]
    assert len(set(ends)) > 3
    for prompt, row, end in zip(prompts, together, ends):
        single = model.generate(prompt[None], max_new_tokens=40)[0]
        assert torch.equal(single[: end + 1], row[: end + 1]) and not row[end + 1 :].any()

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

def test_generation_ignores_dropout_and_leaves_a_model_that_can_be_trained_on_the_output():
    model, prompt = small(dropout_rate=0.5).train(), torch.randint(2, 300, (2, 8))
    ids = model.generate(prompt, max_new_tokens=8)
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=8)) and model.training
    model(prompt, prompt != PAD, ids).sum().backward()
    assert model.shared.weight.grad.abs().sum() > 0

@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_sample_from_logits_that_are_not_finite_is_refused(value, top_k):
    model, prompts = small().train(), torch.randint(2, 300, (2, 8))

    def damaged(rows, logits):
        logits[-1, :: 1 if value == -torch.inf else 300] = value  # -inf is fine for some tokens
        return logits

    options = dict(max_new_tokens=3, temperature=1.0, top_k=top_k, logits_processor=damaged)
    with pytest.raises(UserError, match="logits are not finite; try --dtype float32"):
        model.generate(prompts, **options)

def test_greedy_decoding_does_not_look_at_the_logits_again(monkeypatch):
    logits = torch.full((2, 300), torch.nan)
    monkeypatch.setattr(torch.Tensor, "isfinite", None)  # it would wait for a GPU
    assert t5.sample_token(logits, 0.0, 0, None).shape == (2,)

@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("training", [True, False])
def test_an_error_in_generation_leaves_the_mode_of_the_model(error, training):
    def fails(rows, logits):
        raise error

    model = small().train(training)
    with pytest.raises(error):
        model.generate(torch.randint(2, 300, (2, 8)), logits_processor=fails)
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

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

def test_packed_weights_multiply_as_pytorch_does_for_weights_of_every_size():
    torch.manual_seed(0)
    layer = Linear(48, 300)
    layer.weight.data = torch.randn(300, 48) * torch.logspace(-7, 4, 300)[:, None]
    for x in (torch.randn(rows, 1, 48) for rows in (1, 8, 65)):
        expected = F.linear(x.double(), layer.weight.double())
        scale = x.double().norm(dim=-1, keepdim=True) * layer.weight.double().norm(dim=-1)
        with torch.no_grad(), packed_weights(layer):
            assert ((layer(x) - expected).abs() <= 1e-6 * scale).all()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):  # not packed
        with torch.no_grad(), packed_weights(layer.to(dtype)):
            assert torch.equal(layer(x.to(dtype)), F.linear(x.to(dtype), layer.weight))

def test_packed_layers_have_gradients_and_autocast_and_follow_their_weights_afterwards():
    torch.manual_seed(0)
    layer, x = Linear(8, 8), torch.randn(3, 8)
    with packed_weights(torch.nn.ModuleList([layer])), packed_weights(layer):
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(8, 8), atol=1e-6)
    with torch.no_grad():
        with contextlib.suppress(KeyError), packed_weights(layer):
            raise KeyError
        layer.weight.zero_()
        assert not layer(x).any()

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
    assert ours.decode(torch.tensor([*ours.encode("two clips"), 32100, 32127, PAD])) == "two clips"

def test_sentinels_have_the_ids_of_transformers(real, transformers):
    folder = real / "tokenizers" / "t5"
    ours, theirs = Tokenizer(folder), transformers.T5Tokenizer.from_pretrained(folder)
    rng = random.Random(0)
    parts = ["a", "Hello", " world", " ", "\n", ".", "é", "<extra_id_0>", "<extra_id_7>",
             "<extra_id_99>", "<extra_id_100>", "<extra_id_07>", "<extra_id_", "<EXTRA_ID_1>"]
    texts = [f"x<extra_id_{n}>y" for n in range(100)]
    texts += ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(1000)]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.split(text) == theirs.convert_ids_to_tokens(ids[:-1]) or UNK in ids
    text = "Thank you <extra_id_0> me to your party<extra_id_1>week."
    assert {32099, 32098} < set(ours.encode(text)) and len(ours.pieces) == 32000
    decoded = theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.decode(ours.encode(text)) == decoded == "Thank you me to your party week."

def test_another_vocabulary_has_no_sentinels():
    toy = Tokenizer(TOY / "tuned-1M")
    assert max(toy.encode("a <extra_id_0> b")) < len(toy.pieces)

def test_added_tokens_may_be_sentinels_only(real, tmp_path):
    Tokenizer(real / "tokenizers" / "t5").save(tmp_path)
    added = {f"<extra_id_{n}>": 32099 - n for n in range(100)}
    damage(tmp_path / "added_tokens.json", json.dumps(added))
    assert Tokenizer(tmp_path).encode("<extra_id_3>") == [32096, EOS]
    for text in (json.dumps(added | {"<answer>": 32100}), '{"<extra_id_0>": 32100}', "{"):
        damage(tmp_path / "added_tokens.json", text)
        with pytest.raises(UserError, match="added_tokens.json: "):
            Tokenizer(tmp_path)

@pytest.mark.parametrize("vocabulary", ["toy", "T5's"])
def test_every_text_has_ids_and_a_text_again(vocabulary, request):
    tokenizer = Tokenizer(TOY / "tuned-1M" if vocabulary == "toy" else
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

@pytest.fixture
def student(tmp_path):
    """Return a folder with a copy of the toy student."""
    return shutil.copytree(TOY / "tuned-1M", tmp_path / "student")

@pytest.fixture
def message(student, refused):
    """Return a function that loads the student, which must fail, and returns the error message."""
    return lambda: refused(t5, "student", "text", "--device", "cpu")

def config(**values):
    """Return a damage to a config.json."""
    return lambda content: json.dumps(json.loads(content) | values)

def header(function):
    """Return a damage to a safetensors file: function(header) changes it."""

    def change(content):
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        function(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return change

def entry(**values):
    """Return a damage to what a safetensors file says of a tensor (128,) in bf16."""
    return header(lambda entries: entries["encoder.final_layer_norm.weight"].update(values))

def vocabulary(**options):
    """Return a SentencePiece model that is not T5's."""
    file, lines = io.BytesIO(), (TOY / "gsm8k" / "train.jsonl").read_text()[:50_000].splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=150, hard_vocab_limit=False,
        minloglevel=2, **options)
    return file.getvalue()

NESTED = b"[" * 200_000
DAMAGES = {
    "config.json": [
        half, b"", b"[]", b'{"d_model": "\xff"}', NESTED, config(model_type="bert"),
        config(eos_token_id=2), config(decoder_start_token_id=1), config(dense_act_fn="silu"),
        config(feed_forward_proj="swish"), config(d_model=-1), config(d_model="512"),
        config(num_layers=10**9), config(num_layers=100_000), config(num_decoder_layers="2"),
        config(d_ff=7), config(relative_attention_num_buckets=1),
        config(vocab_size=262_143, d_model=262_143)],  # 256 GB
    "model.safetensors": [
        half, b"", b"\1\0\0\0", b"\4" + bytes(7) + b"abcd", bytes(8) + NESTED,
        len(NESTED).to_bytes(8, "little") + NESTED, lambda content: content[:300],
        lambda content: content[:-9], lambda content: b"\xff" * 8 + content[8:],
        lambda content: bytes(7) + b"\x40" + content[8:], entry(dtype="F8_E4M3"), entry(dtype=None),
        entry(data_offsets=[-256, 0]), entry(data_offsets=[0, 256]), entry(data_offsets="ab"),
        entry(data_offsets=[2**40, 2**40 + 256]), entry(shape=[-8, -16]), entry(shape="ab"),
        entry(shape=[2**40, 2**40])],
    "spiece.model": [half, b"", b"<html>", random.Random(0).randbytes(20_000), vocabulary(),
                     vocabulary(pad_id=0, eos_id=1, unk_id=3, bos_id=-1)],
}

@pytest.mark.parametrize("name, content", [(name, x) for name in DAMAGES for x in DAMAGES[name]])
def test_a_damaged_file_of_a_model_is_named(student, message, name, content):
    damage(student / name, content)
    assert name in message()
    (student / name).unlink()
    assert f"no {name}" in message()

NUMBERS = {name: kind for name, kind in T5Config.__annotations__.items() if kind in (int, float)}

@pytest.mark.parametrize("value", [float("nan"), float("inf"), "512", -1, True, [1]])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_setting_that_is_no_number_is_named(student, name, value):
    damage(student / "config.json", config(**{name: value}))
    with pytest.raises(UserError, match=f"^.*/config.json: .*: {name} is .*$"):
        T5.from_pretrained(student)

# --- folders as people have them ---

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 990345061\n"

@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "spiece.model", INDEX])
def test_a_git_lfs_pointer_is_named(student, message, name):
    if name in (INDEX, "pytorch_model.bin"):
        (student / "model.safetensors").unlink()
    damage(student / name, POINTER)
    assert re.search(rf"{name}: .*run `git lfs pull`", message())

def test_a_vocabulary_that_is_a_git_lfs_pointer_is_named_if_given_as_a_file(tmp_path):
    damage(tmp_path / "spiece.model", POINTER)
    with pytest.raises(UserError, match="spiece.model: .*run `git lfs pull`"):
        Tokenizer(tmp_path / "spiece.model")

def test_an_adapter_must_be_merged(student, message):
    (student / "model.safetensors").rename(student / "adapter_model.safetensors")
    (student / "config.json").rename(student / "adapter_config.json")
    assert re.search("adapter.*merge_and_unload.*save_pretrained", message())
    shutil.copy(TOY / "tuned-1M" / "config.json", student)
    assert re.search("adapter.*merge_and_unload.*save_pretrained", message())

def test_a_folder_that_transformers_5_saved_needs_the_vocabulary(
        real, transformers, student, message):
    source = real / "tokenizers" / "t5"
    (student / "spiece.model").unlink()
    transformers.T5Tokenizer.from_pretrained(source).save_pretrained(student)
    (student / "spiece.model").unlink(missing_ok=True)  # transformers 4 saves it, 5 does not
    assert re.search("no spiece.model in .*copy.*google/flan-t5-base", message())

def test_missing_unknown_and_misshapen_tensors_are_named(student, message):
    def change(entries):
        entries["decoder.adapter.weight"] = entries.pop("encoder.final_layer_norm.weight")
        entries["decoder.final_layer_norm.weight"]["shape"] = [1, 128]

    damage(student / "model.safetensors", header(change))
    for part in ("Missing.*encoder.final_norm.weight", "Unexpected.*decoder.adapter.weight",
                 "size mismatch for decoder.final_norm.weight"):
        assert re.search(part, message())

def test_tensors_may_begin_at_any_byte_of_a_file(student):
    expected = T5.from_pretrained(student)(*inputs())
    for spaces in range(4):
        change = header(lambda entries: entries.update(__metadata__={"": " " * spaces}))
        damage(student / "model.safetensors", change)
        assert torch.equal(T5.from_pretrained(student)(*inputs()), expected)

@pytest.mark.parametrize("name, content, part", [
    ("part-0", half, "part-0: not a complete"), (INDEX, half, INDEX), (INDEX, "[]", INDEX),
    (INDEX, '{"weight_map": ["a"]}', INDEX), (INDEX, '{"weight_map": {"a": 1}}', INDEX),
    (INDEX, '{"weight_map": {"a": "part-0", "b": "model-00002-of-00002.safetensors"}}',
     "no model-00002-of-00002.safetensors in"),
    (INDEX, '{"weight_map": {}}', "0 tensors"), (INDEX, '{"weight_map": {"a": "b"}}', "no b"),
    (INDEX, '{"weight_map": {"a": "../outside"}}', "no outside"),
    (INDEX, '{"weight_map": {"a": ".."}}', "not a complete"),
])
def test_a_damaged_index_or_shard_is_named(student, message, name, content, part):
    shutil.copy(student / "model.safetensors", student.parent / "outside")
    (student / "model.safetensors").rename(student / "part-0")
    damage(student / INDEX, '{"weight_map": {"a": "part-0"}}')
    assert T5.from_pretrained(student)
    damage(student / name, content)
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

# --- downloads ---

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "c0ffee" * 6 + "babe"
NAME = "google/flan-t5-small"
SMALL = f"/{NAME}/resolve/main"

class Handler(http.server.BaseHTTPRequestHandler):
    """Serve server.files, {path: bytes}, and list them as the hub does, whose "main" is COMMIT.

    server.faults: {path: [one per GET]}, each an HTTP status, an address to redirect to, or a word.
    """

    def log_message(self, *arguments):
        pass

    def list_files(self, folder):
        """Return the list of a model's files in the form of the hub's API."""
        siblings = [
            {"rfilename": path.removeprefix(folder), "size": len(content),
             "lfs": {"sha256": hashlib.sha256(content).hexdigest()} if len(content) > 999 else None}
            for path, content in self.server.files.items() if path.startswith(folder)]
        return siblings and json.dumps({"sha": COMMIT, "siblings": siblings}).encode()

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        path, head = self.path.replace(COMMIT, "main"), self.command == "HEAD"
        content, faults = self.server.files.get(path), self.server.faults.get(path)
        if api := re.fullmatch(r"/api/models(/.*)/revision/main\?blobs=true", path):
            content = self.list_files(f"{api[1]}/resolve/main/")
        fault = faults.pop(0) if faults and not head else ""
        redirect = re.match("/|[a-z]+:", str(fault))
        if isinstance(fault, int) or not (content or redirect):
            return self.send_error(fault or 404)
        if fault == "nonsense":
            return self.wfile.write(b"\0\1 no HTTP at all\r\n\r\n")
        start = int(re.search(r"\d+", self.headers.get("Range", "0"))[0])
        start = {"no ranges": 0, "another range": start // 2}.get(fault, start)
        content = (content or b"")[start : start + 1000 if fault == "claims less" else None]
        status = 302 if redirect else 206 if start else 200
        self.send_response(status if redirect or content else 416)
        for name, value in (
            ("Location", fault), ("Content-Type", "text/html" if fault == "html" else "text/plain"),
            ("Content-Length", len(content)), ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{hashlib.sha1(content).hexdigest()}"'),
        ):
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(content[:1000] if fault == "cut" else content)

    do_HEAD = do_GET

def start_server(monkeypatch):
    monkeypatch.setattr(t5.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.requests = {}, {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()

server = pytest.fixture(start_server)
other_server = pytest.fixture(start_server)

@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """Start a hub that calls the toy student NAME; make the cache empty and set a token."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for path in (TOY / "tuned-1M").iterdir():
        server.files[f"{SMALL}/{path.name}"] = path.read_bytes()
    server.files[f"{SMALL}/pytorch_model.bin"] = b"not needed"
    return server

def test_a_broken_download_resumes_where_it_broke(server, tmp_path):
    server.files["/f"], server.faults["/f"] = CONTENT, ["cut", 503, "cut"]
    assert download(f"{server.url}/f", tmp_path / "f", SHA256).read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=2000-"]
    assert download("http://nowhere.invalid/", tmp_path / "f")  # no request for a file that exists

def test_an_interrupted_download_leaves_a_part_that_the_next_one_continues(server, tmp_path):
    server.files["/f"], server.faults["/f"] = CONTENT, ["cut"] * 4
    with pytest.raises(UserError, match="4,000 of 5,120 bytes"):
        download(f"{server.url}/f", tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f.part"]
    assert download(f"{server.url}/f", tmp_path / "f").read_bytes() == CONTENT
    assert server.requests[-1][1]["Range"] == "bytes=4000-"

@pytest.mark.parametrize("faults", [["nonsense"], ["cut"], ["html"], [429], [500], ["claims less"],
                                    ["another range"], ["no ranges"] * 3])
@pytest.mark.parametrize("known", [{}, dict(sha256=SHA256), dict(size=len(CONTENT))])
def test_a_fault_of_a_server_is_overcome(server, tmp_path, faults, known):
    if known or faults[0] not in ("another range", "claims less"):  # which nothing else shows
        server.files["/f"], server.faults["/f"] = CONTENT, ["cut", *faults]
        assert download(f"{server.url}/f", tmp_path / "f", **known).read_bytes() == CONTENT

def test_a_part_of_another_file_is_not_continued(server, tmp_path):
    server.files["/f"] = CONTENT
    for i, part in enumerate((b"other" * 10, CONTENT + b"more", CONTENT)):
        damage(tmp_path / f"{i}.part", part)
        assert download(f"{server.url}/f", tmp_path / f"{i}", SHA256).read_bytes() == CONTENT

@pytest.mark.parametrize("fault, requests", [
    (401, 1), (403, 1), (404, 1), (503, 4), ("html", 4), ("file:///etc/hostname", 4),
    ("ftp://127.0.0.1:9/f", 4), ("/f", 20)])
def test_a_failed_download_leaves_no_file_and_states_what_is_needed(
        server, tmp_path, fault, requests):
    server.files["/f"], server.faults["/f"] = CONTENT, [fault] * 99
    with pytest.raises(UserError, match=f"^.*{server.url}/f .*copy the file to {tmp_path}/f$"):
        download(f"{server.url}/f", tmp_path / "f")
    assert not (tmp_path / "f").exists() and len(server.requests) == requests

def test_a_wrong_checksum_is_refused(server, tmp_path):
    server.files["/f"] = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match="SHA-256"):
        download(f"{server.url}/f", tmp_path / "f", SHA256)
    assert not any(tmp_path.iterdir())

# --- the hub ---

def test_a_model_is_downloaded_once_to_where_huggingface_hub_finds_it(
        hub, tmp_path, monkeypatch, transformers):
    import huggingface_hub

    t5.load_pretrained(NAME)
    listings = [path for path, _ in hub.requests if path.startswith("/api")]
    commits = [re.search("revision/(.*)[?]", path)[1] for path in listings]
    assert commits == ["main", COMMIT, COMMIT]  # all files are of one commit
    folder = huggingface_hub.snapshot_download(NAME, cache_dir=tmp_path / "cache" / "hub",
                                               local_files_only=True)
    assert {path.name for path in Path(folder).iterdir()} == set(DAMAGES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(hub.requests)
    t5.load_pretrained(NAME)
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        Tokenizer("google/flan-t5-base")
    assert len(hub.requests) == count

@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_a_model_that_huggingface_hub_downloaded_is_found_without_a_request(
        hub, tmp_path, monkeypatch, transformers, variable):
    import huggingface_hub

    for name in DAMAGES:
        huggingface_hub.hf_hub_download(NAME, name, endpoint=hub.url, token="hf_secret",
                                        cache_dir=tmp_path / "other")
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    count = len(hub.requests)
    assert t5.load_pretrained(NAME) and len(hub.requests) == count

@pytest.mark.parametrize("settings", [
    {"HF_HUB_OFFLINE": "1"}, {"TRANSFORMERS_OFFLINE": "true"}, {"HUGGINGFACE_HUB_CACHE": "old"},
    {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
    {"HF_HUB_CACHE": "new", "HUGGINGFACE_HUB_CACHE": "old"}])
def test_old_variables_mean_what_they_mean_to_huggingface_hub(
        hub, tmp_path, monkeypatch, transformers, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, str(tmp_path / value) if "CACHE" in name else value)
    code = ("from huggingface_hub import constants;"
            "print(constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    cache, offline = found.stdout.split()
    if offline == "True":
        with pytest.raises(UserError, match="TRANSFORMERS_OFFLINE"):
            Tokenizer(NAME)
    else:
        assert Tokenizer(NAME).path.is_relative_to(cache)
    assert bool(hub.requests) == (offline == "False")

def test_a_file_is_checked_by_the_hubs_sha256_and_the_token_stays_on_the_hub(hub, other_server):
    path = f"{SMALL}/model.safetensors"
    hub.faults[path] = [other_server.url + path] * 9
    other_server.files[path] = hub.files[path][:-1] + b"x"
    with pytest.raises(UserError, match="SHA-256"):
        T5.from_pretrained(NAME)
    other_server.files[path], other_server.faults[path] = hub.files[path], ["claims less", "cut"]
    assert T5.from_pretrained(NAME)
    assert {headers.get("Authorization") for _, headers in hub.requests} == {"Bearer hf_secret"}
    assert not any("Authorization" in headers for _, headers in other_server.requests)

def test_the_token_is_sent_again_along_a_redirect_on_the_hub(hub):
    for path in (f"{SMALL}/spiece.model", f"/api/models/{NAME}/revision/main?blobs=true"):
        hub.faults[path.replace(NAME, "old-name")] = [path]
    assert Tokenizer("old-name")
    assert {headers.get("Authorization") for _, headers in hub.requests} == {"Bearer hf_secret"}

def test_the_token_is_not_sent_unencrypted():
    request = urllib.request.Request("https://hub.example/f")
    request.add_header("Authorization", "Bearer hf_secret")
    new = t5.Redirects().redirect_request(request, None, 302, "", {}, "http://hub.example/f")
    assert not new.has_header("Authorization")

@pytest.mark.parametrize("token", ["hf_secret", "hf_secret\nx: y", "hf_\u2713secret"])
def test_a_refused_token_is_not_shown(hub, token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults[f"/api/models/{NAME}/revision/main?blobs=true"] = [401]
    with pytest.raises(UserError) as error:
        Tokenizer(NAME)
    assert "secret" not in str(error.value)
    assert "HF_TOKEN" in str(error.value) or token != "hf_secret"

def test_the_token_of_a_login_is_used_without_its_line_end(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    damage(tmp_path / "cache" / "token", "hf_stored\n")
    Tokenizer(NAME)
    assert {headers["Authorization"] for _, headers in hub.requests} == {"Bearer hf_stored"}

@pytest.mark.parametrize("endpoint", [
    "hub.example", "http://[", "http://127.0.0.1:9", "http://127.0.0.1:99999", "http://a:b"])
def test_a_wrong_endpoint_is_an_error_that_names_it(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=f"^{re.escape(endpoint)}/api.*copy the model's files to"):
        Tokenizer(NAME)

def test_an_index_cannot_point_out_of_the_folder(hub, tmp_path):
    hub.files[f"{SMALL}/{INDEX}"] = b'{"weight_map": {"a": "../../../../evil"}}'
    hub.files[f"{SMALL}/evil"] = hub.files[f"{SMALL}/../../../../evil"] = b"evil"
    del hub.files[f"{SMALL}/model.safetensors"], hub.files[f"{SMALL}/pytorch_model.bin"]
    with pytest.raises(UserError, match=f"{COMMIT}/evil: not a complete"):
        T5.from_pretrained(NAME)
    assert [path.parent.name for path in tmp_path.rglob("*evil*")] == [COMMIT]

@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c", "a b"])
def test_what_is_neither_a_folder_nor_a_name_is_refused_without_a_request(hub, name):
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer(name)
    assert not hub.requests

# --- commands ---

COMMAND = "t5.py", TOY / "tuned-1M", "Q: How many? A:", "--max-new-tokens", 5, "--device", "cpu"

def test_the_command_generates_samples(run):
    done = run(*COMMAND, "--temperature", 1, "--num-samples", 2)
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr

def test_a_command_whose_reader_has_gone_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / COMMAND[0], *map(str, COMMAND[1:])]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": ""})
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")

@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device", "a.bin"), "error: a.bin: No space left on device; fix"),
    (UserError("what to do"), "error: what to do"), (KeyboardInterrupt(), 130)])
def test_an_error_that_the_user_can_fix_is_one_line(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        t5.run_command(main)
    assert str(stopped.value.code).startswith(str(code))

@pytest.mark.parametrize("option, value", [
    ("--temperature", "-1"), ("--temperature", "nan"), ("--num-samples", "0"),
    ("--max-new-tokens", "0"), ("--dtype", "int8")])
def test_the_command_refuses_options_out_of_their_range(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", [*map(str, COMMAND), option, value])
    with pytest.raises(SystemExit) as stopped:
        t5.main()
    assert stopped.value.code == 2 and f"argument {option}: invalid" in capsys.readouterr().err

def test_the_help_gives_every_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["t5.py", "--help"])
    with pytest.raises(SystemExit):
        t5.main()
    options = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(options) == 5 and all("(default: " in option for option in options)

def test_options_out_of_their_range_are_refused():
    positive, share = t5.in_range(int, above=0), t5.in_range(float, below=1)
    assert positive("1") == 1 and share("0") == 0
    for kind, text in ((positive, "0"), (positive, "x"), (share, "1"), (share, "nan")):
        with pytest.raises(ValueError):
            kind(text)
