"""eval.py against OpenAI's human-checked labels and the publishers' own files."""

import json
import math
import os
import re
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as ev
from conftest import TOY, missing
from data import download
from data.download import InputError
from data.predictions import PredictionFile, cost_of_rule, log_linear_fit, scaling_plot, summarize, trade_off_plot
from t5 import T5, Tokenizer


@pytest.fixture(scope="module")
def datasets(real):
    return real / "datasets"


@pytest.fixture(scope="module")
def student():
    return T5.from_pretrained(TOY / "student"), Tokenizer(TOY / "student")


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) -> what eval.py prints; it raises what it would end with."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
        ev.main()
        return capsys.readouterr().out

    return command


def test_extraction_agrees_with_every_human_label(datasets):
    lines = (datasets / "gsm8k" / "labelled_solutions_6b.jsonl").read_text().splitlines()
    assert len(lines) == 2638
    for line in map(json.loads, lines):
        same = ev.extract_number(line["solution"]) == ev.extract_number(line["ground_truth"])
        assert same == line["is_correct"], line


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 48 + 24 = 72 clips.\nThe answer is 72.", 72), ("The answer is $1,234.50", 1234.5), ("is -5", -5), ("−3", -3),
        ("-$5", -5), ("$-5", -5), ("(-7)", -7), ("x=-4", -4), ("48 - 24", 24), ("48-24", 24), ("2 -3", 3),
        ("5-10 minutes", 10), ("is 1/2", 0.5), ("is 1/2.", 0.5), ("1/2.5", 2.5), ("50%", 50), (".5", 0.5), ("109,200,000", 109200000), ("3.", 3),
        ("A 1/0", 0), ("no number", None), ("", None),
    ],
)  # fmt: skip
def test_the_final_number_is_read_as_people_write_it(text, number):
    assert ev.extract_number(text) == number


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Let's see. So the answer is (B).", "(B)"), ("So the answer is valid.", "valid"), ("(C)", "(C)"), ("No", "No"),
        ("the answer is x. So the answer is ] ) >.", "] ) >"), ("So the answer is (A) or (B).", "(A) or (B)"), ("", ""),
        ("So the answer is -219.", "-219"), ("The answer is Monsters, Inc..", "Monsters, Inc."), (" yes ", "yes"),
        ("So the answer is } ] >. ", "} ] >"), ("so the answer is yes.\n\nQ: Is it?", "yes.\n\nQ: Is it?"),
        ("(A) is wrong, (B) may be right, and", "(A) is wrong, (B) may be right, and"), ("valid.", "valid."),
    ],
)  # fmt: skip
def test_the_final_choice_is_what_follows_the_answer_is(text, answer):
    assert ev.extract_choice(text) == answer


def test_every_set_has_its_publishers_count_and_gold_answers(datasets):
    sizes = {"gsm8k": (500, 819), "multiarith": (200, 400), "asdiv": (500, 1805), "svamp": (500, 500)}
    for task, (validation, test) in sizes.items():
        parts = [ev.load(task, split, datasets) for split in ("validation", "test", "all")]
        assert [len(part) for part in parts] == [validation, test, validation + test]
        key = lambda problem: (problem.question, str(problem.answer))
        assert sorted(map(key, parts[0] + parts[1])) == sorted(map(key, parts[2]))
        assert parts[0] == ev.load(task, "validation", datasets)
    train = ev.load("gsm8k", "train", datasets)
    assert len(train) == 7473
    for problem, line in zip(train, (datasets / "gsm8k" / "train.jsonl").read_text().splitlines()):
        assert problem.answer == float(line.rsplit("#### ", 1)[1].rstrip('"}').replace(",", ""))
        assert "<<" not in problem.solution and "####" not in problem.solution
    svamp = json.loads((datasets / "svamp" / "SVAMP.json").read_text())
    for problem, row in zip(ev.load("svamp", "all", datasets), svamp):
        assert problem.answer == row["Answer"]
        if row["ID"] != "chal-680":  # the publisher's slip: another answer than the equation gives
            assert problem.answer == pytest.approx(eval(row["Equation"]), abs=0.01)
    multiarith = json.loads((datasets / "multiarith" / "MultiArith.json").read_text())
    for problem, row in zip(ev.load("multiarith", "all", datasets), multiarith):
        assert problem.answer == pytest.approx(eval(row["lEquations"][0].removeprefix("X=")))


