"""specialize.py: losses against torch's, examples of real records, runs that are really killed."""

import dataclasses
import errno
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as ev
import specialize as sp
from conftest import ROOT, TOY, damage, fork, half, random_text, serve
from specialize import Example, Record, build_examples, read_teacher
from t5 import EOS, PAD, T5, UNK, T5Config, Tokenizer, UserError, load_pretrained

@pytest.fixture(scope="module")
def codex(real):
    """40 real solutions of code-davinci-002 to one question."""
    return list(read_teacher(real / "codex" / "gsm8k_train_0.jsonl"))

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder: the name of a run in the project's runs/ would be refused."""
    monkeypatch.chdir(tmp_path)

# --- losses ---

@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_a_loss_and_its_gradient_equal_torchs_on_the_dense_distribution(loss):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 40, requires_grad=True)
    ids = torch.stack([torch.randperm(40)[:3] for _ in range(10)]).view(2, 5, 3)
    probs = torch.rand(2, 5, 3) / 3
    ids[0, :2, 1:] = probs[0, :2, 1:] = 0  # unused slots
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    dense = torch.zeros(2, 5, 40).scatter_add(-1, ids, probs)
    expected = {
        "kl": F.kl_div(logits.log_softmax(-1), dense, reduction="none").sum(-1)[mask].mean(),
        "nll": F.cross_entropy(logits.transpose(1, 2), ids[..., 0].masked_fill(~mask, -100)),
    }[loss]
    found = sp.LOSSES[loss](logits, {"labels": ids[..., 0], "teacher_ids": ids,
                                     "teacher_probs": probs, "loss_mask": mask})
    assert torch.allclose(found, expected, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-7) and not ours[1, 3:].any()

def test_kl_is_exact_if_a_probability_underflows_and_at_its_minimum():
    logits, ones = torch.tensor([[[-math.inf, 200.0, -200.0, 1e4]]]), torch.ones(1, 1)
    kl = sp.kl_loss(logits, torch.tensor([[[1, 2, 0]]]), torch.tensor([[[0.5, 0.5, 0.0]]]), ones)
    assert kl.item() == pytest.approx(1e4 - math.log(2), rel=1e-6)
    ids, probs = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[0.5, 0.3, 0.1]]])
    logits = torch.full((1, 1, 5), 1e-9).scatter(-1, ids, probs / 0.9).log().requires_grad_()
    kl = sp.kl_loss(logits, ids, probs, ones)
    kl.backward(retain_graph=True)
    assert kl.item() == pytest.approx(0.9 * math.log(0.9)) and logits.grad.abs().max() < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()  # runs once

def test_the_schedule_warms_up_and_falls_as_a_cosine():
    constant = [sp.get_lr(step, 100, 5e-4, 10, "constant") for step in (0, 9, 99)]
    assert constant == pytest.approx([5e-5, 5e-4, 5e-4])
    rates = [sp.get_lr(step, 100, 5e-4, 10) for step in range(100)]
    assert rates[0] == pytest.approx(5e-5) and max(rates) < 5e-4 and np.argmax(rates) == 9
    assert rates[50] == pytest.approx(2.5e-4) and rates[99] < 1e-6

# --- records, examples, batches ---

def assert_targets(example):
    """Check that each row is a sub-distribution with the token itself, and that </s> is certain."""
    ids, probs = example.teacher_ids, example.teacher_probs
    assert ids.shape == probs.shape == (len(example.labels), 5) and (probs.sum(1) <= 1).all()
    assert ((ids == example.labels[:, None]) & (probs > 0)).any(1).all()
    assert ids[-1, 0] == EOS and probs[-1, 0] == 1

def test_real_records_become_examples_of_the_four_formats(codex, tokenizer):
    examples, summary = build_examples(codex, tokenizer, list(sp.FORMATS))
    assert [sum(ex.format == name for ex in examples) for name in sp.FORMATS] == [40, 1, 40, 1]
    assert re.match(r"40 of 40 solutions are right; .* candidate for \d\d\.\d% of", summary)
    for ex in examples:
        text = tokenizer.decode(ex.labels)
        assert text.endswith("The answer is 72")
        if sp.FORMATS[ex.format][0]:
            assert_targets(ex)
        else:
            assert ex.teacher_ids is None and text == "The answer is 72"

def test_the_summary_counts_tokens_that_the_vocabulary_lacks(tokenizer):
    problem = ev.Problem("How much?", 0.75, r"So it is \frac{3}{4}. The answer is 3/4")
    _, summary = build_examples([sp.Record(problem, None, "")], tokenizer, ["zero_shot_cot"])
    unknown = tokenizer.encode(problem.solution).count(UNK)
    assert unknown > 2 and f"; {unknown} tokens are unknown to the model's" in summary

