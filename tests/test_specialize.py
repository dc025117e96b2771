"""specialize.py: losses, rates and optimizers against torch's, examples against the paper's table,
and runs of the main command that run out of memory or are killed."""

import contextlib
import functools
import itertools
import json
import math
import os
import signal
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import eval as ev
import specialize as sp
from conftest import ROOT, TOY, damage
from specialize import FORMATS, Record, build_examples, read_teacher
from t5 import EOS, PAD, T5, UserError, load_pretrained

SMALL = TOY / "tuned-0.04M"
BRIEF = (f"--model {SMALL} --teacher teacher.jsonl --micro-batch-size 2 2 4 4 --steps 4 "
         "--checkpoint-every 4 --validation-limit 1 --bbh-limit 0 --test-limit 1 --skip-bbh "
         "--max-new-tokens 4 --format-shares 1 1 1 1 --solutions-per-question 40").split()
SIZES = dict(zip(FORMATS.values(), (2, 3, 4, 7)))
ALL = dict.fromkeys(FORMATS.values(), 1)
load_once = functools.cache(ev.load)

@pytest.fixture(autouse=True)
def quick_and_polite(tmp_path, monkeypatch):
    """Give runs a small teacher, read each problem set once, and leave no signal handlers."""
    lines = itertools.islice(sp.read_lines(TOY / "teacher.jsonl.gz"), 0, 1200, 30)
    (tmp_path / "teacher.jsonl").write_text("".join(line for _, line in lines))
    for module in (ev, sp):
        monkeypatch.setattr(module, "load", load_once)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@pytest.fixture(scope="module")
def toy():
    """Return the smallest toy model, its tokenizer, examples, and GSM8K's training problems."""
    model, tokenizer = load_pretrained(SMALL)
    records = itertools.islice(read_teacher(TOY / "teacher.jsonl.gz"), 0, 1200, 20)
    examples, _ = build_examples(records, tokenizer, FORMATS)
    return model, tokenizer, examples, load_once("gsm8k", "train", TOY)

def last_weights(run):
    """Return the bytes of a run's last weights."""
    return (sp.checkpoints(run)[-1] / "model.safetensors").read_bytes()

# --- losses ---

def dense(ids, probs, size):
    """Return sparse distributions (.., K) as dense ones (.., V)."""
    return torch.zeros(*ids.shape[:-1], size).scatter_add(-1, ids.long(), probs)

def test_a_loss_and_its_gradient_equal_torchs_on_the_dense_distribution():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 40, requires_grad=True)
    ids = torch.stack([torch.randperm(40)[:3] for _ in range(10)]).view(2, 5, 3)
    probs = torch.rand(2, 5, 3) / 3  # they sum to less than 1
    ids[0, :2, 1:] = probs[0, :2, 1:] = 0  # unused slots
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    kl = F.kl_div(logits.log_softmax(-1), dense(ids, probs, 40), reduction="none").sum(-1)
    nll = F.cross_entropy(logits.transpose(1, 2), ids[..., 0], reduction="none")
    one_hot = torch.tensor([1.0, 0, 0]).expand(2, 5, 3)
    batch = {"teacher_ids": ids, "teacher_probs": one_hot, "loss_mask": mask}
    for found, expected in ((sp.kl_loss(logits, ids, probs, mask), kl),
                            (sp.nll_loss(logits, ids[..., 0], mask), nll),
                            (sp.LOSSES["kl"](logits, batch), nll)):
        expected = expected[mask].mean()
        assert torch.allclose(found, expected, rtol=1e-6)
        ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0]
                        for loss in (found, expected))
        assert torch.allclose(ours, theirs, atol=1e-7) and not ours[1, 3:].any()

