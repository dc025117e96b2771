"""data/runs.py and the loop: training processes that are really killed, interrupted, and run out of disk."""

import argparse
import gzip
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import specialize as sp
from conftest import ROOT, TOY
from data.download import InputError
from data.optimizers import make_optimizer, optimizer_step, stochastic_round
from data.records import read_teacher
from data.rows import FORMATS, make_rows
from data.runs import checkpoints, drop_checkpoints, read_log, save_checkpoint, write_whole
from eval import MATH, load
from t5 import T5, T5Config, Tokenizer

STEPS, EVERY = 48, 4
SHAPE = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """train(run, resume): a training process's whole work, from the seed to the end of the loop, on toy rows."""
    tokenizer = Tokenizer(TOY / "student")
    records = [record for record, _ in zip(read_teacher(TOY / "teacher.jsonl.gz"), range(60))]
    rows, _ = make_rows(records, tokenizer, list(FORMATS), "kl")
    pool = load("gsm8k", "train", TOY)
    first = tmp_path_factory.mktemp("first")
    torch.manual_seed(3)
    T5(T5Config(vocab_size=len(tokenizer.pieces), **SHAPE)).save_pretrained(first)

    def pseudo_accuracy(model, tokenizer, args):
        """Accuracies that jump about with the weights, so that the best checkpoint is any of them."""
        value = model.shared.weight.double().sum().item() * 1e4 % 1
        return {"validation": {name: [value, 0.0] for name in MATH}}

    def train(run, resume, measure=pseudo_accuracy, **options):
        arguments = {"--epochs": 20, "--steps": STEPS, "--micro-batch": "2 2 4 4", "--accumulation": 2, "--device": "cpu",
                     "--checkpoint-every": 2 * EVERY, "--log-every": 2, "--threads": 1} | options  # fmt: skip
        args = sp.parse_arguments([word for pair in arguments.items() for word in " ".join(map(str, pair)).split()])
        args.resume = resume
        torch.manual_seed(0)
        model = T5.from_pretrained(first, dtype=sp.weights_dtype(args))
        return sp.train(model, tokenizer, rows, pool, args, run, measure)

    return train


def in_a_process(work, output):
    """Start work() in a process of its own, a copy of this one; what it prints goes to a file."""

    def quiet():
        sys.stdout = sys.stderr = open(output, "a", buffering=1)
        try:
            work()
        except InputError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(130)

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


def state_of(run):
    """All that a finished run leaves: bits of weights and optimizer, random state, step, evaluations, best, folders."""
    last = checkpoints(run)[-1]
    training = torch.load(last / "training.pt", weights_only=True)
    optimizer = [sorted((name, value.tolist()) for name, value in state.items()) for state in training["optimizer"]]
    evaluations = {entry["step"]: entry for entry in read_log(run / "log.jsonl") if "validation" in entry}
    rates = [(entry["step"], entry["learning_rate"]) for entry in read_log(run / "log.jsonl") if "learning_rate" in entry]
    return {
        "weights": (last / "model.safetensors").read_bytes(), "optimizer": optimizer, "step": training["step"],
        "random": training["random"].tolist(), "evaluations": evaluations, "rates": rates,
        "best": sp.best_of(evaluations), "folders": [folder.name for folder in checkpoints(run)],
    }  # fmt: skip


def assert_whole(run):
    """Every folder with a checkpoint's name holds a whole one."""
    for folder in checkpoints(run):
        assert T5.from_pretrained(folder) and Tokenizer(folder)
        assert f"checkpoint-{torch.load(folder / 'training.pt', weights_only=True)['step']}" == folder.name


@pytest.fixture(scope="module")
def uninterrupted(task, tmp_path_factory):
    """What a run that nobody disturbs leaves, and the seconds it takes."""
    run = tmp_path_factory.mktemp("whole")
    begin = time.time()
    process = in_a_process(lambda: task(run, False), run / "out")
    process.join()
    assert process.exitcode == 0, (run / "out").read_text()
    return state_of(run), time.time() - begin


def killed(task, run, choice, seconds):
    """Start or resume the run in a process and kill it: at any time, or while it writes a checkpoint or deletes one.
    Whether it was killed before it had ended, and whether it was at work on a checkpoint."""
    before = stamp(run)
    process = in_a_process(lambda: task(run, True), run / "out")
    if choice.random() < 0.5:
        time.sleep(choice.uniform(0, seconds / 5))
    else:
        while stamp(run) in (None, before) and process.is_alive():
            time.sleep(0.0002)
        time.sleep(choice.uniform(0, 0.01))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (run / "out").read_text()
    return process.exitcode != 0, stamp(run) not in (None, before)


