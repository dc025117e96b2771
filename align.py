"""Align a teacher's tokens with a student's, and map the teacher's distributions onto the student.

Teacher (code-davinci-002: p50k_base) and student (T5: SentencePiece) split the same text
differently. The paper (Aligning tokenizers by dynamic programming) aligns the two sequences
s = s_1..s_L (teacher) and t = t_1..t_N (student) by the recursion

    f(i, j) = min(f(i-1, j), f(i, j-1), f(i-1, j-1)) + c(s_i, t_j),    f(1, 1) = c(s_1, t_1)

If the cheapest path from (1, 1) to (L, N) visits (i, j), then s_i and t_j are aligned.

Why not the edit distance of the two strings, as in the paper? It ignores where they occur in the
text. Let the teacher write `a`, ` $`, `12` and the student `▁a`, `▁$12` (spaces do not count). If
` $` and `12` both go to `▁$12`, as they should, they cost 2 + 1. If ` $` goes to `▁a` they cost
1 + 1, so the wrong path is cheaper. In `2`, `+2=4` against `▁2`, `+`, `2`, `=4`, the second `2` of
the student even goes to the first `2` of the teacher.

Here the cost is minus the number of characters *of the text* that both tokens write:

    c(s_i, t_j) = -|characters of s_i that are also characters of t_j|

Every shared character belongs to exactly one s_i and one t_j. Read from left to right, these pairs
(i, j) never step back, so one path can visit them all, and only such a path collects every
character. It may also pass through pairs without overlap at no cost; preferring the diagonal on
ties selects the shortest such path.

Both token sequences are first normalized much as T5 normalizes text: Unicode NFKC, and every run of
whitespace, including newlines, as one space. If the texts still differ (an unknown character, or
one that is split over several tokens), only the characters that a sequence matcher finds in both
count, and tokens between them are paired off along the diagonal.

This file needs only numpy and knows nothing of models or training.
Letters: L teacher tokens, N student tokens, k entries of a target row. Code counts from 0.

    python align.py "She sold 48/2 = 24 clips."
    python align.py data/toy/teacher.jsonl.gz --student data/toy/tuned-1M    no download
"""

import argparse
import functools
import gzip
import json
import math
import os
import re
import shutil
import sys
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

WORD_BOUNDARY = "▁"  # SentencePiece's space
# How servers write a token that is part of a character: bytes:\xe2\x80 (OpenAI, at times with two
# backslashes and after a space) or <0xE2> (SentencePiece).
BYTES = re.compile(r"bytes:( ?)((?:\\+x[0-9a-fA-F]{2})+)|<0x([0-9a-fA-F]{2})>")

# --- the recursion ---

def align(teacher, student):
    """Align by the recursion above: O(L N). Training runs its fast twin, align_batch.

    teacher, student: the two token lists of one text, with spaces as " " or "▁".
    Return for each student token the list of teacher tokens (their indices) aligned with it."""
    L, N = len(teacher), len(student)
    if not L or not N:
        return [[] for _ in student]
    c = np.zeros((L, N), dtype=int)
    np.add.at(c, shared_characters(teacher, student), -1)  # -= 1 at (i, j) per shared character
    f = [[math.inf] * (N + 1) for _ in range(L + 1)]
    f[0][0] = 0
    for i in range(1, L + 1):
        for j in range(1, N + 1):
            f[i][j] = min(f[i - 1][j], f[i][j - 1], f[i - 1][j - 1]) + int(c[i - 1, j - 1])

    # Trace the path back from (L, N). Row 0 and column 0 are infinite, so it leaves through (1, 1).
    aligned = [[] for _ in student]
    i, j = L, N
    while i > 0:
        aligned[j - 1].insert(0, i - 1)
        predecessors = (i - 1, j - 1), (i - 1, j), (i, j - 1)
        i, j = min(predecessors, key=lambda cell: f[cell[0]][cell[1]])  # ties: the diagonal
    return aligned

