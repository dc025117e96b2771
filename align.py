"""Aligning a teacher's tokens with the student's, and carrying the teacher's distributions over.

The teacher (p50k_base for code-davinci-002) and the student (T5's SentencePiece) cut the same text differently. Section
4.1 of the paper aligns the two cuts by dynamic programming over s = s_1..s_L (teacher) and t = t_1..t_N (student):

    f(i, j) = min(f(i-1, j), f(i, j-1), f(i-1, j-1)) + c(s_i, t_j)

The cheapest path from (1, 1) to (L, N) visits (i, j) where s_i belongs to t_j: one to one on a diagonal step, many to
one or one to many on the others. Everything hangs on the cost c and on how ties are broken.

Why not the edit distance of the two strings? It looks at two tokens without their place in the text. Where the teacher
writes `a`, `$`, `12` and the student `▁a`, `▁$12`, the costs of `$` and `12` with `▁$12` are 3 + 2, but of `$` with
`▁a` and `12` with `▁$12` 2 + 2: the wrong path is cheaper. Among the many equal numbers of a math solution it cannot
say which `12` is which, either.

Here the cost is, up to its sign, the number of characters *of the text* that both tokens write:

    c(s_i, t_j) = -(characters at the same place of the text in both s_i and t_j)

Each character is written by one s_i and one t_j, so no path can gather more than the whole text, and only the path
through every pair that shares a character gathers all of it: that path is the alignment. Pairs that share nothing cost
0, so a detour through them is a tie; ties go to the diagonal, the shortest way.

The place in the text is that of the text as T5 sees it: Unicode in NFKC form, every run of white space, newlines too,
one space. Where the two texts still differ (a character that the vocabulary lacks, half of a UTF-8 sequence), only
the characters that a sequence matcher finds in both count, and the recursion finds the others a place between their
neighbours: every student token gets teacher tokens, contiguous, and in order.

This file needs numpy alone. It knows nothing of models or training.
Letters: L teacher tokens, N student tokens, P pairs of sequences, k entries of a target row.

    python align.py "She sold 48/2 = 24 clips."
"""

import argparse
import functools
import itertools
import math
import os
import re
import shutil
import sys
import unicodedata
from difflib import SequenceMatcher

import numpy as np

MARK = "▁"  # SentencePiece's space
BYTES = re.compile(r"bytes:( ?)(?:\\+x[0-9a-fA-F]{2})+")  # how servers write a token that is a part of a UTF-8 sequence: bytes:\xe2


def align(teacher, student):
    """The paper's recursion, as written above.

    teacher, student: the two token lists of one text, spaces as " " or "▁".
    Returns for each student token the list of teacher tokens (their indices) aligned with it.
    """
    L, N = len(teacher), len(student)
    if not L or not N:
        return [[] for _ in student]
    c = (-shared_characters([(teacher, student)])[:, 0]).tolist()  # (L, N)
    f = [[math.inf] * (N + 1) for _ in range(L + 1)]
    f[0][0] = 0
    for i in range(1, L + 1):
        for j in range(1, N + 1):
            f[i][j] = min(f[i - 1][j], f[i][j - 1], f[i - 1][j - 1]) + c[i - 1][j - 1]

    aligned = [[] for _ in student]
    i, j = L, N
    while i > 0:  # the first row and column are infinite: the path leaves through (1, 1)
        aligned[j - 1].append(i - 1)
        ways = (i - 1, j - 1), (i - 1, j), (i, j - 1)
        i, j = min(ways, key=lambda way: f[way[0]][way[1]])  # of equals the first, the diagonal
    return [indices[::-1] for indices in aligned]


