"""eval.py against OpenAI's human labels, BBH's published figures and the publishers' own files."""

import hashlib
import json
import math
import random
import re
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

import eval as ev
from conftest import TOY, damage, half, missing, random_text
from eval import authors_match, exact_match, extract_choice, extract_number
from t5 import T5, Tokenizer, UserError, load_pretrained

SIZES = {"gsm8k": (500, 819), "multiarith": (200, 400), "asdiv": (500, 1805), "svamp": (500, 500)}

@pytest.fixture(scope="module")
def datasets(real):
    """The folder of real problem sets."""
    return real / "datasets"

@pytest.fixture(scope="module")
def student():
    """The toy's model and tokenizer."""
    return load_pretrained(TOY / "student")

@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) runs eval.py in this process; return what it prints."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
        ev.main()
        return capsys.readouterr().out

    return command

@pytest.fixture
def generated(monkeypatch):
    """A list that gets the number of problems of each call of T5.generate."""
    sizes, generate = [], T5.generate

    def counted(self, input_ids, **options):
        sizes.append(len(input_ids))
        return generate(self, input_ids, **options)

    monkeypatch.setattr(T5, "generate", counted)
    return sizes

def labelled(datasets):
    """Return 2,638 solutions of a model, each with a person's verdict."""
    text = (datasets / "gsm8k" / "labelled_solutions_6b.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))

# --- answers ---

def test_extraction_agrees_with_every_human_label(datasets):
    lines = labelled(datasets)
    assert len(lines) == 2638
    for line in lines:
        gold = extract_number(line["ground_truth"])
        assert exact_match(line["solution"], gold) == line["is_correct"], line

def test_scores_of_published_bbh_outputs_are_the_published_figures(datasets):
    figures = sorted(datasets.glob("bbh/code-davinci-002-outputs/*/*_eval_metrics.jsonl"))
    assert len(figures) == 54  # 27 tasks, chain of thought and answer-only
    for path in figures:
        name = path.name.replace("_eval_metrics.jsonl", ".json")
        outputs = json.loads(path.with_name(name).read_text(encoding="utf-8"))["outputs"]
        right = sum(exact_match(output["prediction"], output["target"]) for output in outputs)
        assert 100 * right / len(outputs) == pytest.approx(json.loads(path.read_text())["accuracy"])

@pytest.mark.parametrize("text, number", [
    ("48 + 24 = 72 clips.\nThe answer is 72.", 72), ("The answer is $1,234.50", 1234.5),
    ("is -5", -5), ("−3", -3), ("-$5", -5), ("$-5", -5), ("(-7)", -7), ("x=-4", -4), ("2 -3", 3),
    ("48 - 24", 24), ("48-24", 24), ("5-10 minutes", 10), ("is 1/2.", 0.5), ("1/2.5", 2.5),
    ("50%", 50), (".5", 0.5), ("109,200,000", 109200000), ("3.", 3), ("A 1/0", 0), ("none", None),
    ("", None)])
def test_the_final_number_is_read_as_people_write_it(text, number):
    assert extract_number(text) == number

@pytest.mark.parametrize("text, answer", [
    ("Let's see. So the answer is (B).", "(B)"), ("(C)", "(C)"), (" yes ", "yes"), ("", ""),
    ("the answer is x. So the answer is ] ) >.", "] ) >"), ("So the answer is -219.", "-219"),
    ("So the answer is (A) or (B).", "(A) or (B)"), ("answer is } ] >. ", "} ] >"),
    ("The answer is Monsters, Inc..", "Monsters, Inc."), ("valid.", "valid."),
    ("so the answer is yes.\n\nQ: Is it?", "yes.\n\nQ: Is it?"),
    ("(A) is wrong, (B) may be right, and", "(A) is wrong, (B) may be right, and")])
def test_the_final_choice_follows_the_answer_is(text, answer):
    assert extract_choice(text) == answer

def test_the_authors_rule_for_math_errs_on_signs_and_commas(datasets):
    def rule(output, written):
        return authors_match(output, written, True, True)

    assert rule("it is 5", "-5") and rule("50%", "50") and rule("80", "1,080")
    assert not rule("$1,234", "1234") and not rule("none", "5") and not rule("Yes", "Yes")
    wrong = [line for line in labelled(datasets)
             if rule(line["solution"], line["ground_truth"]) != line["is_correct"]]
    assert len(wrong) == 10
    for line in wrong:
        assert re.search(r"-|,\d", line["solution"][-20:] + line["ground_truth"][-20:])
    published = {problem.written for problem in ev.load("gsm8k", "all", datasets)}
    assert published >= {"5,600", "-10", "18"}

@pytest.mark.parametrize("output, target, cot, hit", [
    ("So the answer is (B) or (C).", "(C)", True, True), ("(B) (C)", "(C)", True, False),
    ("(C), so the answer is (B)", "(C)", True, False), ("(B) (C)", "(C)", False, True),
    ("So the answer is not.", "no", True, True)])
def test_the_authors_rule_for_bbh_is_containment(output, target, cot, hit):
    assert authors_match(output, target, False, cot) == hit

def test_every_gold_answer_is_right_by_both_rules_however_it_is_written(datasets):
    for task in ev.BBH_TASKS:
        for problem in ev.load(task, "test", datasets):
            output = f"Let's see, the answer is no. So the answer is {problem.answer}."
            assert exact_match(output, problem.answer)
            assert exact_match(f" {problem.answer}", problem.answer)
            assert authors_match(output, problem.answer, False, True)
    for problem in ev.load("gsm8k", "all", datasets) + ev.load("asdiv", "all", datasets):
        if isinstance(problem.answer, float) and problem.answer.is_integer():
            n = abs(int(problem.answer))
            for text in (f"{n:,}", f"${n:,}.", f"{n}%", f"{n}.00 units", f"{n}/1", f"(-{n})"):
                value = -n if "-" in text else n
                assert extract_number(f"1 + 2 = 3, so the answer is {text}") == value, text

def test_the_most_common_final_answer_wins_the_vote():
    def vote(*outputs):
        return ev.self_consistency(outputs, extract_number)

    assert vote("is 5", "or 7", "so 7", "none", "no", "no") == "or 7"
    assert vote("none", "no") == "none" and vote("9", "8") == "9"

def test_extraction_takes_any_text():
    rng = random.Random(5)
    texts = [random_text(rng) for _ in range(3000)] + ["9" * 5000, "1/" + "9" * 5000, "," * 50_000]
    texts += ["1" * 400 + "/" + "2" * 400, "1,111" * 20_000, "answer is " * 20_000, "(A" * 20_000]
    texts += ["((((" * 30 + "=", "-" * 50_000, "1 + " * 20_000 + "=", "٣/٤", "−５", "½ =", "1e999"]
    for text in texts:
        assert isinstance(extract_number(text), (float, type(None)))
        assert isinstance(ev.parse_gold_answer(text), (float, str))
        assert isinstance(ev.compute(text + " ="), (str, type(None)))
        for answer in (5.0, "(A)", text):
            assert exact_match(text, answer) in (True, False)
        assert authors_match(text, "5", True, True) in (True, False)

# --- problems and prompts ---

def test_every_set_has_its_publishers_count_and_gold_answers(datasets):
    for task, (validation, test) in SIZES.items():
        parts = {part: ev.load(task, part, datasets) for part in ("validation", "test", "all")}
        assert [len(part) for part in parts.values()] == [validation, test, validation + test]
        both = parts["validation"] + parts["test"]
        assert sorted(map(repr, both)) == sorted(map(repr, parts["all"]))
        assert parts["validation"] == ev.load(task, "validation", datasets)
    train = ev.load("gsm8k", "train", datasets)
    assert len(train) == 7473
    lines = (datasets / "gsm8k" / "train.jsonl").read_text().splitlines()
    for problem, line in zip(train, lines):
        assert problem.answer == float(re.search(r'#### (\S+)"}', line)[1].replace(",", ""))
        assert "<<" not in problem.solution and "####" not in problem.solution
    svamp = json.loads((datasets / "svamp" / "SVAMP.json").read_text())
    for problem, row in zip(ev.load("svamp", "all", datasets), svamp):
        assert problem.answer == row["Answer"]
        if row["ID"] != "chal-680":  # the publisher's slip: its equation has another value
            assert problem.answer == pytest.approx(eval(row["Equation"]), abs=0.01)
    multiarith = json.loads((datasets / "multiarith" / "MultiArith.json").read_text())
    for problem, row in zip(ev.load("multiarith", "all", datasets), multiarith):
        assert problem.answer == pytest.approx(eval(row["lEquations"][0].removeprefix("X=")))

def test_asdiv_answers_are_numbers_except_212_texts(datasets):
    problems = ev.load("asdiv", "all", datasets)
    texts = [problem.answer for problem in problems if isinstance(problem.answer, str)]
    assert len(texts) == 212 and {"Yes", "5:45", "11; 12; 13"} <= set(texts)
    for problem, node in zip(problems, ElementTree.parse(datasets / "asdiv/ASDiv.xml").iter("Problem")):
        plain = re.fullmatch(r"(-?[\d.]+)\s*(\([^;]*\))?", node.findtext("Answer").strip())
        assert not plain or problem.answer == float(plain[1])

def test_bbh_has_27_tasks_with_three_demonstrations_each(datasets):
    assert ev.bbh_tasks(datasets) == ev.BBH_TASKS and len(ev.BBH_TASKS) == 27
    assert sum(len(ev.load(task, "test", datasets)) for task in ev.BBH_TASKS) == 6511
    for task in ev.BBH_TASKS:
        cot, answer_only = (ev.bbh_prompt(task, "new", cot, datasets) for cot in (True, False))
        assert cot.endswith("Q: new\nA: Let's think step by step.") and "canary" not in cot
        assert answer_only.endswith("Q: new\nA:") and "step by step" not in answer_only
        solutions = re.findall(r"A: Let's think.*?(?=\n\nQ: |\Z)", cot, re.DOTALL)[:3]
        answers = re.findall(r"^A: (.*)$", answer_only, re.MULTILINE)
        assert list(map(extract_choice, solutions)) == list(map(extract_choice, answers))
        targets = {problem.answer for problem in ev.load(task, "test", datasets)}
        if all(re.fullmatch(r"\([A-Z]\)", target) for target in targets):
            assert all(re.fullmatch(r"\([A-Z]\)", answer) for answer in answers)

def test_the_four_inputs_are_the_papers():
    shots = [ev.Problem("How many?", 3.0, "1 + 2 = 3"), ev.Problem("And now?", 0.5, "so it is")]
    assert ev.math_prompt("Why?", False) == "Q: Why? A:"
    assert ev.math_prompt("Why?", True) == "Q: Why?\nLet's think step by step"
    assert ev.math_prompt("Why?", False, shots) == (
        "Q: How many?\nA: The answer is 3\n\nQ: And now?\nA: The answer is 0.5\n\nQ: Why?\nA:")
    assert ev.math_prompt("Why?", True, shots) == (
        "Q: How many?\nLet's think step by step\n1 + 2 = 3\nThe answer is 3\n\n"
        "Q: And now?\nLet's think step by step\nso it is\nThe answer is 0.5\n\n"
        "Q: Why?\nLet's think step by step")

def test_a_set_of_ones_own_takes_a_parser_and_an_entry(tmp_path, monkeypatch, command):
    def parse(line):
        question, answer = line.split("\t")
        return ev.Problem(question, float(answer))

    monkeypatch.setitem(ev.DATASETS, "mine", ev.Dataset("Mine", "mine.jsonl", parse, 4))
    with pytest.raises(UserError, match="mine.jsonl"):
        ev.load("mine", "test", tmp_path)
    (tmp_path / "mine.jsonl").write_text("".join(f"How many are {i}?\t{i}\n" for i in range(6)))
    assert [problem.answer for problem in ev.load("mine", "all", tmp_path)] == list(range(6))
    assert len(ev.load("mine", "test", tmp_path)) == len(ev.load("mine", "validation", tmp_path)) == 3
    printed = command(TOY / "student", "--tasks", "mine", "--data", tmp_path, "--device", "cpu",
                      "--out", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    assert "mine (3)" in printed
    (tmp_path / "mine.jsonl").write_text("How many are 5?\t5\nHow many?\n")
    with pytest.raises(UserError, match="mine.jsonl, line 2: not enough values"):
        ev.load("mine", "test", tmp_path)

def test_every_source_is_pinned_to_a_commit_and_has_its_files_checksum(datasets):
    for name, (repository, _, sha256) in ev.SOURCES.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/[0-9a-f]{40}", repository)
        assert hashlib.sha256((datasets / name).read_bytes()).hexdigest() == sha256
    assert re.fullmatch(r"[\w.-]+/[\w.-]+/[0-9a-f]{40}", ev.BBH_SOURCE)

# --- accuracy ---

def test_accuracy_is_the_share_of_right_answers_in_the_order_of_the_problems(student):
    model, tokenizer = student
    problems = ev.load("svamp", "test", TOY)[:7]
    prompts = [ev.math_prompt(problem.question, cot=True) for problem in problems]
    ids = [torch.tensor([tokenizer.encode(prompt)]) for prompt in prompts]
    outputs = [tokenizer.decode(model.generate(each, max_new_tokens=20)[0]) for each in ids]
    problems[0].answer = extract_choice(outputs[0])
    problems[3].answer = extract_choice(outputs[3])
    for size in (1, 3, 7):  # batching changes no output
        e = ev.evaluate(*student, problems, batch_size=size, max_new_tokens=20)
        assert [p["output"] for p in e.predictions] == outputs
        assert [p["prompt"] for p in e.predictions] == prompts
        right = [exact_match(output, p.answer) for output, p in zip(outputs, problems)]
        assert [p["correct"] for p in e.predictions] == right and right[0] and right[3]
        assert e.accuracy == sum(right) / 7
        assert e.stderr == pytest.approx((e.accuracy * (1 - e.accuracy) / 7) ** 0.5)
    (prediction,) = ev.evaluate(*student, problems[:1], max_new_tokens=2, cot=False).predictions
    assert prediction["prompt"] == ev.math_prompt(problems[0].question, False)
    with pytest.raises(UserError, match="no problem"):
        ev.evaluate(*student, [])

def test_samples_are_drawn_and_voted_on(student):
    options = dict(max_new_tokens=16, samples=4, temperature=3.0, batch_size=2)
    problems = ev.load("gsm8k", "test", TOY)[:5]
    e = ev.evaluate(*student, problems, **options)
    assert e == ev.evaluate(*student, problems, **options)
    for p in e.predictions:
        assert len(p["outputs"]) == 4 and len(set(p["outputs"])) > 1
        assert p["output"] == ev.self_consistency(p["outputs"], extract_number)

def test_a_paired_difference_has_the_standard_error_that_resampling_gives():
    rng = np.random.default_rng(0)
    old = rng.random(400) < 0.4
    new = np.where(rng.random(400) < 0.8, old, rng.random(400) < 0.6)  # mostly the same problems
    before, after = ([{"task": "svamp", "correct": x} for x in y.tolist()] for y in (old, new))
    e = ev.summarize(after, "correct", before)
    assert e.accuracy == pytest.approx(new.mean() - old.mean())
    draws = rng.integers(0, 400, (4000, 400))
    assert e.stderr == pytest.approx((new[draws].mean(1) - old[draws].mean(1)).std(), rel=0.05)
    unpaired = math.hypot(ev.summarize(after).stderr, ev.summarize(before).stderr)
    assert e.stderr < 0.7 * unpaired

# --- the calculator ---

@pytest.mark.parametrize("text, value", [
    ("48 / 2 =", "24"), ("so 48/2=", "24"), ("She has $5 * 3 =", "$15"), ("0.1 + 0.2 =", "0.3"),
    ("10/3 =", "3.3333"), ("1,200 * 3 =", "3600"), ("(3 + 4) * -5 =", "-35"), ("3 x 4 =", "12"),
    ("3x4 =", "12"), ("is 72. 72 - 2 =", "70"), ("in 2019, 24 + 3 =", "27"), ("5 - 10 =", "-5"),
    ("3 - 3 =", "0"), *((text, None) for text in [
        "x = 5 =", "3 apples + 4 =", "20% * 5 =", "1/0 =", "2**3 =", "9//2 =", "1e5 + 1 =", "7 =",
        "=", "((((1 + 2 =", "__import__('os') + 1 =", "()" * 400 + "=", "1+" * 60 + "1 =",
        "2 (3 + 4) =", "(1 + 2)(3 + 4) =", "1 / 100000 =", "0 - 1 / 100000 =", "3^2 + 1 =",
        "In 2019 24 + 3 =", "14 * 1 1/2 =", "2 1/2 + 3 =", "n*4 + 3 =", "12cm*(3/4) =", "2x - 3 =",
        "$350 000 x 12/100 =", "3:30 + 45 =", "$2000x 10/100 =", "half of (50 + 3) =",
        "(1/2) 278 + 11 ="])])
def test_only_clear_arithmetic_is_computed(text, value):
    assert ev.compute(text) == value

def test_the_calculator_agrees_with_the_marks_of_gsm8ks_authors(datasets):
    texts = (datasets / "gsm8k" / "train.jsonl").read_text()
    marks = re.findall(r"<<([^=<>]*)=([^=<>]*)>>", texts)  # such as <<48/2=24>>
    marks = [(e, ev.compute(e + "="), v) for e, v in marks if re.search(r"\d\s*[+*/-]", e)]
    known = [(float(c), float(v)) for _, c, v in marks if c and re.fullmatch(r"-?[\d.]+", v)]
    assert len(known) > 0.98 * len(marks) > 20000
    assert sum(abs(c - v) < 0.01 * max(1, abs(v)) for c, v in known) > 0.998 * len(known)

@pytest.mark.parametrize("vocabulary", ["toy", "real"])
def test_the_calculator_forces_the_value_digit_by_digit(vocabulary, request):
    is_toy = vocabulary == "toy"
    folder = TOY / "student" if is_toy else request.getfixturevalue("real") / "tokenizers" / "t5"
    tokenizer = Tokenizer(folder)
    process, size = ev.calculator(tokenizer), len(tokenizer.pieces)

    def barred(ids):
        """Return what may not follow ids, and the first piece that may."""
        allowed = process(torch.tensor([ids]), torch.zeros(1, size))[0].isfinite()
        return {tokenizer.pieces[i] for i in (~allowed).nonzero()[:, 0]}, int(allowed.long().argmax())

    for text, value in (("So 48 * 26 =", " 1248"), ("48*26=", "1248"), ("Then 3 - 96 =", " -93"),
                        ("She has $0.5 + 4 =", " $4.5")):
        ids = tokenizer.encode(text)[:-1]
        while len(barred(ids)[0]) == size - 1:
            ids.append(barred(ids)[1])
        assert tokenizer.decode(ids) == text + value
        assert {"0", "5"} <= barred(ids)[0] and not {"▁", ".", "▁The"} & barred(ids)[0]
        assert barred([*ids, tokenizer.pieces.index(".")])[0] == barred(ids)[0]  # no decimals
    assert not barred(tokenizer.encode("It is 7 =")[:-1])[0]

def test_the_calculator_takes_over_after_the_models_equation(student, monkeypatch):
    script, force = student[1].encode("Then 48 * 26 =")[:-1], ev.calculator(student[1])

    def scripted(rows, logits):
        t = rows.shape[1]
        return force(rows, logits) if t >= len(script) else logits.index_fill(
            1, torch.tensor([script[t]]), 1e9)

    monkeypatch.setattr(ev, "calculator", lambda tokenizer: scripted)
    for samples in (1, 2):
        e = ev.evaluate(*student, ev.load("gsm8k", "test", TOY)[:4], max_new_tokens=24,
                        use_calculator=True, samples=samples)
        for text in [text for p in e.predictions for text in p.get("outputs", [p["output"]])]:
            assert re.match(r"Then 48 \* 26 = 1248(?!\d)", text)

# --- predictions, tables, plots ---

def test_an_interrupted_evaluation_continues_and_only_appends(student, tmp_path, generated):
    path, problems = tmp_path / "predictions.jsonl", ev.load("svamp", "test", TOY)[:12]

    def evaluate(model="student", task="svamp", **settings):
        generated.clear()
        file = ev.PredictionFile(path, model, **settings)
        return ev.evaluate(*student, problems, max_new_tokens=8, batch_size=4, task=task, file=file)

    e = evaluate(weights="a")
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    for left, lost in ((text, 0), (text[:-1], 0), (text[:-9], 1), (lines[0][:7], 12), (b"", 12),
                       (b"".join(lines[:5]) + lines[5][:7], 7),
                       (b"".join([*lines[:3], b"\0\xff\n", *lines[4:]]), 1)):
        path.write_bytes(left)
        assert evaluate(weights="a") == e and sum(generated) == lost
        assert path.read_bytes().startswith(left)
        assert set(lines) <= set(path.read_bytes().splitlines(keepends=True)) | {lines[-1]}
        assert evaluate(weights="a") == e and not generated
    evaluate(weights="b")
    evaluate("another", weights="a")
    evaluate(task="asdiv", weights="a")
    assert len(path.read_bytes().splitlines()) == 12 + 1 + 36 and len(generated) == 3

def test_a_kill_leaves_the_predictions_made_before_it(student, tmp_path, generated, monkeypatch):
    generate = T5.generate

    def interrupted(self, input_ids, **options):
        if len(generated) == 2:
            raise KeyboardInterrupt
        return generate(self, input_ids, **options)

    monkeypatch.setattr(T5, "generate", interrupted)
    file = ev.PredictionFile(tmp_path / "predictions.jsonl", "student")
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(*student, ev.load("svamp", "test", TOY)[:9], batch_size=3, max_new_tokens=8,
                    file=file)
    assert len(ev.read_predictions(file.path)) == 6

def test_the_command_compares_models_by_both_rules_and_generates_nothing_twice(
        command, tmp_path, generated):
    models = [tmp_path / "raw", tmp_path / "student"]
    for model in models:
        shutil.copytree(TOY / model.name, model)
    out = tmp_path / "predictions.jsonl"
    arguments = [*models, "--tasks", "svamp, opposites", "--data", TOY, "--limit", 4, "--out", out,
                 "--max-new-tokens", 8, "--device", "cpu", "--answer-only", "--shots", 4,
                 "--samples", 2, "--calculator"]
    printed = command(*arguments)
    header, *rows = printed.splitlines()[:5]
    raw, specialized = map(str, models)
    assert re.split("  +", header) == ["accuracy, %", raw, specialized, f"{specialized} - first"]
    assert [re.split("  +", row)[0] for row in rows] == [
        "svamp (4)", "opposites (4)", "svamp (4), authors' rule", "opposites (4), authors' rule"]
    assert all(row.count("±") == 3 for row in rows)
    assert "On 8 math outputs the authors' rule" in printed and "On 8 BIG-Bench Hard" in printed
    lines = ev.read_predictions(out)
    assert [line["model"] for line in lines] == [raw] * 8 + [specialized] * 8
    assert lines[0]["prompt"].count("A: The answer is") == 4 and len(lines[0]["outputs"]) == 2
    generated.clear()
    assert command(*arguments) == printed and not generated
    model = T5.from_pretrained(models[1])
    model.shared.weight.data = model.shared.weight.data.clone() * 2
    model.save_pretrained(models[1])  # the same name, other weights
    command(*arguments)
    assert sum(generated) == 8

def test_the_cost_of_the_authors_rule_is_counted_on_the_same_outputs():
    cases = [(-5.0, "so 5"), (1234.0, "so 1,234"), (7.0, "so 7")]
    math_part = [ev.score(ev.Problem("a", answer), "svamp", "p", [output], True)
                 for answer, output in cases]
    bbh_part = [ev.score(ev.Problem("a", "no"), "navigate", "p", ["the answer is not clear"], True)]
    evaluations = [ev.summarize(math_part), ev.summarize(bbh_part)]
    printed = ev.compare(["svamp", "navigate"], {"student": evaluations})
    assert re.search(r"svamp \(3\) +66.7 .*\nnavigate \(1\) +0.0", printed)
    assert "On 3 math outputs the authors' rule rejects 1 right answers and accepts 1" in printed
    assert "On 1 BIG-Bench Hard outputs the authors' rule rejects 0 right answers and" in printed

def test_right_and_wrong_cases_are_shown_one_after_the_other(command, tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    case = {"task": "svamp", "prompt": "Q: Why? A:", "question": "Why?", "answer": 3, "model": "m"}
    cases = [case | {"output": f"{text} so 3", "extracted": 3, "correct": True} for text in "ab"]
    cases += [case | {"output": "a long way to 4\nand back", "extracted": None, "correct": False}]
    path.write_text("".join(json.dumps(line) + "\n" for line in cases) + '{"task": "sv')
    monkeypatch.setenv("COLUMNS", "10")
    assert command("--show", 1, "--tasks", "svamp", path) == (
        "=== m, svamp: 1 wrong ===\nWhy?\n\na long way\nto 4\nand back\n-> None\ngold: 3\n"
        "----------\n=== m, svamp: 2 right ===\nWhy?\n\na so 3\n-> 3\ngold: 3\n----------\n")
    assert path.read_text().endswith('{"task": "sv')  # showing changes nothing

def test_the_scaling_fit_is_least_squares_in_the_logarithm():
    sizes, accuracies = [80e6, 250e6, 780e6, 3e9, 11e9], [3.1, 6.0, 9.9, 20.2, 27.4]
    fit = statistics.linear_regression([math.log10(size) for size in sizes], accuracies)
    slope, intercept = ev.log_linear_fit(sizes, accuracies)
    assert (slope, intercept) == pytest.approx((fit.slope, fit.intercept))

def test_plots_are_drawn_or_say_what_is_missing(command, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}, "kl": 0.5}}\n{{"step": {step}, "validation": '
                           f'{{"gsm8k": [0.{step}, 0.02]}}}}\n' for step in (1, 2)))
    points = [(1e6, 0.1, 0.01), (1e7, 0.2, 0.01), (1e8, 0.3, 0.01)]
    with pytest.raises(UserError, match="two sizes"):
        ev.scaling_plot(tmp_path / "a.png", {"svamp": points[:1] * 2})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UserError, match="pip install matplotlib"):
            command("--plot", tmp_path / "a.png", log)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("pip install matplotlib")
    command("--plot", tmp_path / "a.png", log)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    ev.scaling_plot(tmp_path / "b.svg", {"svamp": points})
    assert (tmp_path / "b.svg").read_text().count("<path") > 10
    with pytest.raises(UserError, match="c.xyz"):
        ev.trade_off_plot(tmp_path / "c.xyz", log)

