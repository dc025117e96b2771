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

# What may stand before "=": numbers, operators and brackets; "x" and digits where they are no part of a word.
EXPRESSION = re.compile(r"(?<![\w%])(?:[\d\s.,+*/×÷()$−-]|(?<![A-Za-z])x(?![A-Za-z])){1,100}$")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


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
    its numbers (rounded to four decimals, with "$" if it has one); None where no operation stands there, or where
    nothing of the value is left of the rounding."""
    match = EXPRESSION.search(text.removesuffix("=").rstrip())
    written = match[0].strip() if match else ""
    if re.match(r"[+*/×÷x]|[-−] ", written) or re.search(r"[\d)]\s+\(", written):
        return None  # its first operand is a word, or an operator is missing
    words = written.translate(str.maketrans("×÷−x", "*/-*", "$,")).split()
    for start in range(len(words)):  # "In 2019 24 + 3 =": the leading numbers may be no part of it
        expression = " ".join(words[start:])
        try:
            number = calculate(expression)
        except (ValueError, SyntaxError, ZeroDivisionError):
            continue
        if re.fullmatch(r"-?[\d.]+", expression):  # a lone number: nothing to compute
            return None
        decimals = f"{float(number):.4f}".rstrip("0").rstrip(".")
        if number and float(decimals) == 0:
            return None
        return "$" * ("$" in written) + (str(number) if number.denominator == 1 else decimals)
    return None


def calculator(tokenizer):
    """A logits processor for generate(): after an arithmetic expression and "=" the model must write the value, and
    must not add digits to it, nor decimals (Cobbe et al., 2021, arXiv 2110.14168)."""
    equals = {i for i, piece in enumerate(tokenizer.pieces) if piece.endswith("=")}
    points = {i for i, piece in enumerate(tokenizer.pieces) if piece in (".", ",")}
    digits = [i for i, piece in enumerate(tokenizer.pieces) if re.match(r"[.,]?\d", piece)]

    @functools.lru_cache(maxsize=4096)
    def value_ids(ids):
        text = tokenizer.decode(ids)
        value = computed(text)
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
