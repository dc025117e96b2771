"""data/convert_release.py: the authors' release, in small samples that are written here."""

import builtins
import collections
import dataclasses
import itertools
import math
import os
import pickle
import random
import sys
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest

from conftest import TOY
from data.convert_release import ALIGNED, LABELS, RAW, UPDATED_LABELS, main, read_list
from specialize import read_teacher
from t5 import Tokenizer, UserError

@pytest.fixture
def convert(tmp_path, monkeypatch):
    """convert(folder) -> the records that the command writes."""

    def convert(folder):
        out = tmp_path / "out.jsonl.gz"
        command = ["convert_release.py", str(folder), str(out), "--tokenizer", str(TOY / "tuned-1M")]
        monkeypatch.setattr(sys, "argv", command)
        try:
            main()
        finally:
            assert not list(tmp_path.glob("*.part"))
        return list(read_teacher(out))

    return convert

@pytest.fixture(scope="module")
def records():
    """Fifteen records of the toy teacher: 3 questions with 5 solutions each."""
    per_question = itertools.groupby(read_teacher(TOY / "teacher.jsonl.gz"), question_of)
    return [r for _, group in itertools.islice(per_question, 3) for r in itertools.islice(group, 5)]

def question_of(record):
    return record.problem.question

def content(records):
    """What must survive the conversion."""
    return [(record.problem, record.steps) for record in records]

def write(folder, name, data, protocol=4):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(data, protocol))

def write_raw(folder, records):
    """Write records as the authors' lists; the first question is listed twice."""
    asked = [list(group) for _, group in itertools.groupby(records, question_of)]
    questions = [f"Question {i}: {group[0].problem.question}\n" for i, group in enumerate(asked)]
    answers = [f"Answer: So it is.\n#### {group[0].problem.answer:g}\n" for group in asked]
    solutions = [[f"Model output {i}: \n{r.problem.solution}\n" for i, r in enumerate(group)]
                 for group in asked]
    prompt = [[(" step", 1.0), ("!", 0.0), (" step", 1.0)], [("\n", 0.9), ("\n", 0.9), (":", 0.1)]]
    steps = [[prompt + [[(token, top[token]), *top.items()] for token, top in r.steps]
              for r in group] for group in asked]
    labels = [[1] * len(group) for group in asked]
    for name, data in zip(RAW, (questions[:1] + questions, answers, solutions, labels, steps)):
        write(folder, name, data, protocol=3)

def edit(path, change):
    """Rewrite a pickle: change(data) alters it in place."""
    data = pickle.loads(path.read_bytes())
    change(data)
    path.write_bytes(pickle.dumps(data))

# --- the raw form ---

def test_the_raw_form_gives_back_the_records_it_was_made_of(tmp_path, records, convert):
    write_raw(tmp_path / "processed_data" / "processed_data", records)
    assert content(convert(tmp_path)) == content(records)

def test_real_records_survive_the_raw_form(tmp_path, real, convert):
    records = list(read_teacher(real / "codex" / "gsm8k_train_0.jsonl"))
    write_raw(tmp_path, records)
    assert content(convert(tmp_path)) == content(records)

def test_a_probability_of_0_is_left_out_and_others_keep_their_digits(tmp_path, records, convert):
    token = records[0].steps[3][0]
    write_raw(tmp_path, records[:1])
    pairs = [(token, 0.1234), (token, 0.1234), ("never", 0.0), ("rare", 0.0001)]
    edit(tmp_path / RAW[4], lambda steps: steps[0][0].__setitem__(5, pairs))
    (found,) = convert(tmp_path)
    assert found.steps[3] == (token, pytest.approx({token: 0.1234, "rare": 0.0001}, rel=1e-6))

