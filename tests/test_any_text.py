"""Any text through tokenizer, aligner, transfer and extraction: nothing stops, and the invariants hold."""

import math
import random

import numpy as np
import pytest
import tiktoken

from align import align, align_batch, draw, one_to_one, transfer
from conftest import TOY
from data.calculator import computed
from data.records import parse_record
from data.rows import make_rows
from eval import extract_choice, extract_number, gold, is_correct, is_correct_by_authors
from t5 import EOS, Tokenizer

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "0123456789", ".,+-*/=()$%<>:'\"", " " * 4, "\n", "\t\r\v\f\x1c\x85\u2028",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u00ad", "\0\x01\x1b\x7f", "éüßøçñ", "e\u0301\u0327\u20dd\u0334", "שלום עולם", "مرحبا ٠١٢٣",
    "\u202e\u200f\u2066", "你好世界", "한국어", "\u1112\u1161\u11ab", "😀👍🏽👩\u200d👩\u200d👧🇩🇪", "ﬃ½²㎏ﷺⅣ①", "ａＢ１＋", "٣೪𝟛", "▁", "\ufffd\ue000\U0010ffff",
    "\ud800\udc00\udfff", "−–—×÷", "</s><pad><unk>",
]  # fmt: skip


def random_text(rng):
    """A text of one to a few alphabets, now and then white space alone or a very long line."""
    kind = rng.random()
    if kind < 0.05:
        return "".join(rng.choices(" \n\t\u3000\u200b", k=rng.randrange(8)))
    chosen = rng.sample(ALPHABETS, rng.randrange(1, 6))
    length = 3000 if kind > 0.99 else rng.randrange(1, 80)
    return "".join(rng.choice(rng.choice(chosen)) for _ in range(length))


def as_bytes(token):
    """A token that is no whole characters, as servers write it."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def random_cut(rng, text):
    """The text in tokens of random lengths; now and then one of them is told as its bytes."""
    tokens = []
    while text:
        size = min(rng.randrange(1, 7), len(text))
        token, text = text[:size], text[size:]
        tokens.append(as_bytes(token.encode("utf-8", "replace")) if rng.random() < 0.02 else token)
    return tokens


def texts(count, seed):
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]


@pytest.fixture(scope="module", params=["toy", "T5's"])
def tokenizer(request):
    if request.param == "toy":
        return Tokenizer(TOY / "student")
    return Tokenizer(request.getfixturevalue("real") / "tokenizers" / "t5")


def test_every_text_has_ids_pieces_and_a_text_again(tokenizer):
    for text in texts(2000, 0) + ["", " ", "\0", "x" * 200_000, "5 " * 50_000, "\u0301" * 20_000, "😀" * 20_000]:
        ids, pieces = tokenizer.encode(text), tokenizer.split(text)
        assert ids[-1] == EOS and len(pieces) == len(ids) - 1 and all(0 <= i < len(tokenizer.pieces) for i in ids)
        again = tokenizer.decode(ids)
        again.encode("utf-8")  # whole characters


def assert_in_order(aligned, teacher, student):
    """Every student token has teacher tokens, contiguous; a token's begin where the ones before end or behind it."""
    assert len(aligned) == len(student)
    last = 0
    for indices in aligned:
        assert indices and indices == list(range(indices[0], indices[-1] + 1))
        assert last <= indices[0] <= indices[-1] < len(teacher)
        last = indices[-1]


def assert_sub_distributions(ids, probs, student, tokenizer):
    """Each row sums to at most 1 and holds the student's own token; no id stands twice."""
    index = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    assert ids.dtype == np.int32 and probs.dtype == np.float32 and ids.shape == probs.shape == (len(student), 5)
    assert np.isfinite(probs).all() and (probs >= 0).all() and (probs.sum(axis=1) <= 1).all()
    for piece, its_ids, its_probs in zip(student, ids.tolist(), probs.tolist()):
        used = [i for i, p in zip(its_ids, its_probs) if p > 0]
        assert index.get(piece, 2) in used and len(set(used)) == len(used)
        assert all(0 <= i < len(tokenizer.pieces) for i in its_ids)