def test_a_step_is_the_plain_mean_over_micro_batches_of_means_over_tokens_for_any_split(toy):
    model, tokenizer, examples, pool = toy
    drawn = sp.make_batches(examples, pool, tokenizer, SIZES, ALL, 0, 0)
    batches = list({batch[0].format: batch for batch in drawn}.values())  # one per format

    def plain_loss(example):  # without padding, summed over the tokens
        source, target = (torch.tensor(ids)[None].long()
                          for ids in (example.input_ids, example.labels))
        logits = model(source, torch.ones_like(source), F.pad(target, (1, -1), value=PAD))[0]
        if example.teacher_ids is None:
            return F.cross_entropy(logits, target[0], reduction="sum")
        p = dense(*map(torch.from_numpy, (example.teacher_ids, example.teacher_probs)), 512)
        return F.kl_div(logits.log_softmax(-1), p, reduction="sum")

    expected = torch.stack([sum(map(plain_loss, batch)) / sum(len(ex.labels) for ex in batch)
                            for batch in batches])
    gradient = torch.autograd.grad(expected.mean(), list(model.parameters()))
    for limit in (1, 700, 10**9):
        model.zero_grad()
        losses = sp.add_gradients(model, batches, "kl", limit, contextlib.nullcontext())
        assert len(losses) == 4 and torch.allclose(losses, expected, rtol=1e-5)
        for parameter, theirs in zip(model.parameters(), gradient, strict=True):
            assert (parameter.grad - theirs).norm() < 1e-4 * theirs.norm() + 1e-7

# --- records and examples ---

def test_real_records_become_examples_whose_rows_are_distributions(real, tokenizer):
    codex = real / "codex" / "gsm8k_train_0.jsonl"  # 40 solutions to one question
    examples, _ = build_examples(read_teacher(codex), tokenizer, FORMATS)
    assert Counter(ex.format for ex in examples) == dict(zip(FORMATS, (40, 1, 40, 1)))
    few, _ = build_examples(read_teacher(codex), tokenizer, FORMATS, limit=3)
    assert Counter(ex.format for ex in few) == dict(zip(FORMATS, (3, 1, 3, 1)))
    examples = [ex for ex in examples if ex.format == "zero_shot_cot"]
    for ex, (_, line) in zip(examples, sp.read_lines(codex), strict=True):
        assert ex.labels.tolist() == tokenizer.encode(json.loads(line)["solution"])
        ids, probs = ex.teacher_ids, ex.teacher_probs
        assert ids.shape == probs.shape == (len(ex.labels), 5) and (probs.sum(1) <= 1).all()
        assert ((ids == ex.labels[:, None]) & (probs > 0)).any(1).all()
        assert ids[-1, 0] == EOS and probs[-1, 0] == 1
    several = np.concatenate([(ex.teacher_probs > 0).sum(1) > 1 for ex in examples])
    assert several.mean() > 0.95  # the rest has no one-to-one partner, or is </s>

def test_wrong_solutions_are_dropped_and_a_missing_answer_is_added(tokenizer):
    wrong = Record(ev.Problem("How many?", 71.0, "48 + 24 = 72\nThe answer is 72"), None)
    tokens = [(" 48", {" 48": 0.9}), (" +", {" +": 0.5}), (" 24", {}), (" =", {}), (" 72", {})]
    silent = Record(ev.Problem("How many?", 72.0, "48 + 24 = 72"), tokens)
    (ex,), _ = build_examples([wrong, silent], tokenizer, ["zero_shot_cot"])
    assert ex.labels.tolist() == tokenizer.encode("48 + 24 = 72\nThe answer is 72")
    assert ex.teacher_probs[:, 0].tolist() == pytest.approx([0.9, 0.5] + [1] * 8)
    with pytest.raises(UserError):
        build_examples([wrong], tokenizer, ["zero_shot_cot"])

GOOD = {"question": "Why?", "answer": "5", "solution": "2 + 3 = 5", "tokens": ["2 + 3", " = 5"],
        "top_logprobs": [{"2 + 3": -0.1}, {" = 5": -0.2, " is": -2.0}]}
LINE = json.dumps(GOOD) + "\n"

@pytest.mark.parametrize("old, new", [
    ("}", ""), ('["2 + 3"', '["2 + 6"'), (', {" = 5": -0.2, " is": -2.0}', ""), ("-0.1", "0.9")],
    ids=["not JSON", "does not spell the solution", "unequal lengths", "not logarithms"])
def test_a_wrong_line_of_a_teacher_file_is_refused_by_name_and_number(old, new, tmp_path):
    damage(tmp_path / "wrong.jsonl", LINE + "\n" + LINE.replace(old, new))
    with pytest.raises(UserError, match=r"wrong\.jsonl, line 3: "):
        list(read_teacher(tmp_path / "wrong.jsonl"))

