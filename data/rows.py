"""From teacher records to training rows: what the student should write, and what the teacher thought at each token.

Wrong solutions are dropped here, the teacher's tokens are aligned with the student's, and its distributions carried
over. Knows nothing of batches, losses or models.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align import align_batch, one_to_one, transfer, transfer_aligned
from data.cache import load_rows, made_from, save_rows
from data.download import InputError
from data.records import Record, read_teacher
from data.release import read_release, release_files
from eval import Problem, extract_number, is_correct, load, math_target
from t5 import EOS

ROOT = Path(__file__).resolve().parents[1]

# The four data formats (section 4.2): (chain of thought, in context).
FORMATS = {
    "in_context_cot": (True, True),
    "in_context_answer_only": (False, True),
    "zero_shot_cot": (True, False),
    "zero_shot_answer_only": (False, False),
}


@dataclass
class Row:
    """A training example without its demonstrations, which are drawn anew each epoch.

    labels (T,): the output's ids with </s>. ids, probs (T, k): the teacher's distributions, or None for likelihood.
    """

    format: str
    problem: Problem
    labels: np.ndarray
    ids: np.ndarray | None
    probs: np.ndarray | None
    place: str


def make_rows(records, tokenizer, formats, loss, k=5):
    """Records with right answers -> rows of the given formats, and a sentence on what came of them.

    Chain-of-thought formats take every solution, with the teacher's distributions unless loss is "nll" or the teacher
    told none; answer-only formats one row a question, without. records may be a generator: 2,000 are held at a time.
    Raises InputError where no solution is right.
    """
    index = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    counts = dict.fromkeys(("read", "right", "tokens", "matched"), 0)
    rows, first, last, records = [], {}, None, iter(records)
    while some := list(itertools.islice(records, 2000)):
        counts["read"], last = counts["read"] + len(some), some[-1]
        some = [record for record in some if is_correct(record.problem.solution, record.problem.answer)]
        counts["right"] += len(some)
        for record in some:
            for name in formats if record.format is None else [record.format]:
                if name in formats and not FORMATS[name][0]:
                    first.setdefault((name, record.problem.question), (record.problem, record.place))
        some = [record for record in some if record.format is None or FORMATS[record.format][0]]
        targets = teacher_targets(some, tokenizer, index, k, counts) if loss != "nll" else [(None, None)] * len(some)
        for record, (ids, probs) in zip(some, targets):
            labels = np.array(tokenizer.encode(target_text(record)), np.int32)
            if ids is not None:  # </s> is certain
                ids = np.vstack([ids, np.eye(1, k, dtype=np.int32) * EOS])
                probs = np.vstack([probs, np.eye(1, k, dtype=np.float32)])
            names = [f for f in formats if FORMATS[f][0] and record.format in (None, f)]
            rows += [Row(f, record.problem, labels, ids, probs, record.place) for f in names]
    if not counts["right"]:
        told = f"the last, {last.place}, in {extract_number(last.problem.solution)} and not {last.problem.answer}" if last else ""
        raise InputError(f"none of {counts['read']:,} teacher solutions ends in its right answer ({told}); --teacher takes others")
    for (name, _), (problem, place) in first.items():
        labels = np.array(tokenizer.encode(math_target(problem, cot=False)), np.int32)
        rows.append(Row(name, problem, labels, None, None, place))
    summary = f"{counts['right']:,} of {counts['read']:,} solutions are right"
    if counts["tokens"]:
        share = counts["matched"] / counts["tokens"]
        summary += f"; {share:.1%} of {counts['tokens']:,} student tokens take the teacher's distribution"
    return rows, summary


def teacher_targets(records, tokenizer, index, k, counts):
    """For each record its target rows (ids, probs), or (None, None) where the teacher told no distributions."""
    targets = [(None, None)] * len(records)
    steps = [with_answer(record) for record in records]
    pairs = [([token for token, _ in s], tokenizer.split(target_text(r))) for s, r in zip(steps, records)]
    aligned = align_batch(pairs)
    for j, ((teacher, student), a) in enumerate(zip(pairs, aligned)):
        if teacher:
            targets[j] = transfer(steps[j], student, index, k, a)
            counts["matched"] += sum(i is not None for i in one_to_one(teacher, student, a))
        elif (told := records[j].aligned) is not None:
            targets[j] = transfer_aligned(told, student, index, k)
            counts["matched"] += sum(len(distribution) > 1 for distribution in told)
        counts["tokens"] += len(student) if targets[j][0] is not None else 0
    return targets


def target_text(record):
    """The output of the chain-of-thought formats; a solution that states its answer keeps its own last line."""
    stated = "answer is" in record.problem.solution.rpartition("\n")[2]
    return record.problem.solution if stated else math_target(record.problem, cot=True)


def with_answer(record):
    """The record's steps; where the teacher did not state the answer, its line is one more step without candidates."""
    line = target_text(record).removeprefix(record.problem.solution)
    return record.steps + [(line, {})] * bool(line) if record.steps else []


def training_records(teacher, folder):
    """The teacher's records, or GSM8K's own written solutions where there is no teacher."""
    if teacher:
        yield from read_teacher(teacher)
        return
    print("no --teacher: training by likelihood on GSM8K's own written solutions")
    for number, problem in enumerate(load("gsm8k", "train", folder), 1):
        stated = dataclasses.replace(problem, solution=math_target(problem, cot=True))
        yield Record(stated, None, f"GSM8K problem {number}")


def training_rows(tokenizer, teacher, folder, formats, loss):
    """The rows to train on and a sentence on them.

    teacher: a file of records, the folder of the authors' release, or None for GSM8K's own solutions, from the problem
    sets in folder. A release is aligned once, for all formats, and its rows are kept beside its files. Raises
    InputError where a wanted format has no row.
    """
    if not (teacher and teacher.is_dir()):
        return make_rows(training_records(teacher, folder), tokenizer, formats, loss)
    names = ("align.py", "eval.py", *(f"data/{name}.py" for name in ("records", "release", "pickles", "rows", "cache")))
    code = [ROOT / name for name in names]
    origin, cache = made_from([*release_files(teacher), tokenizer.path, *code]), teacher / "rows.npz"
    found = load_rows(cache, origin, Row)
    if not found:
        print(f"aligning the release in {teacher}; {cache} will keep the result", flush=True)
        found = make_rows(read_release(teacher), tokenizer, list(FORMATS), "kl")
        try:
            save_rows(cache, *found, origin)
        except OSError as error:
            print(f"{cache} cannot be written ({error.strerror}): the next start will align again")
        found = load_rows(cache, origin, Row) or found  # the same rows, in less memory
    rows, summary = found
    rows = [row for row in rows if row.format in formats]
    if lacking := set(formats) - {row.format for row in rows}:
        raise InputError(f"{teacher} has no row of {', '.join(sorted(lacking))}; --formats chooses others")
    if loss == "nll":
        rows = [dataclasses.replace(row, ids=None, probs=None) for row in rows]
    return rows, summary
