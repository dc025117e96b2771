"""Specializing a small language model towards multi-step reasoning: batches, losses, the loop, model selection.

Fu, Peng, Ou, Sabharwal, Khot, ICML 2023 (arXiv 2301.12726). Data flow one way: teacher record -> alignment ->
training row -> batch -> loss -> checkpoint -> accuracy. data/rows.py makes the rows; here they become batches. The
model is in t5.py, the alignment in align.py, problems and accuracies in eval.py.

    python specialize.py                                                   a toy world, on a CPU, in minutes
    python specialize.py --size base --teacher teacher.jsonl.gz            FlanT5-base on one GPU
    python specialize.py --size base --teacher teacher.jsonl.gz --resume   go on after an interruption

Letters: B batch, S source length, T target length, V vocabulary, k entries of a teacher row.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import shlex
import signal
import sys
import threading
from pathlib import Path

# Threads that wait by spinning make a busy machine many times slower; GNU's OpenMP can spin for a moment and then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F

from data.download import InputError, bounded, run_command
from data.huggingface import read_config
from data.memory import device_bytes, flan_config, training_memory
from data.optimizers import make_optimizer, optimizer_step
from data.predictions import table
from data.rows import FORMATS, training_rows
from data.runs import Progress, drop_checkpoints, find_run, finish_step, last_checkpoint, load_checkpoint, on_interrupt
from data.runs import recorded, save_checkpoint, write_whole
from eval import DEFAULT_DATA, MATH, OUT_OF_DISTRIBUTION, bbh_prompt, bbh_tasks, evaluate_task, load, math_demonstration
from eval import math_prompt, number_text
from t5 import PAD, T5, T5Config, Tokenizer, best_device, load_pretrained, pad

SHOTS = 4  # demonstrations in context

# The longest source and target of each format, in tokens, in ten epochs of 207,135 rows with demonstrations from GSM8K,
# and targets as long as GSM8K's own: for --plan.
PAPER_LENGTHS = dict(zip(FORMATS, [(1350, 290), (690, 7), (245, 290), (240, 7)]))

# The authors' settings for each size: rows of a micro-batch in each of the four formats,
# micro-batches a step, epochs, and micro-batches between two checkpoints. They give none for small and, for XXL, no
# distance between checkpoints: small takes base's, XXL takes XL's. "toy" is this project's own.
TOY = Path(__file__).parent / "data" / "toy"
SIZES = {
    "toy": dict(model=TOY / "student", data=TOY, teacher=TOY / "teacher.jsonl.gz", micro_batch=(8, 8, 32, 32),
                accumulation=1, epochs=1, steps=800, learning_rate=2e-3, checkpoint_every=100, validation_limit=100,
                max_new_tokens=64, device="cpu", threads=2),
    "small": dict(model="google/flan-t5-small", micro_batch=(25, 35, 40, 60), accumulation=3, checkpoint_every=1000),
    "base": dict(model="google/flan-t5-base", micro_batch=(25, 35, 40, 60), accumulation=3, checkpoint_every=1000),
    "large": dict(model="google/flan-t5-large", micro_batch=(8, 12, 18, 30), accumulation=20, checkpoint_every=3000),
    "xl": dict(model="google/flan-t5-xl", micro_batch=(2, 10, 8, 20), accumulation=30, checkpoint_every=10000),
    "xxl": dict(model="google/flan-t5-xxl", micro_batch=(2, 10, 8, 20), accumulation=15, checkpoint_every=10000,
                optimizer="adafactor", precision="bf16-weights", gradient_checkpointing=True),  # for one 80 GB device
}  # fmt: skip
DEFAULTS = dict(data=DEFAULT_DATA, teacher=None, epochs=10, learning_rate=5e-4, validation_limit=None,
                max_new_tokens=256, optimizer="adamw", gradient_checkpointing=False, device=best_device(),
                threads=torch.get_num_threads())  # fmt: skip


# --- batches ---


def plan_epoch(rows, pool, micro_batch, length, seed, epoch):
    """The micro-batches of an epoch, each a list of (row, demonstrations), in random order.

    A micro-batch holds rows of one format, micro_batch[format] of them, and of similar length. The rows are shuffled,
    then stretches of 64 micro-batches are sorted by the target's length, and runs of 8 in them by length(example): of
    all tokens of GSM8K in four formats 8.5% are padding, of the targets' 13%; sorted by length(example) alone, 13% and
    40%. Demonstrations are drawn from pool, never the question.
    """
    rng = random.Random(f"{seed}, {epoch}")
    batches = []
    for name, (_, in_context) in FORMATS.items():
        chosen = [row for row in rows if row.format == name]
        rng.shuffle(chosen)
        examples = []
        for row in chosen:
            shots = rng.sample(pool, min(SHOTS + 1, len(pool))) if in_context else []
            examples.append((row, [shot for shot in shots if shot.question != row.problem.question][:SHOTS]))
        size = micro_batch[name]
        for n, key in ((64 * size, lambda example: len(example[0].labels)), (8 * size, length)):
            examples = [example for i in range(0, len(examples), n) for example in sorted(examples[i : i + n], key=key)]
        batches += [examples[i : i + size] for i in range(0, len(examples), size)]
    rng.shuffle(batches)
    return batches


def schedule(rows, pool, tokenizer, args):
    """(encode, steps_of): a text's ids, each text encoded once; an epoch's optimizer steps, each a list of micro-batches."""
    encode = functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))
    length = lambda example: len(source(*example, encode)) + len(example[0].labels)  # noqa: E731
    micro_batch = dict(zip(FORMATS, args.micro_batch))

    def steps_of(epoch):
        batches = plan_epoch(rows, pool, micro_batch, length, args.seed, epoch)
        return [batches[i : i + args.accumulation] for i in range(0, len(batches), args.accumulation)]

    return encode, steps_of


def source(row, shots, encode):
    """The ids of a row's prompt. It is put together from parts, each encoded once: no piece of T5's crosses a space."""
    cot, _ = FORMATS[row.format]
    shown = [encode(math_demonstration(shot, cot))[:-1] for shot in shots]
    return np.concatenate([*shown, encode(math_prompt(row.problem.question, cot))])


def collate(examples, encode, device):
    """[(row, demonstrations)] of one format -> dict of tensors: input_ids (B, S), labels (B, T), decoder_input_ids
    (B, T), mask (B, T), tokens (a number), and for rows with the teacher's distributions ids and probs (B, T, k)."""
    input_ids = pad([source(row, shots, encode) for row, shots in examples])
    labels = pad([row.labels for row, _ in examples])
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "decoder_input_ids": F.pad(labels, (1, -1), value=PAD),
        "mask": labels != PAD,
        "tokens": int((input_ids != PAD).sum() + (labels != PAD).sum()),
    }
    k = max(0 if row.ids is None else row.ids.shape[1] for row, _ in examples)
    if k:
        ids, probs = torch.zeros(*labels.shape, k, dtype=torch.long), torch.zeros(*labels.shape, k)
        ids[..., 0], probs[..., 0] = labels, batch["mask"]  # a row without distributions: likelihood as one-hot KL
        for b, (row, _) in enumerate(examples):
            if row.ids is not None:
                ids[b, : len(row.ids)] = torch.from_numpy(row.ids)
                probs[b, : len(row.probs)] = torch.from_numpy(row.probs)
        batch |= {"ids": ids, "probs": probs}
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


