"""Specialize a small language model towards multi-step reasoning (Fu et al., ICML 2023).

Data flow in one direction: teacher record -> alignment -> training example -> batch -> loss ->
checkpoint -> accuracy. The method comes first, in this order. What follows from "reading teacher
records" on makes runs safe and convenient. The model is in t5.py, the alignment in align.py,
problems and accuracies in eval.py.

    python specialize.py                                        a toy world, minutes on a CPU
    python specialize.py --size base --teacher teacher.jsonl.gz            FlanT5 on one GPU
    python specialize.py --size base --teacher teacher.jsonl.gz --resume   continue a run

Letters: B batch, S source length, T target length, V vocabulary, K teacher candidates per token.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from t5 import EOS, PAD, T5, UNK, UserError, best_device, in_range, load_pretrained
from t5 import pad_sequences, run_command
from align import BYTES, WORD_BOUNDARY, transfer
from eval import DATASETS, DEFAULT_DATA, TOY, PredictionFile, Problem, bbh_prompt, bbh_tasks
from eval import display_name, evaluate_task, exact_match, load, load_demonstrations
from eval import math_demonstration, math_prompt, math_target, number_text, parse_gold_answer
from eval import read_log, table, weights_hash

import numpy as np
import torch  # after t5, which sets how OpenMP's threads wait
import torch.nn.functional as F

# --- teacher records ---

@dataclass
class Record:
    """One solution of the teacher.

    problem: the question, its gold answer, and the teacher's solution.
    steps: a list with (token, {candidate: probability}) per token of the solution, or None if the
    teacher reported no probabilities.
    source: the file and line it comes from, for messages. read_teacher() yields Records."""

    problem: Problem
    steps: list | None
    source: str

# --- training examples in four formats ---

# The paper's data formats: (chain of thought, in context).
FORMATS = {
    "in_context_cot": (True, True),
    "in_context_answer_only": (False, True),
    "zero_shot_cot": (True, False),
    "zero_shot_answer_only": (False, False),
}
SHOTS = 4  # demonstrations in context

@dataclass
class Example:
    """A training example; in-context formats draw demonstrations again in each epoch.

    labels (T,): the ids of the target, ending in </s>.
    teacher_ids, teacher_probs (T, K): the teacher's distributions, or None for likelihood."""

    format: str
    problem: Problem
    labels: np.ndarray
    teacher_ids: np.ndarray | None
    teacher_probs: np.ndarray | None
    source: str

def build_examples(records, tokenizer, formats, loss="kl", k=5):
    """Turn the records with right answers into examples; also return a one-line summary.

    Chain-of-thought formats yield one example per solution, with the teacher's distributions if it
    reported any, unless loss is "nll". Answer-only formats yield one example per question."""
    vocab = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    cot_formats = [name for name in formats if FORMATS[name][0]]
    examples, first_record, count = [], {}, collections.Counter()
    for record in records:
        count["read"] += 1
        if not exact_match(record.problem.solution, record.problem.answer):  # the final answers
            last_wrong = record
            continue
        count["right"] += 1
        first_record.setdefault(record.problem.question, record)
        text = target_text(record.problem)
        labels = np.array(tokenizer.encode(text), np.int32)  # (T,)
        count["unknown"] += int((labels == UNK).sum())
        ids = probs = None
        if record.steps and cot_formats and loss != "nll":
            # The line "The answer is" may have been added; the teacher has no candidates for it.
            added = text.removeprefix(record.problem.solution)
            steps = record.steps + ([(added, {})] if added else [])
            # One distribution per token but </s>; one-hot if the teacher has none for it.
            ids, probs = transfer(steps, tokenizer.split(text), vocab, k)  # (T - 1, K)
            certain = np.eye(1, k, dtype=np.float32)  # [[1, 0, ..]]
            ids = np.vstack([ids, np.int32(EOS * certain)])
            probs = np.vstack([probs, certain])
            count["tokens"] += len(labels)
            count["several"] += int((probs[:, 1] > 0).sum())
        examples += [Example(name, record.problem, labels, ids, probs, record.source)
                     for name in cot_formats]
    if not count["right"]:
        last = ""
        if count["read"]:
            last = f"; {last_wrong.source} does not end in {last_wrong.problem.answer}"
        raise UserError(f"none of {count['read']:,} teacher solutions ends in its gold answer"
                        f"{last}; choose another --teacher")
    for record in first_record.values():
        labels = np.array(tokenizer.encode(math_target(record.problem, cot=False)), np.int32)
        examples += [Example(name, record.problem, labels, None, None, record.source)
                     for name in formats if name not in cot_formats]
    summary = f"{count['right']:,} of {count['read']:,} solutions are right"
    if count["tokens"]:
        share = count["several"] / count["tokens"]
        summary += f"; the teacher has more than one candidate for {share:.1%} of their tokens"
    if count["unknown"]:
        summary += f"; {count['unknown']:,} tokens are unknown to the model's vocabulary"
    return examples, summary

def target_text(problem):
    """Return the target of chain-of-thought formats: the solution, and its answer unless stated."""
    stated = "answer is" in problem.solution.rpartition("\n")[2]
    return problem.solution if stated else math_target(problem, cot=True)

