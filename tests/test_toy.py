"""data/toy: the teacher's distributions against a count over its grammar, the files in git against
the script that makes them, and the arithmetic of findings.py on known answers."""

import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, TOY

sys.path.insert(0, str(TOY))

import findings
import grammar
import make
import stories
from eval import DATASETS, load
from t5 import T5, Tokenizer


def paths(story, encoding, state=("open", ()), p=1.0, tokens=()):
    """Yield (probability, tokens) of every solution that the grammar allows."""
    if state is None:
        yield p, tokens
        return
    for q, text, following in grammar.alternatives(story, state):
        yield from paths(story, encoding, following, p * q, tokens + tuple(encoding.encode(text)))


def test_the_teachers_next_token_distribution_is_the_grammars():
    story = stories.Story("Tom has 5 books. He gets 12.", "How many?", (5, 12), ((5, "+", 12),),
                          (17,), "books")
    rng = random.Random(0)
    encoding = grammar.train_bpe((grammar.walk(rng, story) for _ in range(50)), 20)
    solutions = list(paths(story, encoding))
    assert math.isclose(sum(p for p, _ in solutions), 1)
    tokens, steps = grammar.Teacher(story, encoding).sample(random.Random(1), temperature=0.5)
    for i, step in enumerate(steps):
        following = [(p, path[i]) for p, path in solutions if path[:i] == tokens[:i]]
        total = sum(p for p, _ in following)
        for token in {token for _, token in following}:
            expected = sum(p for p, t in following if t == token) / total
            assert math.isclose(step[token], expected, rel_tol=1e-9)
        assert math.isclose(sum(step.values()), 1)


def test_no_problem_of_a_test_part_occurs_in_training():
    training = {problem.question for problem in load("gsm8k", "train", TOY)}
    held_out = [problem.question for task in DATASETS for part in ("validation", "test")
                for problem in load(task, part, TOY)]
    assert len(held_out) == len(set(held_out)) == 4 * make.TEST and not training & set(held_out)
    templates = [{text for text, _ in kind}
                 for kind in (stories.GSM8K + stories.READING + stories.CHAINS,
                              stories.MULTIARITH, stories.ASDIV, stories.SVAMP)]
    assert len(set.union(*templates)) == sum(map(len, templates))


@pytest.mark.parametrize("options", [{}, {"chains_in_context": 1.0}])
def test_pretraining_leaves_out_the_test_problems(options):
    sets, generic = make.make_problems()
    held_out = {example[0] for _, examples in generic.values() for example in examples}
    held_out |= {s.question for problems in sets.values() for s in problems}
    rng = random.Random(3)
    for _ in range(1000):
        texts = ["".join(make.instruction(rng, generic, held_out, **options))]
        texts += [] if options else ["".join(make.plain_text(rng, generic, held_out))]
        for text in texts:
            question = re.split(r" Sum:| Which sum|\nA:|\nLet's", text.rpartition("Q: ")[2])[0]
            assert question and question not in held_out


def test_the_script_makes_the_problem_sets_in_git(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    sets, generic = make.make_problems()
    make.write_math(sets)
    make.write_generic(generic)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 5 + 2 * len(generic)
    assert all((tmp_path / name).read_bytes() == (TOY / name).read_bytes() for name in made)


def test_the_world_is_small_and_has_five_sizes_of_each_start():
    tracked = subprocess.run(["git", "ls-files", "-z", TOY], cwd=ROOT, capture_output=True,
                             text=True)
    if tracked.returncode == 0:
        names = tracked.stdout.split("\0")[:-1]
        assert sum((ROOT / name).stat().st_size for name in names) < 16e6
    assert len(make.WIDTHS) == 5
    for start in ("raw", "tuned"):
        for size in make.WIDTHS:
            model = T5.from_pretrained(TOY / f"{start}-{size}")
            parameters = sum(p.numel() for p in model.parameters())
            assert parameters == pytest.approx(float(size[:-1]) * 1e6, rel=0.12)
            pieces = Tokenizer(TOY / f"{start}-{size}").split("Tom has 17 books.")
            assert pieces == ["▁Tom", "▁has", "▁17", "▁books", "."]


def test_the_correlation_of_finding_6_is_free_of_the_problems_noise():
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(50):  # 40 checkpoints; accuracies correlate by 0.6, the noise is twice as large
        inside = rng.normal(size=40)
        outside = 3 * (0.6 * inside + 0.8 * rng.normal(size=40))
        noise = 2 * rng.normal(size=(4, 40)) * [[1], [1], [3], [3]]
        runs.append(50 + np.array([inside, inside, outside, outside]) + noise)
    assert findings.correlation(runs) == pytest.approx((0.6, 1, 3), rel=0.2)


def test_findings_average_over_sets_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "FOLDER", tmp_path)
    write = lambda name, seed, text: (tmp_path / f"{name}-{seed}.json").write_text(text)
    sets = '{"validation": {"multiarith": [%d], "asdiv": [0, 100], "svamp": [100]}}'
    write("start-tuned-1M", 0, '{"tuned-1M": %s}' % sets % 0)
    for seed in (0, 2):  # a seed that has not run yet is left out
        write("main", seed, '{"50": %s}' % sets % (50 * seed))
    near = pytest.approx
    assert findings.curve("main", "validation", "OOD") == [(0, near(50), 0),
                                                           (50, near(200 / 3), near(50 / 3))]


def test_the_readmes_python_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