def test_asdiv_answers_are_numbers_but_for_the_stated_ones(datasets):
    problems = ev.load("asdiv", "all", datasets)
    tree = ElementTree.parse(datasets / "asdiv" / "ASDiv.xml")
    text = [problem.answer for problem in problems if isinstance(problem.answer, str)]
    assert len(text) == 212 and {"Yes", "5:45", "11; 12; 13", "8 (km/hour); 3"} - set(text) == {"8 (km/hour); 3"}
    for problem, node in zip(problems, tree.iter("Problem")):
        plain = re.fullmatch(r"(-?[\d.]+)\s*(\(.*\))?", node.findtext("Answer").strip())
        if plain and ";" not in node.findtext("Answer"):
            assert problem.answer == float(plain[1])


# How many answers of code-davinci-002 are right, (chain of thought, direct): the accuracies in the *_eval_metrics.jsonl
# files of the benchmark's repository (commit e26f26d) times the number of problems. None: no such file.
PUBLISHED = {
    "boolean_expressions": (232, 221),
    "causal_judgement": (101, 119),
    "date_understanding": (218, 159),
    "disambiguation_qa": (190, 168),
    "dyck_languages": (142, 117),
    "formal_fallacies": (None, 131),
    "geometric_shapes": (136, 80),
    "hyperbaton": (166, 151),
    "logical_deduction_five_objects": (137, 81),
    "logical_deduction_seven_objects": (97, 65),
    "logical_deduction_three_objects": (219, 132),
    "movie_recommendation": (226, 212),
    "multistep_arithmetic_two": (119, 3),
    "navigate": (241, None),
    "object_counting": (233, 113),
    "penguins_in_a_table": (116, 97),
    "reasoning_about_colored_objects": (229, 169),
    "ruin_names": (171, 188),
    "salient_translation_error_detection": (152, 155),
    "snarks": (106, 109),
    "sports_understanding": (244, 182),
    "temporal_sequences": (242, 194),
    "tracking_shuffled_objects_five_objects": (224, 51),
    "tracking_shuffled_objects_seven_objects": (214, 36),
    "tracking_shuffled_objects_three_objects": (196, 94),
    "web_of_lies": (238, 129),
    "word_sorting": (101, 126),
}  # fmt: skip


@pytest.mark.parametrize("task", PUBLISHED)
def test_bbh_scores_of_published_outputs_are_the_published_ones(task):
    """BBH_OUTPUTS is the folder code-davinci-002-outputs of the benchmark's repository, suzgunmirac/BIG-Bench-Hard."""
    if "BBH_OUTPUTS" not in os.environ:
        pytest.skip("BBH_OUTPUTS names no folder of published outputs")
    for kind, published in zip(("cot", "direct"), PUBLISHED[task]):
        path = Path(os.environ["BBH_OUTPUTS"]) / f"code-davinci-002-{kind}" / f"{task}_few_shot_template_0-255000.json"
        outputs = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        right = sum(ev.is_correct(entry["prediction"], entry["target"]) for entry in outputs)
        assert published is None or right == published


def test_bbh_has_its_27_tasks_and_three_demonstrations_each(datasets):
    assert ev.bbh_tasks(datasets) == sorted(ev.BBH_TASKS) and len(ev.BBH_TASKS) == 27
    assert sum(len(ev.load(task, "test", datasets)) for task in ev.BBH_TASKS) == 6511
    for task in ev.BBH_TASKS:
        targets = {problem.answer for problem in ev.load(task, "test", datasets)}
        cot, direct = (ev.bbh_prompt(task, "new", cot, datasets) for cot in (True, False))
        assert cot.endswith("Q: new\nA: Let's think step by step.") and direct.endswith("Q: new\nA:")
        assert "canary" not in cot and "step by step" not in direct and len(direct) < len(cot)
        demonstrated = re.findall(r"^A: (.*)$", direct, re.MULTILINE)
        assert len(demonstrated) == 3
        for block, answer in zip(re.findall(r"A: Let's think.*?(?=\n\nQ: |\Z)", cot, re.DOTALL), demonstrated):
            assert ev.extract_choice(block) == ev.extract_choice(answer)
            if all(re.fullmatch(r"\([A-Z]\)", target) for target in targets):
                assert re.fullmatch(r"\([A-Z]\)", answer)


