"""Specialize a small language model towards multi-step reasoning (Fu et al., ICML 2023).

Data flow in one direction: teacher record -> alignment -> training example -> batch -> loss ->
checkpoint -> accuracy. The method comes first, in this order. What follows from "reading teacher
records" on makes runs safe and convenient; specialize(), near the end, calls everything. The model
is in t5.py, the alignment in align.py, problems and accuracies in eval.py.

    python specialize.py                                        a toy world, minutes on a CPU
    python specialize.py --size base --teacher teacher.jsonl.gz            FlanT5 on one GPU
    python specialize.py --name base --resume                              continue a run

Letters: B batch, S source length, T target length, V vocabulary, K teacher candidates per token.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
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
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

from t5 import EOS, PAD, T5, UNK, Tokenizer, UserError, best_device, count_parameters, free_memory
from t5 import in_range, is_out_of_memory, load_pretrained, names_file, pad_sequences, read_config
from t5 import run_command
from align import BYTES, WORD_BOUNDARY, transfer
from eval import DATASETS, DEFAULT_DATA, TOY, PredictionFile, Problem, bbh_prompt, bbh_tasks
from eval import display_name, evaluate, evaluate_task, exact_match, load, load_demonstrations
from eval import math_demonstration, math_prompt, math_target, number_text, parse_gold_answer
from eval import problems_and_prompts, read_log, table, weights_hash

import numpy as np
import torch  # after t5, which sets how OpenMP's threads wait
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """A training example.

    input_ids (S,): the ids of the input. For in-context formats it is without demonstrations;
    make_batches() draws new ones in each epoch.
    labels (T,): the ids of the target, ending in </s>.
    teacher_ids, teacher_probs (T, K): the teacher's distributions, or None for likelihood."""

    format: str
    problem: Problem
    input_ids: np.ndarray
    labels: np.ndarray
    teacher_ids: np.ndarray | None
    teacher_probs: np.ndarray | None
    source: str

def build_examples(records, tokenizer, formats, loss="kl", k=5, limit=None):
    """Turn the records with right answers into examples; also return a one-line summary.

    Chain-of-thought formats yield one example per solution, with the teacher's distributions if it
    reported any, unless loss is "nll". Answer-only formats yield one example per question.
    limit: the most solutions of a question to use."""
    vocab = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    encode = cached_encoder(tokenizer)
    cot_formats = [name for name in formats if FORMATS[name][0]]
    examples, used, count = [], collections.defaultdict(list), collections.Counter()
    for record in records:
        count["read"] += 1
        if not exact_match(record.problem.solution, record.problem.answer):  # the last numbers
            last_wrong = record
            continue
        count["right"] += 1
        if len(used[record.problem.question]) == limit:
            continue
        used[record.problem.question].append(replace(record, steps=None))  # steps take gigabytes
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
            ids = np.vstack([ids, np.int32([[EOS] + [PAD] * (k - 1)])])
            probs = np.vstack([probs, np.eye(1, k, dtype=np.float32)])  # [[1, 0, ..]]
            count["tokens"] += len(labels)
            count["several"] += int((probs[:, 1:] > 0).any(axis=1).sum())
        examples += [Example(name, record.problem, encode_prompt(name, record.problem, [], encode),
                             labels, ids, probs, record.source) for name in cot_formats]
    if not count["right"]:
        last = ""
        if count["read"]:
            last = f"; {last_wrong.source} does not end in {last_wrong.problem.answer}"
        raise UserError(f"none of {count['read']:,} teacher solutions ends in its gold answer"
                        f"{last}; choose another --teacher")
    for record, *_ in used.values():
        labels = np.array(tokenizer.encode(math_target(record.problem, cot=False)), np.int32)
        examples += [Example(name, record.problem, encode_prompt(name, record.problem, [], encode),
                             labels, None, None, record.source)
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

def make_batches(examples, pool, tokenizer, micro_batch_sizes, seed, epoch):
    """Return an epoch's micro-batches in random order, each a list of Examples of one format.

    micro_batch_sizes: the examples in a micro-batch of each of FORMATS. To limit padding, the
    shuffled examples are sorted by target length within windows of 64 micro-batches (targets cost
    most: their logits are (B, T, V)), then by total length within windows of 8.
    pool: GSM8K's training problems, which demonstrations are drawn from."""
    rng, encode = random.Random(f"{seed}, {epoch}"), cached_encoder(tokenizer)

    def draw_demonstrations(example):
        drawn = rng.sample(pool, min(SHOTS + 1, len(pool)))  # one to spare
        shots = [shot for shot in drawn if shot.question != example.problem.question][:SHOTS]
        input_ids = encode_prompt(example.format, example.problem, shots, encode)
        return replace(example, input_ids=input_ids)

    batches = []
    for (name, (_, in_context)), size in zip(FORMATS.items(), micro_batch_sizes):
        chosen = [example for example in examples if example.format == name]
        rng.shuffle(chosen)
        if in_context:
            chosen = [draw_demonstrations(example) for example in chosen]
        chosen = sort_in_windows(chosen, 64 * size, lambda ex: len(ex.labels))
        chosen = sort_in_windows(chosen, 8 * size, lambda ex: len(ex.input_ids) + len(ex.labels))
        batches += [chosen[i : i + size] for i in range(0, len(chosen), size)]
    rng.shuffle(batches)
    return batches

def encode_prompt(format, problem, demonstrations, encode):
    """Return the ids (S,) of a format's input, put together from parts that encode() has cached.
    This is safe because T5 pieces never span a space."""
    cot, _ = FORMATS[format]
    parts = [encode(math_demonstration(shot, cot))[:-1] for shot in demonstrations]  # no </s>
    return np.concatenate([*parts, encode(math_prompt(problem.question, cot))])

@functools.cache
def cached_encoder(tokenizer):
    """Return a function from a text to its ids, an array, that remembers its results."""
    return functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))

