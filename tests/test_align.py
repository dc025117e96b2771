"""align.py against counts of bytes in the tokens of real vocabularies, and on any text."""

import base64
import json
import math
import random
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken

import align as al
from align import WORD_BOUNDARY, align, align_batch, draw, one_to_one, transfer
from conftest import TOY, random_text
from t5 import Tokenizer

TEACHERS = "p50k_base", "cl100k_base", "o200k_base", "qwen", "mistral"
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")

@pytest.fixture(scope="module")
def tokenizer(real):
    """Return the student's tokenizer with the real vocabulary; index: {piece: id}."""
    tokenizer = Tokenizer(real / "tokenizers" / "t5")
    tokenizer.index = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    return tokenizer

@pytest.fixture(scope="module")
def split_teacher(real):
    """Return a function (name of a teacher's vocabulary, text) -> its tokens, each as bytes."""
    folder = real / "tokenizers" / "teachers"
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(folder / "mistral.model"))
    lines = map(bytes.split, (folder / "qwen.tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    qwen = tiktoken.Encoding("qwen", pat_str=QWEN, mergeable_ranks=ranks, special_tokens={})
    encodings = {name: tiktoken.get_encoding(name) for name in TEACHERS[:3]} | {"qwen": qwen}

    def split_teacher(name, text):
        if name == "mistral":
            return piece_bytes(mistral.encode(text, out_type=str))
        return encodings[name].decode_tokens_bytes(encodings[name].encode_ordinary(text))

    return split_teacher

@pytest.fixture(scope="module")
def solutions(real):
    """Return 150 solutions of GSM8K, their characters as T5 normalizes them."""
    lines = (real / "datasets" / "gsm8k" / "test.jsonl").read_text().splitlines()[:150]
    texts = [re.sub("<<.*?>>|#+", "", json.loads(line)["answer"]) for line in lines]
    return [unicodedata.normalize("NFKC", text) for text in texts]

def piece_bytes(pieces):
    """Return the bytes that SentencePiece's pieces write."""
    return [bytes.fromhex(piece[3:5]) if re.fullmatch("<0x..>", piece)
            else piece.replace(WORD_BOUNDARY, " ").encode() for piece in pieces]

def visible_spans(tokens):
    """Return the range of visible bytes of the text that each token (bytes) writes."""
    ends = np.cumsum([0] + [len(b"".join(token.split())) for token in tokens]).tolist()
    return list(zip(ends, ends[1:]))

def shown(tokens, spell=lambda token: "\ufffd"):
    """Return tokens (bytes) as servers write them; `spell` writes those that are not characters."""
    texts = [token.decode("utf-8", "replace") for token in tokens]
    return [spell(token) if "\ufffd" in text else text for token, text in zip(tokens, texts)]

# --- real vocabularies and records ---

@pytest.mark.parametrize("name", TEACHERS)
def test_tokens_are_aligned_where_their_bytes_are_and_partners_if_they_write_the_same_ones(
        name, split_teacher, tokenizer, solutions):
    partners = found = 0
    for text in solutions:
        s, student = split_teacher(name, text), tokenizer.split(text)
        s_spans, t_spans = visible_spans(s), visible_spans(piece_bytes(student))
        assert s_spans[-1][1] == t_spans[-1][1]
        token_at = {span: i for i, span in enumerate(s_spans) if span[0] < span[1]}
        teacher = shown(s)
        (aligned,) = align_batch([(teacher, student)])
        for j, partner in enumerate(one_to_one(teacher, student, aligned)):
            start, end = t_spans[j]
            overlapping = [i for (a, b), i in token_at.items() if a < end and start < b]
            if start < end and "\ufffd" not in teacher:
                others = set(aligned[j]) - set(overlapping)  # share only a space
                assert set(overlapping) <= set(aligned[j])
                assert all(s[i][-1:].isspace() for i in others)
            expected = token_at.get((start, end))
            if expected is not None and s[expected][:1] == b" " and student[j - 1] == WORD_BOUNDARY:
                expected = None  # the student writes this token as two
            assert partner in (expected, None)
            partners += expected is not None
            found += partner is not None
    assert partners > 5000 and found >= 0.999 * partners

def test_tokens_of_the_real_records_with_one_partner_take_its_distribution(real, tokenizer):
    partners = equal = 0
    for line in (real / "codex" / "gsm8k_train_0.jsonl").read_text().splitlines():
        record = json.loads(line)
        tokens = record["tokens"]
        tops = [{c: math.exp(p) for c, p in top.items()} for top in record["top_logprobs"]]
        student = tokenizer.split("".join(tokens))
        ids, probs = transfer(list(zip(tokens, tops)), student, tokenizer.index)
        assert_targets(ids, probs, student, tokenizer.index)
        spans = enumerate(visible_spans(token.encode() for token in tokens))
        expected = {span: tops[i][tokens[i]] for i, span in spans if span[0] < span[1]}
        for j, span in enumerate(visible_spans(piece_bytes(student))):
            if span in expected:
                own = ids[j].tolist().index(tokenizer.index[student[j]])
                equal += abs(probs[j, own] - expected[span]) < 2e-3
                partners += 1
    assert partners > 1600 and equal > 0.99 * partners

def assert_targets(ids, probs, student, index):
    """Check that rows are sorted, sum to at most 1, and hold the student's own token once."""
    assert ids.dtype == np.int32 and probs.dtype == np.float32
    assert ids.shape == probs.shape == (len(student), 5) and ((ids >= 0) & (ids < 32000)).all()
    assert (probs.sum(axis=1) <= 1).all() and (probs >= 0).all() and (np.diff(probs) <= 0).all()
    for piece, row, p in zip(student, ids, probs):
        assert index.get(piece, 2) in row[p > 0] and len(set(row[p > 0])) == (p > 0).sum()

@pytest.mark.parametrize("space", [" ", ""])
@pytest.mark.parametrize("name, sign, spelling", [
    ("p50k_base", "÷", r"\x"), ("p50k_base", "÷", r"\\x"),  # the latter is the real records'
    ("p50k_base", "÷", "\ufffd"), ("mistral", "\U00010330", "<0x")])
def test_parts_of_a_character_in_any_spelling_leave_the_neighbours_their_partners(
        name, sign, spelling, space, split_teacher, tokenizer):
    def spell(token):
        lead, codes = " " * token.startswith(b" "), token.strip().hex(" ").split()
        in_bytes = "bytes:" + lead + "".join(spelling + code for code in codes)
        others = {"\ufffd": lead + "\ufffd", "<0x": f"<0x{codes[0].upper()}>"}
        return others.get(spelling, in_bytes)

    def numbers(text):
        teacher, student = shown(split_teacher(name, text), spell), tokenizer.split(text)
        partners = one_to_one(teacher, student, align(teacher, student))
        return [teacher[i] for i in partners if i is not None and teacher[i].strip().isdigit()]

    text = f"So 8{space}{sign}{space}2 = 4 and 6{space}{sign}{space}3 = 2 in all"
    assert numbers(text) == numbers(text.replace(sign, "*")) and len(numbers(text)) > 3

# --- the recursion and its fast twin ---

def test_the_papers_failures_come_out_right():
    assert align(["s", " $", "12"], ["s", "▁$12"]) == [[0], [1, 2]]
    assert align(["We", ".", "\n", "We"], ["▁We", ".", "▁We"]) == [[0], [1], [2, 3]]
    assert align(["1", "1", "11"], ["11", "1", "1"]) == [[0, 1], [2], [2]]
    assert align(["12", "3"], ["1", "23"]) == [[0], [0, 1]]

def all_paths(i, j):
    """Yield every monotone path from (0, 0) to (i, j)."""
    if (i, j) == (0, 0):
        yield [(0, 0)]
    for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if a >= 0 and b >= 0:
            yield from ([*path, (i, j)] for path in all_paths(a, b))

def random_split(rng, text):
    """Split a text into tokens of random lengths."""
    ends = sorted({0, len(text), *rng.choices(range(len(text) + 1), k=len(text) // 2)})
    return [text[a:b] for a, b in zip(ends, ends[1:])]

def test_no_path_is_cheaper_and_no_equal_one_shorter():
    rng = random.Random(0)
    for _ in range(60):
        teacher, student = random_split(rng, "1112222"), random_split(rng, "1112222")
        owners = [[i for i, token in enumerate(x) for _ in token] for x in (teacher, student)]
        shared = list(zip(*owners))  # the cell of each character
        found = [(i, j) for j, indices in enumerate(align(teacher, student)) for i in indices]
        paths = [found, *all_paths(len(teacher) - 1, len(student) - 1)]
        costs = [(-sum(map(shared.count, path)), len(path)) for path in paths]
        assert costs[0] == min(costs) == (-7, len(found))

def random_tokens(rng, text):
    """Split a text at random; write some tokens as parts of characters."""
    parts = [rf"bytes:\x{rng.randrange(256):02x}", "<0xE2>", "\ufffd"]
    return [rng.choice([token] * 9 + parts) for token in random_split(rng, text)]

def test_the_closed_form_equals_the_recursion(split_teacher, tokenizer, solutions):
    rng, texts = random.Random(1), []
    for name in TEACHERS:
        texts += [(shown(split_teacher(name, text)), text) for text in solutions[:20]]
    for _ in range(300):
        text = random_text(rng)
        texts.append((shown(split_teacher("p50k_base", text)), text))
        texts.append((random_tokens(rng, text), text))
        texts.append((random_tokens(rng, text), random_text(rng)))  # nothing in common
    pairs = [([], []), ([], ["▁a", "b"]), (["a"], []), (["a"] * 40, ["aa"] * 20)]
    pairs += [(teacher, tokenizer.split(text)) for teacher, text in texts]
    assert align_batch(pairs) == [align(*pair) for pair in pairs]
    assert align_batch(pairs[:3]) == [[], [[], []], []] and align_batch([]) == []

def test_on_any_text_alignments_are_complete_and_in_order_and_targets_are_distributions(
        tokenizer):
    rng = random.Random(2)
    for n in range(1, 600):
        text = random_text(rng) * (30 if n % 200 == 0 else 1)
        teacher = random_tokens(rng, text)
        student = tokenizer.split(random_text(rng) if n % 4 == 1 else text)
        if not teacher or not student:
            continue
        (aligned,) = align_batch([(teacher, student)])
        assert len(aligned) == len(student) and aligned[0][0] == 0
        for one, two in zip(aligned, [*aligned[1:], [len(teacher) - 1]]):
            assert one == list(range(one[0], one[-1] + 1)) and one[-1] <= two[0] <= one[-1] + 1
        assert aligned[-1][-1] == len(teacher) - 1
        probs = np.random.default_rng(n).dirichlet([0.3] * 4, len(teacher)).tolist()
        steps = [(token, dict(zip([rng.choice([token, "b"]), "a", " a", random_text(rng)[:5]], p)))
                 for token, p in zip(teacher, probs)]
        assert_targets(*transfer(steps, student, tokenizer.index), student, tokenizer.index)
        assert len(student) > 200 or draw(teacher, student, colour=False)

# --- the teacher's distributions ---

def test_the_first_and_the_last_token_of_a_line_take_the_distribution():
    steps = [("No", {"No": 1.0}), (".", {".": 0.8, "!": 0.1, "\n": 0.1}), ("\n", {"\n": 1.0}),
             ("We", {"We": 0.6, "I": 0.3, " We": 0.1})]
    vocab = ["<pad>", "</s>", "<unk>", "▁No", ".", "▁We", "▁I", "!", "We"]
    ids, probs = transfer(steps, ["▁No", ".", "▁We"], vocab, k=3)
    assert ids.tolist() == [[3, 0, 0], [4, 7, 0], [5, 6, 0]]
    assert np.allclose(probs, [[1, 0, 0], [0.8, 0.1, 0], [0.7, 0.3, 0]])

@pytest.mark.parametrize("space", [" ", "▁"])
def test_a_teacher_may_write_spaces_as_sentencepiece_does(space):
    steps = [(f"{space}cl", {f"{space}cl": 0.7, "cl": 0.1, f"{space}in": 0.2}),
             ("ips", {"ips": 0.6, f"{space}in": 0.3})]
    ids, probs = transfer(steps, ["▁cl", "ips"], ["▁cl", "ips", "▁in", "in", "cl"], k=3)
    assert ids.tolist() == [[0, 2, 4], [1, 2, 0]]
    assert np.allclose(probs, [[0.7, 0.2, 0.1], [0.6, 0.3, 0]])

def test_tokens_without_a_partner_or_that_it_does_not_report_get_one_hot_targets():
    steps = [(" $", {" $": 0.5, " 1": 0.5}), ("12", {"12": 0.9}), ("ab", {"ab": 0.9}),
             ("c", {"d": 0.7}), ("d", {"d": 0.0, "c": 1.0}), ("e", {}), (" a", {" a": 0.5})]
    vocab = ["▁$12", "a", "b", "c", "d", "e", "▁", "▁1", "12", "ab", "▁a"]
    ids, probs = transfer(steps, ["▁$12", "a", "b", "c", "d", "e", "▁", "a"], vocab)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 1]
    assert (probs[:, 0] == 1).all() and not probs[:, 1:].any()

def test_k_keeps_the_students_token_and_the_most_probable_others():
    candidates = {" a": 0.02, " b": 0.5, " c": 0.3, " d": 0.1}
    ids, probs = transfer([(" a", candidates)], ["▁a"], ["▁a", "▁b", "▁c", "▁d"], k=2)
    assert ids.tolist() == [[1, 0]] and np.allclose(probs, [[0.5, 0.02]])

def test_sums_over_one_from_rounding_are_scaled_and_impossible_probabilities_refused():
    for p in [[0.6, 0.4005], *np.random.default_rng(0).dirichlet([1] * 5, 100).tolist()]:
        _, probs = transfer([("a", dict(zip("abcde", p)))], ["a"], list("abcde"))
        assert 0.999 < probs.sum() <= 1
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="'b' has probability"):
            transfer([("a", {"a": 0.5, "b": wrong})], ["a"], ["a", "b"])

# --- the command ---

def test_the_command_draws_both_tokenizations(run, real):
    student = real / "tokenizers" / "t5"
    done = run("align.py", "She sold 48/2 = 24.\nWe paid $12.", "--student", student)
    top, bottom = done.stdout.splitlines()[:2]
    assert top.index("·24") == bottom.index("▁24") and "/|2" in top and "/2" in bottom
    drawn = draw([" 24", " $", "12"], ["▁24", "▁$12"], colour=True)
    assert "\033[32m▁24\033[0m \033[33m▁$12 \033[0m" in drawn  # one-to-one is green
    record = run("align.py", TOY / "teacher.jsonl.gz", "--student", TOY / "tuned-1M").stdout
    assert record.count("teacher  ") == record.count("student  ") > 0

def test_the_help_names_every_default(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        al.main()
    options = capsys.readouterr().out.partition("--help")[2].split("\n  --")[1:]
    assert len(options) == 2 and all("default" in option for option in options)

def test_columns_stay_straight_with_wide_characters_and_controls_are_escaped():
    tokens = ["好好", " a", " b", "\x1b\r\u202e\u200b", " c"]
    lines = draw(tokens, [token.replace(" ", WORD_BOUNDARY) for token in tokens], colour=False)
    teacher, student, *_ = lines.splitlines()
    assert teacher == "teacher  好好 ·a ·b \\x1b\\r\\u202e\\u200b ·c "
    assert student == teacher.replace("teacher", "student").replace("·", WORD_BOUNDARY)
    top, bottom, *_ = draw(["好好", " $", "12"], ["好", "好", "▁$12"], colour=False).splitlines()
    assert (top, bottom) == ("teacher  好好  ·$|12 ", "student  好|好 ▁$12  ")
    wrapped = draw(["好好好好"] * 2, ["好好好好"] * 2, colour=False, width=20).splitlines()
    assert wrapped == ["teacher  好好好好 ", "student  好好好好 ", ""] * 1 + wrapped[3:]
    assert len(wrapped) == 5  # the second token needs lines of its own

def test_the_command_says_what_it_lacks_and_how_to_get_it(monkeypatch, real, tmp_path, capsys):
    def message(*arguments):
        monkeypatch.setattr(sys, "argv", ["align.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(al.main())
        return stopped.value.code

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    student = "--student", real / "tokenizers" / "t5"
    assert "`python t5.py google/flan-t5-small hi` downloads one" in message("text")
    assert "nowhere" in message("text", "--student", "nowhere")
    assert "no_base" in message("text", "--teacher", "no_base", *student)
    assert "no visible character" in message(" \n", *student)
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"question": "no tokens"}\n')
    assert "bad.jsonl" in message("bad.jsonl", *student)
    assert message("not UTF-8: \udcff", *student) is None and "not" in capsys.readouterr().out
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    without_encoding = message("text", *student)
    assert "p50k_base" in without_encoding and "spiece.model" not in without_encoding