def align_batch(pairs, cells=2**22):
    """`align` on each (teacher, student) of pairs, many at a time; cells bounds the working memory (about 20 bytes each).

    A row of f at once: with C(j) = c(i, 1) + .. + c(i, j), the recursion within a row unrolls to
        f(i, j) = C(j) + min over j' <= j of [min(f(i-1, j'), f(i-1, j'-1)) - C(j'-1)],
    a running minimum, and all pairs share the loop over i. The way back is walked by all pairs together, too.
    """
    order = sorted((p for p in range(len(pairs)) if all(pairs[p])), key=lambda p: len(pairs[p][0]))
    result = [None if all(pair) else [[] for _ in pair[1]] for pair in pairs]
    while order:
        size = max(1, cells // ((len(pairs[order[-1]][0]) + 1) * (max(len(pairs[p][1]) for p in order[-96:]) + 1)))
        chosen = order[-min(size, 96) :]  # the longest first; 96 pairs fill numpy's loops and stay in the cache
        del order[-len(chosen) :]
        for p, aligned in zip(chosen, _align_similar([pairs[p] for p in chosen])):
            result[p] = aligned
    return result


def _align_similar(pairs):
    lengths = np.array([(len(teacher), len(student)) for teacher, student in pairs])  # (P, 2)
    cost = -shared_characters(pairs)  # (L, P, N)
    L, P, N = cost.shape
    C = np.zeros((L, P, N + 1), dtype=np.int32)
    np.cumsum(cost, axis=2, out=C[:, :, 1:])
    f = np.full((L + 1, P, N + 1), 2**30, dtype=np.int32)  # as good as infinite
    f[0, :, 0] = 0
    for i in range(L):
        best = np.minimum(f[i, :, 1:], f[i, :, :-1]) - C[i, :, :-1]
        f[i + 1, :, 1:] = C[i, :, 1:] + np.minimum.accumulate(best, axis=1)

    steps = []  # of the paths, the last first
    p, (i, j) = np.arange(P), lengths.T
    flat, row, place = f.reshape(-1), P * (N + 1), (i * P + p) * (N + 1) + j  # f(i, j) of pair p is flat[place]
    while len(place):
        steps.append(place)
        diagonal, up, left = flat[place - row - 1], flat[place - row], flat[place - 1]
        to_left = (left < diagonal) & (left < up)  # of equals the diagonal
        place = place - np.where(to_left, 1, np.where(up < diagonal, row, row + 1))
        place = place[place >= row]
    i, p, j = np.unravel_index(np.concatenate(steps), (L + 1, P, N + 1))
    first, last = np.zeros((2, P, N), dtype=int)  # the path's teacher tokens at each student token
    last[p[::-1], j[::-1] - 1] = i[::-1]  # of several values for a place the last one stays
    first[p, j - 1] = i - 1
    numbers = list(range(L))
    spans = zip(first.tolist(), last.tolist(), lengths[:, 1])
    return [[numbers[a:b] for a, b in zip(start[:n], stop[:n])] for start, stop, n in spans]


def shared_characters(pairs):
    """How many characters of the text both s_i and t_j write: (L, P, N) for P pairs, 0 beyond a pair's own L and N."""
    L, N = (max(len(pair[side]) for pair in pairs) for side in (0, 1))
    cells = []
    for p, (teacher, student) in enumerate(pairs):
        (s_text, s_owner), (t_text, t_owner) = written(teacher), written(student)
        if s_text != t_text:
            blocks = matching_blocks(s_text, t_text)
            s_owner = np.concatenate([s_owner[a : a + size] for a, _, size in blocks])
            t_owner = np.concatenate([t_owner[b : b + size] for _, b, size in blocks])
        cells.append((s_owner * len(pairs) + p) * N + t_owner)
    counts = np.bincount(np.concatenate(cells), minlength=L * len(pairs) * N).astype(np.int32)
    return counts.reshape(L, len(pairs), N)


def matching_blocks(s, t):
    """The places (a, b, size) where s[a : a + size] and t[b : b + size] are taken as the same part of two similar texts.

    The sequence matcher, which takes quadratic time, sees only what lies between the first and the last difference.
    """
    before = len(os.path.commonprefix([s, t]))
    after = len(os.path.commonprefix([s[before:][::-1], t[before:][::-1]]))
    s_end, t_end = len(s) - after, len(t) - after
    between = SequenceMatcher(None, s[before:s_end], t[before:t_end], autojunk=False).get_matching_blocks()
    return [(0, 0, before), *((a + before, b + before, size) for a, b, size in between), (s_end, t_end, after)]


def written(tokens):
    """The text that tokens write, as T5 sees it, and for each of its characters the index of the token."""
    parts = list(map(normalize, tokens))
    text = " " + "".join(parts)
    space = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32) == ord(" ")
    owner = np.repeat(np.arange(len(parts)), list(map(len, parts)))
    owner = owner[~(space[1:] & space[:-1])]  # of two spaces in a row the first counts, and none at the start
    text = " ".join(text.split())
    return text, owner[: len(text)]


