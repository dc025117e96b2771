"""Damaged and hostile files through every reader, by the commands that a user types.

Each case must end with one line that names the file, the place and a remedy, exit status 1, no traceback, nothing
written, and no more than a little memory. A few run as processes of their own, the others in this one.
"""

import contextlib
import gzip
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys

import pytest
import sentencepiece
import torch

import eval as ev
import specialize as sp
import t5
from conftest import TOY
from data.release import CODEX
from data.runs import recorded, save_checkpoint
from t5 import T5, Tokenizer, run_command

REMEDY = "[Ff]etch|mend|delete|take .* out|copy|another name|resume|makes|whole\\?|writes|--|README"
BIG = b"[" * 200_000


@contextlib.contextmanager
def little_memory():
    """Within it this process may grow by a gigabyte of addresses at most."""
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if os.path.exists("/proc/self/statm") else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder):
    """{path: bytes} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(command, folder, monkeypatch, *arguments):
    """Run a command in the folder; it must refuse, as this file's first lines say. Returns its message."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, arguments)])
    before = contents(folder)
    with pytest.raises(SystemExit) as stopped, little_memory():
        run_command(command.main)
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    assert re.search(REMEDY, message) and len(message) < 2000, message
    assert contents(folder) == before
    return message


def put(name, content):
    """A damage: the file's new content, bytes or text."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def change(name, function):
    """A damage: a function of the file's bytes."""
    return lambda folder: (folder / name).write_bytes(function((folder / name).read_bytes()))


# --- folders of models ---


def configured(**values):
    return change("config.json", lambda text: json.dumps(json.loads(text) | values).encode())


def header(function):
    """A damage of a safetensors header: a function of its object."""

    def damage(content):
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(function(entries) or entries).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return change("model.safetensors", damage)


def entry(name="encoder.final_layer_norm.weight", **values):
    return header(lambda entries: entries[name].update(values))


def shards(change_index):
    """A damage: the weights in two shards, and something done to their index or to them."""

    def damage(folder):
        tensors = list(T5.from_pretrained(folder).hf_tensors().items())
        (folder / "model.safetensors").unlink()
        for number, some in enumerate((tensors[::2], tensors[1::2])):
            t5.write_safetensors(dict(some), folder / f"part-{number}.safetensors")
        weight_map = {name: f"part-{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        change_index(folder)

    return damage


def bin_file(content):
    """A damage: pytorch_model.bin in place of model.safetensors, with these bytes or what torch.save makes."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return damage


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def vocabulary(**options):
    """A damage: a real SentencePiece model, but none of T5's."""

    def damage(folder):
        text = [TOY.joinpath("gsm8k", "train.jsonl").read_text()[:50_000]]
        with open(folder / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text[0].split("\n")), model_writer=file, vocab_size=150, hard_vocab_limit=False,
                minloglevel=2, **options,
            )  # fmt: skip

    return damage


