"""align.py against character offsets on real records, against a brute search on small ones, and on any text."""

import random

import numpy as np
import pytest
import sentencepiece
import tiktoken

from align import WORD_BOUNDARY as MARK, align, align_batch, one_to_one, transfer


@pytest.fixture(scope="module")
def pieces(real):
    """The real T5 vocabulary."""
    return sentencepiece.SentencePieceProcessor(model_file=str(real / "tokenizers" / "t5" / "spiece.model"))


@pytest.fixture(scope="module")
def p50k(real):
    """The teacher's real encoding."""
    return tiktoken.get_encoding("p50k_base")


@pytest.fixture(scope="module")
def records(real):
    """The 40 real code-davinci-002 solutions as lists of steps."""
    import json, math
    out = []
    for line in (real / "codex" / "gsm8k_train_0.jsonl").read_text().splitlines():
        r = json.loads(line)
        out.append([(t, {c: math.exp(p) for c, p in top.items()}) for t, top in zip(r["tokens"], r["top_logprobs"])])
    return out


def cut(text, p50k, pieces):
    """A text's two tokenizations."""
    ids = p50k.encode(text, disallowed_special=())
    return [p50k.decode([i]) for i in ids], pieces.encode(text, out_type=str)


def visible_spans(tokens):
    """For each token the range of visible characters that it writes, counted from the text's start."""
    spans, end = [], 0
    for token in tokens:
        start, end = end, end + len("".join(token.replace(MARK, " ").split()))
        spans.append((start, end))
    return spans


def overlapping(span, spans):
    """The indices of the spans that share a character with span."""
    return [i for i, other in enumerate(spans) if max(span[0], other[0]) < min(span[1], other[1])]


def test_every_token_of_the_real_records_gets_the_teacher_tokens_at_its_characters(records, pieces):
    compared = 0
    for steps in records:
        teacher = [token for token, _ in steps]
        student = pieces.encode("".join(teacher), out_type=str)
        spans = visible_spans(teacher)
        for span, found in zip(visible_spans(student), align(teacher, student)):
            if span[0] < span[1]:  # not a space alone
                assert [i for i in found if spans[i][0] < spans[i][1]] == overlapping(span, spans)
                compared += 1
    assert compared > 1700


def test_tokens_with_one_partner_take_its_distribution(records, pieces):
    index = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    have_partner = take_distribution = 0
    for steps in records:
        teacher = [token for token, _ in steps]
        student = pieces.encode("".join(teacher), out_type=str)
        ids, probs = transfer(steps, student, index)
        s, t = visible_spans(teacher), visible_spans(student)
        for j, span in enumerate(t):
            partners = overlapping(span, s)
            if len(partners) == 1 and overlapping(s[partners[0]], t) == [j]:
                have_partner += 1
                expected = dict(steps[partners[0]][1])[teacher[partners[0]]]
                place = ids[j].tolist().index(index[student[j]])
                take_distribution += abs(probs[j, place] - expected) < 2e-3
    assert have_partner > 1600 and take_distribution / have_partner > 0.99


def test_targets_of_the_real_records_are_sub_distributions_with_the_students_token(records, pieces):
    index = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    for steps in records:
        student = pieces.encode("".join(token for token, _ in steps), out_type=str)
        ids, probs = transfer(steps, student, index)
        assert ids.shape == probs.shape == (len(student), 5) and ids.dtype == np.int32 and probs.dtype == np.float32
        assert (probs.sum(axis=1) <= 1).all() and (probs >= 0).all() and (np.diff(probs, axis=1) <= 0).all()
        for piece, row, p in zip(student, ids, probs):
            assert index[piece] in row[p > 0] and len(set(row[p > 0])) == (p > 0).sum()


