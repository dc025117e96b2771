"""Convert the authors' released teacher data, a folder of pickles, to teacher records.

    python data/convert_release.py FOLDER OUT.jsonl.gz

The raw form has the teacher's own tokens. Its files are lists with one entry per question:

    codex_questions.pkl          "Question 7: ..."; one question is listed twice
    codex_answers.pkl            "Answer: ... #### 72", GSM8K's own solution
    codex_predictions.pkl        a list of the teacher's solutions, each "Model output 3: ..."
    codex_prediction_labels.pkl  a list of their labels, 1 if right (or codex_updated_labels.pkl,
                                 with 0 also for solutions that the authors could not align)
    codex_per_step_probs.pkl     a list of their tokens, each a list of six (token, probability)
                                 pairs: the token itself, then the teacher's five most probable

The aligned form has distributions that the authors have moved to T5's tokens, so its records are
those of a teacher whose tokens are T5's pieces. Its file is a list with one dict per solution:
question (the complete input), answer (the output), answer_gold, answer_label, and per_step_probs,
a list with {piece: probability} for each of T5's pieces of the output.
"""

import argparse
import gzip
import json
import math
import mmap
import pickle
import pickletools
import re
import sys
from collections import OrderedDict
from functools import partial
from itertools import dropwhile, groupby, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from specialize import parse_record
from t5 import Tokenizer, UserError, run_command

LABELS, UPDATED_LABELS = "codex_prediction_labels.pkl", "codex_updated_labels.pkl"
RAW = ["codex_questions.pkl", "codex_answers.pkl", "codex_predictions.pkl", LABELS]
RAW += ["codex_per_step_probs.pkl"]
# Both contain the same solutions; the inputs differ in the demonstrations before the question.
ALIGNED = ["zero_shot_chain_of_thought.pkl", "in_context_chain_of_thought.pkl"]

def main():
    """Convert a release; the output file gets its name only when it is complete."""
    parser = argparse.ArgumentParser(description="Convert the authors' release to teacher records.")
    parser.add_argument("folder", type=Path, help="folder of the release; subfolders are searched")
    parser.add_argument("out", type=Path, help="file to write, .jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", default="google/flan-t5-small", help="T5's vocabulary, for "
                        "the aligned form: file, folder or hub name (default: %(default)s)")
    args = parser.parse_args()
    part = args.out.with_name(args.out.name + ".part")
    try:
        with gzip.open(part, "wt", 5) if args.out.suffix == ".gz" else open(part, "w") as file:
            written, failures = write_records(find_solutions(args.folder, args.tokenizer), file)
        if failures:
            print(f"{len(failures):,} solutions could not be read, the first: {failures[0]}")
        if not written:
            raise UserError(f"{args.folder}: no solution could be converted; download it again")
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"Wrote {written:,} records, one per solution labelled right, to {args.out}.")

def find_solutions(folder, tokenizer):
    """Return a generator of (source, convert) per solution; convert() returns a record or None."""
    files = {}
    for path in sorted(folder.rglob("*.pkl")):
        if path.name in (*RAW, UPDATED_LABELS, *ALIGNED):
            if path.name in files:
                raise UserError(f"{files[path.name]} and {path} have the same name; remove one")
            files[path.name] = path
    if UPDATED_LABELS in files:
        files.setdefault(LABELS, files[UPDATED_LABELS])
    missing = [name for name in RAW if name not in files]
    if not missing:
        return raw_solutions([files[name] for name in RAW])
    for path in (files[name] for name in ALIGNED if name in files):
        convert = partial(aligned_record, Tokenizer(tokenizer))
        rows = enumerate(read_list(path), 1)
        return ((f"{path}, row {i}", partial(convert, row)) for i, row in rows)
    if any(folder.rglob("*_answer_only.pkl")):
        raise UserError(f"{folder}: only answer-only examples, which need no conversion: training "
                        "makes them from the other files' records; add one of those")
    raise UserError(f"{folder}: {', '.join(missing)} and {' and '.join(ALIGNED)} are missing; "
                    "download the files of one form")

def write_records(solutions, file):
    """Write a line per right solution; return how many, and a message per failure."""
    written, failures = 0, []
    for read, (source, convert) in enumerate(solutions, 1):
        if read % 500 == 0 and sys.stderr.isatty():
            print(f"{read:,} solutions read, {written:,} written", end="\r", file=sys.stderr)
        try:
            if record := convert():
                parse_record(record)  # raises what it would raise in training
                file.write(json.dumps(record) + "\n")
                written += 1
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            failures.append(f"{source}: {type(error).__name__}: {error}")
    return written, failures

# --- the raw form ---

def raw_solutions(paths):
    """Yield (source, convert) for each solution; paths are in the order of RAW."""
    questions, answers, solutions, labels = (list(read_list(path)) for path in paths[:4])
    steps = read_list(paths[4])  # most of the release: streamed, since it does not fit into memory
    if len(questions) == len(answers) + 1:  # leave out the repetition of the one listed twice
        same = groupby(questions, lambda question: without_heading(str(question)))
        questions = [next(group) for _, group in same]
    lengths = [len(questions), len(answers), len(solutions), len(labels)]
    if len(set(lengths)) > 1:
        raise UserError(f"{paths[0].parent}: {', '.join(RAW[:4])} have different lengths, "
                        f"{lengths}; download them again")
    rows = zip_longest(questions, answers, solutions, labels, steps)
    for i, (question, answer, *lists) in enumerate(rows, 1):
        source = f"{paths[4]}, question {i}"
        if {type(part) for part in lists} != {list} or len({len(part) for part in lists}) > 1:
            raise UserError(f"{source}: solutions, labels and steps are not lists of the same "
                            "length; download the files again")
        for j, (solution, label, its_steps) in enumerate(zip(*lists), 1):
            convert = partial(raw_record, question, answer, solution, label, its_steps)
            yield f"{source}, solution {j}", convert