def test_distributions_over_t5s_own_pieces_come_over_unchanged(datasets, tokenizer):
    rng, index = random.Random(0), {piece: i for i, piece in enumerate(tokenizer.pieces)}
    for problem in ev.load("gsm8k", "train", datasets)[:100]:
        solution = ev.math_target(problem, cot=True)
        tokens, tops = tokenizer.split(solution), []
        for token in tokens:
            counts = rng.sample(range(1, 9), 5)
            logprobs = [math.log(n / sum(counts)) for n in counts]
            tops.append(dict(zip([token, *rng.sample(tokenizer.pieces[3:], 4)], logprobs)))
        record = {"question": problem.question, "answer": problem.answer, "solution": solution,
                  "tokens": tokens, "top_logprobs": tops}
        (ex,), _ = build_examples([sp.parse_record(record, "")], tokenizer, ["zero_shot_cot"])
        for top, ids, probs in zip(tops, ex.teacher_ids, ex.teacher_probs):
            expected = {index.get(piece, UNK): logprob for piece, logprob in top.items()}
            found = {i: math.log(p) for i, p in zip(ids, probs) if p > 0}
            assert found == pytest.approx(expected, abs=1e-5)

def test_records_of_any_text_become_examples(tokenizer):
    rng, records = random.Random(4), []
    for _ in range(300):
        text = random_text(rng)
        tokens = re.findall("(?s).{1,4}", text + " so 5")
        tops = [{random_text(rng)[:6]: -1.0, token: math.log(rng.uniform(1e-9, 0.5))}
                for token in tokens]
        record = {"question": f"{text} ?", "answer": 5, "solution": text + " so 5",
                  "tokens": tokens, "top_logprobs": tops}
        records.append(sp.parse_record(record, "here"))
    examples, _ = build_examples(records, tokenizer, ["zero_shot_cot"])
    assert len(examples) == 300
    for ex in examples:
        assert_targets(ex)

def test_wrong_solutions_are_dropped_and_a_missing_answer_is_added(codex, tokenizer):
    problem = codex[0].problem
    wrong = dataclasses.replace(codex[0], problem=dataclasses.replace(problem, answer=71.0))
    steps = [(" 48", {" 48": 0.9}), (" +", {" +": 0.5}), (" 24", {}), (" =", {}), (" 72", {})]
    silent = Record(ev.Problem("How many?", 72.0, "48 + 24 = 72"), steps, "here")
    (ex,), summary = build_examples([wrong, silent], tokenizer, ["zero_shot_cot"])
    assert "1 of 2 solutions" in summary
    assert tokenizer.decode(ex.labels) == "48 + 24 = 72 The answer is 72"
    assert ex.teacher_probs[:, 0].tolist() == pytest.approx([0.9, 0.5] + [1] * 8)
    with pytest.raises(UserError, match="none of 1 teacher solutions .* line 1 does not end in 71"):
        build_examples([wrong], tokenizer, ["zero_shot_cot"])

def test_a_batch_shifts_its_labels_and_mixes_solutions_with_and_without_distributions(
        codex, tokenizer):
    plain = dataclasses.replace(codex[0], steps=None)
    for records, loss in (([plain], "kl"), (codex[:1], "nll")):
        (ex,), _ = build_examples(records, tokenizer, ["zero_shot_cot"], loss)
        assert "teacher_ids" not in sp.collate([ex], "cpu")
    examples, _ = build_examples([plain, codex[1]], tokenizer, ["zero_shot_cot"])
    batch = sp.collate(examples, "cpu")
    labels, mask, probs = batch["labels"], batch["loss_mask"], batch["teacher_probs"]
    assert torch.equal(batch["decoder_input_ids"], F.pad(labels, (1, -1), value=PAD))
    assert mask.sum() == sum(len(ex.labels) for ex in examples) and not probs[~mask].any()
    logits = torch.randn(1, labels.shape[1], 32128)
    kl = sp.kl_loss(logits, batch["teacher_ids"][:1], probs[:1], mask[:1])
    assert torch.allclose(kl, sp.nll_loss(logits, labels[:1], mask[:1]))
    assert (probs[1] > 0).sum() > mask[1].sum()

def test_a_prompt_made_of_parts_is_the_prompt_encoded_at_once(datasets, tokenizer):
    problems = ev.load("gsm8k", "train", datasets)[:200]
    for i in range(0, 200, 5):
        question, *shots = problems[i : i + 5]
        for name, (cot, in_context) in sp.FORMATS.items():
            shown = shots if in_context else []
            ids = tokenizer.encode(ev.math_prompt(question.question, cot, shown))
            assert sp.encode_prompt(name, question, shown, tokenizer.encode).tolist() == ids

def test_an_epoch_has_every_example_once_in_batches_of_one_format_and_similar_length():
    class Numbers:
        """A tokenizer whose ids are the numbers of the questions in a text."""
        def encode(self, text):
            return [int(n) for n in re.findall(r"Q: q(\d+)", text)] + [EOS]

    pool = [ev.Problem(f"q{i}", 1.0, "s") for i in range(50)]
    examples = [Example(name, pool[i], np.array([i, EOS]), np.zeros(i), None, None, "")
                for name in sp.FORMATS for i in range(50)]
    sizes = dict(zip(sp.FORMATS, (2, 3, 4, 7)))

    def make(seed, epoch):
        batches = sp.make_batches(examples, pool, Numbers(), sizes.values(), seed, epoch)
        return [[(ex.format, *ex.input_ids.tolist()) for ex in examples] for examples in batches]

    batches = make(0, 0)
    drawn = sorted((name, ids[-2]) for batch in batches for name, *ids in batch)
    assert drawn == sorted((name, i) for name in sp.FORMATS for i in range(50))
    for batch in batches:
        (name,) = {name for name, *_ in batch}
        targets = [question for *_, question, _ in batch]  # question i has a target of length i
        assert len(batch) <= sizes[name] and max(targets) - min(targets) < sizes[name]
        for _, *ids, end in batch:
            assert len(set(ids)) == len(ids) == (5 if sp.FORMATS[name][1] else 1) and end == EOS
    assert make(0, 0) == batches and make(0, 1) != batches != make(1, 0)  # seed, epoch

