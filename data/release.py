"""The authors' released teacher data, a folder of pickles, as teacher records.

It comes in two forms: the teacher's own tokens, in parallel lists over the questions (codex_*.pkl), or training examples
whose distributions the authors have aligned with T5's tokens, a file for each data format. data/README.md has the
formats. Knows nothing of alignment or training.
"""

import re

from data.download import InputError
from data.pickles import read_list
from data.records import Record, check_distribution, of_kind, parse_record
from eval import Problem, extract_number

CODEX = [f"codex_{part}.pkl" for part in ("questions", "answers", "predictions", "prediction_labels", "per_step_probs")]
FAULTS = ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError  # of what plain data may hold
ALIGNED = {
    "in_context_chain_of_thought.pkl": "in_context_cot",
    "in_context_answer_only.pkl": "in_context_answer_only",
    "zero_shot_chain_of_thought.pkl": "zero_shot_cot",
    "zero_shot_answer_only.pkl": "zero_shot_answer_only",
}


def release_files(folder):
    """The files of the release in a folder: the teacher's own tokens where they are there, else what is aligned already.

    Raises InputError where there is neither.
    """
    for names, enough in ((CODEX, len(CODEX)), (ALIGNED, 1)):
        paths = [folder / name for name in names if (folder / name).exists()]
        if len(paths) >= enough:
            return paths
    raise InputError(f"{folder}: neither {', '.join(CODEX)} nor one of {', '.join(ALIGNED)}")


def read_release(folder):
    """Yield the solutions that the authors labelled as right, each a Record, without ever holding all of them.

    Raises InputError naming file and place.
    """
    paths = release_files(folder)
    faults = []
    yield from read_codex(folder, faults) if paths[0].name in CODEX else read_aligned(paths, faults)
    if faults:
        print(f"{len(faults):,} solutions of {folder} could not be read; the first: {faults[0]}")


def read_codex(folder, faults):
    """The parallel lists: for each question its text, its gold answer, the solutions, their labels, their steps."""
    *texts, steps = [read_list(folder / name) for name in CODEX]
    questions, answers, solutions, labels = map(list, texts)
    for name, kind, items in zip(CODEX, (str, str, list, list), (questions, answers, solutions, labels)):
        for number, item in enumerate(items, 1):
            if type(item) is not kind:
                raise InputError(f"{folder / name}, item {number}: {item!r:.50} is no {kind.__name__}; fetch the file again")
    questions = [re.sub(r"\AQuestion \d+:", "", text).strip() for text in questions]
    if len(questions) == len(answers) + 1:  # in the authors' list one question stands twice
        twice = [i for i in range(1, len(questions)) if questions[i] == questions[i - 1]]
        questions = [question for i, question in enumerate(questions) if i not in twice[:1]]
    lengths = {name: len(part) for name, part in zip(CODEX, (questions, answers, solutions, labels))}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{folder}: the lists have different lengths: {lengths}; fetch the files again")
    count = 0
    for count, parts in enumerate(zip(questions, answers, solutions, labels, steps), 1):
        question, answer, *lists = parts
        if type(lists[-1]) is not list or len({len(part) for part in lists}) > 1:
            raise InputError(f"{folder}, question {count}: solutions, labels and steps are not lists of one length; "
                             "fetch the files again")  # fmt: skip
        for number, (solution, label, its_steps) in enumerate(zip(*lists), 1):
            if label != 1:
                continue
            record = {"question": question, "answer": answer, "steps": its_steps}
            place = f"{folder}, question {count}, solution {number}"
            try:
                read = parse_record(record | {"solution": re.sub(r"\AModel output \d+:", "", solution)}, place)
            except FAULTS as error:
                faults.append(f"{place}: {error}")
            else:
                yield read
    if count != len(questions):
        raise InputError(f"{folder}: steps for {count:,} questions of {len(questions):,}")


def read_aligned(paths, faults):
    """The training examples: the whole input, the output, and for each T5 token of a chain of thought a distribution."""
    for path in paths:
        for number, row in enumerate(read_list(path), 1):
            place = f"{path}, row {number}"
            try:
                if row["answer_label"] != 1:
                    continue
                question = row["question"].rpartition("\n\nQ: ")[2].removeprefix("Q: ").strip()
                for ask in ("Let's think step by step", "A:"):
                    question = question.removesuffix(ask).strip()
                problem = Problem(question, extract_number(str(row["answer_gold"])), row["answer"].strip())
                told = row.get("per_step_probs")
                if told is not None:
                    told = [of_kind(dict(distribution), "an entry of per_step_probs", dict) for distribution in told]
                    for distribution in told:
                        check_distribution("", distribution)
            except FAULTS as error:
                faults.append(f"{place}: {type(error).__name__} {error}")
            else:
                yield Record(problem, None, place, ALIGNED[path.name], told)