def test_a_misspelled_key_is_counted_as_likelihood_and_trains_with_one_hot_rows(
        tmp_path, tokenizer):
    misspelled = LINE.replace("top_logprobs", "logprobs")
    damage(tmp_path / "a.jsonl", f"\ufeff{LINE}\n \n{misspelled}")  # a byte-order mark, blank lines
    records = read_teacher(tmp_path / "a.jsonl")
    examples, summary = build_examples(records, tokenizer, ["zero_shot_cot"])
    assert len(examples) == 2 and "1 of them" in summary and "likelihood" in summary
    batch = sp.collate(examples, "cpu")
    assert torch.equal(batch["teacher_ids"][1, :, 0], batch["labels"][1])
    assert (batch["teacher_probs"][1] == torch.tensor([1, 0, 0, 0, 0])).all()

# --- formats and batches ---

TABLE = {  # as in the paper: a demonstration, the input, the output
    "in_context_cot": ("Q: {q}\nLet's think step by step\n{cot}\nThe answer is {a}\n\n",
                       "Q: {q}\nLet's think step by step", "{cot}\nThe answer is {a}"),
    "in_context_answer_only": ("Q: {q}\nA: The answer is {a}\n\n",
                               "Q: {q}\nA:", "The answer is {a}"),
    "zero_shot_cot": ("", "Q: {q}\nLet's think step by step", "{cot}\nThe answer is {a}"),
    "zero_shot_answer_only": ("", "Q: {q} A:", "The answer is {a}"),
}

def test_inputs_and_outputs_are_the_papers_and_no_demonstration_is_the_question_itself(
        datasets, tokenizer):
    pool = load_once("gsm8k", "train", datasets)[:5]  # so the question itself is always drawn
    records = [Record(replace(p, solution=ev.math_target(p, cot=True)), None) for p in pool]
    examples, _ = build_examples(records, tokenizer, FORMATS, loss="nll")
    batches = sp.make_batches(examples, pool, tokenizer, SIZES, ALL, 0, 0)

    def write(template, problem):
        return template.format(q=problem.question, cot=problem.solution, a=problem.written)

    for ex in itertools.chain(*batches):
        shot, ask, answer = TABLE[ex.format]
        (own,) = [p for p in pool if p.question == ex.problem.question]
        others = [write(shot, p) for p in pool if p is not own]
        inputs = [tokenizer.encode("".join(order) + write(ask, own))
                  for order in itertools.permutations(others)]
        assert ex.input_ids.tolist() in inputs
        assert ex.labels.tolist() == tokenizer.encode(write(answer, own))

def test_an_epoch_has_every_example_once_in_micro_batches_of_one_format(toy):
    _, tokenizer, examples, pool = toy

    def draw(seed, epoch, shares=ALL):
        batches = sp.make_batches(examples, pool, tokenizer, SIZES, shares, seed, epoch)
        return [[(ex.format, ex.labels.tobytes(), ex.input_ids.tobytes()) for ex in batch]
                for batch in batches]

    batches = draw(0, 0)
    drawn = Counter((name, labels) for name, labels, _ in itertools.chain(*batches))
    assert drawn == Counter((ex.format, ex.labels.tobytes()) for ex in examples)
    assert all(len({name for name, *_ in batch}) == 1 for batch in batches)
    counts = Counter(ex.format for ex in examples)
    assert Counter(batch[0][0] for batch in batches) == {
        name: math.ceil(counts[name] / SIZES[kind]) for name, kind in FORMATS.items()}
    shares = dict(zip(FORMATS.values(), (0.5, 0, 1, 0.25)))
    assert Counter(name for name, *_ in itertools.chain(*draw(0, 0, shares))) == Counter(
        {name: round(shares[kind] * counts[name]) for name, kind in FORMATS.items()})
    assert draw(0, 0) == batches and draw(0, 1) != batches != draw(1, 0)  # seed, epoch
    before, after = ({ids for name, _, ids in itertools.chain(*draw(0, epoch)) if FORMATS[name][1]}
                     for epoch in (0, 1))
    assert before and not before & after  # each epoch has its own demonstrations

