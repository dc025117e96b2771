"""The toy teacher: a probabilistic grammar of solutions, whose next-token distribution is exact.

It plays the large language model: it chooses among phrasings, makes mistakes, writes in tokens of
its own (byte-pair encoding) and reports the most probable tokens of each step.
"""

import math
import re
from collections import Counter

import tiktoken

from stories import LIMIT, OPERATIONS

# A solution is a path through a grammar: opening, equation, result and ending of each step, then
# the answer. A state is (slot, results so far, further arguments of the slot).
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]+| "  # the words within which BPE merges
FIRST = {"First": 0.45, "We see": 0.1, "So": 0.1, "": 0.35}
LATER = {"Then": 0.45, "Now": 0.1, "So": 0.1, "": 0.35}

def alternatives(story, state):
    """Return every continuation of a state as (probability, text, next state); the probabilities
    sum to 1, and the final state is None."""
    slot, results, *known = state
    if slot == "open":
        if len(results) == len(story.equations):
            return [(1.0, f"The answer is {results[-1]}", None)]
        openings = LATER if results else FIRST
        return [(p, text, ("equation", results, text)) for text, p in openings.items()]
    if slot == "equation":
        space = " " if known[0] else ""
        x, op, y = (dict(zip("pqr", results)).get(v, v) for v in story.equations[len(results)])
        weights = Counter({(x, op, y): 0.75})
        weights[x, "-" if op == "+" else "+", y] += 0.14  # the wrong operation
        for number in story.numbers:  # another number of the story
            weights[x, op, number] += 0.11 / len(story.numbers)
        weights = {(x, op, y): p for (x, op, y), p in weights.items()
                   if p > 0.5 or 0 < OPERATIONS[op](x, y) <= LIMIT}
        total = sum(weights.values())
        return [
            (p / total, f"{space}{x} {op} {y} =", ("result", results, OPERATIONS[op](x, y)))
            for (x, op, y), p in weights.items()
        ]
    if slot == "result":
        slips = {0: 0.9, 1: 0.04, -1: 0.04, 10: 0.01, -10: 0.01}  # a slip in the arithmetic
        slips = {known[0] + slip: p for slip, p in slips.items()
                 if slip == 0 or 0 < known[0] + slip <= LIMIT}
        total = sum(slips.values())
        return [(p / total, f" {n}", ("end", (*results, n))) for n, p in slips.items()]
    return [(0.6, ".\n", ("open", results)), (0.4, f" {story.item}.\n", ("open", results))]

def walk(rng, story):
    """Draw the text of one solution from the grammar."""
    text, state = "", ("open", ())
    while state:
        ways = alternatives(story, state)
        _, piece, state = rng.choices(ways, [p for p, _, _ in ways])[0]
        text += piece
    return text

class Teacher:
    """The grammar as a language model over the tokens of its own BPE vocabulary."""

    def __init__(self, story, encoding):
        self.story, self.encoding = story, encoding
        self.after = {(): self.unfold({((), ("open", ())): 1.0})}  # tokens so far -> hypotheses

    def unfold(self, beliefs):
        """Expand hypotheses, {(tokens still to come, state): probability}, until each has a next
        token or is final."""
        ready, open_ = Counter(), list(beliefs.items())
        while open_:
            (queue, state), p = open_.pop()
            if queue or state is None:
                ready[queue, state] += p
            else:
                for q, text, following in alternatives(self.story, state):
                    open_.append(((tuple(self.encoding.encode(text)), following), p * q))
        return ready

    def next_tokens(self, prefix):
        """Return the exact distribution of the next token, {token: probability}; at the end {}. It
        sums the probabilities of all hypotheses that have the same next token."""
        if prefix not in self.after:
            beliefs = Counter()
            for (queue, state), p in self.after[prefix[:-1]].items():
                if queue[0] == prefix[-1]:
                    beliefs[queue[1:], state] += p
            total = sum(beliefs.values())
            self.after[prefix] = self.unfold({key: p / total for key, p in beliefs.items()})
        tokens = Counter()
        for (queue, _), p in self.after[prefix].items():
            if queue:
                tokens[queue[0]] += p
        return tokens

    def sample(self, rng, temperature):
        """Draw one solution: its tokens, and for each the distribution at temperature 1."""
        tokens, steps = (), []
        while following := self.next_tokens(tokens):
            steps.append(following)
            sharp = [p ** (1 / temperature) for p in following.values()]
            tokens += tuple(rng.choices(list(following), sharp))
        return tokens, steps

def train_bpe(texts, merges):
    """Learn a byte-pair encoding, by repeatedly merging the most frequent pair of neighbors.

    Every number up to LIMIT becomes one token, as in p50k_base. Return a tiktoken.Encoding."""
    words = Counter(word.encode() for text in texts for word in re.findall(PATTERN, text))
    words = {tuple(bytes([b]) for b in word): n for word, n in words.items()}
    ranks = {bytes([b]): b for b in range(256)}
    for _ in range(merges):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = {merge(word, best): n for word, n in words.items()}
    for number in (f"{space}{n}".encode() for n in range(LIMIT + 1) for space in ("", " ")):
        ranks.setdefault(number, len(ranks))
    return tiktoken.Encoding("toy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

def merge(word, pair):
    """Join each occurrence of the pair in a tuple of byte strings."""
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)

def teacher_records(rng, stories, encoding, samples, temperature):
    """Yield sampled solutions of each story in the form of teacher records, sorted per story."""
    for story in stories:
        teacher = Teacher(story, encoding)
        drawn = [teacher.sample(rng, temperature) for _ in range(samples)]
        for tokens, steps in sorted(drawn, key=lambda sample: sample[0]):
            yield {
                "question": story.question,
                "answer": str(story.results[-1]),
                "solution": encoding.decode(list(tokens)),
                "tokens": [encoding.decode([token]) for token in tokens],
                "top_logprobs": [
                    {encoding.decode([token]): round(math.log(p), 4)
                     for token, p in step.most_common(5)}
                    for step in steps
                ],
            }
