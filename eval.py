"""Problem sets, prompts, answer extraction and accuracy: what math gained and what BBH lost.

The order is that of an answer: a problem is read and becomes a prompt, the model writes an output,
the final answer is extracted and compared. Exact match counts; the looser rule of the paper's
authors is computed beside it. Tables, plots and the command come last.

    python eval.py google/flan-t5-base google/flan-t5-large --tasks gsm8k,multiarith,asdiv,svamp,bbh
    python eval.py --show 5 runs/predictions.jsonl
    python eval.py --plot scaling.png google/flan-t5-small google/flan-t5-base
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import textwrap
import time
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from t5 import UserError, best_device, count_parameters, download, free_memory, in_range
from t5 import is_out_of_memory, load_pretrained, names_file, packed_weights, pad_sequences
from t5 import run_command, show_progress

import numpy as np
import torch  # after t5, which sets how OpenMP's threads wait: that must precede torch

TOY = Path(__file__).resolve().parent / "data" / "toy"
DEFAULT_DATA = Path(__file__).resolve().parent / "data" / "downloads"

# --- problems ---

@dataclass
class Problem:
    """A question with its gold answer."""

    question: str
    answer: float | str  # a float if it is a number
    solution: str = ""  # the reference reasoning, if any, without calculator marks
    written: str = ""  # the answer as published, such as 1,080 or 1/4, for the authors' rule
    split: str = ""  # "validation" or "test", if its set has parts

    def __post_init__(self):
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError("the question is empty or not a string")
        is_number = isinstance(self.answer, float) and math.isfinite(self.answer)
        if not is_number and not (isinstance(self.answer, str) and self.answer):
            raise ValueError(f"the answer {self.answer!r} is neither a finite float nor text")

def parse_gsm8k(line):
    """Parse a line of GSM8K: a solution with marks such as <<48/2=24>>, then `#### 72`. In a
    question file of your own the answer alone, also as a number, will do."""
    entry = json.loads(line)
    if not isinstance(entry["answer"], (str, int, float)):
        raise TypeError(f"the answer is {entry['answer']!r}")
    solution, _, answer = str(entry["answer"]).rpartition("####")
    solution = re.sub(r"<<.*?>>", "", solution).strip()
    return Problem(entry["question"], parse_gold_answer(answer), solution, answer.strip())

def parse_multiarith(entry):
    """Parse a problem of MultiArith: the answer is a float in a list."""
    return Problem(entry["sQuestion"].strip(), float(entry["lSolutions"][0]))

def parse_asdiv(node):
    """Parse a problem of ASDiv: body and question, and an answer such as `9 (apples)`. Of
    the 2,305 answers 212 are not one number (names, times, ratios, lists) and stay text."""
    body, question, answer = (node.findtext(tag).strip() for tag in ("Body", "Question", "Answer"))
    without_units = re.sub(r"\s+\([^()]*\)", "", answer)
    return Problem(f"{body} {question}", parse_gold_answer(without_units), written=answer)

def parse_svamp(entry):
    """Parse a problem of SVAMP: body and question become one text."""
    body = entry["Body"].strip()
    body += "" if body.endswith((".", "?", "!", ",")) else ","
    return Problem(f"{body} {entry['Question'].strip()}", float(entry["Answer"]))

def parse_bbh(entry):
    """Parse an example of BIG-Bench Hard: input and target are texts."""
    return Problem(entry["input"], entry["target"])

def parse_gold_answer(text):
    """Return a published answer as a float if it is one number, otherwise as text."""
    text = re.sub(r"[()]", "", text).strip().removesuffix(".")
    return extract_number(text) if NUMBER.fullmatch(plain_spelling(text).strip()) else text

# --- problem sets ---

@dataclass(frozen=True)
class Dataset:
    """A problem set: a math set, or a task of BBH, which has only a test part."""

    name: str
    file: str  # its path in the data folder (.jsonl, .json or .xml)
    parse: Callable  # a function from one entry (a line, an object, a node) to a Problem
    validation: int = 0  # the size of the validation part, at most half; none is official
    validate: bool = False  # evaluate the validation part at every checkpoint
    select: bool = False  # count it in the choice of the checkpoint; this needs validate

# The math sets. GSM8K is in distribution (training uses its training set), so it does not select.
DATASETS = {
    "gsm8k": Dataset("GSM8K", "gsm8k/test.jsonl", parse_gsm8k, 500, validate=True, select=False),
    "multiarith": Dataset("MultiArith", "multiarith/MultiArith.json", parse_multiarith, 200,
                          validate=True, select=True),
    "asdiv": Dataset("ASDiv", "asdiv/ASDiv.xml", parse_asdiv, 500, validate=True, select=True),
    "svamp": Dataset("SVAMP", "svamp/SVAMP.json", parse_svamp, 500, validate=True, select=True),
}
GITHUB = os.environ.get("GITHUB_ENDPOINT", "https://raw.githubusercontent.com").rstrip("/")
# Where the problem sets are published: {file: [repository at a commit, path there, SHA-256]}.
PUBLISHED = json.loads((TOY.parent / "sources.json").read_text(encoding="utf-8"))
SOURCES, BBH_SOURCE, BBH_TASKS = (PUBLISHED[key] for key in ("files", "bbh", "bbh_tasks"))

def bbh_tasks(folder):
    """Return BBH's tasks, or those in the data folder if it has others, as the toy's has."""
    found = {path.stem for path in Path(folder).glob("bbh/bbh/[!.]*.json")}
    return sorted(found) if found - set(BBH_TASKS) else BBH_TASKS

def display_name(task, folder, cot=True, shots=0):
    """Return a task's name for tables: its set, so that nobody takes the toy world for the real
    ones, and its prompt. shots: the number of demonstrations of a math problem."""
    is_toy = Path(folder).resolve() == TOY
    if task == "bbh":
        return f"{'generic' if is_toy else 'BBH'} {'CoT' if cot else 'answer-only'}"
    name = "toy-" * is_toy + (DATASETS[task].name if task in DATASETS else task)
    name += f", {shots} shots" if shots and task in DATASETS else ""
    return name if cot else f"{name}, answer-only"

def data_file(folder, name):
    """Return the path of a file in the data folder, after downloading it if it is missing."""
    if name not in SOURCES and not name.startswith("bbh/"):
        return Path(folder) / name
    repository, path, sha256 = SOURCES.get(name, (BBH_SOURCE, name.removeprefix("bbh/"), None))
    return download(f"{GITHUB}/{repository}/{path}", Path(folder) / name, sha256)

def load(task, split="test", folder=DEFAULT_DATA):
    """Return the problems of a math set or of a BBH task as a list of Problem.
    split: "train" (only GSM8K has one), "validation", "test" or "all". Validation and test parts
    are drawn with a fixed seed and are in random order, so that the first n are a sample. Raises
    UserError naming the file and the problem."""
    known = DATASETS | {name: Dataset(name, f"bbh/bbh/{name}.json", parse_bbh)
                        for name in bbh_tasks(folder)}
    if task not in known:
        raise UserError(f"no task {task!r}; choose from {', '.join(known)}")
    dataset = known[task]
    parts = ["validation"] * (dataset.validation > 0) + ["test", "all"]
    parts += ["train"] * (task == "gsm8k")
    if split not in parts:
        raise UserError(f"{task} has no {split!r} part; choose from {', '.join(parts)}")
    if split == "train":
        return read_problems(data_file(folder, "gsm8k/train.jsonl"), parse_gsm8k)
    problems = read_problems(data_file(folder, dataset.file), dataset.parse)
    shuffled = list(problems)
    random.Random(0).shuffle(shuffled)
    size = min(dataset.validation, len(problems) // 2)
    for i, problem in enumerate(shuffled):
        problem.split = "validation" if i < size else "test"
    return problems if split == "all" else [p for p in shuffled if p.split == split]

def load_demonstrations(source, folder=DEFAULT_DATA):
    """Return demonstrations for math prompts, a list of Problems: those in a file in GSM8K's
    format, or a number of them drawn from GSM8K's training set with a fixed seed."""
    if not isinstance(source, int):
        return read_problems(source, parse_gsm8k)
    return random.Random(0).sample(load("gsm8k", "train", folder), source) if source else []

