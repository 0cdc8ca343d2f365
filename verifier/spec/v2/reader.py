"""Reads a VNN-LIB 2.0 text and checks its types.

The grammar is that of the standard 2.0.0. Beyond it are read: numbers with an exponent, a leading ``+`` or a leading or
trailing point, whole numbers among floating-point ones, ``=`` for ``==``, ``X[]`` for a scalar, and the connectives
``not`` and ``=>`` with the constants ``true`` and ``false``. Asserts are read with an explicit stack, so that nesting
costs no recursion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from verifier.core.deadline import Deadline
from verifier.spec.v2 import polynomial
from verifier.spec.v2.declarations import NAME, Names, read_network, read_numbers, read_version
from verifier.spec.v2.polynomial import Polynomial, TooLarge
from verifier.spec.v2.syntax import FLOATS, OTHERS, REAL, UNSIGNED, Comparison, Connective, Formula, Query, negated
from verifier.spec.v2.tokens import END, Cursor, Text, Token

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)
_COMPARISONS = {"<": "<", "<=": "<=", ">": "<", ">=": "<=", "==": "==", "=": "==", "!=": "!="}
_CONNECTIVES = frozenset(["and", "or", "not", "=>"])
_ARITHMETIC = frozenset("+-*")
_MAX_LITERAL = 1200  # characters of one number
_MAX_EXPONENT = 400
_MAX_DEPTH = 150  # of connectives in one another
_DOUBLE_MAX = Fraction(1.7976931348623157e308)


@dataclass
class _Expression:
    """A polynomial with what its type hangs on: its first variable, a number with a point, a negative one."""

    value: Polynomial
    position: int
    typed: Token | None = None
    dtype: str = ""
    decimal: Token | None = None
    negative: Token | None = None


@dataclass(frozen=True)
class _Truth:
    """A formula and how deeply connectives are nested in it."""

    formula: Formula
    depth: int
    position: int


_Value = _Expression | _Truth


@dataclass
class _Open:
    """A list that is still open."""

    head: Token
    items: list[_Value] = field(default_factory=list)


class _Reader:
    """Reads one text; use :func:`read`."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.cursor = Cursor(text)
        self.names = Names()

    def run(self) -> Query:
        cursor = self.cursor
        if cursor.next.text == END:
            raise self.text.wrong(cursor.next, "the file is empty; a query begins with (vnnlib-version <2.0>)")
        read_version(cursor)
        asserts: list[Formula] = []
        while cursor.next.text != END:
            cursor.expect("(", ", the beginning of a declaration or an assert")
            word = cursor.take()
            if word.text == "declare-network":
                if asserts:
                    raise self.text.wrong(word, "'declare-network' after an assert; declare all networks first")
                read_network(cursor, self.names)
            elif word.text == "assert":
                if not self.names.networks:
                    raise self.text.wrong(word, "'assert' before the first declare-network")
                asserts.append(self._assert(word))
            else:
                raise self.text.wrong(word, f"{word.shown} found where declare-network or assert should stand")
        if not self.names.networks:
            raise self.text.wrong(cursor.next, "no network is declared")
        if not asserts:
            raise self.text.wrong(cursor.next, "no assert found; a query has at least one")
        return Query(self.text, tuple(self.names.networks.values()), tuple(asserts))

    def _assert(self, word: Token) -> Formula:
        found = self._value()
        if not isinstance(found, _Truth):
            raise self.text.wrong(found.position, "'assert' needs a formula, not a number or a variable")
        if self.cursor.next.text != ")":
            raise self.text.wrong(
                self.cursor.next, f"{self.cursor.next.shown} found where ')' should close the 'assert'"
            )
        self.cursor.take()
        return found.formula

    def _value(self) -> _Value:
        """The next formula or expression."""
        stack: list[_Open] = []
        while True:
            token = self.cursor.take()
            if token.text == "(":
                head = self.cursor.take()
                if head.text not in _COMPARISONS and head.text not in _CONNECTIVES and head.text not in _ARITHMETIC:
                    raise self.text.wrong(
                        head, f"{head.shown} is no operator; use and, or, <, <=, >, >=, ==, !=, +, - or *"
                    )
                stack.append(_Open(head))
                continue
            if token.text == ")":
                if not stack:
                    raise self.text.wrong(token, "')' found where a formula should stand")
                value = self._reduced(stack.pop())
            elif token.text == END:
                where = stack[-1].head if stack else token
                raise self.text.wrong(where, "the list that begins here is never closed; the file may be truncated")
            else:
                value = self._atom(token)
            if not stack:
                return value
            stack[-1].items.append(value)

    def _atom(self, token: Token) -> _Value:
        """A number, a truth value or an element of a tensor."""
        if token.text in ("true", "false") and token.text not in self.names.tensors:
            return _Truth(Connective(token.text == "true", (), token.position), 1, token.position)
        if _NUMBER.fullmatch(token.text):
            value = self._number(token)
            decimal = token if re.search("[.eE]", token.text) else None
            negative = token if value < 0 else None
            return _Expression(polynomial.constant(value), token.position, decimal=decimal, negative=negative)
        if not NAME.fullmatch(token.text):
            raise self.text.wrong(token, f"{token.shown} is neither a number nor the element of a tensor")
        tensor = self.names.tensors.get(token.text)
        if tensor is None:
            what = "is a network, not a tensor" if token.text in self.names.networks else "is not declared"
            raise self.text.wrong(token, f"{token.shown} {what}")
        shape = tensor.shape
        at = self.cursor.next
        index = read_numbers(self.cursor, "an index", allow_empty=True) if at.text == "[" else ()
        if len(index) != len(shape):
            how = "without indices" if not shape else f"with {len(shape)} indices, as its shape is {list(shape)}"
            raise self.text.wrong(token, f"{token.shown} has {len(index)} indices; write it {how}")
        flat = 0
        for i, n in zip(index, shape, strict=True):
            if i >= n:
                raise self.text.wrong(at, f"index {i} of {token.shown} is outside 0 to {n - 1} (shape {list(shape)})")
            flat = flat * n + i
        value = polynomial.variable(tensor.start + flat)
        return _Expression(value, token.position, typed=token, dtype=tensor.dtype)

    def _number(self, token: Token) -> Fraction:
        exponent = re.split("[eE]", token.text)[1:]
        if len(token.text) > _MAX_LITERAL or (exponent and abs(int(exponent[0])) > _MAX_EXPONENT):
            raise self.text.wrong(token, f"the number {token.shown} is out of range or has too many digits")
        value = Fraction(token.text)
        if abs(value) > _DOUBLE_MAX:
            raise self.text.wrong(token, f"the number {token.shown} is outside the range of floating point")
        return value

    # -- lists

    def _reduced(self, done: _Open) -> _Value:
        head, items = done.head, done.items
        if not items:
            raise self.text.wrong(head, f"{head.shown} has no arguments")
        if head.text in _CONNECTIVES:
            return self._connected(head, items)
        parts: list[_Expression] = []
        for item in items:
            if not isinstance(item, _Expression):
                raise self.text.wrong(item.position, f"{head.shown} needs numbers and variables, not a formula")
            parts.append(item)
        if head.text in _COMPARISONS:
            return self._compared(head, parts)
        joined = self._typed(head, parts)
        try:
            joined.value = _calculated(head.text, [part.value for part in parts])
            polynomial.check_size(joined.value)
        except TooLarge as error:
            raise self.text.unsupported(head, str(error)) from error
        return joined

    def _typed(self, head: Token, parts: list[_Expression]) -> _Expression:
        """An expression of these parts, whose types must be one; its value is still zero."""
        out = _Expression({}, head.position)
        for part in parts:
            if part.typed is not None and out.typed is not None and part.dtype != out.dtype:
                raise self.text.wrong(
                    part.typed,
                    f"{part.typed.shown} has the type {part.dtype} but {out.typed.shown} {out.dtype}; types of one "
                    "comparison are the same",
                )
            out.typed, out.dtype = (out.typed, out.dtype) if out.typed is not None else (part.typed, part.dtype)
            out.decimal, out.negative = out.decimal or part.decimal, out.negative or part.negative
        if out.typed is not None and out.dtype in OTHERS:
            raise self.text.unsupported(out.typed, f"{out.typed.shown} has the type {out.dtype}, which is not compared")
        if out.typed is not None and out.dtype != REAL and out.dtype not in FLOATS:
            if out.decimal is not None:
                raise self.text.wrong(
                    out.decimal, f"{out.decimal.shown} is no number of the type {out.dtype} of {out.typed.shown}"
                )
            if out.negative is not None and out.dtype in UNSIGNED:
                raise self.text.wrong(
                    out.negative, f"{out.negative.shown} is no number of the type {out.dtype} of {out.typed.shown}"
                )
        return out

    def _compared(self, head: Token, parts: list[_Expression]) -> _Truth:
        if len(parts) != 2:
            raise self.text.wrong(head, f"{head.shown} compares two expressions, not {len(parts)}")
        self._typed(head, parts)
        left, right = (parts[0].value, parts[1].value) if head.text[0] != ">" else (parts[1].value, parts[0].value)
        difference = dict(left)
        polynomial.add_to(difference, right, -1)
        return _Truth(Comparison(difference, _COMPARISONS[head.text], head.position), 1, head.position)

    def _connected(self, head: Token, items: list[_Value]) -> _Truth:
        parts: list[_Truth] = []
        for item in items:
            if not isinstance(item, _Truth):
                raise self.text.wrong(item.position, f"{head.shown} needs formulas, not a number or a variable")
            parts.append(item)
        if head.text == "not":
            if len(parts) != 1:
                raise self.text.wrong(head, f"'not' takes one formula, not {len(parts)}")
            return _Truth(negated(parts[0].formula), parts[0].depth, head.position)
        formulas = [part.formula for part in parts]
        if head.text == "=>":
            if len(parts) < 2:
                raise self.text.wrong(head, "'=>' needs two formulas or more")
            formulas = [*(negated(formula) for formula in formulas[:-1]), formulas[-1]]
        conjunction = head.text == "and"
        flat: list[Formula] = []
        depth = 1
        for formula, part in zip(formulas, parts, strict=True):
            if isinstance(formula, Connective) and formula.conjunction is conjunction:
                depth = max(depth, part.depth)
                flat.extend(formula.parts)
            else:
                depth = max(depth, part.depth + 1)
                flat.append(formula)
        if depth > _MAX_DEPTH:
            raise self.text.unsupported(head, f"connectives are nested more than {_MAX_DEPTH} deep")
        return _Truth(Connective(conjunction, tuple(flat), head.position), depth, head.position)


def _calculated(operator: str, values: list[Polynomial]) -> Polynomial:
    """The value of an arithmetic list; operands are consumed.

    Raises:
        TooLarge: of a product.
    """
    if operator == "*":
        out = values[0]
        for value in values[1:]:
            out = polynomial.product(out, value)
        return out
    if operator == "-" and len(values) == 1:
        return polynomial.scaled(values[0], Fraction(-1))
    out = values[0]
    if operator == "+":
        largest = max(range(len(values)), key=lambda i: len(values[i]))
        out = values.pop(largest)
        values = [{}, *values]
    for value in values[1:]:
        polynomial.add_to(out, value, 1 if operator == "+" else -1)
    return out


def read(name: str, data: bytes, deadline: Deadline | None = None) -> Query:
    """Read a text.

    Raises:
        InputError: grammar or types are violated; the message names line and column.
        UnsupportedPropertyError: it is correct, but outside of what is handled.
        DeadlineExceeded: no time is left.
    """
    return _Reader(Text(name, data, deadline)).run()
