"""data/calculator.py against the calculator marks of GSM8K's authors, and in front of a model."""

import re

import pytest
import torch

import eval as ev
from conftest import TOY
from data.calculator import calculator, computed
from t5 import Tokenizer, load_pretrained


@pytest.mark.parametrize(
    "text, value",
    [
        ("48 / 2 =", "24"), ("so 48/2=", "24"), ("She has $5 * 3 =", "$15"), ("0.1 + 0.2 =", "0.3"), ("10/3 =", "3.3333"),
        ("1,200 * 3 =", "3600"), ("(3 + 4) * -5 =", "-35"), ("3 x 4 =", "12"), ("3x4 =", "12"), ("is 72. 72 - 2 =", "70"),
        ("in 2019, 24 + 3 =", "27"), ("5 - 10 =", "-5"), ("3 - 3 =", "0"), ("x = 5 =", None), ("3 apples + 4 =", None),
        ("20% * 5 =", None), ("1/0 =", None), ("2**3 =", None), ("9//2 =", None), ("1e5 + 1 =", None), ("7 =", None),
        ("=", None), ("((((1 + 2 =", None), ("__import__('os') + 1 =", None), ("()" * 400 + "=", None), ("1+" * 60 + "1 =", None),
        ("2 (3 + 4) =", None), ("(1 + 2)(3 + 4) =", None), ("1 / 100000 =", None), ("0 - 1 / 100000 =", None),
        ("In 2019 24 + 3 =", None), ("14 * 1 1/2 =", None), ("2 1/2 + 3 =", None), ("n*4 + 3 =", None), ("12cm*(3/4) =", None),
        ("2x - 3 =", None), ("$350 000 x 12/100 =", None), ("3^2 + 1 =", None), ("3:30 + 45 =", None), ("$2000x 10/100 =", None),
        ("half of (50 + 3) =", None), ("(1/2) 278 + 11 =", None),
    ],
)  # fmt: skip
def test_the_calculator_computes_arithmetic_and_nothing_else(text, value):
    assert computed(text) == value


def test_the_calculator_agrees_with_every_mark_of_gsm8ks_authors(real):
    """The marks <<48/2=24>> hold an expression and its value; an expression in one pair of brackets is one, too."""
    texts = (real / "datasets" / "gsm8k" / "train.jsonl").read_text()
    marks = [(e, v) for e, v in re.findall(r"<<([^=<>]*)=([^=<>]*)>>", texts) if re.search(r"\d\s*[+*/-]", e)]
    known = [(e, v, computed(e + "=")) for e, v in marks]
    found = [(e, float(v), float(c)) for e, v, c in known if c and re.fullmatch(r"-?[\d.]+", v)]
    assert len(found) > 0.98 * len(marks) > 20000
    assert sum(abs(value - ours) < 0.01 * max(1, abs(value)) for _, value, ours in found) > 0.998 * len(found)


@pytest.mark.parametrize("vocabulary", ["toy", "real"])
def test_the_calculator_forces_the_value_digit_by_digit(vocabulary, request):
    path = TOY / "student" if vocabulary == "toy" else request.getfixturevalue("real") / "tokenizers" / "t5" / "spiece.model"
    tokenizer = Tokenizer(path)
    process = calculator(tokenizer)
    for text, end in (("So 48 * 26 =", " 1248"), ("48*26=", "1248"), ("Then 3 - 96 =", " -93"), ("She has $0.5 + 4 =", " $4.5")):
        ids = tokenizer.encode(text)[:-1]
        for _ in range(12):
            scores = process(torch.tensor([ids]), torch.zeros(1, len(tokenizer.pieces)))[0]
            if scores.isfinite().sum() > 1:
                break
            ids.append(int(scores.argmax()))
        assert tokenizer.decode(ids) == text + end
        barred = {tokenizer.pieces[i] for i in (~scores.isfinite()).nonzero()[:, 0]}
        assert {"0", "5"} <= barred and not {"▁", ".", "▁The"} & barred
        scores = process(torch.tensor([[*ids, tokenizer.pieces.index(".")]]), torch.zeros(1, len(tokenizer.pieces)))[0]
        assert barred == {tokenizer.pieces[i] for i in (~scores.isfinite()).nonzero()[:, 0]}  # nor decimals
    free = process(torch.tensor([tokenizer.encode("It is 7 =")[:-1]]), torch.zeros(1, len(tokenizer.pieces)))
    assert free.isfinite().all()


def test_the_calculator_takes_over_from_a_model_that_writes_an_equation(monkeypatch):
    model, tokenizer = load_pretrained(TOY / "student")
    script, force = tokenizer.encode("Then 48 * 26 =")[:-1], calculator(tokenizer)

    def as_scripted(rows, logits):
        if rows.shape[1] >= len(script):
            return force(rows, logits)
        return logits.index_fill(1, torch.tensor([script[rows.shape[1]]]), 1e9)

    monkeypatch.setattr(ev, "calculator", lambda tokenizer: as_scripted)
    problems = ev.load("gsm8k", "test", TOY)[:4]
    for samples in (1, 2):
        found = ev.evaluate(model, tokenizer, problems, max_new_tokens=24, use_calculator=True, samples=samples)
        texts = [text for p in found.predictions for text in p.get("outputs", [p["output"]])]
        assert len(texts) == 4 * samples and all(re.match(r"Then 48 \* 26 = 1248(?!\d)", text) for text in texts)