def read_problems(path, parse):
    """Read a file of problems. Raises UserError naming the file and the line or problem."""
    problems = []
    try:
        for entry in read_entries(path):
            problems.append(parse(entry))
        if not problems:
            raise ValueError("it contains no problem")
        return problems
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; put the file there") from None
    except Exception as error:  # parsers raise many kinds
        fault = f"no key {error}" if isinstance(error, KeyError) else error
        unit = "line" if Path(path).suffix == ".jsonl" else "problem"
        raise UserError(f"{path}, {unit} {len(problems) + 1}: {fault}; fix the file; a publisher's "
                        "file is downloaded again after you delete it") from None

def read_entries(path):
    """Return the entries of a file: lines, the objects of a JSON list (in BBH's files the list
    "examples"), or the XML nodes named Problem."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".jsonl":
        return text.strip().split("\n")
    if Path(path).suffix == ".xml":
        if "<!DOCTYPE" in text:
            raise ValueError("it has a DOCTYPE, whose entities could expand without end")
        return ElementTree.fromstring(text).iter("Problem")
    entries = json.loads(text)
    return entries["examples"] if isinstance(entries, dict) else entries

# --- prompts and targets ---

def number_text(answer):
    """Format a gold answer: 72, not 72.0."""
    return str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)

def math_target(problem, cot):
    """Return the training target: the solution and `The answer is {a}`, or only the latter."""
    answer = f"The answer is {number_text(problem.answer)}"
    return f"{problem.solution}\n{answer}" if cot else answer

def math_prompt(question, cot, demonstrations=()):
    """Return one of the paper's four inputs, punctuated as its authors do: chain of thought or
    answer-only, zero-shot or with demonstrations (Problems) in context."""
    if not cot and not demonstrations:
        return f"Q: {question} A:"
    shown = "".join(math_demonstration(problem, cot) for problem in demonstrations)
    return f"{shown}Q: {question}\n" + ("Let's think step by step" if cot else "A:")

def math_demonstration(problem, cot):
    """Return a solved problem as it precedes the question in context."""
    ask = f"Q: {problem.question}\n" + ("Let's think step by step\n" if cot else "A: ")
    return f"{ask}{math_target(problem, cot)}\n\n"

def bbh_prompt(task, question, cot, folder=DEFAULT_DATA):
    """Return a BBH question after the description of its task and the benchmark's three
    demonstrations, which lose their reasoning if the prompt is answer-only."""
    path = data_file(folder, f"bbh/cot-prompts/{task}.txt")
    with names_file(path, "a prompt of BBH", "delete it to download it again"):
        shown = path.read_text(encoding="utf-8").partition("-----\n")[2].strip()
        if not shown:
            raise ValueError("no demonstrations after a line of five hyphens")
        if cot:
            return f"{shown}\n\nQ: {question}\nA: Let's think step by step."
        reasoning = r"A: Let's think step by step\..*?[Tt]he answer is (.*?)\.?(?=\n\nQ: |\Z)"
        shown, count = re.subn(reasoning, r"A: \1", shown, flags=re.DOTALL)
        if count != shown.count("\nQ: "):
            raise ValueError("not every demonstration ends in 'the answer is ...'")
        return f"{shown}\n\nQ: {question}\nA:"

def problems_and_prompts(task, cot, split="test", folder=DEFAULT_DATA, limit=None,
                         demonstrations=()):
    """Return a task's problems, each with its input: [(Problem, text)]. "bbh" is all BBH tasks.
    limit: at most this many problems per task. demonstrations: Problems that precede each math
    problem (BBH has its own three); see load_demonstrations()."""
    if task == "bbh":
        return [pair for name in bbh_tasks(folder)
                for pair in problems_and_prompts(name, cot, "test", folder, limit)]
    is_math = task in DATASETS
    problems = load(task, split if is_math else "test", folder)[:limit]
    return [(problem, math_prompt(problem.question, cot, demonstrations) if is_math
             else bbh_prompt(task, problem.question, cot, folder)) for problem in problems]

# --- answers ---

# Other spellings of numbers -> the spelling that NUMBER reads, replaced in this order.
PLAIN_SPELLINGS = {
    # Cut off the next question that a model makes up after its answer, 72\n\n### Question 2: Is 5;
    # a digit must precede it. (The lookbehind only saves time in long runs of white space.)
    r"(?s)^(\D*\d.*?)(?<=[^\s*#])\s[\s*#]*(?:Q|Question|Problem)[ \d]*:.*": r"\1",
    r"\\?[$€£]|\\!": "",  # -$5, $-5, \$5; 70,\!000
    r"[\u2010-\u2013\u2212\ufe63\uff0d]|\u2014(?=\d)": "-",  # dashes and minus signs
    r"(?<=\d)(?<!\d{4})\{?\\?,\}?(?=\d{3}(?!\d))": "",  # 9,500; 9{,}500; 9\,500
    # \frac{3}{4}, \dfrac34 or \frac{-3}{4} becomes " 3/4" or " -3/4"; so 2\frac34 becomes 2 3/4.
    r"(?: |\\,)?(-?)\\.?frac(?:\{(-?[\d.]+)\}\{(\d+)\}|(\d)(\d))": r" \1\2\4/\3\5",
    r"(?<=[a-zA-Z}])\^\{?-?\d+\}?|(?<=\Wm|\dm|[cdkm]m|ft|in|yd|mi)[23]\b": "",  # m^2, cm2
    r"(?<=\d) *(?:[x×*]|\\times|\\cdot) *10\^\{?(-?\d+)\}?": r"e\1",  # 1.5 x 10^3
    # A hyphen before a number is its sign, unless it joins the number to what precedes it.
    r"(\bis:?|[=({]) *- +(?=[.\d])": r"\1 -",  # a sign, as in -5: is - 5, = - 5, (- 5)
    r"(?<=[\w)%.])(?<!\d[eE])-|(?<=[\d)%.] )-": " - "}  # no sign: 48-24, 48 -24, x-5; but 1e-3
NUMBER = re.compile(
    r"(?P<sign>-)?(?:(?P<whole>\d+) (?=\d+ ?/ ?[1-9]))?"  # -5; the 2 of 2 1/2
    r"(?P<value>\d*\.?\d+(?:[eE][+-]?\d+)?)"  # 12 or .5 or 1.5e3
    r"(?: ?/ ?(?P<denominator>[1-9]\d*)(?!\d|\.\d))?")  # 1/2 or 3 / 4

def plain_spelling(text):
    """Return a text with its numbers spelled as NUMBER reads them."""
    for pattern, plain in PLAIN_SPELLINGS.items():
        text = re.sub(pattern, plain, text)
    return text

def extract_number(text):
    """Return the final answer of a math solution: the last number in it, or None."""
    *_, last = None, *NUMBER.finditer(plain_spelling(text))
    if not last:
        return None
    value = float(last["whole"] or 0) + float(last["value"]) / float(last["denominator"] or 1)
    return -value if last["sign"] else value

def extract_choice(text):
    """Return the final answer of a BBH output by the benchmark's rule: what follows the last
    "answer is ", without a final period, or else the complete text, as in answer-only outputs.
    Compare with ==: an output like "(A) or (B)" matches neither option."""
    _, phrase, answer = text.rpartition("answer is ")
    return answer.strip().removesuffix(".") if phrase else answer.strip()

def final_answer(output, answer):
    """Return the final answer of an output: a number if the gold answer is one, otherwise text."""
    return extract_number(output) if isinstance(answer, float) else extract_choice(output)

def exact_match(output, answer):
    """Return whether the final answer of an output equals the gold answer, a float or a text."""
    return final_answer(output, answer) == answer

def authors_match(output, answer, is_math, cot):
    """Score an output by the rules behind the paper's figures; answer is a text.
    Math: the last digits of output and answer agree, so signs do not count and "1,080" is read as
    80. BBH: the answer occurs between the first "the answer is" (in lower case) and the second or
    the end, or anywhere in an answer-only output."""
    if is_math:
        predicted, target = (re.findall(r"\d*\.?\d+", text) for text in (output, answer))
        return bool(predicted and target) and float(predicted[-1]) == float(target[-1])
    stated = (output.split("the answer is") + [""])[1] if cot else output
    return answer in stated

# --- accuracy ---

def evaluate(model, tokenizer, problems, prompts=None, batch_size=32, max_new_tokens=256,
             task="gsm8k", cot=True, file=None):
    """Evaluate a model on problems with greedy decoding.

    prompts: the input for each problem (default: zero-shot math, chain of thought or not).
    task: the name that predictions carry; it decides on the authors' rule.
    file: a PredictionFile; outputs already in it are re-scored but not generated again.
    Return an Evaluation with the predictions in the order of the problems."""
    if not problems:
        raise UserError(f"{task}: no problem to evaluate; raise --limit")
    prompts = prompts or [math_prompt(problem.question, cot) for problem in problems]
    outputs = [file.known.get((task, text)) if file else None for text in prompts]
    missing = [i for i, output in enumerate(outputs) if output is None]
    input_ids = {i: tokenizer.encode(prompts[i]) for i in missing}

    # Problems of similar length share a batch, so that little is padded. The longest come first: if
    # they fit into memory, all do.
    order = sorted(input_ids, key=lambda i: -len(input_ids[i]))
    device = model.shared.weight.device
    with packed_weights(model.decoder, model.lm_head):
        while order:
            rows = model.generation_rows(len(input_ids[order[0]]), max_new_tokens,
                                         free_memory(device.type))
            batch = order[: max(1, min(batch_size, rows))]
            source = pad_sequences([input_ids[i] for i in batch], device)
            try:
                generated = model.generate(source, max_new_tokens=max_new_tokens).tolist()
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                batch_size = len(batch) // 2
                print(f"out of memory: {task} goes on with batches of {batch_size}", flush=True)
                continue
            for i, ids in zip(batch, generated):
                outputs[i] = tokenizer.decode(ids)
                if file:
                    file.add(score(problems[i], task, prompts[i], outputs[i], cot))
            order = order[len(batch) :]
            show_progress(f"{task}: {len(problems) - len(order)} of {len(problems)}")
    show_progress("")
    return summarize([score(problem, task, prompts[i], outputs[i], cot)
                      for i, problem in enumerate(problems)])

def score(problem, task, prompt, output, cot):
    """Return the prediction for a problem: a dict with its scores by both rules."""
    written = problem.written or number_text(problem.answer)
    return {
        "task": task, "split": problem.split, "question": problem.question, "prompt": prompt,
        "output": output, "extracted": final_answer(output, problem.answer),
        "answer": problem.answer, "correct": exact_match(output, problem.answer),
        "correct_by_authors": authors_match(output, written, task in DATASETS, cot),
    }

def evaluate_task(model, tokenizer, task, cot, split="test", folder=DEFAULT_DATA, limit=None,
                  demonstrations=(), report=None, **options):
    """Evaluate a task by name; "bbh" is the mean over all BBH tasks, which have only a test part.
    limit, demonstrations: see problems_and_prompts(). options: see evaluate().
    report: a function called when a task ends, with a line of text and the number of problems."""
    predictions = []
    for name in bbh_tasks(folder) if task == "bbh" else [task]:
        start = time.time()
        pairs = problems_and_prompts(name, cot, split, folder, limit, demonstrations)
        problems = [problem for problem, _ in pairs]
        prompts = [prompt for _, prompt in pairs]
        e = evaluate(model, tokenizer, problems, prompts, task=name, cot=cot, **options)
        predictions += e.predictions
        if report:
            report(f"{display_name(name, folder, cot, len(demonstrations))}: {e} % of "
                   f"{len(problems):,} problems, {time.time() - start:.0f} s", len(problems))
    return summarize(predictions)

@dataclass
class Evaluation:
    """An accuracy, or a difference of two, with its standard error; in percent if printed."""

    accuracy: float  # 0 to 1
    stderr: float
    predictions: list  # a dict per problem

    def __str__(self):
        return f"{100 * self.accuracy:.1f} ± {100 * self.stderr:.1f}"

def summarize(predictions, rule="correct", baseline=None):
    """Average predictions over tasks; return an Evaluation.
    rule: "correct" (exact match) or "correct_by_authors".
    baseline: another model's predictions for the same problems; returns the paired difference."""
    scores = {}  # task: one number per problem
    for i, prediction in enumerate(predictions):
        reference = baseline[i][rule] if baseline else 0
        scores.setdefault(prediction["task"], []).append(prediction[rule] - reference)
    means = [np.mean(values) for values in scores.values()]
    variances = [np.var(values) / len(values) for values in scores.values()]  # of each mean
    stderr = float(np.sum(variances)) ** 0.5 / len(scores)
    return Evaluation(float(np.mean(means)), stderr, predictions)

