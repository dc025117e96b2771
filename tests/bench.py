"""Speed against other implementations in the same run: ratios, medians of alternating repetitions.

    python tests/bench.py                        everything, in minutes
    python tests/bench.py decode loading         some of it

Not a test: nothing here fails because it is slow. It wants transformers, ctranslate2 and editdistance installed, and
the real data at REAL_DATA (see conftest.py). All models have random weights, of flan-t5-small's shape unless it says
otherwise, in one file that every implementation reads. transformers runs in this process. CTranslate2 runs in one of
its own, and once more in this one: it brings another OpenMP, and two of them in a process slow each other down.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
import torch.nn.functional as F

from conftest import REAL_DATA, ROOT
from align import align, align_batch
from data.cpu import Linear, packed
from data.memory import flan_config
from data.rows import make_rows, training_records
from eval import evaluate, load, math_prompt
from specialize import FORMATS, SIZES, kl_loss, nll_loss, plan_epoch, source
from t5 import EOS, PAD, T5, Tokenizer, pad

for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set by specialize.py, too late for this process; not for those it starts
    os.environ.pop(name, None)


def medians(*functions, repeat):
    """Median seconds of each function; they take turns, so that a slow spell of the machine meets all of them."""
    times = [[] for _ in functions]
    for _ in range(repeat):
        for function, kept in zip(functions, times):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return [float(np.median(kept)) for kept in times]


def seconds(value):
    """Seconds as a person reads them."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def faster(what, ours, theirs, target):
    """A line of the table: how many times as fast as a reference."""
    return what, seconds(ours), seconds(theirs), f"{theirs / ours:.2f}x", target


@functools.cache
def checkpoint(size):
    """A folder with a random model of this size, its tensors in the order in which transformers stores them."""
    import transformers

    torch.manual_seed(0)
    folder = Path(scratch.name) / size
    model = T5(flan_config(size))
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0  # a greedy decoder never ends of itself
    model.save_pretrained(folder / "ours")
    transformers.T5ForConditionalGeneration.from_pretrained(folder / "ours").save_pretrained(folder)
    return folder


def reference(size="small", dtype=torch.float32):
    """The same model in transformers."""
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.T5ForConditionalGeneration.from_pretrained(checkpoint(size), dtype=dtype).eval()


@functools.cache
def translator_folder():
    """The same model as CTranslate2 stores it."""
    from ctranslate2.converters import Converter
    from ctranslate2.converters.transformers import T5Loader

    vocabulary = ["<pad>", "</s>", "<unk>", *(f"{i}" for i in range(3, 32128))]
    tokenizer = types.SimpleNamespace(
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>", convert_ids_to_tokens=vocabulary.__getitem__,
        get_vocab=lambda: {token: i for i, token in enumerate(vocabulary)},
    )  # fmt: skip

    class FromMemory(Converter):
        def _load(self):
            with torch.no_grad():
                return T5Loader()(reference(), tokenizer)

    return FromMemory().convert(str(Path(scratch.name) / "ctranslate2"))


class Translator:
    """CTranslate2 on sources; a method can be called in another process."""

    def __init__(self, folder, compute_type, threads, tokens):
        import ctranslate2

        self.translator = ctranslate2.Translator(folder, compute_type=compute_type, inter_threads=1, intra_threads=threads)
        self.tokens = tokens

    def translate(self):
        self.translator.translate_batch(
            self.tokens, beam_size=1, max_decoding_length=64, min_decoding_length=64, max_input_length=0
        )


def serve(connection, *arguments):
    """Make a Translator here and let it work whenever the connection says so."""
    translator = Translator(*arguments)
    with contextlib.suppress(EOFError):
        while connection.recv():
            translator.translate()
            connection.send(True)


