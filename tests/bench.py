"""Compare speed and memory with other implementations in one run.

    python tests/bench.py                        everything; about a quarter of an hour
    python tests/bench.py decode loading         two of the benchmarks

Every ratio is that of two medians over repetitions in which both sides take turns, so that a slow
spell of the machine meets both. A ratio that misses its target fails nothing: this is not a test.
The references are transformers, CTranslate2 and the Rust package spacy-alignments (pip install
transformers ctranslate2 spacy-alignments); a benchmark whose reference is not installed is left
out. REAL_DATA (see conftest.py) must contain T5's vocabulary and GSM8K.

All models have random weights and, unless a row names another, the shape of flan-t5-small. Both
sides read the same file and run in this process with the same number of threads. CTranslate2 has a
process of its own, because it brings another OpenMP, and two of them slow each other down.

OpenMP's threads wait between products as its own defaults say, for both sides: torch is imported
before t5, whose settings for a busy machine then come too late, here and in the processes started
from here. To measure with these settings, run it with OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
CHILD_ENVIRONMENT = dict(os.environ)  # for started processes: without what t5 adds

import torch
import torch.nn.functional as F
from conftest import REAL_DATA, ROOT
from torch.profiler import ProfilerActivity, profile

import numpy as np
from align import align_batch, normalize
from eval import evaluate, load, math_prompt, math_target
from specialize import FORMATS, SIZES, Record, batch_loss, build_examples, encode_prompt, kl_loss
from specialize import make_batches, make_optimizer
from t5 import EOS, PAD, T5, T5Config, Tokenizer, UserError, packed_weights, pad_sequences

# d_model, d_kv, d_ff, num_layers, num_heads of FlanT5
SHAPES = {"small": (512, 64, 1024, 8, 6), "base": (768, 64, 2048, 12, 12)}
DATASETS, T5_VOCABULARY = REAL_DATA / "datasets", REAL_DATA / "tokenizers" / "t5"
scratch = tempfile.TemporaryDirectory()  # for models; deleted at exit

# --- measuring ---

def medians(*functions, repeat):
    """Return the median seconds of each function over repetitions in which they take turns."""
    times = []
    for _ in range(repeat):
        for function in functions:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (repeat, -1)), axis=0).tolist()

def tensor_peak(function):
    """Return the most memory (bytes) that a call's tensors took beyond what existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]))

def seconds(value):
    """Format a time."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"

def speedup(what, ours, theirs, target):
    """Return a row of the table: how many times as fast as a reference."""
    return what, seconds(ours), seconds(theirs), f"{theirs / ours:.2f}x", target

def megabytes(value):
    """Format an amount of memory."""
    return f"{value / 1e6:.0f} MB"

def share(what, ours, theirs, unit, target):
    """Return a row of the table: which share of a reference's time or memory is needed."""
    return what, unit(ours), unit(theirs), f"{ours / theirs:.2f}", target

def note(text):
    """Return a row of the table that only holds a sentence."""
    return text, "", "", "", ""

# --- models and sources ---

@functools.cache
def checkpoint(size):
    """Return a folder with a random model whose greedy decoding never ends by itself.

    It is saved by transformers, so the order of its tensors is that of the hub's files.
    """
    import transformers

    d_model, d_kv, d_ff, num_layers, num_heads = SHAPES[size]
    config = T5Config(d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_layers=num_layers,
                      num_heads=num_heads, feed_forward_proj="gated-gelu",
                      tie_word_embeddings=False)
    torch.manual_seed(0)
    folder = Path(scratch.name) / size
    model = T5(config)
    model.lm_head.weight.data[EOS] = 0
    model.save_pretrained(folder)
    transformers.logging.disable_progress_bar()
    transformers.T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
    Tokenizer(T5_VOCABULARY).save(folder)
    return folder

def both_models(dtype=torch.float32):
    """Return the small model here and in transformers."""
    folder = checkpoint("small")
    from transformers import T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return T5.from_pretrained(folder, dtype=dtype), theirs

def random_ids(B=8, S=256):
    """Draw ids (B, S) without padding."""
    return torch.randint(3, 32000, (B, S), generator=torch.Generator().manual_seed(1))