@functools.lru_cache(maxsize=2**17)
def normalize(token):
    """NFKC, with every run of white space, SentencePiece's mark included, as one space. A part of a UTF-8 sequence is no
    character."""
    if part := BYTES.fullmatch(token):
        return part[1]
    text = unicodedata.normalize("NFKC", token.replace(MARK, " "))
    start, end = " " * text[:1].isspace(), " " * text[-1:].isspace()
    inner = " ".join(text.split())
    return start + inner + end if inner else start


def one_to_one(teacher, student, aligned):
    """For each student token the index of the teacher token that is its only partner and spells the same, else None.

    White space aside: a teacher's newline counts for nothing, since T5 joins it to the next token as a space. What
    remains is one to one just when both tokens write the same characters, unless T5 made the space a token of its own.
    """
    partners = []
    for piece, indices in zip(student, aligned):
        visible = [i for i in indices if normalize(teacher[i]).strip()]
        token = teacher[visible[0]] if len(visible) == 1 else ""
        same = normalize(token).strip() == normalize(piece).strip() != ""
        lone_space = starts_a_word(token) and not piece.startswith(MARK)
        partners.append(visible[0] if same and not lone_space else None)
    return partners


def transfer(steps, student, vocab, k=5, aligned=None):
    """The teacher's distributions over the student's tokens: one target row for each student token (section 4.1).

    steps: for each teacher token (token, {candidate: probability}); a step without candidates has an empty dict.
    student: the student's tokens of the same text. vocab: its pieces in the order of their ids, or {piece: id}.
    aligned: what align(teacher, student) returned, where the caller has it already.

    A student token in one-to-one alignment takes its partner's distribution: each candidate goes to the student token
    with the same string (" " is "▁"), candidates that have none are dropped. Any other student token gets all
    probability on itself, and so does one whose partner's candidates do not hold it with more than a rounded 0.
    Returns ids (N, k) int32 and probs (N, k) float32, likeliest first, unused slots 0. Each row sums to at most 1 and
    holds the student's own token. Raises ValueError where a probability is not one.
    """
    index = vocab if isinstance(vocab, dict) else {piece: i for i, piece in enumerate(vocab)}
    teacher = [token for token, _ in steps]
    if aligned is None:
        (aligned,) = align_batch([(teacher, student)])
    rows = []
    for piece, i in zip(student, one_to_one(teacher, student, aligned)):
        own = index.get(piece, index.get("<unk>", 2))
        row = {own: 1.0}
        if i is not None and steps[i][1].get(teacher[i], 0) > 0:
            line_start = piece.startswith(MARK) and not starts_a_word(teacher[i])  # "She" after a newline is "▁She"
            row = {own: 0.0}
            for candidate, probability in steps[i][1].items():
                if not 0 <= probability <= 1.001:
                    raise ValueError(f"teacher token {i}, {teacher[i]!r}: {candidate!r} has probability {probability}")
                to = own if candidate == teacher[i] else index.get(student_piece(candidate, line_start))
                if to is not None:
                    row[to] = row.get(to, 0.0) + probability
        rows.append((own, row))
    return target_rows(rows, k)


def transfer_aligned(distributions, student, vocab, k=5):
    """What `transfer` returns, where the distributions are over the student's tokens already.

    distributions: {piece: probability} for each student token, from the first on; a student token that has none, or
    one that does not hold it with more than a rounded 0, gets all probability on itself.
    """
    index = vocab if isinstance(vocab, dict) else {piece: i for i, piece in enumerate(vocab)}
    rows = []
    for piece, told in itertools.zip_longest(student, distributions[: len(student)], fillvalue={}):
        own = index.get(piece, index.get("<unk>", 2))
        row = {index[p]: probability for p, probability in told.items() if p in index}
        if not all(0 <= probability <= 1.001 for probability in row.values()):
            raise ValueError(f"at {piece!r} a probability is not between 0 and 1")
        rows.append((own, row if row.get(own, 0) > 0 else {own: 1.0}))
    return target_rows(rows, k)


