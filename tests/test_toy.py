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

import torch

from conftest import ROOT, TOY, reference

sys.path.insert(0, str(TOY))

import findings
import grammar
import make
import stories
from eval import DATASETS, bbh_tasks, display_name, load
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
    tokens, steps = teacher.sample(random.Random(1), temperature=0.5)
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
    kinds = stories.GSM8K + stories.READING + stories.CHAINS, stories.MULTIARITH, stories.ASDIV, stories.SVAMP
    templates = [set(text for text, _ in kind) for kind in kinds]
    assert len(set.union(*templates)) == sum(map(len, templates))


@pytest.mark.parametrize("draw", [make.plain_text, make.instruction])
def test_pretraining_leaves_out_the_test_problems(draw):
    sets, generic = make.make_problems()
    held_out = {example[0] for _, examples in generic.values() for example in examples}
    held_out |= {s.question for stories in sets.values() for s in stories}
    rng = random.Random(3)
    for _ in range(1000):
        text = "".join(draw(rng, generic, held_out)).rpartition("Q: ")[2]
        question = re.split(r" Sum:| Which sum|\nA:|\nLet's", text)[0]
        assert question and question not in held_out


def test_the_script_makes_the_problem_sets_in_git(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    sets, generic = make.make_problems()
    make.write_math(sets)
    make.write_generic(generic)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 5 + 2 * len(generic)
    assert all((tmp_path / name).read_bytes() == (TOY / name).read_bytes() for name in made)


def test_the_world_is_small_and_has_four_sizes_of_each_start():
    tracked = subprocess.run(["git", "ls-files", "-z", TOY], cwd=ROOT, capture_output=True,
                             text=True)
    if tracked.returncode == 0:
        names = tracked.stdout.split("\0")[:-1]
        assert sum((ROOT / name).stat().st_size for name in names) < 16e6
    for start in ("raw", "tuned"):
        sizes = []
        for size in make.WIDTHS:
            model = T5.from_pretrained(TOY / f"{start}-{size}")
            tokenizer = Tokenizer(TOY / f"{start}-{size}")
            sizes.append(sum(p.numel() for p in model.parameters()))
            assert sizes[-1] == pytest.approx(float(size[:-1]) * 1e6, rel=0.12)
            assert tokenizer.split("Tom has 17 books.") == ["▁Tom", "▁has", "▁17", "▁books", "."]
        assert sizes[-1] > 16 * sizes[0]


def test_an_interrupted_pretraining_continues_to_the_same_weights(tmp_path, monkeypatch):
    tokenizer, weights = Tokenizer(TOY / "spiece.model"), []
    monkeypatch.setattr(make, "BATCH", 2)
    for steps in ([48], [24, 48]):  # at once; stopped at step 24, 8 steps after the last state
        part = tmp_path / f"{len(steps)}.part"
        for count in steps:
            torch.manual_seed(0)
            model = make.new_model(tokenizer, 16)
            monkeypatch.setattr(make, "SAVE_EVERY", 16)
            make.train(model, tokenizer, lambda rng: ("2 + 3", f"{rng.randint(1, 9)}"), 48, part,
                       stop=count)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of all experiments. At step s of seed i every accuracy is (s + 10 i) %, but SVAMP's is
    35 points lower at step 20; in the test every base has (10 + i) %, every specialized 50 %."""
    monkeypatch.setattr(findings, "FOLDER", tmp_path)
    columns = [display_name(task, TOY) for task in DATASETS]
    columns += [f"{column}, 4 shots" for column in columns]
    for name in findings.EXPERIMENTS:
        for seed in findings.SEEDS:
            run = tmp_path / f"{name}-{seed}"
            run.mkdir()
            lines = []
            for step in (0, 10, 20):
                value = [(step + 10 * seed) / 100, 0.01]
                lines.append({"step": step, "validation": dict.fromkeys(DATASETS, value),
                              "bbh": {"CoT": value, "answer-only": value}})
            lines[2]["validation"] = lines[2]["validation"] | {
                "svamp": [(20 + 10 * seed - 35) / 100, 0.01]}
            lines.insert(1, {"step": 5, "loss": {"zero_shot_cot": 0.5}})
            (run / "held_out.json").write_text("[[10, 0.5], [20, 0.25]]")
            (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            test = {"base": dict.fromkeys(columns, [(10 + seed) / 100, 0.01, 300]),
                    "specialized": dict.fromkeys(columns, [0.5, 0.01, 300])}
            (run / "results.json").write_text(json.dumps({"selected": lines[-1], "test": test}))
            for step in (10, 20):
                (run / f"tested-{step}.json").write_text(json.dumps([step, step / 2]))


def test_findings_average_over_seeds_and_select_by_the_stated_set(runs, tmp_path):
    near = pytest.approx
    error = 10 / 3**0.5
    assert findings.curve("tuned-1M", "gsm8k") == [
        (step, near(step + 10), near(error)) for step in (0, 10, 20)]
    assert findings.curve("tuned-1M", "OOD")[2] == (20, near(30 - 35 / 3), near(error))
    assert findings.tested("raw-long", "base", "OOD") == near([10, 11, 12])
    reference("matplotlib")
    sentences = [finding() for finding in findings.FINDINGS]
    assert "OOD mean goes 10.0 ± 5.8, 20.0 ± 5.8, 18.3 ± 5.8;" in sentences[0]
    assert re.search(r"rises by -?0.0 ± 0.0 points before", sentences[1])
    assert "raw start ends at 50.0 ± 0.0 and gains 39.0 ± 0.6" in sentences[2]
    assert "With likelihood the KL on held-out solutions is 0.25 at step 20" in sentences[3]
    assert "passes 30% never and ends at 50.0 ± 0.0" in sentences[3]
    # By GSM8K the last checkpoint is the best, by the out-of-distribution mean the one before.
    assert "changes the out-of-distribution test mean by -5.0 ± 0.0" in sentences[5]
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"finding_{n}.png" for n in range(1, 7)}


def test_the_readmes_python_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