def raw_record(question, answer, solution, label, steps):
    """Return the record of a solution in the teacher's own tokens, or None if it is wrong."""
    if label != 1:
        return None
    # The first tokens are the end of the prompt, "Let's think step by step\n".
    steps = list(dropwhile(lambda step: step[0][0] == " step" or not step[0][0].strip(), steps))
    if not steps:
        raise ValueError("there are no tokens after the prompt")
    tokens = [step[0][0] for step in steps]
    text = "".join(tokens).strip()
    return {
        "question": without_heading(question),
        "answer": without_heading(answer),
        # A token such as "bytes:\xe2" is only part of a character, and does not spell the text.
        "solution": without_heading(solution) if "bytes:" in text else text,
        "tokens": tokens,
        "top_logprobs": [log_probabilities(dict(step)) for step in steps],
    }

def without_heading(text):
    """Return a text of the release without its heading, such as "Question 7:"."""
    return re.sub(r"\A(Question \d+|Answer|Model output \d+):", "", text).strip()

def log_probabilities(distribution):
    """Return {token: natural log-probability}, without the tokens of probability 0."""
    return {token: round(math.log(p), 6) for token, p in distribution.items() if p != 0}

# --- the aligned form ---

def aligned_record(tokenizer, row):
    """Return the record of a solution with a distribution for each of T5's pieces, or None."""
    if row["answer_label"] != 1:
        return None
    question = row["question"].rpartition("\n\nQ: ")[2].removeprefix("Q: ").strip()
    solution = row["answer"].strip()
    pieces = tokenizer.split(solution)
    pairs = zip_longest(pieces, row["per_step_probs"][: len(pieces)], fillvalue={})
    # If a distribution lacks its own piece, it is left empty: training takes the piece as certain.
    usable = [probs if probs.get(piece, 0) > 0 else {} for piece, probs in pairs]
    return {
        "question": question.removesuffix("Let's think step by step").strip(),
        "answer": without_heading(row["answer_gold"]),
        "solution": solution,
        "tokens": pieces,
        "top_logprobs": [log_probabilities(probs) for probs in usable],
    }

# --- pickles as plain data ---

PLAIN = b"".join(getattr(pickle, name) for name in """
    PROTO FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
    APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BINPUT LONG_BINPUT
    MEMOIZE BINGET LONG_BINGET""".split())

def read_list(path):
    """Yield the items of a pickled list; raise UserError if it is damaged or not plain data."""
    with open(path, "rb", buffering=2**20) as file:
        try:
            yield from PlainUnpickler(file).items()
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path}: not a complete list of plain data ({type(error).__name__}: "
                            f"{error}); nothing in it was run; download it again") from None

class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler, limited to the instructions that build plain data.

    A pickle is a program for a stack machine that can import and call; this one can only build
    lists, tuples, dicts, OrderedDicts, strings, numbers, booleans and None. Items of the outermost
    list are handed out 1,000 at a time, and objects are dropped after their last use, since the 200
    million objects of the release's largest file would not fit into memory."""

    def __init__(self, file):
        super().__init__(file)
        self.read, self.readline = file.read, file.readline
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        self.count = 0  # objects that have a number so far
        # Keep the objects that the pickle may refer to again: the first 256 (by BINGET), and those
        # whose numbers follow the code of LONG_BINGET. If that byte is only part of a string, an
        # object too many is kept.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.compile(pickle.LONG_BINGET + rb"(?=(.{4}))", re.DOTALL).finditer
            self.wanted = {*range(256), *(int.from_bytes(m[1], "little") for m in found(data))}

    def items(self):
        """Yield the items of the outermost list."""
        bottom = self.stack
        while (code := self.read(1)[0]) != pickle.STOP[0]:
            if code not in PLAIN:
                raise pickle.UnpicklingError(f"it contains {pickletools.code2op[chr(code)].name}")
            self.dispatch[code](self)
            if bottom and bottom[0]:
                yield from bottom[0]
                bottom[0].clear()
        if self.stack != [[]]:
            raise ValueError("it is not a list")

    def find_class(self, module, name):
        """Return the only class that plain data need, without importing it."""
        if (module, name) != ("collections", "OrderedDict"):
            raise pickle.UnpicklingError(f"it contains {f'{module}.{name}'!r:.80}")
        return OrderedDict

    def remember(self, number):
        """Keep the newest object under its number if the pickle may refer to it again."""
        if type(self.stack[-1]) is str:
            self.stack[-1] = sys.intern(self.stack[-1])  # tokens recur: one copy of each is enough
        if number in self.wanted:
            self.memo[number] = self.stack[-1]
        self.count += 1

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in PLAIN}
    dispatch[pickle.FRAME[0]] = lambda u: u.read(8)  # a length, needed only to read ahead
    dispatch[pickle.MEMOIZE[0]] = lambda u: u.remember(u.count)
    dispatch[pickle.BINPUT[0]] = lambda u: u.remember(u.read(1)[0])
    dispatch[pickle.LONG_BINPUT[0]] = lambda u: u.remember(int.from_bytes(u.read(4), "little"))

if __name__ == "__main__":
    run_command(main)