def test_the_first_and_the_last_token_of_a_line_take_the_distribution():
    steps = [("No", {"No": 1.0}), (".", {".": 0.8, "!": 0.1, "\n": 0.1}), ("\n", {"\n": 1.0}),
             ("We", {"We": 0.6, "I": 0.3, " We": 0.1})]  # fmt: skip
    vocab = ["<pad>", "</s>", "<unk>", "▁No", ".", "▁We", "▁I", "!", "We"]
    ids, probs = transfer(steps, ["▁No", ".", "▁We"], vocab, k=3)
    assert ids.tolist() == [[3, 0, 0], [4, 7, 0], [5, 6, 0]]
    assert np.allclose(probs, [[1, 0, 0], [0.8, 0.1, 0], [0.7, 0.3, 0]])


def test_a_teacher_that_spells_spaces_as_sentencepiece_does_is_read_the_same():
    for space in (" ", "▁"):
        steps = [(f"{space}cl", {f"{space}cl": 0.7, "cl": 0.1, f"{space}in": 0.2}), ("ips", {"ips": 0.6, f"{space}in": 0.3})]
        ids, probs = transfer(steps, ["▁cl", "ips"], ["▁cl", "ips", "▁in", "in", "cl"], k=3)
        assert ids.tolist() == [[0, 2, 4], [1, 2, 0]] and np.allclose(probs, [[0.7, 0.2, 0.1], [0.6, 0.3, 0]])


def test_what_has_no_token_is_aligned_with_nothing():
    pairs = [(["a", " b"], ["▁a", "▁b"]), ([], ["▁a", "b"]), (["x"], []), ([], [])]
    assert align_batch(pairs) == [align(*pair) for pair in pairs] == [[[0], [1]], [[], []], [], []]
    assert align_batch([]) == []


def test_other_alignments_and_unlisted_tokens_give_one_hot_targets():
    steps = [(" $", {" $": 0.5, " 1": 0.5}), ("12", {"12": 0.9}), ("ab", {"ab": 0.9}), ("c", {"d": 0.7})]
    vocab = {"▁$12": 3, "a": 4, "b": 5, "c": 6, "d": 7, "▁1": 8, "12": 9, "ab": 10}
    ids, probs = transfer(steps, ["▁$12", "a", "b", "c"], vocab)
    assert ids[:, 0].tolist() == [3, 4, 5, 6] and (probs[:, 0] == 1).all() and not probs[:, 1:].any()


def test_k_keeps_the_students_token_and_the_likeliest_others():
    candidates = {" a": 0.02, " b": 0.5, " c": 0.3, " d": 0.1}
    ids, probs = transfer([(" a", candidates)], ["▁a"], ["▁a", "▁b", "▁c", "▁d"], k=2)
    assert ids.tolist() == [[1, 0]] and np.allclose(probs, [[0.5, 0.02]])


def test_sums_over_one_from_rounding_are_scaled_and_impossible_probabilities_refused():
    _, probs = transfer([("a", {"a": 0.6, "b": 0.4005})], ["a"], ["a", "b"])
    assert 0.999 < probs.sum() <= 1
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="'b' has probability"):
            transfer([("a", {"a": 0.5, "b": wrong})], ["a"], ["a", "b"])


def test_the_papers_failures_come_out_right():
    assert align(["s", " $", "12"], ["s", "▁$12"]) == [[0], [1, 2]]
    assert align(["We", ".", "\n", "We"], ["▁We", ".", "▁We"]) == [[0], [1], [2, 3]]
    assert align(["1", "1", "11"], ["11", "1", "1"]) == [[0, 1], [2], [2]]
    assert align(["12", "3"], ["1", "23"]) == [[0], [0, 1]]


def cost_of(path, teacher, student):
    """A path's cost by the definition, counting characters one by one."""
    owner = lambda tokens: [i for i, token in enumerate(tokens) for _ in token]
    both = list(zip(owner(teacher), owner(student)))
    return -sum(both.count(cell) for cell in path)


def all_paths(i, j):
    """Every monotone path from (0, 0) to (i, j)."""
    if (i, j) == (0, 0):
        yield [(0, 0)]
    for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if a >= 0 and b >= 0:
            for path in all_paths(a, b):
                yield path + [(i, j)]