def test_a_format_a_loss_and_a_problem_set_of_ones_own(toy, command, tmp_path, monkeypatch):
    _, tokenizer, examples, pool = toy
    monkeypatch.setitem(FORMATS, "fifth", (False, False))  # the kind of zero_shot_answer_only
    monkeypatch.setitem(sp.LOSSES, "none", lambda logits, batch: 0 * logits.sum())
    mine = ev.Dataset("Mine", "mine/mine.json", ev.parse_svamp, 10, select=True)  # not in the toy
    monkeypatch.setitem(ev.DATASETS, "mine", mine)
    fifth = [replace(ex, format="fifth") for ex in examples if ex.teacher_ids is None]
    assert max(map(len, sp.make_batches(fifth, pool, tokenizer, SIZES, ALL, 0, 0))) == 7
    command(sp, *BRIEF, "--name", "one", "--loss", "none", "--formats", "fifth", "zero_shot_cot")
    loss = ev.read_jsonl(tmp_path / "runs/one/log.jsonl")[-2]["loss"]  # of steps 2 to 4
    assert loss.keys() == {"fifth", "zero_shot_cot"} and loss["zero_shot_cot"] == 0 < loss["fifth"]

# --- rates and optimizers ---

@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rates_are_torchs(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1)], 5e-4)
    parts = [lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)]
    if schedule == "cosine":
        parts.append(lr_scheduler.CosineAnnealingLR(optimizer, T_max=100))
    theirs = lr_scheduler.ChainedScheduler(parts)
    for step in range(100):
        found = sp.get_lr(step, 100, peak=5e-4, warmup=10, schedule=schedule)
        assert found == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()

@pytest.mark.parametrize("name, reference", [("adamw", torch.optim.AdamW),
                                             ("adafactor", torch.optim.Adafactor)])
def test_optimizers_are_torchs_and_their_small_changes_add_up_in_bf16_weights(name, reference):
    def trained(make, step, dtype):
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in (9000, (90, 90))]
        optimizer = make(weights)
        optimizer.param_groups[0]["lr"] = 1e-4
        torch.manual_seed(0)
        for _ in range(20):
            for weight in weights:
                gradient = torch.rand(weight.shape) / 2 + 1
                weight.grad = gradient.bfloat16().to(dtype)  # the same for any dtype
            step(optimizer)
        return weights

    theirs = functools.partial(reference, weight_decay=0.01), reference.step
    ours = functools.partial(sp.OPTIMIZERS[name], weight_decay=0.01), sp.optimizer_step
    expected, fp32 = trained(*theirs, torch.float32), trained(*ours, torch.float32)
    for right, exact, rounded in zip(expected, fp32, trained(*ours, torch.bfloat16)):
        assert torch.equal(exact, right)
        change = 1 - right.mean().item()
        assert 0 < change < 2**-8  # in total less than the last bit of 1
        assert rounded.dtype == torch.bfloat16
        assert 1 - rounded.float().mean().item() == pytest.approx(change, rel=0.3)

def test_stochastic_rounding_is_unbiased():
    torch.manual_seed(0)
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    rounded = sp.stochastic_round(x.expand(2000, -1).contiguous()).double()
    gap = 2.0 ** (x.double().abs().log2().floor() - 7)  # between neighbours
    assert ((rounded - x).abs() < gap).all()
    assert ((rounded.mean(0) - x).abs() < 5 * 0.5 * gap / 2000**0.5).all()

# --- selection ---

def test_the_best_checkpoint_has_the_best_out_of_distribution_mean(monkeypatch):
    accuracies = {"gsm8k": 0.9, "multiarith": 0.1, "asdiv": 0.2, "svamp": 0.3, "bbh": 0.8}
    monkeypatch.setattr(sp, "evaluate", lambda model, tokenizer, task, *_:
                        ev.Evaluation(accuracies[task.name], 0.01, []))
    tasks = [ev.Task(name, TOY) for name in accuracies]
    entry = sp.validate(None, None, tasks, 4, contextlib.nullcontext())
    assert entry["ood"] == pytest.approx(0.2)  # GSM8K is in distribution
    entries = {n: {"step": n, "ood": ood} for n, ood in enumerate((0.9, 0.1, 0.3, 0.3, 0.2))}
    assert sp.best_checkpoint(entries)["step"] == 3  # the latest of equals; not the start,
    assert sp.best_checkpoint({0: entries[0]})["step"] == 0  # unless it is alone

