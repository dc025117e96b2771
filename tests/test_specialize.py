"""specialize.py: the losses against torch's dense ones, the data on real records, and a loop that repeats to the bit."""

import dataclasses
import gzip
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import specialize as sp
from conftest import ROOT, TOY
from data.download import InputError
from data.records import Record, read_teacher
from data.rows import Row, make_rows, training_records
from data.runs import checkpoints
from eval import Problem, load, math_prompt
from t5 import EOS, PAD, T5, T5Config, Tokenizer


def random_targets():
    """Logits (2, 5, 40), sub-distributions of k = 3 with unused slots, and a mask with padding."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 40, requires_grad=True)
    ids = torch.stack([torch.randperm(40)[:3] for _ in range(10)]).view(2, 5, 3)
    probs = torch.rand(2, 5, 3) / 3
    probs[0, :2, 1:] = 0
    ids[0, :2, 1:] = 0
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return logits, ids, probs, mask


def test_kl_equals_torchs_on_the_dense_distribution_and_so_does_its_gradient():
    logits, ids, probs, mask = random_targets()
    dense = torch.zeros(2, 5, 40).scatter_add(-1, ids, probs)
    expected = (F.kl_div(logits.log_softmax(-1), dense, reduction="none").sum(-1) * mask).sum() / mask.sum()
    found = sp.kl_loss(logits, ids, probs, mask)
    assert torch.allclose(found, expected, rtol=1e-6)
    ours, theirs = torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-7) and not ours[1, 3:].any()


def test_likelihood_equals_torchs_cross_entropy():
    logits, ids, _, mask = random_targets()
    targets = ids[..., 0].masked_fill(~mask, -100)
    expected = F.cross_entropy(logits.transpose(1, 2), targets)
    found = sp.nll_loss(logits, ids[..., 0], mask)
    assert torch.allclose(found, expected, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_kl_of_a_one_hot_target_is_the_likelihood():
    logits, ids, _, mask = random_targets()
    one_hot = torch.tensor([1.0, 0.0, 0.0]).expand(2, 5, 3)
    assert torch.allclose(sp.kl_loss(logits, ids, one_hot, mask), sp.nll_loss(logits, ids[..., 0], mask))


def test_kl_is_exact_where_a_probability_is_rounded_to_0_or_a_logit_is_infinite():
    logits = torch.tensor([[[-math.inf, 200.0, -200.0, 1e4]]])
    found = sp.kl_loss(logits, torch.tensor([[[1, 2, 0]]]), torch.tensor([[[0.5, 0.5, 0.0]]]), torch.ones(1, 1))
    assert found.item() == pytest.approx(1e4 - math.log(2), rel=1e-6)


def test_a_graph_is_gone_back_through_once():
    logits, ids, probs, mask = random_targets()
    loss = sp.kl_loss(logits, ids, probs, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_student_gets_below_the_floor():
    probs = torch.tensor([[0.5, 0.3, 0.1]])
    row = Row("zero_shot_cot", None, None, np.array([[1, 2, 3]]), probs.numpy(), "")
    q = torch.zeros(1, 1, 5)
    q[0, 0, 1:4] = probs / probs.sum()
    at_best = sp.kl_loss(q.log(), torch.tensor([[[1, 2, 3]]]), probs[None], torch.ones(1, 1))
    assert sp.kl_floor([row]) == pytest.approx(0.9 * math.log(0.9)) == pytest.approx(at_best.item())


def test_the_schedule_warms_up_and_falls_as_a_cosine():
    rates = [sp.learning_rate(step, 100, 5e-4, 10) for step in range(100)]
    assert rates[0] == pytest.approx(5e-5) and max(rates) < 5e-4 and rates.index(max(rates)) == 9
    assert rates[50] == pytest.approx(2.5e-4) and rates[99] < 1e-6


@pytest.fixture(scope="module")
def t5_tokenizer(real):
    return Tokenizer(real / "tokenizers" / "t5")


@pytest.fixture(scope="module")
def codex(real):
    return list(read_teacher(real / "codex" / "gsm8k_train_0.jsonl"))


def test_real_records_become_rows_of_the_four_formats(codex, t5_tokenizer):
    rows, summary = make_rows(codex, t5_tokenizer, list(sp.FORMATS), "kl")
    counts = {name: sum(row.format == name for row in rows) for name in sp.FORMATS}
    assert list(counts.values()) == [40, 1, 40, 1] and "40 of 40" in summary
    for row in rows:
        text = t5_tokenizer.decode(row.labels)
        assert row.labels[-1] == EOS and text.endswith("The answer is 72")
        if sp.FORMATS[row.format][0]:
            assert len(row.ids) == len(row.probs) == len(row.labels) and row.ids[-1, 0] == EOS and row.probs[-1, 0] == 1
            assert all(label in ids[p > 0] for label, ids, p in zip(row.labels, row.ids, row.probs))
        else:
            assert row.ids is None and text == "The answer is 72"


def test_wrong_solutions_are_dropped_and_missing_answers_stated(codex, t5_tokenizer):
    wrong = dataclasses.replace(codex[0], problem=dataclasses.replace(codex[0].problem, answer=71.0))
    steps = [(" 48", {" 48": 0.9}), (" +", {" +": 0.5}), (" 24", {" 24": 1.0}), (" =", {}), (" 72", {" 72": 1.0})]
    silent = Record(Problem("How many?", 72.0, "48 + 24 = 72"), steps, "here")
    rows, summary = make_rows([wrong, silent], t5_tokenizer, ["zero_shot_cot"], "kl")
    assert "1 of 2 solutions" in summary and len(rows) == 1
    assert t5_tokenizer.decode(rows[0].labels) == "48 + 24 = 72 The answer is 72"
    assert len(rows[0].probs) == len(rows[0].labels) and (rows[0].probs[5:, 0] == 1).all()
    with pytest.raises(InputError, match="none of .* teacher solutions"):
        make_rows([wrong], t5_tokenizer, ["zero_shot_cot"], "kl")


def test_without_kl_or_without_distributions_rows_train_by_likelihood(codex, t5_tokenizer):
    textual = [dataclasses.replace(record, steps=None) for record in codex]
    for records, loss in ((codex, "nll"), (textual, "kl")):
        rows, _ = make_rows(records, t5_tokenizer, ["zero_shot_cot"], loss)
        assert len(rows) == 40 and all(row.ids is None for row in rows)


def test_a_prompt_put_together_from_parts_is_the_prompt_encoded_whole(real, t5_tokenizer):
    problems = load("gsm8k", "train", real / "datasets")[:200]
    encode = lambda text: np.array(t5_tokenizer.encode(text))
    for i in range(0, 200, 5):
        question, *shots = problems[i : i + 5]
        for name, (cot, in_context) in sp.FORMATS.items():
            row, shown = Row(name, question, None, None, None, ""), shots if in_context else []
            assert sp.source(row, shown, encode).tolist() == t5_tokenizer.encode(math_prompt(question.question, cot, shown))


def test_an_epoch_holds_every_row_once_in_batches_of_one_format_and_similar_length():
    pool = [Problem(f"q{i}", 1.0, "s") for i in range(50)]
    rows = [Row(name, pool[i], np.zeros(i), None, None, f"{i}") for name in sp.FORMATS for i in range(50)]
    size, length = dict(zip(sp.FORMATS, (2, 3, 4, 7))), lambda example: len(example[0].labels)
    plan = sp.plan_epoch(rows, pool, size, length, seed=0, epoch=0)
    assert sorted(id(row) for batch in plan for row, _ in batch) == sorted(map(id, rows))
    for batch in plan:
        (name,) = {row.format for row, _ in batch}
        assert len(batch) <= size[name] and max(map(length, batch)) - min(map(length, batch)) < size[name]
        for row, shots in batch:
            assert len(shots) == (4 if sp.FORMATS[name][1] else 0) and row.problem not in shots
    order = lambda plan: [row.place for batch in plan for row, _ in batch]
    assert order(plan) == order(sp.plan_epoch(rows, pool, size, length, 0, 0))
    assert order(plan) != order(sp.plan_epoch(rows, pool, size, length, 0, 1))


def test_a_batch_shifts_its_labels_right_and_masks_padding(codex, t5_tokenizer):
    rows, _ = make_rows(codex[:3], t5_tokenizer, ["zero_shot_cot"], "kl")
    batch = sp.collate([(row, []) for row in rows], lambda text: np.array(t5_tokenizer.encode(text)), "cpu")
    assert (batch["decoder_input_ids"][:, 0] == PAD).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert batch["mask"].sum() == sum(len(row.labels) for row in rows) and not batch["probs"][~batch["mask"]].any()
    assert batch["tokens"] == (batch["input_ids"] != PAD).sum() + batch["mask"].sum()


def test_a_solution_without_distributions_trains_by_likelihood_beside_others_with_them(codex, t5_tokenizer):
    textual = dataclasses.replace(codex[0], steps=None)
    rows, _ = make_rows([textual, codex[1]], t5_tokenizer, ["zero_shot_cot"], "kl")
    batch = sp.collate([(row, []) for row in rows], lambda text: np.array(t5_tokenizer.encode(text)), "cpu")
    logits = torch.randn(*batch["labels"].shape, 32128)
    first = [batch[name][:1] for name in ("ids", "probs", "mask")]
    assert torch.allclose(sp.kl_loss(logits[:1], *first), sp.nll_loss(logits[:1], batch["labels"][:1], first[2]))
    assert (batch["probs"][1] > 0).sum() > batch["mask"][1].sum()


def test_accumulated_micro_batches_of_equal_length_give_the_gradient_of_the_whole():
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    model = T5(config)
    batch = {
        "input_ids": torch.randint(2, 60, (6, 9)), "labels": torch.randint(2, 60, (6, 5)),
        "decoder_input_ids": torch.randint(2, 60, (6, 5)), "mask": torch.ones(6, 5, dtype=torch.bool),
    }  # fmt: skip
    sp.batch_loss(model, batch).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in range(3):
        (sp.batch_loss(model, {k: v[2 * part : 2 * part + 2] for k, v in batch.items()}) / 3).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(whole, model.parameters()))


BRIEF = ["--epochs", 1, "--micro-batch", 4, 4, 8, 8, "--checkpoint-every", 4, "--validation-limit", 2, "--test-limit", 2,
         "--max-new-tokens", 8, "--log-every", 2, "--device", "cpu"]  # fmt: skip


@pytest.fixture
def brief(run, tmp_path):
    """brief(*arguments) -> a short run of the main command on the toy world's first teacher records."""
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        (tmp_path / "teacher.jsonl").write_text("".join(itertools.islice(lines, 60)))
    return lambda *arguments: run("specialize.py", "--teacher", "teacher.jsonl", *BRIEF, *arguments, cwd=tmp_path)


