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
from conftest import TOY, damage, half, random_text, reference
from eval import authors_match, exact_match, extract_choice, extract_number
from specialize import TensorBytes
from t5 import EOS, T5, T5Config, UserError, load_pretrained

SIZES = {"gsm8k": (500, 819), "multiarith": (200, 400), "asdiv": (500, 1805), "svamp": (500, 500)}

@pytest.fixture(scope="module")
def student():
    """The toy's model and tokenizer."""
    return load_pretrained(TOY / "tuned-1M")

# --- answers ---

def test_extraction_agrees_with_every_human_label_and_the_authors_rule_with_all_but_ten(datasets):
    text = (datasets / "gsm8k" / "labelled_solutions_6b.jsonl").read_text()
    lines = list(map(json.loads, text.splitlines()))
    assert len(lines) == 2638
    wrong = []
    for line in lines:
        solution, gold = line["solution"], line["ground_truth"]
        assert exact_match(solution, extract_number(gold)) == line["is_correct"], line
        if authors_match(solution, gold, True, True) != line["is_correct"]:
            wrong.append(solution[-20:] + gold[-20:])
    assert len(wrong) == 10 and all(re.search(r"-|,\d", answers) for answers in wrong)

def test_scores_of_published_bbh_outputs_are_the_published_figures(datasets):
    figures = list(datasets.glob("bbh/code-davinci-002-outputs/*/*_eval_metrics.jsonl"))
    assert len(figures) == 54  # 27 tasks, chain of thought and answer-only
    for path in figures:
        published = json.loads(path.read_text())["accuracy"]
        path = path.with_name(path.name.replace("_eval_metrics.jsonl", ".json"))
        outputs = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        right = [exact_match(output["prediction"], output["target"]) for output in outputs]
        assert 100 * np.mean(right) == pytest.approx(published)

@pytest.mark.parametrize("text, number", [
    ("48 + 24 = 72 clips.\nThe answer is 72.", 72), ("The answer is $1,234.50", 1234.5),
    ("is -5", -5), ("−3", -3), ("-$5", -5), ("$-5", -5), ("(-7)", -7), ("x=-4", -4), ("2 -3", 3),
    ("48 - 24", 24), ("48-24", 24), ("5-10 minutes", 10), ("is 1/2.", 0.5), ("1/2.5", 2.5),
    ("50%", 50), (".5", 0.5), ("109,200,000", 109200000), ("3.", 3), ("A 1/0", 0), ("none", None),
    ("Question: Is 5?\n72", 72), ("5 Q: 6", 5)])
def test_the_final_number_is_read_as_people_write_it(text, number):
    assert extract_number(text) == number

@pytest.mark.parametrize("texts, number", [
    ([r"\boxed{9{,}500}", r"9{\,}500", r"9\,500", r"9,\!500.", r"$9{,}500.00$"], 9500),
    ([r"\frac{3}{4}", r"\boxed{\dfrac{3}{4}}", r"\tfrac34", "3 / 4", "1/2 and 3/4"], 0.75),
    ([r"-\frac{3}{4}", r"\frac{-3}{4}", r"is - \frac34", "-3 / 4"], -0.75),
    (["2 1/2", r"2\frac{1}{2}.", r"2 \frac12", r"2\,\dfrac{1}{2}", r"$2\frac{1}{2}$"], 2.5),
    (["-2 1/2", r"$-2\frac12$"], -2.5), ([r"\frac{12}{x}", "12 / day", "24/2 = 12"], 12),
    (["18 m^2", "18 cm^3", "18 m2", "18km2.", "18 ft2", "18 m²", r"18\text{ m}^{2}"], 18),
    (["1.5e3", "1.5E+3", "1.5 x 10^3", r"1.5 \times 10^{3}"], 1500),
    (["2e-3", "2 × 10^-3"], 0.002), (["10^2 = 100", "1e2"], 100),
    (["–5", "—5", "‑5", "－5", "−$5", "- 5", "– 5", "is: - 5", "= -5", "(- 5)", r"\boxed{- 5}",
      r"-\$5", r"$-\$5$", "-£5", "-5 (x - 10 = -5)"], -5),
    (["10 – 5 = 5", "10–5", "3–5 days", "$3–$5", "1 -5", "x-5", "\n- 5 cats", "only — 5"], 5),
    (["72\n\nQ: Is 5?", "72\nQuestion 2: 5", "72 Q: 5", "72\n\n**Question:** 5",
      "72\n\n### Problem: 5", "as follows.\n\nQuestion: Is 5?\nIt is 72"], 72)])