# --- batches ---

def make_batches(examples, pool, encode, micro_batch_sizes, seed, epoch):
    """Return an epoch's micro-batches in random order, each a list of (example, demonstrations).

    A micro-batch holds micro_batch_sizes[format] examples of one format. To limit padding, the
    shuffled examples are sorted by target length within windows of 64 micro-batches (targets cost
    most: their logits are (B, T, V)), then by total length within windows of 8.
    pool: GSM8K's training problems, which demonstrations are drawn from."""
    rng = random.Random(f"{seed}, {epoch}")

    def demonstrations(example):
        drawn = rng.sample(pool, min(SHOTS + 1, len(pool)))  # one to spare
        return [shot for shot in drawn if shot.question != example.problem.question][:SHOTS]

    def total_length(pair):
        return len(encode_prompt(*pair, encode)) + len(pair[0].labels)

    batches = []
    for name, (_, in_context) in FORMATS.items():
        chosen = [example for example in examples if example.format == name]
        rng.shuffle(chosen)
        pairs = [(example, demonstrations(example) if in_context else []) for example in chosen]
        size = micro_batch_sizes[name]
        pairs = sort_in_windows(pairs, 64 * size, lambda pair: len(pair[0].labels))
        pairs = sort_in_windows(pairs, 8 * size, total_length)
        batches += [pairs[i : i + size] for i in range(0, len(pairs), size)]
    rng.shuffle(batches)
    return batches

def sort_in_windows(items, size, key):
    """Sort each run of `size` items by a key."""
    windows = [items[i : i + size] for i in range(0, len(items), size)]
    return [item for window in windows for item in sorted(window, key=key)]

def encode_prompt(example, demonstrations, encode):
    """Return the ids (S,) of an example's input, put together from parts that encode() has cached.
    This is safe because T5 pieces never span a space."""
    cot, _ = FORMATS[example.format]
    parts = [encode(math_demonstration(shot, cot))[:-1] for shot in demonstrations]  # no </s>
    return np.concatenate([*parts, encode(math_prompt(example.problem.question, cot))])

def collate(pairs, encode, device):
    """Turn [(example, demonstrations)] of one format into a dict of tensors.

    input_ids (B, S); labels, decoder_input_ids, loss_mask (B, T); with the teacher's distributions
    also teacher_ids and teacher_probs (B, T, K)."""
    input_ids = pad_sequences([encode_prompt(*pair, encode) for pair in pairs])
    labels = pad_sequences([example.labels for example, _ in pairs])
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "decoder_input_ids": F.pad(labels, (1, -1), value=PAD),  # shifted right, from PAD on
        "loss_mask": labels != PAD,
    }
    sizes = [ex.teacher_ids.shape[1] for ex, _ in pairs if ex.teacher_ids is not None]
    if sizes:
        ids = torch.zeros(*labels.shape, max(sizes), dtype=torch.long)
        probs = torch.zeros(*labels.shape, max(sizes))
        ids[..., 0] = labels  # one-hot, for examples without distributions
        probs[..., 0] = batch["loss_mask"].float()
        for b, (example, _) in enumerate(pairs):
            if example.teacher_ids is not None:
                ids[b, : len(example.labels)] = torch.from_numpy(example.teacher_ids)
                probs[b, : len(example.labels)] = torch.from_numpy(example.teacher_probs)
        batch |= {"teacher_ids": ids, "teacher_probs": probs}
    return {name: tensor.to(device) for name, tensor in batch.items()}

# --- losses ---

def kl_loss(logits, ids, probs, mask):
    """Distribution matching: the mean over tokens of KL(p || q) = sum_i p_i (log p_i - log q_i).

    logits (B, T, V) give the student's q. ids, probs (B, T, K): the teacher's most probable tokens,
    unused slots with probability 0. mask (B, T): True for tokens that count. All other p_i count as
    0, so K entries of q suffice, and no (B, T, V) tensor of the teacher is built. If the K
    probabilities sum to m < 1, the minimum is m log m rather than 0 (at q_i = p_i / m)."""
    return SparseKL.apply(logits, ids.long(), probs, mask / mask.sum())

def nll_loss(logits, targets, mask):
    """Sample matching: the mean over tokens of -log q(target), the KL to a one-hot teacher.
    logits (B, T, V), targets (B, T), mask (B, T)."""
    targets = targets.unsqueeze(-1)
    return kl_loss(logits, targets, torch.ones_like(targets, dtype=torch.float32), mask)

class SparseKL(torch.autograd.Function):
    """sum over tokens of weight * KL(p || q), with p on K entries and q = softmax(z), in fp32.

    With m = sum_i p_i, the gradient is dKL/dz_v = m q_v - p_v. With this written by hand, the peak
    is one fp32 tensor of z's shape, where autograd needs three: q is overwritten to become the
    gradient. Therefore backward can run only once."""

    @staticmethod
    def forward(ctx, z, ids, p, weight):
        q = z.softmax(-1, dtype=torch.float32)  # (B, T, V)
        ctx.save_for_backward(q, ids, p, weight)
        ctx.dtype = z.dtype
        # log q_i = z_i - max z + log max q, because q_i itself can underflow.
        highest = z.amax(-1, keepdim=True).float()  # (B, T, 1)
        log_q = z.gather(-1, ids).float() - highest + q.amax(-1, keepdim=True).log()  # (B, T, K)
        kl = torch.xlogy(p, p) - p * log_q.masked_fill(p == 0, 0.0)  # 0 in unused slots
        return (kl.sum(-1) * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        q, ids, p, weight = ctx.saved_tensors
        p = p * (weight * gradient).unsqueeze(-1)  # the chain rule
        grad = q.mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, ids, -p)  # m q_v - p_v
        return grad.to(ctx.dtype), None, None, None