def shared_characters(teacher, student):
    """Return the teacher token and the student token of each character that both write."""
    s_text, s_owner = char_to_token(teacher)
    t_text, t_owner = char_to_token(student)
    if s_text != t_text:
        blocks = matching_blocks(s_text, t_text)
        s_owner = np.concatenate([s_owner[a : a + size] for a, _, size in blocks])
        t_owner = np.concatenate([t_owner[b : b + size] for _, b, size in blocks])
    return s_owner, t_owner

def char_to_token(tokens):
    """Return the text that tokens write, as T5 sees it, and the token index of each character.

    Spaces at the start, at the end and after another space do not count. So in ".\\n", " He", which
    write ". " and " He", the first token owns the space."""
    text, owner, last = [], [], " "  # as if a space preceded the text
    for i, token in enumerate(tokens):
        for char in normalize(token):
            if char != " " or last != " ":
                text.append(char)
                owner.append(i)
            last = char
    text = "".join(text).rstrip(" ")
    return text, np.array(owner[: len(text)], dtype=int)

@functools.lru_cache(maxsize=2**17)
def normalize(token):
    """Return the characters that a token adds to the text: NFKC, runs of whitespace as one space.

    A token that holds only part of a UTF-8 character (also written as U+FFFD) adds nothing."""
    if match := BYTES.fullmatch(token):
        space, escaped, byte = match.groups()
        raw = bytes.fromhex(byte or re.sub(r"\\+x", "", escaped))
        token = (space or "") + raw.decode("utf-8", "ignore")
    token = token.replace(WORD_BOUNDARY, " ").replace("\ufffd", "")
    text = unicodedata.normalize("NFKC", token)
    inner = " ".join(text.split())
    start, end = " " * text[:1].isspace(), " " * text[-1:].isspace()
    return start + inner + end if inner else start

def matching_blocks(s, t):
    """Return (a, b, size) for the parts s[a : a + size] = t[b : b + size] of two similar texts. The
    sequence matcher, in quadratic time, sees only what is between the first and last difference."""
    before = len(os.path.commonprefix([s, t]))
    after = len(os.path.commonprefix([s[before:][::-1], t[before:][::-1]]))
    s_end, t_end = len(s) - after, len(t) - after
    matcher = SequenceMatcher(None, s[before:s_end], t[before:t_end], autojunk=False)
    between = [(a + before, b + before, size) for a, b, size in matcher.get_matching_blocks()]
    return [(0, 0, before), *between, (s_end, t_end, after)]

# --- its fast twin ---

def align_batch(pairs):
    """Return align(teacher, student) for each pair by a closed form of the recursion, which takes
    linear time if the two texts are equal.

    A character of both texts puts the cell (i, j) of its two tokens on the best path. Let (i', j')
    be the cell of the next such character. Cells in between share nothing, so the traceback leaves
    (i', j') along the diagonal until it meets column j or row i, and follows that to (i, j):

            j  .  j'          j  .  .  j'
        i   o             i   o  o  o
        .   o             i'           o
        .      o
        i'        o

    So for j <= n < j' student token n is aligned up to the teacher token max(i, i' - (j' - n)). The
    first one is that of the first cell in column n or, if n > j, this same token."""
    return [align_in_closed_form(teacher, student) if teacher and student else [[] for _ in student]
            for teacher, student in pairs]

def align_in_closed_form(teacher, student):
    """Align one pair of non-empty token lists as align_batch describes."""
    L, N = len(teacher), len(student)
    s_owner, t_owner = shared_characters(teacher, student)
    # All cells: the path's start, the shared characters, the path's end, and one beyond it.
    i = np.concatenate([[0], s_owner, [L - 1, L]])
    j = np.concatenate([[0], t_owner, [N - 1, N]])
    n = np.arange(N)
    start = np.searchsorted(j, n, "left")
    end = np.searchsorted(j, n, "right")  # cells start..end - 1 are in column n, if any
    last = np.maximum(i[end - 1], i[end] - (j[end] - n))  # end - 1 is (i, j), end is (i', j')
    first = np.where(start < end, i[start], last)
    indices = list(range(L))
    return [indices[a : b + 1] for a, b in zip(first.tolist(), last.tolist())]