def test_other_spellings_of_a_number_mean_the_same(texts, number):
    for text in texts:
        assert extract_number(f"The answer is {text}") == number, text

def test_cases_of_public_bug_reports(real):
    for name, read in (("answers", extract_number), ("gold", ev.parse_gold_answer)):
        for case in map(json.loads, (real / "cases" / f"{name}.jsonl").read_text().splitlines()):
            assert read(case.get("text") or case["written"]) == case["number"], case

@pytest.mark.parametrize("written, answer", [
    ("18.", 18), ("$1,000.", 1000), ("−3", -3), ("3/4", 0.75), (r"\frac{3}{4}", 0.75),
    ("2 1/2", 2.5), ("1.5e3", 1500), ("3 - 1", "3 - 1"), ("5:45", "5:45"), ("18 m2", "18 m2")])
def test_a_gold_answer_is_a_number_if_nothing_else_is_written(written, answer):
    assert ev.parse_gold_answer(written) == answer

@pytest.mark.parametrize("text, answer", [
    ("Let's see. So the answer is (B).", "(B)"), ("(C)", "(C)"), (" yes ", "yes"), ("", ""),
    ("the answer is x. So the answer is ] ) >.", "] ) >"), ("So the answer is -219.", "-219"),
    ("So the answer is (A) or (B).", "(A) or (B)"), ("valid.", "valid."), ("is B", "is B"),
    ("The answer is Monsters, Inc..", "Monsters, Inc."), ("answer is a.\n\nQ: b?", "a.\n\nQ: b?")])
def test_the_final_choice_follows_the_answer_is(text, answer):
    assert extract_choice(text) == answer

def test_the_authors_rule_ignores_signs_and_commas_and_accepts_containment():
    def match(gold, *outputs, is_math=False, cot=True):
        return [authors_match(output, gold, is_math, cot) for output in outputs]

    assert match("-5", "so 5", "so -5", "five", is_math=True) == [True, True, False]
    assert match("1,080", "80", "1,080", "1080", is_math=True) == [True, True, False]
    assert match("(C)", "the answer is (B) or (C).", "(C), so the answer is (B)") == [True, False]
    assert match("(C)", "the answer is (B), so the answer is (C)") == [False]
    assert match("no", "the answer is not.") == match("(C)", "(B) (C)", cot=False) == [True]

def test_every_gold_answer_is_right_by_both_rules_however_it_is_written(datasets):
    for task in ev.BBH_TASKS:
        for problem in ev.load(task, "test", datasets):
            gold, output = problem.answer, f"The answer is no. So the answer is {problem.answer}."
            assert exact_match(output, gold) and exact_match(gold, gold)
            assert authors_match(output, gold, False, True)
    for problem in ev.load("gsm8k", "all", datasets) + ev.load("asdiv", "all", datasets):
        if isinstance(problem.answer, float) and problem.answer.is_integer():
            n = abs(int(problem.answer))
            for text in (f"{n:,}", f"${n:,}.", f"{n}%", f"{n}.00 units", f"{n}/1", f"(-{n})"):
                value = -n if "-" in text else n
                assert extract_number(f"1 + 2 = 3, so the answer is {text}") == value, text

def test_extraction_takes_any_text():
    rng = random.Random(5)
    texts = [random_text(rng) for _ in range(3000)] + ["9" * 5000, "1/" + "9" * 5000, "," * 50_000]
    texts += ["1" * 400 + "/" + "2" * 400, "1,111" * 20_000, "answer is " * 20_000, "(A" * 20_000]
    texts += [part * 20_000 for part in ("* \n", "- ", "1 ", "1 / ", "1e", r"\frac{1", "1{,}")]
    texts += ["((((" * 30 + "=", "-" * 50_000, "1 + " * 20_000 + "=", "٣/٤", "−５", "½ =", "1e999"]
    for text in texts:
        assert isinstance(extract_number(text), (float, type(None)))
        assert isinstance(ev.parse_gold_answer(text), (float, str))
        assert {exact_match(text, 5.0), authors_match(text, "5", True, True)} <= {True, False}

# --- problems and prompts ---