half = lambda content: content[: len(content) // 2]
MODELS = {
    "config cut short": ("config.json", change("config.json", half)),
    "config empty": ("config.json", put("config.json", "")),
    "config not UTF-8": ("config.json", put("config.json", b'{"d_model": "\xff"}')),
    "config a list": ("config.json", put("config.json", "[]")),
    "config nested without end": ("config.json", put("config.json", BIG)),
    "config missing": ("config.json", lambda folder: (folder / "config.json").unlink()),
    "config of another kind": ("config.json: not the configuration of a T5", configured(model_type="bert")),
    "config negative": ("config.json: d_model is -1", configured(d_model=-1)),
    "config text for number": ("config.json: d_model is '512'", configured(d_model="512")),
    "config without end of layers": ("config.json: num_layers is 1000000000", configured(num_layers=10**9)),
    "config more layers than tensors": ("tensors, but config.json says 100000 layers", configured(num_layers=100_000)),
    "config layers of the decoder": ("config.json: num_decoder_layers is '2'", configured(num_decoder_layers="2")),
    "config a vocabulary too large for the memory": ("shape", configured(vocab_size=262_143, d_model=262_143)),
    "config another shape": ("config.json says", configured(d_ff=7)),
    "config activation": ("feed_forward_proj is 'swish'", configured(feed_forward_proj="swish")),
    "config tie": ("tie_word_embeddings is 'no'", configured(tie_word_embeddings="no")),
    "config buckets": ("relative_attention_num_buckets", configured(relative_attention_num_buckets=1)),
    "config dropout": ("dropout_rate is NaN".lower()[:15], configured(dropout_rate=float("nan"))),
    "safetensors empty": ("model.safetensors", put("model.safetensors", b"")),
    "safetensors 4 bytes": ("model.safetensors", put("model.safetensors", b"\1\0\0\0")),
    "safetensors header beyond the file": (
        "the header claims 4,611,686,018,427,387,904 bytes",
        change("model.safetensors", lambda content: struct.pack("<Q", 2**62) + content[8:]),
    ),
    "safetensors header cut short": ("model.safetensors", change("model.safetensors", lambda content: content[:300])),
    "safetensors data cut short": ("bytes", change("model.safetensors", lambda content: content[:-9])),
    "safetensors header a list": ("model.safetensors", header(lambda entries: [1])),
    "safetensors header nested": (
        "model.safetensors",
        put("model.safetensors", struct.pack("<Q", len(BIG)) + BIG),
    ),
    "safetensors not JSON": ("model.safetensors", put("model.safetensors", struct.pack("<Q", 4) + b"abcd")),
    "safetensors dtype": ("stored as F8_E4M3", entry(dtype="F8_E4M3")),
    "safetensors no dtype": ("'dtype'", header(lambda entries: entries["shared.weight"].pop("dtype") and None)),
    "safetensors negative offset": ("encoder.final_layer_norm.weight", entry(data_offsets=[-384, 0])),
    "safetensors overlap": (
        "where the tensor before it ends",
        header(lambda e: e["encoder.final_layer_norm.weight"].update(data_offsets=e["decoder.final_layer_norm.weight"]["data_offsets"])),
    ),
    "safetensors offsets beyond": ("does not begin at byte", entry(data_offsets=[2**40, 2**40 + 384])),
    "safetensors negative shape": ("encoder.final_layer_norm.weight", entry(shape=[-8, -12])),
    "safetensors shape of text": ("encoder.final_layer_norm.weight", entry(shape="ab")),
    "safetensors another shape": (
        "encoder.final_layer_norm.weight has shape",
        header(lambda e: e["encoder.final_layer_norm.weight"].update(shape=[1, *e["encoder.final_layer_norm.weight"]["shape"]])),
    ),
    "safetensors no weights": ("no model.safetensors", lambda folder: (folder / "model.safetensors").unlink()),
    "shard missing": ("part-1.safetensors", shards(lambda folder: (folder / "part-1.safetensors").unlink())),
    "shard cut short": ("part-0.safetensors", shards(change("part-0.safetensors", half))),
    "index cut short": ("index.json", shards(change("model.safetensors.index.json", half))),
    "index a list": ("index.json", shards(put("model.safetensors.index.json", '{"weight_map": ["a"]}'))),
    "index out of the folder": ("index.json", shards(put("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'))),
    "bin runs code": ("pytorch_model.bin", bin_file(pickle.dumps({"shared.weight": RunsCode()}, 2))),
    "bin runs code in a zip": ("pytorch_model.bin", bin_file({"shared.weight": RunsCode()})),
    "bin empty": ("pytorch_model.bin", bin_file(b"")),
    "bin of text": ("pytorch_model.bin", bin_file(b"<html>not here</html>")),
    "bin a list": ("pytorch_model.bin", bin_file([torch.ones(2)])),
    "bin of whole numbers": ("pytorch_model.bin", bin_file({"shared.weight": torch.ones(2, dtype=torch.int64)})),
    "spiece missing": ("no spiece.model", lambda folder: (folder / "spiece.model").unlink()),
    "spiece empty": ("spiece.model", put("spiece.model", b"")),
    "spiece of text": ("spiece.model", put("spiece.model", "<html>not here</html>")),
    "spiece cut short": ("spiece.model", change("spiece.model", half)),
    "spiece random": ("spiece.model", put("spiece.model", random.Random(0).randbytes(20_000))),
    "spiece not T5's": ("spiece.model: not a T5 vocabulary", vocabulary()),
    "spiece with another unknown": ("spiece.model: not a T5 vocabulary", vocabulary(pad_id=0, eos_id=1, unk_id=3, bos_id=-1)),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_is_refused(case, tmp_path, monkeypatch):
    place, damage = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(TOY / "student", model)
    damage(model)
    message = refused(t5, tmp_path, monkeypatch, "model", "How many?", "--device", "cpu")
    assert place in message and "model" in message


# --- teachers ---

GOOD = {"question": "How many?", "answer": "5", "solution": "2 + 3 = 5"}
TOLD = GOOD | {"tokens": ["2 + 3", " = 5"], "top_logprobs": [{"2 + 3": -0.1}, {" = 5": -0.2, " is": -2.0}]}


def line(record=(), **values):
    """A damaged second line of a teacher's file."""
    return lambda: (json.dumps(TOLD) + "\n" + json.dumps(dict(record or TOLD) | values) + "\n").encode()


def without(key):
    return lambda: (json.dumps(TOLD) + "\n" + json.dumps({k: v for k, v in TOLD.items() if k != key}) + "\n").encode()


whole_gz = gzip.compress((json.dumps(TOLD) + "\n").encode() * 5000, mtime=0)
TEACHERS = {
    "empty.jsonl": ("holds no teacher record", lambda: b""),
    "cut.jsonl": ("line 2", lambda: line()()[:-20]),
    "utf8.jsonl": ("line 3", lambda: line()() + b'{"question": "\xff"}\n' + line()()),
    "blank.jsonl": ("line 3", lambda: line()() + b"\n" + line()()),
    "list.jsonl": ("line 1: not a teacher record (it is a list", lambda: b"[1]\n"),
    "nested.jsonl": ("line 1", lambda: BIG),
    "no_end.jsonl": ("line 1: not a teacher record (the line has no end)", lambda: b" " * (2**24 + 5)),
    "no_question.jsonl": ("line 2: no key 'question'", without("question")),
    "no_answer.jsonl": ("line 2: no key 'answer'", without("answer")),
    "no_solution.jsonl": ("line 2: no key 'solution'", without("solution")),
    "no_tokens.jsonl": ("line 2: no key 'tokens'", without("tokens")),
    "question_number.jsonl": ("line 2: not a teacher record (question is 5", line(question=5)),
    "question_empty.jsonl": ("line 2", line(question=" ")),
    "answer_null.jsonl": ("line 2: not a teacher record (answer is None", line(answer=None)),
    "answer_infinite.jsonl": ("line 2", line(answer="9" * 400)),
    "solution_list.jsonl": ("line 2", line(solution=["a"])),
    "tokens_text.jsonl": ("line 2: not a teacher record (tokens is '2 + 3 = 5'", line(tokens="2 + 3 = 5")),
    "token_number.jsonl": ("line 2", line(tokens=[2, " = 5"])),
    "not_spelled.jsonl": ("line 2: not a teacher record (the tokens do not spell", line(tokens=["2 + 3", " = 6"])),
    "fewer.jsonl": ("line 2: not a teacher record (2 tokens but 1 top_logprobs", line(top_logprobs=[{}])),
    "top_list.jsonl": ("line 2", line(top_logprobs=[[1], {}])),
    "top_text.jsonl": ("line 2: not a teacher record (a log-probability is '-1'", line(top_logprobs=[{"a": "-1"}, {}])),
    "positive.jsonl": ("line 2: not a teacher record (at token '2 + 3' 'a' has log-probability 0.5, above 0", line(top_logprobs=[{"a": 0.5}, {}])),
    "nan.jsonl": ("has log-probability nan, above 0 or not a number", line(top_logprobs=[{"a": float("nan")}, {}])),
    "infinite.jsonl": ("has log-probability inf", line(top_logprobs=[{"a": float("inf")}, {}])),
    "sum.jsonl": ("line 2: not a teacher record (at token '2 + 3' the candidates are no", line(top_logprobs=[{"a": -0.1, "b": -0.1}, {}])),
    "steps_negative.jsonl": ("has probability -0.25", line(GOOD, steps=[[["2 + 3 = 5", 0.5], ["a", -0.25]]])),
    "steps_nan.jsonl": ("has probability nan", line(GOOD, steps=[[["2 + 3 = 5", float("nan")]]])),
    "steps_empty.jsonl": ("line 2", line(GOOD, steps=[])),
    "steps_flat.jsonl": ("line 2", line(GOOD, steps=[1, 2])),
    "long.jsonl": ("line 2: not a teacher record (the solution has 1,000,000 characters", line(GOOD, solution="5" * 10**6)),
    "many_tokens.jsonl": ("line 2: not a teacher record (30,000 tokens", line(solution="5" * 30_000, tokens=["5"] * 30_000, top_logprobs=[{}] * 30_000)),
    "cut.jsonl.gz": ("after line", lambda: half(whole_gz)),
    "not.jsonl.gz": ("cannot be read", lambda: b"no gzip at all"),
    "damaged.jsonl.gz": ("line", lambda: whole_gz[:400] + bytes(200) + whole_gz[600:]),
    "empty.jsonl.gz": ("holds no teacher record", lambda: gzip.compress(b"")),
    "bomb.jsonl.gz": ("the line has no end", lambda: gzip.compress(bytes(2**28), 9)),
    "wrong.jsonl": ("none of 1 teacher solutions ends in its right answer", line(GOOD, solution="so 6")),
}  # fmt: skip


@pytest.mark.parametrize("name", TEACHERS)
def test_a_damaged_teacher_is_refused(name, tmp_path, monkeypatch):
    place, content = TEACHERS[name]
    text = content()
    if name == "wrong.jsonl":
        text = text.split(b"\n", 1)[1]
    (tmp_path / name).write_bytes(text)
    message = refused(sp, tmp_path, monkeypatch, "--teacher", name)
    assert place in message and name in message


class Import:
    def __reduce__(self):
        return eval, ("open('code-ran', 'w')",)


STEPS = [[[[["5", 0.9], ["5", 0.9]]]]]
CODEX_GOOD = [["Question 0: How many?"], ["Answer: so\n#### 5"], [["Model output 0: \n5"]], [[1]], STEPS]
RELEASES = {
    "runs code": ("codex_answers.pkl: ", 1, Import()),
    "in a list": ("is not plain data", 4, [Import()]),
    "no list": ("codex_questions.pkl", 0, {"a": 1}),
    "questions of numbers": ("codex_questions.pkl, item 1: 7", 0, [7]),
    "labels flat": ("codex_prediction_labels.pkl, item 1", 3, [1]),
    "steps of numbers": ("question 1", 4, [5]),
    "steps of another length": ("question 1", 4, [[]]),
    "lists of other lengths": ("different lengths", 1, ["Answer: a\n#### 1"] * 3),
    "empty": ("codex_answers.pkl", 1, b""),
    "cut short": ("codex_questions.pkl", 0, pickle.dumps(["Question 0: How many?"] * 99)[:-20]),
    "a reference far beyond": ("object 4,294,967,295", 0, b"\x80\x04]j\xff\xff\xff\xffa."),
    "a text longer than the file": ("codex_questions.pkl", 0, b"\x80\x04]\x8d" + struct.pack("<Q", 2**62) + b"a."),
}


@pytest.mark.parametrize("case", RELEASES)
def test_a_damaged_release_is_refused(case, tmp_path, monkeypatch):
    place, number, content = RELEASES[case]
    (tmp_path / "release").mkdir()
    for i, (name, good) in enumerate(zip(CODEX, CODEX_GOOD)):
        bad = content if i == number else good
        (tmp_path / "release" / name).write_bytes(bad if isinstance(bad, bytes) else pickle.dumps(bad))
    message = refused(sp, tmp_path, monkeypatch, "--teacher", "release")
    assert place in message and "release" in message


# --- problem sets ---

LAUGHS = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(10)
) + "]><x><Problem ID='1'><Body>&k;</Body><Question>?</Question><Answer>1</Answer></Problem></x>"  # fmt: skip
XML = "<x><Problem ID='7'><Body>{}</Body><Question>How many?</Question>{}</Problem></x>"
QUADRATIC = f'<!DOCTYPE x [<!ENTITY a "{"a" * 100_000}">]><x>{"&a;" * 100_000}</x>'
EXTERNAL = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + XML.format("&a;", "<Answer>1</Answer>")
SETS = {
    "gsm8k cut short": ("gsm8k/test.jsonl", "line", half),
    "gsm8k empty": ("gsm8k/test.jsonl", "", b""),
    "gsm8k not UTF-8": ("gsm8k/test.jsonl", "", b'{"question": "\xff", "answer": "#### 1"}'),
    "gsm8k no answer": ("gsm8k/test.jsonl", "line 1: no 'answer'", b'{"question": "a"}'),
    "gsm8k question a number": ("gsm8k/test.jsonl", "line 1", b'{"question": 5, "answer": "#### 1"}'),
    "gsm8k answer null": ("gsm8k/test.jsonl", "line 1: the answer is None", b'{"question": "a", "answer": null}'),
    "gsm8k answer empty": ("gsm8k/test.jsonl", "line 1: the answer ''", b'{"question": "a", "answer": "so\\n####"}'),
    "gsm8k nested": ("gsm8k/test.jsonl", "line 1", BIG),
    "multiarith cut short": ("multiarith/MultiArith.json", "", half),
    "multiarith an object": ("multiarith/MultiArith.json", "problem 0", b'{"a": 1}'),
    "multiarith no question": ("multiarith/MultiArith.json", "problem 0: no 'sQuestion'", b'[{"lSolutions": [1.0]}]'),
    "multiarith no solution": ("multiarith/MultiArith.json", "problem 0", b'[{"sQuestion": "a", "lSolutions": []}]'),
    "multiarith a word": ("multiarith/MultiArith.json", "problem 0", b'[{"sQuestion": "a", "lSolutions": ["x"]}]'),
    "asdiv cut short": ("asdiv/ASDiv.xml", "", half),
    "asdiv a billion laughs": ("asdiv/ASDiv.xml", "DOCTYPE", LAUGHS.encode()),
    "asdiv a long entity many times": ("asdiv/ASDiv.xml", "DOCTYPE", QUADRATIC.encode()),
    "asdiv an entity from outside": ("asdiv/ASDiv.xml", "DOCTYPE", EXTERNAL.encode()),
    "asdiv no answer": ("asdiv/ASDiv.xml", "problem 7", XML.format("Two.", "").encode()),
    "asdiv no problem": ("asdiv/ASDiv.xml", "holds no problem", b"<x></x>"),
    "svamp cut short": ("svamp/SVAMP.json", "", half),
    "svamp no body": ("svamp/SVAMP.json", "problem 0: no 'Body'", b'[{"Question": "a", "Answer": 1}]'),
    "svamp not a number": ("svamp/SVAMP.json", "problem 0", b'[{"Body": "a", "Question": "a", "Answer": NaN}]'),
    "svamp nested": ("svamp/SVAMP.json", "", BIG),
    "bbh cut short": ("bbh/bbh/opposites.json", "", half),
    "bbh no examples": ("bbh/bbh/opposites.json", "no 'examples'", b"{}"),
    "bbh no target": ("bbh/bbh/opposites.json", "example 0: no 'target'", b'{"examples": [{"input": "a"}]}'),
    "bbh target a list": ("bbh/bbh/opposites.json", "example 0", b'{"examples": [{"input": "a", "target": [1]}]}'),
    "bbh prompt cut short": ("bbh/cot-prompts/opposites.txt", "no demonstrations", lambda text: text[:20]),
    "bbh prompt not UTF-8": ("bbh/cot-prompts/opposites.txt", "", lambda text: text + b"\xff"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_damaged_problem_set_is_refused(case, tmp_path, monkeypatch):
    ev.bbh_demonstrations.cache_clear()
    name, place, content = SETS[case]
    for folder in ("gsm8k", "multiarith", "asdiv", "svamp", "bbh"):
        shutil.copytree(TOY / folder, tmp_path / "sets" / folder)
    (change(name, content) if callable(content) else put(name, content))(tmp_path / "sets")
    task = "opposites" if "bbh" in name else name.partition("/")[0]
    message = refused(ev, tmp_path, monkeypatch, TOY / "student", "--tasks", task, "--data", "sets", "--device", "cpu",
                      "--max-new-tokens", 2, "--limit", 1)  # fmt: skip
    assert f"sets/{name}" in message and place in message
    ev.bbh_demonstrations.cache_clear()


# --- runs and predictions ---


RUNS = {
    "other arguments": ("ran with other arguments: --seed 1", change("arguments.json", lambda text: text.replace(b'"seed": 0', b'"seed": 1'))),
    "arguments cut short": ("arguments.json", change("arguments.json", half)),
    "arguments a list": ("arguments.json", put("arguments.json", "[1]")),
    "log damaged": ("log.jsonl, line 1", put("log.jsonl", '{"st\n{"step": 1}\n')),
    "log of something else": ("log.jsonl, line 2", put("log.jsonl", '{"step": 1}\n[]\n{"step": 1}\n')),
    "training cut short": ("training.pt", change("checkpoint-3/training.pt", half)),
    "training missing": ("training.pt", lambda run: (run / "checkpoint-3" / "training.pt").unlink()),
    "training runs code": ("training.pt", lambda run: torch.save(RunsCode(), run / "checkpoint-3" / "training.pt")),
    "training of another model": ("training.pt", lambda run: torch.save(dict(step=3, optimizer=[{}], random=0), run / "checkpoint-3" / "training.pt")),
    "weights cut short": ("checkpoint-3/model.safetensors", change("checkpoint-3/model.safetensors", half)),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_damaged_run_is_not_resumed(case, tmp_path, monkeypatch):
    place, damage = RUNS[case]
    (tmp_path / "teacher.jsonl").write_text(json.dumps(TOLD) + "\n")
    arguments = ["--teacher", "teacher.jsonl", "--name", "one", "--skip-bbh"]
    run, (model, tokenizer) = tmp_path / "runs" / "one", t5.load_pretrained(TOY / "student")
    run.mkdir(parents=True)
    save_checkpoint(run, 3, model, torch.optim.AdamW(model.parameters()), tokenizer)
    (run / "arguments.json").write_text(json.dumps(recorded(sp.parse_arguments(arguments)), indent=2) + "\n")
    damage(run)
    assert place in refused(sp, tmp_path, monkeypatch, *arguments, "--resume")


FILES = {
    "predictions of something else": ("--show", 'none of its lines is a prediction', "notes\nand more\n"),
    "predictions empty": ("--show", "holds no prediction yet", ""),
    "predictions missing": ("--show", "No such file", None),
    "log of something else": ("--plot", "line 1: not a line of a run's log", "notes\n"),
    "log nested": ("--plot", "line 1", BIG.decode()),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_of_results_is_refused(case, tmp_path, monkeypatch):
    option, place, content = FILES[case]
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    message = refused(ev, tmp_path, monkeypatch, "results.jsonl", option, "3" if option == "--show" else "picture.png")
    assert place in message and "results.jsonl" in message


def test_as_processes_of_their_own_the_commands_end_the_same(run, tmp_path):
    shutil.copytree(TOY / "student", tmp_path / "model")
    configured(num_layers=10**9)(tmp_path / "model")
    (tmp_path / "teacher.jsonl").write_bytes(TEACHERS["nan.jsonl"][1]())
    (tmp_path / "sets" / "asdiv").mkdir(parents=True)
    (tmp_path / "sets" / "asdiv" / "ASDiv.xml").write_text(LAUGHS)
    before = contents(tmp_path)
    for place, *command in (
        ("config.json: num_layers", "t5.py", "model", "text"),
        ("teacher.jsonl, line 2", "specialize.py", "--teacher", "teacher.jsonl"),
        ("sets/asdiv/ASDiv.xml: it has a DOCTYPE", "eval.py", TOY / "student", "--tasks", "asdiv", "--data", "sets"),
    ):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 1 and not done.stdout, done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and place in done.stderr
    assert contents(tmp_path) == before


def test_there_are_more_than_a_hundred_damages():
    assert sum(map(len, (MODELS, TEACHERS, RELEASES, SETS, RUNS, FILES))) > 100
    assert Tokenizer(TOY / "student")
