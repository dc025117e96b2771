"""Compare speed and memory with other implementations in one run.

    python tests/bench.py                    everything, about a quarter of an hour
    python tests/bench.py decode loading     two of the benchmarks

Every ratio is that of two medians over repetitions in which both sides take turns. Models have
random weights and flan-t5-small's shape unless a row names another. Both sides read the same file
and run in this process (CTranslate2 in another) with the same number of threads, which wait for
work by OpenMP's defaults: torch is imported before t5, whose settings for a busy machine come too
late then. Set OMP_WAIT_POLICY and GOMP_SPINCOUNT to change that. Needs transformers and REAL_DATA
(see conftest.py); other references that are not installed are left out.
"""

import argparse
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
user_settings = set(os.environ)
import torch  # before conftest, which imports t5
from conftest import REAL_DATA, ROOT

import numpy as np
from transformers import T5ForConditionalGeneration as Reference
from align import align_batch
from eval import Problem, evaluate, load, math_prompt, math_target
from specialize import FORMATS, SIZES, Record, batch_loss, build_examples, kl_loss, make_batches
from specialize import make_optimizer
from t5 import EOS, PAD, T5, T5Config, Tokenizer, UserError, packed_weights, pad_sequences

for name in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} - user_settings:
    os.environ.pop(name, None)  # processes started from here do not inherit t5's settings
SHAPES = {"small": dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6),
          "base": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12)}
VOCABULARY, DATASETS = REAL_DATA / "tokenizers" / "t5", REAL_DATA / "datasets"

def medians(*functions, repeat):
    """Return the median time of each function in ms; they take turns."""
    times = np.empty((repeat, len(functions)))
    for i, j in np.ndindex(times.shape):
        start = time.perf_counter()
        functions[j]()
        times[i, j] = 1000 * (time.perf_counter() - start)
    return np.median(times, axis=0).tolist()

def tensor_peak(function):
    """Return the most memory (MB) that a call's tensors took beyond what existed before."""
    with torch.profiler.profile(profile_memory=True) as record:
        function()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(np.cumsum([e.nbytes() / 1e6 for e in events if e.name() == "[memory]"]))

def row(what, ours, theirs, target="", share=False):
    """Print how many times as fast as a reference this code is, or which share it needs."""
    ratio = f"{ours / theirs:.2f}" if share else f"{theirs / ours:.2f}x"
    print(f"{what:<62}{ours:>10,.0f}{theirs:>11,.0f}{ratio:>7}  {target}", flush=True)

# --- training and decoding ---