def test_every_set_has_its_checksum_and_its_publishers_count_and_gold_answers(datasets):
    for name, (repository, _, sha256) in ev.SOURCES.items():
        assert hashlib.sha256((datasets / name).read_bytes()).hexdigest() == sha256
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/[0-9a-f]{40}", repository)  # pinned
    for task, (validation, test) in SIZES.items():
        parts = {part: ev.load(task, part, datasets) for part in ("validation", "test", "all")}
        assert [len(part) for part in parts.values()] == [validation, test, validation + test]
        for part in ("validation", "test"):
            assert {problem.split for problem in parts[part]} == {part}
        both = map(repr, parts["validation"] + parts["test"])
        assert sorted(both) == sorted(map(repr, parts["all"]))
    train = ev.load("gsm8k", "train", datasets)
    assert len(train) == 7473
    lines = (datasets / "gsm8k" / "train.jsonl").read_text().splitlines()
    for problem, line in zip(train, lines):
        assert problem.written == re.search(r'#### (\S+)"}', line)[1]
        assert problem.answer == float(problem.written.replace(",", ""))
        assert "<<" not in problem.solution and "####" not in problem.solution
    svamp = json.loads((datasets / "svamp" / "SVAMP.json").read_text())
    for problem, row in zip(ev.load("svamp", "all", datasets), svamp):
        if row["ID"] != "chal-680":  # the publisher's slip: its equation has another value
            assert problem.answer == pytest.approx(eval(row["Equation"]), abs=0.01)
    multiarith = json.loads((datasets / "multiarith" / "MultiArith.json").read_text())
    for problem, row in zip(ev.load("multiarith", "all", datasets), multiarith):
        assert problem.answer == pytest.approx(eval(row["lEquations"][0].removeprefix("X=")))
    asdiv = ev.load("asdiv", "all", datasets)
    texts = [problem.answer for problem in asdiv if isinstance(problem.answer, str)]
    assert len(texts) == 212 and {"Yes", "5:45", "11; 12; 13"} <= set(texts)
    for problem, node in zip(asdiv, ElementTree.parse(datasets / "asdiv/ASDiv.xml").iter("Answer")):
        plain = re.fullmatch(r"(-?[\d.]+)\s*(\([^;]*\))?", node.text.strip())
        assert not plain or problem.answer == float(plain[1])
        assert problem.written == node.text.strip()  # the authors' rule takes the last digits
        last = re.findall(r"\d*\.?\d+", node.text)[-1:] or ["nothing"]
        prediction = ev.score(problem, "asdiv", "p", f"so {last[0]}", True)
        assert prediction["correct_by_authors"] == (last != ["nothing"])
    fractions = [p for p in asdiv if "/" in p.written and isinstance(p.answer, float)]
    assert {p.written: p.answer for p in fractions}["-(1/3)"] == pytest.approx(-1 / 3)
    assert len(fractions) == 9

def test_bbh_has_27_tasks_with_three_demonstrations_each(datasets):
    assert ev.bbh_tasks(datasets) == ev.BBH_TASKS and len(ev.BBH_TASKS) == 27
    assert sum(len(ev.load(task, "test", datasets)) for task in ev.BBH_TASKS) == 6511
    for task in ev.BBH_TASKS:
        cot, answer_only = (ev.bbh_prompt(task, "new", cot, datasets) for cot in (True, False))
        assert cot.endswith("Q: new\nA: Let's think step by step.") and "canary" not in cot
        assert answer_only.endswith("Q: new\nA:") and "step by step" not in answer_only
        solutions = re.findall(r"A: Let's think.*?(?=\n\nQ: )", cot, re.DOTALL)
        answers = re.findall(r"^A: (.*)$", answer_only, re.MULTILINE)
        assert len(answers) == 3
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

def test_demonstrations_are_drawn_or_come_from_a_file(student, tmp_path, refused, capsys):
    path = tmp_path / "four.jsonl"
    path.write_text('{"question": "How many?", "answer": "1 + 2 = <<1+2=3>>3\\n#### 3"}\n')
    for source, problems in ((path, [ev.Problem("How many?", 3.0, "1 + 2 = 3", "3")]), (0, []),
                             (4, random.Random(0).sample(ev.load("gsm8k", "train", TOY), 4))):
        demonstrations = ev.load_demonstrations(source, TOY)
        assert demonstrations == problems
        for task in ("svamp", "opposites"):
            e = ev.evaluate_task(*student, task, True, "test", TOY, 1, demonstrations,
                                 max_new_tokens=2)
            prompt = ev.math_prompt(e.predictions[0]["question"], True, problems)
            assert (e.predictions[0]["prompt"] == prompt) == (task == "svamp")
    assert capsys.readouterr().out == ""
    path.write_text('{"question": "How many?"}\n')
    assert "four.jsonl, line 1: no key 'answer'" in refused(
        ev, TOY / "tuned-1M", "--data", TOY, "--demonstrations", path)