# --- losses ---


def kl_loss(logits, ids, probs, mask):
    """Distribution matching (section 4.1): the mean over tokens of KL(p || q) = sum over i of p_i (log p_i - log q_i).

    logits (B, T, V) of the student; ids, probs (B, T, k): the teacher's likeliest tokens, unused slots with
    probability 0; mask (B, T) true where there is a token. Every other token has p = 0, so k entries of q suffice and
    no (B, T, V) tensor of the teacher's is made. Where the k probabilities sum to m < 1, the least value is m log m.
    """
    return SparseKL.apply(logits, ids.long(), probs, mask / mask.sum())


def nll_loss(logits, targets, mask):
    """Sample matching: the mean over tokens of -log q(target), which is the KL to all probability on the target.
    logits (B, T, V), targets (B, T), mask (B, T)."""
    targets = targets.unsqueeze(-1)
    return kl_loss(logits, targets, torch.ones_like(targets, dtype=torch.float32), mask)


class SparseKL(torch.autograd.Function):
    """The weighted sum over tokens of KL(p || q) with p on k entries and q = softmax(z), computed in fp32.

    With m the sum of p, the gradient is d KL / d z_v = m q_v - p_v. Written out it needs one fp32 tensor of the
    shape of z: q, which becomes the gradient (so it can be taken once), where autograd would keep three of them.
    """

    @staticmethod
    def forward(ctx, z, ids, p, weight):
        q = z.softmax(-1, dtype=torch.float32)  # (B, T, V)
        ctx.save_for_backward(q, ids, p, weight)
        ctx.dtype = z.dtype
        # log q_i from the likeliest token's, since q_i itself may be rounded to 0; where p_i = 0 it does not count.
        log_q = z.gather(-1, ids).float() - z.amax(-1, keepdim=True).float() + q.amax(-1, keepdim=True).log()  # (B, T, k)
        return ((torch.xlogy(p, p) - p * log_q.masked_fill(p == 0, 0.0)).sum(-1) * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        q, ids, p, weight = ctx.saved_tensors
        p = p * (weight * gradient).unsqueeze(-1)
        d = q.mul_(p.sum(-1, keepdim=True)).scatter_add_(-1, ids, -p)
        return d.to(ctx.dtype), None, None, None


def kl_floor(rows):
    """The least KL a token that the rows' targets allow, in nats: m log m averaged, below 0 where the teacher told only
    a part m of its probability."""
    m = np.concatenate([row.probs.sum(axis=1) for row in rows if row.probs is not None] or [np.ones(1)])
    return float((m * np.log(m)).mean())


def batch_loss(model, batch):
    """The loss of one micro-batch: KL where it carries the teacher's distributions, else likelihood."""
    logits = model(batch["input_ids"], batch["input_ids"] != PAD, batch["decoder_input_ids"])
    if "ids" in batch:
        return kl_loss(logits, batch["ids"], batch["probs"], batch["mask"])
    return nll_loss(logits, batch["labels"], batch["mask"])


# --- the loop ---


def learning_rate(step, steps, peak, warmup):
    """Of step 0, 1, .. steps - 1: a linear warm-up times half a cosine towards 0."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def weights_dtype(args):
    """The dtype of weights and gradients."""
    return torch.bfloat16 if args.precision == "bf16-weights" else torch.float32


def mixed_precision(args):
    """The context of forward passes: with --precision bf16 matrix products in bfloat16 though weights are in fp32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def train(model, tokenizer, rows, pool, args, run, measure=None):
    """Train model on rows for args.epochs; save and evaluate every args.checkpoint_every micro-batches and at the end.

    pool: the problems that demonstrations are drawn from. With args.resume it goes on from the run's last checkpoint
    with the random numbers and the order of batches that it would have had. measure(model, tokenizer, args) -> dict
    evaluates a checkpoint (default: validate). Returns the best checkpoint's log entry.
    Raises InputError where a loss or a gradient is not finite, naming the step and the records, and
    KeyboardInterrupt after Ctrl-C, when the step is done and saved.
    """
    encode, steps_of = schedule(rows, pool, tokenizer, args)
    steps = min(len(steps_of(0)) * args.epochs, args.steps or math.inf)
    every = max(1, args.checkpoint_every // args.accumulation)
    optimizer = make_optimizer(model.parameters(), args.optimizer, args.weight_decay)
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = args.gradient_checkpointing
    start = load_checkpoint(run, model, optimizer) if args.resume else 0
    progress = Progress(run / "log.jsonl", start, steps, args.log_every)

    def evaluate_checkpoint(step):
        """Evaluate the checkpoint just saved; Ctrl-C may end that at once."""
        with on_interrupt(signal.default_int_handler):
            entry = progress.pause(lambda: {"step": step} | (measure or validate)(model, tokenizer, args))
        drop_older(step)
        print(f"  validation: {describe(entry)}; best so far: step {best_of(progress.evaluations)['step']}", flush=True)

    def drop_older(step):
        """Of the checkpoints keep this step's, the last, and the best."""
        best = [best_of(progress.evaluations)["step"]] if progress.evaluations else []
        drop_checkpoints(run, keep=(step, *best))

    due = lambda step: step % every == 0 or step == steps  # noqa: E731
    stop = threading.Event()
    with on_interrupt(lambda *_: finish_step(stop)):
        if start and due(start) and start not in progress.evaluations:  # it ended between saving and evaluating
            evaluate_checkpoint(start)
        all_steps = itertools.chain.from_iterable(map(steps_of, range(args.epochs)))
        for step, micro_batches in enumerate(itertools.islice(all_steps, start, steps), start + 1):
            model.train()
            rate = learning_rate(step - 1, steps, args.learning_rate, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for examples in micro_batches:
                batch = collate(examples, encode, args.device)
                with mixed_precision(args):
                    loss = batch_loss(model, batch)
                (loss / len(micro_batches)).backward()
                losses.append(loss.detach())
                progress.add("kl" if "ids" in batch else "nll", losses[-1], batch["tokens"])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            check_finite(torch.stack(losses), norm, micro_batches, step, run)
            optimizer_step(optimizer)
            optimizer.zero_grad()
            progress.step(step, rate)
            if due(step) or stop.is_set():
                save_checkpoint(run, step, model, optimizer, tokenizer)
            if due(step) and not stop.is_set():
                evaluate_checkpoint(step)
            if stop.is_set():
                drop_older(step)
                raise KeyboardInterrupt
    return best_of(progress.evaluations)


def check_finite(losses, norm, micro_batches, step, run):
    """Raise InputError where a loss of the micro-batches or the norm of the gradient is NaN or infinite."""
    if losses.isfinite().all() and norm.isfinite():
        return
    bad = [examples for loss, examples in zip(losses, micro_batches) if not loss.isfinite()]
    places = sorted({row.place for examples in bad or micro_batches for row, _ in examples})
    raise InputError(
        f"step {step}: the {'loss' if bad else 'gradient'} is not finite. Batch: {'; '.join(places)}. "
        f"Last good checkpoint: {last_checkpoint(run)}; --resume would meet the same batch again: take the records out, or begin "
        "anew with a lower --learning-rate or with --precision fp32"
    )


# --- the selection of a checkpoint ---


def validate(model, tokenizer, args):
    """{"validation": {math set: [accuracy, standard error]}} on the validation parts, zero-shot chain of thought."""
    result = {}
    for task in MATH:
        with mixed_precision(args):
            found = evaluate_task(
                model, tokenizer, task, True, "validation", args.data, args.validation_limit, **decoding(args)
            )
        result[task] = [round(found.accuracy, 5), round(found.stderr, 5)]
    return {"validation": result}


def best_of(evaluations):
    """The log entry of the best checkpoint; of equals the latest."""
    return max(evaluations.values(), key=lambda entry: (selection(entry), entry["step"]))


def selection(entry):
    """What a checkpoint is chosen by: mean accuracy on the three out-of-distribution sets (section 5.3)."""
    return sum(entry["validation"][task][0] for task in OUT_OF_DISTRIBUTION) / len(OUT_OF_DISTRIBUTION)


def describe(entry):
    """An evaluation's line on the screen."""
    sets = "  ".join(f"{task} {100 * accuracy:.1f}" for task, (accuracy, _) in entry["validation"].items())
    return f"{sets}  out-of-distribution mean {100 * selection(entry):.1f}"


# --- the command ---


def decoding(args):
    """How evaluations decode."""
    return {"batch_size": args.eval_batch_size, "max_new_tokens": args.max_new_tokens}


def report(model, tokenizer, args):
    """The paper's columns on the test parts: {column: Evaluation}; math by chain of thought, BBH both ways."""
    columns = {task: (task, True) for task in MATH} | {"BBH CoT": ("bbh", True), "BBH direct": ("bbh", False)}
    return {
        name: evaluate_task(model, tokenizer, task, cot, "test", args.data, args.test_limit, **decoding(args))
        for name, (task, cot) in columns.items()
        if not (task == "bbh" and args.skip_bbh)
    }


def parse_arguments(arguments=None):
    """The command line; what it leaves open comes from the size."""
    parser = argparse.ArgumentParser(
        description="Specialize a T5 towards multi-step math by a teacher's solutions.",
        epilog="Without arguments: the toy world in data/toy, on a CPU.",
    )
    parser.add_argument("--size", choices=SIZES, default="toy", help="the paper's settings for FlanT5 of this size")
    parser.add_argument("--model", help="folder in HF format or hub name, in place of the size's")
    parser.add_argument("--teacher", type=Path, help="teacher records (.jsonl, .jsonl.gz) or the authors' release, a folder")
    parser.add_argument("--data", type=Path, help="folder of the problem sets; what it lacks is downloaded into it")
    parser.add_argument("--name", help="the run's folder under runs/ (default: the size)")
    parser.add_argument("--resume", action="store_true", help="go on with the run of that name and the same arguments")
    parser.add_argument("--plan", action="store_true", help="tell the memory and the steps it would take, and stop")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="data formats to mix")
    parser.add_argument("--loss", choices=["kl", "nll"], default="kl", help="for chains of thought (default: kl)")
    parser.add_argument("--epochs", type=bounded(int, above=0))
    parser.add_argument("--steps", type=bounded(int, above=0), help="optimizer steps at most (default: as the epochs have; toy: 800)")
    parser.add_argument("--optimizer", choices=["adamw", "adafactor"], help="default: adamw, the paper's; xxl: adafactor")
    parser.add_argument("--learning-rate", type=bounded(float, above=0), help="the peak of half a cosine to 0")
    parser.add_argument("--micro-batch", type=bounded(int, above=0), nargs=4, metavar="ROWS", help="rows in each of the four formats")
    parser.add_argument("--accumulation", type=bounded(int, above=0), help="micro-batches a step")
    parser.add_argument("--warmup", type=bounded(int), default=10, help="steps in which the rate rises to the cosine (default: 10)")
    parser.add_argument("--weight-decay", type=bounded(float), default=0.01)
    parser.add_argument("--clip", type=bounded(float, above=0), default=1.0, help="largest gradient norm (default: 1)")
    parser.add_argument("--dropout", type=bounded(float, below=1), help="in place of the checkpoint's")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        help="less memory, a third more time (default: xxl alone)")  # fmt: skip
    parser.add_argument("--checkpoint-every", type=bounded(int, above=0), help="micro-batches between evaluated checkpoints")
    parser.add_argument("--validation-limit", type=bounded(int, above=0), help="problems a set at each checkpoint (default: all)")
    parser.add_argument("--test-limit", type=bounded(int, above=0), help="problems a set for the last table (default: all)")
    parser.add_argument("--skip-bbh", action="store_true", help="do not measure BIG-Bench Hard for the last table")
    parser.add_argument("--eval-batch-size", type=bounded(int, above=0), default=64)
    parser.add_argument("--max-new-tokens", type=bounded(int, above=0))
    parser.add_argument("--log-every", type=bounded(int, above=0), default=10, help="steps between progress lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best there is; toy: cpu")
    parser.add_argument("--threads", type=bounded(int, above=0), help="of the CPU (default: all; toy: 2, its tensors are small)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "bf16-weights"], help="bf16: of matrix products (default "
                        "on CUDA); bf16-weights: of all but the optimizer, half the memory (default: xxl)")  # fmt: skip
    args = parser.parse_args(arguments)
    for key, value in (DEFAULTS | SIZES[args.size]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.formats = list(dict.fromkeys(args.formats))
    if args.device != "cpu" and not (args.plan or device_bytes(args.device)):
        raise InputError(f"--device {args.device}: torch finds none here; --device cpu runs everywhere")
    if args.precision is None:
        old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if args.device == "cuda" and not old else "fp32"
    if args.gradient_checkpointing and args.device == "mps" and args.dropout != 0:
        raise InputError("on MPS torch recomputes with other dropout masks: --gradient-checkpointing needs --dropout 0")
    return args


def make_deterministic(seed):
    """The same seed gives the same weights on the same device, on CUDA as far as torch has kernels that add up in one
    order; it warns of the others."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and finds only bugs


def plan(args):
    """What training would take, told without loading weights: text to print. Lengths are those of the first epoch;
    without a teacher's records they are PAPER_LENGTHS."""
    folder, cot = Path(args.model), [FORMATS[name][0] for name in FORMATS]
    if not folder.is_dir() and args.model != SIZES[args.size]["model"]:
        raise InputError(f"--plan --model {args.model}: no such folder; --plan reads a model's config.json there")
    config = read_config(folder / "config.json", T5Config) if folder.is_dir() else flan_config(args.size)
    if args.teacher:
        tokenizer = Tokenizer(args.model)
        rows, summary = training_rows(tokenizer, args.teacher, args.data, args.formats, args.loss)
        encode, steps_of = schedule(rows, load("gsm8k", "train", args.data), tokenizer, args)
        steps, lengths = len(steps_of(0)), dict.fromkeys(FORMATS, (0, 0))
        for examples in itertools.chain.from_iterable(steps_of(0)):
            name = examples[0][0].format
            size = max(len(source(*example, encode)) for example in examples), max(len(row.labels) for row, _ in examples)
            lengths[name] = tuple(map(max, lengths[name], size))
    else:
        summary, lengths = "With a teacher like the paper's: 207,135 solutions of 7,473 questions", PAPER_LENGTHS
        count = {name: 207135 if FORMATS[name][0] else 7473 for name in args.formats}
        batches = sum(math.ceil(count[name] / size) for name, size in zip(FORMATS, args.micro_batch) if name in count)
        steps = math.ceil(batches / args.accumulation)
    shapes = {
        name: (size, *lengths[name], 5 if args.loss != "nll" and has_cot else 0)
        for name, size, has_cot in zip(FORMATS, args.micro_batch, cot) if name in args.formats
    }  # fmt: skip

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            return batch_loss(model, batch)

    total = min(steps * args.epochs, args.steps or math.inf)
    every = max(1, args.checkpoint_every // args.accumulation)
    return f"""{training_memory(config, shapes, loss, args, weights_dtype(args))}
{summary}.
{total:,} steps of {args.accumulation} micro-batches, {total / steps:.4g} epochs of {steps:,} steps; a checkpoint every {every:,} steps"""


def specialize(args, run):
    """Train, choose a checkpoint, and tell what was gained and lost."""
    torch.set_num_threads(args.threads)
    make_deterministic(args.seed)
    options = {"device": args.device, "dtype": weights_dtype(args)}
    model, tokenizer = load_pretrained(args.model, dropout_rate=args.dropout, **options)
    rows, summary = training_rows(tokenizer, args.teacher, args.data, args.formats, args.loss)
    if any(row.probs is not None for row in rows):
        summary += f"; the least KL these targets allow is {kl_floor(rows):.4f} nats a token (below 0: not all was told)"
    print(f"{summary}. Run: {run}")
    pool = load("gsm8k", "train", args.data)
    for task in MATH:  # fetched and checked now, and not when they are needed
        load(task, "test", args.data)
    for task in [] if args.skip_bbh else bbh_tasks(args.data):
        load(task, "test", args.data)
        bbh_prompt(task, "", True, args.data)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "arguments.json", json.dumps(recorded(args), indent=2) + "\n")
    best = train(model, tokenizer, rows, pool, args, run)

    model = T5.from_pretrained(run / f"checkpoint-{best['step']}", dtype=weights_dtype(args))
    model.save_pretrained(run / "model")
    tokenizer.save(run / "model")
    test = {}
    for name, folder in (("base", args.model), ("specialized", run / "model")):
        with mixed_precision(args):
            test[name] = report(T5.from_pretrained(folder, **options), tokenizer, args)
    print("\n" + table(list(test["base"]), [(name, list(columns.values())) for name, columns in test.items()]))
    print(f"\nCheckpoint of step {best['step']}, the best on the out-of-distribution validation sets: {describe(best)}")
    first, after = (test[name]["gsm8k"].predictions[0] for name in test)
    print(f"\n{first['prompt']}\n  gold: {number_text(first['answer'])}")
    print(f"  base: {first['output']}\n  specialized: {after['output']}\n\nThe model is in {run / 'model'}")
    accuracies = {
        name: {column: [entry.accuracy, entry.stderr, len(entry.predictions)] for column, entry in columns.items()}
        for name, columns in test.items()
    }
    write_whole(run / "results.json", json.dumps({"chosen": best, "test": accuracies}, indent=2) + "\n")


def main():
    """python specialize.py: specialize, or tell what that would take; whatever ends it, say how to go on."""
    args = parse_arguments()
    if args.plan:
        print(plan(args))
        return
    run = find_run(args)
    try:
        specialize(args, run)
    except KeyboardInterrupt:
        again = [part for part in sys.argv if part != "--resume"] + ["--name", run.name] * (args.name is None) + ["--resume"]
        how = f"Go on with: python {shlex.join(again)}" if (run / "arguments.json").exists() else "Nothing was begun."
        print(f"\nstopped. The last checkpoint: {last_checkpoint(run)}. {how}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that cannot be written
        raise InputError(
            f"{error.filename or run}: {error.strerror or error}. The last good checkpoint: {last_checkpoint(run)}; "
            "mend that, and --resume goes on from it"
        ) from None
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory ({str(error).partition('. ')[0]}). --plan tells what a run takes; smaller --micro-batch and "
            "--gradient-checkpointing take less"
        ) from None


if __name__ == "__main__":
    run_command(main)