# The losses for chains of thought, by the names of --loss: (logits, batch) -> scalar.
LOSSES = {
    "kl": lambda logits, batch: kl_loss(
        logits, batch["teacher_ids"], batch["teacher_probs"], batch["loss_mask"]),
    "nll": lambda logits, batch: nll_loss(logits, batch["labels"], batch["loss_mask"]),
}

def batch_loss(model, batch, loss):
    """Return the loss of a micro-batch; without the teacher's distributions it is likelihood."""
    logits = model(batch["input_ids"], batch["input_ids"] != PAD, batch["decoder_input_ids"])
    return LOSSES[loss if "teacher_ids" in batch else "nll"](logits, batch)

# --- the loop ---

def get_lr(step, steps, peak, warmup, schedule="cosine"):
    """Return the learning rate of step 0, 1, .. steps - 1: half a cosine towards 0, or constant,
    times a linear warm-up."""
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
    return peak * decay * min(1.0, (step + 1) / max(1, warmup))

def steps_per_epoch(examples, sizes, accumulation):
    """Count an epoch's optimizer steps; each micro-batch holds examples of one format."""
    per_format = collections.Counter(example.format for example in examples)
    micro_batches = sum(math.ceil(n / sizes[name]) for name, n in per_format.items())
    return math.ceil(micro_batches / accumulation)

def train(model, tokenizer, examples, pool, args, run, measure=None):
    """Train a model, save and evaluate checkpoints, and return the best one's log entry.

    pool: the problems that demonstrations are drawn from (GSM8K's training set).
    run: the folder of log and checkpoints; args.resume continues from the last, bit for bit.
    measure: a function in place of validate, whose result contains at least what validate's does.
    Raises UserError if a loss or gradient is not finite, KeyboardInterrupt after Ctrl-C."""
    encode = functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))
    sizes = dict(zip(FORMATS, args.micro_batch_size))
    per_epoch = steps_per_epoch(examples, sizes, args.gradient_accumulation_steps)
    steps = min(per_epoch * args.epochs, args.steps or math.inf)

    optimizer = make_optimizer(model.parameters(), args.optimizer, args.weight_decay)
    model.encoder.gradient_checkpointing = args.gradient_checkpointing
    model.decoder.gradient_checkpointing = args.gradient_checkpointing
    start = load_checkpoint(run, model, optimizer) if args.resume else 0
    step = start
    log = TrainingLog(run / "log.jsonl", start, steps, args)
    with stop_after_step() as stop:
        while True:
            # Evaluate the start, or the checkpoint that the last pass saved.
            due = step % args.checkpoint_every == 0 or step == steps
            if due and step not in log.evaluations and not stop.is_set():
                log.add_evaluation({"step": step} | (measure or validate)(model, tokenizer, args))
            if stop.is_set():
                raise KeyboardInterrupt
            if step == steps:
                return best_checkpoint(log.evaluations)

            # Draw the batches of the next optimizer step; each epoch is shuffled again.
            epoch, position = divmod(step, per_epoch)
            if position == 0 or step == start:  # a new epoch, or resumed within one
                batches = make_batches(examples, pool, encode, sizes, args.seed, epoch)
            n = args.gradient_accumulation_steps
            micro_batches = batches[position * n : (position + 1) * n]
            model.train()
            lr = get_lr(step, steps, args.learning_rate, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward and backward passes; the gradients of the micro-batches add up.
            losses = []
            for pairs in micro_batches:
                batch = collate(pairs, encode, args.device)
                with mixed_precision(args):
                    loss = batch_loss(model, batch, args.loss)
                (loss / len(micro_batches)).backward()
                losses.append(loss.detach())
                log.add_micro_batch(batch, losses[-1])

            # Clip the gradients, update the weights, and save.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            check_finite(torch.stack(losses), norm, micro_batches, step + 1, run)
            optimizer_step(optimizer)
            optimizer.zero_grad()
            step += 1
            log.add_step(step, lr)
            if stop.is_set() or step % args.checkpoint_every == 0 or step == steps:
                save_checkpoint(run, step, model, optimizer, tokenizer)
                best = best_checkpoint(log.evaluations)
                if not args.keep_checkpoints:
                    prune_checkpoints(run, keep=[step, best["step"] if best else step])

# --- model selection ---

def validate(model, tokenizer, args):
    """Evaluate a checkpoint: {"validation": {math set: [accuracy, stderr]}} by zero-shot chain of
    thought, and with --bbh-limit also {"bbh": {"CoT": the same, "answer-only": the same}}."""

    def accuracy(task, cot, split, limit):
        e = evaluate_with(args, model, tokenizer, task, cot, split, limit)
        return [round(e.accuracy, 5), round(e.stderr, 5)]

    result = {"validation": {
        task: accuracy(task, True, "validation", args.validation_limit)
        for task, dataset in DATASETS.items() if dataset.validate}}
    if args.bbh_limit:
        result["bbh"] = {"CoT": accuracy("bbh", True, "test", args.bbh_limit),
                         "answer-only": accuracy("bbh", False, "test", args.bbh_limit)}
    return result

def ood_accuracy(entry):
    """Return the mean accuracy on the out-of-distribution sets, by which a checkpoint is selected
    (paper: The process of specialization and generalization)."""
    chosen = [task for task, dataset in DATASETS.items() if dataset.validate and dataset.select]
    return sum(entry["validation"][task][0] for task in chosen) / len(chosen)

def best_checkpoint(evaluations):
    """Return the log entry of the best checkpoint, the start aside; ties go to the latest step."""
    trained = [entry for entry in evaluations.values() if entry["step"] > 0]
    return max(trained, key=lambda entry: (ood_accuracy(entry), entry["step"]), default=None)

# --- from here on, what makes runs safe and convenient: reading teacher records ---

# Bytes per line, characters per text and tokens per solution: far more than real ones have.
MAX_LINE, MAX_TEXT, MAX_TOKENS = 2**24, 2**15, 2**12
ROUNDING = 0.001  # reported probabilities may exceed their limits by this much

def read_teacher(path):
    """Yield the Records of a .jsonl or .jsonl.gz file, one solution per line (see data/README.md).

    Raises UserError naming file and line."""
    path, number = Path(path), 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                yield parse_record(json.loads(line.decode("utf-8")), f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        fault = getattr(error, "strerror", None) or error
        raise UserError(f"{path}, after line {number}: {fault}; is the file complete?") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        fault = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}, line {number}: not a teacher record ({fault}); fix the line or "
                        "delete it (data/README.md describes the format)") from None
    if not number:
        raise UserError(f"{path}: no teacher record; write some with data/sample_teacher.py")