def test_a_set_of_ones_own_takes_a_parser_and_an_entry(tmp_path, monkeypatch, command):
    def parse(line):
        question, answer = line.split("\t")
        return ev.Problem(question, float(answer))

    mine = ev.Dataset("Mine", "mine.jsonl", parse, validation=4, validate=True, select=True)
    monkeypatch.setitem(ev.DATASETS, "mine", mine)
    (tmp_path / "mine.jsonl").write_text("".join(f"How many are {i}?\t{i}\n" for i in range(6)))
    assert [problem.answer for problem in ev.load("mine", "all", tmp_path)] == list(range(6))
    assert len(ev.load("mine", "validation", tmp_path)) == 3  # at most half
    arguments = ["--tasks", "mine", "--data", tmp_path, "--device", "cpu", "--max-new-tokens", 2]
    assert re.search(r"^Mine: .* of 3 problems", command(ev, TOY / "tuned-1M", *arguments), re.M)
    (tmp_path / "mine.jsonl").write_text("How many are 5?\t5\nHow many?\n")
    with pytest.raises(UserError, match="mine.jsonl, line 2: not enough values"):
        ev.load("mine", "test", tmp_path)

@pytest.mark.parametrize("folder, arguments, name", [
    ("sets", ("gsm8k",), "GSM8K"), (TOY, ("gsm8k",), "toy-GSM8K"),
    ("sets", ("gsm8k", True, 4), "GSM8K, 4 shots"),
    ("sets", ("gsm8k", False), "GSM8K, answer-only"),
    (TOY, ("svamp", False, 4), "toy-SVAMP, 4 shots, answer-only"),
    ("sets", ("bbh", True, 4), "BBH CoT"), (TOY, ("bbh", False), "generic answer-only"),
    ("sets", ("navigate", True, 4), "navigate"),
    ("sets", ("navigate", False), "navigate, answer-only")])
def test_a_row_is_named_by_set_and_prompt(folder, arguments, name):
    task, *prompt = arguments
    assert ev.display_name(task, folder, *prompt) == name

# --- accuracy ---

def test_accuracy_is_the_share_of_right_answers_in_the_order_of_the_problems(student):
    model, tokenizer = student
    problems = ev.load("svamp", "test", TOY)[:7]
    prompts = [ev.math_prompt(problem.question, cot=True) for problem in problems]
    ids = [torch.tensor([tokenizer.encode(prompt)]) for prompt in prompts]
    outputs = [tokenizer.decode(model.generate(each, max_new_tokens=20)[0]) for each in ids]
    problems[0].answer, problems[3].answer = map(extract_choice, (outputs[0], outputs[3]))
    right = [exact_match(output, p.answer) for output, p in zip(outputs, problems)]
    for size in (1, 3, 7):  # batching changes no output
        e = ev.evaluate(model, tokenizer, problems, batch_size=size, max_new_tokens=20)
        found = [(p["output"], p["prompt"], p["correct"]) for p in e.predictions]
        assert found == list(zip(outputs, prompts, right)) and right[0] and right[3]
        assert e.accuracy == sum(right) / 7
        assert e.stderr == pytest.approx((e.accuracy * (1 - e.accuracy) / 7) ** 0.5)
    (prediction,) = ev.evaluate(*student, problems[:1], max_new_tokens=2, cot=False).predictions
    assert prediction["prompt"] == ev.math_prompt(problems[0].question, False)
    with pytest.raises(UserError, match="no problem"):
        ev.evaluate(*student, [])

class LengthTokenizer:
    """A tokenizer that turns "7 3" into seven tokens, which depend on the 3."""
    def encode(self, text):
        length, seed = map(int, text.split())
        return [3 + (seed + i) % 97 for i in range(length - 1)] + [EOS]

    def decode(self, ids):
        return " ".join(map(str, ids))

@pytest.mark.parametrize("cap, S, rows, shape", [
    (1, 1020, 4, dict(num_heads=64, d_kv=4)),  # the encoder's attention bias
    (2, 50, 700, dict(num_heads=8, d_kv=256, num_layers=4)),  # keys and values
    (4, 20, 15000, dict(num_heads=2, d_kv=4))])  # logits
def test_an_evaluation_takes_the_memory_that_there_is_and_no_more(monkeypatch, cap, S, rows, shape):
    torch.manual_seed(0)
    model = T5(T5Config(**{"d_model": 16, "d_ff": 16, "num_layers": 1} | shape)).eval()
    prompts = [f"{S - i % 2} {i}" for i in range(rows)]
    problems, weights = [ev.Problem(text, 1.0) for text in prompts], model.shared.weight.nbytes

    def outputs():
        e = ev.evaluate(model, LengthTokenizer(), problems, prompts, 10**6, max_new_tokens=2)
        return [prediction["output"] for prediction in e.predictions]

    monkeypatch.setattr(ev, "free_memory", lambda device: int(0.85 * (cap * 1e9 - weights)))
    with TensorBytes() as tensors:
        found = outputs()
    assert 0.8 * cap < (tensors.peak + weights) / 1e9 <= cap
    monkeypatch.setattr(ev, "free_memory", lambda device: 0)  # one row at a time
    problems, prompts = problems[:3], prompts[:3]
    assert outputs() == found[:3]

