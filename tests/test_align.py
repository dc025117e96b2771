"""align.py against counts of characters on real records and real vocabularies, and on any text."""

import base64
import json
import math
import random
import re
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tiktoken

import align as al
from align import WORD_BOUNDARY, align, align_batch, draw, one_to_one, transfer

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEACHERS = "p50k_base", "cl100k_base", "o200k_base", "qwen", "mistral"

@pytest.fixture(scope="module")
def pieces(real):
    """The real T5 vocabulary: pieces(text) -> its tokens."""
    path = real / "tokenizers" / "t5" / "spiece.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda text: model.encode(text, out_type=str)

@pytest.fixture(scope="module")
def index(real):
    """The real T5 vocabulary: {piece: id}."""
    path = real / "tokenizers" / "t5" / "spiece.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {model.id_to_piece(i): i for i in range(len(model))}

@pytest.fixture(scope="module")
def split_bytes(real):
    """split_bytes(vocabulary of a teacher, text) -> the tokens, each as the bytes it writes."""
    folder = real / "tokenizers" / "teachers"
    lines = map(bytes.split, (folder / "qwen.tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    qwen = tiktoken.Encoding("qwen", pat_str=QWEN, mergeable_ranks=ranks, special_tokens={})
    encodings = {name: tiktoken.get_encoding(name) for name in TEACHERS[:3]} | {"qwen": qwen}
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(folder / "mistral.model"))

    def split_bytes(name, text):
        if name == "mistral":
            return [bytes.fromhex(token[3:5]) if re.fullmatch("<0x..>", token)
                    else token.replace(WORD_BOUNDARY, " ").encode()
                    for token in mistral.encode(text, out_type=str)]
        return encodings[name].decode_tokens_bytes(encodings[name].encode_ordinary(text))

    return split_bytes

@pytest.fixture(scope="module")
def solutions(real):
    """150 solutions of GSM8K, in the form to which T5 normalizes characters."""
    lines = (real / "datasets" / "gsm8k" / "test.jsonl").read_text().splitlines()[:150]
    texts = [re.sub("<<.*?>>", "", json.loads(line)["answer"]) for line in lines]
    return [unicodedata.normalize("NFKC", text.replace("####", "The answer is")) for text in texts]

@pytest.fixture(scope="module")
def records(real):
    """40 real solutions of code-davinci-002, each a list of (token, {candidate: probability})."""
    lines = (real / "codex" / "gsm8k_train_0.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    probs = [[{c: math.exp(p) for c, p in top.items()} for top in r["top_logprobs"]] for r in read]
    return [list(zip(r["tokens"], tops)) for r, tops in zip(read, probs)]

def visible_spans(tokens):
    """Return the range of visible bytes of the text that each token (bytes) writes."""
    ends = np.cumsum([0] + [len(b"".join(token.split())) for token in tokens]).tolist()
    return list(zip(ends, ends[1:]))

def piece_bytes(student):
    return [piece.replace(WORD_BOUNDARY, " ").encode() for piece in student]

def shown(tokens, spell=lambda token: "\ufffd"):
    """Return tokens (bytes) as servers write them; `spell` writes those that are not characters."""
    valid = [token.decode("utf-8", "ignore").encode() == token for token in tokens]
    return [token.decode() if ok else spell(token) for token, ok in zip(tokens, valid)]

# --- real vocabularies and records ---

@pytest.mark.parametrize("name", TEACHERS)
def test_tokens_that_write_the_same_visible_bytes_are_partners_in_every_vocabulary(
        name, split_bytes, pieces, solutions):
    expected_count = found_count = 0
    for text in solutions:
        s, student = split_bytes(name, text), pieces(text)
        s_spans, t_spans = visible_spans(s), visible_spans(piece_bytes(student))
        assert s_spans[-1][1] == t_spans[-1][1]
        teacher = shown(s)
        found = one_to_one(teacher, student, *align_batch([(teacher, student)]))
        token_at = {span: i for i, span in enumerate(s_spans) if span[0] < span[1]}
        for j, span in enumerate(t_spans):
            expected = token_at.get(span)
            lone_space = j and student[j - 1] == WORD_BOUNDARY
            if expected is not None and lone_space and s[expected].startswith(b" "):
                expected = None  # the student writes this token as two
            assert found[j] in (expected, None)
            expected_count += expected is not None
            found_count += found[j] is not None
    assert expected_count > 5000 and found_count >= 0.999 * expected_count

def test_every_token_of_the_real_records_is_aligned_with_the_tokens_at_its_characters(
        records, pieces):
    compared = 0
    for steps in records:
        teacher = [token for token, _ in steps]
        student = pieces("".join(teacher))
        s_spans = visible_spans(token.encode() for token in teacher)
        for (start, end), found in zip(visible_spans(piece_bytes(student)), align(teacher, student)):
            overlapping = [i for i, (a, b) in enumerate(s_spans) if max(a, start) < min(b, end)]
            if start < end:  # not only a space
                assert [i for i in found if s_spans[i][0] < s_spans[i][1]] == overlapping
                compared += 1
    assert compared > 1700

def test_tokens_of_the_real_records_with_one_partner_take_its_distribution(records, pieces, index):
    partners = equal = 0
    for steps in records:
        student = pieces("".join(token for token, _ in steps))
        ids, probs = transfer(steps, student, index)
        assert_targets(ids, probs, student, index)
        s_spans = visible_spans(token.encode() for token, _ in steps)
        token_at = {span: i for i, span in enumerate(s_spans) if span[0] < span[1]}
        for j, span in enumerate(visible_spans(piece_bytes(student))):
            if span in token_at:
                token, top = steps[token_at[span]]
                p = probs[j, ids[j].tolist().index(index[student[j]])]
                equal += abs(p - top[token]) < 2e-3
                partners += 1
    assert partners > 1600 and equal > 0.99 * partners

def assert_targets(ids, probs, student, index):
    """Each row is sorted, sums to at most 1, and holds the student's own token; no id is twice."""
    assert ids.dtype == np.int32 and probs.dtype == np.float32
    assert ids.shape == probs.shape == (len(student), 5) and ((0 <= ids) & (ids < 32000)).all()
    assert (probs.sum(axis=1) <= 1).all() and (probs >= 0).all() and (np.diff(probs) <= 0).all()
    for piece, row, p in zip(student, ids, probs):
        assert index.get(piece, 2) in row[p > 0] and len(set(row[p > 0])) == (p > 0).sum()

@pytest.mark.parametrize("space", [" ", ""])
@pytest.mark.parametrize("spelling", [r"bytes:\x", r"bytes:\\x", "<0x", "\ufffd"])
def test_parts_of_a_character_in_any_spelling_leave_the_neighbours_their_partners(
        space, spelling, split_bytes, pieces):
    def spell(token):
        lead, codes = token[: token.startswith(b" ")].decode(), [f"{b:02X}" for b in token.strip()]
        if spelling.startswith("bytes:"):  # the doubled backslash is the real records'
            return "bytes:" + lead + "".join(spelling[6:] + code.lower() for code in codes)
        return f"<0x{codes[0]}>" if spelling == "<0x" else lead + "\ufffd"

    def numbers(text):
        s, student = split_bytes("p50k_base", text), pieces(text)
        if spelling == "<0x":  # these vocabularies write one byte per token
            s = [part for token in s for part in (
                [token] if token.isascii() else [b" "] * token.startswith(b" ")
                + [bytes([b]) for b in token.strip()])]
        teacher = shown(s, spell)
        partners = one_to_one(teacher, student, align(teacher, student))
        return [teacher[i].strip() for i in partners if i is not None and teacher[i].strip().isdigit()]

    text = f"So 20{space}÷{space}5 = 4 and 60{space}÷{space}3 = 20 in all"
    assert numbers(text) == numbers(text.replace("÷", "*")) and len(numbers(text)) > 3

# --- the recursion and its fast twin ---

def test_the_papers_failures_come_out_right():
    assert align(["s", " $", "12"], ["s", "▁$12"]) == [[0], [1, 2]]
    assert align(["We", ".", "\n", "We"], ["▁We", ".", "▁We"]) == [[0], [1], [2, 3]]
    assert align(["1", "1", "11"], ["11", "1", "1"]) == [[0, 1], [2], [2]]
    assert align(["12", "3"], ["1", "23"]) == [[0], [0, 1]]

def cost_of(path, teacher, student):
    """A path's cost by the definition, counting characters one by one."""
    s_owner, t_owner = ([i for i, token in enumerate(x) for _ in token] for x in (teacher, student))
    both = list(zip(s_owner, t_owner))
    return -sum(both.count(cell) for cell in path)

def all_paths(i, j):
    """Every monotone path from (0, 0) to (i, j)."""
    if (i, j) == (0, 0):
        yield [(0, 0)]
    for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if a >= 0 and b >= 0:
            yield from ([*path, (i, j)] for path in all_paths(a, b))

def random_split(rng, text, size=6):
    """Split a text into tokens of random lengths."""
    tokens = []
    while text:
        n = rng.randint(1, size)
        tokens.append(text[:n])
        text = text[n:]
    return tokens

def test_no_path_is_cheaper_and_no_equal_one_shorter():
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice("12") for _ in range(7))
        teacher, student = random_split(rng, text, 3), random_split(rng, text, 3)
        found = [(i, j) for j, indices in enumerate(align(teacher, student)) for i in indices]
        paths = list(all_paths(len(teacher) - 1, len(student) - 1))
        best = min((cost_of(path, teacher, student), len(path)) for path in paths)
        assert (cost_of(found, teacher, student), len(found)) == best == (-7, len(found))

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "0123456789", ".,+-*/=()$%<>:'\"", "   ", "\n", "\t\r\v\f\x1c\x85",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u00ad", "\0\x01\x1b\x7f", "éüßøçñ", "e\u0301\u0327\u20dd",
    "שלום", "مرحبا ٠١٢٣", "\u202e\u200f\u2066", "你好世界", "한국어\u1112\u1161\u11ab", "😀👍🏽👩\u200d👧🇩🇪",
    "ﬃ½²㎏ﷺⅣ①", "ａＢ１＋", "٣೪𝟛", "▁", "\ufffd\ue000\U0010ffff", "−–—×÷…", "</s><pad><unk>",
]