def sort_in_windows(items, size, key):
    """Sort each run of `size` items by a key."""
    windows = [items[i : i + size] for i in range(0, len(items), size)]
    return [item for window in windows for item in sorted(window, key=key)]

def split_into_passes(micro_batch, limit, costs):
    """Split a micro-batch, which is sorted by length, into passes of at most `limit` pass_size(). A
    micro-batch is a unit of the optimization, a pass one of memory: the examples whose activations
    exist at the same time. Without a limit, all of it is one pass."""
    passes = [[]]
    for example in micro_batch:
        if limit and passes[-1] and pass_size([*passes[-1], example], costs) > limit:
            passes.append([])
        passes[-1].append(example)
    return passes

def pass_size(examples, costs):
    """Return the memory that a pass takes, padding included, in units of one source token: rows
    times costs . (S, T, S^2, T^2, ST). measure_passes() measures costs; before, they are
    (1, 1, 0, 0, 0), and the size is the number of tokens."""
    S = max(len(example.input_ids) for example in examples)
    T = max(len(example.labels) for example in examples)
    return len(examples) * float(np.dot(costs, pass_features(S, T)))

def pass_features(S, T):
    """Return what the memory of a pass grows with: tokens, and pairs of tokens in attention."""
    return S, T, S * S, T * T, S * T

def collate(examples, device):
    """Turn Examples of one format into a dict of tensors.

    input_ids (B, S); labels, decoder_input_ids, loss_mask (B, T); with the teacher's distributions
    also teacher_ids and teacher_probs (B, T, K)."""
    labels = pad_sequences([example.labels for example in examples])
    batch = {
        "input_ids": pad_sequences([example.input_ids for example in examples]),
        "labels": labels,
        "decoder_input_ids": F.pad(labels, (1, -1), value=PAD),  # shifted right, from PAD on
        "loss_mask": labels != PAD,
    }
    sizes = [ex.teacher_ids.shape[1] for ex in examples if ex.teacher_ids is not None]
    if sizes:
        ids = torch.zeros(*labels.shape, max(sizes), dtype=torch.long)
        probs = torch.zeros(*labels.shape, max(sizes))
        ids[..., 0] = labels  # one-hot, for examples without distributions
        probs[..., 0] = batch["loss_mask"].float()
        for b, example in enumerate(examples):
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
        # log q_i = z_i - logsumexp z, which is max z - log max q; q_i itself can underflow.
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

# The losses for chains of thought, by the names of --loss: (logits, batch) -> scalar. With one-hot
# teacher_probs, which stand for distributions that are missing, a loss should equal nll_loss.
LOSSES = {
    "kl": lambda logits, batch: kl_loss(
        logits, batch["teacher_ids"], batch["teacher_probs"], batch["loss_mask"]),
    "nll": lambda logits, batch: nll_loss(logits, batch["labels"], batch["loss_mask"]),
}

def batch_loss(model, batch, loss):
    """Return the loss of a batch; without the teacher's distributions it is likelihood."""
    logits = model(batch["input_ids"], batch["input_ids"] != PAD, batch["decoder_input_ids"])
    return LOSSES[loss if "teacher_ids" in batch else "nll"](logits, batch)

# --- the loop ---

def add_gradients(model, micro_batches, args):
    """Run the passes of an optimizer step, which add up its gradients; return the losses.

    The loss of a step is the mean over its micro-batches, that of a micro-batch the mean over its
    tokens. A pass counts by its share of the tokens, so the result is the same for any split,
    up to rounding and to the masks of dropout."""
    losses = []
    for micro_batch in micro_batches:
        tokens, total = sum(len(example.labels) for example in micro_batch), 0.0
        for part in split_into_passes(micro_batch, args.tokens_per_pass, args.pass_costs):
            share = sum(len(example.labels) for example in part) / tokens
            with mixed_precision(args):
                loss = batch_loss(model, collate(part, args.device), args.loss) * share
            (loss / len(micro_batches)).backward()
            total += loss.detach()
        losses.append(total)
    return losses

def get_lr(step, steps, peak, warmup, schedule="cosine"):
    """Return the learning rate of step 0, 1, .. steps - 1: half a cosine towards 0, or constant,
    times a linear warm-up."""
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
    return peak * decay * min(1.0, (step + 1) / max(1, warmup))

def count_steps(examples, args):
    """Return the optimizer steps of an epoch and of the run; a micro-batch has one format."""
    sizes = dict(zip(FORMATS, args.micro_batch_size))
    per_format = collections.Counter(example.format for example in examples)
    micro_batches = sum(math.ceil(n / sizes[name]) for name, n in per_format.items())
    per_epoch = math.ceil(micro_batches / args.gradient_accumulation_steps)
    return per_epoch, min(per_epoch * args.epochs, args.steps or math.inf)

