"""Compare speed and memory with other implementations in one run.

    python tests/bench.py                    everything, about a quarter of an hour
    python tests/bench.py decode loading     two of the benchmarks

Every ratio is that of two medians over repetitions in which both sides take turns. The references
are transformers, CTranslate2 and the Rust package spacy-alignments; a benchmark whose reference is
not installed is left out. REAL_DATA (see conftest.py) must contain T5's vocabulary and GSM8K.

Models have random weights and flan-t5-small's shape unless a row names another. Both sides read the
same file and run in this process with the same number of threads. Only CTranslate2 has a process of
its own, because it brings a second OpenMP, and two of them in one process slow each other down.

Threads wait for work as OpenMP does by default, on both sides: torch is imported before t5, so t5's
settings for a busy machine come too late, and started processes do not inherit them. To measure
both sides with these settings, set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=1000.
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
from contextlib import closing
from dataclasses import replace
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
ENVIRONMENT = dict(os.environ)  # of started processes: without what t5 sets

import torch  # before conftest, which imports t5
import torch.nn.functional as F
from conftest import REAL_DATA, ROOT

import numpy as np
from align import align_batch, normalize
from eval import evaluate, load, math_prompt, math_target
from specialize import FORMATS, SIZES, Record, batch_loss, build_examples, encode_prompt, kl_loss
from specialize import make_batches, make_optimizer
from t5 import EOS, PAD, T5, T5Config, Tokenizer, UserError, packed_weights, pad_sequences

SHAPES = {"small": dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6),
          "base": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12)}
VOCABULARY, DATASETS = REAL_DATA / "tokenizers" / "t5", REAL_DATA / "datasets"
BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # the CPU multiplies in bf16
scratch = tempfile.TemporaryDirectory()  # for models

# --- measuring ---

def medians(*functions, repeat):
    """Return the median seconds of each function; they take turns."""
    times = []
    for _ in range(repeat):
        for function in functions:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (repeat, -1)), axis=0).tolist()

def tensor_peak(function):
    """Return the most memory (bytes) that a call's tensors took beyond what existed before."""
    with torch.profiler.profile(profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]))

def row(what, ours="", theirs="", ratio="", target=""):
    """Print a row of the table."""
    print(f"{what:<62}{ours:>9}{theirs:>11}{ratio:>7}  {target}", flush=True)

def speedup_row(what, ours, theirs, target=""):
    """Print how many times as fast as a reference this code is."""
    row(what, seconds(ours), seconds(theirs), f"{theirs / ours:.2f}x", target)