def random_text(rng, length=60):
    """Write characters of a few alphabets."""
    chosen = rng.sample(ALPHABETS, rng.randint(1, 5))
    return "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(0, length)))

def random_tokens(rng, text):
    """Split a text at random; now and then write a token as the bytes that it is part of."""
    spell = [str, str, str, lambda token: rf"bytes:\x{rng.randrange(256):02x}", lambda token: "\ufffd"]
    return [rng.choice(spell)(token) for token in random_split(rng, text)]

def test_the_closed_form_equals_the_recursion(split_bytes, pieces, solutions):
    rng, pairs = random.Random(1), [([], []), ([], ["▁a"]), (["a"], []), (["a"] * 40, ["aa"] * 20)]
    for name in TEACHERS:  # real texts
        pairs += [(shown(split_bytes(name, text)), pieces(text)) for text in solutions[:20]]
    for _ in range(300):
        text, other = random_text(rng), random_text(rng)
        pairs.append((shown(split_bytes("p50k_base", text)), pieces(text)))
        pairs.append((random_tokens(rng, text), pieces(text)))  # also characters in parts
        pairs.append((random_tokens(rng, text), pieces(other)))  # nothing in common
    assert align_batch(pairs) == [align(*pair) for pair in pairs]
    assert align_batch(pairs[:3]) == [[], [[]], []] and align_batch([]) == []

