"""The toy world: problem sets, a teacher and T5s of five sizes, all made from one seed.

    python data/toy/make.py world             problem sets, prompts, teacher's records, vocabulary
    python data/toy/make.py pretrain 0.04M 1M  tuned-SIZE/, and raw-SIZE/ if it is missing

The files are in the publishers' formats. stories.py defines the problems, grammar.py the teacher.
The models are pretrained on plain text (raw), as T5 was, and from there briefly on a mixture of
instructions (tuned), as FlanT5 was: at last with chains of thought after demonstrations, too.
"""

import argparse
import functools
import gzip
import json
import math
import os
import random
import re
import sys
import tempfile
from pathlib import Path

import sentencepiece

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from grammar import teacher_records, train_bpe, walk
from stories import ALL_GAIN, ALL_LOSE, ASDIV, CHAINS, GAIN, GAIN_OOD, GSM8K, LIMIT, LOSE, LOSE_OOD
from stories import MULTIARITH, OPERATIONS, READING, SVAMP, TASKS, story
from t5 import PAD, T5, T5Config, Tokenizer, pad_sequences

import torch
import torch.nn.functional as F

SEED = 0
TRAIN, TEST, PER_TASK = 1000, 600, 100  # problems: gsm8k/train.jsonl, each test file, generic task
SAMPLES, TEMPERATURE = 40, 0.5  # the teacher's solutions per question
MERGES, VOCABULARY = 130, 512  # the teacher's BPE merges, the students' pieces
WIDTHS = {"0.04M": 24, "0.1M": 40, "0.25M": 64, "0.5M": 88, "1M": 128}  # {parameters: d_model}
RAW_STEPS, TUNE_STEPS, IN_CONTEXT_STEPS = 5500, 1200, 150
BATCH, WINDOW, LEARNING_RATE = 48, 16, 1e-3

CANARY = "The toy world's test problems: keep them out of training."

def demonstration(example, cot):
    """Return a generic example as it appears in a prompt."""
    question, reasoning, target = example
    answer = f"Let's think step by step.\n{reasoning} So the answer is {target}." if cot else target
    return f"Q: {question}\nA: {answer}"

def generic_prompt(task, demonstrations, cot):
    """Return a task's prompt as in BBH's cot-prompts (after the line of dashes), or answer-only."""
    shown = [demonstration(example, cot) for example in demonstrations]
    return "\n\n".join([TASKS[task][1], *shown])

def distinct(draw, count, key, taken):
    """Return `count` draws whose keys are not in `taken`, and add their keys to it."""
    found = []
    while len(found) < count:
        item = draw()
        if key(item) not in taken:
            taken.add(key(item))
            found.append(item)
    return found

def make_problems():
    """Return {set: stories} and {task: (three demonstrations, test examples)}, all different."""
    rng, taken, math_sets, generic = random.Random(SEED), set(), {}, {}
    for name, templates in (("train", GSM8K), ("gsm8k", GSM8K), ("multiarith", MULTIARITH),
                            ("asdiv", ASDIV), ("svamp", SVAMP)):
        verbs = (GAIN, LOSE) if templates is GSM8K else (GAIN_OOD, LOSE_OOD)
        draw = functools.partial(story, rng, templates, *verbs)
        count = TRAIN if name == "train" else TEST
        math_sets[name] = distinct(draw, count, lambda s: s.question, taken)
    for task, (make, _) in TASKS.items():
        draw = functools.partial(make, rng)
        examples = distinct(draw, 3 + PER_TASK, lambda example: example[0], taken)
        generic[task] = examples[:3], examples[3:]
    return math_sets, generic

def write(name, content):
    """Write a file of the world: a text as it is, anything else as JSON."""
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    path.write_text(content, encoding="utf-8")

def gold(story):
    """Return the reference solution of a problem, with GSM8K's calculator marks."""
    lines, results = [], dict(zip("pqr", story.results))
    openings = "First", "Then", "Then"
    for opening, (x, op, y), result in zip(openings, story.equations, story.results):
        x, y = results.get(x, x), results.get(y, y)
        lines.append(f"{opening} {x} {op} {y} = <<{x}{op}{y}={result}>>{result} {story.item}.")
    return "\n".join([*lines, f"#### {result}"])

