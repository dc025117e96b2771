"""Measure speed and memory next to what a user would otherwise run: tests/bench.py [NAME ...]
Both sides take turns. Needs transformers, and real data in REAL_DATA (see conftest.py)."""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from timeit import timeit
from unittest import mock

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared"))
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(REAL_DATA / "tokenizers" / "tiktoken"))
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
sys.path.insert(0, str(ROOT))

from transformers import T5ForConditionalGeneration as Reference
from align import align, shared_characters
from eval import DATASETS, TOY, Task, evaluate, load, math_prompt, math_target
from specialize import FORMATS, Example, collate, kl_loss, make_batches
from t5 import PAD, T5, T5Config, Tokenizer, load_pretrained, pad_sequences

SHAPES = {"small": dict(d_model=512, d_ff=1024, num_layers=8, num_heads=6),  # FlanT5's
          "base": dict(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
          "large": dict(d_model=1024, d_ff=2816, num_layers=24, num_heads=16)}
V = 32128

def tensor_peak(function):
    """Return the most memory (MB) that a call's tensors take beyond what existed before."""
    with torch.profiler.profile(profile_memory=True) as record:
        function()
    record.export_chrome_trace(f"{scratch}/trace.json")
    trace = json.loads(Path(scratch, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in trace if e["name"] == "[memory]")
    return max(np.cumsum([size for _, size in changes])) / 1e6

def compare(what, ours, theirs, target, repeat=1, count=1, measure=None):
    """Measure two functions in turns; print the medians, per one of `count`, and their ratio."""
    measure = measure or (lambda function: 1000 * timeit(function, number=1))  # ms
    values = [(measure(ours), measure(theirs)) for _ in range(repeat)]
    mine, reference = np.median(values, axis=0) / count
    print(f"{what:<50}{mine:>10,.1f}{reference:>11,.1f}{reference / mine:>7.1f}x   {target}")

def random_model(shape):
    """Return a FlanT5 with random weights."""
    return T5(T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape))

def random_example(source, labels, problem=None):
    """Return an example whose teacher reports the labels and four random tokens."""
    ids = np.column_stack([labels, np.random.default_rng(0).integers(3, V, (len(labels), 4))])
    probs = np.full(ids.shape, 0.2, np.float32)
    return Example("zero_shot_cot", problem, np.array(source), np.array(labels), ids, probs)

def dense_loss(logits, ids, probs, mask):
    """Compute kl_loss as the paper's authors do, with a dense teacher (B, T, V)."""
    p = torch.zeros_like(logits).scatter_add_(-1, ids, probs)
    kl = torch.xlogy(p, p) - p * logits.softmax(-1).log()
    return (kl.sum(-1) * mask).sum() / mask.sum()

def forward_backward(model, batch, loss):
    """Run a pass of training."""
    output = model(batch["input_ids"], batch["input_ids"] != PAD, batch["decoder_input_ids"])
    logits = output if isinstance(model, T5) else output.logits
    loss(logits, batch["teacher_ids"], batch["teacher_probs"], batch["loss_mask"]).backward()

def bench_train(repeat, tokenizer, problems):
    """Train on 48 solutions in micro-batches of 8, with dropout and AdamW, in fp32. The reference
    takes them in their order; collate() pads for both."""
    examples = [random_example(tokenizer.encode(math_prompt(problem.question, cot=True)),
                               tokenizer.encode(math_target(problem, cot=True)), problem)
                for problem in problems[:48]]
    batches = make_batches(examples, problems, tokenizer, dict.fromkeys(FORMATS.values(), 8),
                           dict.fromkeys(FORMATS.values(), 1), 0, 0)
    random_model(SHAPES["small"]).save_pretrained(f"{scratch}/small")
    models = [kind.from_pretrained(f"{scratch}/small").train() for kind in (T5, Reference)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in models]

    def epoch(side, batches, loss):
        for batch in batches:
            forward_backward(models[side], collate(batch, "cpu"), loss)
            optimizers[side].step()
            optimizers[side].zero_grad()

    compare("train, ms per example / transformers, dense loss", lambda: epoch(0, batches, kl_loss),
            lambda: epoch(1, [examples[i : i + 8] for i in range(0, 48, 8)], dense_loss),
            "1.3x", repeat, count=48)

def bench_loss(repeat, *_):
    """Compute a loss and its gradient: B 8, T 96, V 32,128."""
    logits, mask = torch.randn(8, 96, V, requires_grad=True), torch.ones(8, 96)
    ids, probs = torch.randint(0, V, (8, 96, 5)), torch.full((8, 96, 5), 0.2)
    ours, theirs = (lambda loss=loss: torch.autograd.grad(loss(logits, ids, probs, mask), logits)
                    for loss in (kl_loss, dense_loss))
    compare("kl_loss, ms / dense loss", ours, theirs, "2.5x", repeat)
    compare("kl_loss, MB / dense loss", ours, theirs, "1.6x", measure=tensor_peak)

def bench_evaluate(repeat, *_):
    """Evaluate the toy's largest model. The reference takes 64 problems at a time, in order."""
    (model, tokenizer), outputs = load_pretrained(TOY / "tuned-1M"), {}
    their_model = Reference.from_pretrained(TOY / "tuned-1M", dtype=torch.float32)
    tasks = [Task(name, TOY) for name in [*DATASETS, "bbh"]] + [Task("bbh", TOY, cot=False)]

    def ours():
        evaluations = [evaluate(model, tokenizer, task, max_new_tokens=64) for task in tasks]
        outputs["ours"] = [p["output"] for e in evaluations for p in e.predictions]

    def theirs():
        outputs["theirs"] = []
        for inputs in ([tokenizer.encode(row[2]) for row in task.problems()] for task in tasks):
            for start in range(0, len(inputs), 64):
                ids = pad_sequences(inputs[start : start + 64])
                answers = their_model.generate(ids, attention_mask=ids != PAD, max_new_tokens=64)
                outputs["theirs"].extend(map(tokenizer.decode, answers))

    compare("evaluate, ms / transformers", ours, theirs, "1.8x", repeat)
    differing = [a != b for a, b in zip(outputs["ours"], outputs["theirs"], strict=True)]
    print(f"  {sum(differing)} of {len(differing):,} outputs differ")

def bench_load(repeat, *_):
    """Load base's shape, from the start of a process, and read every weight once."""
    random_model(SHAPES["base"]).save_pretrained(f"{scratch}/base")
    code = "from {} as T5; [weight.sum() for weight in T5.from_pretrained({!r}).parameters()]"
    ours, theirs = ([sys.executable, "-c", code.format(kind, f"{scratch}/base")] for kind in
                    ("t5 import T5", "transformers import T5ForConditionalGeneration"))
    compare("load base, ms / transformers", lambda: subprocess.run(ours, cwd=ROOT, check=True),
            lambda: subprocess.run(theirs, check=True), "", repeat)

def bench_align(repeat, tokenizer, problems):
    """Align p50k_base's tokens of 100 solutions with T5's. The reference is the recursion as the
    header of align.py has it, cell by cell, and stops before the path is traced back."""
    encoding = tiktoken.get_encoding("p50k_base")
    pairs = [([encoding.decode([i]) for i in encoding.encode(problem.solution)],
              tokenizer.split(problem.solution)) for problem in problems[:100]]

    def plain(teacher, student):
        c, f = (np.zeros((len(teacher) + n, len(student) + n)) for n in (0, 1))
        np.add.at(c, shared_characters(teacher, student), -1)
        f[1:, 0] = f[0, 1:] = np.inf
        for i, j in np.ndindex(c.shape):
            f[i + 1, j + 1] = min(f[i, j], f[i, j + 1], f[i + 1, j]) + c[i, j]

    ours, theirs = (lambda f=f: [f(*pair) for pair in pairs] for f in (align, plain))
    compare("align, ms per solution / cell by cell", ours, theirs, "10x", repeat, count=100)

def bench_peak(*_):
    """Print the GB of training: the state, by arithmetic, and what a pass of 4 x (900 + 100) tokens
    adds in fp32. That is linear in the layers, so two and three of them are measured."""
    batch = collate(4 * [random_example(900 * [5], 100 * [5])], "cpu")
    # As a GPU's attention does, recompute the probabilities (B, H, n, m) rather than keep them.
    frugal = functools.partial(checkpoint, F.scaled_dot_product_attention, use_reentrant=False)

    def pass_peak(shape, checkpointing):
        model = random_model(shape).train()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = checkpointing
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # part of the state
        with mock.patch.object(F, "scaled_dot_product_attention", frugal):
            return tensor_peak(lambda: forward_backward(model, batch, kl_loss)) / 1000

    print("GB         adamw  bf16-weights  adafactor  both  a pass  with --gradient-checkpointing")
    for size, shape in SHAPES.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in random_model(shape).parameters()) / 1e9
        cells = [count * bytes_each for bytes_each in (16, 12, 8, 4)]
        for checkpointing in (False, True):
            two, three = (pass_peak(shape | {"num_layers": n}, checkpointing) for n in (2, 3))
            cells.append(two + (shape["num_layers"] - 2) * (three - two))
        print("{:<6}{:10.1f}{:14.1f}{:11.1f}{:6.1f}{:8.1f}{:27.1f}".format(size, *cells))

def main():
    """Print a row per comparison."""
    benchmarks = {name[6:]: f for name, f in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(benchmarks)} (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--repeat", type=int, default=3, help="number of repetitions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of started processes
    tokenizer = Tokenizer(REAL_DATA / "tokenizers" / "t5")
    problems = load("gsm8k", "train", REAL_DATA / "datasets")
    print(f"{args.threads} threads{'this code':>51}{'reference':>11}{'ratio':>8}   target")
    for name in args.names or benchmarks:
        torch.manual_seed(0)
        benchmarks[name](args.repeat, tokenizer, problems)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main()
