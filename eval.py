"""Problem sets, prompts, answer extraction and accuracy: what math gained and what BBH lost.

The order is that of an answer: a problem is read and becomes a prompt, the model writes an output,
the final answer is extracted and compared. Exact match counts; the looser rule of the paper's
authors is computed beside it. Tables, plots and the command come last.

    python eval.py google/flan-t5-base google/flan-t5-large --tasks gsm8k,multiarith,asdiv,svamp,bbh
    python eval.py --show 5 runs/predictions.jsonl
    python eval.py --plot scaling.png google/flan-t5-small google/flan-t5-base
"""

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from t5 import UserError, best_device, download, free_memory, in_range, is_out_of_memory
from t5 import load_pretrained, model_file, packed_weights, pad_sequences, run_command
from t5 import show_progress

import numpy as np
import torch  # after t5, which sets how OpenMP's threads wait: that must precede torch

TOY = Path(__file__).resolve().parent / "data" / "toy"
DEFAULT_DATA = Path(__file__).resolve().parent / "data" / "downloads"

# --- problems ---

@dataclass
class Problem:
    """A question with its gold answer: a float if it is a number, otherwise text.

    solution: the reference reasoning, if any, without calculator marks and final-answer line.
    written: GSM8K's answer as published, with its commas, for the authors' scoring rule."""

    question: str
    answer: float | str
    solution: str = ""
    written: str = ""

    def __post_init__(self):
        if not (isinstance(self.question, str) and self.question.strip()):
            raise ValueError("the question is empty or not a string")
        is_number = isinstance(self.answer, float) and math.isfinite(self.answer)
        if not (is_number or (isinstance(self.answer, str) and self.answer)):
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
    return Problem(f"{body} {question}", parse_gold_answer(re.sub(r"\s+\([^()]*\)", "", answer)))

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
    """A math problem set.

    file: its path in the data folder (.jsonl, .json or .xml).
    parse: a function from one entry (a line, an object, a node) to a Problem.
    validation: the size of the validation part (at most half); no set has an official one.
    validate: evaluate the validation part at every checkpoint.
    select: count it in the choice of the checkpoint; this needs validate."""

    name: str
    file: str
    parse: Callable
    validation: int
    validate: bool
    select: bool

# GSM8K is in distribution (training uses its training set), so it does not select.
DATASETS = {
    "gsm8k": Dataset("GSM8K", "gsm8k/test.jsonl", parse_gsm8k, 500, validate=True, select=False),
    "multiarith": Dataset("MultiArith", "multiarith/MultiArith.json", parse_multiarith, 200,
                          validate=True, select=True),
    "asdiv": Dataset("ASDiv", "asdiv/ASDiv.xml", parse_asdiv, 500, validate=True, select=True),
    "svamp": Dataset("SVAMP", "svamp/SVAMP.json", parse_svamp, 500, validate=True, select=True),
}
GSM8K_TRAIN = "gsm8k/train.jsonl"
GITHUB = os.environ.get("GITHUB_ENDPOINT", "https://raw.githubusercontent.com").rstrip("/")
# Where the problem sets are published, {file: [repository at a commit, path there, SHA-256]}, and
# the names of BBH's 27 tasks.
PUBLISHED = json.loads((TOY.parent / "sources.json").read_text(encoding="utf-8"))
SOURCES, BBH_SOURCE, BBH_TASKS = (PUBLISHED[key] for key in ("files", "bbh", "bbh_tasks"))

def bbh_tasks(folder):
    """Return BBH's tasks, or those in the data folder if it has others, as the toy's has."""
    found = {path.stem for path in Path(folder).glob("bbh/bbh/[!.]*.json")}
    return sorted(found) if found - set(BBH_TASKS) else BBH_TASKS

def display_name(task, folder, cot=True):
    """Return a task's name for tables, so that nobody takes the toy world for the real sets."""
    is_toy = Path(folder).resolve() == TOY
    if task == "bbh":
        return f"{'generic' if is_toy else 'BBH'} {'CoT' if cot else 'answer-only'}"
    name = DATASETS[task].name if task in DATASETS else task
    return f"toy-{name}" if is_toy else name