# --- predictions, tables ---

class PredictionFile:
    """Predictions in a JSONL file, written line by line, so that an evaluation can be resumed.
    An output is used again only if task, prompt, model and the settings that affect it (weights,
    decoding) are the same, so one file can hold several models."""

    def __init__(self, path, model, **settings):
        self.path = Path(path)
        self.origin = {"model": model, "settings": settings}
        stored = read_predictions(path) if self.path.exists() else []
        self.known = {(p["task"], p["prompt"]): p["output"] for p in stored
                      if (p.get("model"), p.get("settings")) == (model, settings)}
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with open(self.path, "a") as file:
                file.write("\n")  # end a line that was cut short

    def add(self, prediction):
        """Append a prediction."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(self.origin | prediction) + "\n")

def read_predictions(path):
    """Read a file of predictions as dicts. Raises UserError if it is something else."""
    predictions = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        with names_file(f"{path}, line {number}", "a prediction", "choose another --out or --show"):
            try:
                prediction = json.loads(line)
            except (ValueError, RecursionError):
                if number > 1 or line.startswith(b"{"):
                    continue  # cut short
                raise  # the file is of another kind
            "".join(prediction[key] for key in ("task", "prompt", "output"))  # raises if not texts
            predictions.append(prediction)
    return predictions

def table(columns, rows, title="accuracy, %"):
    """Format a table: a title and column names, then rows (name, [Evaluation])."""
    lines = [[title, *columns]]
    lines += [[name, *map(str, evaluations)] for name, evaluations in rows]
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"{name:<{first}}" + "".join(f"  {x:>{n}}" for x, n in zip(cells, widths))
                     for name, *cells in lines)

def compare(models, rows):
    """Compare models, which go by their numbers, in tables with a row per task. They contain the
    accuracies by exact match, the paired differences to the first model, and the accuracies by the
    authors' rules. rows: [(name, [Evaluation per model])]."""
    differences, by_authors = [], []
    for name, evaluations in rows:
        outputs = [e.predictions for e in evaluations]
        differences.append((name, [summarize(p, "correct", outputs[0]) for p in outputs[1:]]))
        by_authors.append((name, [summarize(p, "correct_by_authors") for p in outputs]))
    numbers = [str(number) for number in range(1, len(models) + 1)]
    blocks = ["\n".join(map("  ".join, zip(numbers, models))), table(numbers, rows)]
    if len(models) > 1:
        blocks.append(table([f"{n} - 1" for n in numbers[1:]], differences, "difference, %"))
    blocks.append(table(numbers, by_authors, "authors' rule, %"))
    return "\n\n".join(blocks)