@functools.cache
def checkpoint(size):
    """Return a folder with a random model whose greedy decoding never ends by itself."""
    folder = f"{scratch}/{size}"
    model = T5(T5Config(**SHAPES[size], feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    model.lm_head.weight.data[EOS] = 0
    model.save_pretrained(folder)
    Tokenizer(VOCABULARY).save(folder)
    Reference.from_pretrained(folder).save_pretrained(folder)  # in the order of the hub's files
    return folder

def both_models(dtype=torch.float32):
    """Return the small model here and in transformers."""
    folder = checkpoint("small")
    return [kind.from_pretrained(folder, dtype=dtype).eval() for kind in (T5, Reference)]

def require_bf16():
    """Raise UserError, which ends a benchmark, unless the CPU has AVX512-BF16."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        raise UserError("bf16, as this CPU has no AVX512-BF16")

def bench_train(args):
    """Time forward pass, backward pass, clipping and AdamW, with dropout: B 8, S 256, T 96."""
    sources, labels = torch.randint(3, 32000, (8, 256)), torch.randint(3, 32000, (8, 96))
    batch = {"input_ids": sources, "labels": labels, "loss_mask": labels != PAD,
             "decoder_input_ids": torch.cat([0 * labels[:, :1], labels[:, :-1]], dim=1)}
    def training_step(model, optimizer, bf16=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if isinstance(model, T5):
                loss = batch_loss(model, batch, "nll")
            else:
                loss = model(input_ids=sources, attention_mask=sources != PAD, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    pairs = [(model.train(), make_optimizer(model.parameters(), "adamw", 0.01))
             for model in both_models()]
    ours, theirs = (functools.partial(training_step, *pair) for pair in pairs)
    times = medians(ours, theirs, repeat=args.repeat)
    row("training step, fp32 / transformers", *times, "1.5x")
    require_bf16()
    times = medians(functools.partial(ours, bf16=True), ours, repeat=args.repeat)
    row("training step, bf16 autocast / own fp32", *times)

def bench_decode(args):
    """Time greedy decoding: B 8, S 256, 64 tokens. Weights are packed before, as by evaluate()."""
    sources = torch.randint(3, 32000, (8, 256))
    for dtype, name, target in ((torch.float32, "fp32", "1.3x"), (torch.bfloat16, "bf16", "")):
        if dtype == torch.bfloat16:
            require_bf16()
        model, their_model = both_models(dtype)
        ours = functools.partial(model.generate, sources, max_new_tokens=64)
        theirs = functools.partial(their_model.generate, sources, attention_mask=sources != PAD,
                                   min_new_tokens=64, max_new_tokens=64, do_sample=False)
        with packed_weights(model.decoder, model.lm_head):
            times = medians(ours, theirs, repeat=args.repeat)
        row(f"decoding, weights in {name} / transformers", *times, target)

def bench_ctranslate2(args):
    """Time the same against CTranslate2 in another process: two OpenMPs slow each other down."""
    pieces, (model, _) = Tokenizer(VOCABULARY).pieces, both_models()
    sources = torch.randint(3, 32000, (8, 256))
    arguments = checkpoint("small"), args.threads, [[pieces[i] for i in ids] for ids in sources]
    with multiprocessing.get_context("spawn").Pool(1) as process:
        ours = functools.partial(model.generate, sources, max_new_tokens=64)
        theirs = functools.partial(process.apply, translate, arguments)
        theirs()  # loads the model
        with packed_weights(model.decoder, model.lm_head):
            times = medians(ours, theirs, repeat=args.repeat)
    row("decoding, weights in fp32 / CTranslate2", *times)

def translate(folder, threads, tokens):
    """Decode 64 tokens by CTranslate2."""
    translator(folder, threads).translate_batch(tokens, beam_size=1, max_input_length=0,
                                                min_decoding_length=64, max_decoding_length=64)

@functools.cache
def translator(folder, threads):
    """Load a model into CTranslate2."""
    from ctranslate2 import Translator, converters
    converted = converters.TransformersConverter(folder).convert(f"{folder}/converted")
    return Translator(converted, intra_threads=threads)

def force_ends(ends, skip=0):
    """Return a logits processor for ids (B, t), of which it ignores the first `skip`. It ends row b
    with token number ends[b]. The first token becomes 100 + b, which identifies the row later."""
    def process(ids, logits):
        ids, rows = ids[:, skip:], torch.arange(len(logits))
        logits[:, EOS] = -1e9
        if ids.shape[1] == 0:
            logits[rows, 100 + rows] = 1e9
        else:
            logits[ends[ids[:, 0] - 100] == ids.shape[1] + 1, EOS] = 1e9
        return logits
    return process

def until_ends(model, ids, ends, max_new_tokens):
    """Decode by transformers, whose ids begin with a start token."""
    return model.generate(ids, attention_mask=ids != PAD, max_new_tokens=max_new_tokens,
                          do_sample=False, logits_processor=[force_ends(ends, skip=1)])

def bench_ends(args):
    """Time decoding of 256 tokens: B 32, 64 to 256 source tokens, ends at 8 to 256 tokens."""
    model, their_model = both_models()
    ids = torch.randint(3, 32000, (32, 256))
    ids[torch.arange(256) >= torch.linspace(64, 256, 32)[:, None]] = PAD
    ends = torch.linspace(8, 256, 32).long()[torch.randperm(32)]
    with packed_weights(model.decoder, model.lm_head):
        times = medians(
            lambda: model.generate(ids, max_new_tokens=256, logits_processor=force_ends(ends)),
            lambda: until_ends(their_model, ids, ends, 256), repeat=args.repeat)
    row("256 tokens, B 32, ends spread / transformers", *times, "2x")

def bench_evaluation(args):
    """Time an evaluation with four demonstrations: B 32, 128 new tokens. Outputs are made to end
    where the test set's own solutions end. The plain loop takes the problems in their order."""
    tokenizer, (model, their_model) = Tokenizer(VOCABULARY), both_models()
    problems = load("gsm8k", "test", DATASETS)[: args.problems]
    demonstrations = load("gsm8k", "train", DATASETS)[:4]
    prompts = [math_prompt(problem.question, True, demonstrations) for problem in problems]
    inputs = list(map(tokenizer.encode, prompts))
    ends = torch.tensor([len(tokenizer.encode(problem.solution)) for problem in problems])
    position = {tuple(ids): i for i, ids in enumerate(inputs)}
    generate = model.generate
    def generate_until_ends(sources, **options):  # evaluate() has its own order of the problems
        order = [position[tuple(ids[ids != PAD].tolist())] for ids in sources]
        return generate(sources, **options, logits_processor=force_ends(ends[order]))
    def ours():
        evaluate(model, tokenizer, problems, prompts, batch_size=32, max_new_tokens=128)
    def plain_loop():
        for start in range(0, len(problems), 32):
            batch = slice(start, start + 32)
            for ids in until_ends(their_model, pad_sequences(inputs[batch]), ends[batch], 128):
                tokenizer.decode(ids)
    model.generate = generate_until_ends
    what = f"evaluation, {len(problems)} GSM8K problems / a plain transformers loop"
    row(what, *medians(ours, plain_loop, repeat=args.repeat), "1.8x")

# --- loading, loss, alignment, padding ---

def bench_loading(args):
    """Time from the start of a process to a loaded model of flan-t5-base's shape."""
    folder = checkpoint("base")
    def run(code):
        command = [sys.executable, "-c", f"import os; {code}; os._exit(0)"]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout

    ours = f"from t5 import T5; T5.from_pretrained({folder!r})"
    theirs = ours.replace("t5 import T5", "transformers import T5ForConditionalGeneration as T5")
    run(theirs)  # reads the file from the disk
    times = medians(lambda: run(ours), lambda: run(theirs), repeat=args.repeat)
    row("loading base's shape, from process start / transformers", *times, "3x")
    status = run(ours + "; print(open('/proc/self/status').read(), flush=True)")  # Linux only
    peak = int(status.split(b"VmHWM:")[1].split()[0]) / 1e3
    file = os.path.getsize(f"{folder}/model.safetensors") / 1e6
    row("loading, peak memory of the process / size of the file (MB)", peak, file, share=True)

def bench_loss(args):
    """Time forward and backward pass of kl_loss and of a dense form: B 8, T 96, V 32,128."""
    logits = torch.randn(8, 96, 32128, requires_grad=True)
    ids, probs = torch.randint(0, 32128, (8, 96, 5)), torch.rand(8, 96, 5) / 5
    mask = torch.ones(8, 96, dtype=torch.bool)
    def ours():
        torch.autograd.grad(kl_loss(logits, ids, probs, mask), logits)
    def dense():
        p = torch.zeros(8, 96, 32128).scatter_add_(-1, ids, probs)
        kl = torch.xlogy(p, p) - p * logits.softmax(-1).log()
        torch.autograd.grad(kl.sum(-1).mean(), logits)

    times = medians(ours, dense, repeat=3 * args.repeat)
    row("kl_loss / a loss with a dense teacher", *times, "0.3", share=True)
    row("  extra memory (MB)", tensor_peak(ours), tensor_peak(dense), "0.3", share=True)

def bench_align(args):
    """Time the alignment of 1,000 GSM8K solutions, one by one as in training, on one core."""
    import tiktoken
    from spacy_alignments import get_alignments
    teacher, student = tiktoken.get_encoding("p50k_base"), Tokenizer(VOCABULARY)
    texts = [problem.solution for problem in load("gsm8k", "train", DATASETS)[:1000]]
    pairs = [([teacher.decode([i]) for i in teacher.encode(text)], student.split(text))
             for text in texts]
    equal_texts = [(s, [piece.replace("▁", " ") for piece in t]) for s, t in pairs]
    def run(align, pairs):
        for s, t in pairs:
            align(s, t)

    times = medians(lambda: run(lambda *pair: align_batch([pair]), pairs),
                    lambda: run(get_alignments, pairs), lambda: run(get_alignments, equal_texts),
                    repeat=3 * args.repeat)
    row("align_batch, 1,000 GSM8K solutions / spacy-alignments", *times[:2], "1.3x")
    row("  the same, which is given pieces with a space for ▁", times[0], times[2])

def bench_padding(args):
    """Count the padding in an epoch's micro-batches of the paper's size for base."""
    tokenizer, pool = Tokenizer(VOCABULARY), load("gsm8k", "train", DATASETS)
    solved = [Problem(p.question, p.answer, math_target(p, cot=True)) for p in pool]
    examples, _ = build_examples([Record(p, None, "") for p in solved], tokenizer, FORMATS, "nll")
    used, total = np.zeros(2), np.zeros(2)  # tokens of inputs and of targets
    for batch in make_batches(examples, pool, tokenizer, SIZES["base"]["micro_batch_size"], 0, 0):
        lengths = [(len(example.input_ids), len(example.labels)) for example in batch]
        used += np.sum(lengths, axis=0)
        total += np.max(lengths, axis=0) * len(batch)
    shares = 1 - used.sum() / total.sum(), 1 - used[1] / total[1]
    print("padding: {:.1%} of all tokens (target 10%), {:.1%} of the targets'".format(*shares))

# --- the command ---

def main():
    """Print a table with a row per comparison."""
    benchmarks = {name[6:]: f for name, f in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description="Compare speed with other implementations.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks)} (default: all)")
    add("--threads", type=int, default=2, help="number of CPU threads (default: 2)")
    add("--repeat", type=int, default=3, help="number of repetitions (default: 3)")
    add("--problems", type=int, default=200, help="number of evaluated problems (default: 200)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(benchmarks):
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(benchmarks)}")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of started processes
    title = f"torch {torch.__version__}, {args.threads} threads, times in ms"
    print(f"{title:<62}{'this code':>10}{'reference':>11}{'ratio':>7}  target")
    for name in args.names or benchmarks:
        torch.manual_seed(0)
        try:
            benchmarks[name](args)
        except (ImportError, UserError) as error:
            print(f"{name}, left out: {error}")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main()