# --- runs that are killed, interrupted and run out of disk ---

SHAPE = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
             feed_forward_proj="gated-gelu", tie_word_embeddings=False)

@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(run, resume, measure, flags, choose) does all that a training process does."""
    tokenizer, pool = Tokenizer(TOY / "tuned-1M"), ev.load("gsm8k", "train", TOY)
    records = itertools.islice(read_teacher(TOY / "teacher.jsonl.gz"), 0, 1200, 20)
    examples, _ = build_examples(records, tokenizer, list(sp.FORMATS))
    first = tmp_path_factory.mktemp("first")
    torch.manual_seed(3)
    T5(T5Config(vocab_size=len(tokenizer.pieces), **SHAPE)).save_pretrained(first)

    def train(run, resume=False, measure=pseudo_accuracy, flags="", choose=list):
        args = sp.parse_arguments(
            "--steps 32 --epochs 20 --micro-batch-size 2 2 4 4 --gradient-accumulation-steps 2 "
            f"--checkpoint-every 4 --log-every 2 --threads 1 {flags}".split())
        args.resume = resume
        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        options = {"dtype": sp.weights_dtype(args), "dropout_rate": args.dropout}
        model = T5.from_pretrained(first, **options)
        return sp.train(model, tokenizer, choose(examples), pool, args, run, measure)

    return train

def pseudo_accuracy(model, tokenizer, args):
    """Return accuracies that vary with the weights, so that any checkpoint may be the best."""
    value = model.shared.weight.double().sum().item() * 1e4 % 1
    return {"validation": {task: [value, 0.0] for task in ev.DATASETS}}

def at_first_checkpoint(action):
    """Return pseudo_accuracy with an action on the model at the evaluation after the start's."""
    calls = itertools.count()

    def measure(model, tokenizer, args):
        if next(calls) == 1:
            action(model)
        return pseudo_accuracy(model, tokenizer, args)

    return measure

def outcome(run):
    """Return a run's weights, training state, evaluations and learning rates."""
    last, log = sp.checkpoints(run)[-1], sp.read_log(run / "log.jsonl")
    training = torch.load(last / "training.pt", weights_only=True)
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "training": json.dumps(training, default=torch.Tensor.tolist),
        "log": [(e["step"], e.get("validation"), e.get("learning_rate")) for e in log],
    }

def test_runs_killed_at_any_time_end_with_the_same_bits(train, tmp_path):
    """12 kills, half of them when a checkpoint is being written or deleted."""
    begin, rng, kills, amid = time.time(), random.Random(0), 0, 0
    train(tmp_path)
    expected, seconds = outcome(tmp_path), time.time() - begin
    for number in itertools.takewhile(lambda _: kills < 12, itertools.count()):
        run, exitcode = tmp_path / f"{number}", None
        unfinished = run / "unfinished-checkpoint"
        while exitcode != 0:
            if kills % 2:
                shutil.rmtree(unfinished, ignore_errors=True)
            before = set(run.glob("*checkpoint*"))
            process = fork(lambda: train(run, resume=True), tmp_path / "out")
            while kills % 2 and process.is_alive() and before == set(run.glob("*checkpoint*")):
                time.sleep(0.0002)
            if kills < 12:
                time.sleep(rng.uniform(0, 0.01 if kills % 2 else seconds / 2))
                process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL), (tmp_path / "out").read_text()
            kills, amid = kills + (exitcode != 0), amid + unfinished.exists()
            for folder in sp.checkpoints(run):  # each is complete
                training = torch.load(folder / "training.pt", weights_only=True)
                assert folder.name == f"checkpoint-{training['step']}" and load_pretrained(folder)
        assert outcome(run) == expected
    assert amid

@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("flags", [
    "", "--optimizer adafactor", "--optimizer adafactor --precision bf16-weights",
    "--precision bf16-weights --loss nll", "--precision bf16 --gradient-checkpointing"])
def test_after_ctrl_c_in_an_evaluation_every_optimizer_and_precision_resumes_to_the_bit(
        train, tmp_path, flags, presses):
    def press(model):
        for number in (signal.SIGTERM, signal.SIGINT)[:presses]:
            os.kill(os.getpid(), number)

    one, two, flags = tmp_path / "one", tmp_path / "two", f"--steps 6 {flags}"
    best = train(one, flags=flags)
    with pytest.raises(KeyboardInterrupt):
        train(two, False, at_first_checkpoint(press), flags)
    assert [folder.name for folder in sp.checkpoints(two)] == ["checkpoint-4"]
    assert len(sp.read_log(two / "log.jsonl")) == 5 - presses  # the first lets it finish
    assert train(two, True, flags=flags) == best and outcome(one) == outcome(two)