def stamp(run):
    """What changes when work on a checkpoint begins or goes on; None where there is no such work."""
    try:
        stat = (run / "unfinished-checkpoint").stat()
        return stat.st_ino, stat.st_ctime_ns
    except FileNotFoundError:
        return None


def test_runs_killed_at_any_time_end_with_the_bits_of_one_that_was_not(task, uninterrupted, tmp_path):
    """25 kills at random times, half of them in the middle of a checkpoint's writing or deleting."""
    (expected, seconds), choice, kills, torn, numbers = uninterrupted, random.Random(0), 0, 0, iter(range(100))
    while kills < 25:
        run = tmp_path / f"run-{next(numbers)}"
        run.mkdir()
        while (ended := killed(task, run, choice, seconds))[0]:
            kills, torn = kills + 1, torn + ended[1]
            assert_whole(run)
            if kills >= 25:
                process = in_a_process(lambda: task(run, True), run / "out")
                process.join()
                assert process.exitcode == 0, (run / "out").read_text()
                break
        found = state_of(run)
        assert set(expected["folders"]) <= set(found["folders"])  # a late kill may leave one more to delete
        assert found | {"folders": 0} == expected | {"folders": 0}
    assert torn >= 3


def test_a_run_interrupted_at_a_step_that_is_no_checkpoint_ends_the_same(task, uninterrupted, tmp_path):
    run, stops, choice = tmp_path / "run", 0, random.Random(1)
    run.mkdir()
    while stops < 4:
        process = in_a_process(lambda: task(run, True), run / "out")
        time.sleep(choice.uniform(0.3, 0.5) * uninterrupted[1] / 2)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode in (0, 130), (run / "out").read_text()
        if process.exitcode == 0:
            break
        stops += 1
        assert_whole(run)
        assert len(checkpoints(run)) <= 2
    assert stops
    in_a_process(lambda: task(run, True), run / "out").join()
    found, expected = state_of(run), dict(uninterrupted[0])
    assert found | {"folders": 0} == expected | {"folders": 0}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_while_it_evaluates_has_saved_before_and_evaluates_again(task, uninterrupted, tmp_path, end):
    def ends(model, tokenizer, args):
        os.kill(os.getpid(), end)

    run, expected = tmp_path / "run", dict(uninterrupted[0])
    run.mkdir()
    process = in_a_process(lambda: task(run, False, ends), run / "out")
    process.join()
    assert process.exitcode in (130, -signal.SIGKILL), (run / "out").read_text()
    assert [folder.name for folder in checkpoints(run)] == [f"checkpoint-{EVERY}"]
    in_a_process(lambda: task(run, True), run / "out").join()
    assert state_of(run) == expected


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_step_records_and_checkpoint(task, tmp_path, what):
    """After the first checkpoint something goes wrong; the run stops before it is in the weights."""

    def goes_wrong(model, tokenizer, args):
        if what == "loss":
            model.shared.weight.data[5:] = float("nan")
        else:
            model.encoder.final_norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        return {"validation": {name: [0.0, 0.0] for name in MATH}}

    with pytest.raises(InputError) as error:
        task(tmp_path, False, goes_wrong)
    told = str(error.value)
    assert told.startswith(f"step {EVERY + 1}: the {what} is not finite. Batch: ")
    assert re.search(r"teacher.jsonl.gz, line \d+", told) and f"checkpoint: {tmp_path}/checkpoint-{EVERY};" in told
    assert_whole(tmp_path)


@pytest.mark.parametrize("optimizer, precision", [("adafactor", "fp32"), ("adafactor", "bf16-weights"), ("adamw", "bf16-weights")])
def test_every_optimizer_and_precision_resumes_to_the_bit(task, tmp_path, optimizer, precision, capsys):
    options = {"--optimizer": optimizer, "--precision": precision, "--steps": 6}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    task(whole, False, **options)
    first = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 2 and len(checkpoints(whole)) in (1, 2)
    shutil.copytree(whole, resumed, dirs_exist_ok=True)
    if len(checkpoints(resumed)) == 2:  # the best, of step 4, and the last: go back to it
        shutil.rmtree(checkpoints(resumed)[-1])
    else:  # only the last was kept
        shutil.rmtree(resumed)
        resumed.mkdir()
    task(resumed, True, **options)
    assert state_of(whole) == state_of(resumed)