def test_on_any_text_the_alignment_is_complete_contiguous_and_in_order(pieces, index):
    rng = random.Random(2)
    for n in range(800):
        text = random_text(rng, 3000 if n % 200 == 0 else 60)
        teacher, student = random_tokens(rng, text), pieces(random_text(rng) if n % 4 == 0 else text)
        if not teacher or not student:
            continue
        (aligned,) = align_batch([(teacher, student)])
        assert len(aligned) == len(one_to_one(teacher, student, aligned)) == len(student)
        assert aligned[0][0] == 0 and aligned[-1][-1] == len(teacher) - 1
        for one, two in zip(aligned, aligned[1:] + [[len(teacher) - 1]]):
            assert one == list(range(one[0], one[-1] + 1)) and one[-1] <= two[0] <= one[-1] + 1
        steps = []
        for token in teacher:  # a sub-distribution that may or may not contain the token
            names = {random_text(rng, 5) for _ in range(rng.randrange(5))}
            names |= {token} if rng.random() < 0.8 else set()
            shares = rng.choices([0.0, 0.01, 0.3, 1.0], k=len(names))
            total = sum(shares) / rng.choice([1, 0.9, 0.1]) or 1
            steps.append((token, {name: share / total for name, share in zip(names, shares)}))
        assert_targets(*transfer(steps, student, index), student, index)
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
def test_a_teacher_that_spells_spaces_as_sentencepiece_does_is_read_the_same(space):
    steps = [(f"{space}cl", {f"{space}cl": 0.7, "cl": 0.1, f"{space}in": 0.2}),
             ("ips", {"ips": 0.6, f"{space}in": 0.3})]
    ids, probs = transfer(steps, ["▁cl", "ips"], ["▁cl", "ips", "▁in", "in", "cl"], k=3)
    assert ids.tolist() == [[0, 2, 4], [1, 2, 0]]
    assert np.allclose(probs, [[0.7, 0.2, 0.1], [0.6, 0.3, 0]])

