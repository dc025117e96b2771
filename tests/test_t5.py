"""t5.py against transformers and huggingface_hub, and the mistakes that people make with files."""

import copy
import hashlib
import http.server
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import t5
from conftest import TOY, damage, reference, serve
from t5 import EOS, PAD, T5, UNK, T5Config, Tokenizer, UserError, pad_sequences

FAMILIES = {"T5 1.0": ("relu", True), "T5 1.1 and FlanT5": ("gated-gelu", False)}
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
    """Return the norm of the difference, relative to the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()

# --- the model against transformers ---

@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, transformers, tmp_path_factory):
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
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder, transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()

def their_logits(model):
    """Return the logits of a model of transformers for inputs()."""
    names = "input_ids", "attention_mask", "decoder_input_ids"
    return model(**dict(zip(names, inputs()))).logits

@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_equal_those_of_transformers(checkpoint, training):
    folder, theirs = checkpoint
    ours = T5.from_pretrained(folder, dropout_rate=0.0).train(training)
    expected, found, weight = their_logits(theirs), ours(*inputs()), torch.randn(4, 30, 300)
    assert relative_error(found, expected) < 1e-5

    theirs.zero_grad()
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {t5.hf_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name

def test_greedy_tokens_equal_those_of_transformers(checkpoint):
    folder, theirs = checkpoint
    input_ids, mask, _ = inputs()
    expected = theirs.generate(input_ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    found = T5.from_pretrained(folder).generate(input_ids, max_new_tokens=60)
    assert torch.equal(found, expected[:, 1:])  # theirs begin with the start token

@pytest.mark.parametrize("name", ["tuned-0.04M", "tuned-0.1M", "tuned-0.25M", "tuned-1M"])
def test_trained_models_generate_what_they_generate_in_transformers(transformers, name):
    model, tokenizer = t5.load_pretrained(TOY / name)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(TOY / name).eval().float()
    lines = (TOY / "gsm8k" / "test.jsonl").read_text().splitlines()[:60]
    questions = [json.loads(line)["question"] for line in lines]
    ids = [tokenizer.encode(f"Q: {question}\nLet's think step by step") for question in questions]
    input_ids = pad_sequences(ids)
    expected = theirs.generate(input_ids, attention_mask=(input_ids != PAD).long(),
                               max_new_tokens=40, do_sample=False)
    found = model.generate(input_ids, max_new_tokens=40)
    assert torch.equal(found, expected[:, 1:])
    assert len(found.unique(dim=0)) > 50  # the comparison is one of many outputs

def test_random_weights_have_the_spread_of_transformers(transformers):
    torch.manual_seed(0)
    options = SHAPE | dict(d_model=256, d_kv=64, d_ff=512, feed_forward_proj="gated-gelu",
                           tie_word_embeddings=False)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).state_dict()
    theirs["lm_head.weight"] = torch.randn(300, 256) * 256**-0.5  # here like any other matrix
    for name, weight in T5(T5Config(**options)).named_parameters():
        if "norm" not in name:
            expected = theirs[t5.hf_name(name)].std().item()
            assert weight.std().item() == pytest.approx(expected, rel=0.2), name

# --- files ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_every_kind_of_file_is_read_in_both_dtypes(checkpoint, tmp_path, kind, dtype):
    theirs = copy.deepcopy(checkpoint[1]).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if "shards" in kind else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shards" in kind)
    if "bin" in kind:  # transformers 5 writes no such files, but the hub has many
        for path in tmp_path.glob("model*"):
            path.unlink()
        tensors = list(theirs.state_dict().items())
        if "shards" in kind:
            shards = {"part-0": dict(tensors[:9]), "part-1": dict(tensors[9:])}
            index = {name: shard for shard in shards for name in shards[shard]}
            damage(tmp_path / "pytorch_model.bin.index.json", json.dumps({"weight_map": index}))
        else:
            shards = {"pytorch_model.bin": dict(tensors)}
        for shard, some in shards.items():
            torch.save(some, tmp_path / shard)

    expected = their_logits(theirs.float())
    ours = T5.from_pretrained(tmp_path)
    assert not ours.training and ours.shared.weight.dtype == torch.float32
    assert relative_error(ours(*inputs()), expected) < 1e-5
    ours = T5.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours.shared.weight.dtype == torch.bfloat16
    assert relative_error(ours(*inputs()).float(), expected) < 0.05

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_t5_saves(checkpoint, transformers, tmp_path, dtype):
    ours = T5.from_pretrained(checkpoint[0], dtype=dtype)
    ours.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval().float()
    ours = ours.float()
    assert relative_error(their_logits(theirs), ours(*inputs())) < 1e-5
    prompts = inputs()[0][:1]  # config.json also says how to decode
    found = ours.generate(prompts, max_new_tokens=9)
    assert torch.equal(theirs.generate(prompts, max_new_tokens=9)[:, 1:], found)
    assert torch.equal(T5.from_pretrained(tmp_path)(*inputs()), ours(*inputs()))

@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_decide_whether_the_head_is_tied(tmp_path, tied, scaled):
    """The versions of transformers write different things into tie_word_embeddings."""
    model = small(tie_word_embeddings=tied, scale_decoder_outputs=scaled)
    if not tied:  # differ by a rounding
        model.lm_head.weight.data = model.shared.weight.data.bfloat16().float()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.shared.weight) == tied
    assert torch.equal(again(*inputs()), model(*inputs()))

def test_a_change_of_loaded_weights_stays_in_memory(tmp_path):
    small().save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    with torch.no_grad():
        model.shared.weight.mul_(2)
    assert torch.equal(T5.from_pretrained(tmp_path).shared.weight * 2, model.shared.weight)

# --- generation ---

def test_finished_rows_are_padded_and_change_no_others():
    model = small()
    with torch.no_grad():  # make </s> probable, so that rows end at different steps
        model.lm_head.weight[EOS] = model.lm_head.weight.abs().mean(0) * 3.5
    prompts = torch.randint(2, 300, (12, 20), generator=torch.Generator().manual_seed(3))
    together = model.generate(prompts, max_new_tokens=30)
    ends = [row.tolist().index(EOS) if EOS in row else 30 for row in together]
    assert len(set(ends)) > 3 and together.shape == (12, min(max(ends) + 1, 30))
    for prompt, row, end in zip(prompts, together, ends):
        alone = model.generate(prompt[None], max_new_tokens=30)[0]
        assert torch.equal(alone, row[: end + 1]) and not row[end + 1 :].any()

def test_decoding_ends_with_the_last_row_and_finished_rows_cost_nothing():
    model, tokens, sizes = small(), iter([[5, 1, 5], [5, 7], [1, 7], [1]]), []

    def forced(x):
        sizes.append(len(x))
        return F.one_hot(torch.tensor(next(tokens)), 300).float()[:, None]

    model.logits = forced
    found = model.generate(torch.randint(2, 300, (3, 8)), max_new_tokens=50)
    assert found.tolist() == [[5, 5, 1, 0], [1, 0, 0, 0], [5, 7, 7, 1]]
    assert sizes == [3, 2, 2, 1]

def test_samples_follow_the_distribution_at_the_temperature():
    model, prompt, n = small(), torch.tensor([[5, 6, 7, EOS]]), 8000
    logits = model(prompt, torch.ones_like(prompt), torch.tensor([[PAD]]))[0, 0]
    expected = (logits / 2.0).softmax(-1)
    torch.manual_seed(0)
    found = model.generate(prompt.expand(n, -1), max_new_tokens=1, temperature=2.0)
    frequencies = torch.bincount(found[:, 0], minlength=300) / n
    deviations = (frequencies - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviations.abs().max() < 5 and deviations.square().mean() < 1.5

@torch.no_grad()
def test_stepwise_logits_equal_those_of_forward_and_rows_can_be_selected():
    model, (input_ids, mask, targets) = small(), inputs()
    tokens = F.pad(targets, (1, -1), value=PAD)
    expected = model(input_ids, mask, tokens)
    cache = model.start_decoding(input_ids, max_new_tokens=30)
    rows = torch.arange(4)
    for t in range(30):
        logits = model.next_logits(tokens[rows, t], cache)
        assert logits.shape == (len(rows), 300) and logits.dtype == torch.float32
        assert relative_error(logits, expected[rows, t]) < 1e-5
        if t in (10, 20):  # reorder, drop and repeat rows, as a beam search does
            chosen = torch.tensor([3, 1, 2, 2] if t == 10 else [2, 0, 1])
            cache.select(chosen)
            rows = rows[chosen]

def test_a_row_of_padding_gives_no_nan_and_is_decoded_as_forward_would():
    model, sources = small(), torch.tensor([[5, 6, EOS] + [PAD] * 3, [PAD] * 6])
    logits = model(sources, sources != PAD, torch.full((2, 1), PAD))[:, 0]
    assert logits.isfinite().all()
    assert torch.equal(model.generate(sources, max_new_tokens=1)[:, 0], logits.argmax(-1))

# --- memory and precision ---

def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        model = small(dropout_rate=0.1).train()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = switch
        model(*inputs()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(*gradients))

def test_autocast_to_bfloat16_stays_within_its_rounding():
    model, expected = small(), small()(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found, tokens = model(*inputs()), model.generate(inputs()[0], max_new_tokens=4)
        found.float().square().mean().backward()
    assert relative_error(found.float(), expected) < 0.03 and tokens.shape == (4, 4)
    assert model.shared.weight.grad.isfinite().all()

# --- the tokenizer ---

ODD = ["", " ", "  two  spaces ", "tab\tand\nline\r\n", "no\u00a0break\u3000wide", "½ ﬁ ａＢ１ ①",
       "cafe\u0301 naïve Straße", "😀 한국 שלום", "a\u200bb\u00adc", "<b>5 < 6</b>", "x" * 300]

def test_the_tokenizer_agrees_with_that_of_transformers(tokenizer, real, datasets, transformers):
    reference("google.protobuf", "protobuf")  # with it transformers reads spiece.model
    theirs = transformers.T5Tokenizer.from_pretrained(real / "tokenizers" / "t5")
    lines = (datasets / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    texts = [text for line in lines for text in json.loads(line).values()]
    for path in sorted((datasets / "bbh" / "bbh").glob("*.json")):
        texts += [example["input"] for example in json.loads(path.read_text())["examples"][:3]]
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(tokenizer.pieces) == 32000
    for text in texts + ODD:
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        if UNK not in ids and text not in ODD:  # which their versions decode in different ways
            assert tokenizer.split(text) == theirs.convert_ids_to_tokens(ids[:-1])
            assert tokenizer.decode(ids) == theirs.decode(ids, **options)

def test_special_tokens_and_ids_without_a_piece_are_not_decoded(tokenizer):
    ids = [PAD, *tokenizer.encode("two clips"), 32000, 32127, PAD]
    assert tokenizer.decode(torch.tensor(ids)) == "two clips"

# --- the hub ---

NAME, COMMIT = "google/flan-t5-small", "c0ffee" * 6 + "babe"
FILES = "config.json", "model.safetensors", "spiece.model"

class HubHandler(http.server.SimpleHTTPRequestHandler):
    """Like the hub, answer 401 for what is missing, because it could be private."""

    def send_error(self, code, *arguments, **options):
        super().send_error(401 if code == 404 else code, *arguments, **options)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve the toy's student as NAME, with an empty cache; return the folder of its files."""
    folder = tmp_path / "hub" / NAME / "resolve" / COMMIT
    shutil.copytree(TOY / "tuned-1M", folder)
    damage(folder / "pytorch_model.bin", "not needed")
    siblings = []
    for path in folder.iterdir():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        siblings.append({"rfilename": path.name,
                         "lfs": None if path.suffix == ".json" else {"sha256": sha256}})
    listing = json.dumps({"sha": COMMIT, "siblings": siblings})
    damage(tmp_path / "hub" / "api" / "models" / NAME, listing)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    t5.hub_listing.cache_clear()
    with serve(tmp_path / "hub", HubHandler) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield folder
    t5.hub_listing.cache_clear()