def parse_record(record, source):
    """Check one line of a teacher file; return it as a Record. Raises KeyError, TypeError,
    ValueError or AttributeError."""
    check_type(record, dict, "a record")
    answer = str(check_type(record["answer"], (str, int, float), "answer"))
    question, solution = record["question"], record["solution"]
    for name, text in (("question", question), ("solution", solution)):
        if len(check_type(text, str, name)) > MAX_TEXT:
            raise ValueError(f"{name} has {len(text):,} characters, more than {MAX_TEXT:,}")
    steps = None
    if record.get("top_logprobs"):
        tokens = check_type(record["tokens"], list, "tokens")
        tops = check_type(record["top_logprobs"], list, "top_logprobs")
        if len(tokens) != len(tops) or len(tokens) > MAX_TOKENS:
            raise ValueError(f"{len(tokens):,} tokens but {len(tops):,} top_logprobs, or too many")
        steps = [(check_type(token, str, "a token"), parse_distribution(token, top or {}))
                 for token, top in zip(tokens, tops)]
        is_split = any(BYTES.fullmatch(text) or "\ufffd" in text for text in [*tokens, solution])
        if not is_split and visible_text("".join(tokens)) != visible_text(solution):
            raise ValueError("the tokens do not spell the solution")
        visible = [i for i, token in enumerate(tokens) if token.strip()]
        steps = steps[visible[0] : visible[-1] + 1] if visible else None
    gold = parse_gold_answer(answer.rpartition("####")[2])
    return Record(Problem(question, gold, solution.strip()), steps, source)

def visible_text(text):
    """Return a text without whitespace, in the Unicode form that T5 uses."""
    return "".join(unicodedata.normalize("NFKC", text.replace(WORD_BOUNDARY, " ")).split())

def parse_distribution(token, top):
    """Turn {candidate: log-probability} into {candidate: probability}; check that they are."""
    for candidate, logprob in check_type(top, dict, "an entry of top_logprobs").items():
        if not check_type(logprob, (float, int), "a log-probability") <= ROUNDING:
            raise ValueError(f"at {token!r}, {candidate!r} has the log-probability {logprob}")
    probabilities = {candidate: math.exp(logprob) for candidate, logprob in top.items()}
    if (total := sum(probabilities.values())) > 1 + 10 * ROUNDING:
        raise ValueError(f"at {token!r} the probabilities sum to {total:.4f}")
    return probabilities

def check_type(value, kinds, name):
    """Return the value if it is of one of the types; otherwise raise TypeError."""
    if type(value) is bool or not isinstance(value, kinds):
        raise TypeError(f"{name} is {value!r:.50}, a {type(value).__name__}")
    return value

