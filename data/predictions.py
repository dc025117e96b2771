"""Predictions after they are made and judged: their file, accuracies, the paper's table, single cases, two plots.

A prediction is a dict: task, question, prompt, output, extracted, answer, correct, correct_by_authors. This file knows
nothing of models, prompts or rules of scoring. matplotlib is imported where it draws.
"""

import itertools
import json
import math
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.download import InputError

GAP = " | "


# --- the file ---


class PredictionFile:
    """Predictions in a JSONL file, each flushed as it is made, so that an interrupted evaluation goes on.

    model: its name. settings: what else the outputs depend on besides task and prompt (the weights, the decoding).
    Both stand in each line, and a line counts as known only if all of it is the same: one file may hold many models
    and settings. Lines that an interruption or a bad disk has left unreadable are taken out of the file. Raises
    InputError where it holds something else.
    """

    def __init__(self, path, model, **settings):
        self.path, self.made_by, self.file = Path(path), {"model": model, "settings": settings}, None
        predictions, damaged = read_predictions(self.path) if self.path.exists() else ([], 0)
        if damaged:
            repaired = self.path.with_name(self.path.name + ".tmp")
            repaired.write_text("".join(map(as_line, predictions)), encoding="utf-8")
            os.replace(repaired, self.path)
            print(f"{self.path}: took out {damaged} damaged lines, which will be predicted again", file=sys.stderr)
        same = [p for p in predictions if self.made_by == {key: p.get(key) for key in self.made_by}]
        self.known = {(p["task"], p["prompt"]): p.get("outputs", [p["output"]]) for p in same}

    def outputs(self, task, prompt):
        """What the model wrote to this prompt, a list of texts, or None if that is not known."""
        return self.known.get((task, prompt))

    def add(self, prediction):
        """Append a prediction; the first one makes the file."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a", encoding="utf-8")
        self.file.write(as_line(self.made_by | prediction))
        self.file.flush()


def as_line(prediction):
    """A prediction as a line of JSON."""
    return json.dumps(prediction) + "\n"


def read_predictions(path):
    """A file's predictions as dicts, and the number of damaged lines. Raises InputError if it is not such a file."""
    predictions, damaged = [], 0
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; `python eval.py MODEL --out {path}` writes predictions") from None
    for number, line in enumerate(lines, 1):
        try:
            prediction = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            prediction = None
        if prediction is None:
            damaged += bool(line.strip())
        elif type(prediction) is dict and all(type(prediction.get(key)) is str for key in ("task", "prompt", "output")):
            predictions.append(prediction)
        else:
            raise InputError(f"{path}, line {number}: not a prediction; give --out another name, or take the line out")
    if damaged and not predictions and not (damaged == 1 and lines[0].startswith(b"{")):
        raise InputError(f"{path}: none of its lines is a prediction; give --out another name")
    return predictions, damaged


# --- accuracies ---


@dataclass
class Evaluation:
    """accuracy (0 to 1), its standard error, and a dict for each problem. Over one task the standard error is
    sqrt(p (1 - p) / n); over several tasks the accuracy is the mean of theirs."""

    accuracy: float
    stderr: float
    predictions: list


def summarize(predictions, rule="correct", other=None):
    """Predictions -> Evaluation, by the exact rule or by "correct_by_authors".

    other: predictions of another model on the same problems; then it is the difference to them, paired: its standard
    error is that of the mean of the problems' differences, smaller where both models solve the same ones.
    """
    scores = {}
    for prediction, paired in zip(predictions, other or itertools.repeat({rule: 0})):
        scores.setdefault(prediction["task"], []).append(prediction[rule] - paired[rule])
    means = [sum(task) / len(task) for task in scores.values()]
    variances = [sum((x - mean) ** 2 for x in task) / len(task) ** 2 for mean, task in zip(means, scores.values())]
    return Evaluation(sum(means) / len(means), math.sqrt(sum(variances)) / len(means), predictions)


def table(columns, rows):
    """A table as text: the columns' names, then (name, [Evaluation or None]) a row, in percent with standard errors."""
    cells = [[f"{100 * e.accuracy:.1f} ± {100 * e.stderr:.1f}" if e else "-" for e in entries] for _, entries in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    first = max(len(name) for name, _ in rows)
    lines = [" " * first + "".join(f"  {name:>{width}}" for name, width in zip(columns, widths))]
    for (name, _), entries in zip(rows, cells):
        lines.append(f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(entries, widths)))
    return "\n".join(lines)


def cost_of_rule(predictions, math_tasks):
    """Sentences that say what the authors' rules change on these outputs."""
    for is_math, name, rule in (
        (True, "math", "no sign, no thousands comma"),
        (False, "BIG-Bench Hard", 'the target anywhere after "the answer is"'),
    ):
        chosen = [p for p in predictions if (p["task"] in math_tasks) is is_math]
        refused = sum(p["correct"] and not p["correct_by_authors"] for p in chosen)
        accepted = sum(p["correct_by_authors"] and not p["correct"] for p in chosen)
        if chosen:
            yield (
                f"On {len(chosen):,} {name} outputs the authors' rule ({rule}) refuses {refused:,} right answers and "
                f"accepts {accepted:,} wrong ones: {100 * (accepted - refused) / len(chosen):+.2f} points."
            )


