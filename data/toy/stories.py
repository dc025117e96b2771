"""The toy world's problems: stories with their equations, and generic tasks without numbers."""

import itertools
import re
from dataclasses import dataclass

LIMIT = 40  # the largest result: a small model can learn all facts about such numbers

HE = "Tom Ben Sam Max Leo Dan Joe Ned Bob Jim".split()
SHE = "Ann Mia Eva Sue Zoe Kim Amy Liz Joy Pam".split()
ITEMS = """apples books pens coins cards eggs shells stamps toys cakes marbles roses nuts balls
    plums buttons""".split()
COLORS = "red blue green black white pink brown gold".split()
PLACES = "shop school farm park market garden".split()
BOXES = "boxes bags baskets jars".split()

# A story is a template with its equations.
#   {a} {b} {c} {d}  numbers; {k} a small one
#   {N} {M} {L}      people; {P} the pronoun of N
#   {i} {j}          things; {x} {y} {z} colors; {S} a place; {B} a kind of box
#   {+b} {-b}        a clause in which N, called {P}, gains or loses b; {M+b} one about M; {+bi} one
#                    that names the things
#   {T} {W}          wordings of the question
# In the equations p, q and r are the results of the first, second and third. The last result is the
# answer. The training set is in the present tense, the sets out of distribution are in the past and
# have verbs of their own.
GAIN = ["{P} buys {b} more", "{P} finds {b} more", "{P} gets {b} from {L}",
        "{P} borrows {b} from {L}"]
LOSE = ["{P} gives {b} to {L}", "{P} loses {b}", "{P} sells {b}", "{P} breaks {b}"]
GAIN_OOD = ["{P} picked {b} more", "{P} received {b} from {L}", "{P} won {b} more",
            "{P} made {b} more"]
LOSE_OOD = ["{P} dropped {b}", "{P} lent {b} to {L}", "{P} threw away {b}", "{P} used {b}"]
ALL_GAIN = GAIN + GAIN_OOD + ["{P} brought {b}"]
ALL_LOSE = LOSE + LOSE_OOD + ["{P} took {b}"]