def random_steps(rng, teacher):
    """For each token a sub-distribution that may or may not hold it."""
    steps = []
    for token in teacher:
        names = [random_text(rng)[:6] for _ in range(rng.randrange(5))] + [token] * (rng.random() < 0.8)
        shares = [rng.random() ** 3 for _ in names]
        total = sum(shares) / rng.choice([1, 1, 0.9, 0.1]) or 1
        steps.append((token, {name: share / total for name, share in zip(names, shares)}))
    return steps


def test_alignments_and_targets_of_any_text_cut_at_random(tokenizer):
    rng, pairs = random.Random(1), []
    for text in texts(300, 1):
        teacher, student = random_cut(rng, text), tokenizer.split(text)
        pairs.append((teacher, student))
        if teacher and student:
            assert_sub_distributions(*transfer(random_steps(rng, teacher), student, tokenizer.pieces), student, tokenizer)
    for (teacher, student), found in zip(pairs, align_batch(pairs)):
        if teacher:
            assert_in_order(found, teacher, student)
        else:
            assert found == [[] for _ in student]
        assert len(one_to_one(teacher, student, found)) == len(student)
        if len(teacher) * len(student) < 2000:
            assert found == align(teacher, student)
            assert not (teacher and student) or draw(teacher, student, False)


def test_alignments_of_texts_that_have_nothing_to_do_with_each_other(tokenizer):
    rng, some = random.Random(2), texts(200, 2)
    for one, other in zip(some, some[1:]):
        teacher, student = random_cut(rng, one), tokenizer.split(other)
        if teacher:
            assert_in_order(align(teacher, student), teacher, student)
            assert_sub_distributions(*transfer(random_steps(rng, teacher), student, tokenizer.pieces), student, tokenizer)


def test_alignments_with_the_teachers_real_tokenizer(real, tokenizer):
    encoding = tiktoken.get_encoding("p50k_base")
    for text in texts(400, 3):
        teacher = [
            as_bytes(encoding.decode_bytes([i])) if "\ufffd" in token else token
            for i in encoding.encode(text.encode("utf-8", "replace").decode(), disallowed_special=())
            for token in [encoding.decode([i])]
        ]
        student = tokenizer.split(text)
        if teacher:
            assert_in_order(align_batch([(teacher, student)])[0], teacher, student)


def test_records_of_any_text_become_rows(tokenizer):
    rng, records = random.Random(4), []
    for text in texts(300, 4):
        solution = text.strip() + " so 5"
        tokens = random_cut(rng, solution)
        steps = [(t, {name: p for name, p in top.items()}) for t, top in random_steps(rng, tokens)]
        told = {
            "tokens": tokens, "solution": solution, "question": f"{text} ?", "answer": 5,
            "top_logprobs": [{name: math.log(p) for name, p in top.items() if p} for _, top in steps],
        }  # fmt: skip
        records.append(parse_record(told, "here"))
    rows, _ = make_rows(records, tokenizer, ["zero_shot_cot"], "kl")
    assert len(rows) == len(records)
    for row in rows:
        assert row.labels[-1] == EOS and len(row.ids) == len(row.labels) and (row.probs.sum(axis=1) <= 1).all()
        assert all(label in ids[p > 0] for label, ids, p in zip(row.labels, row.ids, row.probs))


def test_extraction_takes_any_text():
    some = texts(4000, 5) + ["9" * 5000, "1/" + "9" * 5000, "1" * 400 + "/" + "2" * 400, "((((" * 30 + "=", "," * 50_000, "-" * 50_000]
    some += ["1,111" * 20_000, "answer is " * 20_000, "(A" * 20_000, "1 + " * 20_000 + "=", "٣/٤", "−５", "½ =", "1e999"]
    for text in some:
        number, choice = extract_number(text), extract_choice(text)
        assert number is None or isinstance(number, float)
        assert isinstance(choice, str) and isinstance(gold(text), (float, str, type(None)))
        for answer in (5.0, "(A)", text):
            assert is_correct(text, answer) in (True, False)
        assert is_correct_by_authors(text, "5", True, True) in (True, False)
        assert computed(text + " =") is None or isinstance(computed(text + " ="), str)