def train(model, tokenizer, examples, pool, args, run, measure=None):
    """Train a model, save and evaluate checkpoints, and return the best one's log entry.

    pool: the problems that demonstrations are drawn from (GSM8K's training set).
    run: the folder of log and checkpoints; args.resume continues from the last, bit for bit.
    measure: a function in place of validate, whose result contains at least what validate's does.
    Raises UserError if a loss or gradient is not finite, KeyboardInterrupt after Ctrl-C."""
    per_epoch, steps = count_steps(examples, args)
    optimizer = make_optimizer(model.parameters(), args.optimizer, args.weight_decay)
    model.encoder.gradient_checkpointing = args.gradient_checkpointing
    model.decoder.gradient_checkpointing = args.gradient_checkpointing
    step = start = load_checkpoint(run, model, optimizer) if args.resume else 0
    log = TrainingLog(run / "log.jsonl", start, steps, args)
    with stop_after_step() as stop:
        while True:  # evaluate, step, save: a resumed run makes up for an evaluation it missed
            # Evaluate the start, or the checkpoint that the last iteration saved.
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
                batches = make_batches(examples, pool, tokenizer, args.micro_batch_size, args.seed,
                                       epoch)
            n = args.gradient_accumulation_steps
            micro_batches = batches[position * n : (position + 1) * n]
            model.train()
            lr = get_lr(step, steps, args.learning_rate, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward and backward passes. If memory runs out, repeat the step in smaller passes.
            try:
                losses = add_gradients(model, micro_batches, args)
            except RuntimeError as error:
                args.tokens_per_pass = smaller_passes(error, micro_batches, args)
                save_arguments(args, run)
                optimizer.zero_grad()
                continue

            # Clip the gradients, update the weights, and save.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            check_finite(torch.stack(losses), norm, micro_batches, step + 1, run)
            optimizer_step(optimizer)
            optimizer.zero_grad()
            step += 1
            log.add_step(step, lr, micro_batches, losses)
            if stop.is_set() or step % args.checkpoint_every == 0 or step == steps:
                save_checkpoint(run, step, model, optimizer, tokenizer)
                best = best_checkpoint(log.evaluations)
                if not args.keep_checkpoints:
                    prune_checkpoints(run, keep=[step, best["step"] if best else step])
                log.since = time.time()  # saving counts neither as training nor as evaluation

# --- model selection ---

def checkpoint_tasks(args):
    """Return what is evaluated at a checkpoint, each as arguments of problems_and_prompts()."""
    tasks = [(task, True, "validation", args.data, args.validation_limit)
             for task, dataset in DATASETS.items() if dataset.validate]
    bbh = [("bbh", cot, "test", args.data, args.bbh_limit) for cot in (True, False)]
    return tasks + (bbh if args.bbh_limit else [])

def validate(model, tokenizer, args):
    """Evaluate a checkpoint: {"validation": {math set: [accuracy, stderr]}} by zero-shot chain of
    thought, and with --bbh-limit also {"bbh": {"CoT": the same, "answer-only": the same}}."""
    entry = {"validation": {}}
    for task, cot, *options in checkpoint_tasks(args):
        e = evaluate_with(args, model, tokenizer, task, cot, *options)
        part = entry["validation"] if task in DATASETS else entry.setdefault("bbh", {})
        name = task if task in DATASETS else "CoT" if cot else "answer-only"
        part[name] = [round(e.accuracy, 5), round(e.stderr, 5)]
    return entry

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
    remedy = "fix or delete this line (data/README.md describes the format); is the file complete?"
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        while True:
            source = f"{path}, line {number + 1}"
            with names_file(source, "a teacher record", remedy):
                line = file.readline(MAX_LINE)
                if not line:
                    break
                record = parse_record(json.loads(line.decode("utf-8")), source)
            yield record
            number += 1
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

def smaller_passes(error, micro_batches, args):
    """Return a lower limit on the size of passes after a pass ran out of memory. Raises the error
    again if it is another one, or if every pass holds one example already."""
    passes = [part for micro_batch in micro_batches
              for part in split_into_passes(micro_batch, args.tokens_per_pass, args.pass_costs)]
    sizes = [pass_size(part, args.pass_costs) for part in passes if len(part) > 1]
    if not is_out_of_memory(error) or not sizes:
        raise error
    limit = int(max(sizes) / 2)
    print(f"out of memory: this step again, with passes as large as {limit:,} source tokens",
          flush=True)
    return limit

def check_finite(losses, norm, micro_batches, step, run):
    """Raise UserError, naming the records, if a loss or the gradient norm is NaN or infinite."""
    if losses.isfinite().all() and norm.isfinite():
        return
    bad = [examples for loss, examples in zip(losses, micro_batches) if not loss.isfinite()]
    sources = sorted({example.source for batch in bad or micro_batches for example in batch})
    raise UserError(
        f"step {step}: the {'loss' if bad else 'gradient'} is not finite. Batch: "
        f"{'; '.join(sources)}. Last good checkpoint: {last_checkpoint(run)}. Resuming would hit "
        "the same batch: remove these records, or restart with a lower --learning-rate or with "
        "--precision fp32")

# --- optimizer and precision ---

def mixed_precision(args):
    """Context manager: with --precision bf16, run matrix products in bf16; weights stay fp32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")

def model_options(args):
    """Return the options of from_pretrained() for the model that is trained and evaluated."""
    return {"device": args.device, "dtype": weights_dtype(args), "dropout_rate": args.dropout}

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
    """Round fp32 to bf16: keep the upper 16 bits, or go on to the next number away from 0 with
    probability (lower 16 bits) / 2**16."""
    bits = x.view(torch.int32)
    bits = (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).bfloat16()

# --- memory and time ---

class TensorBytes(TorchDispatchMode):
    """Context manager: count the bytes of the tensors that operations create; peak is the most at
    one time."""

    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        before = storages((args, kwargs))  # a view of one of these takes no memory
        for key, storage in storages(result).items():
            if key not in before:  # PyTorch's object of a storage dies with it
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size):
        self.now -= size

def storages(tree):
    """Return {address: storage} of the tensors in nested containers."""
    found = [x.untyped_storage() for x in tree_leaves(tree)
             if isinstance(x, torch.Tensor) and x.layout == torch.strided]  # not packed weights
    return {storage._cdata: storage for storage in found}

def memory_of(device, work):
    """Return the bytes that work() takes, beyond those taken before: at its peak, and in the end,
    with what it returns."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _result = work()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with TensorBytes() as tensors:
        _result = work()
    return tensors.peak, tensors.now

def state_bytes(args):
    """Return the bytes of the weights, the gradients and the optimizer's state."""
    each = 2 if args.precision == "bf16-weights" else 4
    moments = 8 if args.optimizer == "adamw" else 0  # Adafactor's are a row and a column per matrix
    return np.multiply(count_parameters(args.model), (each, each, moments)).tolist()

def does_not_fit(args, reason):
    """Return the UserError for a lack of memory: the figures, and the command that takes less."""
    less, flags, figures = argparse.Namespace(**vars(args)), [], []
    if not args.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    for key, value in (("optimizer", "adafactor"), ("precision", "bf16-weights")):
        if getattr(args, key) != value:
            setattr(less, key, value)
            flags += [f"--{key}", value]
            figures.append(f"{sum(state_bytes(less)) / 1e9:.2f} GB with --{key} {value}")
    advice = f"try: {shlex.join([sys.executable, *sys.argv, *flags])}"
    if (args.run / "arguments.json").exists():  # a run's optimizer and precision are fixed
        advice = f"start another run with {' '.join(flags)}"
    figures.append(advice if flags else "choose a smaller model")
    return UserError(f"{reason}: weights, gradients and optimizer of "
                     f"{count_parameters(args.model):,} parameters take "
                     f"{sum(state_bytes(args)) / 1e9:.2f} GB, the activations come on top; "
                     f"{', '.join(figures)}")

def measure_passes(model, longest, args):
    """Set args.tokens_per_pass to what the device has memory for, and args.pass_costs.

    What backward needs from forward grows with pass_features: small passes of six shapes give the
    weights. The peak, which is higher, is measured with the longest Example, once and three times.
    Raises UserError if it does not fit."""

    def forward(rows, S, T):
        source, labels = np.full(S, UNK), np.full(T, UNK)
        ids, probs = np.full((T, 5), UNK), np.full((T, 5), 0.1)
        example = Example("", None, source, labels, ids, probs, "")
        with mixed_precision(args):
            return batch_loss(model, collate([example] * rows, args.device), args.loss)

    def peak(rows):
        return memory_of(args.device, lambda: forward(rows, S, T).backward())[0]

    S, T = len(longest.input_ids), len(longest.labels)
    forward(1, 8, 8).backward()  # from here on the gradients exist
    free = free_memory(args.device) - state_bytes(args)[2]
    one = peak(1)
    if one > free:
        raise does_not_fit(args, f"the longest example, of {S:,} + {T:,} tokens, needs "
                           f"{one / 1e9:.2f} GB of {max(free, 0) / 1e9:.2f} GB that are free")
    shapes = [(32, 32), (96, 32), (192, 32), (32, 96), (32, 192), (192, 192)]
    held = [memory_of(args.device, lambda: forward(1, *shape))[1] for shape in shapes]
    _, *costs = np.linalg.solve([(1, *pass_features(*shape)) for shape in shapes], held)
    args.pass_costs = [max(0.0, cost / costs[0]) for cost in costs]
    per_row = (peak(3) - one) / 2 if 3 * one < free else one  # one: too much, but safe
    rows = 1 + (free - one) / per_row
    args.tokens_per_pass = int(rows * pass_size([longest], args.pass_costs))

def seconds(device, work):
    """Return the time that work() takes on a device."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()  # until then it is only queued
    return time.perf_counter() - start

def training_seconds(model, batches, args):
    """Estimate the time of micro-batches: some passes, from short to long, stand for all."""
    passes = [part for examples in batches
              for part in split_into_passes(examples, args.tokens_per_pass, args.pass_costs)]
    passes.sort(key=lambda part: pass_size(part, args.pass_costs))
    sample = passes[:: math.ceil(len(passes) / 8)]
    work, sampled = (sum(pass_size(part, PLAIN_COSTS) for part in some)
                     for some in (passes, sample))
    return seconds(args.device, lambda: add_gradients(model, sample, args)) * work / sampled

def evaluation_seconds(model, tokenizer, tasks, tokens, args):
    """Estimate the time of evaluating tasks if each batch takes so many tokens: 4 and 20 tokens for
    two batches, a shorter and a longer one, stand for all."""
    pairs = [pair for task in tasks for pair in problems_and_prompts(*task)]
    pairs.sort(key=lambda pair: len(pair[1]))
    rows = args.eval_batch_size
    batches = [pairs[i : i + rows] for i in range(0, len(pairs), rows)]
    two = batches[len(batches) // 4 :: math.ceil(len(batches) / 2)]
    sample = [pair for batch in two for pair in batch]
    with mixed_precision(args):
        few, many = (seconds(args.device, lambda: evaluate(
            model, tokenizer, *zip(*sample), rows, length)) for length in (4, 20))
    each = max(0.0, many - few) / 16
    return len(pairs) / len(sample) * (few + (tokens - 4) * each)

def plan(tokenizer, examples, pool, args):
    """Measure this device with a random model of the run's shape; print the memory and time that
    the run takes. Set args.tokens_per_pass, unless it is set, and args.table_share: the time of the
    last table as a multiple of a checkpoint's evaluation, for the time that is left."""
    config = read_config(args.model)
    config.dropout_rate = config.dropout_rate if args.dropout is None else args.dropout
    with torch.device(args.device):
        model = T5(config).to(weights_dtype(args)).train()
    model.encoder.gradient_checkpointing = args.gradient_checkpointing
    model.decoder.gradient_checkpointing = args.gradient_checkpointing
    batches = make_batches(examples, pool, tokenizer, args.micro_batch_size, args.seed, epoch=0)
    if not args.tokens_per_pass:
        measure_passes(model, max((example for batch in batches for example in batch),
                                  key=lambda ex: len(ex.input_ids) + len(ex.labels)), args)
    per_epoch, steps = count_steps(examples, args)
    training = training_seconds(model, batches, args) * steps / per_epoch
    model.zero_grad()
    has_longest = max(examples, key=lambda ex: len(ex.labels)).format
    solutions = sorted(len(ex.labels) for ex in examples if ex.format == has_longest)
    rows = args.eval_batch_size
    longest = solutions[len(solutions) * rows // (rows + 1)]  # on average the longest in a batch
    tokens = min(args.max_new_tokens, longest)
    checkpoint = evaluation_seconds(model, tokenizer, checkpoint_tasks(args), tokens, args)
    last = 2 * evaluation_seconds(model, tokenizer, table_tasks(args), tokens, args)
    args.table_share = last / checkpoint
    evaluations = 1 + math.ceil(steps / args.checkpoint_every)
    sizes = [size / 1e9 for size in state_bytes(args)]
    kept = evaluations - 1 if args.keep_checkpoints else min(evaluations - 1, 3)  # one unfinished
    print(f"{args.device}, {args.precision}, {count_parameters(args.model):,} parameters: "
          "weights {:.2f} GB, gradients {:.2f} GB, optimizer {:.2f} GB; ".format(*sizes) +
          f"passes as large as {args.tokens_per_pass:,} source tokens; checkpoints take up to "
          f"{kept * (sizes[0] + sizes[2]):.2f} GB of disk.\n"
          f"{steps:,} steps, {evaluations} evaluations. Estimate: training {duration(training)}, "
          f"evaluations {duration(checkpoint * evaluations)}, last table {duration(last)} (if "
          f"a batch's longest output has {tokens} tokens)", flush=True)

def duration(seconds):
    """Format a time: 40 s, 3.5 min or 12.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

# --- a run's folder: arguments, log, checkpoints ---

def find_run(typed):
    """Return the run's folder and, with --resume, its settings. typed: the options given."""
    run = Path("runs") / (typed.get("name") or typed.get("size") or "toy")
    path = run / "arguments.json"
    if "resume" not in typed:
        if path.exists() and "dry_run" not in typed:
            raise UserError(f"{run} exists; continue it with --resume, or choose another --name")
        return run, {}
    if not path.exists():
        raise UserError(f"{run}: no run to resume; choose one with --name")
    with names_file(path, "the settings of a run", "start another run with --name"):
        return run, dict(json.loads(path.read_text(encoding="utf-8")))

def recorded(args):
    """Return the settings as arguments.json holds them."""
    kept = {key: value for key, value in vars(args).items()
            if key not in ("resume", "name", "run", "dry_run")}
    return json.loads(json.dumps(kept, default=str))

def save_arguments(args, run):
    """Write a run's settings, from which --resume continues."""
    atomic_write(run / "arguments.json", json.dumps(recorded(args), indent=2) + "\n")

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
        self.evaluation = 0.0  # the seconds that the last evaluation took
        self.seconds, self.tokens, self.losses, self.since = 0.0, 0, {}, time.time()
        # Steps after the last checkpoint are repeated, so drop their entries.
        entries = [e for e in (read_log(path) if path.exists() else ()) if e["step"] <= start]
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self.evaluations = {entry["step"]: entry for entry in entries if "validation" in entry}

    def add_step(self, step, lr, micro_batches, losses):
        """Count an optimizer step; report it if it is due, with the mean loss of each format."""
        now = time.time()
        self.seconds, self.since = self.seconds + now - self.since, now
        for examples, loss in zip(micro_batches, losses):
            self.losses.setdefault(examples[0].format, []).append(loss)
            self.tokens += sum(len(ex.input_ids) + len(ex.labels) for ex in examples)
        due = step % self.args.log_every == 0 or step == self.steps
        if not due and step != self.start + 1:
            return
        means = {name: torch.stack(self.losses[name]).mean().item()
                 for name in FORMATS if name in self.losses}
        speed = round(self.tokens / self.seconds)
        every = self.args.checkpoint_every  # evaluations: those to come, this step's included
        evaluations = math.ceil(self.steps / every) - (step - 1) // every
        left = self.seconds / (step - self.start) * (self.steps - step)
        left += self.evaluation * (evaluations + self.args.table_share)
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(f"step {step}/{self.steps}  lr {lr:.2e}  {speed:,} tokens/s  {duration(left)} left  "
              f"{losses}", flush=True)
        if due:
            self.losses = {}
            entry = {"step": step, "learning_rate": lr, "tokens_per_second": speed, "loss": means}
            self.write(entry)

    def add_evaluation(self, entry):
        """Report the evaluation of a checkpoint; its time does not count as training."""
        self.evaluations[entry["step"]] = entry
        self.write(entry)
        self.evaluation, self.since = time.time() - self.since, time.time()
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
        os.write(2, b"\nfinishing this step or evaluation; press Ctrl-C again to stop at once\n")

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
    device = parameters[0].device.type
    state = {"step": step, "optimizer": [optimizer.state[parameter] for parameter in parameters],
             "device": device, "random": random_module(device).get_rng_state()}
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
    kept = [run / f"checkpoint-{step}" for step in keep]
    for folder in checkpoints(run):
        if folder not in kept:
            shutil.rmtree(run / "unfinished-checkpoint", ignore_errors=True)
            os.replace(folder, run / "unfinished-checkpoint")
            shutil.rmtree(run / "unfinished-checkpoint")

def load_checkpoint(run, model, optimizer):
    """Load the last checkpoint into model, optimizer and, on the same kind of device, random state;
    return its step, or 0."""
    if not checkpoints(run):
        return 0
    folder, device = checkpoints(run)[-1], model.shared.weight.device.type
    remedy = f"delete {folder}, then --resume continues from the checkpoint before it"
    with names_file(folder / "training.pt", "a complete checkpoint", remedy):
        weights = T5.from_pretrained(folder, dtype=model.shared.weight.dtype).hf_tensors()
        state = torch.load(folder / "training.pt", map_location=device, weights_only=True)
        for parameter, saved in zip(model.parameters(), state["optimizer"], strict=True):
            optimizer.state[parameter] = saved
        if state["device"] == device:
            random_module(device).set_rng_state(state["random"].cpu())
        for name, tensor in model.hf_tensors().items():
            tensor.copy_(weights[name])
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
    "toy": dict(model=str(TOY / "tuned-1M"), data=TOY, teacher=TOY / "teacher.jsonl.gz",
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
DEFAULTS = dict(
    teacher=None, data=DEFAULT_DATA, formats=list(FORMATS), solutions_per_question=None, loss="kl",
    epochs=10, steps=None, optimizer="adamw", learning_rate=5e-4, schedule="cosine", warmup=10,
    weight_decay=0.01, max_grad_norm=1.0, dropout=None, gradient_checkpointing=False,
    tokens_per_pass=None, keep_checkpoints=False, validation_limit=None, bbh_limit=0,
    test_limit=None, shots=0, demonstrations=None, skip_bbh=False, eval_batch_size=64,
    max_new_tokens=256, log_every=10, seed=0, device=best_device(),
    threads=torch.get_num_threads(), precision=None)
# What a resumed run may change: all that is not the mathematics. Files may move, not change.
MAY_CHANGE = ("model", "data", "teacher", "gradient_checkpointing", "tokens_per_pass", "pass_costs",
              "device", "keep_checkpoints", "test_limit", "shots", "demonstrations", "skip_bbh",
              "eval_batch_size", "log_every", "threads")
PLAIN_COSTS = 1.0, 1.0, 0.0, 0.0, 0.0  # the size of a pass is its tokens: see pass_size

def make_parser():
    """Return the parser of the command line. Its help tells the defaults of every size."""
    parser = argparse.ArgumentParser(
        description="Specialize a T5 towards multi-step math with a teacher's solutions.",
        epilog="Without arguments: the toy world in data/toy, on the CPU.",
        argument_default=argparse.SUPPRESS)  # unset options stay absent
    positive, rate = in_range(int, above=0), in_range(float, above=0)

    def add(flag, help, unset="none", **options):
        key = flag.lstrip("-").replace("-", "_")
        defaults = [str(DEFAULTS[key] or unset)] if key in DEFAULTS else []
        defaults += [f"{size} {settings[key]}" for size, settings in SIZES.items()
                     if key in settings]
        text = "; ".join(defaults).replace(f"{TOY.parents[1]}/", "") or unset
        parser.add_argument(flag, help=f"{help} (default: {text})".replace("%", "%%"), **options)

    add("--size", "the paper's settings for this FlanT5", "toy", choices=SIZES)
    add("--model", "folder or hub name")
    add("--teacher", "teacher records", "GSM8K's own solutions", type=Path)
    add("--data", "folder of the problem sets; missing ones are downloaded", type=Path)
    add("--name", "name of the run's folder in runs/", "the size")
    add("--resume", "continue the run of this name with its settings", "no", action="store_true")
    add("--dry-run", "print the memory and time of a run, and exit", "no", action="store_true")
    add("--formats", "data formats to mix", nargs="+", choices=FORMATS)
    add("--solutions-per-question", "most solutions of each question to train on", "all",
        type=positive)
    add("--loss", "loss for chains of thought (answers alone: likelihood)", choices=LOSSES)
    add("--epochs", "passes over the examples", type=positive)
    add("--steps", "most optimizer steps", type=positive)
    add("--optimizer", "what updates the weights", choices=["adamw", "adafactor"])
    add("--learning-rate", "peak of the learning rate", type=rate)
    add("--schedule", "learning rate after the warm-up", choices=["cosine", "constant"])
    add("--warmup", "steps in which the learning rate rises", type=in_range(int))
    add("--weight-decay", "decoupled weight decay", type=in_range(float))
    add("--max-grad-norm", "norm to which gradients are clipped", type=rate)
    add("--dropout", "dropout rate", "the checkpoint's", type=in_range(float, below=1))
    add("--micro-batch-size", "examples of each format", type=positive, nargs=4, metavar="N")
    add("--gradient-accumulation-steps", "micro-batches per optimizer step", type=positive)
    add("--tokens-per-pass", "most tokens in memory at a time, padding included; only rounding "
        "and the masks of dropout depend on it", "what fits", type=positive)
    add("--gradient-checkpointing", "less memory for a third more time", "no",
        action=argparse.BooleanOptionalAction)
    add("--precision", "bf16: matrix products; bf16-weights: also weights and gradients",
        "bf16 on a GPU that has it, else fp32", choices=["fp32", "bf16", "bf16-weights"])
    add("--checkpoint-every", "optimizer steps between evaluated checkpoints", type=positive)
    add("--keep-checkpoints", "keep all checkpoints, not only the best and the last", "no",
        action=argparse.BooleanOptionalAction)
    add("--validation-limit", "problems per set at a checkpoint", "all", type=positive)
    add("--bbh-limit", "problems per BBH task at a checkpoint", type=in_range(int))
    add("--test-limit", "problems per task in the last table", "all", type=positive)
    add("--shots", "evaluate math also in context in the last table, with 4 demonstrations drawn "
        "from GSM8K's training set", type=int, choices=[0, SHOTS])
    add("--demonstrations", "file of demonstrations in their place, in GSM8K's format", type=Path)
    add("--skip-bbh", "leave BIG-Bench Hard out of the last table", "no",
        action=argparse.BooleanOptionalAction)
    add("--eval-batch-size", "most problems per batch", type=positive)
    add("--max-new-tokens", "longest output", type=positive)
    add("--log-every", "steps between progress lines", type=positive)
    add("--seed", "random seed: data order and dropout", "0", type=int)
    add("--device", "where to run", choices=["cpu", "cuda", "mps"])
    add("--threads", "number of CPU threads", type=positive)
    return parser

def parse_arguments(arguments=None):
    """Return the settings of a run: those of --size, or with --resume the run's, and on top what is
    on the command line. args.run is the run's folder."""
    parser = make_parser()
    typed = vars(parser.parse_args(arguments))
    if "resume" in typed and "dry_run" in typed:
        parser.error("--dry-run is for a new run: leave out --resume")
    run, before = find_run(typed)
    size = typed.get("size") or before.get("size") or "toy"
    settings = dict(size=size, resume=False, dry_run=False, name=None, table_share=0.0,
                    pass_costs=PLAIN_COSTS) | DEFAULTS | SIZES[size]
    args = argparse.Namespace(**settings | before | typed, run=run)
    if "tokens_per_pass" in typed:
        args.pass_costs = PLAIN_COSTS
    elif args.device != before.get("device"):
        args.tokens_per_pass = None  # measure what this device has memory for
    args.data, args.teacher = Path(args.data), args.teacher and Path(args.teacher)
    args.formats = list(dict.fromkeys(args.formats))
    if args.device not in ("cpu", best_device()):
        raise UserError(f"--device {args.device}: PyTorch finds none here; use {best_device()}")
    has_bf16 = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    if args.gradient_checkpointing and args.device == "mps" and args.dropout != 0:
        raise UserError("on MPS PyTorch recomputes with other dropout masks; add --dropout 0")
    changed = [key for key, value in recorded(args).items()
               if before.get(key, value) != value and key not in MAY_CHANGE]
    if changed:
        wrong = ", ".join(f"--{key.replace('_', '-')} {before[key]}" for key in changed)
        raise UserError(f"{run} was started with {wrong}; leave this as it is, or start another "
                        "run with --name")
    return args

def make_deterministic(seed):
    """Make the same seed and passes give the same weights on the same device. On CUDA, only as far
    as PyTorch offers deterministic kernels; it warns about the rest."""
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

def table_tasks(args):
    """Return the rows of the last table, each as arguments of problems_and_prompts()."""
    demonstrations = load_demonstrations(args.demonstrations or args.shots, args.data)
    tasks = [(task, True, "test", args.data, args.test_limit, shots)
             for shots in ([[], demonstrations] if demonstrations else [[]]) for task in DATASETS]
    bbh = [("bbh", cot, "test", args.data, args.test_limit, []) for cot in (True, False)]
    return tasks + ([] if args.skip_bbh else bbh)

def evaluate_with(args, model, tokenizer, *task, **options):
    """Evaluate a task, given by arguments of problems_and_prompts(), with the run's settings."""
    with mixed_precision(args):
        return evaluate_task(model, tokenizer, *task, batch_size=args.eval_batch_size,
                             max_new_tokens=args.max_new_tokens, **options)

def read_sets(args):
    """Read, and download, all problem sets before training starts. Return {name: hash of content},
    also of the teacher's records, so that a resumed run has the same."""
    contents = {"teacher": args.teacher.read_bytes()} if args.teacher else {}
    load_demonstrations(args.demonstrations or args.shots, args.data)
    sets = {"math": [load("gsm8k", "train", args.data)]}
    sets["math"] += [load(task, "all", args.data) for task in DATASETS]
    if args.bbh_limit or not args.skip_bbh:
        sets["bbh"] = [(load(task, "test", args.data), bbh_prompt(task, "", True, args.data))
                       for task in bbh_tasks(args.data)]
    contents |= {name: repr(problems).encode("utf-8", "replace") for name, problems in sets.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}

def specialize(args, run):
    """Train, select a checkpoint, and report what was gained and lost."""
    torch.set_num_threads(args.threads)
    make_deterministic(args.seed)  # before the first operation on a GPU
    free = free_memory(args.device)
    if sum(state_bytes(args)) > free:  # nothing but config.json is downloaded yet
        raise does_not_fit(args, f"{args.device} has {free / 1e9:.2f} GB free")
    hashes = read_sets(args)
    for name, value in getattr(args, "hashes", hashes).items():
        if name in hashes and hashes[name] != value:
            raise UserError(f"{args.teacher if name == 'teacher' else args.data}: its content has "
                            f"changed since {run} was started; restore it, or start another run "
                            "with --name")
    args.hashes = hashes
    pool = load("gsm8k", "train", args.data)
    tokenizer = Tokenizer(args.model)
    examples, summary = build_examples(teacher_records(args, pool), tokenizer, args.formats,
                                       args.loss, limit=args.solutions_per_question)
    print(f"{summary}.", flush=True)
    if not args.resume or not args.tokens_per_pass:
        plan(tokenizer, examples, pool, args)
    if args.dry_run:
        return
    if not args.resume:
        save_arguments(args, run)
    print(f"The run's folder: {run}", flush=True)
    model, _ = load_pretrained(args.model, **model_options(args))
    torch.manual_seed(args.seed)  # again, because the plan drew random numbers
    best = train(model, tokenizer, examples, pool, args, run)
    model = T5.from_pretrained(run / f"checkpoint-{best['step']}", dtype=weights_dtype(args))
    model.save_pretrained(run / "model")
    tokenizer.save(run / "model")
    report(best, tokenizer, args, run)

def report(best, tokenizer, args, run):
    """Evaluate the model before and after; print the table, and write it to results.json. Each line
    is also written to table.txt."""
    tasks, results = table_tasks(args), {}
    names = [display_name(task, args.data, cot, len(shots)) for task, cot, *_, shots in tasks]
    total = 2 * sum(len(problems_and_prompts(*task)) for task in tasks)
    start, done = time.time(), 0
    (run / "table.txt").write_text("")

    def add_line(line, problems):
        nonlocal done
        done += problems
        left = (time.time() - start) / done * (total - done)
        print(f"{line}, {duration(left)} left", flush=True)
        with open(run / "table.txt", "a") as file:
            file.write(f"{model_name}, {line}\n")

    for model_name, folder in (("base", args.model), ("specialized", run / "model")):
        model = T5.from_pretrained(folder, **model_options(args))
        file = PredictionFile(run / "predictions.jsonl", model_name, weights=weights_hash(model),
                              precision=args.precision, max_new_tokens=args.max_new_tokens)
        results[model_name] = [evaluate_with(args, model, tokenizer, *task, file=file,
                                             report=add_line) for task in tasks]
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    args = parse_arguments()
    run = args.run
    try:
        with contextlib.nullcontext() if args.dry_run else lock(run):
            specialize(args, run)
    except KeyboardInterrupt:
        words = [sys.executable, sys.argv[0], "--name", args.name or args.size, "--resume"]
        how = f"Continue with: {shlex.join(words)}"
        if not (run / "arguments.json").exists():
            how = "Nothing was saved yet; start again."
        print(f"\nstopped. The last checkpoint: {last_checkpoint(run)}. {how}", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(args, f"out of memory ({error})") from None

if __name__ == "__main__":
    run_command(main)