GSM8K = [
    ("{N} has {a} {i}. {+b}. {-c}. How many {i} does {N} have {W}?", "a+b p-c"),
    ("{N} has {a} {i}. {-b}. {+c}. How many {i} does {N} have {W}?", "a-b p+c"),
    ("{N} has {a} {i}. {-b}. {-c}. How many {i} are left?", "a-b p-c"),
    ("{N} has {a} {i}. {+b}. {+c}. How many {i} does {N} have {W}?", "a+b p+c"),
    ("{N} has {a} {i}. {+b}. {-c}. {+d}. How many {i} does {N} have {W}?", "a+b p-c q+d"),
    ("{N} has {a} {i}. {-b}. {+c}. {-d}. How many {i} are left?", "a-b p+c q-d"),
    ("{a} {i} are in a box. {N} takes {b} out, then {M} puts {c} in. How many {i} are in it {W}?",
     "a-b p+c"),
    ("{a} {i} are at the {S}. {N} sells {b} and {M} sells {c} of them. How many are left?",
     "a-b p-c"),
    ("{N} has {a} {i}. {M} has {b} more {i} than {N}. How many {i} do they have {T}?", "a+b a+p"),
    ("{N} has {a} {i}. {M} has {b} fewer {i} than {N}. How many {i} do they have {T}?", "a-b a+p"),
    ("{N} has {a} {i}. {M} has {k} times as many. How many {i} do they have {T}?", "a*k a+p"),
    ("{N} finds {a} {i}. {M} finds {b} more. How many are found {T}?", "a+b a+p"),
    ("{N} is {a} years old. {M} is {b} years younger. How old are they {T}?", "a-b a+p"),
    ("{N} has {a} {i}. {M} has {b} more than {N} and {L} has {c} fewer than {M}. "
     "How many {i} has {L}?", "a+b p-c"),
    ("{N} has {k} {B} with {a} {i} in each. {+b}. How many {i} does {N} have {W}?", "k*a p+b"),
    ("{N} has {k} {B} with {a} {i} in each. {-b}. How many {i} are left?", "k*a p-b"),
    ("{N} has {k} {B} with {a} {i} in each. {-b}. {+c}. How many {i} does {N} have {W}?",
     "k*a p-b q+c"),
    ("{N} has {b} {j} and {k} {B} with {a} {i} in each. {+ci}. How many {i} does {N} have {W}?",
     "k*a p+c"),
    ("Each of {k} {B} holds {a} {i}. {N} adds {b} {i}. How many are there {T}?", "k*a p+b"),
    ("{N} has {a} {i} and {M} has {b}. They sell {c}. How many {i} are left?", "a+b p-c"),
    ("{M} has {a} {i}. {N} has {b} {i}. {N-c}. How many {i} do they have {T}?", "b-c a+p"),
    ("{M} has {a} {i}. {N} has {b} {i}. {M+c}. How many {i} do they have {T}?", "a+c b+p"),
    ("{M} has {a} {i}. {N} has {b} {i}. {N+c}. {N-d}. How many {i} does {N} have {W}?", "b+c p-d"),
    ("{N} has {a} {i} and {b} {j}. {+ci}. {-di}. How many {i} does {N} have {W}?", "a+c p-d"),
    ("{N} has {a} {i} and {b} {j}. {-cj}. {+dj}. How many {j} does {N} have {W}?", "b-c p+d"),
    ("{N} has {a} {x} {i} and {b} {y} {i}. {-c}. How many {i} are left?", "a+b p-c"),
    ("{N} has {a} {x} {i} and {b} {y} {i}. {M} has {c} {j}. {+d}. How many {i} has {N} {W}?",
     "a+b p+d"),
    ("{a} {x}, {b} {y} and {c} {z} {i} are in a box. How many {i} are in it {T}?", "a+b p+c"),
]
MULTIARITH = [
    ("At the {S} {N} had {a} {i}. {+b} and then {-c}. How many {i} did {N} have then?", "a+b p-c"),
    ("At the {S} {N} had {a} {i}. First {-b}, then {-c}. How many {i} remained?", "a-b p-c"),
    ("{N} had {a} {i} at home. {-b} but {+c}. How many {i} did {N} have then?", "a-b p+c"),
    ("{N} picked {a} {i} and {M} picked {b} {i} at the {S}. They used {c}. How many {i} remained?",
     "a+b p-c"),
    ("{N} bought {k} {B} of {i} with {a} in each, and {-b}. How many {i} remained?", "k*a p-b"),
    ("{N} made {k} {B} of {i} with {a} in each, and {+b}. How many {i} did {N} have in all?",
     "k*a p+b"),
    ("The {S} had {a} {i}. {N} made {b} more and {M} used {c}. How many {i} did the {S} have then?",
     "a+b p-c"),
]
ASDIV = [
    ("There were {a} {i} at the {S}. {N} took {b} and {M} brought {c}. How many were there then?",
     "a-b p+c"),
    ("{a} {i} lay in the {S}. {M} used {b} of them. {N} brought {c} more. How many lay there then?",
     "a-b p+c"),
    ("{N} is {a} years old. {M} is {b} years older. How old are they together?", "a+b a+p"),
    ("{N} made {a} {i}. {M} made {b} more than {N}. How many were made in all?", "a+b a+p"),
    ("{N} picked {a} {x}, {b} {y} and {c} {z} {i}. How many {i} in all?", "a+b p+c"),
    ("{N} had {a} {i}. {-b}, and {-c}. How many were left?", "a-b p-c"),
    ("Each of {k} {B} held {a} {i}. {N} took {b}. How many were left in the {B}?", "k*a p-b"),
    ("There were {a} {i} at the {S}. {N} took {b}. How many were left?", "a-b"),
]
SVAMP = [
    ("{N} had {a} {i} and {b} {j}. {+ci}. {-di}.|How many {i} did {N} have then?", "a+c p-d"),
    ("{N} had {a} {i} and {b} {j}. {+cj}. {-dj}.|How many {j} did {N} have then?", "b+c p-d"),
    ("{N} had {a} {x} {i} and {b} {y} {i}. {-c}. {M} had {d} {j}.|How many {i} did {N} have left?",
     "a+b p-c"),
    ("{M} had {d} {i}. {N} had {a} {i}. {N-b}. {N+c}.|How many {i} did {N} have then?", "a-b p+c"),
    ("{N} had {a} {i}. {M} had {b} {i}. {N+c}.|How many {i} did they have together?", "a+c p+b"),
    ("{N} had {k} {B} with {a} {i} in each and {d} {j}. {-bi}.|How many {i} did {N} have left?",
     "k*a p-b"),
]
# More stories for pretraining, from which a model learns to read all the verbs and which numbers
# belong together. CHAINS are one to three changes one after another.
READING = [
    ("{N} has {a} {i} and {b} {j}. {+ci}.", "a+c"),
    ("{N} has {a} {i} and {b} {j}. {+cj}.", "b+c"),
    ("{N} had {a} {i} and {b} {j}. {-ci}.", "a-c"),
    ("{N} had {a} {i} and {b} {j}. {-cj}.", "b-c"),
    ("{N} has {a} {i}. {M} has {b} {i}. {N+c}.", "a+c"),
    ("{N} has {a} {i}. {M} has {b} {j}. {M+c}.", "b+c"),
    ("{N} had {a} {i}. {M} had {b} {i}. {N-c}.", "a-c"),
    ("{N} had {a} {i}. {M} had {b} {j}. {M-c}.", "b-c"),
    ("{N} has {a} {x} {i} and {b} {y} {i}.", "a+b"),
    ("{N} has {a} {i} and {M} has {b} {i}.", "a+b"),
    ("There were {a} {i} and {b} {j} at the {S}. {N} took {c} {j}.", "b-c"),
    ("There were {a} {i} at the {S}. {M} brought {b}.", "a+b"),
    ("{a} {i} lay at the {S}. {N} brought {b} {i}.", "a+b"),
    ("{N} has {a} {i}. {M} has {b} more {i} than {N}.", "a+b"),
    ("{N} has {a} {i}. {M} has {b} fewer than {N}.", "a-b"),
    ("{N} has {a} {i}. {M} has {k} times as many.", "a*k"),
    ("{N} is {a} years old. {M} is {b} years older.", "a+b"),
    ("{N} has {k} {B} with {a} {i} in each.", "k*a"),
    ("{N} bought {k} {B} with {a} {i} in each.", "k*a"),
    ("Each of {k} {B} held {a} {i}.", "k*a"),
]
CHAINS = [
    (start + "".join(" {%s%s%s}." % (who, sign, b) for sign, b in zip(signs, "bcd")),
     " ".join(f"{x}{sign}{b}" for x, sign, b in zip("apq", signs, "bcd")))
    for start, who in (("{N} has {a} {i}.", ""), ("{N} had {a} {i}.", ""),
                       ("There were {a} {i} at the {S}.", "N"))
    for steps in (1, 2, 3) for signs in itertools.product("+-", repeat=steps)
]
OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}