def check_finite(losses, norm, micro_batches, step, run):
    """Raise UserError, naming the records, if a loss or the gradient norm is NaN or infinite."""
    if losses.isfinite().all() and norm.isfinite():
        return
    bad = [pairs for loss, pairs in zip(losses, micro_batches) if not loss.isfinite()]
    sources = sorted({example.source for pairs in bad or micro_batches for example, _ in pairs})
    raise UserError(
        f"step {step}: the {'loss' if bad else 'gradient'} is not finite. Batch: "
        f"{'; '.join(sources)}. Last good checkpoint: {last_checkpoint(run)}. Resuming would hit "
        "the same batch: remove these records, or restart with a lower --learning-rate or with "
        "--precision fp32")

# --- optimizer and precision ---

def mixed_precision(args):
    """Context manager: with --precision bf16, run matrix products in bf16; weights stay fp32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")

def weights_dtype(args):
    """Return the dtype of weights and gradients."""
    return torch.bfloat16 if args.precision == "bf16-weights" else torch.float32

def make_optimizer(parameters, name, weight_decay):
    """Return AdamW, the paper's, or Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235), which
    keeps only row and column means of the second moments. Adafactor's learning rate is relative to
    the root mean square of each matrix."""
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)

@torch.no_grad()
def optimizer_step(optimizer):
    """Update the weights; bf16 weights are updated in fp32, one parameter at a time.

    bf16 has 8 significant bits, so rounding to nearest would drop every change below 0.2% of a
    weight, which is most of them. With stochastic rounding small changes add up."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if parameters[0].dtype == torch.float32:
        return optimizer.step()
    gradients = [p.grad for p in parameters]
    optimizer.zero_grad()  # the optimizer skips parameters without a gradient
    for p, gradient in zip(parameters, gradients):
        if gradient is not None:
            weight = p.data
            p.data, p.grad = weight.float(), gradient.float()
            optimizer.step()
            weight.copy_(stochastic_round(p.data))
            p.data, p.grad = weight, None

def stochastic_round(x):
    """Round fp32 to bf16: keep the upper 16 bits, up with probability (lower 16 bits) / 2**16."""
    bits = x.view(torch.int32)
    bits = (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).bfloat16()

# --- a run's folder: arguments, log, checkpoints ---

def find_run(args):
    """Return the run's folder; with --resume, an existing one with the same arguments."""
    name = args.name or args.size
    folders = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    existing = list(itertools.takewhile(lambda run: (run / "arguments.json").exists(), folders))
    if args.name or not existing:
        run = Path("runs") / name
    else:  # NAME, NAME-2, ..: continue the latest, or start the next
        run = existing[-1] if args.resume else Path(f"runs/{name}-{len(existing) + 1}")
    path = run / "arguments.json"
    if not args.resume:
        if path.exists():
            raise UserError(f"{run} exists; continue it with --resume, or choose another --name")
        return run
    if not path.exists():
        raise UserError(f"{run}: no run to resume; choose one with --name")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not an object ({error}); start with another --name") from None
    may_differ = ("log_every", "test_limit", "skip_bbh")
    differing = [f"--{key.replace('_', '-')} {before.get(key)}"
                 for key, value in recorded(args).items()
                 if before.get(key) != value and key not in may_differ]
    if differing:
        raise UserError(f"{run} started with other arguments; use {', '.join(differing)}")
    return run

def recorded(args):
    """Return the arguments as arguments.json holds them."""
    kept = {key: value for key, value in vars(args).items() if key not in ("resume", "name")}
    return json.loads(json.dumps(kept, default=str))

@contextlib.contextmanager
def lock(run):
    """Context manager: lock a run's folder, until its end or the process's. Raises UserError if
    another process holds the lock."""
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"{run}: another process is running it; wait, or choose another "
                        "--name") from None
    except OSError as error:  # some network file systems have no locks
        print(f"{run} cannot be locked ({error.strerror}): do not start it twice")
    try:
        yield
    finally:
        os.close(folder)

