"""data/release.py, data/pickles.py, data/cache.py: the authors' release, in small samples that are written here."""

import builtins
import decimal
import gzip
import itertools
import json
import os
import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest

import data.rows
from conftest import TOY
from data.download import InputError
from data.pickles import read_list
from data.records import parse_record, read_teacher
from data.release import ALIGNED, read_release
from data.rows import FORMATS, make_rows, training_rows
from eval import Problem, is_correct, math_prompt
from specialize import parse_arguments
from t5 import Tokenizer

FORMAT_FILES = {name: file for file, name in ALIGNED.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOY / "student")


@pytest.fixture(scope="module")
def records():
    """Sixty right solutions of the toy teacher: 12 questions with 5 each."""
    found, kept = {}, []
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        first = [parse_record(json.loads(line), "toy") for line in itertools.islice(lines, 500)]
    for record in first:
        if is_correct(record.problem.solution, record.problem.answer):
            some = found.setdefault(record.problem.question, [])
            some.append(record)
            kept += some if len(some) == 5 else []
    return kept[:60]


def write(folder, name, content, protocol=4):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol))


def write_codex(folder, records, labels=None):
    """Records as the authors' parallel lists, five solutions a question; the fourth question stands twice."""
    asked = [records[start : start + 5] for start in range(0, len(records), 5)]
    questions = [f"Question {i}: {some[0].problem.question}\n" for i, some in enumerate(asked)]
    answers = [f"Answer: So it is.\n#### {some[0].problem.answer:g}" for some in asked]
    steps = [
        [[[(" step", 1.0)] * 6, [("\n", 0.9)] * 6, *([(t, top[t]), *top.items()] for t, top in r.steps)] for r in some]
        for some in asked
    ]
    write(folder, "codex_questions.pkl", questions[:3] + [questions[3]] + questions[3:])
    write(folder, "codex_answers.pkl", answers)
    write(
        folder,
        "codex_predictions.pkl",
        [[f"Model output {i}: \n{r.problem.solution}\n" for i, r in enumerate(some)] for some in asked],
    )
    write(folder, "codex_per_step_probs.pkl", steps, 3)
    write(folder, "codex_prediction_labels.pkl", labels or [[1] * len(some) for some in asked])


def write_aligned(folder, rows, tokenizer, shots):
    """Rows as the authors' aligned examples, a file for each format."""
    for name, file in FORMAT_FILES.items():
        cot, in_context = FORMATS[name]
        examples = []
        for row in (row for row in rows if row.format == name):
            answer = tokenizer.decode(row.labels)
            prompt = math_prompt(row.problem.question, cot, shots if in_context else ())
            example = {"question": prompt, "answer": answer, "answer_label": 1, "type": file.removesuffix(".pkl")}
            example["answer_gold"] = f"Answer: So it is.\n#### {row.problem.answer:g}"
            if cot:
                told = [zip(ids.tolist(), probs.tolist()) for ids, probs in zip(row.ids[:-1], row.probs[:-1])]
                told = [{tokenizer.pieces[i]: p for i, p in pairs if p} for pairs in told]
                example["per_step_probs"] = [OrderedDict(d) if j % 2 else d for j, d in enumerate(told)]
            examples.append(example)
        write(folder, file, [{**examples[0], "answer_label": 0}, *examples])


def arguments(folder, *more):
    return parse_arguments(["--teacher", str(folder), *map(str, more)])


def rows_of(args, tokenizer):
    """The rows that the main command would train on."""
    return training_rows(tokenizer, args.teacher, args.data, args.formats, args.loss)


def key(row):
    """What makes a row, as one comparable value."""
    told = (
        None
        if row.ids is None
        else [sorted(pair for pair in zip(i, p) if pair[1]) for i, p in zip(row.ids.tolist(), row.probs.tolist())]
    )
    return row.format, row.problem.question, row.problem.answer, row.labels.tolist(), told


# --- pickles ---


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_out_as_python_reads_them(tmp_path, protocol):
    shared, token = [1, 2], "".join(["▁", "48"])
    plain = [
        None, True, False, 0, 255, 256, -1, 2**31, -(2**70), 0.5, -1e300, "", "é", "x" * 300, "y" * 70000, token, [], {}, (), (1,),
        (1, 2), (1, 2, 3), (1, 2, 3, 4), shared, shared, {"a": [shared, {"b": (token, 0.5)}], 1: 2}, [[[]]], {"one": 1},
        OrderedDict([(token, 0.5), ("b", OrderedDict())]), OrderedDict(), [1], list(range(2500)), {str(i): i for i in range(2500)},
    ]  # fmt: skip
    for content in (plain, [], [plain], plain * 100, [[token, i] for i in range(3000)], [shared]):
        write(tmp_path, "p.pkl", content, protocol)
        found = list(read_list(tmp_path / "p.pkl"))
        assert found == content and [type(item) for item in found] == [type(item) for item in content]


