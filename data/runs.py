"""A run's folder, runs/NAME/: its arguments, its log, its checkpoints. Whatever ends a run, what stands there is whole.

A file or a folder is written under another name, flushed to the disk, and renamed, which happens wholly or not at all.
At most three checkpoints stand there: the best, the last, and the one being written. Knows nothing of batches and of
what makes a checkpoint good.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import torch

from data.download import InputError
from t5 import T5

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# --- arguments and log ---


def find_run(args):
    """The run's folder, not yet made; with --resume the one of that name, if it ran with the same arguments."""
    root, name = Path("runs"), args.name or args.size
    run = root / name
    arguments = run / "arguments.json"
    if args.resume:
        if not arguments.exists():
            raise InputError(f"{run}: no run to resume; --name says which")
        before, now = read_json(arguments, "give --name another name"), recorded(args)
        told_only = ("log_every", "test_limit", "skip_bbh")  # these may change
        if changed := [option(key, before.get(key)) for key in now if before.get(key) != now[key] and key not in told_only]:
            raise InputError(f"{run} ran with other arguments: {', '.join(changed)}; resume it with those")
    elif args.name and arguments.exists():
        raise InputError(f"{run} is there: --resume goes on with it, another --name begins anew")
    elif not args.name and run.exists():
        run = next(r for i in itertools.count(2) if not (r := root / f"{name}-{i}").exists())
    return run


def option(key, value):
    """An argument as it stands on the command line."""
    name = "--" + key.replace("_", "-")
    if value is None or value is False:
        return f"no {name}"
    return name if value is True else f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def recorded(args):
    """The arguments as a run's arguments.json holds them."""
    kept = {key: value for key, value in vars(args).items() if key not in ("resume", "name", "plan")}
    return json.loads(json.dumps(kept, default=str))


def read_json(path, remedy):
    """The object in a JSON file. Raises InputError with what to do about a damaged one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); {remedy}") from None


def read_log(path):
    """The entries of a log.jsonl, each a dict with its step. A last line that a kill cut short is left out."""
    entries = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
            entries[-1]["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                return entries[: number - 1]
            raise InputError(f"{path}, line {number}: not a line of a run's log; take that line out") from None
    return entries


def write_whole(path, text):
    """Write a text file that appears whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    os.replace(unfinished, path)


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- while it trains ---


class Progress:
    """What a run tells while it trains: a line on the screen and in log.jsonl every few steps."""

    def __init__(self, path, start, steps, every):
        self.path, self.start, self.steps, self.every = path, start, steps, every
        self.seconds, self.tokens, self.losses, self.since = 0.0, 0, {}, time.time()
        # what a killed run logged after its last checkpoint will be logged again
        kept = [entry for entry in read_log(path) if entry["step"] <= start]
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.evaluations = {entry["step"]: entry for entry in kept if "validation" in entry}

    def add(self, name, loss, tokens):
        """Count a micro-batch."""
        self.losses.setdefault(name, []).append(loss)
        self.tokens += tokens

    def step(self, step, rate):
        """Tell of a step, if it is its turn."""
        if step % self.every and step != self.steps:
            return
        means = {name: round(torch.stack(losses).mean().item(), 5) for name, losses in sorted(self.losses.items())}
        self.losses = {}
        seconds = self.seconds + time.time() - self.since
        left = seconds / (step - self.start) * (self.steps - step)
        speed = round(self.tokens / seconds)
        self.write({"step": step, "learning_rate": rate, "tokens_per_second": speed, **means})
        told = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(f"step {step}/{self.steps}  {told}  lr {rate:.2e}  {speed:,} tokens/s  {left / 60:.1f} min left", flush=True)

    def pause(self, work):
        """Do work() off the clock and log what it returns."""
        self.seconds += time.time() - self.since
        entry = work()
        self.write(entry)
        self.evaluations[entry["step"]] = entry
        self.since = time.time()
        return entry

    def write(self, entry):
        """Append a line to the log."""
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


@contextlib.contextmanager
def on_interrupt(handler):
    """Within it Ctrl-C calls handler."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish_step(stop):
    """What Ctrl-C does during training: the first one asks for an end after the step, the second does not wait."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()
    os.write(2, b"\nfinishing the step and saving; Ctrl-C again gives both up\n")  # print may be at work just now


# --- checkpoints ---


def checkpoints(run):
    """A run's checkpoints, oldest first: each is whole, since it got its name last."""
    found = [folder for folder in run.glob("checkpoint-*") if CHECKPOINT.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: int(CHECKPOINT.fullmatch(folder.name)[1]))


def last_checkpoint(run):
    """The name of the last checkpoint for a message."""
    return str((checkpoints(run) or ["none yet"])[-1])


def save_checkpoint(run, step, model, optimizer, tokenizer):
    """Write checkpoint-STEP, an HF-format folder with what training needs to go on: the optimizer's state of each
    parameter and the state of the random numbers. Raises InputError where the disk does not take it."""
    folder, unfinished = run / f"checkpoint-{step}", run / "unfinished-checkpoint"
    shutil.rmtree(unfinished, ignore_errors=True)
    parameters = list(model.parameters())
    state = {
        "step": step,
        "optimizer": [optimizer.state[parameter] for parameter in parameters],
        "random": generator(parameters[0].device.type).get_rng_state(),
    }
    try:
        model.save_pretrained(unfinished)
        tokenizer.save(unfinished)
        with open(unfinished / "training.pt", "wb") as file:
            torch.save(state, file)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        os.replace(unfinished, folder)
        flush(run)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"{folder} cannot be written ({error}). The last good checkpoint is {last_checkpoint(run)}; "
            "make room, and --resume goes on from it"
        ) from None


def drop_checkpoints(run, keep):
    """Delete the checkpoints of other steps than those. They lose their names first: half of one must not look whole."""
    unfinished = run / "unfinished-checkpoint"
    for folder in checkpoints(run):
        if int(folder.name.partition("-")[2]) not in keep:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.replace(folder, unfinished)
            shutil.rmtree(unfinished)


def load_checkpoint(run, model, optimizer):
    """Put the run's last checkpoint into model, optimizer and random numbers; returns its step, 0 where there is none.

    Raises InputError where the checkpoint is damaged.
    """
    if not checkpoints(run):
        return 0
    folder = checkpoints(run)[-1]
    remedy = f"delete {folder}, and --resume goes on from the one before it"
    try:
        saved = T5.from_pretrained(folder, dtype=model.shared.weight.dtype).hf_tensors()
        state = torch.load(folder / "training.pt", weights_only=True)
        states, random_state, step = (state[key] for key in ("optimizer", "random", "step"))
        for parameter, its_state in zip(model.parameters(), states, strict=True):
            optimizer.state[parameter] = its_state
        generator(model.shared.weight.device.type).set_rng_state(random_state)
    except (MemoryError, PermissionError, torch.OutOfMemoryError):
        raise
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    except Exception as error:  # torch.load raises many kinds, none of them documented
        raise InputError(f"{folder / 'training.pt'}: not whole ({type(error).__name__}); {remedy}") from None
    for name, tensor in model.hf_tensors().items():
        tensor.copy_(saved[name])
    print(f"going on from {folder}")
    return step


def generator(device):
    """The module that holds the state of the random numbers of a device: dropout's."""
    return {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}[device]