# --- the teacher's distributions ---

def one_to_one(teacher, student, aligned):
    """Return the teacher token that each student token is one-to-one with: its index, or None.

    Two tokens are one-to-one if they write the same visible characters and no other aligned teacher
    token writes any of them. A newline does not count: T5 merges it into the next token as a space,
    and many teachers merge it into the token before, as in ".\\n". A space counts if T5 made it a
    token of its own: then " 24" belongs to both "▁" and "24"."""
    partners = []
    for piece, indices in zip(student, aligned):
        new_word = piece.startswith(WORD_BOUNDARY)
        if new_word and len(indices) > 1 and normalize(teacher[indices[0]]).endswith(" "):
            indices = indices[1:]  # ".\n" shares only the space of "▁He"
        visible = [i for i in indices if normalize(teacher[i]).strip()]
        word = normalize(piece).strip()
        found = None
        if len(visible) == 1 and word and word == normalize(teacher[visible[0]]).strip():
            found = visible[0]
            split_space = starts_word(teacher[found]) and not new_word
            if split_space or found in partners[-1:]:  # or it has a partner, if the texts differ
                found = None
        elif len(indices) == 1 and teacher[indices[0]] == piece:
            found = indices[0]  # a lone "▁", if the teacher's tokens are the student's pieces
        partners.append(found)
    return partners

def transfer(steps, student, vocab, k=5):
    """Map the teacher's distributions onto the student's tokens: one target row per student token.

    steps: for each teacher token (token, {candidate: probability}); the dict may be empty.
    student: the student's tokens of the same text.
    vocab: the student's pieces in the order of their ids, or {piece: id}.

    A one-to-one student token takes its partner's distribution. Each candidate goes to the student
    token that spells the same (see spelling), where probabilities add up; others are dropped. Every
    other student token gets a one-hot target, as does one whose partner reports no probability.
    Return ids (N, k) int32 and probs (N, k) float32, most probable first, unused slots 0. Each row
    contains the student's own token and sums to at most 1. Raises ValueError if a candidate's
    probability is outside [0, 1], rounding aside."""
    index = vocab if isinstance(vocab, dict) else {piece: i for i, piece in enumerate(vocab)}
    teacher = [token for token, _ in steps]
    aligned = align_batch([(teacher, student)])[0]
    ids = np.zeros((len(student), k), dtype=np.int32)
    probs = np.zeros((len(student), k), dtype=np.float32)
    for j, (piece, i) in enumerate(zip(student, one_to_one(teacher, student, aligned))):
        own = index.get(piece, index.get("<unk>", 2))  # 2 in every T5
        target = {own: 1.0}
        if i is not None and steps[i][1].get(teacher[i], 0) > 0:
            # After a newline the teacher's "She" has no space, but the student's "▁She" does.
            add_space = piece.startswith(WORD_BOUNDARY) and not starts_word(teacher[i])
            target = {own: 0.0}
            for candidate, p in steps[i][1].items():
                if not 0 <= p <= 1.001:
                    raise ValueError(f"at {teacher[i]!r}, {candidate!r} has probability {p}")
                to = own if candidate == teacher[i] else index.get(spelling(candidate, add_space))
                if to is not None:
                    target[to] = target.get(to, 0.0) + p
        others = sorted((to for to in target if to != own), key=target.get, reverse=True)
        kept = sorted([own, *others[: k - 1]], key=target.get, reverse=True)  # own is never cut
        total = max(1.0, sum(map(target.get, kept)))  # rounding can lift the sum above 1
        ids[j, : len(kept)] = kept
        probs[j, : len(kept)] = [target[to] / total for to in kept]
    probs[probs.sum(axis=1) > 1] *= 1 - 2**-20  # and so can the rounding to float32
    return ids, probs