# --- damaged files ---

XML = "<x><Problem><Body>{}</Body><Question>How many?</Question>{}</Problem></x>"
LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")) + "]>" + XML
EXTERNAL = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + XML
NESTED = "[" * 200_000
SETS = [
    ("gsm8k/test.jsonl", "line", half), ("gsm8k/test.jsonl", "line 1", ""),
    ("gsm8k/test.jsonl", "utf-8", b'{"question": "\xff", "answer": "#### 1"}'),
    ("gsm8k/test.jsonl", "line 2: no key 'answer'",
     '{"question": "a", "answer": "#### 1"}\n{"question": "a"}'),
    ("gsm8k/test.jsonl", "line 1", '{"question": 5, "answer": "#### 1"}'),
    ("gsm8k/test.jsonl", "line 1: the answer is None", '{"question": "a", "answer": null}'),
    ("gsm8k/test.jsonl", "line 1: the answer ''", '{"question": "a", "answer": "so\\n####"}'),
    ("gsm8k/test.jsonl", "line 1", NESTED), ("multiarith/MultiArith.json", "problem 1", half),
    ("multiarith/MultiArith.json", "problem 1", '{"a": 1}'),
    ("multiarith/MultiArith.json", "1: no key 'sQuestion'", '[{"lSolutions": [1.0]}]'),
    ("multiarith/MultiArith.json", "problem 1", '[{"sQuestion": "a", "lSolutions": []}]'),
    ("multiarith/MultiArith.json", "problem 1", '[{"sQuestion": "a", "lSolutions": ["x"]}]'),
    ("asdiv/ASDiv.xml", "unclosed", half), ("asdiv/ASDiv.xml", "DOCTYPE", LAUGHS.format("&j;", "")),
    ("asdiv/ASDiv.xml", "DOCTYPE", EXTERNAL.format("&a;", "<Answer>1</Answer>")),
    ("asdiv/ASDiv.xml", "problem 1", XML.format("Two.", "")),
    ("asdiv/ASDiv.xml", "no problem", "<x></x>"), ("svamp/SVAMP.json", "no problem", "[]"),
    ("svamp/SVAMP.json", "2: no key 'Body'",
     '[{"Body": "a", "Question": "a", "Answer": 1}, {"Question": "a"}]'),
    ("svamp/SVAMP.json", "problem 1", '[{"Body": "a", "Question": "a", "Answer": NaN}]'),
    ("svamp/SVAMP.json", "problem 1", NESTED), ("svamp/SVAMP.json", "", half),
    ("bbh/bbh/opposites.json", "problem 1", half), ("bbh/bbh/opposites.json", "'examples'", "{}"),
    ("bbh/bbh/opposites.json", "1: no key 'target'", '{"examples": [{"input": "a"}]}'),
    ("bbh/bbh/opposites.json", "problem 1", '{"examples": [{"input": "a", "target": [1]}]}'),
    ("bbh/cot-prompts/opposites.txt", "no demonstrations", lambda text: text[:20]),
    ("bbh/cot-prompts/opposites.txt", "utf-8", lambda text: text + b"\xff"),
]