# --- memory ---

@pytest.fixture
def memory(monkeypatch):
    """memory(tokens, run): passes of more tokens fail, with a run only after its checkpoint."""
    forward = T5.forward

    def memory(tokens, run=None):
        def limited(model, input_ids, mask, decoder_input_ids):
            reached = not run or sp.checkpoints(run)
            if reached and input_ids.numel() + decoder_input_ids.numel() > tokens:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, input_ids, mask, decoder_input_ids)
        monkeypatch.setattr(T5, "forward", limited)
    return memory

def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_passes(
        command, memory, tmp_path, monkeypatch):
    train = sp.train

    def watched(*values):
        (args,) = [value for value in values if isinstance(value, sp.Args)]
        before, best = asdict(args), train(*values)
        assert asdict(args) == before
        return best

    monkeypatch.setattr(sp, "train", watched)
    arguments = [*BRIEF, "--gradient-accumulation-steps", 2, "--seed", 5]
    command(sp, *arguments, "--name", "roomy")
    memory(340)  # with this seed, the first step's first micro-batch fits and its second does not
    assert "out of memory" in command(sp, *arguments, "--name", "tight")
    folders = [SMALL, *(sp.checkpoints(tmp_path / "runs" / name)[0] for name in ("roomy", "tight"))]
    start, roomy, tight = (torch.nn.utils.parameters_to_vector(T5.from_pretrained(f).parameters())
                           for f in folders)
    assert (tight - roomy).norm() < 1e-3 * (roomy - start).norm()

def test_if_one_example_does_not_fit_the_error_says_what_helps(command, refused, memory, tmp_path):
    runs = tmp_path / "runs"
    command(sp, *BRIEF, "--name", "roomy", "--steps", 8)
    memory(0)
    message = refused(sp, *BRIEF, "--name", "one")
    for advice in ("--gradient-checkpointing", "--optimizer adafactor", "--precision bf16-weights"):
        assert advice in message
    memory(0, runs / "two")
    message = refused(sp, *BRIEF, "--name", "two", "--steps", 8)
    assert "runs/two/checkpoint-4" in message and "--resume --gradient-checkpointing" in message
    memory(10**9)
    command(sp, "--name", "two", "--resume", "--gradient-checkpointing")
    assert last_weights(runs / "two") == last_weights(runs / "roomy")

# --- runs ---