def atomic_write(path, text):
    """Write a text file so that it is never half-written."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    fsync(unfinished)
    os.replace(unfinished, path)

def fsync(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do this for folders
            raise
    finally:
        os.close(descriptor)

class TrainingLog:
    """Report progress on the screen and in log.jsonl.

    evaluations: {step: log entry with "validation"}."""

    def __init__(self, path, start, steps, args):
        self.path, self.start, self.steps, self.args = path, start, steps, args
        self.seconds, self.tokens, self.losses, self.since = 0.0, 0, {}, time.time()
        # Steps after the last checkpoint are repeated, so drop their entries.
        entries = [e for e in (read_log(path) if path.exists() else ()) if e["step"] <= start]
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self.evaluations = {entry["step"]: entry for entry in entries if "validation" in entry}
        for entry in self.evaluations.values():
            for task, dataset in DATASETS.items():
                if dataset.validate and task not in entry["validation"]:
                    raise UserError(f"{path}: step {entry['step']} has no accuracy on {task}, "
                                    "which was added later; start another run with --name")

    def add_micro_batch(self, batch, loss):
        """Count a micro-batch."""
        name = self.args.loss if "teacher_ids" in batch else "nll"
        self.losses.setdefault(name, []).append(loss)
        self.tokens += batch["input_ids"].numel() + batch["labels"].numel()  # with padding

    def add_step(self, step, lr):
        """Report an optimizer step if it is due."""
        now = time.time()
        self.seconds, self.since = self.seconds + now - self.since, now
        if step % self.args.log_every and step != self.steps:
            return
        means = {name: torch.stack(x).mean().item() for name, x in sorted(self.losses.items())}
        self.losses = {}
        speed = round(self.tokens / self.seconds)
        minutes = self.seconds / (step - self.start) * (self.steps - step) / 60
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(f"step {step}/{self.steps}  {losses}  lr {lr:.2e}  {speed:,} tokens/s  "
              f"{minutes:.1f} min left", flush=True)
        self.write({"step": step, "learning_rate": lr, "tokens_per_second": speed, **means})

    def add_evaluation(self, entry):
        """Report the evaluation of a checkpoint; its time does not count as training."""
        self.evaluations[entry["step"]] = entry
        self.write(entry)
        self.since = time.time()
        best = best_checkpoint(self.evaluations)
        best = f"; best so far: step {best['step']}" if best else ""
        print(f"  validation: {format_metrics(entry, self.args.data)}{best}", flush=True)

    def write(self, entry):
        """Append a line to the log."""
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

def format_metrics(entry, data):
    """Format the validation accuracies of a log entry."""
    sets = [f"{display_name(task, data)} {100 * accuracy:.1f}"
            for task, (accuracy, _) in entry["validation"].items()]
    sets.append(f"out-of-distribution mean {100 * ood_accuracy(entry):.1f}")
    sets += [f"{display_name('bbh', data, prompting == 'CoT')} {100 * accuracy:.1f}"
             for prompting, (accuracy, _) in entry.get("bbh", {}).items()]
    return "  ".join(sets)

@contextlib.contextmanager
def stop_after_step():
    """Context manager: yield an event that the first Ctrl-C (or SIGTERM) sets; a second one stops
    at once."""
    stop = threading.Event()

    def handle(*_):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        os.write(2, b"\nfinishing and saving this step; press Ctrl-C again to stop at once\n")

    before = {kind: signal.signal(kind, handle) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

def checkpoints(run):
    """Return a run's checkpoint folders, oldest first. Each is complete: it is renamed last."""
    names = [re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in run.glob("*")]
    return [run / f"checkpoint-{step}" for step in sorted(int(name[1]) for name in names if name)]

def last_checkpoint(run):
    """Return the path of the last checkpoint, for messages."""
    return str((checkpoints(run) or ["none yet"])[-1])

def save_checkpoint(run, step, model, optimizer, tokenizer):
    """Write checkpoint-STEP: a Hugging Face folder, and training.pt with the optimizer's state and
    the random state. Raises UserError if the disk is full."""
    folder, unfinished = run / f"checkpoint-{step}", run / "unfinished-checkpoint"
    shutil.rmtree(unfinished, ignore_errors=True)
    parameters = list(model.parameters())
    state = {"step": step, "optimizer": [optimizer.state[parameter] for parameter in parameters],
             "random": random_module(parameters[0].device.type).get_rng_state()}
    try:
        model.save_pretrained(unfinished)
        tokenizer.save(unfinished)
        with open(unfinished / "training.pt", "wb") as file:
            torch.save(state, file)
        for path in (*unfinished.iterdir(), unfinished):
            fsync(path)
        os.replace(unfinished, folder)
        fsync(run)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}). The last good checkpoint is "
                        f"{last_checkpoint(run)}; free some space, then --resume") from None

def prune_checkpoints(run, keep):
    """Delete all checkpoints except the steps to keep. Each is renamed first, so that a
    half-deleted one cannot be mistaken for a complete one."""
    for folder in checkpoints(run):
        if folder not in [run / f"checkpoint-{step}" for step in keep]:
            shutil.rmtree(run / "unfinished-checkpoint", ignore_errors=True)
            os.replace(folder, run / "unfinished-checkpoint")
            shutil.rmtree(run / "unfinished-checkpoint")

