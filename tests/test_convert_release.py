"""data/convert_release.py: the authors' release, in small samples that are written here."""

import builtins
import collections
import itertools
import os
import pickle
import tracemalloc
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest

import data.convert_release as convert_release
from conftest import TOY
from data.convert_release import ALIGNED, LABELS, RAW, UPDATED_LABELS, read_list
from specialize import read_teacher
from t5 import Tokenizer, UserError

@pytest.fixture
def convert(tmp_path, command):
    """convert(folder) -> the records that the command writes, and what it prints."""
    def convert(folder):
        out = tmp_path / "out.jsonl.gz"
        printed = command(convert_release, folder, out, "--tokenizer", TOY / "tuned-1M")
        return list(read_teacher(out)), printed
    return convert

@pytest.fixture(scope="module")
def records():
    """Fifteen records of the toy teacher: 3 questions with 5 solutions each."""
    per_question = by_question(read_teacher(TOY / "teacher.jsonl.gz"))
    return [r for _, group in itertools.islice(per_question, 3) for r in itertools.islice(group, 5)]

def by_question(records):
    return itertools.groupby(records, lambda record: record.problem.question)

def write(folder, name, data, protocol=4):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(data, protocol))

def write_raw(folder, records):
    """Write records as the authors' lists; the first question is listed twice."""
    asked = [list(group) for _, group in by_question(records)]
    questions = [f"Question {i}: {group[0].problem.question}\n" for i, group in enumerate(asked)]
    answers = [f"Answer: So it is.\n#### {group[0].problem.answer:g}\n" for group in asked]
    solutions = [[f"Model output {i}: \n{r.problem.solution}\n" for i, r in enumerate(group)]
                 for group in asked]
    prompt = [[(" step", 1.0), ("!", 0.0), (" step", 1.0)], [("\n", 0.9), ("\n", 0.9), (":", 0.1)]]
    steps = [[prompt + [[(token, top[token]), *top.items()] for token, top in r.tokens]
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
    found, printed = convert(tmp_path)
    assert found == records and "Wrote 15 records" in printed

def test_real_records_survive_the_raw_form(tmp_path, real, convert):
    records = list(read_teacher(real / "codex" / "gsm8k_train_0.jsonl"))
    write_raw(tmp_path, records)
    assert convert(tmp_path)[0] == records

def test_a_probability_of_0_is_left_out_and_others_keep_their_digits(tmp_path, records, convert):
    token = records[0].tokens[3][0]
    write_raw(tmp_path, records[:1])
    pairs = [(token, 0.1234), (token, 0.1234), ("never", 0.0), ("rare", 0.0001)]
    edit(tmp_path / RAW[4], lambda steps: steps[0][0].__setitem__(5, pairs))
    (found,), _ = convert(tmp_path)
    assert found.tokens[3] == (token, pytest.approx({token: 0.1234, "rare": 0.0001}, rel=1e-6))

def test_only_solutions_labelled_right_are_taken_and_a_failure_is_named(tmp_path, records, convert):
    write_raw(tmp_path, records)
    edit(tmp_path / LABELS, lambda labels: labels[0].__setitem__(1, 0))
    edit(tmp_path / RAW[4], lambda steps: steps[2].__setitem__(3, [[("a", 3.0)]]))
    found, printed = convert(tmp_path)
    assert found == records[:1] + records[2:13] + records[14:]
    assert "1 solutions could not be read, the first: " in printed and "13 records" in printed
    assert f"{RAW[4]}, question 3, solution 4: " in printed

def test_steps_of_any_other_form_are_counted_as_unreadable(tmp_path, records, convert):
    others = [[], [[]], [[("a", "b")]], [[("a", -1)]], [[("a",)]], [[(1, 0.5)]], [["ab"]], None, 3]
    write_raw(tmp_path, records[:1] * (len(others) + 1))
    edit(tmp_path / RAW[4], lambda steps: steps[0].__setitem__(slice(1, None), others))
    found, printed = convert(tmp_path)
    assert found == records[:1] and f"{len(others)} solutions could not be read" in printed

def test_a_solution_with_part_of_a_character_takes_its_text_from_the_predictions(
        tmp_path, records, convert):
    problem = replace(records[0].problem, solution="€ 20")
    tokens = [rf"bytes:\x{byte:02x}" for byte in "€".encode()] + [" 20"]
    record = replace(records[0], problem=problem, tokens=[(t, {t: 1.0}) for t in tokens])
    write_raw(tmp_path, [record])
    assert convert(tmp_path)[0] == [record]

def test_files_may_be_in_any_folder_but_not_twice(tmp_path, records, convert, refused):
    write_raw(tmp_path / "inner", records)
    (tmp_path / "inner" / LABELS).rename(tmp_path / UPDATED_LABELS)
    assert convert(tmp_path)[0] == records
    write_raw(tmp_path, records)
    assert "have the same name" in refused(convert_release, tmp_path, "other.jsonl")

@pytest.mark.parametrize("name, change, words", [
    (RAW[1], lambda answers: answers.pop(), "different lengths"),
    (RAW[4], lambda steps: steps.pop(), "question 3: "),
    (RAW[4], lambda steps: steps.append([]), "question 4: "),
    (RAW[4], lambda steps: steps[1].pop(), "question 2: "),
    (RAW[2], lambda solutions: solutions.__setitem__(0, "text"), "question 1: "),
    (LABELS, lambda labels: [one.__setitem__(slice(5), [0] * 5) for one in labels], "no solution"),
])
def test_lists_that_do_not_belong_together_are_refused(
        tmp_path, records, refused, name, change, words):
    write_raw(tmp_path, records)
    edit(tmp_path / name, change)
    assert words in refused(convert_release, tmp_path, "other.jsonl")
    assert not list(tmp_path.glob("other*"))

def test_a_folder_without_a_release_says_what_is_missing(tmp_path, refused):
    message = refused(convert_release, tmp_path, "other.jsonl")
    assert RAW[0] in message and ALIGNED[1] in message

# --- the aligned form ---

ZERO_SHOT = "Q: {}\nLet's think step by step"

def aligned_rows(records, input_format=ZERO_SHOT):
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
        expected.append(replace(record, tokens=steps))
    return expected, rows

@pytest.mark.parametrize("name, input_format", [
    (ALIGNED[0], ZERO_SHOT),
    (ALIGNED[1], f"Q: Why?\nLet's think step by step\nSo.\nThe answer is 1\n\n{ZERO_SHOT}\n"),
])
def test_the_aligned_form_gives_records_in_t5s_own_pieces(
        tmp_path, records, convert, name, input_format):
    expected, rows = aligned_rows(records, input_format)
    bad = [None, {}, rows[0] | {"per_step_probs": None}, rows[0] | {"question": 1}]
    write(tmp_path / "inner", name, [rows[0] | {"answer_label": 0}, *bad, *rows])
    found, printed = convert(tmp_path)
    assert found == expected and "4 solutions could not be read, the first: " in printed

def test_a_piece_without_a_usable_distribution_gets_an_empty_one(tmp_path, records, convert):
    expected, rows = aligned_rows(records[:2])
    rows[0]["per_step_probs"][1:3] = [{"other": 0.5}, {expected[0].tokens[2][0]: 0.0}]
    del rows[0]["per_step_probs"][-1]
    rows[1]["per_step_probs"].append({"</s>": 1.0})
    write(tmp_path, ALIGNED[0], rows)
    for i in (1, 2, -1):
        expected[0].tokens[i] = (expected[0].tokens[i][0], {})
    assert convert(tmp_path)[0] == expected

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

class Call:  # pickles as a call of a function
    def __init__(self, *call):
        self.call = call
    def __reduce__(self):
        return self.call[0], self.call[1:]

@pytest.mark.parametrize("content, name", [
    *((pickle.dumps([1, {"a": data}], protocol), name) for protocol in (2, 3, 4, 5)
      for data, name in ((Call(os.system, "touch ran"), f"{os.system.__module__}.system"),
                         (Call(builtins.eval, "open('ran', 'w')"), "eval"),
                         (np.float64(0.5), "numpy"), (collections.Counter("a"), "Counter"))),
    (b"\x80\x02](ccollections\nOrderedDict\n)R}be.", "BUILD"),
    (b"\x80\x02]ccollections\nOrderedDict\n)\x81a.", "NEWOBJ"),
    (b"]Pname\na.", "PERSID"),
    (b"\x80\x04](ios\nsystem\ne.", "INST"),
    (b"\x80\x02]\x82\x01a.", "EXT1"),
])
def test_anything_else_is_refused_by_name_and_not_run(tmp_path, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"p.pkl: .*it contains .*{name}.*nothing in it was run"):
        list(read_list(tmp_path / "p.pkl"))
    assert not (tmp_path / "ran").exists()

def test_a_damaged_pickle_or_one_without_a_list_is_an_error(tmp_path):
    complete = pickle.dumps([{"a": ["b", 0.5, (1, 2, 3)]}, "long" * 100, [2**100] * 3])
    others = map(pickle.dumps, ({"a": 1}, {}, "text", 3, None, (1, 2), ([1],), (), ([], [])))
    for content in [*(complete[:end] for end in range(len(complete))), *others]:
        (tmp_path / "p.pkl").write_bytes(content)
        with pytest.raises(UserError, match="p.pkl: not a complete list of plain data"):
            list(read_list(tmp_path / "p.pkl"))

def test_items_are_not_kept_after_they_are_handed_out(tmp_path):
    write(tmp_path, "p.pkl", [[(str(i), j / 7) for j in range(9)] for i in range(20000)])
    def peak(read):
        tracemalloc.start()
        read(read_list(tmp_path / "p.pkl"))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    assert peak(lambda items: collections.deque(items, maxlen=0)) < peak(list) / 2