def cpu_has_bf16():
    """Return whether the CPU multiplies bf16 matrices by AVX512-BF16."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)

# --- training and decoding ---

def bench_train(args):
    """Time forward pass, backward pass, clipping and AdamW, with dropout: B 8, S 256, T 96."""
    sources, labels = random_ids(), random_ids(S=96)
    batch = {"input_ids": sources, "labels": labels, "loss_mask": labels != PAD,
             "decoder_input_ids": F.pad(labels, (1, -1), value=PAD)}

    def our_loss(model):
        return batch_loss(model, batch, "nll")

    def their_loss(model):
        return model(input_ids=sources, attention_mask=sources != PAD, labels=labels).loss

    def training_step(model, loss_of, bf16=False):
        optimizer = make_optimizer(model.train().parameters(), "adamw", 0.01)

        def step():
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()  # creates the optimizer's state
        return step

    model, reference = both_models()
    ours, theirs = training_step(model, our_loss), training_step(reference, their_loss)
    times = medians(ours, theirs, repeat=args.repeat)
    yield speedup("training step, fp32 / transformers", *times, "1.5x")
    if not cpu_has_bf16():
        yield note("training step, bf16: left out, this CPU has no AVX512-BF16")
        return
    autocast = training_step(both_models()[0], our_loss, bf16=True)
    times = medians(autocast, ours, repeat=args.repeat)
    yield speedup("training step, bf16 autocast / own fp32", *times, "")

def bench_decode(args):
    """Time greedy decoding: B 8, S 256, 64 tokens. Weights are packed before, as by evaluate()."""
    sources = random_ids()
    options = {"attention_mask": torch.ones_like(sources), "max_new_tokens": 64,
               "min_new_tokens": 64, "do_sample": False}
    for dtype, name, target in ((torch.float32, "fp32", "1.3x"), (torch.bfloat16, "bf16", "")):
        if name == "bf16" and not cpu_has_bf16():
            yield note("decoding, bf16: left out, this CPU has no AVX512-BF16")
            continue
        model, reference = both_models(dtype)
        ours = functools.partial(model.generate, sources, max_new_tokens=64)
        theirs = functools.partial(reference.generate, sources, **options)
        with packed_weights(model.decoder, model.lm_head):
            times = medians(ours, theirs, repeat=args.repeat)
            yield speedup(f"decoding, {name} / transformers, {name}", *times, target)
            if name == "fp32" and importlib.util.find_spec("ctranslate2"):
                with ctranslate2(sources, args.threads) as theirs:
                    times = medians(ours, theirs, repeat=args.repeat)
                yield speedup("decoding, fp32 / CTranslate2, fp32, in its own process", *times, "")
            elif name == "fp32":
                yield note("decoding / CTranslate2: left out, ctranslate2 is not installed")

CTRANSLATE2 = """
import json, sys, ctranslate2
folder, threads = sys.argv[1], int(sys.argv[2])
translator = ctranslate2.Translator(folder, compute_type="float32", intra_threads=threads)
tokens = json.loads(sys.stdin.readline())
for request in sys.stdin:
    translator.translate_batch(tokens, beam_size=1, max_input_length=0,
                               min_decoding_length=64, max_decoding_length=64)
    print("done", flush=True)