def seconds(value):
    """Format a time."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"

def megabytes(value):
    """Format an amount of memory."""
    return f"{value / 1e6:.0f} MB"

# --- training and decoding ---

@functools.cache
def checkpoint(size):
    """Return a folder with a random model whose greedy decoding never ends by itself.

    transformers saves it, so that its tensors are in the order of the files on the hub."""
    from transformers import T5ForConditionalGeneration, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model, folder = T5(T5Config(**SHAPES[size], **kind)), Path(scratch.name) / size
    model.lm_head.weight.data[EOS] = 0
    model.save_pretrained(folder)
    T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
    Tokenizer(VOCABULARY).save(folder)
    return folder

def both_models(dtype=torch.float32):
    """Return the small model here and in transformers."""
    from transformers import T5ForConditionalGeneration

    folder = checkpoint("small")
    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return T5.from_pretrained(folder, dtype=dtype), theirs.eval()

def random_ids(B=8, S=256):
    """Draw ids (B, S) without padding."""
    return torch.randint(3, 32000, (B, S), generator=torch.Generator().manual_seed(1))

def bench_train(args):
    """Time forward pass, backward pass, clipping and AdamW, with dropout: B 8, S 256, T 96."""
    sources, labels = random_ids(), random_ids(S=96)
    batch = {"input_ids": sources, "labels": labels, "loss_mask": labels != PAD,
             "decoder_input_ids": F.pad(labels, (1, -1), value=PAD)}

    def our_loss(model):
        return batch_loss(model, batch, "nll")

    def their_loss(model):
        return model(input_ids=sources, attention_mask=sources != PAD, labels=labels).loss

    def training_step(model, loss, bf16=False):
        optimizer = make_optimizer(model.train().parameters(), "adamw", 0.01)

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss(model)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()  # creates the optimizer's state
        return step

    models = both_models()
    ours, theirs = training_step(models[0], our_loss), training_step(models[1], their_loss)
    times = medians(ours, theirs, repeat=args.repeat)
    speedup_row("training step, fp32 / transformers", *times, "1.5x")
    if BF16:
        autocast = training_step(both_models()[0], our_loss, bf16=True)
        times = medians(autocast, ours, repeat=args.repeat)
        speedup_row("training step, bf16 autocast / own fp32", *times)
    else:
        row("training step, bf16: left out, this CPU has no AVX512-BF16")

def bench_decode(args):
    """Time greedy decoding: B 8, S 256, 64 tokens. Weights are packed before, as by evaluate()."""
    sources = random_ids()
    options = {"attention_mask": torch.ones_like(sources), "max_new_tokens": 64,
               "min_new_tokens": 64, "do_sample": False}

    def decode(dtype, what, target="", translate=None):
        model, reference = both_models(dtype)
        functions = [lambda: model.generate(sources, max_new_tokens=64),
                     translate or (lambda: reference.generate(sources, **options))]
        with packed_weights(model.decoder, model.lm_head):
            speedup_row(what, *medians(*functions, repeat=args.repeat), target)

    decode(torch.float32, "decoding, fp32 / transformers", "1.3x")
    if BF16:
        decode(torch.bfloat16, "decoding, bf16 weights / transformers, bf16 weights")
    else:
        row("decoding, bf16: left out, this CPU has no AVX512-BF16")
    if importlib.util.find_spec("ctranslate2"):
        with closing(ctranslate2(sources, args.threads)) as process:
            what = "decoding, fp32 / CTranslate2 in its own process, fp32"
            decode(torch.float32, what, translate=lambda: next(process))
    else:
        row("decoding / CTranslate2: left out, ctranslate2 is not installed")

def ctranslate2(sources, threads):
    """Start a process with CTranslate2; each next() lets it decode 64 tokens per source."""
    folder, pieces = Path(scratch.name) / "ctranslate2", Tokenizer(VOCABULARY).pieces
    convert = [sys.executable, "-m", "ctranslate2.converters.transformers",
               "--model", checkpoint("small"), "--output_dir", folder]
    subprocess.run(convert, capture_output=True, env=ENVIRONMENT, check=True)
    code = """if True:
        import ctranslate2, json, sys
        translator = ctranslate2.Translator(sys.argv[1], intra_threads=int(sys.argv[2]))
        sources = json.loads(sys.stdin.readline())
        for line in sys.stdin:
            translator.translate_batch(sources, beam_size=1, max_input_length=0,
                                       min_decoding_length=64, max_decoding_length=64)
            print(flush=True)"""
    with subprocess.Popen([sys.executable, "-c", code, folder, str(threads)], text=True, bufsize=1,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        tokens = [[pieces[i] for i in row] for row in sources.tolist()]
        process.stdin.write(json.dumps(tokens) + "\n")
        while process.stdin.write("translate\n") and process.stdout.readline():
            yield

def force_ends(ends):
    """Return a logits processor for ids (B, t) that ends row b with its token number ends[b].

    It makes the first token of row b 100 + b, which identifies the row later."""

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
    """Decode greedily by transformers with a processor from force_ends()."""
    processors = [lambda ids, logits: process(ids[:, 1:], logits)]  # without the start token
    return model.generate(sources, attention_mask=sources != PAD, max_new_tokens=max_new_tokens,
                          do_sample=False, logits_processor=processors)

def bench_ends(args):
    """Time decoding of 256 tokens: B 32, 64 to 256 source tokens, ends at 8 to 256 tokens."""
    B = 32
    sources = random_ids(B).where(torch.arange(256) < torch.linspace(64, 256, B)[:, None], PAD)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    process = force_ends(torch.linspace(8, 256, B).long()[order])
    model, reference = both_models()
    with packed_weights(model.decoder, model.lm_head):
        times = medians(
            lambda: model.generate(sources, max_new_tokens=256, logits_processor=process),
            lambda: transformers_generate(reference, sources, process, 256), repeat=args.repeat)
    speedup_row("256 tokens, B 32, ends spread / transformers", *times, "2x")

def bench_evaluation(args):
    """Time an evaluation with four demonstrations: B 32, 128 new tokens.

    Outputs are made to end where the test set's own solutions end. The plain loop takes the
    problems in the order of the file, and each of its batches runs until its last row ends."""
    tokenizer = Tokenizer(VOCABULARY)
    problems = load("gsm8k", "test", DATASETS)[: args.problems]
    demonstrations = load("gsm8k", "train", DATASETS)[:4]
    prompt = functools.partial(math_prompt, cot=True, demonstrations=demonstrations)
    inputs = [tokenizer.encode(prompt(problem.question)) for problem in problems]
    ends = [len(tokenizer.encode(problem.solution)) for problem in problems]
    end_of = {tuple(ids): end for ids, end in zip(inputs, ends)}
    model, reference = both_models()
    generate = model.generate

    def generate_until_ends(sources, **options):  # evaluate() has its own order of the problems
        rows = [tuple(ids[ids != PAD].tolist()) for ids in sources]
        process = force_ends(torch.tensor([end_of[ids] for ids in rows]))
        return generate(sources, **options, logits_processor=process)

    def ours():
        evaluate(model, tokenizer, problems, prompt, batch_size=32, max_new_tokens=128)

    def plain_loop():
        for start in range(0, len(problems), 32):
            batch = slice(start, start + 32)
            process = force_ends(torch.tensor(ends[batch]))
            for ids in transformers_generate(reference, pad_sequences(inputs[batch]), process, 128):
                tokenizer.decode(ids)

    model.generate = generate_until_ends
    what = f"evaluation, {len(problems)} GSM8K problems / a plain transformers loop"
    speedup_row(what, *medians(ours, plain_loop, repeat=args.repeat), "1.8x")

# --- loading, loss, alignment, padding ---

def bench_loading(args):
    """Time from the start of a process to a loaded model of flan-t5-base's shape.

    The peak memory is read from /proc, so that row needs Linux."""
    folder = checkpoint("base")

    def run(code):
        command = [sys.executable, "-c", f"import os; {code}; os._exit(0)"]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True,
                              capture_output=True, text=True).stdout

    ours = f"from t5 import T5; T5.from_pretrained({str(folder)!r})"
    theirs = ours.replace("t5 import T5", "transformers import T5ForConditionalGeneration as T5")
    codes = ours, theirs, "import torch"
    run(theirs)  # reads the file from the disk
    functions = [functools.partial(run, code) for code in codes]
    *times, torch_import = medians(*functions, repeat=args.repeat)
    what = f"loading base's shape ({seconds(torch_import)}: import torch) / transformers"
    speedup_row(what, *times, "3x")
    if Path("/proc/self/status").exists():
        status = run(ours + "; print(open('/proc/self/status').read(), flush=True)")
        peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
        size = (folder / "model.safetensors").stat().st_size
        what = "loading, peak memory of the process / size of the file"
        row(what, megabytes(peak), megabytes(size), f"{peak / size:.2f}")

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

    a, b = medians(ours, dense, repeat=3 * args.repeat)
    row("kl_loss, time / dense", seconds(a), seconds(b), f"{a / b:.2f}", "0.3")
    a, b = tensor_peak(ours), tensor_peak(dense)
    row("kl_loss, extra memory / dense", megabytes(a), megabytes(b), f"{a / b:.2f}", "0.3")

def bench_align(args):
    """Time the alignment of 2,000 GSM8K solutions, one by one as in training, on one core."""
    import spacy_alignments
    import tiktoken

    teacher, student = tiktoken.get_encoding("p50k_base"), Tokenizer(VOCABULARY)
    texts = [problem.solution for problem in load("gsm8k", "train", DATASETS)[:2000]]
    pairs = [([teacher.decode([i]) for i in teacher.encode(text)], student.split(text))
             for text in texts]
    equal_texts = [(s, [piece.replace("▁", " ") for piece in t]) for s, t in pairs]

    def ours():
        normalize.cache_clear()
        for pair in pairs:
            align_batch([pair])

    def theirs(pairs):
        for pair in pairs:
            spacy_alignments.get_alignments(*pair)

    functions = ours, lambda: theirs(pairs), lambda: theirs(equal_texts)
    a, b, c = np.array(medians(*functions, repeat=3 * args.repeat)) / len(pairs)
    speedup_row("align_batch, per GSM8K solution / spacy-alignments", a, b, "1.3x")
    speedup_row("  the same, which is given pieces with a space for ▁", a, c)

def bench_padding(args):
    """Count the padding in an epoch's micro-batches of the paper's size for base."""
    tokenizer, pool = Tokenizer(VOCABULARY), load("gsm8k", "train", DATASETS)
    solved = [replace(problem, solution=math_target(problem, cot=True)) for problem in pool]
    records = [Record(problem, None, "GSM8K") for problem in solved]
    examples, _ = build_examples(records, tokenizer, FORMATS, "nll")
    encode = functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))
    sizes = dict(zip(FORMATS, SIZES["base"]["micro_batch_size"]))
    used, total = np.zeros(2), np.zeros(2)  # tokens of inputs and of targets
    for batch in make_batches(examples, pool, encode, sizes, seed=0, epoch=0):
        lengths = [(len(encode_prompt(*pair, encode)), len(pair[0].labels)) for pair in batch]
        used += np.sum(lengths, axis=0)
        total += np.max(lengths, axis=0) * len(batch)
    row("padding, share of all tokens", ratio=f"{1 - used.sum() / total.sum():.1%}", target="10%")
    row("  of the targets' tokens", ratio=f"{1 - used[1] / total[1]:.1%}")

# --- the command ---

BENCHMARKS = {"train": bench_train, "decode": bench_decode, "ends": bench_ends,
              "evaluation": bench_evaluation, "loading": bench_loading, "loss": bench_loss,
              "align": bench_align, "padding": bench_padding}

def main():
    """Print a table with a row per comparison."""
    parser = argparse.ArgumentParser(description="Compare speed with other implementations.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    add("--threads", type=int, default=2, help="number of CPU threads (default: 2)")
    add("--repeat", type=int, default=3, help="number of repetitions (default: 3)")
    add("--problems", type=int, default=200, help="number of evaluated problems (default: 200)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    ENVIRONMENT["OMP_NUM_THREADS"] = str(args.threads)
    waiting = ENVIRONMENT.get("OMP_WAIT_POLICY", "default")
    print(f"torch {torch.__version__}, {args.threads} threads, OpenMP wait policy: {waiting}")
    row("this code / reference", "ours", "reference", "ratio", "target")
    for name in args.names or BENCHMARKS:
        try:
            BENCHMARKS[name](args)
        except (ImportError, UserError) as error:
            row(f"{name}: left out, {error}")

if __name__ == "__main__":
    main()