def test_data_nested_at_random_come_out_as_python_reads_them(tmp_path):
    rng = random.Random(0)

    def some(depth):
        size = rng.choice([0, 1, 1, 2, 3, 4, 40])
        kinds = [lambda: rng.random(), lambda: str(size), lambda: [some(depth + 1) for _ in range(size)]]
        kinds += [lambda: tuple(some(depth + 1) for _ in range(size)), lambda: {i: some(depth + 1) for i in range(size)}]
        return rng.choice(kinds[: 2 if depth > 4 else 5] if depth else kinds[2:3])()

    for i in range(300):
        content = some(0)
        write(tmp_path, "p.pkl", content, 2 + i % 4)
        assert list(read_list(tmp_path / "p.pkl")) == content


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "content, name",
    [
        (Call(os.system, "touch ran"), f"{os.system.__module__}.system"),
        (Call(builtins.eval, "open('ran', 'w')"), "eval"),
        (Call(decimal.Decimal, "1"), "decimal.Decimal"),
        (np.float64(0.5), "numpy"),
        (np.zeros(2), "numpy"),
        (pytest.approx, "approx"),
    ],
)
def test_what_is_no_plain_data_is_refused_by_name_and_not_run(tmp_path, monkeypatch, protocol, content, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "p.pkl", [1, {"a": content}], protocol)
    with pytest.raises(InputError, match=f"p.pkl: .*{name}.* is refused"):
        list(read_list(tmp_path / "p.pkl"))
    assert not (tmp_path / "ran").exists()


def test_instructions_that_call_or_change_an_object_are_refused_by_name(tmp_path):
    ordered = b"ccollections\nOrderedDict\n"
    for code, name in (
        (b"\x80\x02](" + ordered + b")R}b" + b"e.", "BUILD"), (b"\x80\x02]" + ordered + b")\x81a.", "NEWOBJ"),
        (b"]Pname\na.", "PERSID"), (b"\x80\x04](ios\nsystem\ne.", "INST"), (b"\x80\x02]\x82\x01a.", "EXT1"),
        (b"\x80\x04](C\x01xe.", "SHORT_BINBYTES"), (b"\x80\x04]\x8fa.", "EMPTY_SET"),
    ):  # fmt: skip
        (tmp_path / "p.pkl").write_bytes(code)
        with pytest.raises(InputError, match=f"{name} is not plain data"):
            list(read_list(tmp_path / "p.pkl"))


def test_a_pickle_that_is_cut_or_holds_no_list_is_an_error(tmp_path):
    whole = pickle.dumps([{"a": ["b", 0.5, (1, 2, 3)]}, "long" * 100])
    for end in range(0, len(whole) - 1, 7):
        (tmp_path / "p.pkl").write_bytes(whole[:end])
        with pytest.raises(InputError, match="p.pkl"):
            list(read_list(tmp_path / "p.pkl"))
    for content in ({"a": 1}, "text", 3, (1, 2)):
        write(tmp_path, "p.pkl", content)
        with pytest.raises(InputError, match="not a whole pickle of a list"):
            list(read_list(tmp_path / "p.pkl"))
    with pytest.raises(InputError, match="No such file"):
        list(read_list(tmp_path / "none.pkl"))


# --- the two forms ---


def test_the_parallel_lists_give_the_rows_of_the_same_teacher_records(tmp_path, records, tokenizer):
    write_codex(tmp_path, records)
    found = list(read_release(tmp_path))
    assert [r.problem.question for r in found] == [r.problem.question for r in records]
    expected, summary = make_rows(records, tokenizer, list(FORMATS), "kl")
    rows, same_summary = rows_of(arguments(tmp_path), tokenizer)
    assert list(map(key, rows)) == list(map(key, expected)) and summary == same_summary
    assert "question 12, solution 5" in found[-1].place


def test_real_records_as_parallel_lists_give_the_same_records(tmp_path, real):
    records = list(read_teacher(real / "codex" / "gsm8k_train_0.jsonl"))
    write_codex(tmp_path, records)
    assert [(r.problem, r.steps) for r in read_release(tmp_path)] == [(r.problem, r.steps) for r in records]


def test_only_solutions_labelled_right_are_taken_and_unreadable_ones_told(tmp_path, records, capsys):
    labels = [[i % 2 for i in range(5)] for _ in range(12)]
    write_codex(tmp_path, records, labels)
    assert len(list(read_release(tmp_path))) == 24
    steps = pickle.loads((tmp_path / "codex_per_step_probs.pkl").read_bytes())
    steps[2][1] = [[("a", 3.0)]]
    write(tmp_path, "codex_per_step_probs.pkl", steps)
    assert len(list(read_release(tmp_path))) == 23
    assert "1 solutions" in (told := capsys.readouterr().out) and "question 3, solution 2" in told and "probability 3.0" in told