@contextlib.contextmanager
def in_a_process_of_its_own(*arguments):
    """A function that has the Translator of these arguments translate in another process, and waits for it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *arguments))
    process.start()
    there.close()  # so that recv() raises EOFError where the process has died

    def translate():
        here.send(True)
        here.recv()

    try:
        translate()
        yield translate
        here.send(False)
    finally:
        here.close()
        process.join()


def source_ids(B=8, S=256):
    """Random sources without padding."""
    return torch.randint(3, 32000, (B, S), generator=torch.Generator().manual_seed(1))


def operations(config, B, S, T):
    """Those of a forward pass by the shapes of its products: (of the source, of the target)."""
    D, inner, layers = config.d_model, config.d_kv * config.num_heads, config.num_layers
    ff = 3 * config.d_ff * D
    source = layers * (4 * D * inner + ff + 2 * D * inner)  # weights: encoder, and the keys and values made of it
    target = layers * (6 * D * inner + ff) + config.vocab_size * D
    attention = 4 * B * layers * inner
    return 2 * B * S * source + attention * S * S, 2 * B * T * target + attention * T * (T + S)


def step_bytes(config, B, S, T, size):
    """What a decoding step reads: the decoder's weights, the head, keys and values of source and of T tokens, each of
    `size` bytes."""
    D, inner, layers = config.d_model, config.d_kv * config.num_heads, config.num_layers
    weights = layers * (6 * D * inner + 3 * config.d_ff * D) + config.vocab_size * D
    return size * (weights + B * layers * 2 * inner * (S + T))


@functools.cache
def machine():
    """What the machine does at best: matrix products in operations a second, in fp32 and in bf16, and reading memory in
    bytes a second."""
    a, b, big = torch.randn(2048, 512), torch.randn(2048, 512), torch.randn(16, 2**22)
    product, half, read = medians(
        lambda: F.linear(a, b), lambda: F.linear(a.bfloat16(), b.bfloat16()), lambda: big.sum(), repeat=15
    )
    return 2 * 2048**2 * 512 / product, 2 * 2048**2 * 512 / half, big.numel() * 4 / read


def bench_roofline(args):
    """What the machine does at best, and the time that the work of `train` and `decode` needs at that rate."""
    rate, half, bandwidth = machine()
    source, target = operations(flan_config("small"), 8, 256, 96)
    step = step_bytes(flan_config("small"), 8, 256, 32, 4)
    yield "matrix product", f"{rate / 1e9:.0f} GFLOP/s", f"bf16 {half / 1e9:.0f}", "", ""
    yield "memory read", f"{bandwidth / 1e9:.1f} GB/s", "", "", ""
    yield "  training step at that rate", seconds(3 * (source + target) / rate), f"{3 * (source + target) / 1e9:.0f} GFLOP", "", ""
    yield "  source at that rate", seconds(source / rate), f"{source / 1e9:.0f} GFLOP", "", ""
    yield "  decoding step at that bandwidth", seconds(step / bandwidth), f"{step / 1e6:.0f} MB", "", ""


def bench_gpu(args):
    """What limits a GPU of 312 TFLOP/s in bf16, 2 TB/s and 5 microseconds to launch a kernel: arithmetic, nothing run.

    Training: an in-context chain-of-thought micro-batch of the paper's rows, 600 + 125 tokens each. AdamW reads weights,
    gradients and two moments and writes all but the gradients. Decoding: 64 prompts of 100 tokens, at the 64th token;
    30 kernels a layer.
    """
    for size in ("small", "base", "large", "xl", "xxl"):
        config = flan_config(size)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in T5(config).parameters())
        training = 3 * sum(operations(config, SIZES[size]["micro_batch"][0], 600, 125)) / 312e12
        yield f"{size}: products of a training micro-batch", seconds(training), "", "", ""
        yield "  weights, gradients and moments in fp32", f"{16 * parameters / 1e9:.1f} GB", "", "", ""
        yield "  a pass of AdamW", seconds(28 * parameters / 2e12), "", "", ""
        yield "  bytes of a decoding step", seconds(step_bytes(config, 64, 100, 64, 2) / 2e12), "", "", ""
        yield "  launches of a decoding step", seconds(30 * config.num_decoder_layers * 5e-6), "", "", ""


def bench_train(args):
    """Forward, backward, clipping and AdamW, with dropout, on B 8, S 256, T 96."""
    sources, labels = source_ids(), source_ids(S=96)
    mask, decoder_input_ids = torch.ones_like(labels, dtype=torch.bool), F.pad(labels, (1, -1), value=PAD)

    def step(model, loss, autocast=False):
        optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)

        def run():
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                value = loss(model)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        run()
        return run

    our_loss = lambda model: nll_loss(model(sources, sources != PAD, decoder_input_ids), labels, mask)
    their_loss = lambda model: model(input_ids=sources, attention_mask=sources != PAD, labels=labels).loss
    ours, theirs = step(T5.from_pretrained(checkpoint("small")), our_loss), step(reference(), their_loss)
    mine, other = medians(ours, theirs, repeat=args.repeat)
    yield faster("training step, fp32 / transformers", mine, other, "1.2x")
    if torch.cpu._is_avx512_bf16_supported():
        autocast = step(T5.from_pretrained(checkpoint("small")), our_loss, autocast=True)
        yield faster("training step, bf16 autocast / own fp32", *medians(autocast, ours, repeat=args.repeat), "1.5x")
    else:
        yield "training step, bf16 autocast / own fp32", "no AVX512-BF16", "", "", "1.5x"


def pack_and_drop(model):
    """Pack the weights that decoding uses, and drop them."""
    with packed(model.decoder, model.lm_head):
        pass


def bench_decode(args):
    """Greedy, B 8, S 256, 64 tokens. Our weights are packed before, as evaluate() does."""
    sources = source_ids()
    tokens = [[str(i) for i in row] for row in sources.tolist()]
    options = dict(attention_mask=torch.ones_like(sources), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    models = {}
    for dtype, compute_type, targets in ((torch.float32, "float32", ("1.3x", "1x")), (torch.bfloat16, "int8", ("1.4x", "1x"))):
        ours, theirs = T5.from_pretrained(checkpoint("small"), dtype=dtype), reference(dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        arguments = translator_folder(), compute_type, args.threads, tokens
        models[name] = ours, arguments
        with packed(ours.decoder, ours.lm_head), in_a_process_of_its_own(*arguments) as other:
            mine, one, two = medians(
                lambda: ours.generate(sources, max_new_tokens=64), lambda: theirs.generate(sources, **options), other, repeat=args.repeat
            )
        yield faster(f"decoding, {name} / transformers", mine, one, targets[0])
        yield faster(f"decoding, {name} / CTranslate2 {compute_type}", mine, two, targets[1])
        yield "  packing the weights, once for all batches", seconds(*medians(lambda: pack_and_drop(ours), repeat=args.repeat)), "", "", ""
    for name, (ours, arguments) in models.items():  # last: CTranslate2's OpenMP stays in this process
        with packed(ours.decoder, ours.lm_head):
            mine, two = medians(
                lambda: ours.generate(sources, max_new_tokens=64), Translator(*arguments).translate, repeat=args.repeat
            )
        yield faster(f"  the same in one process, {name} / CTranslate2 {arguments[1]}", mine, two, "1x")


def bench_step(args):
    """Where the time of `decode` in fp32 goes: the source, a step, of that the products and the attention to the source."""
    model, sources = T5.from_pretrained(checkpoint("small")), source_ids()
    blocks, mask = model.decoder.blocks, sources != PAD
    layers = [m for module in (model.decoder, model.lm_head) for m in module.modules() if isinstance(m, Linear)]
    inputs = {m: torch.randn(8, 1, m.in_features) for m in layers if not any(m is b.cross_attention.kv for b in blocks)}
    with torch.inference_mode(), packed(model.decoder, model.lm_head):
        memory, bias = model.source_keys_values(sources, mask)
        q = torch.randn(8, memory.shape[3], 1, memory.shape[5])
        attend = functools.partial(F.scaled_dot_product_attention, q, attn_mask=bias, scale=1.0)
        source, one, all, products, attention = medians(
            lambda: model.source_keys_values(sources, mask),
            lambda: model.generate(sources, max_new_tokens=1),
            lambda: model.generate(sources, max_new_tokens=64),
            lambda: [layer(x) for layer, x in inputs.items()],
            lambda: [attend(keys, values) for keys, values in memory],
            repeat=3 * args.repeat,
        )
    yield "decoding: the source", seconds(source), "", "", ""
    yield "  a step", seconds((all - one) / 63), "", "", ""
    yield "    its products with weights, alone", seconds(products), "", "", ""
    yield "    its attention to the source, alone", seconds(attention), "", "", ""


def force_ends(ends):
    """A logits processor by which row b, which its first token names, ends with its token number ends[b]."""

    def process(ids, logits):
        t, rows = ids.shape[1], torch.arange(len(logits))
        logits[:, EOS] = -1e9
        if t == 0:
            logits[rows, 100 + rows] = 1e9
        else:
            logits[ends[ids[:, 0] - 100] == t + 1, EOS] = 1e9
        return logits

    return process


def bench_ends(args):
    """256 tokens, B 32 of 64 to 256 source tokens, ends spread over all steps."""
    B = 32
    sources = source_ids(B).where(torch.arange(256) < torch.linspace(64, 256, B)[:, None], PAD)
    process = force_ends(torch.linspace(8, 256, B).long()[torch.randperm(B, generator=torch.Generator().manual_seed(2))])
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = T5.from_pretrained(checkpoint("small"), dtype=dtype), reference(dtype=dtype)
        mine, other = medians(
            lambda: ours.generate(sources, max_new_tokens=256, logits_processor=process),
            lambda: theirs.generate(
                sources, attention_mask=sources != PAD, max_new_tokens=256, do_sample=False,
                logits_processor=[lambda ids, logits: process(ids[:, 1:], logits)],
            ),
            repeat=1,
        )  # fmt: skip
        yield faster(f"256 tokens, ends at all steps, {str(dtype).removeprefix('torch.')} / transformers", mine, other, "2x")


def solutions():
    """GSM8K's solutions as (p50k_base tokens, T5 tokens)."""
    import tiktoken

    teacher, student = tiktoken.get_encoding("p50k_base"), Tokenizer(REAL_DATA / "tokenizers" / "t5")
    texts = [problem.solution for problem in load("gsm8k", "train", REAL_DATA / "datasets")]
    return [([teacher.decode([i]) for i in teacher.encode(text)], student.split(text)) for text in texts]