@pytest.mark.parametrize("name, fault, content", SETS)
def test_a_damaged_problem_set_is_refused(name, fault, content, tmp_path, refused):
    for folder in ("gsm8k", "multiarith", "asdiv", "svamp", "bbh"):
        shutil.copytree(TOY / folder, tmp_path / "sets" / folder)
    damage(tmp_path / "sets" / name, content)
    task = "opposites" if "bbh" in name else name.partition("/")[0]
    message = refused(ev, TOY / "student", "--tasks", task, "--data", tmp_path / "sets", "--limit",
                      1, "--max-new-tokens", 2, "--device", "cpu")
    assert f"sets/{name}" in message and fault in message

@pytest.mark.parametrize("option, fault, content", [
    ("--show", "No such file", None), ("--show", "no prediction", ""),
    ("--show", "not a file of predictions", "notes\nand more\n"),
    ("--show", "line 1: not a prediction", '{"step": 1}\n'),
    ("--show", "line 2: not a prediction",
     '{"task": "a", "prompt": "b", "output": "c"}\n{"task": "a", "prompt": "b", "output": 1}\n'),
    ("--plot", "No such file", None), ("--plot", "no validation yet", '{"step": 1}\n{"st'),
    ("--plot", "line 2: not an entry of a log", '{"step": 1}\n{"st\n'),
    ("--plot", "line 1: not an entry of a log", "[1]\n"), ("--plot", "line 1", NESTED + "\n")])
