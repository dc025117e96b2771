"""align.py against its recursion written cell by cell, and against where the tokens of real
vocabularies are in the text."""

import base64
import json
import math
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import tiktoken

from align import WORD_BOUNDARY, align, one_to_one, transfer
from conftest import TOY
from t5 import Tokenizer

TEACHERS = "p50k_base", "cl100k_base", "o200k_base", "qwen", "mistral"
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")

@pytest.fixture(scope="module")
def split_teacher(real):
    """split_teacher(name of a teacher's vocabulary, text) returns its tokens, each as bytes."""
    folder = real / "tokenizers" / "teachers"
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(folder / "mistral.model"))
    lines = map(bytes.split, open(folder / "qwen.tiktoken", "rb"))
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    qwen = tiktoken.Encoding("qwen", pat_str=QWEN, mergeable_ranks=ranks, special_tokens={})
    encodings = {name: tiktoken.get_encoding(name) for name in TEACHERS[:3]} | {"qwen": qwen}

    def split_teacher(name, text):
        if name == "mistral":
            return piece_bytes(mistral.encode(text, out_type=str))
        return encodings[name].decode_tokens_bytes(encodings[name].encode_ordinary(text))

    return split_teacher

@pytest.fixture(scope="module")
def records(real):
    """The 40 real records of code-davinci-002."""
    return list(map(json.loads, open(real / "codex" / "gsm8k_train_0.jsonl", encoding="utf-8")))

@pytest.fixture(scope="module")
def texts(real, records):
    """Solutions of the real records and of GSM8K, with their characters as T5 normalizes them."""
    texts = [record["solution"] for record in records]
    for line in open(real / "datasets" / "gsm8k" / "test.jsonl", encoding="utf-8"):
        texts.append(re.sub("<<.*?>>|#+", "", json.loads(line)["answer"]))
    return [unicodedata.normalize("NFKC", text) for text in texts[:150]]

def piece_bytes(pieces):
    """Return the bytes that SentencePiece's pieces write."""
    return [bytes.fromhex(piece[3:5]) if re.fullmatch("<0x..>", piece)
            else piece.replace(WORD_BOUNDARY, " ").encode() for piece in pieces]

def visible_spans(tokens):
    """Return the range of visible bytes of the text that each token (bytes) writes."""
    ends = np.cumsum([0] + [len(b"".join(token.split())) for token in tokens]).tolist()
    return list(zip(ends, ends[1:]))

# --- the recursion ---

def plain_align(teacher, student):
    """Align two splits of one text by the recursion, cell by cell; ties prefer the diagonal."""
    owners = [[i for i, token in enumerate(tokens) for _ in token] for tokens in (teacher, student)]
    shared, f = Counter(zip(*owners)), {}  # shared: the number of characters in both s_i and t_j

    def before(i, j):
        return [cell for cell in [(i - 1, j - 1), (i - 1, j), (i, j - 1)] if cell in f]

    for i in range(len(teacher)):
        for j in range(len(student)):
            f[i, j] = min(map(f.get, before(i, j)), default=0) - shared[i, j]
    path = [(len(teacher) - 1, len(student) - 1)]
    while path[-1] != (0, 0):
        path.append(min(before(*path[-1]), key=f.get))
    return [sorted(i for i, column in path if column == j) for j in range(len(student))]