def write_math(sets):
    """Write the four math sets in their publishers' formats, as far as they are read."""
    for name, stories in (("train", sets["train"]), ("test", sets["gsm8k"])):
        rows = [json.dumps({"question": s.question, "answer": gold(s)}) + "\n" for s in stories]
        write(f"gsm8k/{name}.jsonl", "".join(rows))
    write("multiarith/MultiArith.json", [
        {"sQuestion": s.question, "lSolutions": [float(s.results[-1])]} for s in sets["multiarith"]
    ])
    write("svamp/SVAMP.json", [
        {"Body": s.body, "Question": s.ask, "Answer": float(s.results[-1])} for s in sets["svamp"]
    ])
    problems = [
        f"\t<Problem>\n\t\t<Body>{s.body}</Body>\n\t\t<Question>{s.ask}</Question>\n"
        f"\t\t<Answer>{s.results[-1]} ({s.item})</Answer>\n\t</Problem>\n"
        for s in sets["asdiv"]
    ]
    write("asdiv/ASDiv.xml", f"<ProblemSet>\n{''.join(problems)}</ProblemSet>\n")

def write_generic(generic):
    """Write the generic tasks as BBH's JSON, and their prompts."""
    for task, (demonstrations, examples) in generic.items():
        rows = [{"input": question, "target": target} for question, _, target in examples]
        write(f"bbh/bbh/{task}.json", {"canary": CANARY, "examples": rows})
        prompt = generic_prompt(task, demonstrations, cot=True)
        write(f"bbh/cot-prompts/{task}.txt", f"{CANARY}\n-----\n{prompt}")

def make_world():
    """Write all files except the models'."""
    sets, generic = make_problems()
    write_math(sets)
    write_generic(generic)
    rng = random.Random(SEED + 1)
    encoding = train_bpe((walk(rng, s) for s in sets["train"]), MERGES)
    records = teacher_records(rng, sets["train"], encoding, SAMPLES, TEMPERATURE)
    lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
    (HERE / "teacher.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))
    texts = [text for draw in (plain_text, instruction) for _ in range(4000)
             for text in draw(rng, generic, frozenset())]
    texts += [s.question for stories in sets.values() for s in stories]
    texts += [walk(rng, s) for s in sets["train"]]
    train_vocabulary(texts, HERE / "spiece.model")

def train_vocabulary(texts, path):
    """Train a SentencePiece model by T5's conventions (pad 0, </s> 1, unknown 2).

    Each word of the world and each number up to 100 is one piece. The other pieces, learned from
    parts of these words, are for other texts."""
    words = {word.rstrip(".,:?") for text in texts for word in text.split()}
    words |= {str(n) for n in range(101)}
    words = sorted(word for word in words if not re.match(r"-\d", word))
    # The model stores the path of its rules. A bare name gives the same bytes everywhere.
    before = os.getcwd()
    with open(path, "wb") as file, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("rules.tsv").write_text("A\t20\n")  # a newline becomes a space, as in T5
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(f"({word})" for word in words), model_writer=file,
            model_type="unigram", vocab_size=VOCABULARY, hard_vocab_limit=False,
            user_defined_symbols=[*".,:?", *(f"\u2581{word}" for word in words)],
            required_chars="0123456789$<>x/=-", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=1, normalization_rule_tsv="rules.tsv", minloglevel=2,
        )
        os.chdir(before)

# --- pretraining ---

def new_story(rng, templates, held_out):
    """Draw a story with all verbs that is not held out."""
    while (s := story(rng, templates, ALL_GAIN, ALL_LOSE)).question in held_out:
        pass
    return s

def sums(rng, held_out):
    """Draw a story and its computation without the results: `12 + 5, it - 3`."""
    s = new_story(rng, rng.choice([READING, CHAINS, GSM8K]), held_out)
    terms = [["it" if x in ("p", "q") else str(x) for x in equation] for equation in s.equations]
    return s.question, ", ".join(map(" ".join, terms))