def test_accumulated_micro_batches_have_the_gradient_of_one_large_one(
        train, tmp_path, monkeypatch):
    def choose(examples):
        return [ex for ex in examples if ex.format == "zero_shot_cot"][:1] * 8

    norms = []
    monkeypatch.setattr(sp, "check_finite", lambda losses, norm, *_: norms.append(norm.item()))
    for n in (1, 2, 8):
        flags = f"--gradient-accumulation-steps {n} --micro-batch-size 1 1 {8 // n} 1 --dropout 0"
        train(tmp_path / f"{n}", flags=f"--steps 1 {flags}", choose=choose)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)

# --- memory ---

def allowed(cap, model):
    """Return a free_memory(): 85% of what weights and gradients leave of a cap."""
    def free_memory(device):
        held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        return int(0.85 * (cap - sum(tensor.nbytes for tensor in held)))
    return free_memory

@pytest.fixture(scope="module")
def solved(datasets, tokenizer):
    """Examples of 200 real problems in the four formats, with the pool of demonstrations."""
    pool = ev.load("gsm8k", "train", datasets)
    records = [Record(dataclasses.replace(p, solution=ev.math_target(p, cot=True)), None, "")
               for p in pool[:200]]
    return build_examples(records, tokenizer, list(sp.FORMATS))[0], pool

@pytest.mark.parametrize("cap, times, shape", [
    (1, 1, dict(d_model=64, d_kv=8, d_ff=64, num_layers=2, num_heads=16)),  # attention
    (2, 1, dict(d_model=64, d_kv=32, d_ff=512, num_layers=8, num_heads=4)),  # depth
    (4, 4, dict(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2))])  # logits