def test_lists_that_do_not_belong_together_are_an_error(tmp_path, records):
    write_codex(tmp_path, records)
    write(tmp_path, "codex_answers.pkl", ["Answer: #### 1"] * 3)
    with pytest.raises(InputError, match="different lengths"):
        list(read_release(tmp_path))
    write_codex(tmp_path, records, [[1] * 5] * 11 + [[1] * 4])
    with pytest.raises(InputError, match="question 12: "):
        list(read_release(tmp_path))
    with pytest.raises(InputError, match="neither codex_questions.pkl"):
        list(read_release(tmp_path / "empty"))


def test_aligned_examples_give_back_the_rows_they_were_made_of(tmp_path, records, tokenizer):
    rows, _ = make_rows(records[5:], tokenizer, list(FORMATS), "kl")
    shots = [Problem(f"Why {i}?", 1.0, "Q: no.\nThus 1.") for i in range(4)]
    write_aligned(tmp_path, rows, tokenizer, shots)
    found, _ = rows_of(arguments(tmp_path), tokenizer)
    by_key = lambda rows: sorted(map(key, rows), key=str)
    expected, found = by_key(rows), by_key(found)
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    for row, other in zip(found, expected):
        assert (row[4] is None) == (other[4] is None)
        for told, same in zip(row[4] or (), other[4] or ()):
            assert np.allclose(told, same, rtol=1e-5)


def test_an_aligned_distribution_without_the_students_own_token_becomes_one_hot():
    from align import transfer_aligned

    told = [{"▁a": 0.6, "b": 0.5}, {"▁a": 0.9}, {"b": 0.4, "none": 0.6}, {"▁a": 0.5, "b": 0.0}]
    ids, probs = transfer_aligned(told, ["▁a", "b", "b", "b", "▁a"], ["<pad>", "▁a", "b"], k=2)
    assert ids.tolist() == [[1, 2], [2, 0], [2, 0], [2, 0], [1, 0]]
    assert np.allclose(probs, [[0.6 / 1.1, 0.5 / 1.1], [1, 0], [0.4, 0], [1, 0], [1, 0]]) and (probs.sum(axis=1) <= 1).all()
    with pytest.raises(ValueError, match="not between 0 and 1"):
        transfer_aligned([{"b": 1.2}], ["b"], ["<pad>", "▁a", "b"])


def test_a_format_that_the_release_lacks_is_named(tmp_path, records, tokenizer):
    rows, _ = make_rows(records, tokenizer, list(FORMATS), "kl")
    write_aligned(tmp_path, rows, tokenizer, [])
    (tmp_path / "in_context_chain_of_thought.pkl").unlink()
    with pytest.raises(InputError, match="no row of in_context_cot"):
        rows_of(arguments(tmp_path), tokenizer)
    found, _ = rows_of(arguments(tmp_path, "--formats", "zero_shot_cot", "--loss", "nll"), tokenizer)
    assert len(found) == 60 and all(row.ids is None for row in found)


# --- the cache ---


def test_the_second_start_reads_the_cache_and_a_change_or_a_torn_cache_makes_it_anew(
    tmp_path, records, tokenizer, monkeypatch
):
    write_codex(tmp_path, records)
    rows, summary = rows_of(arguments(tmp_path), tokenizer)
    calls = []
    monkeypatch.setattr(data.rows, "read_release", lambda folder: calls.append(folder) or read_release(folder))
    again, same_summary = rows_of(arguments(tmp_path), tokenizer)
    assert list(map(key, again)) == list(map(key, rows)) and summary == same_summary and not calls
    assert [row.place for row in again] == [row.place for row in rows]
    in_context, zero_shot = (
        next(row for row in again if row.format == f"{name}_cot") for name in ("in_context", "zero_shot")
    )
    assert in_context.labels is zero_shot.labels and in_context.probs is zero_shot.probs
    whole = (tmp_path / "rows.npz").read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"PK", b"not a zip file"):
        (tmp_path / "rows.npz").write_bytes(torn)
        assert len(rows_of(arguments(tmp_path), tokenizer)[0]) == len(rows)
    assert len(calls) == 4 and not list(tmp_path.glob("*.tmp"))
    write_codex(tmp_path, records[:30])
    assert len(rows_of(arguments(tmp_path), tokenizer)[0]) == len(rows) // 2 and len(calls) == 5


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, records, tokenizer, capsys):
    write_codex(tmp_path, records)
    (tmp_path / "rows.npz.tmp").mkdir()
    assert len(rows_of(arguments(tmp_path), tokenizer)[0]) == 144
    assert "cannot be written" in capsys.readouterr().out and not (tmp_path / "rows.npz").exists()


def test_the_command_trains_on_a_release(tmp_path, records, run):
    write_codex(tmp_path / "processed_data", records)
    brief = "--epochs 1 --validation-limit 1 --test-limit 1 --max-new-tokens 4 --skip-bbh --device cpu".split()
    done = run("specialize.py", "--teacher", "processed_data", "--formats", "zero_shot_cot", *brief, cwd=tmp_path)
    assert done.returncode == 0 and "60 of 60 solutions" in done.stdout, done.stderr
    assert (tmp_path / "processed_data" / "rows.npz").exists()