def bench_align(args):
    """One core: numpy's loops here are not threaded."""
    import editdistance

    def plain(pair):
        s, t = pair
        f = [[float("inf")] * (len(t) + 1) for _ in range(len(s) + 1)]
        f[0][0] = 0
        for i in range(1, len(s) + 1):
            for j in range(1, len(t) + 1):
                f[i][j] = min(f[i - 1][j], f[i][j - 1], f[i - 1][j - 1]) + editdistance.eval(s[i - 1], t[j - 1])
        i, j, path = len(s), len(t), []
        while i and j:
            path.append((i - 1, j - 1))
            i, j = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=lambda place: f[place[0]][place[1]])
        return path

    pairs = solutions()[:2000]
    ours, theirs = medians(lambda: align_batch(pairs), lambda: [plain(pair) for pair in pairs[:100]], repeat=args.repeat)
    yield faster("align_batch, a GSM8K solution / editdistance", ours / 2000, theirs / 100, "20x")
    long = [sum((pair[side] for pair in pairs[:40]), []) for side in (0, 1)]
    for n in (50, 100, 200, 400, 800):
        pair = long[0][:n], long[1][: round(n * len(long[1]) / len(long[0]))]
        one, batch = medians(lambda: align(*pair), lambda: align_batch([pair]), repeat=args.repeat)
        memory = f"{peak(lambda: align(*pair)) / 1e6:.1f} MB"
        yield f"  {n} teacher tokens: align, align_batch, memory of align", seconds(one), seconds(batch), memory, "quadratic"