@dataclass(frozen=True)
class Story:
    """A problem with its computation."""

    body: str
    ask: str
    numbers: tuple  # in the order of the text
    equations: tuple  # (x, operation, y), each operand an int or the letter of an earlier result
    results: tuple
    item: str

    @property
    def question(self):
        """Return body and question."""
        return f"{self.body} {self.ask}"

def fill(rng, template, gain, lose):
    """Fill a template's blanks at random; return (text, {blank: value})."""

    def event(match):
        who, sign, number, item = match.groups()
        clause = rng.choice(gain if sign == "+" else lose).replace("{P}", "{%s}" % (who or "P"))
        number_and_item = r"{%s}\1" % number + (" {%s}" % item if item else "")
        return re.sub(r"\{b\}( more)?", number_and_item, clause)

    text = re.sub(r"\{(\w?)([+-])(\w)(\w?)\}", event, template)
    people = rng.sample(HE + SHE, 3)
    value = dict(zip("NML", people), P="He" if people[0] in HE else "She")
    value |= dict(zip("ij", rng.sample(ITEMS, 2))) | dict(zip("xyz", rng.sample(COLORS, 3)))
    value |= {"T": rng.choice(["together", "in all"])}
    value |= {"W": rng.choice(["now", "then", "in the end"])}
    value |= {"S": rng.choice(PLACES), "B": rng.choice(BOXES), "k": rng.randint(2, 5)}
    value |= dict(zip("abcd", rng.sample(range(2, rng.choice((12, 20, 30))), 4)))
    text = re.sub(r"\{(.)\}", lambda match: str(value[match[1]]), text)
    return re.sub(r"(?<=[a-z,] )(He|She)\b", lambda match: match[0].lower(), text), value

