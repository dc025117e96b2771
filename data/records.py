"""Teacher records: a large model's solutions, with its likeliest next tokens at each step.

Knows the file formats and nothing of alignment or training.
"""

import gzip
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from align import BYTES
from data.download import InputError
from eval import Problem, gold

LONGEST = 2**24, 2**15, 2**12  # bytes of a line, characters of a text, tokens of a solution: far beyond any real one
ROUNDING = 0.001  # by which told probabilities may exceed what they can be


@dataclass
class Record:
    """One solution of the teacher: its text, and, where the teacher told them, for each of its tokens
    (token, {candidate: probability}). place: the file and line it comes from.

    format: the one data format that the record is for (None: all). aligned: where others have aligned it already, for
    each of the student's tokens {piece: probability}.
    """

    problem: Problem
    steps: list | None
    place: str
    format: str | None = None
    aligned: list | None = None


def read_teacher(path):
    """Yield teacher records, a JSON object a line (.jsonl or .jsonl.gz), each as a Record.

    Keys: question, answer (the gold answer, alone or at the end of a solution in GSM8K's form), solution, tokens and
    top_logprobs as a completions server returns them. In place of the last three, `steps` in the form of the paper's
    authors: for each token [[token, probability], then the likeliest as [token, probability]], with the prompt's last
    line before the solution. Raises InputError naming file and line.
    """
    path = Path(path)
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST[0]), b""), 1):
                if len(line) == LONGEST[0]:
                    raise ValueError("the line has no end")
                yield parse_record(json.loads(line.decode("utf-8")), f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        where = f"{path}, after line {number}" if number else f"{path}"
        raise InputError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error}); is it whole?") from None
    except KeyError as error:
        raise InputError(f"{path}, line {number}: no key {error}; data/README.md has the format") from None
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not a teacher record ({error}); mend the line or take it out") from None
    if not number:
        raise InputError(f"{path}: holds no teacher record; `python data/teacher.py` makes some")


def parse_record(record, place):
    """One line of a teacher file as a Record. Raises KeyError, TypeError, ValueError, IndexError or AttributeError."""
    if not isinstance(record, dict):
        raise TypeError(f"it is a {type(record).__name__}, not an object")
    answer = gold(str(of_kind(record["answer"], "answer", str, int, float)).rpartition("####")[2])
    steps = None
    if "steps" in record:
        steps = [(step[0][0], dict(step)) for step in of_kind(record["steps"], "steps", list)]
        if steps[0][0] == " step":  # the end of the prompt "Let's think step by step"
            steps = steps[1:]
        solution = "".join(token for token, _ in steps)
        if "bytes:" in solution and any(BYTES.fullmatch(token) for token, _ in steps):
            solution = record["solution"]  # the tokens do not spell it
    else:
        solution = record["solution"]
        if record.get("top_logprobs"):
            tokens, tops = (of_kind(record[key], key, list) for key in ("tokens", "top_logprobs"))
            if len(tokens) != len(tops):
                raise ValueError(f"{len(tokens)} tokens but {len(tops)} top_logprobs")
            steps = [(token, exponentials(token, top or {})) for token, top in zip(tokens, tops)]
    for name, text in (("question", record["question"]), ("solution", solution)):
        if len(of_kind(text, name, str)) > LONGEST[1]:
            raise ValueError(f"the {name} has {len(text):,} characters, more than {LONGEST[1]:,}")
    if steps:
        if len(steps) > LONGEST[2]:
            raise ValueError(f"{len(steps):,} tokens, more than {LONGEST[2]:,}")
        spelled = "".join(of_kind(token, "a token", str) for token, _ in steps)
        if spelled.strip() != solution.strip() and not any(BYTES.fullmatch(token) for token, _ in steps):
            raise ValueError("the tokens do not spell the solution")
        for token, candidates in steps:
            check_distribution(token, candidates)
        while steps and not steps[0][0].strip():
            steps.pop(0)
        while steps and not steps[-1][0].strip():
            steps.pop()
    return Record(Problem(record["question"], answer, solution.strip()), steps, place)


def of_kind(value, name, *kinds):
    """The value, if it is of one of the kinds. Raises TypeError."""
    if type(value) not in kinds:
        raise TypeError(f"{name} is {value!r:.50}, of the kind {type(value).__name__}, not {kinds[0].__name__}")
    return value


def exponentials(token, top):
    """{candidate: log-probability} -> {candidate: probability}. Raises ValueError where a logarithm is above 0."""
    for candidate, logarithm in of_kind(top, "an entry of top_logprobs", dict).items():
        if not of_kind(logarithm, "a log-probability", float, int) <= ROUNDING:
            raise ValueError(f"at token {token!r} {candidate!r} has log-probability {logarithm}, above 0 or not a number")
    return {candidate: math.exp(logarithm) for candidate, logarithm in top.items()}


def check_distribution(token, candidates):
    """Raise ValueError (TypeError) where {candidate: probability} is no part of a distribution, rounding aside."""
    for candidate, probability in candidates.items():
        of_kind(candidate, "a candidate", str)
        if not 0 <= of_kind(probability, "a probability", float, int) <= 1 + ROUNDING:
            raise ValueError(f"at token {token!r} {candidate!r} has probability {probability}")
    if (total := sum(candidates.values())) > 1 + 10 * ROUNDING:
        raise ValueError(f"at token {token!r} the candidates are no probabilities: they sum to {total:.4f}")