@functools.lru_cache(maxsize=2**18)
def spelling(candidate, add_space):
    """Spell a candidate as a student piece: " 24" is "▁24", and with add_space so is "24".
    Whitespace after it is dropped. A single space is "▁"; other whitespace is "" (no piece)."""
    word = normalize(candidate).strip().replace(" ", WORD_BOUNDARY)
    if not word:
        return WORD_BOUNDARY if candidate in (" ", WORD_BOUNDARY) else ""
    return WORD_BOUNDARY + word if add_space or starts_word(candidate) else word

def starts_word(token):
    """Return whether a token begins with a space, in either spelling."""
    return normalize(token).startswith(" ")

# --- the command ---

def draw(teacher, student, colour, width=100):
    """Format both tokenizations as two lines, a column per group of aligned tokens. Green ones are
    one-to-one: the student takes the teacher's distribution. Others are yellow."""
    aligned = align(teacher, student)
    partners = one_to_one(teacher, student, aligned)
    columns, last = [], -1  # each column: ([teacher indices], [student indices])
    for j, indices in enumerate(aligned):
        if not columns or indices[0] > last:
            columns.append(([], []))
        columns[-1][0].extend(i for i in indices if i > last)
        columns[-1][1].append(j)
        last = indices[-1]
    lines, used = [], width
    for s, t in columns:
        above, above_size = show_tokens([teacher[i] for i in s])
        below, below_size = show_tokens([student[j] for j in t])
        size = max(above_size, below_size)
        if used + size + 1 > width:
            lines += ["teacher  ", "student  ", ""]
            used = len("teacher  ")
        green = all(partners[j] is not None for j in t)
        start, end = (f"\033[{32 if green else 33}m", "\033[0m") if colour else ("", "")
        lines[-3] += start + above + " " * (size - above_size) + end + " "
        lines[-2] += start + below + " " * (size - below_size) + end + " "
        used += size + 1
    return "\n".join(lines[:-1])

def show_tokens(tokens):
    """Return tokens as one text, control characters escaped, and the terminal columns it takes:
    two per wide character, such as a Chinese one."""
    text = "|".join(tokens).replace(" ", "·").replace("\n", "⏎")
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text, sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)

def main():
    """Draw how two tokenizers split a text, and which tokens are aligned."""
    import sentencepiece
    import tiktoken

    parser = argparse.ArgumentParser(description="Draw the alignment of two tokenizations.")
    add = parser.add_argument
    add("text", help="text, or a file of teacher records, whose first one is drawn")
    add("--teacher", default="p50k_base", help="tiktoken encoding of a text (default: %(default)s)")
    add("--student", help="folder with T5's spiece.model (default: one in the Hugging Face cache)")
    args = parser.parse_args()
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cached = home.glob("hub/*t5*/snapshots/*/spiece.model")
    path = Path(args.student or next(cached, "spiece.model"))
    path = path / "spiece.model" if path.is_dir() else path
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {path}: {error}; `python t5.py google/flan-t5-small hi` downloads one")
    is_file = args.text.endswith((".jsonl", ".jsonl.gz"))
    try:
        if is_file:
            with (gzip.open if args.text.endswith(".gz") else open)(args.text, "rt") as lines:
                teacher = list(map(str, json.loads(next(lines))["tokens"]))
        else:
            encoding = tiktoken.get_encoding(args.teacher)
            ids = encoding.encode(args.text, disallowed_special=())
            teacher = [encoding.decode([i]) for i in ids]
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        what = f"{args.text}: no teacher record" if is_file else f"--teacher {args.teacher}"
        sys.exit(f"error: {what} ({error!r:.300}). An encoding is downloaded once, into the folder "
                 "named by TIKTOKEN_CACHE_DIR")
    student = pieces.encode("".join(teacher), out_type=str)
    if not teacher or not student:
        sys.exit("error: the text has no visible character; use another one")
    print(draw(teacher, student, sys.stdout.isatty(), shutil.get_terminal_size().columns))

if __name__ == "__main__":
    main()