def test_the_command_trains_selects_reports_and_writes_what_transformers_loads(
        command, tmp_path, transformers):
    printed = command(sp, *BRIEF, "--model", TOY / "tuned-1M", "--no-skip-bbh", "--test-limit", 2,
                      "--checkpoint-every", 2, "--max-new-tokens", 40, "--name", "one")
    run = tmp_path / "runs" / "one"
    rows = ["toy-GSM8K", "toy-MultiArith", "toy-ASDiv", "toy-SVAMP", "generic CoT",
            "generic answer-only"]
    lines = printed[printed.index("accuracy, %") :].splitlines()[1:7]
    assert [line.partition("  ")[0] for line in lines] == rows
    log, predictions = (ev.read_jsonl(run / f"{name}.jsonl") for name in ("log", "predictions"))
    evaluations = {entry["step"]: entry for entry in log if "accuracy" in entry}
    best, results = sp.best_checkpoint(evaluations), json.loads((run / "results.json").read_text())
    assert list(evaluations) == [0, 2, 4] and results["selected"] == best
    assert len(sp.checkpoints(run)) == len({best["step"], 4})
    selected = run / f"checkpoint-{best['step']}" / "model.safetensors"
    assert (run / "model" / "model.safetensors").read_bytes() == selected.read_bytes()
    for name, accuracies in results["test"].items():
        own = [p for p in predictions if p["model"] == name]
        assert list(accuracies) == rows
        for accuracy, _, n in accuracies.values():  # they are in the order of the rows
            assert accuracy == pytest.approx(np.mean([p["correct"] for p in own[:n]]))
            own = own[n:]
        assert not own
    reference = transformers.T5ForConditionalGeneration.from_pretrained(run / "model")
    _, tokenizer = load_pretrained(run / "model")
    for p in predictions[len(predictions) // 2 :: 5]:  # the specialized model's
        ids = torch.tensor([tokenizer.encode(p["prompt"])])
        output = reference.generate(ids, max_new_tokens=40, do_sample=False)[0]
        assert tokenizer.decode(output) == p["output"]

def test_a_run_is_not_overwritten_and_resumes_with_its_own_settings(command, refused, tmp_path):
    command(sp, *BRIEF, "--name", "one", "--learning-rate", 1e-3)
    run, weights = tmp_path / "runs" / "one", last_weights(tmp_path / "runs" / "one")
    log = (run / "log.jsonl").read_text()
    assert "runs/one" in refused(sp, *BRIEF, "--name", "one")
    assert "runs/two" in refused(sp, *BRIEF, "--name", "two", "--resume")
    assert "runs/one" in refused(sp, "--name", "one", "--resume", "--steps", 5)
    command(sp, "--name", "one", "--resume", "--test-limit", 2)
    settings = json.loads((run / "arguments.json").read_text())
    assert (settings["learning_rate"], settings["steps"]) == (1e-3, 4)
    results = json.loads((run / "results.json").read_text())
    assert {n for rows in results["test"].values() for *_, n in rows.values()} == {2}
    assert last_weights(run) == weights and (run / "log.jsonl").read_text() == log

@pytest.mark.parametrize("flags", [
    "--precision bf16", "--gradient-checkpointing --dropout 0.1 --gradient-accumulation-steps 2",
    "--optimizer adafactor --precision bf16-weights", "--precision bf16-weights --loss nll"])
def test_every_precision_and_optimizer_trains_and_resumes_to_the_bit_after_ctrl_c(
        flags, command, tmp_path, monkeypatch):
    one, two, step = tmp_path / "runs" / "one", tmp_path / "runs" / "two", sp.optimizer_step
    command(sp, *BRIEF, "--name", "one", *flags.split())

    def interrupted(optimizer):
        step(optimizer)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(sp, "optimizer_step", interrupted)
        command(sp, *BRIEF, "--name", "two", *flags.split())
    states = torch.load(two / "checkpoint-1" / "training.pt")["optimizer"]
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    command(sp, "--name", "two", "--resume")
    assert last_weights(two) == last_weights(one) != (SMALL / "model.safetensors").read_bytes()

KILLED = """
import itertools, os, shutil, specialize
calls, function = itertools.count(1), {where}

def call(*arguments):
    if next(calls) == {number}:
        os.kill(os.getpid(), {kind})
    return function(*arguments)

{where} = call
specialize.run_command(specialize.main)
"""

def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(run, command, tmp_path):
    arguments = [*BRIEF, "--steps", 12, "--dropout", 0.1]
    command(sp, *arguments, "--name", "one")
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    arguments += ["--name", "two"]
    for where, number, kind, code, last in [
            ("os.replace", 3, signal.SIGKILL, -9, 8),  # before the third checkpoint is complete
            ("specialize.optimizer_step", 3, signal.SIGTERM, 130, 11),  # finishes its step
            ("shutil.rmtree", 1, signal.SIGKILL, -9, 12)]:  # while an older one is deleted
        damage(tmp_path / "killed.py", KILLED.format(where=where, number=number, kind=int(kind)))
        process = run(tmp_path / "killed.py", *arguments, cwd=tmp_path, env={"PYTHONPATH": ROOT})
        assert process.returncode == code, process.stderr
        assert sp.checkpoints(two)[-1].name == f"checkpoint-{last}"
        arguments = ["--name", "two", "--resume"]
    command(sp, *arguments)
    assert last_weights(two) == last_weights(one)
    assert (two / "results.json").read_text() == (one / "results.json").read_text()
    log = ev.read_jsonl(two / "log.jsonl")
    assert len({(entry["step"], "accuracy" in entry) for entry in log}) == len(log)  # none twice