def test_the_four_inputs_are_the_papers():
    shots = [ev.Problem("How many?", 3.0, "1 + 2 = 3"), ev.Problem("And now?", 0.5, "so it is")]
    assert ev.math_prompt("Why?", False) == "Q: Why? A:"
    assert ev.math_prompt("Why?", True) == "Q: Why?\nLet's think step by step"
    assert ev.math_prompt("Why?", False, shots) == (
        "Q: How many?\nA: The answer is 3\n\nQ: And now?\nA: The answer is 0.5\n\nQ: Why?\nA:"
    )
    assert ev.math_prompt("Why?", True, shots) == (
        "Q: How many?\nLet's think step by step\n1 + 2 = 3\nThe answer is 3\n\n"
        "Q: And now?\nLet's think step by step\nso it is\nThe answer is 0.5\n\nQ: Why?\nLet's think step by step"
    )


def test_accuracy_is_the_share_of_right_answers_in_the_problems_order():
    model, tokenizer = T5.from_pretrained(TOY / "student"), Tokenizer(TOY / "student")
    problems = ev.load("svamp", "test", TOY)[:7]
    texts = [ev.math_prompt(problem.question, cot=True) for problem in problems]
    outputs = [
        tokenizer.decode(model.generate(torch.tensor([tokenizer.encode(text)]), max_new_tokens=20)[0]) for text in texts
    ]
    for i in (0, 3):
        problems[i].answer = outputs[i]  # right by exact match
    found = ev.evaluate(model, tokenizer, problems, batch_size=3, max_new_tokens=20)
    assert [p["output"] for p in found.predictions] == outputs and [p["prompt"] for p in found.predictions] == texts
    right = [ev.is_correct(output, problem.answer) for output, problem in zip(outputs, problems)]
    assert [p["correct"] for p in found.predictions] == right
    assert found.accuracy == sum(right) / 7
    assert found.stderr == pytest.approx((found.accuracy * (1 - found.accuracy) / 7) ** 0.5)


def test_batching_changes_no_output():
    model, tokenizer = T5.from_pretrained(TOY / "student"), Tokenizer(TOY / "student")
    problems = ev.load("gsm8k", "test", TOY)[:12]
    one, many = (ev.evaluate(model, tokenizer, problems, batch_size=n, max_new_tokens=24) for n in (1, 12))
    assert [p["output"] for p in one.predictions] == [p["output"] for p in many.predictions]


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("gsm8k/test.jsonl", '{"question": "a", "answer": "#### 1"}\n{"question": "b"}', "line 2: no 'answer'"),
        ("gsm8k/test.jsonl", '{"question": "a", "answ', "line 1"),
        ("svamp/SVAMP.json", '[{"Body": "a", "Question": "b", "Answer": 1}, {"Body": "a", "Question": "b"}]', "problem 1"),
        ("multiarith/MultiArith.json", '[{"sQuestion": "a", "lSolutions": []}]', "problem 0"),
        ("asdiv/ASDiv.xml", "<a><Problem ID='x1'><Body>b</Body></Problem></a>", "problem x1"),
        ("asdiv/ASDiv.xml", "<a><Problem", "ASDiv.xml"),
        ("svamp/SVAMP.json", "[]", "holds no problem"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, place):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(place)) as error:
        ev.load(path.parent.name, "all", tmp_path)
    assert path.name in str(error.value)


def test_unknown_tasks_and_splits_list_the_known_ones(run):
    with pytest.raises(InputError, match="no task 'gsm9k': there are gsm8k, multiarith"):
        ev.load("gsm9k", "test", TOY)
    with pytest.raises(InputError, match="svamp has no training part"):
        ev.load("svamp", "train", TOY)
    done = run("eval.py", TOY / "student", "--tasks", "gsm9k", "--data", TOY)
    assert done.returncode == 1 and "there are gsm8k" in done.stderr and "Traceback" not in done.stderr


def test_the_authors_rule_for_math_errs_where_people_see_signs_and_commas(datasets):
    rule = lambda output, written: ev.is_correct_by_authors(output, written, True, True)
    assert rule("it is 5", "-5") and rule("50%", "50") and rule("$1,080", "1,080") and rule("80", "1,080")
    assert not rule("$1,234", "1234") and not rule("none", "5") and rule("at 5:45", "5:45") and not rule("Yes", "Yes")
    lines = map(json.loads, (datasets / "gsm8k" / "labelled_solutions_6b.jsonl").read_text().splitlines())
    wrong = [line for line in lines if rule(line["solution"], line["ground_truth"]) != line["is_correct"]]
    assert len(wrong) == 10
    assert all(re.search(r"-|,\d", line["solution"][-20:] + line["ground_truth"][-20:]) for line in wrong)
    assert {problem.written for problem in ev.load("gsm8k", "all", datasets)} >= {"5,600", "-10", "18"}