def test_a_paired_difference_has_the_standard_error_that_resampling_gives():
    rng = np.random.default_rng(0)
    old = rng.random(400) < 0.4
    new = np.where(rng.random(400) < 0.8, old, rng.random(400) < 0.6)  # mostly the same problems
    before, after = ([{"task": "svamp", "correct": x} for x in y.tolist()] for y in (old, new))
    e = ev.summarize(after, "correct", before)
    assert e.accuracy == pytest.approx(new.mean() - old.mean())
    draws = rng.integers(0, 400, (4000, 400))
    assert e.stderr == pytest.approx((new[draws].mean(1) - old[draws].mean(1)).std(), rel=0.05)
    assert e.stderr < 0.7 * math.hypot(ev.summarize(after).stderr, ev.summarize(before).stderr)

# --- predictions, tables, plots ---

def test_an_interrupted_evaluation_continues_and_only_appends(student, tmp_path, monkeypatch):
    path, problems = tmp_path / "predictions.jsonl", ev.load("svamp", "test", TOY)[:12]
    written, generated, generate = [], [], T5.generate

    def counted(self, input_ids, **options):
        written.append(path.exists() and path.read_bytes().count(b"\n"))
        generated.append(len(input_ids))
        return generate(self, input_ids, **options)

    def evaluate(model="student", task="svamp", **settings):
        generated.clear()
        file = ev.PredictionFile(path, model, **settings)
        return ev.evaluate(*student, problems, max_new_tokens=8, batch_size=4, task=task, file=file)

    monkeypatch.setattr(T5, "generate", counted)
    e = evaluate(weights="a")
    assert written == [0, 4, 8]  # a kill leaves the batches before it
    lines = path.read_bytes().splitlines(keepends=True)
    for left, lost in ((lines, 0), ([*lines[:11], lines[11][:-1]], 0), ([lines[0][:7]], 12),
                       ([*lines[:5], lines[5][:7]], 7), ([*lines[:3], b"\0\xff\n", *lines[4:]], 1)):
        path.write_bytes(b"".join(left))
        assert evaluate(weights="a") == e and sum(generated) == lost
        assert path.read_bytes().startswith(b"".join(left))
        assert evaluate(weights="a") == e and not generated
    for changed in ({"weights": "b"}, {"model": "another"}, {"task": "asdiv"}):
        evaluate(**{"weights": "a"} | changed)
        assert sum(generated) == 12

def test_the_command_compares_models_by_both_rules_and_generates_nothing_twice(command, tmp_path):
    for name, source in (("raw", "raw-1M"), ("student", "tuned-1M")):
        shutil.copytree(TOY / source, tmp_path / name)
    arguments = ["raw", "student", "--tasks", "svamp, opposites", "--data", TOY, "--limit", 4,
                 "--out", "out.jsonl", "--max-new-tokens", 8, "--device", "cpu", "--answer-only",
                 "--shots", 4]
    log, legend, *tables = command(ev, *arguments).split("\n\n")
    lines = ["1  raw", "toy-SVAMP, 4 shots, answer-only: ", "toy-opposites, answer-only: ",
             "2  student", "toy-SVAMP, 4 shots, answer-only: ", "toy-opposites, answer-only: "]
    for line, start in zip(log.splitlines(), lines, strict=True):
        assert line.startswith(start) and (line == start or " % of 4 problems, " in line)
    assert legend == "1  raw\n2  student"
    headers = [["accuracy, %", "1", "2"], ["difference, %", "2 - 1"],
               ["authors' rule, %", "1", "2"]]
    for text, header in zip(tables, headers, strict=True):
        first, *rows = [re.split("  +", line) for line in text.splitlines()]
        assert first == header
        names = ["toy-SVAMP, 4 shots, answer-only", "toy-opposites, answer-only"]
        assert [row[0] for row in rows] == names
        assert all(len(row) == len(header) and "±" in row[-1] for row in rows)
    lines = ev.read_predictions(tmp_path / "out.jsonl")
    assert [line["model"] for line in lines] == ["raw"] * 8 + ["student"] * 8
    assert lines[0]["prompt"].count("A: The answer is") == 4
    assert {(p["task"], p["split"]) for p in lines} == {("svamp", "test"), ("opposites", "test")}
    assert command(ev, *arguments).split("\n\n")[1:] == [legend, *tables]
    assert ev.read_predictions(tmp_path / "out.jsonl") == lines
    model = T5.from_pretrained(TOY / "tuned-1M")
    model.shared.weight.data = model.shared.weight * 2
    model.save_pretrained(tmp_path / "student")  # the same name, other weights
    command(ev, *arguments)
    assert len(ev.read_predictions(tmp_path / "out.jsonl")) == 24

