"""The calculator tool: arithmetic, and `str.count` of one string literal in another.

A regular expression reads the literals, so that numbers are exact fractions: 0.1 + 0.2 is 0.3. `ast.parse` parses the
rest, and a walk over a whitelist of nodes evaluates it; nothing is executed. All limits are on sizes, not on time.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 250  # of the syntax tree, where 1 + 1 + 1 is two deep
MAX_BITS = 1000  # of a numerator or denominator; below 1024, so that float() never overflows

TOKEN = re.compile(
    r"""(?P<number> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ )(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?
                  | \.[0-9]+(?:[eE][+-]?[0-9]{1,3})? )
      | (?P<string> '(?:[^'\\\n]|\\['"\\ntr])*' | "(?:[^"\\\n]|\\['"\\ntr])*" )
      | (?P<symbol> \.[ \t]*count\b | [-+*/%()] | [ \t]+ )
      | (?P<other> . )""",
    re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def use_calculator(expression: str) -> int | float | None:
    """The value of an arithmetic expression or of `'word'.count('letter')`; None if it is not allowed or too large.

    >>> use_calculator("(1,250 + 250) / 4"), use_calculator("'strawberry'.count('r')"), use_calculator("1 / 0")
    (375, 3, None)
    """
    if not isinstance(expression, str) or len(expression) > MAX_LENGTH:
        return None
    literals = []  # Fraction or str; `_3` in the parsed source is the fourth

    def to_name(match: re.Match) -> str:
        if match["symbol"]:
            return match[0]
        if match["other"]:
            raise ValueError(f"unexpected {match[0]!r}")
        text = re.sub(r"\\(.)", lambda escape: ESCAPES.get(escape[1], escape[1]), match[0][1:-1])
        literals.append(text if match["string"] else bounded(Fraction(match[0].replace(",", ""))))
        return f" _{len(literals) - 1} "

    try:
        source = TOKEN.sub(to_name, expression.strip()).strip()
        value = evaluate(ast.parse(source, mode="eval").body, literals)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value.numerator if value.denominator == 1 else float(value)


def evaluate(node: ast.expr, literals: list, depth: int = 0) -> Fraction:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Name(id=name) if isinstance(value := literals[int(name[1:])], Fraction):
            return value
        case ast.Call(func=ast.Attribute(value=ast.Name(id=text), attr="count"), args=[ast.Name(id=part)]):
            return Fraction(str.count(literals[int(text[1:])], literals[int(part[1:])]))
        case ast.UnaryOp():  # the tokens allow no other sign
            return evaluate(node.operand, literals, depth + 1) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp():
            left, right = evaluate(node.left, literals, depth + 1), evaluate(node.right, literals, depth + 1)
            return bounded(OPERATORS[type(node.op)](left, right))
    raise ValueError("not allowed")


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent`: exact for whole exponents, with a float's accuracy for roots."""
    if exponent.denominator != 1:
        return Fraction(math.pow(base, exponent))  # ValueError for a complex number
    # the size is known before it is computed: the n-th power has n times the bits
    if (max(map(int.bit_length, base.as_integer_ratio())) - 1) * abs(exponent) > MAX_BITS:
        raise ValueError("too large")
    return base ** int(exponent)


def bounded(value: Fraction) -> Fraction:
    if max(map(int.bit_length, value.as_integer_ratio())) > MAX_BITS:
        raise ValueError("too large")
    return value


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: power}  # fmt: skip