def test_training_takes_the_memory_that_there_is_and_no_more(
        solved, tokenizer, monkeypatch, cap, times, shape):
    torch.manual_seed(0)
    model = T5(T5Config(**shape, dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    args = sp.parse_arguments(["--size", "base", "--device", "cpu", "--micro-batch-size",
                               *(str(times * n) for n in (25, 35, 40, 60))])
    monkeypatch.setattr(sp, "count_parameters", lambda name: sum(
        parameter.numel() for parameter in model.parameters()))
    batches = sp.make_batches(*solved, tokenizer, args.micro_batch_size, 0, 0)
    longest = max((example for batch in batches for example in batch),
                  key=lambda example: len(example.input_ids) + len(example.labels))
    monkeypatch.setattr(sp, "free_memory", allowed(cap * 1e9, model))
    sp.measure_passes(model, longest, args)
    heaviest = max(batches, key=lambda batch: sp.pass_size(batch, args.pass_costs))
    assert len(sp.split_into_passes(heaviest, args.tokens_per_pass, args.pass_costs)) > 1
    peak, _ = sp.memory_of("cpu", lambda: sp.add_gradients(model, [heaviest], args))
    assert 0.8 * cap < (sum(sp.state_bytes(args)) + peak) / 1e9 <= cap

def test_the_meter_counts_tensors_that_exist_at_the_same_time():
    weights = torch.ones(1000, requires_grad=True)  # 4 kB, from before

    def work():
        a = weights * 2  # 4 kB
        b = torch.cat([a, a]).view(2, -1)  # 8 kB; a view takes nothing
        del a
        return (b + 1)[0]  # 8 kB, of which a part is returned

    assert sp.memory_of("cpu", work) == (16000, 8000)

@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_the_gradient_is_the_same_for_any_split_into_passes(codex, solved, tokenizer, loss):
    examples, pool = solved
    examples = build_examples(codex[:4], tokenizer, list(sp.FORMATS), loss)[0] + examples[:8]
    args = sp.parse_arguments(["--loss", loss])
    batches = sp.make_batches(examples, pool, tokenizer, (5, 6, 9, 9), 0, 0)
    torch.manual_seed(0)
    model = T5(T5Config(**SHAPE | {"dropout_rate": 0.0}))
    results = {}
    for args.tokens_per_pass in (None, 4000, 900, 1):
        model.zero_grad()
        losses = torch.stack(sp.add_gradients(model, batches, args))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results[args.tokens_per_pass] = losses, gradient
    losses, gradient = results[None]
    for others, other in results.values():
        assert torch.allclose(others, losses, rtol=1e-5)
        assert (other - gradient).norm() < 1e-5 * gradient.norm()

def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_passes(
        train, tmp_path, monkeypatch, capsys):
    def measured(run, fails):
        norms, collate = [], sp.collate
        monkeypatch.setattr(sp, "check_finite", lambda losses, norm, *_: norms.append(norm.item()))

        def collate_or_fail(examples, device):
            if len(examples) > fails:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
            return collate(examples, device)

        with monkeypatch.context() as patch:
            patch.setattr(sp, "collate", collate_or_fail)
            train(run, flags="--steps 3 --dropout 0 --micro-batch-size 8 8 8 8")
        return norms

    assert measured(tmp_path / "one", 2) == pytest.approx(measured(tmp_path / "two", 8), rel=1e-4)
    assert "out of memory: this step again, with passes as large as" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # main() turns it into a line
        measured(tmp_path / "three", 0)

def test_what_does_not_fit_is_refused_with_the_settings_that_do(refused, monkeypatch, teacher):
    monkeypatch.setattr(sp, "free_memory", lambda device: 8_000_000)
    message = refused(sp, "--teacher", "teacher.jsonl")
    assert "cpu has 0.01 GB free: weights, gradients and optimizer of 956,672 parameters take 0.02" \
        in message and "--optimizer adafactor" in message and f"try: {sys.executable} " in message
    monkeypatch.setattr(sp, "free_memory", lambda device: 16_000_000)
    assert "the longest example, of" in refused(sp, "--teacher", "teacher.jsonl")

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_step_records_and_checkpoint(
        train, tmp_path, what):
    def spoil(model):
        if what == "loss":
            model.shared.weight.data[5:] = math.nan
        else:
            model.encoder.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(UserError) as error:
        train(tmp_path, measure=at_first_checkpoint(spoil))
    assert re.match(rf"step 5: the {what} is not finite. Batch: .*teacher.jsonl.gz, line \d+.* "
                    rf"good checkpoint: {tmp_path}/checkpoint-4\.", str(error.value))

@pytest.mark.parametrize("share", [0.5, 1.5])  # no room for the weights; for the optimizer
def test_a_full_disk_is_one_message_and_the_last_good_checkpoint_survives(
        train, tmp_path, share):
    train(tmp_path, flags="--steps 4")
    weights = outcome(tmp_path)["weights"]

    def without_room():
        limit = int(share * len(weights))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(tmp_path, resume=True)

    process = fork(without_room, tmp_path / "out")
    process.join()
    message = (tmp_path / "out").read_text()
    assert process.exitcode == 1 and "Traceback" not in message
    assert f"The last good checkpoint is {tmp_path}/checkpoint-4; free some space" in message
    assert [folder.name for folder in tmp_path.glob("*checkpoint*")] == ["checkpoint-4"]
    assert outcome(tmp_path)["weights"] == weights
    assert train(tmp_path, resume=True)

def test_only_complete_names_are_checkpoints_and_pruning_spares_the_best(tmp_path):
    others = {"checkpoint-", "checkpoint-x", "checkpoint-7.tmp", "unfinished-checkpoint"}
    for name in ("checkpoint-3", "checkpoint-100", "checkpoint-20", *others):
        (tmp_path / name / "folder").mkdir(parents=True)
    assert [folder.name[11:] for folder in sp.checkpoints(tmp_path)] == ["3", "20", "100"]
    sp.prune_checkpoints(tmp_path, keep=[3, 100])
    assert [folder.name[11:] for folder in sp.checkpoints(tmp_path)] == ["3", "100"]

def test_small_changes_add_up_in_bf16_weights_and_frozen_ones_stay():
    torch.manual_seed(0)
    x = nearest = torch.ones(2000, dtype=torch.bfloat16)
    for _ in range(1000):  # each change is below half of the last bit
        x, nearest = sp.stochastic_round(x.float() + 5e-4), nearest + 5e-4
    assert (nearest == 1).all() and x.float().mean().item() == pytest.approx(1.5, abs=0.01)
    exact = torch.tensor([1.0, -2.5, 0.0, 3e38, -1e-40, 2.0**-120]).bfloat16()
    assert torch.equal(sp.stochastic_round(exact.float()), exact)
    frozen, free = (torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = sp.make_optimizer([frozen, free], "adamw", 0.01)
    optimizer.param_groups[0]["lr"] = 0.1
    free.grad = torch.ones_like(free)
    sp.optimizer_step(optimizer)
    assert (frozen == 1).all() and (free < 1).all()

# --- losses and sets of one's own ---

def test_an_entry_in_losses_is_offered_and_trained_with(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sp.LOSSES, "half", lambda logits, batch: sp.LOSSES["kl"](logits, batch) / 2)
    train(tmp_path, flags="--steps 6 --loss half")
    log = sp.read_log(tmp_path / "log.jsonl")
    assert {name for entry in log for name in entry.get("loss", ())} <= set(sp.FORMATS)
    with pytest.raises(SystemExit):
        sp.parse_arguments(["--loss", "third"])

def test_a_sets_entry_says_whether_it_is_validated_on_and_counts_for_selection(monkeypatch):
    accuracies = {"gsm8k": 0.9, "multiarith": 0.1, "asdiv": 0.2, "svamp": 0.3, "mine": 0.8}
    monkeypatch.setattr(sp, "evaluate_with", lambda args, model, tokenizer, task, *_:
                        ev.Evaluation(accuracies[task], 0.01, []))
    for validate, select, mean in ((True, True, 0.35), (True, False, 0.2), (False, False, 0.2)):
        mine = ev.Dataset("Mine", "mine.jsonl", None, 500, validate, select)
        monkeypatch.setitem(sp.DATASETS, "mine", mine)
        entry = sp.validate(None, None, sp.parse_arguments(["--bbh-limit", "0"]))
        assert list(entry["validation"]) == list(accuracies)[: 5 if validate else 4]
        assert sp.ood_accuracy(entry) == pytest.approx(mean)
    entries = [{"step": n, "validation": dict.fromkeys(accuracies, [x, 0])}
               for n, x in enumerate((0.1, 0.3, 0.3, 0.2))]
    assert sp.best_checkpoint(dict(enumerate(entries))) == entries[2]  # the later of equals

# --- the command ---

BRIEF = ("--teacher teacher.jsonl --epochs 1 --micro-batch-size 4 4 8 8 --checkpoint-every 4 "
         "--validation-limit 2 --bbh-limit 1 --test-limit 2 --max-new-tokens 8 --log-every 1 "
         "--threads 1").split()

@pytest.fixture
def teacher(tmp_path):
    """Put the first 40 of the toy's teacher records into tmp_path."""
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        (tmp_path / "teacher.jsonl").write_text("".join(itertools.islice(lines, 40)))

def test_the_command_prints_progress_selects_a_checkpoint_and_writes_the_run(
        command, teacher, tmp_path, monkeypatch):
    printed = command(sp, *BRIEF, "--name", "one")
    assert re.search(r"step 2/\d+  lr .* tokens/s  .* left  (in_context|zero_shot)_\w+ \d", printed)
    header, *rows = printed[printed.index("accuracy, %") :].splitlines()[:7]
    columns = ["toy-GSM8K", "toy-MultiArith", "toy-ASDiv", "toy-SVAMP", "generic CoT",
               "generic answer-only"]
    assert header.split()[2:] == ["base", "specialized"]
    assert [row.partition("  ")[0] for row in rows] == columns
    run = tmp_path / "runs" / "one"
    results = json.loads((run / "results.json").read_text())
    assert [list(entries) for entries in results["test"].values()] == [columns, columns]
    evaluations = {e["step"]: e for e in sp.read_log(run / "log.jsonl") if "validation" in e}
    best = sp.best_checkpoint(evaluations)
    assert len(evaluations) > 2 and results["selected"] == best
    weights = (run / f"checkpoint-{best['step']}" / "model.safetensors").read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert load_pretrained(run / "model")
    assert len((run / "table.txt").read_text().splitlines()) == printed.count(" problems, ")
    # Resumed after its end, it generates nothing again.
    monkeypatch.setattr(T5, "generate", lambda *_, **__: pytest.fail("it generates"))
    (run / "results.json").unlink()
    command(sp, *BRIEF, "--name", "one", "--resume")
    assert json.loads((run / "results.json").read_text()) == results

def test_after_ctrl_c_the_printed_command_continues_to_the_same_bits(command, teacher, tmp_path):
    script = [sys.executable, str(ROOT / "specialize.py")]
    process = subprocess.Popen([*script, *BRIEF, "--skip-bbh"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("step 3/"))
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130 and "Traceback" not in message
    (saved,) = sp.checkpoints(tmp_path / "runs" / "toy")
    words = shlex.split(message.partition(f"runs/toy/{saved.name}. Continue with: ")[2])
    assert words[:2] == script
    assert f"resuming from runs/toy/{saved.name}" in command(sp, *words[2:])
    command(sp, *BRIEF, "--skip-bbh", "--name", "at_once")
    assert outcome(tmp_path / "runs" / "toy") == outcome(tmp_path / "runs" / "at_once")

def test_a_run_is_not_overwritten_and_resumes_with_its_own_settings(refused, tmp_path):
    def start(*options):
        args = sp.parse_arguments(list(options))
        damage(args.run / "arguments.json", json.dumps(sp.recorded(args)))
        return args

    assert "runs/one: no run to resume" in refused(sp, "--name", "one", "--resume")
    start("--name", "one", "--size", "small", "--epochs", "7", "--loss", "nll", "--test-limit", "3")
    assert "runs/one exists; continue it with --resume" in refused(sp, "--name", "one")
    resume = ["--name", "one", "--resume"]
    message = refused(sp, *resume, "--epochs", 8, "--loss", "kl", "--test-limit", 2)
    assert message.endswith("started with --loss nll, --epochs 7; leave this as it is, or start "
                            "another run with --name")
    args = sp.parse_arguments([*resume, "--loss", "nll", "--test-limit", "2", "--threads", "1"])
    assert (args.size, args.epochs, args.loss, args.test_limit) == ("small", 7, "nll", 2)
    assert args.model == "google/flan-t5-small" and args.data == ev.DEFAULT_DATA
    before = json.loads((args.run / "arguments.json").read_text())
    damage(args.run / "arguments.json", json.dumps(before | {"pass_costs": [1, 2, 3, 4, 5],
                                                             "tokens_per_pass": 7}))
    assert sp.parse_arguments(resume).pass_costs == [1, 2, 3, 4, 5]
    args = sp.parse_arguments([*resume, "--tokens-per-pass", "9"])  # plain tokens, not measured
    assert (args.tokens_per_pass, args.pass_costs) == (9, sp.PLAIN_COSTS)
    assert start().run == sp.parse_arguments(["--resume"]).run == Path("runs/toy")

def test_a_run_is_not_resumed_with_another_teacher_or_other_sets(
        refused, command, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sp, "train", lambda *_, **__: pytest.fail("it trains"))
    shutil.copytree(TOY, tmp_path / "data", ignore=shutil.ignore_patterns("raw-*", "tuned-*"))
    for name in ("teacher.jsonl", "data/svamp/SVAMP.json", "data/bbh/bbh/opposites.json"):
        arguments = ["--name", name.replace("/", "-"), "--data", "data"]
        with pytest.raises(pytest.fail.Exception):
            command(sp, *arguments, *BRIEF)
        path, text = tmp_path / name, (tmp_path / name).read_text()
        path.write_text(text.replace("How many", "How  many", 1).replace(" hot", "  hot", 1))
        message = refused(sp, *arguments[:2], "--resume", "--threads", "1")
        assert "its content has changed since" in message and name.partition("/")[0] in message
        path.write_text(text)

def test_a_run_in_progress_is_not_started_a_second_time(refused, teacher, tmp_path, monkeypatch,
                                                        capsys):
    with sp.lock(tmp_path / "runs" / "one"):
        assert "runs/one: another process" in refused(sp, *BRIEF, "--name", "one")
    with sp.lock(tmp_path / "runs" / "one"):  # it is free again
        pass

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sp.fcntl, "flock", without_locks)
    with sp.lock(tmp_path / "runs" / "two"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out

def test_sigterm_outside_training_says_how_to_continue(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["specialize.py", *BRIEF, "--skip-bbh", "--name", "a/b"])
    monkeypatch.setattr(sp, "report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"):
        sp.main()
    signal.signal(signal.SIGTERM, before)
    assert "Continue with" in (message := capsys.readouterr().err) and "--name a/b" in message

def test_a_dry_run_prints_memory_and_time_and_writes_nothing(command, teacher, tmp_path, capsys):
    printed = command(sp, *BRIEF, "--name", "one", "--dry-run")
    assert re.search(r"cpu, fp32, 956,672 parameters: weights 0.00 GB, .* optimizer 0.01 GB; passes "
                     r"as large as [\d,]+ source tokens; checkpoints take up to 0.03 GB of disk.\n"
                     r"\d+ steps, \d evaluations. Estimate: training \d+ s, evaluations \d+ s, last "
                     r"table \d+ s \(if a batch's longest output has 8 tokens\)", printed)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.jsonl"]
    with pytest.raises(SystemExit):
        sp.parse_arguments(["--dry-run", "--resume"])

@pytest.mark.parametrize("name", ["svamp/SVAMP.json", "bbh/bbh/odd_one_out.json",
                                  "bbh/cot-prompts/odd_one_out.txt"])
def test_all_sets_are_read_before_training(name, refused, teacher, tmp_path, monkeypatch):
    shutil.copytree(TOY, tmp_path / "data")
    damage(tmp_path / "data" / name, "{}")
    monkeypatch.setattr(sp, "train", lambda *_: pytest.fail("it trains"))
    assert name in refused(sp, "--data", tmp_path / "data", "--teacher", "teacher.jsonl")

def test_without_a_teacher_it_trains_on_gsm8ks_own_solutions(datasets, tokenizer):
    args = sp.parse_arguments(["--size", "large", "--data", str(datasets)])
    assert args.model == "google/flan-t5-large" and args.micro_batch_size == (8, 12, 18, 30)
    assert (args.learning_rate, args.epochs, args.gradient_accumulation_steps) == (5e-4, 10, 20)
    records = sp.teacher_records(args, ev.load("gsm8k", "train", args.data))
    examples, summary = build_examples(records, tokenizer, list(sp.FORMATS))
    assert summary.startswith("7,473 of 7,473 solutions are right") and len(examples) == 4 * 7473
    assert all(ex.teacher_ids is None for ex in examples)

def test_the_paper_run_downloads_model_and_sets_and_trains(
        real, datasets, tokenizer, command, refused, tmp_path, monkeypatch):
    """`--size small` on a random model, with the real vocabulary, sets and teacher records."""
    site, small = tmp_path / "site", "google/flan-t5-small"
    model = site / small / "resolve" / "abc123"
    T5(T5Config(**SHAPE)).save_pretrained(model)
    tokenizer.save(model)
    files = [{"rfilename": file.name, "size": file.stat().st_size} for file in model.iterdir()]
    for revision in ("main", "abc123"):
        damage(site / "api" / "models" / small / "revision" / revision,
               json.dumps({"sha": "abc123", "siblings": files}))
    monkeypatch.setattr(ev, "BBH_TASKS", ["navigate", "snarks"])
    names = {name: f"{source}/{path}" for name, (source, path, _) in ev.SOURCES.items()}
    names |= {f"bbh/{name}": f"{ev.BBH_SOURCE}/{name}" for task in ev.BBH_TASKS
              for name in (f"bbh/{task}.json", f"cot-prompts/{task}.txt")}
    for name, path in names.items():
        damage(site / path, (datasets / name).read_bytes())
    lines = (real / "codex" / "gsm8k_train_0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "teacher.jsonl").write_text("".join(lines[:2]))
    with serve(site) as url:
        monkeypatch.setattr(ev, "GITHUB", url)
        for name, value in (("HF_HOME", str(tmp_path / "cache")), ("HF_ENDPOINT", url),
                            ("HF_HUB_CACHE", ""), ("HF_HUB_OFFLINE", "")):
            monkeypatch.setenv(name, value)
        flags = "--data sets --device cpu --epochs 1 --validation-limit 1 --test-limit 1"
        printed = command(sp, "--size", "small", "--teacher", "teacher.jsonl", *flags.split(),
                          "--max-new-tokens", 4)
    assert "2 of 2 solutions are right" in printed and "BBH answer-only" in printed
    sets = tmp_path / "sets"
    assert {str(file.relative_to(sets)) for file in sets.rglob("*.*")} == set(names)
    assert load_pretrained(tmp_path / "runs" / "small" / "model")
    assert "flan-t5-base" in refused(sp, "--size", "base", "--data", "sets", "--device", "cpu")

# --- damaged files ---

GOOD = {"question": "Why?", "answer": "5", "solution": "2 + 3 = 5", "tokens": ["2 + 3", " = 5"],
        "top_logprobs": [{"2 + 3": -0.1}, {" = 5": -0.2, " is": -2.0}]}
LINE = json.dumps(GOOD) + "\n"
LINES = gzip.compress(LINE.encode() * 5000, mtime=0)
RECORDS = [  # what is wrong, and the values of the record that are
    ("question is 5", {"question": 5}), ("the question is empty", {"question": " "}),
    ("answer is True", {"answer": True}), ("the answer inf", {"answer": "9" * 400}),
    ("solution is ['a']", {"solution": ["a"]}), ("solution has 1,0", {"solution": "5" * 10**6}),
    ("tokens is 'a'", {"tokens": "a"}), ("a token is 2", {"tokens": [2, " = 5"]}),
    ("the tokens do not spell", {"tokens": ["2", "6"]}),
    ("2 tokens but 1 top_logprobs", {"top_logprobs": [{}]}),
    ("30,000 tokens", {"tokens": ["5"] * 30_000, "top_logprobs": [{}] * 30_000}),
    ("an entry of top_logprobs is [1]", {"top_logprobs": [[1], {}]}),
    ("a log-probability is '-1'", {"top_logprobs": [{"a": "-1"}, {}]}),
    ("at '2 + 3', 'a' has the log-probability 0.5", {"top_logprobs": [{"a": 0.5}, {}]}),
    ("at '2 + 3', 'a' has the log-probability nan", {"top_logprobs": [{"a": math.nan}, {}]}),
    ("at '2 + 3' the probabilities sum to", {"top_logprobs": [{"a": -0.1, "b": -0.1}, {}]})]
RECORDS = [(f"Error: {fault}", LINE + json.dumps(GOOD | values)) for fault, values in RECORDS]
RECORDS += [(f"line 2: not a teacher record (no key '{key}')", LINE + LINE.replace(key, "x", 1))
            for key in ("question", "answer", "solution", "tokens")]

@pytest.mark.parametrize("name, fault, content", [
    *(("a.jsonl", fault, content) for fault, content in [
        *RECORDS, ("no teacher record", ""), ("line 1: not a teacher", " " * (2**24 + 5)),
        ("line 1", "[" * 200_000), ("line 1: not a teacher record (TypeError: a record", "[1]\n"),
        ("line 2", LINE + LINE[:-20]), ("line 2", LINE + "\n" + LINE),
        ("line 2", LINE.encode() + b'{"question": "\xff"}\n'),
        ("none of 1 teacher solutions ends in its gold", LINE.replace('"5"', '"6"'))]),
    ("a.jsonl.gz", "is the file complete", half(LINES)), ("a.jsonl.gz", "Not a gzipped", "text"),
    ("a.jsonl.gz", "line", LINES[:400] + bytes(200) + LINES[600:]),
    ("a.jsonl.gz", "line 1: not a teacher", gzip.compress(bytes(2**28), 1))], ids=itertools.count())
def test_a_damaged_teacher_is_refused(name, fault, content, tmp_path, refused):
    damage(tmp_path / name, content)
    message = refused(sp, "--teacher", name, "--skip-bbh")
    assert name in message and fault in message

class RunsCode:
    def __reduce__(self):
        return open, ("code-ran", "w")

@pytest.mark.parametrize("name, fault, content", [
    ("arguments.json", "not the settings", half), ("arguments.json", "not the settings", "[1]"),
    ("log.jsonl", "line 1: not an entry", '{"st\n{"step": 1}\n'),
    ("log.jsonl", "line 2: not an entry", '{"step": 1}\n[]\n{"step": 1}\n'),
    ("checkpoint-3/model.safetensors", "delete", half),
    *(("checkpoint-3/training.pt", "delete", content) for content in [
        half, "", pickle.dumps(RunsCode(), 2), pickle.dumps({"step": 3, "optimizer": [{}]}, 2)])],
    ids=itertools.count())
def test_a_damaged_run_is_not_resumed(name, fault, content, tmp_path, refused, teacher):
    arguments = ["--teacher", "teacher.jsonl", "--name", "one", "--skip-bbh"]
    run, (model, tokenizer) = tmp_path / "runs" / "one", load_pretrained(TOY / "tuned-1M")
    run.mkdir(parents=True)
    sp.save_checkpoint(run, 3, model, torch.optim.AdamW(model.parameters()), tokenizer)
    recorded = sp.recorded(sp.parse_arguments(arguments))
    (run / "arguments.json").write_text(json.dumps(recorded, indent=2) + "\n")
    damage(run / name, content)
    message = refused(sp, *arguments, "--resume")
    assert f"runs/one/{name}" in message and fault in message