def test_no_path_is_cheaper_and_no_equal_one_shorter():
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice("12") for _ in range(7))
        cuts = [sorted({0, 7, *rng.sample(range(1, 7), rng.randint(0, 4))}) for _ in range(2)]
        teacher, student = ([text[a:b] for a, b in zip(c, c[1:])] for c in cuts)
        found = [(i, j) for j, indices in enumerate(align(teacher, student)) for i in indices]
        paths = list(all_paths(len(teacher) - 1, len(student) - 1))
        best = min((cost_of(path, teacher, student), len(path)) for path in paths)
        assert (cost_of(found, teacher, student), len(found)) == best == (-7, len(found))


def random_texts(count):
    """Texts of every kind of trouble: emoji, combining marks, right-to-left, NUL, white space, private characters."""
    rng = random.Random(1)
    alphabet = ["a", "b", "1", "2", " ", "\n", "\t", "$", "é", "e\u0301", "½", "…", "🎉", "\x00", "ש", "\u200b", MARK, "\ue000"]
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 30))) for _ in range(count)]


def test_on_any_text_the_sets_are_whole_contiguous_and_in_order(p50k, pieces):
    for text in random_texts(500):
        teacher, student = cut(text, p50k, pieces)
        sets = align(teacher, student)
        assert len(sets) == len(student)
        if student:
            assert sets[0][0] == 0 and sets[-1][-1] == len(teacher) - 1
        for indices in sets:
            assert indices and indices == list(range(indices[0], indices[-1] + 1))
        for one, two in zip(sets, sets[1:]):
            assert one[-1] <= two[0] <= one[-1] + 1


def test_the_batched_form_equals_the_recursion(p50k, pieces, records):
    pairs = [cut(text, p50k, pieces) for text in random_texts(300)]
    pairs += [([t for t, _ in steps], pieces.encode("".join(t for t, _ in steps), out_type=str)) for steps in records]
    pairs += [([], []), ([], ["▁a"]), (["a"], []), (["a"] * 40, ["aa"] * 20)]
    expected = [align(*pair) for pair in pairs]
    assert align_batch(pairs) == expected
    assert align_batch([]) == []


def test_a_space_that_is_a_token_of_its_own_leaves_its_word_one_hot():
    assert one_to_one([" a"], [MARK, "a"], align([" a"], [MARK, "a"])) == [None, None]


def test_the_command_draws_both_tokenizations(run, real):
    done = run("align.py", "She sold 48/2 = 24.\nWe paid $12.", "--student", real / "tokenizers" / "t5")
    assert done.returncode == 0, done.stderr
    top, bottom = done.stdout.splitlines()[:2]
    assert top.index("·24") == bottom.index("▁24") and "/|2" in top and "/2" in bottom


def test_the_command_names_what_it_lacks(run, tmp_path):
    done = run("align.py", "text", "--student", "google/flan-t5-small", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("space", [" ", ""])
@pytest.mark.parametrize("backslash", ["\\", "\\\\"])  # the second is the real records'
def test_parts_of_a_character_in_any_spelling_cost_no_other_token_its_partner(p50k, pieces, space, backslash):
    def numbers(text):
        teacher, student = [], pieces.encode(text, out_type=str)
        for token in map(p50k.decode_single_token_bytes, p50k.encode(text)):
            part = "bytes:" + " " * token.startswith(b" ") + "".join(f"{backslash}x{byte:02x}" for byte in token.strip())
            teacher.append(part if "\ufffd" in token.decode("utf-8", "replace") else token.decode())
        partners = [teacher[i].strip() for i in one_to_one(teacher, student, align(teacher, student)) if i is not None]
        return [token for token in partners if token.isdigit()], any(token.startswith("bytes:") for token in teacher)

    text = f"So 20{space}÷{space}5 = 4 and 60{space}÷{space}3 = 20 in all"
    assert numbers(text) == (numbers(text.replace("÷", "*"))[0], True) and len(numbers(text)[0]) > 3