def chain(story, wordy):
    """Return a chain of thought: the equations, or the reference solution."""
    lines = re.sub("<<.*?>>", "", gold(story)).replace("#### ", "The answer is ")
    return lines if wordy else re.sub(r"(First|Then) |(?<=\d) [a-z]+(?=\.)", "", lines)

def arithmetic(rng, count):
    """Draw facts as solutions state them, `12 - 5 = 7.`; half of them continue the last result."""
    lines, result = [], 0
    while len(lines) < count:
        op = rng.choice("++--*")
        x = result if rng.random() < 0.5 else rng.randint(1, LIMIT)
        y = rng.randint(2, 5) if op == "*" else rng.randint(1, LIMIT)
        if op == "*" and rng.random() < 0.5:
            x, y = y, x
        if 0 < OPERATIONS[op](x, y) <= LIMIT:
            result = OPERATIONS[op](x, y)
            lines.append(f"{x} {op} {y} = {result}.")
    return " ".join(lines)

def generic_example(rng, task, held_out):
    """Draw (question, reasoning, target) of a generic task that is not held out."""
    while (example := TASKS[task][0](rng))[0] in held_out:
        pass
    return example

def plain_text(rng, generic, held_out):
    """Draw a document for the raw model, split in two: the model reads the first part and writes
    the second (prefix language modeling)."""
    kinds = {"sums": 0.45, "facts": 0.2, "copy": 0.15, "words": 0.12, "counting": 0.08}
    (kind,) = rng.choices(list(kinds), kinds.values())
    first = ""
    if kind == "sums":  # a story, then what there is to compute, as in a textbook
        text, rest = sums(rng, held_out)
        first, rest = f"{text} Sum:", f"{rest}."
    elif kind == "copy":
        rest = new_story(rng, rng.choice([READING, CHAINS]), held_out).body
        first = f"{rest} Again:"
    elif kind == "facts":
        rest = arithmetic(rng, 7)
    elif kind == "words":
        tasks = rng.choices(list(TASKS), k=4)
        rest = " ".join(generic_example(rng, task, held_out)[1] for task in tasks)
    elif kind == "counting":
        start, by = rng.randint(1, 9), rng.randint(1, 9)
        rest = f"Count by {by}: " + " ".join(map(str, range(start, LIMIT + 1, by)))
    if first and rng.random() < 0.7:
        return first, rest
    words = f"{first} {rest}".split()
    cut = rng.randint(1, len(words) * 2 // 3)
    return " ".join(words[:cut]), " ".join(words[cut:])

def instruction(rng, generic, held_out, chains_in_context=0.0):
    """Draw (input, output) of the instruction mixture: sums, short chains of thought, and generic
    tasks with and without demonstrations.
    chains_in_context: the share of chains of thought that follow demonstrations."""
    kinds = {"sums": 1, "chain": 1 - chains_in_context, "generic": 1, "generic in context": 1,
             "chain in context": chains_in_context}
    (kind,) = rng.choices(list(kinds), kinds.values())
    if kind == "sums":
        question, answer = sums(rng, held_out)
        return f"Q: {question} Which sum is it?\nA:", answer
    if kind.startswith("chain"):
        templates, count, wordy = [READING, CHAINS], 1, False
        if kind == "chain in context":  # with a quarter of toy-GSM8K's kinds of problems
            templates, count = [READING, CHAINS, GSM8K[::4]], rng.randint(3, 5)
            wordy = rng.random() < 0.5
        stories = [new_story(rng, rng.choice(templates), held_out) for _ in range(count)]
        *shown, question = [f"Q: {s.question}\nLet's think step by step" for s in stories]
        *solved, answer = [chain(s, wordy) for s in stories]
        shown = "".join(f"{ask}\n{solution}\n\n" for ask, solution in zip(shown, solved))
        return shown + question, answer
    task, cot = rng.choice(list(TASKS)), rng.random() < 0.5
    shown, answer = demonstration(generic_example(rng, task, held_out), cot).rsplit(
        "A: Let's think step by step.\n" if cot else "A: ", 1)
    question = shown + ("A: Let's think step by step." if cot else "A:")
    if kind == "generic in context":
        shown = generic[task][0]
        if rng.random() < 0.4:
            shown = [generic_example(rng, task, held_out) for _ in range(3)]
        question = f"{generic_prompt(task, shown, cot)}\n\n{question}"
    return question, answer

@torch.no_grad()
def point_heads(model, strength=5.0):
    """Initialize most heads to attend at one distance, or to one side.

    From T5's random weights, a model this small ignores word order for thousands of steps."""
    encoder = model.encoder.relative_bias.weight  # (buckets, H)
    decoder = model.decoder.relative_bias.weight
    ahead = len(encoder) // 2  # the encoder's first buckets are for tokens to the left
    for head, buckets in enumerate([1, ahead + 1, 2, slice(1, ahead), slice(ahead + 1, None), 3]):
        encoder[buckets, head] += strength if isinstance(buckets, int) else strength / 2
    for head in range(3):
        decoder[head + 1, head] += strength

def new_model(tokenizer, width):
    """Return a T5 with random weights, of the shape that all sizes share."""
    return T5(T5Config(
        vocab_size=-(-len(tokenizer.pieces) // 64) * 64, d_model=width, d_kv=width // 8,
        d_ff=7 * width // 4, num_layers=3, num_decoder_layers=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu"))

def train(model, tokenizer, draw, steps):
    """Train by likelihood with AdamW, linear warm-up and cosine decay. Embeddings and position
    biases have a higher learning rate, because their values are larger. (T5 was trained by
    Adafactor, whose steps are relative to each matrix.) The model learns to find words sooner."""
    groups = {1: [], 4: []}
    for name, parameter in model.named_parameters():
        is_large = "relative_bias" in name or parameter is model.shared.weight
        groups[4 if is_large else 1].append(parameter)
    groups = [{"params": params, "scale": scale} for scale, params in groups.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    rng, mean = random.Random(SEED + 2), 0
    model.train()
    for step in range(steps):
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * LEARNING_RATE * min((step + 1) / 100, cosine)
        if step % WINDOW == 0:  # batches of similar length, in random order
            window = sorted((draw(rng) for _ in range(WINDOW * BATCH)), key=lambda p: len(p[0]))
            batches = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
            rng.shuffle(batches)
        pairs = batches[step % WINDOW]
        source = pad_sequences([tokenizer.encode(text) for text, _ in pairs])  # (B, S)
        target = pad_sequences([tokenizer.encode(text) for _, text in pairs])  # (B, T)
        logits = model(source, source != PAD, F.pad(target, (1, -1), value=PAD))
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {mean:.3f}", flush=True)

def pretrain(size):
    """Train raw-SIZE/ on plain text, unless it exists, and from there tuned-SIZE/."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums have one order
    sets, generic = make_problems()
    held_out = {example[0] for _, examples in generic.values() for example in examples}
    held_out |= {s.question for stories in sets.values() for s in stories}
    tokenizer = Tokenizer(HERE / "spiece.model")
    model = new_model(tokenizer, WIDTHS[size])
    point_heads(model)
    in_context = functools.partial(instruction, chains_in_context=1.0)
    for name, draw, steps in (("raw", plain_text, RAW_STEPS), ("tuned", instruction, TUNE_STEPS),
                              ("tuned", in_context, IN_CONTEXT_STEPS)):
        folder = HERE / f"{name}-{size}"
        if name == "tuned" or not folder.exists():
            print(f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
            train(model, tokenizer, functools.partial(draw, generic=generic, held_out=held_out),
                  steps)
            model.bfloat16().save_pretrained(folder)  # half the bytes of fp32
            tokenizer.save(folder)
        model = T5.from_pretrained(folder)

def main():
    """Make the toy world, or pretrain its models."""
    parser = argparse.ArgumentParser(description="Make the toy world, or pretrain its models.")
    parser.add_argument("what", choices=["world", "pretrain"])
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(WIDTHS)}; default: all")
    args = parser.parse_args()
    if args.what == "world":
        make_world()
    for size in (args.sizes or WIDTHS) if args.what == "pretrain" else ():
        pretrain(size)

if __name__ == "__main__":
    main()