def load_checkpoint(run, model, optimizer):
    """Load the last checkpoint into model, optimizer and random state; return its step, or 0."""
    if not checkpoints(run):
        return 0
    folder = checkpoints(run)[-1]
    remedy = f"delete {folder}, then --resume continues from the checkpoint before it"
    try:
        weights = T5.from_pretrained(folder, dtype=model.shared.weight.dtype).hf_tensors()
        state = torch.load(folder / "training.pt", weights_only=True)
        for parameter, saved in zip(model.parameters(), state["optimizer"], strict=True):
            optimizer.state[parameter] = saved
        random_module(model.shared.weight.device.type).set_rng_state(state["random"])
        for name, tensor in model.hf_tensors().items():
            tensor.copy_(weights[name])
    except (MemoryError, PermissionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load raises many kinds, none of them documented
        fault = error if isinstance(error, UserError) else f"{folder}/training.pt: {error!r:.200}"
        raise UserError(f"{fault}; {remedy}") from None
    print(f"resuming from {folder}")
    return state["step"]

def random_module(device):
    """Return the module with the random state of a device: dropout's."""
    return {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}[device]

# --- the command ---

# The authors' settings per size: examples per micro-batch in the order of FORMATS, micro-batches
# per optimizer step, and optimizer steps between checkpoints. They give none for small, which uses
# base's. "toy" is this project's own; xxl's optimizer and precision are chosen for one 80 GB GPU.
SIZES = {
    "toy": dict(model=TOY / "tuned-1M", data=TOY, teacher=TOY / "teacher.jsonl.gz",
                micro_batch_size=(8, 8, 32, 32), gradient_accumulation_steps=1, epochs=1, steps=800,
                learning_rate=7e-4, checkpoint_every=100, validation_limit=60, bbh_limit=25,
                max_new_tokens=64, device="cpu", threads=2),
    "small": dict(model="google/flan-t5-small", micro_batch_size=(25, 35, 40, 60),
                  gradient_accumulation_steps=3, checkpoint_every=333),
    "base": dict(model="google/flan-t5-base", micro_batch_size=(25, 35, 40, 60),
                 gradient_accumulation_steps=3, checkpoint_every=333),
    "large": dict(model="google/flan-t5-large", micro_batch_size=(8, 12, 18, 30),
                  gradient_accumulation_steps=20, checkpoint_every=150),
    "xl": dict(model="google/flan-t5-xl", micro_batch_size=(2, 10, 8, 20),
               gradient_accumulation_steps=30, checkpoint_every=333),
    "xxl": dict(model="google/flan-t5-xxl", micro_batch_size=(2, 10, 8, 20),
                gradient_accumulation_steps=20, checkpoint_every=150, optimizer="adafactor",
                precision="bf16-weights", gradient_checkpointing=True),
}
DEFAULTS = dict(data=DEFAULT_DATA, bbh_limit=0, epochs=10, learning_rate=5e-4, max_new_tokens=256,
                optimizer="adamw", gradient_checkpointing=False, device=best_device(),
                threads=torch.get_num_threads())

def parse_arguments(arguments=None):
    """Parse the command line; unset options default to the settings of --size."""
    parser = argparse.ArgumentParser(
        description="Specialize a T5 towards multi-step math with a teacher's solutions.",
        epilog="Without arguments: the toy world in data/toy, on the CPU. Defaults are those of "
               "--size unless stated.")
    add, positive = parser.add_argument, in_range(int, above=0)
    add("--size", choices=SIZES, default="toy", help="the paper's settings for this FlanT5")
    add("--model", help="folder or hub name, in place of the size's")
    add("--teacher", type=Path, help="teacher records (default: GSM8K's solutions; toy: its own)")
    add("--data", type=Path, help="folder of the problem sets; missing ones are downloaded")
    add("--name", help="name of the run's folder in runs/ (default: the size)")
    add("--resume", action="store_true", help="continue the run with the same arguments")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="data formats to mix")
    add("--loss", choices=LOSSES, default="kl", help="loss for chains of thought (default: kl)")
    add("--epochs", type=positive, help="passes over the examples (default: 10; toy: 1)")
    add("--steps", type=positive, help="maximum of optimizer steps (default: none; toy: 800)")
    add("--optimizer", choices=["adamw", "adafactor"], help="default: adamw; xxl: adafactor")
    add("--learning-rate", type=in_range(float, above=0), help="peak (default: 5e-4; toy: 7e-4)")
    add("--micro-batch-size", type=positive, nargs=4, metavar="N", help="examples in each format")
    add("--gradient-accumulation-steps", type=positive, help="micro-batches per optimizer step")
    add("--schedule", choices=["cosine", "constant"], default="cosine", help="of the learning rate "
        "(default: cosine, to 0)")
    add("--warmup", type=in_range(int), default=10, help="warm-up steps (default: 10)")
    add("--weight-decay", type=in_range(float), default=0.01, help="default: 0.01")
    add("--max-grad-norm", type=in_range(float, above=0), default=1.0, help="default: 1")
    add("--dropout", type=in_range(float, below=1), help="dropout rate (default: the checkpoint's)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="less memory for a third more time (default: xxl only)")
    add("--checkpoint-every", type=positive, help="optimizer steps between evaluated checkpoints")
    add("--keep-checkpoints", action="store_true", help="keep all checkpoints, not only the best "
        "and the last")
    add("--validation-limit", type=positive, help="problems per set at a checkpoint (default: all; "
        "toy: 60)")
    add("--bbh-limit", type=in_range(int), help="problems per BBH task at a checkpoint (default: "
        "none; toy: 25)")
    add("--test-limit", type=positive, help="problems per task in the last table (default: all)")
    add("--shots", type=int, choices=[SHOTS], help="evaluate math also with 4 demonstrations in "
        "the last table")
    add("--skip-bbh", action="store_true", help="leave BIG-Bench Hard out of the last table")
    add("--eval-batch-size", type=positive, default=64, help="problems per batch (default: 64)")
    add("--max-new-tokens", type=positive, help="longest output (default: 256; toy: 64)")
    add("--log-every", type=positive, default=10, help="steps between progress lines (default: 10)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: the fastest one; toy: cpu")
    add("--threads", type=positive, help="number of CPU threads (default: all; toy: 2)")
    add("--precision", choices=["fp32", "bf16", "bf16-weights"], help="bf16: matrix products "
        "(default on CUDA); bf16-weights: weights and gradients, half the memory (default: xxl)")
    args = parser.parse_args(arguments)
    args.formats = list(dict.fromkeys(args.formats))
    for key, value in (DEFAULTS | SIZES[args.size]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.device not in ("cpu", best_device()):
        raise UserError(f"--device {args.device}: PyTorch finds none here; use {best_device()}")
    if args.precision is None:
        has_bf16 = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if has_bf16 else "fp32"
    if args.gradient_checkpointing and args.device == "mps" and args.dropout != 0:
        raise UserError("on MPS PyTorch recomputes with other dropout masks; add --dropout 0")
    return args

def make_deterministic(seed):
    """Make the same seed give the same weights on the same device. On CUDA, only as far as PyTorch
    offers deterministic kernels; it warns about the rest."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and only finds bugs

def teacher_records(args, pool):
    """Return the teacher's records, or GSM8K's own solutions without distributions."""
    if args.teacher:
        return read_teacher(args.teacher)
    print("no --teacher: training by likelihood on GSM8K's own solutions")
    stated = [replace(problem, solution=math_target(problem, cot=True)) for problem in pool]
    return [Record(problem, None, f"GSM8K, line {n}") for n, problem in enumerate(stated, 1)]

def evaluate_with(args, model, tokenizer, task, cot, split, limit, shots=0, file=None):
    """Evaluate a task by the run's settings; a PredictionFile keeps the outputs."""
    with mixed_precision(args):
        return evaluate_task(model, tokenizer, task, cot, split, args.data, limit,
                             load_demonstrations(shots, args.data), file=file,
                             batch_size=args.eval_batch_size, max_new_tokens=args.max_new_tokens)

def specialize(args, run):
    """Train, select a checkpoint, and report what was gained and lost."""
    torch.set_num_threads(args.threads)
    make_deterministic(args.seed)
    options = {"device": args.device, "dtype": weights_dtype(args)}
    model, tokenizer = load_pretrained(args.model, dropout_rate=args.dropout, **options)
    pool = load("gsm8k", "train", args.data)
    tests = [(task, True, 0) for task in DATASETS]  # (task, chain of thought, demonstrations)
    tests += [(task, True, args.shots) for task in DATASETS if args.shots]
    tests += [] if args.skip_bbh else [("bbh", True, 0), ("bbh", False, 0)]
    for task in [*DATASETS, *([] if args.skip_bbh else bbh_tasks(args.data))]:
        load(task, "test", args.data)  # download and check all problem sets before training
        if task not in DATASETS:
            bbh_prompt(task, "", True, args.data)
    records = teacher_records(args, pool)
    examples, summary = build_examples(records, tokenizer, args.formats, args.loss)
    print(f"{summary}. Run: {run}", flush=True)
    atomic_write(run / "arguments.json", json.dumps(recorded(args), indent=2) + "\n")
    best = train(model, tokenizer, examples, pool, args, run)

    model = T5.from_pretrained(run / f"checkpoint-{best['step']}", dtype=weights_dtype(args))
    model.save_pretrained(run / "model")
    tokenizer.save(run / "model")
    names = [display_name(task, args.data, cot) + f", {shots} shots" * bool(shots)
             for task, cot, shots in tests]
    results = {}
    for name, folder in (("base", args.model), ("specialized", run / "model")):
        model = T5.from_pretrained(folder, **options)
        file = PredictionFile(run / "predictions.jsonl", name, weights=weights_hash(model),
                              precision=args.precision, max_new_tokens=args.max_new_tokens)
        results[name] = [evaluate_with(args, model, tokenizer, task, cot, "test", args.test_limit,
                                       shots, file) for task, cot, shots in tests]
    rows = [(name, entries) for name, *entries in zip(names, *results.values())]
    print(f"\n{table(list(results), rows)}\n\nSelected: step {best['step']}, the best on the "
          f"out-of-distribution validation sets: {format_metrics(best, args.data)}")
    base, specialized = (entries[0].predictions[0] for entries in results.values())
    print(f"\n{base['prompt']}\n  gold:         {number_text(base['answer'])}\n"
          f"  base:         {base['output']}\n  specialized:  {specialized['output']}\n\n"
          f"The model is in {run / 'model'}")
    accuracies = {name: {column: [e.accuracy, e.stderr, len(e.predictions)]
                         for column, e in zip(names, entries)} for name, entries in results.items()}
    text = json.dumps({"selected": best, "test": accuracies}, indent=2) + "\n"
    atomic_write(run / "results.json", text)

def main():
    """Specialize; if the run is interrupted, print how to resume it."""
    args = parse_arguments()
    run = find_run(args)
    try:
        with lock(run):
            specialize(args, run)
    except KeyboardInterrupt:
        words = [word for word in sys.argv if word != "--resume"]
        words += [] if args.name else ["--name", run.name]
        how = f"Continue with: {shlex.join([sys.executable, *words, '--resume'])}"
        if not (run / "arguments.json").exists():
            how = "Nothing was saved yet; start again."
        print(f"\nstopped. The last checkpoint: {last_checkpoint(run)}. {how}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory ({str(error).partition('. ')[0]}); use a smaller "
                        "--micro-batch-size or --gradient-checkpointing") from None

if __name__ == "__main__":
    run_command(main)