def test_a_model_is_downloaded_once_to_where_huggingface_hub_finds_it(hub, tmp_path, monkeypatch):
    model, tokenizer = t5.load_pretrained(NAME)
    expected = T5.from_pretrained(TOY / "tuned-1M")
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight) and tokenizer.encode("a")

    snapshot_download = reference("huggingface_hub").snapshot_download
    folder = snapshot_download(NAME, cache_dir=tmp_path / "cache" / "hub", revision=COMMIT,
                               local_files_only=True)
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(FILES)

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    t5.hub_listing.cache_clear()
    assert t5.load_pretrained(NAME)
    with pytest.raises(UserError, match="flan-t5-base"):
        t5.load_pretrained("google/flan-t5-base")

@pytest.mark.parametrize("change", [lambda content: content[: len(content) // 2],
                                    lambda content: content[:-1] + b"x"])
def test_an_incomplete_or_wrong_download_is_refused_and_can_be_repeated(hub, tmp_path, change):
    path = hub / "model.safetensors"
    content = path.read_bytes()
    damage(path, change)
    with pytest.raises(UserError, match="model.safetensors.*hash"):
        T5.from_pretrained(NAME)
    assert not [*(tmp_path / "cache").rglob("*.safetensors*")]
    damage(path, content)
    assert T5.from_pretrained(NAME)

def test_the_first_remedy_for_a_misspelled_name_is_to_check_it(hub, refused):
    message = refused(t5, "google/flan-t5-smal", "text")
    assert "google/flan-t5-smal" in message and "401" in message
    assert message.partition("; ")[2].startswith("check the name")

# --- mistakes ---

@pytest.fixture
def student(tmp_path):
    """Return a folder with a copy of the toy's student."""
    return Path(shutil.copytree(TOY / "tuned-1M", tmp_path / "student"))

@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_incomplete_file_is_named(student, refused, name):
    damage(student / name, lambda content: content[: len(content) // 2])
    assert name in refused(t5, student, "text")
    (student / name).unlink()
    assert name in refused(t5, student, "text")

def test_weights_whose_names_do_not_fit_are_refused_with_names_of_both_sides(student):
    weights = t5.read_safetensors(student / "model.safetensors")
    weights = {f"module.{name}": weight.clone() for name, weight in weights.items()}
    t5.write_safetensors(weights, student / "model.safetensors")
    with pytest.raises(UserError) as error:
        T5.from_pretrained(student)
    names = re.findall(r"[\w.]+\.weight", str(error.value))
    assert {name.startswith("module.") for name in names} == {True, False}

def test_an_unknown_activation_is_named(student, refused):
    damage(student / "config.json", lambda content: content.replace(b"gated-gelu", b"gated-silu"))
    message = refused(t5, student, "text")
    assert "gated-silu" in message and "config.json" in message

@pytest.mark.parametrize("vocab_size", [300, 512 + 129])
def test_a_vocabulary_that_cannot_be_the_models_is_refused_by_both_numbers(tmp_path, vocab_size):
    Tokenizer(TOY / "tuned-1M").save(tmp_path)
    small(vocab_size=512 + 128).save_pretrained(tmp_path)
    assert t5.load_pretrained(tmp_path)
    small(vocab_size=vocab_size).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"\b{vocab_size}\b.*\b512\b|\b512\b.*\b{vocab_size}\b"):
        t5.load_pretrained(tmp_path)

class RunsCode:
    def __reduce__(self):
        return Path.mkdir, (Path("code-ran"),)

def test_a_pickle_that_would_run_code_is_refused(student, refused):
    (student / "model.safetensors").unlink()
    damage(student / "pytorch_model.bin", pickle.dumps({"shared.weight": RunsCode()}, 2))
    assert "pytorch_model.bin" in refused(t5, student, "text")
    assert not Path("code-ran").exists()

# --- the command ---

def test_the_command_prints_what_the_model_generates(command):
    text = "Q: Sam has 17 books and Ann has 18. They sell 4. How many books are left? A:"
    model, tokenizer = t5.load_pretrained(TOY / "tuned-1M")
    expected = tokenizer.decode(model.generate(torch.tensor([tokenizer.encode(text)]))[0])
    assert command(t5, TOY / "tuned-1M", text) == expected + "\n"
