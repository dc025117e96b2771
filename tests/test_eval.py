"""eval.py against OpenAI's human labels, BBH's published outputs and prompts, the publishers' own
files, and transformers' outputs."""

import hashlib
import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import eval as ev
from conftest import TOY, reference
from eval import Task, authors_match, exact_match, extract_choice, extract_number
from t5 import T5, is_out_of_memory, load_pretrained, pad_sequences

SIZES = {"gsm8k": (500, 819), "multiarith": (200, 400), "asdiv": (500, 1805), "svamp": (500, 500)}
PUBLISHED = json.loads((TOY.parent / "sources.json").read_text(encoding="utf-8"))

@pytest.fixture(scope="module")
def student():
    """The toy's model and tokenizer."""
    return load_pretrained(TOY / "tuned-1M")

def read_lines(path):
    """Return the objects in a JSONL file."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))

# --- answers ---

def test_answers_are_right_or_wrong_as_people_labelled_them(datasets):
    wrong = []
    lines = read_lines(datasets / "gsm8k" / "labelled_solutions_6b.jsonl")
    for line in lines:
        solution, gold = line["solution"], line["ground_truth"]
        assert exact_match(solution, extract_number(gold)) == line["is_correct"], line
        if authors_match(solution, gold, True, True) != line["is_correct"]:
            wrong.append(solution[-20:] + gold[-20:])
    # The authors' rule reads neither signs nor thousands separators.
    assert len(wrong) == 10 and all(re.search(r"-|,\d", answers) for answers in wrong)
    assert len(lines) == 2638

def published_outputs(datasets, kind):
    """Yield (task, its published outputs) for the 27 files of "cot" or "direct"."""
    for path in datasets.glob(f"bbh/code-davinci-002-outputs/*-{kind}/*.json"):
        task = path.name.partition("_few_shot")[0]
        yield task, json.loads(path.read_text(encoding="utf-8"))["outputs"]

def test_scores_of_published_bbh_outputs_are_the_published_figures(datasets):
    figures = 0
    for kind in ("cot", "direct"):
        for task, outputs in published_outputs(datasets, kind):
            (path,) = datasets.glob(f"bbh/*/*-{kind}/{task}_few*_eval_metrics.jsonl")
            right = [exact_match(output["prediction"], output["target"]) for output in outputs]
            published = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
            assert 100 * np.mean(right) == pytest.approx(published), (kind, task)
            figures += 1
    assert figures == 54

def test_cases_of_public_bug_reports(real):
    for case in read_lines(real / "cases" / "gold.jsonl"):
        assert ev.parse_gold_answer(case["written"]) == case["number"], case
    for case in read_lines(real / "cases" / "answers.jsonl"):
        assert extract_number(case["text"]) == case["number"], case

@pytest.mark.parametrize("number, texts", [
    (72, ["48 + 24 = 72 clips.\nThe answer is 72.", "Question: Is 5?\n72", "72 Q: 5", "72%",
          "72\n\n**Question:** 5", "72\n\n### Problem: 5", "as follows.\n\nQuestion: 5?\nIt is 72",
          "72\n\n### Input:\n5", "72\n\nExample 3: 5", "72<|endoftext|>5", "72\n\nHuman: 5",
          "48 + 24.\n\n### Answer: 72", "as follows.\nStep 1: 48\nStep 2: 72"]),
    (9500, [r"\boxed{9{,}500}", r"9{\,}500", r"9\,500", r"9,\!500.", r"$9{,}500.00$", "$9,500"]),
    (0.75, [r"\boxed{\dfrac{3}{4}}", r"\tfrac34", "3 / 4", "1/2 and 3/4", ".75"]),
    (-0.75, [r"-\frac{3}{4}", r"\frac{-3}{4}", r"is - \frac34", "-3 / 4"]),
    (2.5, ["2 1/2", r"2\frac{1}{2}.", r"2 \frac12", r"2\,\dfrac{1}{2}", "1/2.5"]),
    (-2.5, ["-2 1/2", r"$-2\frac12$"]), (12, [r"\frac{12}{x}", "12 / day", "24/2 = 12"]),
    (18, ["18 m^2", "18 cm^3", "18 m2", "18km2.", "18 ft2", "18 m²", r"18\text{ m}^{2}"]),
    (1500, ["1.5e3", "1.5E+3", "1.5 x 10^3", r"1.5 \times 10^{3}"]), (0.002, ["2 × 10^-3"]),
    (-5, ["is -5", "–5", "—5", "‑5", "－5", "−$5", "$-5", "-$5", "- 5", "is: - 5", "= -5", "(- 5)",
          r"\boxed{- 5}", r"-\$5", "-£5", "x=-5", "(-5)", "-5 (x - 10 = -5)"]),
    (5, ["10 – 5 = 5", "10–5", "10-5", "3–5 days", "$3–$5", "1 -5", "x-5", "\n- 5 cats", "is — 5"]),
    (None, ["", "none"])])
def test_numbers_are_read_as_people_write_them(number, texts):
    for text in texts:
        assert extract_number(f"So the answer is {text}") == number, text

@pytest.mark.parametrize("written, answer", [
    ("18.", 18), ("$1,000.", 1000), ("−3", -3), (r"\frac{3}{4}", 0.75), ("2 1/2", 2.5),
    ("-(1/3)", -1 / 3), ("(B)", "(B)"), ("Yes", "Yes"), ("3 - 1", "3 - 1"), ("5:45", "5:45"),
    ("18 m2", "18 m2")])
def test_a_gold_answer_is_a_number_if_nothing_else_is_written(written, answer):
    assert ev.parse_gold_answer(written) == answer

@pytest.mark.parametrize("text, answer", [
    ("Let's see. So the answer is (B).", "(B)"), ("(C)", "(C)"), (" yes ", "yes"), ("", ""),
    ("the answer is x. So the answer is ] ) >.", "] ) >"), ("So the answer is -219.", "-219"),
    ("So the answer is (A) or (B).", "(A) or (B)"), ("valid.", "valid."), ("is B", "is B"),
    ("The answer is Monsters, Inc..", "Monsters, Inc.")])
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

# --- problems and prompts ---

@pytest.mark.parametrize("task", SIZES)
def test_parts_have_the_papers_sizes_and_are_drawn_with_one_seed(task, datasets):
    problems = ev.load(task, "all", datasets)
    validation, test = (ev.load(task, part, datasets) for part in ("validation", "test"))
    assert (len(validation), len(test)) == SIZES[task] and len(problems) == sum(SIZES[task])
    order = list(range(len(problems)))
    random.Random(0).shuffle(order)  # the two parts are disjoint, and those of every run
    assert validation + test == [problems[i] for i in order]

def test_files_have_the_checksums_in_sources_json(datasets):
    for name, (repository, _, sha256) in PUBLISHED["files"].items():
        assert hashlib.sha256((datasets / name).read_bytes()).hexdigest() == sha256
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/[0-9a-f]{40}", repository)  # pinned

def test_gold_answers_are_the_publishers(datasets):
    train = ev.load("gsm8k", "train", datasets)
    assert len(train) == 7473
    for problem, line in zip(train, read_lines(datasets / "gsm8k" / "train.jsonl")):
        assert problem.answer == float(line["answer"].split("#### ")[1].replace(",", ""))
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

# The publishers' answer-only prompts of three tasks and one question differ from their own files.
DIFFERENT_PROMPTS = {"date_understanding", "snarks", "tracking_shuffled_objects_three_objects"}

@pytest.mark.parametrize("kind", ["cot", "direct"])
def test_bbh_prompts_are_the_published_ones(kind, datasets):
    count = same = 0
    for task, outputs in published_outputs(datasets, kind):
        problems = ev.load(task, "test", datasets)
        for problem, output in zip(problems, outputs, strict=True):
            prompt = ev.bbh_prompt(task, problem.question, kind == "cot", datasets)
            same += prompt == output["input"]
            assert prompt == output["input"] or task in DIFFERENT_PROMPTS
            count += 1
    assert count == 6511 and same == count - (1 if kind == "cot" else 678)

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

def test_demonstrations_are_drawn_or_come_from_a_file(tmp_path):
    path = tmp_path / "four.jsonl"
    path.write_text('{"question": "How many?", "answer": "1 + 2 = <<1+2=3>>3\\n#### 3"}\n')
    (mine,) = ev.load_demonstrations(path, TOY)
    assert (mine.question, mine.answer, mine.solution) == ("How many?", 3.0, "1 + 2 = 3")
    drawn = ev.load_demonstrations(4, TOY)
    assert drawn == random.Random(0).sample(ev.load("gsm8k", "train", TOY), 4)
    for name, demonstrations in (("svamp", (mine,)), ("svamp", tuple(drawn)), ("opposites", ())):
        for *_, prompt in Task(name, TOY, limit=2, demonstrations=demonstrations).problems():
            shown = [f"Q: {shot.question}\nLet's" in prompt for shot in (mine, *drawn)]
            assert shown == [shot in demonstrations for shot in (mine, *drawn)]

def test_a_set_of_ones_own_takes_a_parser_and_an_entry(tmp_path, monkeypatch, command):
    def parse(line):
        question, answer = line.split("\t")
        return ev.Problem(question, float(answer))

    mine = ev.Dataset("Mine", "mine.jsonl", parse, validation=4, select=True)
    monkeypatch.setitem(ev.DATASETS, "mine", mine)
    assert len(ev.load("svamp", "all", TOY)) == 600  # TOY has no mine.jsonl
    (tmp_path / "mine.jsonl").write_text("".join(f"How many are {i}?\t{i}\n" for i in range(6)))
    assert [problem.answer for problem in ev.load("mine", "all", tmp_path)] == list(range(6))
    assert len(ev.load("mine", "validation", tmp_path)) == 3  # at most half
    printed = command(ev, TOY / "tuned-1M", "--tasks", "mine", "--data", tmp_path, "--device",
                      "cpu", "--max-new-tokens", 2)
    assert re.search(r"^Mine: .* of 3 problems", printed, re.M)

@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "svamp/SVAMP.json", "asdiv/ASDiv.xml"])
def test_files_may_have_a_byte_order_mark_blank_lines_and_windows_line_ends(name, tmp_path):
    task, text = name.partition("/")[0], (TOY / name).read_text(encoding="utf-8")
    (tmp_path / name).parent.mkdir()
    lines = "\r\n".join(text.split("\n")) + ("\r\n\r\n" if name.endswith("xml") else " \r\n\r\n")
    if name.endswith("jsonl"):
        lines = lines.replace("\r\n", "\r\n\r\n", 3)
    (tmp_path / name).write_bytes(lines.encode("utf-8-sig"))
    assert ev.load(task, "all", tmp_path) == ev.load(task, "all", TOY)

GSM8K, MULTIARITH, ASDIV = "gsm8k/test.jsonl", "multiarith/MultiArith.json", "asdiv/ASDiv.xml"

@pytest.mark.parametrize("name, entry, content", [
    (GSM8K, 2, '{"question": "a", "answer": "#### 1"}\n{"question": "a"}\n'),
    (GSM8K, 2, '{"question": "a", "answer": "#### 1"}\n{"question": "a", "ans'),
    (MULTIARITH, 1, '[{"sQuestion": "a", "lSolutions": []}]'),
    (ASDIV, 1, "<x><Problem><Body>Two.</Body></Problem></x>"),
    (ASDIV, None, "<x><Problem><Body>Two"), (MULTIARITH, None, "[]"), (GSM8K, None, "")])
def test_a_wrong_entry_is_named(name, entry, content, tmp_path, refused):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(content)
    message = refused(ev, TOY / "tuned-1M", "--tasks", name.partition("/")[0], "--data", tmp_path)
    assert name in message
    assert entry is None or re.search(rf"(entry|line|problem) {entry}\b", message)

def test_unknown_tasks_and_missing_files_are_refused(refused):
    message = refused(ev, TOY / "tuned-1M", "--data", TOY, "--tasks", "gsm9k")
    assert "gsm9k" in message and "multiarith" in message
    message = refused(ev, TOY / "tuned-1M", "--data", TOY, "--demonstrations", "my_four.jsonl")
    assert "my_four.jsonl" in message

# --- accuracy ---

def test_outputs_and_accuracy_are_those_of_transformers(student, transformers):
    model, tokenizer = student
    other = transformers.T5ForConditionalGeneration.from_pretrained(TOY / "tuned-1M").float().eval()
    task = Task("svamp", TOY, limit=40)
    _, problems, prompts = zip(*task.problems())
    ids = pad_sequences(list(map(tokenizer.encode, prompts)))
    generated = other.generate(ids, attention_mask=ids != 0, max_new_tokens=30, do_sample=False)
    outputs = list(map(tokenizer.decode, generated))
    right = [exact_match(output, p.answer) for output, p in zip(outputs, problems)]
    assert 0 < sum(right) < 40
    for batch_size in (1, 7, 64):
        e = ev.evaluate(model, tokenizer, task, batch_size=batch_size, max_new_tokens=30)
        assert [p["output"] for p in e.predictions] == outputs
        assert [p["correct"] for p in e.predictions] == right
        assert e.accuracy == np.mean(right)
        assert e.stderr == pytest.approx(np.std(right) / 40**0.5)

@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2.00 GiB", "MPS backend out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Invalid buffer size: 14.00 GiB", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_batch(message, student):
    assert is_out_of_memory(RuntimeError(message)) and not is_out_of_memory(RuntimeError("shape"))
    task, generate, sizes, room = Task("svamp", TOY, limit=12), T5.generate, [], 3

    def small(self, input_ids, *args, **options):
        if len(input_ids) > room:
            raise RuntimeError(message)
        sizes.append(len(input_ids))
        return generate(self, input_ids, *args, **options)

    expected = ev.evaluate(*student, task, max_new_tokens=8)
    assert ev.evaluate(*student, task, max_new_tokens=8, decode=small) == expected
    assert sum(sizes) == 12 and max(sizes) == 3
    room = 0
    with pytest.raises(RuntimeError):  # a single problem does not fit
        ev.evaluate(*student, task, max_new_tokens=8, decode=small)

def test_standard_errors_are_those_of_numpy():
    rng = np.random.default_rng(0)
    old = rng.random(400) < 0.4
    new = np.where(rng.random(400) < 0.8, old, rng.random(400) < 0.6)  # mostly the same problems
    difference = new.astype(float) - old

    def predictions(scores, tasks):
        return [{"task": task, "correct": x} for task, x in zip(tasks, scores.tolist())]

    e = ev.summarize(predictions(new, ["svamp"] * 400))
    assert (e.accuracy, e.stderr) == pytest.approx((new.mean(), new.std() / 20))
    before, after = (predictions(x, ["svamp"] * 400) for x in (old, new))
    e = ev.summarize(after, "correct", before)
    assert (e.accuracy, e.stderr) == pytest.approx((difference.mean(), difference.std() / 20))
    # Tasks weigh the same, however many problems they have.
    e = ev.summarize(predictions(new, ["navigate"] * 100 + ["snarks"] * 300))
    one, two = new[:100], new[100:]
    assert e.accuracy == pytest.approx((one.mean() + two.mean()) / 2)
    assert e.stderr == pytest.approx((one.var() / 100 + two.var() / 300) ** 0.5 / 2)

def test_the_table_scores_the_same_outputs_by_both_rules():
    cases = [(-5.0, "so 5"), (1234.0, "so 1,234"), (7.0, "so 7"), (8.0, "so -8")]
    e = ev.summarize([ev.score("svamp", ev.Problem("a", answer), "p", output, True)
                      for answer, output in cases])
    _, exact, by_authors = ev.compare(["student"], [("SVAMP", [e])]).split("\n\n")
    assert exact.splitlines()[1].split()[:2] == ["SVAMP", "50.0"]
    assert by_authors.splitlines()[1].split()[:2] == ["SVAMP", "75.0"]

# --- the command ---

@pytest.fixture
def generated(monkeypatch):
    """The sizes of the batches that the test generates."""
    sizes, start = [], T5.start_decoding

    def counted(self, input_ids, max_new_tokens):
        sizes.append(len(input_ids))
        return start(self, input_ids, max_new_tokens)

    monkeypatch.setattr(T5, "start_decoding", counted)
    return sizes

def test_a_killed_evaluation_continues(command, generated, tmp_path):
    arguments = ["student", "--data", TOY, "--tasks", "svamp,opposites", "--limit", 6,
                 "--max-new-tokens", 8, "--device", "cpu", "--out", "out.jsonl"]
    shutil.copytree(TOY / "tuned-1M", tmp_path / "student")
    expected, path = command(ev, *arguments), tmp_path / "out.jsonl"
    assert sum(generated) == 12
    lines = path.read_bytes().splitlines(keepends=True)
    # Nothing is cut, nothing but the last line's end, a line in the middle, or the first line.
    for left, lost in ((lines, 0), ([*lines[:11], lines[11][:-1]], 1),
                       ([*lines[:5], lines[5][:40]], 7), ([lines[0][:7]], 12)):
        path.write_bytes(b"".join(left))
        generated.clear()
        assert command(ev, *arguments) == expected and sum(generated) in (lost, max(lost - 1, 0))
        generated.clear()
        assert command(ev, *arguments) == expected and not generated
        assert "=== student, svamp: " in command(ev, "--show", 1, path)
    model = T5.from_pretrained(TOY / "tuned-1M")
    model.shared.weight.data = model.shared.weight * 2
    model.save_pretrained(tmp_path / "student")  # the same name, other weights
    command(ev, *arguments)
    assert sum(generated) == 12
    generated.clear()
    command(ev, *arguments, "--max-new-tokens", 4)  # the same weights, another setting
    assert sum(generated) == 12

def test_the_command_compares_models(command, student, tmp_path):
    names, arguments = ["raw-1M", "tuned-1M"], ["--limit", 20, "--max-new-tokens", 20]
    printed = command(ev, *[TOY / name for name in names], "--data", TOY, "--tasks",
                      "svamp, word_sorting", *arguments, "--device", "cpu", "--answer-only")
    for name in ("svamp", "word_sorting"):
        task = Task(name, TOY, cot=False, limit=20)
        first, second = (ev.evaluate(*load_pretrained(TOY / each), task, max_new_tokens=20)
                         for each in names)
        difference = ev.summarize(second.predictions, "correct", first.predictions)
        rows = [re.split("  +", line)[1:] for line in printed.splitlines() if str(task) in line]
        assert [str(first), str(second)] in rows and [str(difference)] in rows

def test_sampled_answers_are_put_to_the_vote(command):
    printed = command(ev, TOY / "tuned-1M", "--data", TOY, "--tasks", "gsm8k", "--limit", 8,
                      "--samples", 3, "--temperature", 0.7, "--max-new-tokens", 50,
                      "--device", "cpu")
    assert re.search(r"^toy-GSM8K.* of 8 problems", printed, re.M)
    assert re.search(r"^toy-GSM8K.*  \d+\.\d ± \d+\.\d$", printed, re.M)

def test_a_terminal_that_lacks_a_sign_gets_another(run, tmp_path):
    done = run("eval.py", TOY / "tuned-0.04M", "--data", TOY, "--tasks", "svamp", "--limit", 2,
               "--max-new-tokens", 2, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "toy-SVAMP" in done.stdout, done.stderr

# --- plots ---

def test_plots_are_written(command, tmp_path):
    reference("matplotlib")
    command(ev, TOY / "tuned-0.1M", TOY / "tuned-0.04M", "--plot", "scaling.png", "--data", TOY,
            "--tasks", "svamp,bbh", "--limit", 2, "--max-new-tokens", 2, "--device", "cpu")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(
        '{"step": 0, "accuracy": {"SVAMP": [0.5, 0.02]}}\n{"step": 1, "loss": {}}\n')
    command(ev, "run", "--plot", "curves.png")
    for name in ("scaling.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