def random_split(rng, text):
    """Split a text into tokens of random lengths."""
    ends = sorted({0, len(text), *rng.choices(range(len(text)), k=len(text) // 2)})
    return [text[a:b] for a, b in zip(ends, ends[1:])]

def test_align_is_the_recursion():
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choices("12+=a", k=rng.randrange(1, 60)))
        teacher, student = random_split(rng, text), random_split(rng, text)
        assert align(teacher, student) == plain_align(teacher, student)
    assert align([], ["a"]) == [[]] and align(["a"], []) == []

def test_the_examples_in_which_the_edit_distance_fails_come_out_right():
    assert align(["a", " $", "12"], ["▁a", "▁$12"]) == [[0], [1, 2]]
    assert align(["2", "+2=4"], ["▁2", "+", "2", "=4"]) == [[0], [1], [1], [1]]

# --- real vocabularies and records ---

@pytest.mark.parametrize("name", TEACHERS)
def test_tokens_are_aligned_if_they_share_text_and_partners_if_they_write_the_same_text(
        name, split_teacher, tokenizer, texts):
    partners = found = 0
    for text in texts:
        s, student = split_teacher(name, text), tokenizer.split(text)
        teacher = [token.decode("utf-8", "replace") for token in s]
        s_spans, t_spans = visible_spans(s), visible_spans(piece_bytes(student))
        token_at = {span: i for i, span in enumerate(s_spans) if span[0] < span[1]}
        aligned = align(teacher, student)
        for j, partner in enumerate(one_to_one(teacher, student, aligned)):
            start, end = t_spans[j]
            sharing = {i for (a, b), i in token_at.items() if a < end and start < b}
            if start < end and "\ufffd" not in "".join(teacher):
                assert sharing <= set(aligned[j])
                assert all(s[i][-1:].isspace() for i in set(aligned[j]) - sharing)  # as in ".\n"
            expected = token_at.get((start, end))
            if expected is not None and s[expected][:1] == b" " and student[j - 1] == WORD_BOUNDARY:
                expected = None  # the student writes this token as two
            assert partner in (expected, None)
            partners += expected is not None
            found += partner is not None
    assert partners > 5000 and found >= 0.999 * partners

# --- the teacher's distributions ---

def targets(steps, student, pieces):
    """Return each student token's target as {piece: probability}; check what holds for all."""
    ids, probs = transfer(steps, student, {piece: i for i, piece in enumerate(pieces)})
    assert ids.shape == probs.shape == (len(student), 5) and probs.dtype == np.float32
    assert (probs.sum(axis=1) <= 1).all() and (probs >= 0).all() and (np.diff(probs) <= 0).all()
    rows = [{pieces[x]: q for x, q in zip(i, p) if q > 0} for i, p in zip(ids, probs.tolist())]
    assert all(piece in row for piece, row in zip(student, rows) if piece in pieces)
    return rows

CLIPS = {" 48": 0.56, " half": 0.17, " 24": 0.1, " 1": 0.03, " (": 0.02}
TRANSFERS = [  # steps, then {student token: target} in the order of the text
    # The example in data/README.md: "/" and "2" are many-to-one.
    ([(" 48", CLIPS), ("/", {"/": 0.9}), ("2", {"2": 0.9})],
     [("▁48", {"▁48": 0.56, "▁half": 0.17, "▁24": 0.1, "▁1": 0.03, "▁(": 0.02}),
      ("/2", {"/2": 1})]),
    # A newline is T5's space: "We" starts a line, and so do the candidates.
    ([("No", {"No": 1}), (".", {".": 0.8, "!": 0.1, "\n": 0.1}), ("\n", {"\n": 1}),
      ("We", {"We": 0.6, "I": 0.3, " We": 0.1})],
     [("▁No", {"▁No": 1}), (".", {".": 0.8, "!": 0.1}), ("▁We", {"▁We": 0.7, "▁I": 0.3})]),
    ([("a", {"a": 1}), (".\n", {".\n": 0.7, ".": 0.2}), ("We", {"We": 0.6, "I": 0.3})],
     [("▁a", {"▁a": 1}), (".", {".": 0.9}), ("▁We", {"▁We": 0.6, "▁I": 0.3})]),
    # A teacher may write spaces as SentencePiece does. Candidates without a piece are dropped.
    ([("▁cl", {"▁cl": 0.7, "cl": 0.1, "▁in": 0.2}), ("ips", {"ips": 0.6, "▁in": 0.3, "???": 0.1})],
     [("▁cl", {"▁cl": 0.7, "▁in": 0.2, "cl": 0.1}), ("ips", {"ips": 0.6, "▁in": 0.3})]),
    # One-hot: no partner, a partner that the student splits from its space, or no probability.
    ([(" $", {" $": 0.5}), ("12", {"12": 0.9}), ("ab", {"ab": 0.9}), (" 24", {" 24": 0.9}),
      ("c", {"d": 0.7}), ("d", {})],
     [(piece, {piece: 1}) for piece in ["▁$12", "a", "b", "▁", "24", "c", "d"]]),
    # All bytes of a character spell it; some of them are no candidate.
    ([(r"bytes: \xc2\xa3", {r"bytes: \xc2\xa3": 0.6, r"bytes: \xc2": 0.2, " $": 0.1})],
     [("▁£", {"▁£": 0.6, "▁$": 0.1})]),
    # The student's token stays, however improbable.
    ([(" a", {" a": 0.01, " b": 0.2, " c": 0.19, " d": 0.18, " e": 0.17, " f": 0.16})],
     [("▁a", {"▁b": 0.2, "▁c": 0.19, "▁d": 0.18, "▁e": 0.17, "▁a": 0.01})])]

# " ÷" in two tokens, each a part of the character, in the spellings of several servers.
for first, second in [(r"bytes: \xc3", r"bytes:\xb7"), (r" bytes: \\xc3", r"bytes:\\xb7"),
                      (" \ufffd", "\ufffd"), ("<0xC3>", "<0xB7>")]:
    TRANSFERS.append((
        [(" 8", {" 8": 0.9}), (first, {first: 0.9}), (second, {second: 0.9}), (" 2", {" 2": 0.8})],
        [("▁8", {"▁8": 0.9}), ("▁", {"▁": 1}), ("÷", {"÷": 1}), ("▁2", {"▁2": 0.8})]))

@pytest.mark.parametrize("steps, expected", TRANSFERS)
def test_targets_worked_out_by_hand(steps, expected):
    pieces = {piece for _, row in expected for piece in row} | {"▁f"}
    rows = targets(steps, [piece for piece, _ in expected], sorted(pieces))
    assert rows == [pytest.approx(row) for _, row in expected]

def test_tokens_of_the_real_records_with_one_partner_take_its_distribution(records, tokenizer):
    partners = equal = 0
    for record in records:
        tokens = record["tokens"]
        tops = [{c: math.exp(p) for c, p in top.items()} for top in record["top_logprobs"]]
        student = tokenizer.split("".join(tokens))
        rows = targets(list(zip(tokens, tops)), student, tokenizer.pieces)
        spans = enumerate(visible_spans(token.encode() for token in tokens))
        expected = {span: tops[i][tokens[i]] for i, span in spans if span[0] < span[1]}
        for piece, row, span in zip(student, rows, visible_spans(piece_bytes(student))):
            if span in expected:
                equal += abs(row[piece] - expected[span]) < 2e-3
                partners += 1
    assert partners > 1600 and equal > 0.99 * partners

def test_rows_sum_to_at_most_one_despite_rounding():
    for p in [[0.6, 0.4005], *np.random.default_rng(0).dirichlet([1] * 5, 100).tolist()]:
        (row,) = targets([("a", dict(zip("abcde", p)))], ["a"], "abcde")
        assert sum(row.values()) > 0.999

def test_distributions_over_the_students_own_pieces_come_over_unchanged():
    toy, rng, steps = Tokenizer(TOY), random.Random(0), []
    student = toy.split("Tom had 6 + 5 = 11 toys.\nIt is $1,080 =  half")
    for piece in student:
        candidates = [piece, *rng.sample(toy.pieces[3:], 4)]
        steps.append((piece, {candidate: rng.random() / 5 for candidate in candidates}))
    assert targets(steps, student, toy.pieces) == [pytest.approx(top) for _, top in steps]

def test_the_command_prints_the_target_of_each_student_token(run):
    done = run("align.py", TOY / "teacher.jsonl.gz", "--student", TOY / "tuned-1M", "--line", 1)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *\S+ +[=~] ", line)]
    first = "6 + 5 = 11.\nThen 11 + 10 = 21.\nThe answer is 21"
    assert [row[0] for row in rows] == Tokenizer(TOY).split(first), done.stderr
    # The second token's log-probabilities are {" +": -0.1508, " -": -1.9661}.
    assert rows[1][:2] == ["▁+", "="] and rows[1][-4:] == ["▁+", "0.86", "▁-", "0.14"]