def peak(function):
    """The most memory that numpy or Python held for a call, in bytes."""
    import tracemalloc

    tracemalloc.start()
    function()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def tensor_peak(function):
    """The most memory of tensors that a call held beyond what was there before, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held, most = 0, 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def bench_loss(args):
    """kl_loss against torch's own on a dense teacher: B 8, T 96, V 32,128, forward and backward."""
    torch.manual_seed(0)
    logits = torch.randn(8, 96, 32128, requires_grad=True)
    ids, probs, mask = torch.randint(0, 32128, (8, 96, 5)), torch.rand(8, 96, 5) / 5, torch.ones(8, 96, dtype=torch.bool)

    def ours():
        kl_loss(logits, ids, probs, mask).backward()
        logits.grad = None

    def theirs():
        p = torch.zeros(8, 96, 32128).scatter_add_(-1, ids, probs)
        q = logits.softmax(-1)
        (torch.xlogy(p, p) - p * q.log()).sum(-1).mean().backward()
        logits.grad = None

    mine, other = medians(ours, theirs, repeat=args.repeat)
    yield "kl_loss, time / dense", seconds(mine), seconds(other), f"{mine / other:.2f}", "0.4"
    mine, other = tensor_peak(ours), tensor_peak(theirs)
    yield "kl_loss, extra memory / dense", f"{mine / 1e6:.0f} MB", f"{other / 1e6:.0f} MB", f"{mine / other:.2f}", "0.4"