def story(rng, templates, gain, lose):
    """Draw a story in which every result is within 1..LIMIT."""
    while True:
        template, equations = rng.choice(templates)
        text, value = fill(rng, template, gain, lose)
        equations = tuple((value.get(x, x), op, value.get(y, y)) for x, op, y in equations.split())
        known = {}
        for letter, (x, op, y) in zip("pqr", equations):
            known[letter] = OPERATIONS[op](known.get(x, x), known.get(y, y))
        results = tuple(known.values())
        if all(0 < result <= LIMIT for result in results):
            body, ask = re.match(r"(.*\.)[ |]?(.*)", text).groups()
            numbers = tuple(int(n) for n in re.findall(r"\d+", text))
            return Story(body, ask, numbers, equations, results, value["i"])

KINDS = {
    "animals": "cat dog cow pig hen fox owl bee".split(),
    "clothes": "hat shoe sock coat scarf belt dress glove".split(),
    "tools": "saw drill axe knife spoon fork brush comb".split(),
    "fruits": "pear grape lemon fig mango melon cherry peach".split(),
    "rooms": "hall attic cellar kitchen porch study".split(),
    "weather": "rain snow wind fog storm frost".split(),
}
WORDS = [word for words in KINDS.values() for word in words]
PAIRS = """hot cold, big small, up down, new old, fast slow, day night, wet dry, open shut,
    rich poor, good bad, left right"""
PAIRS = [pair.split() for pair in PAIRS.split(",")]
OPPOSITE = {word: other for pair in PAIRS for word, other in (pair, pair[::-1])}
SPANISH = """gato perro vaca cerdo gallina zorro buho abeja gorro zapato media abrigo bufanda cinto
    vestido guante""".split()
SPANISH = dict(zip(KINDS["animals"] + KINDS["clothes"], SPANISH))

def odd_one_out(rng):
    kind, other = rng.sample(list(KINDS), 2)
    odd = rng.choice(KINDS[other])
    words = rng.sample(KINDS[kind], 4)
    words.insert(rng.randrange(5), odd)
    reasoning = f"Most are {kind}, but {odd} is not."
    return f"Which word does not belong: {' '.join(words)}", reasoning, odd

def first_and_last(rng):
    words = rng.sample(WORDS, 4)
    first, last = words[0], words[-1]
    reasoning = f"The first is {first}, the last is {last}."
    return f"Which words are first and last: {' '.join(words)}", reasoning, f"{first} {last}"

def opposites(rng):
    first, second = [rng.choice(pair) for pair in rng.sample(PAIRS, 2)]
    other, another = OPPOSITE[first], OPPOSITE[second]
    reasoning = f"{first} is not {other}, {second} is not {another}."
    return f"Give the opposites: {first} {second}", reasoning, f"{other} {another}"

def translation(rng):
    first, second = rng.sample(list(SPANISH), 2)
    uno, dos = SPANISH[first], SPANISH[second]
    return f"In Spanish: {first} {second}", f"{first} is {uno}, {second} is {dos}.", f"{uno} {dos}"

def word_sorting(rng):
    words = rng.sample(WORDS, 3)
    first, second, third = sorted(words)
    reasoning = f"{first} is before {second}, {second} is before {third}."
    return f"Sort the words: {' '.join(words)}", reasoning, f"{first} {second} {third}"

def shuffled_objects(rng):
    people, things = rng.sample(HE + SHE, 3), rng.sample(KINDS["tools"], 3)
    text = ", ".join(f"{who} has the {thing}" for who, thing in zip(people, things)) + "."
    asked, reasoning = things[0], f"{people[0]} has the {things[0]}."
    for _ in range(2):
        i, j = rng.sample(range(3), 2)
        things[i], things[j] = things[j], things[i]
        text += f" {people[i]} and {people[j]} swap."
        reasoning += f" Then {people[things.index(asked)]} has the {asked}."
    return f"{text} Who has the {asked}?", reasoning, people[things.index(asked)]

# {task: (a function that draws (input, reasoning, target), the task's description)}
TASKS = {
    "first_and_last": (first_and_last, "Find the words at both ends."),
    "odd_one_out": (odd_one_out, "Find the word of another kind."),
    "opposites": (opposites, "Turn each word into its opposite."),
    "shuffled_objects": (shuffled_objects, "Follow the things as people swap them."),
    "translation": (translation, "Translate into Spanish."),
    "word_sorting": (word_sorting, "Put the words into alphabetical order."),
}
