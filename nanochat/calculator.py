"""The calculator that the model may call: arithmetic, and counting a string in a string.

The expression is parsed here by recursive descent and computed as it is parsed; nothing of it
ever reaches Python's own evaluator, so there is nothing to escape from. Numbers are exact
fractions until the end, which is why 0.1 + 0.2 gives 0.3. What the grammar does not know, or
what would grow too large, gives None. There are no variables, functions, percentages or units.

    sum     := product (("+" | "-") product)*
    product := unary (("*" | "/" | "//" | "%") unary)*
    unary   := ("+" | "-") unary | power
    power   := atom ("**" unary)?                      binds as in Python: -2**2 is -4
    atom    := number | "(" sum ")" | string ".count(" string ")"

All limits are on sizes, not on time, so that a result depends on nothing but its expression,
and any thread may calculate.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 100  # of nesting: parentheses, signs and powers
MAX_BITS = 1000  # of a numerator or denominator: below float's 1024, so that converting never overflows

TOKEN = re.compile(
    r"""[ \t]*(?:
        (?P<number> (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ )(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?
                  | \.[0-9]+(?:[eE][+-]?[0-9]{1,3})? )
      | (?P<string> '(?:[^'\\\n]|\\.)*' | "(?:[^"\\\n]|\\.)*" )
      | (?P<symbol> \.[ \t]*count\b | \*\* | // | [-+*/%()] )
    )[ \t]*""",
    re.VERBOSE,
)
ESCAPE = re.compile(r"\\(.)")
ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t", "r": "\r"}


class Refused(Exception):
    """The expression is not one of ours, or it is too large."""


def use_calculator(expression: str) -> int | float | None:
    """The value of an arithmetic expression or of `'word'.count('letter')`; None where it is refused.

    Commas may group thousands. Whole results are ints of any size up to 2**1000, others floats.

    >>> use_calculator("(1,250 + 250) / 4"), use_calculator("0.1 + 0.2"), use_calculator("2 ** 64")
    (375, 0.3, 18446744073709551616)
    >>> use_calculator("'strawberry'.count('r')"), use_calculator("1 / 0"), use_calculator("open('x')")
    (3, None, None)
    """
    try:
        tokens = tokenize(expression)
        value = Parser(tokens).parse()
    except Refused:
        return None
    return value.numerator if value.denominator == 1 else float(value)


def tokenize(expression: str) -> list[tuple[str, str]]:
    """`"2*'a'"` -> `[("number", "2"), ("symbol", "*"), ("string", "a"), ("end", "")]`."""
    if not isinstance(expression, str) or len(expression) > MAX_LENGTH:
        raise Refused
    expression = expression.strip()
    tokens, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            raise Refused
        kind, text = match.lastgroup, match[match.lastgroup]
        tokens.append((kind, unquote(text) if kind == "string" else re.sub(r"[ \t]", "", text)))
        position = match.end()
    return tokens + [("end", "")]


def unquote(literal: str) -> str:
    """The text of a quoted string: `'it\\'s'` -> `it's`. Escapes other than the plain ones are refused."""

    def unescape(match: re.Match) -> str:
        if match[1] not in ESCAPES:
            raise Refused
        return ESCAPES[match[1]]

    return ESCAPE.sub(unescape, literal[1:-1])


class Parser:
    """One pass over the tokens; each method reads one line of the grammar above and returns its value."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def parse(self) -> Fraction:
        value = self.sum()
        if self.tokens[self.position][0] != "end":
            raise Refused
        return value

    def take(self, *symbols: str) -> str | None:
        """Step over the next token and return it if it is one of these symbols."""
        kind, text = self.tokens[self.position]
        if kind != "symbol" or text not in symbols:
            return None
        self.position += 1
        return text

    def expect(self, symbol: str) -> None:
        if self.take(symbol) is None:
            raise Refused

    def sum(self) -> Fraction:
        value = self.product()
        while operator := self.take("+", "-"):
            value = compute(operator, value, self.product())
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while operator := self.take("*", "/", "//", "%"):
            value = compute(operator, value, self.unary())
        return value

    def unary(self) -> Fraction:
        # every nesting passes through here, so this is where depth is counted
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused
        sign = self.take("+", "-")
        value = self.unary() if sign else self.power()
        self.depth -= 1
        return -value if sign == "-" else value

    def power(self) -> Fraction:
        base = self.atom()
        return compute("**", base, self.unary()) if self.take("**") else base

    def atom(self) -> Fraction:
        if self.take("("):
            value = self.sum()
            self.expect(")")
            return value
        kind, text = self.tokens[self.position]
        if kind == "number":
            self.position += 1
            return bounded(Fraction(text.replace(",", "")))
        if kind == "string":
            self.position += 1
            self.expect(".count")
            self.expect("(")
            part = self.string()
            self.expect(")")
            return Fraction(text.count(part))
        raise Refused

    def string(self) -> str:
        kind, text = self.tokens[self.position]
        if kind != "string":
            raise Refused
        self.position += 1
        return text


def compute(operator: str, a: Fraction, b: Fraction) -> Fraction:
    """`a operator b` with Python's meaning, in exact fractions. Refuses what has no value or grows too large."""
    if operator in ("/", "//", "%") and b == 0:
        raise Refused
    if operator == "**":
        return raise_power(a, b)
    if operator == "+":
        return bounded(a + b)
    if operator == "-":
        return bounded(a - b)
    if operator == "*":
        return bounded(a * b)
    if operator == "/":
        return bounded(a / b)
    if operator == "//":
        return bounded(Fraction(a // b))
    return bounded(a % b)


def raise_power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent`; exact for whole exponents, a float's accuracy for roots."""
    if base == 0 and exponent < 0:
        raise Refused
    if exponent.denominator == 1:
        # the size is known beforehand: n-th power, n times the bits
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and (bits - 1) * abs(exponent) > MAX_BITS:
            raise Refused
        if base in (1, -1):
            exponent %= 2
        return bounded(base ** int(exponent))
    if base < 0:
        raise Refused  # a complex number
    try:
        return bounded(Fraction(float(base) ** float(exponent)))
    except OverflowError:
        raise Refused from None


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Refused
    return value