@pytest.mark.parametrize(
    "output, target, cot, hit",
    [
        ("So the answer is (B) or (C).", "(C)", True, True), ("(C), so the answer is (B)", "(C)", True, False),
        ("So the answer is not.", "no", True, True), ("(B) (C)", "(C)", True, False), ("(B) (C)", "(C)", False, True),
    ],
)  # fmt: skip
def test_the_authors_rule_for_bbh_is_containment(output, target, cot, hit):
    assert ev.is_correct_by_authors(output, target, False, cot) == hit


def test_every_gold_answer_is_right_by_the_benchmarks_rule_and_by_the_authors(datasets):
    for task in ev.BBH_TASKS:
        for problem in ev.load(task, "test", datasets):
            said = f"Let's see, the answer is no. So the answer is {problem.answer}."
            assert ev.is_correct(said, problem.answer) and ev.is_correct(f" {problem.answer}", problem.answer)
            assert ev.is_correct_by_authors(said, problem.answer, False, True)


@pytest.mark.parametrize("task", ["gsm8k", "asdiv"])
def test_every_written_gold_answer_reads_as_an_independent_reading_has_it(datasets, task):
    """Commas, signs, decimals, fractions, units, percent and currency around the publishers' own answers."""
    for problem in ev.load(task, "all", datasets):
        if isinstance(problem.answer, float) and problem.answer.is_integer():
            value = abs(int(problem.answer))
            for said in (f"{value:,}", f"${value:,}.", f"{value}%", f"{value}.00 units", f"{value}/1", f"(-{value})"):
                sign = -1 if "-" in said else 1
                assert ev.extract_number(f"1 + 2 = 3, so the answer is {said}") == sign * value, said


def test_a_set_of_ones_own_takes_a_reader_and_a_line(tmp_path, monkeypatch):
    reader = lambda text, place: ((question, float(answer)) for question, answer in json.loads(text))
    monkeypatch.setitem(ev.READERS, "mine", (reader, "mine.json"))
    with pytest.raises(InputError, match="mine.json"):
        ev.load("mine", "test", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps([[f"How many are {i}?", i] for i in range(6)]))
    assert [problem.answer for problem in ev.load("mine", "all", tmp_path)] == list(range(6))
    assert len(ev.load("mine", "test", tmp_path)) == len(ev.load("mine", "validation", tmp_path)) == 3


def test_without_a_prompt_math_is_asked_as_cot_says(student):
    problems = ev.load("gsm8k", "test", TOY)[:1]
    for cot in (True, False):
        (prediction,) = ev.evaluate(*student, problems, max_new_tokens=2, cot=cot).predictions
        assert prediction["prompt"] == ev.math_prompt(problems[0].question, cot)


def test_the_commonest_final_answer_wins_the_vote():
    assert ev.majority(["is 5", "or 7", "so 7", "none", "no", "no"], ev.extract_number) == "or 7"
    assert ev.majority(["none", "no"], ev.extract_number) == "none" and ev.majority(["9", "8"], ev.extract_number) == "9"


def test_samples_are_drawn_kept_and_voted_on(student):
    model, tokenizer = student
    problems = ev.load("gsm8k", "test", TOY)[:5]
    drawn = [ev.evaluate(model, tokenizer, problems, max_new_tokens=16, samples=4, temperature=3.0, batch_size=2) for _ in range(2)]
    assert drawn[0] == drawn[1]
    for prediction in drawn[0].predictions:
        assert len(prediction["outputs"]) == 4
        assert prediction["output"] == ev.majority(prediction["outputs"], ev.extract_number)
    assert any(len(set(prediction["outputs"])) > 1 for prediction in drawn[0].predictions)


def test_a_paired_difference_has_the_standard_error_that_resampling_problems_gives():
    rng = np.random.default_rng(0)
    old = rng.random(400) < 0.4
    new = np.where(rng.random(400) < 0.8, old, rng.random(400) < 0.6)  # mostly the same problems
    as_predictions = lambda scores: [{"task": "svamp", "correct": bool(score)} for score in scores]
    found = summarize(as_predictions(new), "correct", as_predictions(old))
    assert found.accuracy == pytest.approx(new.mean() - old.mean())
    draws = rng.integers(0, 400, (4000, 400))
    assert found.stderr == pytest.approx((new[draws].mean(1) - old[draws].mean(1)).std(), rel=0.05)
    unpaired = math.hypot(summarize(as_predictions(new)).stderr, summarize(as_predictions(old)).stderr)
    assert found.stderr < 0.7 * unpaired