def bench_loading(args):
    """From the start of a Python process to a model of flan-t5-base's shape that is ready; peak memory against the file."""
    folder = checkpoint("base")
    codes = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from t5 import T5; T5.from_pretrained({str(folder)!r})",
        f"from transformers import T5ForConditionalGeneration as T5; T5.from_pretrained({str(folder)!r})",
        "import torch",
    )
    # Linux's peak, in kB
    tell = "; import time; print(time.time(), open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    times, memory = [[], [], []], {}
    for i in [0, 1, 2] * (args.repeat + 1):
        start = time.time()
        done = subprocess.run([sys.executable, "-c", codes[i] + tell], capture_output=True, text=True, check=True)
        ready, kilobytes = map(float, done.stdout.split())
        times[i].append(ready - start)
        memory[i] = kilobytes * 1024
    ours, theirs, torch_alone = (float(np.median(kept[1:])) for kept in times)  # the first may have read from the disk
    yield faster(f"loading ({seconds(torch_alone)} is import torch) / transformers", ours, theirs, "3x")
    size = (folder / "model.safetensors").stat().st_size
    yield "loading, peak memory / file", f"{memory[0] / 1e6:.0f} MB", f"{size / 1e6:.0f} MB", f"{memory[0] / size:.2f}", "1.2"


def bench_padding(args):
    """The share of padding in an epoch's micro-batches of the size that the paper has for base."""
    tokenizer, data = Tokenizer(REAL_DATA / "tokenizers" / "t5"), REAL_DATA / "datasets"
    rows, _ = make_rows(training_records(None, data), tokenizer, list(FORMATS), "nll")
    encode = functools.cache(lambda text: np.array(tokenizer.encode(text), np.int32))
    length = lambda example: len(source(*example, encode)) + len(example[0].labels)
    plan = plan_epoch(rows, load("gsm8k", "train", data), dict(zip(FORMATS, (25, 35, 40, 60))), length, 0, 0)
    sides = (lambda example: len(source(*example, encode))), (lambda example: len(example[0].labels))
    full = [sum(max(map(side, batch)) * len(batch) for batch in plan) for side in sides]
    used = [sum(map(side, (example for batch in plan for example in batch))) for side in sides]
    for what, share in (("padding, of all tokens", 1 - sum(used) / sum(full)), ("  of the targets alone", 1 - used[1] / full[1])):
        yield what, f"{share:.1%}", "", "", "10%" if what[0] != " " else ""