"""

@contextmanager
def ctranslate2(sources, threads):
    """Context manager: a function that decodes 64 tokens in a process that runs CTranslate2."""
    folder = Path(scratch.name) / "ctranslate2"
    pieces = Tokenizer(T5_VOCABULARY).pieces
    convert = [sys.executable, "-m", "ctranslate2.converters.transformers",
               "--model", checkpoint("small"), "--output_dir", folder]
    subprocess.run(convert, capture_output=True, env=CHILD_ENVIRONMENT, check=True)
    command = [sys.executable, "-c", CTRANSLATE2, folder, str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=CHILD_ENVIRONMENT) as process:

        def translate(request="translate"):
            process.stdin.write(request + "\n")
            process.stdin.flush()
            if process.stdout.readline() != "done\n":
                raise RuntimeError("CTranslate2's process has ended")

        tokens = json.dumps([[pieces[i] for i in row] for row in sources.tolist()])
        translate(f"{tokens}\ntranslate")  # once untimed, because it loads the model first
        yield translate

def force_ends(ends):
    """Return a logits processor for (B, t) ids: row b ends with its token number ends[b].

    The first token of a row is made to be 100 + b, which identifies the row later on.
    """

    def process(ids, logits):
        t, rows = ids.shape[1], torch.arange(len(logits))
        logits[:, EOS] = -1e9
        if t == 0:
            logits[rows, 100 + rows] = 1e9
        else:
            logits[ends[ids[:, 0] - 100] == t + 1, EOS] = 1e9
        return logits

    return process

def transformers_generate(model, sources, process, max_new_tokens):
    """Decode greedily by transformers with a logits processor of force_ends()."""
    processors = [lambda ids, logits: process(ids[:, 1:], logits)]  # without the start token
    return model.generate(sources, attention_mask=sources != PAD, max_new_tokens=max_new_tokens,
                          do_sample=False, logits_processor=processors)

def bench_ends(args):
    """Time decoding of 256 tokens: B 32, 64 to 256 source tokens, ends at 8 to 256 tokens."""
    B = 32
    lengths = torch.linspace(64, 256, B).long()
    sources = random_ids(B).where(torch.arange(256) < lengths[:, None], PAD)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    process = force_ends(torch.linspace(8, 256, B).long()[order])
    model, reference = both_models()
    with packed_weights(model.decoder, model.lm_head):
        times = medians(
            lambda: model.generate(sources, max_new_tokens=256, logits_processor=process),
            lambda: transformers_generate(reference, sources, process, 256), repeat=args.repeat)
    yield speedup("256 tokens, B 32, ends spread / transformers", *times, "2x")

def bench_evaluation(args):
    """Time an evaluation with four demonstrations: B 32, 128 new tokens.

    Outputs are made to end where the test set's own solutions end. The plain loop takes the
    problems in the order of the file, and each of its batches runs until its last row ends.
    """
    tokenizer = Tokenizer(T5_VOCABULARY)
    problems = load("gsm8k", "test", DATASETS)[: args.problems]
    demonstrations = load("gsm8k", "train", DATASETS)[:4]
    prompt = functools.partial(math_prompt, cot=True, demonstrations=demonstrations)
    inputs = [tokenizer.encode(prompt(problem.question)) for problem in problems]
    ends = [len(tokenizer.encode(problem.solution)) for problem in problems]
    end_of = {tuple(ids): end for ids, end in zip(inputs, ends)}
    model, reference = both_models()
    generate = model.generate

    def generate_until_ends(sources, **options):  # evaluate() has its own order of the problems
        rows = [row[row != PAD] for row in sources]
        process = force_ends(torch.tensor([end_of[tuple(row.tolist())] for row in rows]))
        return generate(sources, **options, logits_processor=process)

    model.generate = generate_until_ends

    def ours():
        evaluate(model, tokenizer, problems, prompt, batch_size=32, max_new_tokens=128)

    def plain_loop():
        for start in range(0, len(problems), 32):
            batch = slice(start, start + 32)
            process = force_ends(torch.tensor(ends[batch]))
            for ids in transformers_generate(reference, pad_sequences(inputs[batch]), process, 128):
                tokenizer.decode(ids)

    times = medians(ours, plain_loop, repeat=args.repeat)
    what = f"evaluation, {len(problems)} GSM8K problems / a plain transformers loop"
    yield speedup(what, *times, "1.8x")

# --- loading, losses, alignment, padding ---

REPORT = """
import time
ready = time.time()
try:
    kilobytes = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
except OSError:  # not Linux
    kilobytes = "nan"