def test_other_alignments_and_tokens_that_were_not_reported_give_one_hot_targets():
    steps = [(" $", {" $": 0.5, " 1": 0.5}), ("12", {"12": 0.9}), ("ab", {"ab": 0.9}),
             ("c", {"d": 0.7}), ("d", {"d": 0.0, "c": 1.0}), ("e", {})]
    vocab = {"▁$12": 3, "a": 4, "b": 5, "c": 6, "d": 7, "▁1": 8, "12": 9, "ab": 10, "e": 11}
    ids, probs = transfer(steps, ["▁$12", "a", "b", "c", "d", "e"], vocab)
    assert ids[:, 0].tolist() == [3, 4, 5, 6, 7, 11]
    assert (probs[:, 0] == 1).all() and not probs[:, 1:].any()

def test_a_space_that_is_a_token_of_its_own_leaves_its_word_one_hot():
    student = [WORD_BOUNDARY, "a"]
    assert one_to_one([" a"], student, align([" a"], student)) == [None, None]

def test_k_keeps_the_students_token_and_the_most_probable_others():
    candidates = {" a": 0.02, " b": 0.5, " c": 0.3, " d": 0.1}
    ids, probs = transfer([(" a", candidates)], ["▁a"], ["▁a", "▁b", "▁c", "▁d"], k=2)
    assert ids.tolist() == [[1, 0]] and np.allclose(probs, [[0.5, 0.02]])

def test_sums_over_one_from_rounding_are_scaled_and_impossible_probabilities_are_refused():
    _, probs = transfer([("a", {"a": 0.6, "b": 0.4005})], ["a"], ["a", "b"])
    assert 0.999 < probs.sum() <= 1
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="'b' has probability"):
            transfer([("a", {"a": 0.5, "b": wrong})], ["a"], ["a", "b"])

# --- the command ---

def test_the_command_draws_both_tokenizations(run, real):
    text = "She sold 48/2 = 24.\nWe paid $12."
    done = run("align.py", text, "--student", real / "tokenizers" / "t5")
    assert done.returncode == 0, done.stderr
    top, bottom = done.stdout.splitlines()[:2]
    assert top.index("·24") == bottom.index("▁24") and "/|2" in top and "/2" in bottom

def test_one_to_one_columns_are_green_and_the_others_yellow():
    top, bottom = draw([" 24", " $", "12"], ["▁24", "▁$12"], colour=True).splitlines()
    assert top == "teacher  \033[32m·24\033[0m \033[33m·$|12\033[0m "
    assert bottom == "student  \033[32m▁24\033[0m \033[33m▁$12 \033[0m "

def test_the_command_says_what_it_lacks_and_how_to_get_it(monkeypatch, real, tmp_path):
    def message(*arguments):
        monkeypatch.setattr(sys, "argv", ["align.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            al.main()
        return stopped.value.code

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    student = "--student", real / "tokenizers" / "t5"
    assert "`python t5.py google/flan-t5-small hi` downloads one" in message("text")
    assert "nowhere" in message("text", "--student", "nowhere")
    assert "no_base" in message("text", "--teacher", "no_base", *student)
    assert "no visible character" in message(" \n", *student)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    without = message("text", *student)
    assert "p50k_base" in without and "spiece.model" not in without