def data_file(folder, name):
    """Return the path of a file in the data folder, after downloading it if it is missing."""
    if name in SOURCES:
        repository, path, sha256 = SOURCES[name]
        return download(f"{GITHUB}/{repository}/{path}", Path(folder) / name, sha256)
    if name.startswith("bbh/"):
        url = f"{GITHUB}/{BBH_SOURCE}/{name.removeprefix('bbh/')}"
        return download(url, Path(folder) / name)
    return Path(folder) / name

def load(task, split="test", folder=DEFAULT_DATA):
    """Return the problems of a math set or of a BBH task as a list of Problem.

    split: "train" (only GSM8K has one), "validation", "test" or "all". Validation and test parts
    are drawn with a fixed seed and are in random order, so that the first n are a sample. All of a
    BBH task is its test part. Raises UserError naming the file and the problem."""
    if task not in DATASETS and task not in bbh_tasks(folder):
        known = ", ".join([*DATASETS, *bbh_tasks(folder)])
        raise UserError(f"no task {task!r}; choose from {known}")
    parts = ["validation", "test", "all"] if task in DATASETS else ["test", "all"]
    if task == "gsm8k":
        parts.append("train")
    if split not in parts:
        raise UserError(f"{task} has no {split!r} part; choose from {', '.join(parts)}")
    if split == "train":
        return read_problems(data_file(folder, GSM8K_TRAIN), parse_gsm8k)
    size, file, parse = 0, f"bbh/bbh/{task}.json", parse_bbh
    if task in DATASETS:
        size, file, parse = DATASETS[task].validation, DATASETS[task].file, DATASETS[task].parse
    problems = read_problems(data_file(folder, file), parse)
    if split == "all":
        return problems
    random.Random(0).shuffle(problems)
    size = min(size, len(problems) // 2)
    return problems[:size] if split == "validation" else problems[size:]

# What parsing data that are not as expected can raise.
BAD_DATA = ValueError, LookupError, TypeError, AttributeError, RecursionError

def read_problems(path, parse):
    """Read a file of problems. Raises UserError naming the file and the line or problem."""
    problems = []
    remedy = "fix the file; a publisher's file is downloaded again after you delete it"
    try:
        for entry in read_entries(path):
            problems.append(parse(entry))
        if not problems:
            raise ValueError("it contains no problem")
        return problems
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; put the file there") from None
    except (*BAD_DATA, ElementTree.ParseError) as error:
        fault = f"no key {error}" if isinstance(error, KeyError) else error
        unit = "line" if Path(path).suffix == ".jsonl" else "problem"
        raise UserError(f"{path}, {unit} {len(problems) + 1}: {fault}; {remedy}") from None

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
    ask = f"Q: {question}\n" + ("Let's think step by step" if cot else "A:")
    return "".join(math_demonstration(problem, cot) for problem in demonstrations) + ask

def math_demonstration(problem, cot):
    """Return a solved problem as it precedes the question in context."""
    ask = f"Q: {problem.question}\n" + ("Let's think step by step\n" if cot else "A: ")
    return f"{ask}{math_target(problem, cot)}\n\n"

def bbh_prompt(task, question, cot, folder=DEFAULT_DATA):
    """Return a BBH question after the benchmark's three demonstrations of its task."""
    ask = "A: Let's think step by step." if cot else "A:"
    return f"{bbh_demonstrations(task, cot, folder)}Q: {question}\n{ask}"

@functools.cache
def bbh_demonstrations(task, cot, folder):
    """Return a task's description and demonstrations; answer-only drops their reasoning."""
    path = data_file(folder, f"bbh/cot-prompts/{task}.txt")
    try:
        text = path.read_text(encoding="utf-8").partition("-----\n")[2].strip()
        if not text:
            raise ValueError("no demonstrations after a line of five hyphens")
        if not cot:
            reasoning = r"A: Let's think step by step\..*?[Tt]he answer is (.*?)\.?(?=\n\nQ: |\Z)"
            text, count = re.subn(reasoning, r"A: \1", text, flags=re.DOTALL)
            if count != text.count("\nQ: "):
                raise ValueError("not every demonstration ends in 'the answer is ...'")
        return text + "\n\n"
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete it to download it again") from None

# --- answers ---

# Other spellings of numbers -> the spelling that NUMBER reads, replaced in this order.
PLAIN_SPELLINGS = {
    r"(?s)^(\D*\d.*?)(?<=[^\s*#])\s[\s*#]*(?:Q|Question|Problem)[ \d]*:.*": r"\1",  # 72\n\nQ: Is 5
    r"\\?[$€£]|\\!": "",  # -$5, $-5, \$5; 70,\!000
    r"[\u2010-\u2013\u2212\ufe63\uff0d]|\u2014(?=\d)": "-",  # dashes and minus signs
    r"(?<=\d)(?<!\d{4})\{?\\?,\}?(?=\d{3}(?!\d))": "",  # 9,500; 9{,}500; 9\,500
    r"(?: |\\,)?(-?)\\.?frac(?:\{(-?[\d.]+)\}\{(\d+)\}|(\d)(\d))": r" \1\2\4/\3\5",  # \frac{3}{4}
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
    """Return the final answer of a BBH output by the benchmark's rule.

    It is what follows the last "answer is ", without a final period, or else the complete text, as
    in answer-only outputs. Compare with ==: an output like "(A) or (B)" matches neither option."""
    _, phrase, answer = text.rpartition("answer is ")
    return answer.strip().removesuffix(".") if phrase else answer.strip()

def exact_match(output, answer):
    """Return whether the final answer of an output equals the gold answer, a float or a text."""
    extract = extract_number if isinstance(answer, float) else extract_choice
    return extract(output) == answer

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

def self_consistency(outputs, extract):
    """Return the first sampled output whose answer is the most common one (Wang et al., 2022,
    arXiv 2203.11171). Math outputs without a number do not vote."""
    answers = [extract(output) for output in outputs]
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return outputs[answers.index(votes.most_common(1)[0][0])] if votes else outputs[0]

# --- accuracy ---

def evaluate(model, tokenizer, problems, prompt=None, batch_size=32, max_new_tokens=256, samples=1,
             temperature=0.7, task="gsm8k", cot=True, file=None):
    """Evaluate a model on problems: greedily, or by majority vote over sampled outputs.

    prompt: a function from question to input (default: zero-shot math, chain of thought or not).
    task: the name that predictions carry; it decides on the authors' rule.
    file: a PredictionFile; outputs already in it are re-scored but not generated again.
    Return an Evaluation with the predictions in the order of the problems."""
    if not problems:
        raise UserError(f"{task}: no problem to evaluate; raise --limit")
    prompt = prompt or functools.partial(math_prompt, cot=cot)
    prompts = [prompt(problem.question) for problem in problems]
    outputs = [file.outputs(task, text) if file else None for text in prompts]
    input_ids = {i: tokenizer.encode(prompts[i]) for i, known in enumerate(outputs) if not known}
    device = model.shared.weight.device
    options = {"max_new_tokens": max_new_tokens, "num_samples": samples}
    if samples > 1:
        options |= {"temperature": temperature, "generator": torch.Generator(device).manual_seed(0)}

    # Problems of similar length share a batch, so that little is padded. The longest come first: if
    # they fit into memory, all do.
    order = sorted(input_ids, key=lambda i: -len(input_ids[i]))
    with packed_weights(model.decoder, model.lm_head):
        while order:
            fixed, row = model.generation_memory(len(input_ids[order[0]]), max_new_tokens)
            rows = int((0.9 * free_memory(device.type) - fixed) / (row * samples))
            batch = order[: max(1, min(batch_size, rows))]
            source = pad_sequences([input_ids[i] for i in batch], device)
            try:
                generated = model.generate(source, **options).tolist()
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                batch_size = len(batch) // 2
                print(f"out of memory: {task} goes on with batches of {batch_size}", flush=True)
                continue
            for n, i in enumerate(batch):  # samples are adjacent
                outputs[i] = [tokenizer.decode(generated[n * samples + k]) for k in range(samples)]
                if file:
                    file.add(score(problems[i], task, prompts[i], outputs[i], cot))
            order = order[len(batch) :]
            show_progress(f"{task}: {len(problems) - len(order)} of {len(problems)}")
    show_progress("")
    return summarize([score(problem, task, prompts[i], outputs[i], cot)
                      for i, problem in enumerate(problems)])

def score(problem, task, prompt, outputs, cot):
    """Return the prediction for a problem: a dict with its score by exact match and by the
    authors' rule."""
    extract = extract_number if isinstance(problem.answer, float) else extract_choice
    output = self_consistency(outputs, extract)
    written = problem.written or number_text(problem.answer)
    prediction = {
        "task": task, "question": problem.question, "prompt": prompt, "output": output,
        "extracted": extract(output), "answer": problem.answer,
        "correct": exact_match(output, problem.answer),
        "correct_by_authors": authors_match(output, written, task in DATASETS, cot),
    }
    return prediction | ({"outputs": outputs} if len(outputs) > 1 else {})

def evaluate_task(model, tokenizer, task, cot, split="test", folder=DEFAULT_DATA, limit=None,
                  shots=0, **options):
    """Evaluate a task by name; "bbh" is the mean over all BBH tasks. BBH has only a test part.

    limit: at most this many problems per task.
    shots: demonstrations from GSM8K's training set before a math problem (BBH has its own three).
    options: see evaluate()."""
    if task == "bbh":
        parts = [evaluate_task(model, tokenizer, name, cot, "test", folder, limit, **options)
                 for name in bbh_tasks(folder)]
        return summarize([prediction for part in parts for prediction in part.predictions])
    if task in DATASETS:
        problems = load(task, split, folder)[:limit]
        pool = load("gsm8k", "train", folder) if shots else []
        demonstrations = random.Random(0).sample(pool, shots)
        prompt = functools.partial(math_prompt, cot=cot, demonstrations=demonstrations)
    else:
        problems = load(task, "test", folder)[:limit]
        prompt = functools.partial(bbh_prompt, task, cot=cot, folder=folder)
    return evaluate(model, tokenizer, problems, prompt, task=task, cot=cot, **options)

@dataclass
class Evaluation:
    """An accuracy (0 to 1) or a difference of two, its standard error, and one prediction (a dict)
    per problem."""

    accuracy: float
    stderr: float
    predictions: list

def summarize(predictions, rule="correct", baseline=None):
    """Average predictions over tasks; return an Evaluation.

    rule: "correct" (exact match) or "correct_by_authors".
    baseline: another model's predictions on the same problems. Then the result is the difference to
    them, with the standard error of paired differences."""
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

    Each line records the model's name and the settings that affect its output (weights, decoding).
    A line is reused only if task, prompt, model and settings are the same, so one file can hold
    several models. A line cut short by an interruption is ignored."""

    def __init__(self, path, model, **settings):
        self.path = Path(path)
        self.origin = {"model": model, "settings": settings}
        self.known = {}
        for p in read_predictions(path) if self.path.exists() else ():
            if {key: p.get(key) for key in self.origin} == self.origin:
                self.known[p["task"], p["prompt"]] = p.get("outputs", [p["output"]])
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with open(self.path, "a") as file:
                file.write("\n")  # end a line that was cut short

    def outputs(self, task, prompt):
        """Return the model's outputs for a prompt, a list of texts, or None if unknown."""
        return self.known.get((task, prompt))

    def add(self, prediction):
        """Append a prediction."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(self.origin | prediction) + "\n")

def read_predictions(path):
    """Read a file of predictions as dicts. Raises UserError if it is something else."""
    predictions = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; eval.py MODEL --out writes one") from None
    for number, line in enumerate(lines, 1):
        try:
            prediction = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short
        keys = ("task", "prompt", "output")
        if type(prediction) is not dict or not all(type(prediction.get(k)) is str for k in keys):
            raise UserError(f"{path}, line {number}: not a prediction; choose another --out")
        predictions.append(prediction)
    if lines and not predictions and not lines[0].startswith(b"{"):
        raise UserError(f"{path}: not a file of predictions; choose another --out")
    return predictions

def table(columns, rows):
    """Format a table: column names, then rows (name, [Evaluation or None]) in percent."""
    lines = [["accuracy, %", *columns]]
    for name, entries in rows:
        lines.append([name, *("-" if e is None else f"{100 * e.accuracy:.1f} ± {100 * e.stderr:.1f}"
                              for e in entries)])
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"{name:<{first}}" + "".join(f"  {x:>{n}}" for x, n in zip(cells, widths))
                     for name, *cells in lines)

def compare(names, models):
    """Format a table with a row per task and a column per model, {model: [Evaluation per task]}.

    Each model but the first also has a column with its paired difference to the first. Below the
    rows by exact match are the same rows by the authors' rules."""
    baseline, *others = models.values()
    columns, rows = list(models) + [f"{name} - first" for name in list(models)[1:]], []
    for rule, suffix in (("correct", ""), ("correct_by_authors", ", authors' rule")):
        for i, name in enumerate(names):
            entries = [summarize(e[i].predictions, rule) for e in models.values()]
            entries += [summarize(e[i].predictions, rule, baseline[i].predictions) for e in others]
            rows.append((f"{name} ({len(baseline[i].predictions)}){suffix}", entries))
    return table(columns, rows)

def show_cases(path, count, tasks):
    """Yield lines of text: up to `count` right and wrong predictions per model, task and settings.
    tasks: names, "bbh" for all that are not math sets, or nothing for all."""
    width = shutil.get_terminal_size((80, 24)).columns
    groups = {}
    for p in read_predictions(path):
        if not tasks or p["task"] in tasks or ("bbh" in tasks and p["task"] not in DATASETS):
            settings = json.dumps(p.get("settings", {}))
            key = str(p.get("model")), p["task"], settings, not p.get("correct")
            groups.setdefault(key, []).append(p)
    if not groups:
        raise UserError(f"{path}: no prediction of these tasks yet; `eval.py MODEL` writes them")
    for (model, task, settings, wrong), cases in sorted(groups.items()):
        yield f"=== {model}, {task}: {len(cases)} {'wrong' if wrong else 'right'} === {settings}"
        for p in cases[:count]:
            answer = f"-> {p.get('extracted')}   gold: {p.get('answer')}"
            text = f"{p.get('question') or p['prompt']}\n\n{p['output']}\n{answer}"
            for line in text.split("\n"):
                yield from textwrap.wrap(line, width) or [""]
            yield "-" * width

# --- plots ---

def log_linear_fit(parameters, accuracies):
    """Fit accuracy = intercept + slope * log10(parameters) by least squares; return the slope, its
    standard error (NaN for two points) and the intercept."""
    x, y = np.log10(parameters), np.array(accuracies)
    slope, intercept = np.polyfit(x, y, 1)
    residuals = y - intercept - slope * x
    variance = np.square(residuals).sum() / (len(x) - 2) if len(x) > 2 else math.nan
    return slope, np.sqrt(variance / np.square(x - x.mean()).sum()), intercept

def scaling_plot(path, points):
    """Plot accuracy against model size, with the log-linear fit.

    points: {label: [(parameters, accuracy in percent, standard error)]}, at least two sizes."""
    if any(len({size for size, _, _ in models}) < 2 for models in points.values()):
        raise UserError("a scaling plot needs models of at least two sizes; add a model")
    figure, axes = new_figure("parameters", "accuracy (%)")
    ends = []
    for label, models in points.items():
        sizes, accuracies, stderrs = (np.array(column) for column in zip(*sorted(models)))
        slope, error, intercept = log_linear_fit(sizes, accuracies)
        dots, *_ = axes.errorbar(sizes, accuracies, stderrs, fmt="o", capsize=3)
        fit = intercept + slope * np.log10(sizes)
        axes.plot(sizes, fit, "--", color=dots.get_color())
        error = "" if math.isnan(error) else f" ± {error:.0f}"
        label = f"{label}\n{slope:+.0f}{error} per factor 10"
        ends.append((sizes[-1], fit[-1], label, dots.get_color()))
    axes.set_xscale("log")
    label_ends(axes, ends, lines=2)
    save_figure(figure, path)

def curves_plot(path, curves, ylabel="accuracy (%)", mark=None):
    """Plot curves over training steps: {label: [(step, mean, standard error)]}.
    mark: a step to mark with a vertical line, the selected checkpoint's."""
    figure, axes = new_figure("optimizer step", ylabel)
    ends = []
    for label, points in curves.items():
        steps, means, errors = zip(*points)
        line, *_ = axes.errorbar(steps, means, errors, marker=".", capsize=2)
        ends.append((steps[-1], means[-1], label, line.get_color()))
    if mark is not None:
        axes.axvline(mark, color="gray", linestyle=":")
        axes.annotate("selected", (mark, 1), xycoords=("data", "axes fraction"), ha="right",
                      va="bottom", color="gray")
    label_ends(axes, ends)
    save_figure(figure, path)

def label_ends(axes, ends, lines=1):
    """Write each curve's label at its end, (x, y, label, color), moved up where two would meet."""
    low, high = axes.get_ylim()
    free = -math.inf  # the height from which on there is room
    for x, y, label, color in sorted(ends):
        free = max(y, free)
        axes.annotate(label, (x, free), (6, 0), textcoords="offset points", va="center",
                      color=color, annotation_clip=False)
        free += 0.075 * lines * (high - low)

def trade_off_plot(path, logs):
    """Plot the accuracies in logs of runs against training steps: the math validation sets, and
    BIG-Bench Hard if --bbh-limit measured it. With one log, mark the selected checkpoint."""
    curves, selected = {}, None
    for log in map(Path, logs):
        arguments = read_object(log.with_name("arguments.json"))
        selected = read_object(log.with_name("results.json")).get("selected", {}).get("step")
        prefix = f"{log.parent.name}, " if len(logs) > 1 else ""
        for label, points in log_curves(read_log(log), arguments.get("data", "")).items():
            curves[prefix + label] = points
    if not curves:
        raise UserError(f"{logs[0]}: no validation yet; wait for the first checkpoint")
    curves_plot(path, curves, mark=selected if len(logs) == 1 else None)

def log_curves(entries, data):
    """Return the accuracies in a log as {label: [(step, percent, standard error)]}."""
    curves = {}
    for entry in entries:
        measured = {display_name(task, data): value
                    for task, value in entry.get("validation", {}).items()}
        measured |= {display_name("bbh", data, prompting == "CoT"): value
                     for prompting, value in entry.get("bbh", {}).items()}
        for label, (accuracy, stderr) in measured.items():
            point = entry["step"], 100 * accuracy, 100 * stderr
            curves.setdefault(label, []).append(point)
    return curves

def read_object(path):
    """Return the JSON object in a file, or {} if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

def read_log(path):
    """Read a run's log.jsonl as a list of dicts, without a last line that was cut short."""
    entries = []
    try:
        for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]:
            entry = json.loads(line)
            int(entry["step"])  # these raise if the entry is none of a log's
            dict(entry.get("validation", {}).values())
            entries.append(entry)
        return entries
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose the log.jsonl of a run") from None
    except BAD_DATA as error:
        raise UserError(f"{path}, line {len(entries) + 1}: not an entry of a log ({error}); delete "
                        "this line") from None

def new_figure(xlabel, ylabel):
    """Return an empty figure and its axes. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib; run: pip install matplotlib") from None
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes

def save_figure(figure, path):
    """Write a figure in the format of the file's extension."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; choose another name") from None

# --- the command ---

def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate T5 checkpoints on math problems and BIG-Bench Hard.")
    add, positive = parser.add_argument, in_range(int, above=0)
    add("models", nargs="+", metavar="MODEL", help="folders or hub names")
    add("--tasks", help=f"of {', '.join(DATASETS)}, bbh and the names of BBH tasks, separated by "
        "commas (default: the math sets)")
    add("--shots", type=int, default=0, choices=[0, 4], help="demonstrations before a math problem "
        "(default: 0; BBH has its own three)")
    add("--answer-only", dest="cot", action="store_false", help="prompt without chain of thought")
    add("--samples", type=positive, default=1, metavar="N", help="self-consistency: majority vote "
        "over N sampled outputs (default: 1, greedy decoding)")
    add("--temperature", type=in_range(float, above=0), default=0.7, help="sampling temperature "
        "with --samples (default: 0.7)")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder of the problem sets")
    add("--split", default="test", choices=["validation", "test", "all"], help="part of the math "
        "sets (default: test)")
    add("--limit", type=positive, help="problems per task (default: all)")
    add("--batch-size", type=positive, default=32, help="problems per batch (default: 32)")
    add("--max-new-tokens", type=positive, default=256, help="longest output (default: 256)")
    add("--out", type=Path, default=Path("runs/predictions.jsonl"), help="file of predictions; "
        "those in it are not generated again (default: %(default)s)")
    add("--show", type=in_range(int), metavar="N", help="show N right and N wrong predictions per "
        "task of the files given as MODEL, and exit")
    add("--plot", type=Path, metavar="PICTURE", help="plot accuracy against model size, or the "
        "accuracies in the log.jsonl of runs, given as MODEL")
    add("--device", choices=sorted({"cpu", best_device()}), default=best_device(),
        help="where to run (default here: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"],
        help="type of the weights (default: %(default)s)")
    args = parser.parse_args()
    args.tasks = [task.strip() for task in args.tasks.split(",")] if args.tasks else []
    return args