print(ready, kilobytes)
"""

def bench_loading(args):
    """Time from the start of a process to a loaded model of flan-t5-base's shape.

    The peak memory is read from /proc, so it needs Linux.
    """
    folder = checkpoint("base")
    model_class = "from t5 import T5", "from transformers import T5ForConditionalGeneration as T5"
    codes = [f"{line}; T5.from_pretrained({str(folder)!r})" for line in model_class]
    codes.append("import torch")
    times, peaks = [], []
    for _ in range(args.repeat + 1):
        for code in codes:
            start = time.time()
            done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True,
                                  cwd=ROOT, text=True, env=CHILD_ENVIRONMENT, check=True)
            ready, kilobytes = done.stdout.split()
            times.append(float(ready) - start)
            peaks.append(1024 * float(kilobytes))
    # The first repetition may have read the file from the disk, so it does not count.
    ours, theirs, torch_import = np.median(np.reshape(times, (-1, 3))[1:], axis=0)
    what = f"loading base's shape ({seconds(torch_import)}: import torch) / transformers"
    yield speedup(what, ours, theirs, "3x")
    size = (folder / "model.safetensors").stat().st_size
    yield share("loading, peak memory of the process / the file", peaks[-3], size, megabytes, "")

def bench_loss(args):
    """Time kl_loss and a loss with a dense teacher, both passes: B 8, T 96, V 32,128."""
    torch.manual_seed(0)
    logits = torch.randn(8, 96, 32128, requires_grad=True)
    ids, probs = torch.randint(0, 32128, (8, 96, 5)), torch.rand(8, 96, 5) / 5
    mask = torch.ones(8, 96, dtype=torch.bool)

    def ours():
        kl_loss(logits, ids, probs, mask).backward()
        logits.grad = None

    def dense():
        p = torch.zeros(8, 96, 32128).scatter_add_(-1, ids, probs)
        q = logits.softmax(-1)
        (torch.xlogy(p, p) - p * q.log()).sum(-1).mean().backward()
        logits.grad = None

    times = medians(ours, dense, repeat=3 * args.repeat)
    yield share("kl_loss, time / dense", *times, seconds, "0.3")
    peaks = tensor_peak(ours), tensor_peak(dense)
    yield share("kl_loss, extra memory / dense", *peaks, megabytes, "0.3")

def bench_align(args):
    """Time the alignment of 2,000 GSM8K solutions with p50k_base; both sides use one core."""
    import spacy_alignments
    import tiktoken

    teacher, student = tiktoken.get_encoding("p50k_base"), Tokenizer(T5_VOCABULARY)
    texts = [problem.solution for problem in load("gsm8k", "train", DATASETS)[:2000]]
    pairs = [([teacher.decode([i]) for i in teacher.encode(text)], student.split(text))
             for text in texts]
    equal_texts = [(s, [piece.replace("▁", " ") for piece in t]) for s, t in pairs]

    def ours():
        normalize.cache_clear()
        align_batch(pairs)

    def theirs(pairs):
        for s, t in pairs:
            spacy_alignments.get_alignments(s, t)

    functions = ours, lambda: theirs(pairs), lambda: theirs(equal_texts)
    times = np.array(medians(*functions, repeat=3 * args.repeat)) / len(pairs)
    yield speedup("align_batch, per GSM8K solution / spacy-alignments", *times[:2], "1.3x")
    what = "  the same / spacy-alignments on pieces with ▁ as a space"
    yield speedup(what, times[0], times[2], "1.3x")

def bench_padding(args):
    """Count the padding in an epoch's micro-batches of the paper's size for base."""
    tokenizer, pool = Tokenizer(T5_VOCABULARY), load("gsm8k", "train", DATASETS)
    solved = [replace(problem, solution=math_target(problem, cot=True)) for problem in pool]
    records = [Record(problem, None, "GSM8K") for problem in solved]
    examples, _ = build_examples(records, tokenizer, FORMATS, "nll")
    encode = functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))
    sizes = dict(zip(FORMATS, SIZES["base"]["micro_batch_size"]))
    used, total = np.zeros(2), np.zeros(2)  # of inputs, of targets
    for batch in make_batches(examples, pool, encode, sizes, seed=0, epoch=0):
        lengths = np.array([(len(encode_prompt(*pair, encode)), len(pair[0].labels))
                            for pair in batch])
        used += lengths.sum(axis=0)
        total += lengths.max(axis=0) * len(batch)
    yield "padding, share of all tokens", "", "", f"{1 - used.sum() / total.sum():.1%}", "10%"
    yield "  share of the targets' tokens", "", "", f"{1 - used[1] / total[1]:.1%}", ""

# --- the command ---

BENCHMARKS = {
    "train": bench_train, "decode": bench_decode, "ends": bench_ends,
    "evaluation": bench_evaluation, "loading": bench_loading, "loss": bench_loss,
    "align": bench_align, "padding": bench_padding,
}

def main():
    """Print a table with a row per comparison."""
    parser = argparse.ArgumentParser(description="Compare speed with other implementations.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    add("--threads", type=int, default=2, help="number of CPU threads (default: %(default)s)")
    add("--repeat", type=int, default=3, help="repetitions (default: %(default)s)")
    add("--problems", type=int, default=200, help="evaluated problems (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    CHILD_ENVIRONMENT["OMP_NUM_THREADS"] = str(args.threads)
    waiting = CHILD_ENVIRONMENT.get("OMP_WAIT_POLICY", "OpenMP's default")
    print(f"{args.threads} threads, which wait by {waiting}; torch {torch.__version__}")
    print(f"{'ours / reference':<62}{'ours':>9}{'reference':>11}{'ratio':>8}  target")
    for name in args.names or BENCHMARKS:
        try:
            for what, ours, theirs, ratio, target in BENCHMARKS[name](args):
                print(f"{what:<62}{ours:>9}{theirs:>11}{ratio:>8}  {target}", flush=True)
        except (ImportError, UserError) as error:
            print(f"{name}: left out, {error}")

if __name__ == "__main__":
    main()