def test_an_interrupted_evaluation_goes_on_where_it_stopped(student, tmp_path, monkeypatch, capsys):
    model, tokenizer = student
    problems = ev.load("svamp", "test", TOY)[:12]
    path = tmp_path / "predictions.jsonl"
    open_file = lambda **settings: PredictionFile(path, "student", **settings)
    go = lambda file: ev.evaluate(model, tokenizer, problems, max_new_tokens=8, batch_size=4, task="svamp", file=file)
    whole = go(open_file(weights="a"))
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    generated = []
    generate = T5.generate
    monkeypatch.setattr(T5, "generate", lambda self, ids, **o: (generated.append(len(ids)), generate(self, ids, **o))[1])
    for left, lost in ((text, 0), (b"", 12), (text[:-1], 1), (text[:-9], 1), (b"".join(lines[:5]) + lines[5][:7], 7),
                       (b"".join(lines[:3]) + b"\0\0\xff\n" + b"".join(lines[4:]), 1)):  # fmt: skip
        path.write_bytes(left)
        generated.clear()
        assert go(open_file(weights="a")) == whole and sum(generated) == lost
        assert sorted(path.read_bytes().splitlines()) == sorted(text.splitlines())
    generated.clear()
    go(open_file(weights="b"))
    go(PredictionFile(path, "another", weights="a"))
    ev.evaluate(model, tokenizer, problems, max_new_tokens=8, task="asdiv", file=open_file(weights="a"))
    assert sum(generated) == 36 and len(path.read_text().splitlines()) == 48


def test_lines_appear_while_the_evaluation_runs_and_a_kill_leaves_them(student, tmp_path, monkeypatch):
    model, tokenizer = student
    path = tmp_path / "predictions.jsonl"
    calls = iter([T5.generate, T5.generate])

    def generate(self, *args, **options):
        step = next(calls, None)
        if step is None:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(T5, "generate", generate)
    file = PredictionFile(path, "student")
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(model, tokenizer, ev.load("svamp", "test", TOY)[:9], max_new_tokens=8, batch_size=3, file=file)
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize("content", ["my notes\nand more\n", "my notes", '{"step": 1}\n{"step": 2}\n', '{"important": 1}\n'])
def test_a_file_that_holds_no_predictions_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(InputError, match="(none of its lines is|not) a prediction"):
        PredictionFile(path, "student")
    assert path.read_text() == content


def test_two_models_are_compared_on_the_same_problems_and_both_rules_are_told(command, tmp_path):
    out = tmp_path / "predictions.jsonl"
    told = command(
        TOY / "raw", TOY / "student", "--tasks", "svamp, opposites", "--data", TOY, "--limit", 4, "--out", out,
        "--max-new-tokens", 8, "--device", "cpu", "--direct", "--shots", 4,
    )  # fmt: skip
    table = told.splitlines()
    assert table[0].split() == "svamp (4) authors' rule opposites (4) authors' rule".split()
    assert table[3].startswith("  minus the first") and table[3].count("±") == 4
    assert "On 8 math outputs the authors' rule" in told and "On 8 BIG-Bench Hard outputs" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["model"] for line in lines] == [str(TOY / "raw")] * 8 + [str(TOY / "student")] * 8
    assert lines[0]["prompt"].count("A: The answer is") == 4 and lines[0]["settings"]["cot"] is False


def test_what_the_authors_rule_costs_is_counted_on_the_same_outputs():
    problems = [ev.Problem("a", -5.0), ev.Problem("b", 1234.0), ev.Problem("c", 7.0)]
    outputs = ["so 5", "so 1,234", "so 7"]  # accepted though wrong, refused though right, the same by both
    math_part = [ev.judge(problem, "svamp", "p", [output], True) for problem, output in zip(problems, outputs)]
    bbh_part = [ev.judge(ev.Problem("d", "no"), "navigate", "p", ["So the answer is not clear."], True)]
    assert [p["correct"] for p in math_part + bbh_part] == [False, True, True, False]
    assert [p["correct_by_authors"] for p in math_part + bbh_part] == [True, False, True, True]
    of_math, of_bbh = cost_of_rule(math_part + bbh_part, ev.MATH)
    assert of_math.startswith("On 3 math") and "refuses 1 right answers and accepts 1 wrong ones: +0.00" in of_math
    assert of_bbh.startswith("On 1 BIG-Bench Hard") and "refuses 0 right answers and accepts 1" in of_bbh