def test_the_table_scores_the_same_outputs_by_both_rules():
    cases = [(-5.0, "so 5"), (1234.0, "so 1,234"), (7.0, "so 7"), (8.0, "so -8")]
    e = ev.summarize([ev.score(ev.Problem("a", answer), "svamp", "p", output, True)
                      for answer, output in cases])
    _, exact, by_authors = ev.compare(["student"], [("SVAMP", [e])]).split("\n\n")
    assert exact.splitlines()[1].split()[:2] == ["SVAMP", "50.0"]
    assert by_authors.splitlines()[1].split()[:2] == ["SVAMP", "75.0"]

def test_tables_of_three_models_and_all_bbh_tasks_fit_80_columns():
    right, wrong = (ev.summarize([{"task": "a", "correct": x, "correct_by_authors": x}])
                    for x in (True, False))
    models = ["google/flan-t5-base", "runs/base/model", "runs/large/model"]
    text = ev.compare(models, [(task, [right, wrong, right]) for task in ev.BBH_TASKS])
    assert max(map(len, text.splitlines())) <= 80 and "-100.0" in text
    assert text.startswith("1  google/flan-t5-base\n2  runs/base/model\n3  runs/large/model\n\n")

def test_a_runs_folder_stands_for_its_model(command, refused, tmp_path):
    run = tmp_path / "run"
    for step in (5, 20):
        (run / f"checkpoint-{step}").mkdir(parents=True)
    (run / "arguments.json").write_text("{}")
    message = refused(ev, run, "--data", TOY)
    assert f"{run}: not finished; its checkpoints are {run / 'checkpoint-20'}, " in message
    shutil.copytree(TOY / "tuned-1M", run / "model")
    arguments = ["--data", TOY, "--tasks", "svamp", "--limit", 1, "--max-new-tokens", 2]
    assert f"1  {run / 'model'}\n" in command(ev, run, *arguments)

def test_right_and_wrong_cases_are_shown_one_after_the_other(command, tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    case = {"task": "svamp", "prompt": "Q: Why? A:", "question": "Why?", "answer": 3.0}
    case |= {"model": "m", "correct": False}  # by an old rule; it is scored again
    cases = [case | {"output": f"{text} so 3"} for text in "ab"]
    cases += [case | {"output": "a long way to 4\nand back", "split": "validation"}]
    cases += [case | {"output": "好好 1\x1b\u202e", "split": "test"}, case | {"task": "other"}]
    cases[-1]["output"] = ""
    path.write_text("".join(json.dumps(line) + "\n" for line in cases) + '{"task": "sv')
    monkeypatch.setenv("COLUMNS", "10")
    right = "=== m,\nsvamp: 2\nright ===\n{}\nWhy?\n\na so 3\n-> 3.0\ngold: 3.0\n----------\n"
    wrong = "=== m,\nsvamp: 1\nwrong ===\n{}\nWhy?\n\n"
    for split, shown in (("validation", "a long way\nto 4\nand back\n-> 4.0\n"),
                         ("test", "好好 1\\\nx1b\\u\n202e\n-> 1.0\n")):  # 好 takes two columns
        printed = command(ev, "--show", 1, "--tasks", "svamp", "--split", split, path)
        assert printed == right + wrong + shown + "gold: 3.0\n----------\n"
    assert path.read_text().endswith('{"task": "sv')  # showing changes nothing
    run = command(ev, "--show", 1, "--tasks", "svamp", "--split", "test", tmp_path)
    assert run == printed  # a run's folder stands for its predictions

def test_plots_show_a_least_squares_fit_or_say_what_is_missing(
        command, refused, tmp_path, monkeypatch):
    sizes, accuracies = [80e6, 250e6, 780e6, 3e9, 11e9], [3.1, 6.0, 9.9, 20.2, 27.4]
    fit = statistics.linear_regression([math.log10(size) for size in sizes], accuracies)
    slope, error, intercept = ev.log_linear_fit(sizes, accuracies)
    assert (slope, intercept) == pytest.approx((fit.slope, fit.intercept))
    _, covariance = np.polyfit(np.log10(sizes), accuracies, 1, cov=True)
    assert error == pytest.approx(covariance[0, 0] ** 0.5)
    assert math.isnan(ev.log_linear_fit(sizes[:2], accuracies[:2])[1])
    points = {"svamp": [(size, x, 1.0) for size, x in zip(sizes, accuracies)]}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setattr(ev, "find_model", None)  # nothing is computed or downloaded before
        assert "pip install matplotlib" in refused(ev, "google/flan-t5-base", "--plot", "a.png")
    reference("matplotlib")
    ev.scaling_plot(tmp_path / "a.svg", points)
    assert (tmp_path / "a.svg").read_text().count("<path") > 10
    (tmp_path / "log.jsonl").write_text('{"step": 1, "kl": 0.5}\n' + "".join(
        f'{{"step": {n}, "validation": {{"gsm8k": [0.{n}, 0.02]}}, '
        f'"bbh": {{"CoT": [0.1, 0.01]}}}}\n' for n in (1, 2)))
    command(ev, "--plot", "b.png", "log.jsonl")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="c.xyz"):
        ev.trade_off_plot("c.xyz", ["log.jsonl"])
    for files in (["log.jsonl", TOY / "tuned-1M"], [tmp_path, "log.jsonl"]):
        message = refused(ev, *files, "--plot", "d.png")
        assert "log.jsonl: not a model; give --plot either models or log.jsonl files" in message