def test_a_damaged_file_of_results_is_refused(option, fault, content, tmp_path, refused):
    if content is not None:
        (tmp_path / "some.jsonl").write_text(content)
    value = "3" if option == "--show" else "picture.png"
    message = refused(ev, "some.jsonl", option, value)
    assert "some.jsonl" in message and fault in message

def test_a_file_without_predictions_is_never_written_to(tmp_path, refused):
    (tmp_path / "notes.txt").write_text("my notes")
    assert "notes.txt" in refused(ev, TOY / "student", "--tasks", "svamp", "--data", TOY, "--out",
                                  "notes.txt", "--device", "cpu")

def test_what_is_missing_or_unknown_says_what_to_choose(tmp_path, refused, monkeypatch):
    with pytest.raises(UserError, match="no task 'gsm9k'; choose from gsm8k, multiarith"):
        ev.load("gsm9k", "test", TOY)
    with pytest.raises(UserError, match="svamp has no 'train' part; choose from validation, test"):
        ev.load("svamp", "train", TOY)
    with pytest.raises(UserError, match="opposites has no 'validation' part"):
        ev.load("opposites", "validation", TOY)
    assert "no task 'gsm9k'" in refused(ev, TOY / "student", "--tasks", "gsm9k", "--data", TOY)
    assert "nowhere: no such folder" in refused(ev, TOY / "student", "./nowhere")
    monkeypatch.setattr(ev, "GITHUB", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    message = refused(ev, TOY / "student", "--data", tmp_path, "--tasks", "svamp", "--device", "cpu")
    assert f"or copy the file to {tmp_path / 'svamp' / 'SVAMP.json'}" in message
