"""A calculator for generation: what the model writes behind "=" becomes the value of the expression before it.

Cobbe et al., 2021 (arXiv 2110.14168) trained with one; here it serves decoding alone. Knows nothing of models:
`calculator` is a logits processor for generate().
"""

import ast
import functools
import math
import operator
import re
from fractions import Fraction

# What may stand before "=": numbers, operators and brackets (T5's vocabulary has no other ones); an "x" between numbers.
EXPRESSION = re.compile(r"(?:[\d\s.,+*/()$-]|(?<=\d)x(?=\d)|(?<=\s)x(?=\s))+$")
LONGEST = 100  # characters of an expression
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
UNK = 2


def calculate(expression):
    """The value of an arithmetic expression as a Fraction. It is parsed, never run.

    Raises ValueError, SyntaxError or ZeroDivisionError where it is anything but numbers, + - * / and brackets.
    """

    def value(node):
        match node:
            case ast.Constant(value=int() | float()):
                return Fraction(ast.get_source_segment(expression, node))
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"not arithmetic: {expression}")

    return value(ast.parse(expression, mode="eval").body)


def computed(text):
    """What belongs behind a text that ends in "=": the value of the arithmetic expression before it, as the text has
    its numbers (rounded to four decimals, with "$" if it has one). None where that is not beyond doubt: no operation
    stands there, something before the expression may belong to it, or nothing is left of the value when rounded."""
    text = text.removesuffix("=").rstrip()
    match = EXPRESSION.search(text[-LONGEST:])
    if match is None or match.start() == 0 < len(text) - LONGEST:
        return None
    before = text[: len(text) - len(match[0])]
    written = re.split(r"[.,]\s+", match[0])[-1].strip()  # what ends a sentence is no part of it
    glued = before[-1:].strip() and not match[0][0].isspace()  # n*4 + 3, 3^2 + 1
    if written == match[0].strip() and (glued or re.search(r" of$|\dx$", before)):
        return None
    if re.match(r"[+*/x]|- ", written) or re.search(r"[\d)]\s*\(", written):
        return None  # the first operand is a word, or an operator is missing
    expression = written.translate(str.maketrans("x", "*", "$,"))
    try:
        number = calculate(expression)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return None
    decimals = f"{float(number):.4f}".rstrip("0").rstrip(".")
    if re.fullmatch(r"-?[\d.]+", expression) or number and float(decimals) == 0:
        return None
    return "$" * ("$" in written) + (str(number) if number.denominator == 1 else decimals)


def calculator(tokenizer):
    """A logits processor for generate(): after an arithmetic expression and "=" the model must write the value, and
    must not add digits to it, nor decimals (Cobbe et al., 2021, arXiv 2110.14168)."""
    equals = {i for i, piece in enumerate(tokenizer.pieces) if piece.endswith("=")}
    points = {i for i, piece in enumerate(tokenizer.pieces) if piece in (".", ",")}
    digits = [i for i, piece in enumerate(tokenizer.pieces) if re.match(r"[.,]?\d", piece)]

    @functools.lru_cache(maxsize=4096)
    def value_ids(ids):
        text = tokenizer.decode(ids)
        value = None if UNK in ids else computed(text)  # <unk> may be an operator that T5 has no piece for
        if value is None:
            return []
        return tokenizer.encode(value)[:-1] if text.endswith(" =") else tokenizer.encode("=" + value)[1:-1]

    def process(rows, logits):  # (B, t), (B, V) -> (B, V)
        for row, ids in enumerate(rows.tolist()):
            start = max((t + 1 for t, i in enumerate(ids) if i in equals), default=0)
            value = value_ids(tuple(ids[:start])) if start else []
            written = ids[start:]
            if value and (written == value or written[:-1] == value and written[-1] in points):
                logits[row, digits] = -math.inf
            elif value and written == value[: len(written)]:
                logits[row] = -math.inf
                logits[row, value[len(written)]] = 0
        return logits

    return process