def test_a_scaling_plot_takes_sizes_from_the_configs_and_names_from_the_table(
        command, refused, monkeypatch):
    reference("matplotlib")
    with monkeypatch.context() as patch:
        patch.setattr(ev, "load_pretrained", None)  # the sizes are compared before any evaluation
        message = refused(ev, TOY / "raw-1M", TOY / "tuned-1M", "--plot", "a.png")
        for name in ("a.xyz", "none/a.png"):
            assert "not a name for a plot" in refused(ev, TOY / "raw-1M", "--plot", name)
        assert "models of at least two sizes" in message
    plots = []
    monkeypatch.setattr(ev, "scaling_plot", lambda path, points: plots.append(points))
    models = [TOY / "tuned-0.1M", TOY / "tuned-0.04M"]
    command(ev, *models, "--plot", "a.png", "--data", TOY, "--tasks", "svamp,bbh", "--limit", 2,
            "--max-new-tokens", 2, "--shots", 4, "--device", "cpu")
    (points,) = plots
    assert list(points) == ["toy-SVAMP, 4 shots", "generic CoT"]
    sizes = [sum(p.numel() for p in T5.from_pretrained(model).parameters()) for model in models]
    assert all([size for size, *_ in values] == sizes for values in points.values())

def test_curves_that_end_close_together_have_labels_that_do_not_overlap(tmp_path, monkeypatch):
    figure = reference("matplotlib.figure").Figure
    saved = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **options: saved.append(self))
    names = "toy-GSM8K", "toy-ASDiv", "generic CoT", "generic answer-only"
    points = {name: [(1e6, 50 * i, 1), (1e7, 97 + i, 1)] for i, name in enumerate(names)}
    ev.curves_plot("a.png", points, mark=1e7)
    ev.scaling_plot("b.png", points)
    for plot in saved:
        plot.canvas.draw()
        labels = {text.get_text().split("\n")[0]: text for text in plot.axes[0].texts}
        boxes = [labels[name].get_window_extent() for name in names]
        assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))
        colors = {line.get_color() for line in plot.axes[0].lines}
        assert {labels[name].get_color() for name in names} <= colors

def test_the_help_names_every_default(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        ev.main()
    options = capsys.readouterr().out.partition("--help")[2].split("\n  --")[1:]
    assert len(options) == 14 and all("default" in option for option in options)

# --- damaged files ---

LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")) + "]><x>&j;</x>"
NESTED = "[" * 200_000
GSM8K, MULTIARITH, ASDIV = "gsm8k/test.jsonl", "multiarith/MultiArith.json", "asdiv/ASDiv.xml"
SVAMP, BBH, PROMPT = "svamp/SVAMP.json", "bbh/bbh/opposites.json", "bbh/cot-prompts/opposites.txt"