def bench_evaluation(args):
    """Four demonstrations before each question, 128 new tokens, B 32. Ends are forced where the test set's own solutions
    end; the plain loop takes the problems as they come, and each batch goes on to its last row's end."""
    tokenizer = Tokenizer(REAL_DATA / "tokenizers" / "t5")
    data = REAL_DATA / "datasets"
    problems, shots = load("gsm8k", "test", data)[: args.problems], load("gsm8k", "train", data)[:4]
    prompt = functools.partial(math_prompt, cot=True, demonstrations=shots)
    ours, theirs = T5.from_pretrained(checkpoint("small")), reference()
    wanted = {prompt(p.question): len(tokenizer.encode(p.solution)) for p in problems}
    generate = ours.generate

    def ending(ids, **options):  # evaluate() calls generate() in its own order: which row is which, the ids tell
        ends = torch.tensor([wanted[texts[tuple(row[row != PAD].tolist())]] for row in ids])
        return generate(ids, **options, logits_processor=force_ends(ends))

    texts = {tuple(tokenizer.encode(text)): text for text in wanted}
    ours.generate = ending

    def plain():
        for start in range(0, len(problems), 32):
            ids = pad([tokenizer.encode(prompt(problem.question)) for problem in problems[start : start + 32]])
            process = force_ends(torch.tensor([wanted[prompt(p.question)] for p in problems[start : start + 32]]))
            rows = theirs.generate(
                ids, attention_mask=ids != PAD, max_new_tokens=128, do_sample=False,
                logits_processor=[lambda ids, logits: process(ids[:, 1:], logits)],
            )  # fmt: skip
            [tokenizer.decode(row) for row in rows]

    mine, other = medians(lambda: evaluate(ours, tokenizer, problems, prompt, batch_size=32, max_new_tokens=128), plain, repeat=1)
    yield faster(f"evaluation, {len(problems)} GSM8K problems / plain transformers", mine, other, "2.5x")
    config, (rate, _, bandwidth) = ours.config, machine()
    sizes = [(len(tokenizer.encode(text)), min(tokens, 128)) for text, tokens in wanted.items()]  # of source and target
    products = [sum(side) / rate for side in zip(*(operations(config, 1, *size) for size in sizes))]
    reading = sum(4 * config.num_layers * 2 * config.num_heads * config.d_kv * S * T for S, T in sizes) / bandwidth
    best = sum(products) + reading
    for what, value in zip(("source's products", "target's products", "keys and values of the source"), (*products, reading)):
        yield f"  {what} at the machine's best rate", seconds(value), "", "", ""
    yield "  all of these, and the ratio that they allow", seconds(best), seconds(other), f"{other / best:.2f}x", ""


BENCHES = {name.removeprefix("bench_"): function for name, function in list(globals().items()) if name.startswith("bench_")}


def main():
    """python tests/bench.py [NAME ...]"""
    parser = argparse.ArgumentParser(description="Measure speed against other implementations.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="alternating repetitions (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=200, help="of the evaluation (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHES)}")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that it starts
    print(f"{'what':<72}{'ours':>14}{'reference':>14}{'ratio':>9}  target   ({args.threads} threads)", flush=True)
    for name in args.names or BENCHES:
        for what, ours, theirs, ratio, target in BENCHES[name](args):
            print(f"{what:<72}{ours:>14}{theirs:>14}{ratio:>9}  {target}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        scratch = types.SimpleNamespace(name=folder)
        main()
