"""data/toy: the teacher's distributions against a count over its grammar, the files in git against
the script that makes them, and the arithmetic of findings.py on logs with known answers."""

import gzip
import json
import math
import random
import re
import subprocess
import sys

import pytest

from conftest import ROOT, TOY

sys.path.insert(0, str(TOY))

import findings
import grammar
import make
import stories
from eval import DATASETS, bbh_tasks, load
from t5 import T5, Tokenizer


def paths(story, encoding, state=("open", ()), p=1.0, tokens=()):
    """Yield (probability, tokens) of every solution that the grammar allows."""
    if state is None:
        yield p, tokens
        return
    for q, text, following in grammar.alternatives(story, state):
        yield from paths(story, encoding, following, p * q, tokens + tuple(encoding.encode(text)))


@pytest.fixture(scope="module")
def teacher():
    """The grammar over a small problem with one step, as a language model."""
    story = stories.Story("Tom has 5 books. He gets 12.", "How many?", (5, 12), ((5, "+", 12),),
                          (17,), "books")
    rng = random.Random(0)
    solutions = (grammar.walk(rng, story) for _ in range(50))
    return grammar.Teacher(story, grammar.train_bpe(solutions, 20))


def test_the_teachers_next_token_distribution_is_the_grammars(teacher):
    solutions = list(paths(teacher.story, teacher.encoding))
    assert math.isclose(sum(p for p, _ in solutions), 1)
    tokens, steps = teacher.sample(random.Random(1), temperature=1.25)
    for i, step in enumerate(steps):
        following = [(p, path[i]) for p, path in solutions if path[:i] == tokens[:i]]
        total = sum(p for p, _ in following)
        for token in {token for _, token in following}:
            expected = sum(p for p, t in following if t == token) / total
            assert math.isclose(step[token], expected, rel_tol=1e-9)
        assert math.isclose(sum(step.values()), 1)


def test_a_record_spells_its_solution_and_reports_at_most_five_tokens_per_step():
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    questions = {record["question"] for record in records}
    assert len(records) == make.SAMPLES * len(questions) == make.SAMPLES * make.TRAIN
    for record in records[::97]:
        assert "".join(record["tokens"]) == record["solution"]
        assert all(1 <= len(step) <= 5 for step in record["top_logprobs"])
        assert all(sum(map(math.exp, step.values())) < 1.001 for step in record["top_logprobs"])


def test_no_problem_of_a_test_part_occurs_in_training():
    training = {problem.question for problem in load("gsm8k", "train", TOY)}
    held_out = [problem.question for task in DATASETS for part in ("validation", "test")
                for problem in load(task, part, TOY)]
    assert len(held_out) == len(set(held_out)) == 4 * make.TEST and not training & set(held_out)
    assert all(len(load(task, "test", TOY)) >= 300 for task in DATASETS)
    assert len(bbh_tasks(TOY)) >= 5
    kinds = stories.GSM8K + stories.READING, stories.MULTIARITH, stories.ASDIV, stories.SVAMP
    templates = [set(text for text, _ in kind) for kind in kinds]
    assert len(set.union(*templates)) == sum(map(len, templates))


def test_the_instruction_mixture_leaves_out_the_test_problems():
    sets, generic = make.make_problems()
    held_out = {example[0] for _, examples in generic.values() for example in examples}
    held_out |= {s.question for name in sets for s in sets[name]}
    rng = random.Random(3)
    for kind in make.MIXTURE:
        for question, _ in make.instruction_batch(rng, generic, held_out, kind):
            asked = question.rpartition("Q: ")[2].partition("\nA:")[0]
            assert asked.removesuffix(" Which sum is it?") not in held_out


def test_the_script_makes_the_problem_sets_in_git(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    sets, generic = make.make_problems()
    make.write_math(sets)
    make.write_generic(generic)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 5 + 2 * len(generic)
    assert all((tmp_path / name).read_bytes() == (TOY / name).read_bytes() for name in made)


def test_the_world_is_small_and_the_students_have_a_million_parameters():
    tracked = subprocess.run(["git", "ls-files", "-z", TOY], cwd=ROOT, capture_output=True,
                             text=True)
    if tracked.returncode == 0:
        names = tracked.stdout.split("\0")[:-1]
        assert sum((ROOT / name).stat().st_size for name in names) < 6e6
    for name in ("student", "raw"):
        model, tokenizer = T5.from_pretrained(TOY / name), Tokenizer(TOY / name)
        assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
        assert tokenizer.split("Tom has 17 books.") == ["▁Tom", "▁has", "▁17", "▁books", "."]


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Logs of all experiments. At step s of seed i every accuracy is (s + 10 i) %, but SVAMP's is
    35 points lower at step 20, and generic CoT is constant."""
    monkeypatch.setattr(findings, "FOLDER", tmp_path)
    for name in findings.EXPERIMENTS:
        for seed in findings.SEEDS:
            entries = []
            for step in (0, 10, 20):
                part = {column: [(step + 10 * seed) / 100, 0.01]
                        for column in [*DATASETS, "CoT", "answer-only"]}
                part["svamp"][0] -= 0.35 if step == 20 else 0
                part["CoT"][0] = 0.5
                parts = dict.fromkeys(("validation", "test", "four shots", "generic"), part)
                entries.append({"step": step} | parts)
            loss = [{"step": step, "kl": 1 / step, "nll": 2 / step} for step in (10, 20)]
            run = tmp_path / f"{name}-{seed}"
            run.mkdir()
            (run / "start.json").write_text(json.dumps(entries[0]))
            log = loss[0], entries[1], loss[1], entries[2]
            (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
            (run / "done").touch()


def test_findings_average_over_seeds_and_select_by_the_stated_set(logs, capsys):
    near = pytest.approx
    expected = [(step, near(step + 10), near(10 / 3**0.5)) for step in (0, 10, 20)]
    assert findings.curve("mixed", "test gsm8k") == expected
    assert findings.losses("mixed", "kl") == [(10, near(0.1), 0), (20, near(0.05), 0)]
    assert {entry["step"] for entry in findings.chosen("mixed", "validation gsm8k")} == {20}
    assert {entry["step"] for entry in findings.chosen("mixed", "validation svamp")} == {10}
    assert {entry["step"] for entry in findings.chosen("mixed", "validation ood")} == {10}
    assert {entry["step"] for entry in findings.chosen("mixed", "generic CoT")} == {20}  # a tie
    findings.finding_6()
    assert capsys.readouterr().out.split() == (
        "Finding 6: the selection of the checkpoint test toy-GSM8K test out-of-distribution mean "
        "selected in distribution 30.0 ± 5.8 18.3 ± 5.8 "
        "selected out of distribution 20.0 ± 5.8 20.0 ± 5.8"
    ).split()


def test_findings_draw_every_plot(logs, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["findings.py"])
    findings.main()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    numbers = "1", "1_first_steps", "3", "4", "4_loss", "5", "6"
    assert drawn == {f"finding_{number}.png" for number in numbers}
    assert capsys.readouterr().out.count("Finding") == 6


def test_the_readmes_python_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