def test_only_solutions_labelled_right_are_taken_and_a_failure_is_named(
        tmp_path, records, convert, capsys):
    write_raw(tmp_path, records)
    edit(tmp_path / LABELS, lambda labels: labels[0].__setitem__(1, 0))
    edit(tmp_path / RAW[4], lambda steps: steps[2].__setitem__(3, [[("a", 3.0)]]))
    assert content(convert(tmp_path)) == content(records[:1] + records[2:13] + records[14:])
    printed = capsys.readouterr().out
    assert "1 solutions could not be read, the first: " in printed and "13 records" in printed
    assert f"{RAW[4]}, question 3, solution 4: " in printed

def test_steps_of_any_other_form_are_counted_as_unreadable(tmp_path, records, convert, capsys):
    others = [[], [[]], [[("a", "b")]], [[("a", -1)]], [[("a",)]], [[(1, 0.5)]], [["ab"]],
              [[("a", math.nan)]], [[(["a"], 1.0)]], None, 3]
    write_raw(tmp_path, records[:1] * (len(others) + 1))
    edit(tmp_path / RAW[4], lambda steps: steps[0].__setitem__(slice(1, None), others))
    assert content(convert(tmp_path)) == content(records[:1])
    assert "11 solutions could not be read" in capsys.readouterr().out

def test_a_solution_with_part_of_a_character_takes_its_text_from_the_predictions(
        tmp_path, records, convert):
    problem = dataclasses.replace(records[0].problem, solution="€ 20")
    tokens = [rf"bytes:\x{byte:02x}" for byte in "€".encode()] + [" 20"]
    record = dataclasses.replace(records[0], problem=problem, steps=[(t, {t: 1.0}) for t in tokens])
    write_raw(tmp_path, [record])
    assert content(convert(tmp_path)) == content([record])

def test_updated_labels_replace_missing_ones_and_files_found_twice_are_an_error(
        tmp_path, records, convert):
    write_raw(tmp_path / "inner", records)
    (tmp_path / "inner" / LABELS).rename(tmp_path / UPDATED_LABELS)
    assert content(convert(tmp_path)) == content(records)
    write_raw(tmp_path, records)
    with pytest.raises(UserError, match=f"(?s){RAW[1]} and .*inner/{RAW[1]} have the same name"):
        convert(tmp_path)

def test_lists_that_do_not_belong_together_are_an_error(tmp_path, records, convert):
    for name, change, message in (
        (RAW[1], lambda answers: answers.pop(), "different lengths"),
        (RAW[4], lambda steps: steps.pop(), "question 3: "),
        (RAW[4], lambda steps: steps.append([]), "question 4: "),
        (RAW[4], lambda steps: steps[1].pop(), "question 2: "),
        (RAW[2], lambda solutions: solutions.__setitem__(0, "text"), "question 1: "),
    ):
        write_raw(tmp_path, records)
        edit(tmp_path / name, change)
        with pytest.raises(UserError, match=message):
            convert(tmp_path)

def test_a_folder_without_a_release_says_what_is_missing(tmp_path, records, convert):
    with pytest.raises(UserError, match=f"{RAW[0]}, .*{ALIGNED[1]} are missing"):
        convert(tmp_path)
    write(tmp_path, "zero_shot_answer_only.pkl", [])
    with pytest.raises(UserError, match="only answer-only examples"):
        convert(tmp_path)
    write_raw(tmp_path, records)
    write(tmp_path, LABELS, [[0] * 5] * 3)
    with pytest.raises(UserError, match="no solution could be converted"):
        convert(tmp_path)
    assert not (tmp_path / "out.jsonl.gz").exists()

# --- the aligned form ---

def aligned_rows(records, input_format):
    """Return records whose tokens are T5's pieces, and the authors' rows for them."""
    tokenizer, expected, rows = Tokenizer(TOY / "tuned-1M"), [], []
    for record in records:
        problem = record.problem
        pieces = tokenizer.split(problem.solution)
        row = {"question": input_format.format(problem.question), "answer": problem.solution,
               "answer_gold": f"Answer: So it is.\n#### {problem.answer:g}\n", "answer_label": 1}
        probs = [OrderedDict([(piece, 0.5), ("▁many", 0.2), ("zero", 0.0)]) for piece in pieces]
        rows.append(row | {"per_step_probs": [{pieces[0]: 1.0}, *probs[1:]]})
        steps = [(piece, pytest.approx({piece: 0.5, "▁many": 0.2}, rel=1e-5)) for piece in pieces]
        steps[0] = (pieces[0], {pieces[0]: 1.0})
        expected.append(dataclasses.replace(record, steps=steps))
    return expected, rows