def compare(tasks, models, math_tasks):
    """The paper's table as text, from {model: [Evaluation of each task]}: by exact match and by the authors' rule.
    Below each model but the first stands its paired difference to the first; below the table, what the rules cost."""
    rules = ("correct", "correct_by_authors")
    rows, (baseline, *_) = [], models.values()
    for name, entries in models.items():
        rows.append((name, [summarize(e.predictions, rule) for e in entries for rule in rules]))
        if entries is not baseline:
            pairs = [(e.predictions, first.predictions) for e, first in zip(entries, baseline)]
            rows.append(("  minus the first", [summarize(new, rule, old) for new, old in pairs for rule in rules]))
    columns = [name for task, e in zip(tasks, baseline) for name in (f"{task} ({len(e.predictions)})", "authors' rule")]
    everything = [prediction for entries in models.values() for e in entries for prediction in e.predictions]
    return "\n".join([table(columns, rows), "", *cost_of_rule(everything, math_tasks)])


# --- views ---


def show_cases(path, count, width=None):
    """Lines of text: of each model and task in a file, `count` right and wrong predictions side by side."""
    predictions, _ = read_predictions(path)
    if not predictions:
        raise InputError(f"{path}: holds no prediction yet; `python eval.py MODEL --out {path}` writes some")
    width = width or min(shutil.get_terminal_size((120, 40)).columns, 200)
    half = (width - len(GAP)) // 2
    key = lambda p: (p.get("model", ""), p["task"], json.dumps(p.get("settings", {})))  # noqa: E731
    for (model, task, settings), group in itertools.groupby(sorted(predictions, key=key), key):
        group = list(group)
        right, wrong = ([p for p in group if bool(p.get("correct")) is correct] for correct in (True, False))
        yield f"{model}, {task}: {len(right)} of {len(group)} right. {settings}"
        yield f"{'right':<{half}}{GAP}wrong"
        for pair in itertools.islice(itertools.zip_longest(right, wrong), count):
            columns = [case_lines(p, half) if p else [] for p in pair]
            yield f"{'-' * half}-+-{'-' * half}"
            for left, other in itertools.zip_longest(*columns, fillvalue=""):
                yield f"{left:<{half}}{GAP}{other}".rstrip()
        yield ""


def case_lines(prediction, width):
    """A prediction as wrapped lines: the question, the output, the extracted and the gold answer."""
    extracted, gold = (
        f"{value:g}" if isinstance(value, float) else value
        for value in (prediction.get("extracted"), prediction.get("answer"))
    )
    verdict = f"-> {extracted}   gold: {gold}"
    paragraphs = (prediction.get("question") or prediction["prompt"], "", prediction["output"], verdict)
    lines = [line for paragraph in paragraphs for line in paragraph.split("\n")]
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]


def log_linear_fit(parameters, accuracies):
    """Least squares of accuracy = intercept + slope * log10(parameters): (slope, intercept)."""
    slope, intercept = np.polyfit(np.log10(parameters), accuracies, 1)
    return float(slope), float(intercept)


def scaling_plot(path, points):
    """Accuracy against the logarithm of the number of parameters, with the log-linear fit.

    points: {task: [(parameters, accuracy, standard error) of each model]}. Raises InputError for fewer than two sizes.
    """
    if any(len({size for size, _, _ in models}) < 2 for models in points.values()):
        raise InputError("the scaling plot needs models of two sizes or more")
    figure, axes = new_figure("parameters", "accuracy (%)")
    for task, models in points.items():
        sizes, accuracies, stderrs = (np.array(column) for column in zip(*sorted(models)))
        slope, intercept = log_linear_fit(sizes, 100 * accuracies)
        label = f"{task}: {slope:+.1f} points for ten times the parameters"
        drawn = axes.errorbar(sizes, 100 * accuracies, 100 * stderrs, fmt="o", capsize=3, label=label)
        axes.plot(sizes, intercept + slope * np.log10(sizes), "--", color=drawn[0].get_color())
    axes.set_xscale("log")
    save_figure(figure, axes, path)


def trade_off_plot(path, log):
    """Math accuracies on the validation parts against training steps, from a run's log.jsonl."""
    curves, number = {}, 0
    try:
        lines = Path(log).read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                if number == len(lines) and not line.endswith(b"\n"):  # the run is writing it, or was killed
                    break
                raise
            for task, (accuracy, stderr) in entry.get("validation", {}).items():
                curves.setdefault(task, []).append((entry["step"], 100 * accuracy, 100 * stderr))
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}; `python specialize.py` writes runs/NAME/log.jsonl") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{log}, line {number}: not a line of a run's log ({error}); take it out") from None
    if not curves:
        raise InputError(f"{log}: holds no validation yet")
    figure, axes = new_figure("step", "validation accuracy (%)")
    for task, entries in curves.items():
        steps, accuracies, stderrs = zip(*entries)
        axes.errorbar(steps, accuracies, stderrs, fmt="o-", capsize=3, label=task)
    save_figure(figure, axes, path)


def new_figure(xlabel, ylabel):
    """An empty figure and its axes. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, axes, path):
    """Write a figure; the name's ending tells the format."""
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