@pytest.mark.parametrize("name, fault, content", [
    (GSM8K, "line", half), (GSM8K, "line 1", ""), (GSM8K, "line 1", NESTED),
    (GSM8K, "utf-8", b'{"question": "\xff", "answer": "#### 1"}'),
    (GSM8K, "2: no key 'answer'", '{"question": "a", "answer": "#### 1"}\n{"question": "a"}'),
    (GSM8K, "line 1: the question is", '{"question": 5, "answer": "#### 1"}'),
    (GSM8K, "line 1: the answer is None", '{"question": "a", "answer": null}'),
    (GSM8K, "line 1: the answer ''", '{"question": "a", "answer": "so\\n####"}'),
    (MULTIARITH, "problem 1", half), (MULTIARITH, "problem 1", '{"a": 1}'),
    (MULTIARITH, "problem 1", '[{"sQuestion": "a", "lSolutions": []}]'),
    (ASDIV, "problem 1", half), (ASDIV, "DOCTYPE", LAUGHS), (ASDIV, "no problem", "<x></x>"),
    (ASDIV, "problem 1", "<x><Problem><Body>Two.</Body></Problem></x>"),
    (SVAMP, "no problem", "[]"), (SVAMP, "problem 1", NESTED),
    (SVAMP, "no key 'Body'", '[{"Body": "a", "Question": "a", "Answer": 1}, {"Question": "a"}]'),
    (SVAMP, "problem 1", '[{"Body": "a", "Question": "a", "Answer": NaN}]'),
    (BBH, "no key 'examples'", "{}"), (BBH, "1: no key 'target'", '[{"input": "a"}]'),
    (BBH, "problem 1", '{"examples": [{"input": "a", "target": [1]}]}'),
    (PROMPT, "no demonstrations", lambda text: text[:20]),
    (PROMPT, "utf-8", lambda text: text + b"\xff")])
def test_a_damaged_problem_set_is_refused(name, fault, content, tmp_path, refused):
    for folder in ("gsm8k", "multiarith", "asdiv", "svamp", "bbh"):
        shutil.copytree(TOY / folder, tmp_path / "sets" / folder)
    damage(tmp_path / "sets" / name, content)
    task = "opposites" if "bbh" in name else name.partition("/")[0]
    message = refused(ev, TOY / "tuned-1M", "--tasks", task, "--data", tmp_path / "sets", "--limit",
                      1, "--max-new-tokens", 2, "--device", "cpu")
    assert f"sets/{name}" in message and fault in message

@pytest.mark.parametrize("option, fault, content", [
    ("--show", "No such file; give --show a run", None), ("--show", "no prediction", ""),
    ("--show", "line 1: not a prediction", "notes\nand more\n"),
    ("--show", "line 1: not a prediction", '{"step": 1}\n'),
    ("--plot", "No such file", None), ("--plot", "no validation yet", '{"step": 1}\n{"st'),
    ("--plot", "line 2: not an entry of a log", '{"step": 1}\n{"st\n'),
    ("--plot", "line 1: not an entry of a log", "[1]\n"), ("--plot", "line 1", NESTED + "\n"),
    ("--plot", "line 1: not an entry of a log", '{"step": 1, "validation": {"svamp": 0.5}}\n'),
    ("--out", "line 1: not a prediction", "my notes")])
def test_a_damaged_file_of_results_is_refused(option, fault, content, tmp_path, refused):
    if content is not None:
        (tmp_path / "some.jsonl").write_text(content)
    arguments = {"--show": ["some.jsonl", "--show", 3], "--plot": ["some.jsonl", "--plot", "a.png"],
                 "--out": [TOY / "tuned-1M", "--data", TOY, "--out", "some.jsonl"]}[option]
    message = refused(ev, *arguments)
    assert "some.jsonl" in message and fault in message

def test_a_model_has_no_predictions_to_show(refused):
    message = refused(ev, TOY / "tuned-1M", "--show", 3)
    assert f"{TOY / 'tuned-1M' / 'predictions.jsonl'}: No such file; give --show a run" in message

def test_what_is_missing_or_unknown_says_what_to_choose(tmp_path, refused, monkeypatch):
    for task, part, message in (("svamp", "train", "svamp has no 'train' part; choose from valid"),
                                ("opposites", "validation", "opposites has no 'validation' part"),
                                ("gsm9k", "test", "no task 'gsm9k'; choose from gsm8k, multi")):
        with pytest.raises(UserError, match=message):
            ev.load(task, part, TOY)
    assert "no task 'gsm9k'" in refused(ev, TOY / "tuned-1M", "--tasks", "gsm9k", "--data", TOY)
    assert "nowhere: no such folder" in refused(ev, TOY / "tuned-1M", "./nowhere")
    monkeypatch.setattr(ev, "GITHUB", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    message = refused(ev, TOY / "tuned-1M", "--data", tmp_path, "--tasks", "svamp")
    assert f"or copy the file to {tmp_path / 'svamp' / 'SVAMP.json'}" in message