def test_right_and_wrong_cases_are_shown_side_by_side(command, tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    case = {"task": "svamp", "prompt": "Q: Why? A:", "question": "Why?", "answer": 3.0, "model": "m"}
    cases = [case | {"output": "so 3", "extracted": 3.0, "correct": True}] * 2
    cases += [case | {"output": "a long way to 4\nand back", "extracted": None, "correct": False}]
    path.write_text("".join(json.dumps(line) + "\n" for line in cases) + '{"task": "sv')
    monkeypatch.setenv("COLUMNS", "43")
    told = command("--show", 1, path)
    assert "m, svamp: 2 of 3 right" in told
    assert "so 3                 | a long way to 4\n" in told and "-> None   gold: 3\n" in told
    assert told.count("so 3") == 1 and path.read_text().endswith('{"task": "sv')  # looking mends nothing
    with pytest.raises(InputError, match="No such file.*--out"):
        command("--show", 1, tmp_path / "none.jsonl")
    path.write_text("")
    with pytest.raises(InputError, match="no prediction yet"):
        command("--show", 1, path)


def test_the_scaling_fit_is_least_squares_in_the_logarithm():
    sizes, accuracies = [80e6, 250e6, 780e6, 3e9, 11e9], [3.1, 6.0, 9.9, 20.2, 27.4]
    slope, intercept = log_linear_fit(sizes, accuracies)
    reference = statistics.linear_regression([math.log10(size) for size in sizes], accuracies)
    assert (slope, intercept) == pytest.approx((reference.slope, reference.intercept))


def test_without_matplotlib_a_plot_says_what_to_install(command, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 10, "validation": {"gsm8k": [0.1, 0.02]}}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        command("--plot", tmp_path / "a.png", log)


def test_the_plots_are_drawn(command, tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("pip install matplotlib")
    log = tmp_path / "log.jsonl"
    entries = [{"step": step, "kl": 0.5, "validation": {"gsm8k": [step / 100, 0.02]}} for step in (10, 20)]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in [{"step": 1, "kl": 0.9}, *entries]))
    command("--plot", tmp_path / "a.png", log)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    scaling_plot(tmp_path / "b.svg", {"svamp": [(1e6, 0.1, 0.01), (1e7, 0.2, 0.01), (1e8, 0.3, 0.01)]})
    assert (tmp_path / "b.svg").read_text().count("<path") > 10
    with pytest.raises(InputError, match="c.xyz"):
        trade_off_plot(tmp_path / "c.xyz", log)


def test_a_line_through_one_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="two sizes"):
        scaling_plot(tmp_path / "c.png", {"svamp": [(1e6, 0.1, 0.01), (1e6, 0.2, 0.01)]})


@pytest.mark.parametrize(
    "content, fault",
    [("", "no validation yet"), ('{"step": 1}\n{"st\n', "line 2"), ('{"step": 1}\n{"st', "no validation yet"), ("[1]", "line 1")],
)
def test_a_bad_log_is_named_with_its_line(tmp_path, content, fault):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(InputError, match=fault):
        trade_off_plot(tmp_path / "a.png", log)
    with pytest.raises(InputError, match="specialize.py"):
        trade_off_plot(tmp_path / "a.png", tmp_path / "none.jsonl")


def test_a_model_without_its_tokenizer_and_a_missing_set_say_what_to_do(command, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(TOY / "student", model, ignore=shutil.ignore_patterns("spiece.model"))
    with pytest.raises(InputError, match="no spiece.model"):
        command(model, "--data", TOY, "--tasks", "svamp")
    monkeypatch.setattr(ev, "GITHUB", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="without a network, put that file at .*SVAMP.json"):
        command(TOY / "student", "--data", tmp_path, "--tasks", "svamp", "--device", "cpu")


def test_the_command_prints_a_table_and_writes_predictions(run, tmp_path):
    out = tmp_path / "predictions.jsonl"
    done = run(
        "eval.py", TOY / "student", "--tasks", "svamp,bbh", "--data", TOY, "--limit", 3, "--out", out,
        "--max-new-tokens", 8, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "svamp (3)" in done.stdout and "±" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3 + 3 * len(ev.bbh_tasks(TOY))
    assert {"model", "task", "prompt", "output", "extracted", "answer", "correct"} <= set(lines[0])