def show_cases(path, count, tasks=(), split="all"):
    """Yield lines that fit the terminal: up to `count` right and wrong predictions per model, task
    and settings, from a file or a run's folder. tasks: names, "bbh" for all but the math sets, or
    nothing for all. split: a part of math sets, or "all"; old predictions do not name theirs."""
    path = Path(path) / "predictions.jsonl" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"{path}: No such file; give --show a run or a file of predictions")
    width = shutil.get_terminal_size().columns
    groups = {}
    for p in read_predictions(path):
        chosen = not tasks or p["task"] in tasks or ("bbh" in tasks and p["task"] not in DATASETS)
        if chosen and split in ("all", p.get("split") or split):
            result = "right" if exact_match(p["output"], p.get("answer")) else "wrong"
            key = str(p.get("model")), p["task"], json.dumps(p.get("settings", {})), result
            groups.setdefault(key, []).append(p)
    if not groups:
        raise UserError(f"{path}: no prediction of these --tasks and --split; evaluate them first")
    for (model, task, settings, result), cases in sorted(groups.items()):
        texts = [f"=== {model}, {task}: {len(cases)} {result} === {settings}"]
        for p in cases[:count]:
            answer = final_answer(p["output"], p.get("answer"))
            texts += [f"{p.get('question') or p['prompt']}\n\n{p['output']}",
                      f"-> {answer}   gold: {p.get('answer')}", "-" * width]
        for line in "\n".join(texts).split("\n"):
            # Escape control characters. Wide characters, such as Chinese ones, take two columns.
            line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
            wide = any(unicodedata.east_asian_width(char) in "WF" for char in line)
            yield from textwrap.wrap(line, width // 2 if wide else width) or [""]

# --- plots ---

def log_linear_fit(parameters, accuracies):
    """Fit accuracy = intercept + slope * log10(parameters) by least squares; return the slope, its
    standard error (NaN for two points) and the intercept."""
    x, y = np.log10(parameters), np.array(accuracies)
    slope, intercept = np.polyfit(x, y, 1)
    squares = np.square(y - intercept - slope * x).sum()
    variance = squares / (len(x) - 2) if len(x) > 2 else math.nan
    return slope, np.sqrt(variance / np.square(x - x.mean()).sum()), intercept

def scaling_plot(path, points):
    """Plot accuracy against model size, with the log-linear fit.
    points: {label: [(parameters, accuracy in percent, standard error)]}, at least two sizes."""
    axes = new_axes("number of parameters", "accuracy (%)")
    axes.set_xscale("log")
    for label, models in points.items():
        sizes, accuracies, stderrs = zip(*sorted(models))
        slope, error, intercept = log_linear_fit(sizes, accuracies)
        error = "" if math.isnan(error) else f" ± {error:.1f}"
        label = f"{label}\n{slope:+.1f}{error} per factor 10"
        dots, *_ = axes.errorbar(sizes, accuracies, stderrs, fmt="o", capsize=3, label=label)
        axes.plot(sizes, intercept + slope * np.log10(sizes), "--", color=dots.get_color())
    save_plot(path, axes)

def curves_plot(path, curves, ylabel="accuracy (%)", mark=None):
    """Plot curves over training steps: {label: [(step, mean, standard error)]}.
    mark: a step to mark with a vertical line, the selected checkpoint's."""
    axes = new_axes("optimizer steps", ylabel)
    for label, points in curves.items():
        axes.errorbar(*zip(*points), fmt=".-", capsize=2, label=label)
    if mark is not None:
        axes.axvline(mark, color="gray", linestyle=":")
        axes.text(mark, 1, "selected ", color="gray", ha="right", va="bottom",
                  transform=axes.get_xaxis_transform())  # 1: the top of the plot
    save_plot(path, axes)

def new_axes(xlabel="", ylabel=""):
    """Return the axes of a new figure. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib; run: pip install matplotlib") from None
    axes = Figure(figsize=(3.2, 2.5)).subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes

def save_plot(path, axes):
    """Write each curve's label at its right end, moved up so that none overlap; save the figure."""
    bottom, top = axes.get_ylim()
    free = -math.inf  # there is room from this height on
    for bars in sorted(axes.containers, key=lambda bars: bars[0].get_ydata()[-1]):
        x, y = bars[0].get_xydata()[-1]
        y, label = max(y, free), bars.get_label()
        axes.annotate(label, (x, y), (6, 0), textcoords="offset points", va="center",
                      color=bars[0].get_color(), annotation_clip=False)
        free = y + 0.09 * (1 + label.count("\n")) * (top - bottom)
    with names_file(path, "a name for a plot", "choose another name"):
        axes.figure.savefig(path, dpi=200, bbox_inches="tight")  # with room for the labels

def trade_off_plot(path, logs):
    """Plot the accuracies in logs of runs against training steps: the math validation sets, and
    BIG-Bench Hard if --bbh-limit measured it. With one log, mark the selected checkpoint."""
    curves = {}  # {label: [(step, percent, standard error)]}
    for log in map(Path, logs):
        run = {}
        for file in (log.with_name("arguments.json"), log.with_name("results.json")):
            run |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        prefix = f"{log.parent.name}, " if len(logs) > 1 else ""
        for entry in read_log(log):
            measured = entry.get("validation", {}) | entry.get("bbh", {})
            for column, (accuracy, stderr) in measured.items():
                task = "bbh" if column in ("CoT", "answer-only") else column
                name = display_name(task, run.get("data", ""), cot=column != "answer-only")
                point = entry["step"], 100 * accuracy, 100 * stderr
                curves.setdefault(prefix + name, []).append(point)
    if not curves:
        raise UserError(f"{logs[0]}: no validation yet; wait for the first checkpoint")
    curves_plot(path, curves, mark=run.get("selected", {}).get("step") if len(logs) == 1 else None)

def read_log(path):
    """Read a run's log.jsonl as a list of dicts, without a last line that was cut short."""
    entries = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        with names_file(f"{path}, line {number}", "an entry of a log", "delete this line"):
            entry = json.loads(line)
            int(entry["step"])  # these raise if the entry is none of a log's
            dict(entry.get("validation", {}).values())
            entries.append(entry)
    return entries

# --- the command ---

def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Evaluate T5s on math and BIG-Bench Hard.")
    add, positive = parser.add_argument, in_range(int, above=0)
    add("models", nargs="+", metavar="MODEL", help="folders of models or runs, or hub names")
    add("--tasks", type=lambda text: re.findall(r"[^, ]+", text), default=[],
        help=f"{','.join(DATASETS)} (default), bbh, or the names of BBH tasks")
    add("--shots", type=int, default=0, choices=[0, 4],
        help="demonstrations before a math problem, from GSM8K's training set (default: 0)")
    add("--demonstrations", metavar="FILE", help="your own, in GSM8K's format (default: none)")
    add("--answer-only", dest="cot", action="store_false", help="no reasoning (default: with it)")
    add("--data", type=Path, default=DEFAULT_DATA, help="problem sets (default: %(default)s)")
    add("--split", choices=["validation", "test", "all"],
        help="part of the math sets (default: test, but all with --show)")
    add("--limit", type=positive, help="problems per task (default: all)")
    add("--batch-size", type=positive, default=32, help="problems per batch (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=256, help="longest output (default: 256)")
    add("--out", type=Path, default=Path("runs/predictions.jsonl"),
        help="file of predictions; those in it are not generated again (default: %(default)s)")
    add("--show", type=in_range(int), metavar="N", help="show N right and N wrong predictions per "
        "task of the files or runs given as MODEL, and exit (default: evaluate)")
    add("--plot", type=Path, metavar="PICTURE", help="plot accuracy against model size, or the "
        "accuracies in the log.jsonl of runs, given as MODEL (default: no plot)")
    add("--device", choices=sorted({"cpu", best_device()}), default=best_device(),
        help="where to run (default here: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    return parser.parse_args()

def find_model(name):
    """Return a model's folder or hub name; a run's model is in its folder model/."""
    run = Path(name)
    if (run / "arguments.json").exists():
        name = str(run / "model")
        if not (run / "model").exists():
            checkpoints = ", ".join(map(str, sorted(run.glob("checkpoint-*")))) or "not saved yet"
            raise UserError(f"{run}: not finished; its checkpoints are {checkpoints}")
    return name

def weights_hash(model):
    """Return a short hash of the first 64 numbers of every parameter."""
    few = [p.detach().flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(few)).hexdigest()[:16]

def main():
    """Print, and plot, the accuracies of models on tasks; or show predictions; or plot a log."""
    args = parse_arguments()
    if args.show is not None:
        for path in args.models:
            print(*show_cases(path, args.show, args.tasks, args.split or "all"), sep="\n")
        return
    if args.plot:  # if it cannot be drawn or saved, stop here, not after the evaluation
        kinds = new_axes().figure.canvas.get_supported_filetypes()
        if args.plot.suffix[1:] not in kinds or not args.plot.parent.is_dir():
            raise UserError(f"{args.plot}: not a name for a plot; choose one in an existing folder "
                            f"that ends in .{', .'.join(kinds)}")
    logs = [name for name in args.models if name.endswith(".jsonl")]
    if args.plot and logs == args.models:
        return trade_off_plot(args.plot, logs)
    if logs:
        raise UserError(f"{logs[0]}: not a model; give --plot either models or log.jsonl files, "
                        "and --show files of predictions")

    sizes = {name: count_parameters(name) for name in map(find_model, args.models)}
    if args.plot and len(set(sizes.values())) < 2:
        raise UserError("a scaling plot needs models of at least two sizes; add a model")
    tasks, split = args.tasks or list(DATASETS), args.split or "test"
    shots = args.demonstrations or args.shots
    demonstrations = load_demonstrations(shots, args.data)
    for task in tasks:  # find what is missing before evaluating the first model
        problems_and_prompts(task, args.cot, split, args.data)
    rows = [(display_name(task, args.data, args.cot, len(demonstrations)), []) for task in tasks]
    for number, name in enumerate(sizes, 1):
        print(f"{number}  {name}", flush=True)
        dtype = getattr(torch, args.dtype)
        model, tokenizer = load_pretrained(name, device=args.device, dtype=dtype)
        file = PredictionFile(args.out, name, weights=weights_hash(model), dtype=args.dtype,
                              cot=args.cot, shots=shots, max_new_tokens=args.max_new_tokens)
        for task, (_, evaluations) in zip(tasks, rows):
            evaluations.append(evaluate_task(
                model, tokenizer, task, args.cot, split, args.data, args.limit,
                demonstrations, report=lambda line, _: print(line, flush=True),
                batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, file=file))
    print(f"\n{compare(sizes, rows)}")
    if args.plot:
        points = {}
        for row, evaluations in rows:
            points[row] = [(size, 100 * e.accuracy, 100 * e.stderr)
                           for size, e in zip(sizes.values(), evaluations)]
        scaling_plot(args.plot, points)

if __name__ == "__main__":
    run_command(main)