def same_weights(one, two):
    """Whether two checkpoint folders hold the same bits."""
    return (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_the_command_tells_its_progress_chooses_a_checkpoint_and_writes_the_run(brief, tmp_path):
    done = brief("--name", "one")
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 2/\d+ .*kl .* lr .* tokens/s .* min left", done.stdout)
    assert "specialized" in done.stdout and "Checkpoint of step" in done.stdout
    one = tmp_path / "runs" / "one"
    results = json.loads((one / "results.json").read_text())
    assert set(results["test"]) == {"base", "specialized"} and len(results["test"]["base"]) == 6
    log = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()]
    evaluations = [entry for entry in log if "validation" in entry]
    assert len(evaluations) > 2
    assert results["chosen"] == max(evaluations, key=lambda entry: (sp.selection(entry), entry["step"]))
    assert same_weights(one / "model", one / f"checkpoint-{results['chosen']['step']}")
    assert T5.from_pretrained(one / "model") and Tokenizer(one / "model")
    assert json.loads((one / "arguments.json").read_text())["epochs"] == 1


def test_a_killed_run_resumes_and_ends_with_the_same_bits_as_one_that_was_not(brief, tmp_path):
    assert brief("--name", "whole").returncode == 0
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    command = [sys.executable, ROOT / "specialize.py", "--teacher", "teacher.jsonl", *BRIEF, "--name", "killed"]
    process = subprocess.Popen([str(part) for part in command], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not checkpoints(killed):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "results.json").exists()
    done = brief("--name", "killed", "--resume")
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr
    last = checkpoints(whole)[-1].name
    assert same_weights(whole / last, killed / last)
    strip = lambda run: [
        {key: value for key, value in json.loads(line).items() if key not in ("tokens_per_second", "kl", "nll")}
        for line in (run / "log.jsonl").read_text().splitlines()
    ]
    assert strip(whole) == strip(killed)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_arguments(brief, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "arguments.json").write_text('{"epochs": 7}')
    for arguments, message in (
        (["--name", "one"], "--resume goes on with it"),
        (["--name", "one", "--resume"], "ran with other arguments"),
        (["--name", "two", "--resume"], "no run to resume"),
    ):
        done = brief(*arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_records(tmp_path):
    tokenizer, args = Tokenizer(TOY / "student"), sp.parse_arguments([str(part) for part in BRIEF])
    model = T5.from_pretrained(TOY / "student")
    with torch.no_grad():
        model.shared.weight[EOS] = float("nan")
    records = list(itertools.islice(read_teacher(TOY / "teacher.jsonl.gz"), 40))
    rows, _ = make_rows(records, tokenizer, ["zero_shot_cot"], "kl")
    with pytest.raises(InputError, match=r"step 1: the loss is not finite. Batch: .*teacher.jsonl.gz, line \d+"):
        sp.train(model, tokenizer, rows, load("gsm8k", "train", TOY), args, tmp_path)


@pytest.mark.parametrize("name", ["svamp/SVAMP.json", "bbh/bbh/odd_one_out.json", "bbh/cot-prompts/odd_one_out.txt"])
def test_a_set_that_is_measured_late_is_read_before_training(name, tmp_path, monkeypatch):
    shutil.copytree(TOY, tmp_path / "data")
    (tmp_path / "data" / name).write_text("{}")
    (tmp_path / "teacher.jsonl").write_text('{"question": "Q?", "answer": "1", "solution": "The answer is 1"}\n')
    arguments = ["--data", tmp_path / "data", "--teacher", tmp_path / "teacher.jsonl"]
    monkeypatch.setattr(sp, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(InputError, match=name):
        sp.specialize(sp.parse_arguments([str(part) for part in arguments]), tmp_path / "run")


def test_gradient_checkpointing_and_bfloat16_run_the_same_loop(brief):
    done = brief("--gradient-checkpointing", "--precision", "bf16", "--accumulation", "2", "--loss", "nll", "--skip-bbh")
    assert done.returncode == 0, done.stderr


def test_without_a_teacher_it_trains_on_the_written_solutions_and_says_so(real, tmp_path):
    args = sp.parse_arguments(["--size", "small", "--data", str(real / "datasets")])
    records = list(training_records(args.teacher, args.data))
    assert args.teacher is None and len(records) == 7473 and all(record.steps is None for record in records)


def test_the_papers_settings_are_the_sizes_defaults():
    large = sp.parse_arguments(["--size", "large"])
    assert (large.model, large.micro_batch, large.accumulation) == ("google/flan-t5-large", (8, 12, 18, 30), 20)
    assert (large.learning_rate, large.epochs, large.warmup, large.max_new_tokens) == (5e-4, 10, 10, 256)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "answer": "1"}', "no key 'solution'"),
        ('{"question": "a", "answer": "1", "solution": "1", "tokens": ["2"], "top_logprobs": [{}]}', "do not spell"),
        ('{"question": "a", "answer": "1", "solution": "1", "tokens": ["1"], "top_logprobs": [{"1": 0.5}]}', "'1' has log-probability 0.5, above 0"),
        ('{"question": "a", "answer": "1", "solution": "1", "tokens": ["1"], "top_logprobs": [{}, {}]}', "1 tokens but 2"),
        ("[1]", "not a teacher record"),
        ('{"question": ', "not a teacher record"),
    ],
)
def test_a_bad_teacher_line_is_named(tmp_path, line, message):
    path = tmp_path / "teacher.jsonl"
    path.write_text('{"question": "a", "answer": "1", "solution": "1"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"line 2.*{message}"):
        list(read_teacher(path))