@pytest.mark.parametrize("name, input_format", [
    (ALIGNED[0], "Q: {}\nLet's think step by step"),
    (ALIGNED[1], "Q: Why?\nLet's think step by step\nSo.\nThe answer is 1\n\n"
                 "Q: {}\nLet's think step by step\n"),
])
def test_the_aligned_form_gives_records_in_t5s_own_pieces(
        tmp_path, records, convert, name, input_format):
    expected, rows = aligned_rows(records, input_format)
    write(tmp_path / "inner", name, [rows[0] | {"answer_label": 0}, *rows])
    assert content(convert(tmp_path)) == content(expected)

def test_a_piece_without_a_usable_distribution_gets_an_empty_one(tmp_path, records, convert):
    expected, rows = aligned_rows(records[:2], "Q: {}\nLet's think step by step")
    rows[0]["per_step_probs"][1:3] = [{"other": 0.5}, {expected[0].steps[2][0]: 0.0}]
    del rows[0]["per_step_probs"][-1]
    rows[1]["per_step_probs"].append({"</s>": 1.0})
    write(tmp_path, ALIGNED[0], rows)
    for i in (1, 2, -1):
        expected[0].steps[i] = (expected[0].steps[i][0], {})
    assert content(convert(tmp_path)) == content(expected)

def test_the_raw_form_is_preferred_and_unreadable_rows_are_counted(
        tmp_path, records, convert, capsys):
    expected, rows = aligned_rows(records[:1], "Q: {}\nLet's think step by step")
    bad = [None, {}, rows[0] | {"per_step_probs": None}, rows[0] | {"question": 1}]
    write(tmp_path, ALIGNED[0], bad + rows)
    assert content(convert(tmp_path)) == content(expected)
    assert "4 solutions could not be read, the first: " in capsys.readouterr().out
    write_raw(tmp_path, records)
    assert content(convert(tmp_path)) == content(records)

# --- pickles as plain data ---

@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_out_as_python_reads_them(tmp_path, protocol):
    shared, token = [1, 2], "".join(["▁", "48"])
    plain = [
        None, True, False, 0, 255, 256, -1, 2**31, -(2**70), 2**3000, 0.5, -1e300, "", "é",
        "\ud800", "x" * 300, "y" * 70000, token, [], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
        shared, shared, {"a": [shared, {"b": (token, 0.5)}], 1: 2}, [[[]]], OrderedDict(),
        OrderedDict([(token, 0.5), ("b", OrderedDict())]), {str(i): i for i in range(2500)},
    ]
    for data in (plain, [], [0], [shared], [plain], plain * 100, [[token, i] for i in range(3000)]):
        write(tmp_path, "p.pkl", data, protocol)
        found = list(read_list(tmp_path / "p.pkl"))
        assert found == data and [type(item) for item in found] == [type(item) for item in data]

def test_random_plain_data_come_out_as_python_reads_them(tmp_path):
    rng = random.Random(0)
    seen = [[]]  # values that may occur again, by reference

    def some(depth):
        if depth > 4 or depth and rng.random() < 0.4:
            return rng.choice([rng.random(), "j" * rng.randrange(9), rng.choice(seen)])
        items = [some(depth + 1) for _ in range(rng.choice([0, 1, 1, 2, 3, 4, 40]))]
        value = rng.choice([list, tuple, lambda items: dict(enumerate(items))])(items)
        seen.extend([value] * (depth > 2 and len(seen) < 50))
        return value if depth else items

    for i in range(300):
        data = some(0)
        write(tmp_path, "p.pkl", data, 2 + i % 4)
        assert list(read_list(tmp_path / "p.pkl")) == data