def weights_hash(model):
    """Return a short hash of the first 64 numbers of every parameter."""
    few = [p.detach().flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(few)).hexdigest()[:16]

def main():
    """Print, and plot, the accuracies of models on tasks; or show predictions; or plot a log."""
    args = parse_arguments()
    if args.show is not None:
        for path in args.models:
            print(*show_cases(path, args.show, args.tasks), sep="\n")
        return
    if args.plot and args.models[0].endswith(".jsonl"):
        return trade_off_plot(args.plot, args.models)
    args.tasks = args.tasks or list(DATASETS)
    known = [*DATASETS, "bbh", *bbh_tasks(args.data)]
    if unknown := [task for task in args.tasks if task not in known]:
        raise UserError(f"no task {unknown[0]!r}; choose from {', '.join(known)}")
    if args.plot:
        new_figure("", "")  # raises if matplotlib is missing
    for name in args.models:  # find all models before evaluating the first
        model_file(name, "config.json")
    models, points = {}, {task: [] for task in args.tasks}
    for name in args.models:
        dtype = getattr(torch, args.dtype)
        model, tokenizer = load_pretrained(name, device=args.device, dtype=dtype)
        decoding = {"max_new_tokens": args.max_new_tokens, "samples": args.samples,
                    "temperature": args.temperature if args.samples > 1 else 0.0}
        file = PredictionFile(args.out, name, weights=weights_hash(model), dtype=args.dtype,
                              cot=args.cot, shots=args.shots, **decoding)
        models[name] = [
            evaluate_task(model, tokenizer, task, args.cot, args.split, args.data, args.limit,
                          args.shots, batch_size=args.batch_size, file=file, **decoding)
            for task in args.tasks]
        size = sum(parameter.numel() for parameter in model.parameters())
        for task, e in zip(args.tasks, models[name]):
            points[task].append((size, 100 * e.accuracy, 100 * e.stderr))
    print(compare([display_name(task, args.data, args.cot) for task in args.tasks], models))
    if args.plot:
        scaling_plot(args.plot, points)

if __name__ == "__main__":
    run_command(main)