def test_small_changes_add_up_in_bfloat16_weights():
    """A thousand steps of 0.05% of a weight, each below half its last bit."""
    torch.manual_seed(0)
    x = torch.ones(2000, dtype=torch.bfloat16)
    nearest = x.clone()
    for _ in range(1000):
        x, nearest = stochastic_round(x.float() + 5e-4), nearest + 5e-4
    assert (nearest == 1).all() and x.float().mean().item() == pytest.approx(1.5, abs=0.01)
    exact = torch.tensor([1.0, -2.5, 0.0, 3e38, -1e-40, 2.0**-120]).bfloat16()
    assert torch.equal(stochastic_round(exact.float()), exact)


def test_a_frozen_parameter_in_bfloat16_stays_as_it_is():
    frozen, free = (torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = make_optimizer([frozen, free], "adamw", 0.01)
    optimizer.param_groups[0]["lr"] = 0.1
    free.grad = torch.ones_like(free)
    optimizer_step(optimizer)
    assert (frozen == 1).all() and (free < 1).all()


def test_a_full_disk_is_a_message_and_the_last_good_checkpoint_survives(task, uninterrupted, tmp_path):
    """A file system with too little room, or, without the right to mount one, a limit on a file's size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = disk / "run"
    weights = len(uninterrupted[0]["weights"])
    size = 16 * weights  # a checkpoint takes a little over three times the weights
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode == 0
    run.mkdir()
    try:
        process = in_a_process(lambda: task(run, False, **{"--steps": EVERY}), tmp_path / "out")
        process.join()
        assert process.exitcode == 0, (tmp_path / "out").read_text()
        before = state_of(run)["weights"]

        def without_room():
            if mounted:
                with open(disk / "ballast", "ab") as file:
                    file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - weights // 2))
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2, resource.RLIM_INFINITY))
            task(run, True)

        process = in_a_process(without_room, tmp_path / "out")
        process.join()
        told = (tmp_path / "out").read_text()
        assert process.exitcode == 1 and "Traceback" not in told
        assert "cannot be written" in told and f"last good checkpoint is {run}/checkpoint-{EVERY}" in told
        assert_whole(run)
        assert [folder.name for folder in checkpoints(run)] == [f"checkpoint-{EVERY}"] and state_of(run)["weights"] == before
        assert not (run / "unfinished-checkpoint").exists()
        if mounted:
            (disk / "ballast").unlink()
        in_a_process(lambda: task(run, True), tmp_path / "out").join()
        assert state_of(run)["step"] == STEPS
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_ctrl_c_saves_and_tells_the_command_that_goes_on(tmp_path):
    """The main command, interrupted for real after its first steps, then by the command that it has told."""
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        (tmp_path / "teacher.jsonl").write_text("".join(itertools.islice(lines, 60)))
    command = [sys.executable, str(ROOT / "specialize.py"), "--teacher", "teacher.jsonl", "--epochs", "400", "--log-every", "1",
               "--checkpoint-every", "1000", "--formats", "zero_shot_cot"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130 and "Traceback" not in told
    (saved,) = checkpoints(tmp_path / "runs" / "toy")
    assert f"The last checkpoint: runs/toy/{saved.name}" in told
    assert "--formats zero_shot_cot --name toy --resume" in told.splitlines()[-1]


def test_a_line_cut_short_by_a_kill_is_left_out_of_the_log_and_damage_elsewhere_is_told(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [entry["step"] for entry in read_log(log)] == [1, 2] and read_log(tmp_path / "none") == []
    log.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(InputError, match="log.jsonl, line 2"):
        read_log(log)


def test_a_run_killed_before_its_arguments_were_written_begins_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(name="one", size="toy", resume=False)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert str(sp.find_run(args)) == "runs/one"
    write_whole(tmp_path / "runs" / "one" / "arguments.json", "{}")
    with pytest.raises(InputError, match="--resume goes on with it"):
        sp.find_run(args)


def test_what_is_no_checkpoint_is_not_taken_for_one_and_deleting_spares_the_best(tmp_path):
    tokenizer, model = Tokenizer(TOY / "student"), T5(T5Config(vocab_size=40, **SHAPE))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (3, 20, 100):
        save_checkpoint(tmp_path, step, model, optimizer, tokenizer)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-7.tmp", "unfinished-checkpoint"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    drop_checkpoints(tmp_path, keep=(3, 100))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-100"]