class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("data, name", [
    (Call(os.system, "touch ran"), f"{os.system.__module__}.system"),
    (Call(builtins.eval, "open('ran', 'w')"), "eval"),
    (np.float64(0.5), "numpy"),
    (np.zeros(2), "numpy"),
    (collections.Counter("a"), "collections.Counter"),
])
def test_anything_else_is_refused_by_name_and_not_run(tmp_path, monkeypatch, protocol, data, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "p.pkl", [1, {"a": data}], protocol)
    with pytest.raises(UserError, match=f"p.pkl: .*it contains .*{name}.*nothing in it was run"):
        list(read_list(tmp_path / "p.pkl"))
    assert not (tmp_path / "ran").exists()

ORDERED = b"ccollections\nOrderedDict\n"

@pytest.mark.parametrize("code, name", [
    (b"\x80\x02](" + ORDERED + b")R}be.", "BUILD"),
    (b"\x80\x02]" + ORDERED + b")\x81a.", "NEWOBJ"),
    (b"]Pname\na.", "PERSID"),
    (b"\x80\x04](ios\nsystem\ne.", "INST"),
    (b"\x80\x02]\x82\x01a.", "EXT1"),
    (b"\x80\x04](C\x01xe.", "SHORT_BINBYTES"),
    (b"\x80\x04]\x8fa.", "EMPTY_SET"),
])
def test_other_instructions_are_refused_by_name(tmp_path, code, name):
    (tmp_path / "p.pkl").write_bytes(code)
    with pytest.raises(UserError, match=f"p.pkl: .*it contains {name}"):
        list(read_list(tmp_path / "p.pkl"))

def test_a_damaged_pickle_or_one_without_a_list_is_an_error(tmp_path):
    complete = pickle.dumps([{"a": ["b", 0.5, (1, 2, 3)]}, "long" * 100, [2**100] * 3])
    rng = random.Random(0)
    for end in range(len(complete)):
        (tmp_path / "p.pkl").write_bytes(complete[:end])
        with pytest.raises(UserError, match="p.pkl: not a complete list of plain data"):
            list(read_list(tmp_path / "p.pkl"))
    for data in ({"a": 1}, {}, "text", 3, 0, None, (1, 2), ([1],), (), ([], [])):
        write(tmp_path, "p.pkl", data)
        with pytest.raises(UserError, match="p.pkl: not a complete list of plain data"):
            list(read_list(tmp_path / "p.pkl"))
    for _ in range(1000):  # other bytes: other data or a UserError, never another exception
        damaged = bytearray(complete)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "p.pkl").write_bytes(damaged)
        try:
            list(read_list(tmp_path / "p.pkl"))
        except UserError:
            pass

def test_items_are_not_kept_after_they_are_handed_out(tmp_path):
    write(tmp_path, "p.pkl", [[(str(i), j / 7) for j in range(9)] for i in range(6000)])

    def peak(read):
        tracemalloc.start()
        read(read_list(tmp_path / "p.pkl"))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(lambda items: collections.deque(items, maxlen=0)) < peak(list) / 2

# --- the command ---

def test_the_command_writes_records_or_one_line_about_what_is_wrong(tmp_path, records, run):
    write_raw(tmp_path, records)
    done = run("data/convert_release.py", tmp_path, tmp_path / "out.jsonl")
    assert done.returncode == 0 and "Wrote 15 records" in done.stdout, done.stderr
    assert content(read_teacher(tmp_path / "out.jsonl")) == content(records)
    (tmp_path / RAW[4]).write_bytes((tmp_path / RAW[4]).read_bytes()[:-100])
    done = run("data/convert_release.py", tmp_path, tmp_path / "other.jsonl")
    assert done.returncode == 1 and f"{RAW[4]}: not a complete list" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("other*"))