def target_rows(rows, k):
    """(own id, {id: probability}) for each student token -> the ids and probs that `transfer` describes."""
    ids = np.zeros((len(rows), k), dtype=np.int32)
    probs = np.zeros((len(rows), k), dtype=np.float32)
    for j, (own, row) in enumerate(rows):
        others = sorted((to for to in row if to != own), key=row.get, reverse=True)[: k - 1]
        kept = sorted((own, *others), key=row.get, reverse=True)
        excess = max(1.0, sum(map(row.get, kept)))  # rounded probabilities can sum to a little over 1
        ids[j, : len(kept)] = kept
        probs[j, : len(kept)] = [row[to] / excess for to in kept]
    probs[probs.sum(axis=1) > 1] *= 1 - 2**-20  # and so can they in float32
    return ids, probs


@functools.lru_cache(maxsize=2**18)
def student_piece(candidate, line_start):
    """The student's spelling of a teacher's candidate. At a line's start the teacher's tokens have no space before
    them, but the student's do. White space has no spelling, but for the single space."""
    word = normalize(candidate).strip().replace(" ", MARK)
    if not word:
        return MARK if candidate in (" ", MARK) else ""
    return MARK + word if line_start or starts_a_word(candidate) else word


def starts_a_word(token):
    """Whether a token begins with a space, in either's spelling."""
    return token[:1].isspace() or token.startswith(MARK)


def draw(teacher, student, colour, width=100):
    """Both tokenizations under each other, a column for each group of tokens that belong together; text to print.

    Green columns are one to one, so that the student takes the teacher's distribution; the others are yellow.
    """
    aligned = align(teacher, student)
    partners = one_to_one(teacher, student, aligned)
    columns, last = [], -1  # each ([teacher indices], [student indices])
    for j, indices in enumerate(aligned):
        if columns and indices[0] <= last:
            columns[-1][1].append(j)
            columns[-1][0].extend(i for i in indices if i > last)
        else:
            columns.append((list(indices), [j]))
        last = indices[-1]
    lines, top, bottom, used = [], "", "", 0
    for s, t in columns:
        above = "|".join(teacher[i].replace(" ", "·").replace("\n", "⏎") for i in s)
        below = "|".join(student[j] for j in t)
        wide = max(len(above), len(below))
        green = len(t) == 1 and partners[t[0]] is not None
        start, end = (f"\033[{32 if green else 33}m", "\033[0m") if colour else ("", "")
        if used and used + wide + 1 > width - 9:
            lines += ["teacher  " + top, "student  " + bottom, ""]
            top, bottom, used = "", "", 0
        top += f"{start}{above:<{wide}}{end} "
        bottom += f"{start}{below:<{wide}}{end} "
        used += wide + 1
    return "\n".join([*lines, "teacher  " + top, "student  " + bottom])


def main():
    """python align.py "text": draw how p50k_base and T5 cut a text and which tokens belong together."""
    import sentencepiece
    import tiktoken

    from data.download import InputError, hub_folder

    parser = argparse.ArgumentParser(description="Draw the alignment of two tokenizations of a text.")
    parser.add_argument("text")
    parser.add_argument("--teacher", default="p50k_base", help="a tiktoken encoding (default: %(default)s)")
    parser.add_argument("--student", default="google/flan-t5-small", help="a spiece.model's folder, or a hub name")
    args = parser.parse_args()
    try:
        folder = hub_folder(args.student, vocabulary_only=True)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        encoding = tiktoken.get_encoding(args.teacher)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}\n{args.teacher} is fetched once, into the folder that TIKTOKEN_CACHE_DIR names; "
                 "without a network, copy that folder from a machine that has it")
    teacher = [encoding.decode([i]) for i in encoding.encode(args.text, disallowed_special=())]
    student = pieces.encode(args.text, out_type=str)
    if not teacher or not student:
        sys.exit("error: the text has no visible character")
    colour = sys.stdout.isatty()
    print(draw(teacher, student, colour, shutil.get_terminal_size().columns))


if __name__ == "__main__":
    main()
