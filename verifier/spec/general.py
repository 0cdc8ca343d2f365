"""The general reader of VNN-LIB 1.0: arbitrarily nested and/or over linear comparisons, in exact rational arithmetic.

A shift-reduce parser with an explicit stack: every closing parenthesis reduces its list to a value (a linear
expression, a formula in disjunctive normal form, or the effect of a command), so nesting depth costs no recursion. It
is the reference that the fast reader is tested against, and the only place that formulates error messages.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedPropertyError
from verifier.core.problem import Problem
from verifier.spec import numbers
from verifier.spec.assemble import LOWER, MAX_CASES, ROW, UPPER, Atoms, Group, Tables, assemble, guard
from verifier.spec.linear_rows import RowKey, exact_scale, rows_of
from verifier.spec.source import Source

_TOKEN = re.compile(r"[()]|[^\s()]+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_NAME = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_IGNORED = frozenset({"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"})
_COMPARISONS = frozenset({"<=", ">=", "<", ">", "="})
_ARITHMETIC = frozenset({"+", "-", "*", "/"})
_VERSION_2 = frozenset({"vnnlib-version", "declare-network", "declare-input", "declare-output", "declare-hidden"})
_MAX_LITERAL = 1200  # characters of one number
_MAX_EXPONENT = 400
_MAX_BITS = 16_384  # of an exact coefficient
_CHECK_EVERY = 4096
_DOUBLE_MAX = Fraction(np.finfo(np.float64).max.item())
_FLOAT_MAX = Fraction(numbers.LARGEST)


@dataclass(frozen=True)
class Token:
    """A symbol or number and its offset."""

    text: str
    position: int


@dataclass
class Linear:
    """``sum(coefficient * variable) + constant``; variable i >= 0 is X_i, ~j is Y_j."""

    coefficients: dict[int, Fraction]
    constant: Fraction


@dataclass(frozen=True)
class Formula:
    """A disjunction of conjunctions of atom indices; ``plain`` when no ``or`` occurs in it."""

    alternatives: list[tuple[int, ...]]
    plain: bool


Value = Token | Linear | Formula | None


@dataclass
class _List:
    """A list that is still open."""

    position: int
    head: Token | None = None
    items: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class _Bound:
    """A bound of one input, exact."""

    kind: int
    variable: int
    value: Fraction
    strict: bool
    position: int


class GeneralReader:
    """Reads one source; use :func:`read`."""

    def __init__(self, source: Source, deadline: Deadline | None) -> None:
        self.source = source
        self.deadline = deadline
        self.declared: dict[str, dict[int, int]] = {"X": {}, "Y": {}}
        self.atoms: list[_Bound | int] = []  # an int is the index of a row
        self.rows: dict[RowKey, int] = {}
        self.row_position: list[int] = []
        self.asserts: list[Formula] = []

    # -- errors

    def fail(self, position: int, message: str) -> InputError:
        return InputError(f"{self.source.at(position)}: {message}")

    def unsupported(self, position: int, message: str) -> UnsupportedPropertyError:
        return UnsupportedPropertyError(f"{self.source.at(position)}: {message}")

    # -- reading

    def run(self) -> None:
        """Read the whole text.

        Raises:
            InputError: malformed text; UnsupportedPropertyError: a construct outside the fragment.
        """
        text = self.source.data.decode("latin-1")  # one character per byte, so offsets stay those of the file
        stack: list[_List] = []
        for count, match in enumerate(_TOKEN.finditer(text)):
            if self.deadline is not None and count % _CHECK_EVERY == 0:
                self.deadline.check(f"the reading of {self.source.name}")
            word, position = match.group(), match.start()
            if word == "(":
                if stack and stack[-1].head is None and not stack[-1].items:
                    raise self.fail(position, "'((' found where an operator such as 'and' or '<=' should follow '('")
                stack.append(_List(position))
            elif word == ")":
                if not stack:
                    raise self.fail(position, "')' without a matching '('; remove it")
                done = stack.pop()
                if stack:
                    stack[-1].items.append(self._reduce(done, stack))
                else:
                    self._command(done)
            elif not stack:
                raise self.fail(position, f"'{_short(word)}' found outside of any '(...)' command")
            elif stack[-1].head is None:
                stack[-1].head = Token(word, position)
            else:
                stack[-1].items.append(Token(word, position))
        if stack:
            raise self.fail(stack[0].position, "the '(' here is never closed; the file may be truncated")

    def _command(self, done: _List) -> None:
        """Carry out one top-level list."""
        head = done.head
        if head is None:
            raise self.fail(done.position, "'()' is not a command")
        if head.text == "declare-const":
            self._declare(done, done.items)
        elif head.text == "declare-fun":
            if len(done.items) != 3 or done.items[1] is not None:
                raise self.fail(done.position, "'declare-fun' should read (declare-fun NAME () Real)")
            self._declare(done, [done.items[0], done.items[2]])
        elif head.text == "assert":
            if len(done.items) != 1:
                raise self.fail(done.position, f"'assert' takes one formula, not {len(done.items)}")
            self.asserts.append(self._formula(done.items[0], head))
        elif head.text in _VERSION_2:
            raise self.unsupported(done.position, f"'{head.text}' belongs to VNN-LIB 2.0; only version 1.0 is read")
        elif head.text not in _IGNORED:
            what = _short(head.text)
            if head.text in _COMPARISONS | _ARITHMETIC | {"and", "or"}:
                raise self.fail(done.position, f"'{what}' stands outside of an assert; write (assert ({what} ...))")
            raise self.unsupported(
                done.position, f"the command '{what}' is not supported; use declare-const and assert"
            )

    def _declare(self, done: _List, items: list[Value]) -> None:
        if len(items) != 2 or not all(isinstance(item, Token) for item in items):
            raise self.fail(done.position, "a declaration should read (declare-const X_0 Real)")
        name, sort = items
        assert isinstance(name, Token) and isinstance(sort, Token)
        if sort.text != "Real":
            raise self.unsupported(sort.position, f"the type '{_short(sort.text)}' is not supported; use Real")
        match = _NAME.fullmatch(name.text)
        if match is None:
            raise self.fail(name.position, f"the name '{_short(name.text)}' is not an X_i or Y_j with an index")
        kind, index = match.group(1), int(match.group(2))
        if index in self.declared[kind]:
            raise self.fail(name.position, f"{name.text} is declared twice; remove one of the declarations")
        self.declared[kind][index] = name.position

    # -- reductions

    def _reduce(self, done: _List, stack: list[_List]) -> Value:
        """The value of a closed list inside another one."""
        head = done.head
        if head is None:
            if stack[-1].head is not None and stack[-1].head.text == "declare-fun":
                return None
            raise self.fail(done.position, "'()' is empty; an operator should follow '('")
        if stack[0].head is not None and stack[0].head.text in _IGNORED | _VERSION_2:
            return None
        if head.text in _COMPARISONS:
            return self._comparison(head, done.items)
        if head.text in ("and", "or"):
            if not done.items:
                raise self.fail(done.position, f"'{head.text}' has no arguments")
            parts = [self._formula(item, head) for item in done.items]
            return self._or(parts) if head.text == "or" else self._and(parts, done.position)
        if head.text in _ARITHMETIC:
            return self._arithmetic(head, done.items)
        if head.text in ("assert", "declare-const", "declare-fun"):
            raise self.fail(done.position, f"'{head.text}' inside another list; is a ')' missing before it?")
        raise self.unsupported(
            done.position, f"the operator '{_short(head.text)}' is not supported; use and, or, <=, >=, <, >, =, +, -, *"
        )

    def _formula(self, value: Value, owner: Token) -> Formula:
        if isinstance(value, Formula):
            return value
        position = value.position if isinstance(value, Token) else owner.position
        raise self.fail(position, f"'{owner.text}' needs comparisons such as (<= X_0 1.0), not a number or variable")

    def _or(self, parts: list[Formula]) -> Formula:
        return Formula([alternative for part in parts for alternative in part.alternatives], False)

    def _and(self, parts: list[Formula], position: int) -> Formula:
        plain = all(part.plain for part in parts)
        count = math.prod(len(part.alternatives) for part in parts)
        width = sum(max(map(len, part.alternatives), default=0) for part in parts)
        if count > MAX_CASES:
            raise self.unsupported(
                position,
                f"this 'and' expands to {count:,} cases, more than the {MAX_CASES:,} that are supported; "
                "split the property",
            )
        if count > 1:
            guard(count * width, "constraints in one disjunction")
        chain = itertools.chain.from_iterable
        return Formula([tuple(chain(pick)) for pick in itertools.product(*(p.alternatives for p in parts))], plain)

    def _linear(self, value: Value, owner: Token) -> Linear:
        """An operand as a linear expression; consumes it."""
        if isinstance(value, Linear):
            return value
        if not isinstance(value, Token):
            raise self.fail(owner.position, f"'{owner.text}' needs numbers and variables, not a formula")
        if _NUMBER.fullmatch(value.text):
            return Linear({}, self._number(value))
        match = _NAME.fullmatch(value.text)
        if match is not None:
            kind, index = match.group(1), int(match.group(2))
            if index not in self.declared[kind]:
                raise self.fail(value.position, f"{value.text} is not declared before its use")
            return Linear({index if kind == "X" else ~index: Fraction(1)}, Fraction(0))
        if _NOT_FINITE.fullmatch(value.text):
            raise self.fail(value.position, f"'{value.text}' is not a finite number")
        raise self.fail(value.position, f"'{_short(value.text)}' is neither a number nor a declared variable")

    def _number(self, token: Token) -> Fraction:
        exponent = re.split("[eE]", token.text)[1:]
        if len(token.text) > _MAX_LITERAL or (exponent and len(exponent[0].lstrip("+-0")) > 4):
            raise self.fail(token.position, f"the number '{_short(token.text)}' is out of range or has too many digits")
        if exponent and abs(int(exponent[0])) > _MAX_EXPONENT:
            raise self.fail(token.position, f"the number '{_short(token.text)}' is outside the range of floating point")
        value = Fraction(token.text)
        if abs(value) > _DOUBLE_MAX:
            raise self.fail(token.position, f"the number '{_short(token.text)}' is outside the range of floating point")
        return value

    def _arithmetic(self, head: Token, items: list[Value]) -> Linear:
        if not items:
            raise self.fail(head.position, f"'{head.text}' has no arguments")
        parts = [self._linear(item, head) for item in items]
        if head.text in "+-":
            if head.text == "-":
                parts = [_scaled(parts[0], Fraction(-1))] if len(parts) == 1 else [
                    parts[0], *(_scaled(part, Fraction(-1)) for part in parts[1:])
                ]  # fmt: skip
            out = _sum(parts)
        elif head.text == "*":
            out = parts[0]
            for part in parts[1:]:
                if out.coefficients and part.coefficients:
                    raise self.unsupported(
                        head.position, "a product of two variables is not linear and is not supported"
                    )
                out = _scaled(out, part.constant) if out.coefficients else _scaled(part, out.constant)
        else:
            out = parts[0]
            for part in parts[1:]:
                if part.coefficients:
                    raise self.unsupported(head.position, "division by a variable is not linear and is not supported")
                if part.constant == 0:
                    raise self.fail(head.position, "division by zero")
                out = _scaled(out, 1 / part.constant)
        for value in itertools.chain(out.coefficients.values(), [out.constant]):
            if value.numerator.bit_length() > _MAX_BITS or value.denominator.bit_length() > _MAX_BITS:
                raise self.fail(head.position, f"the result of this '{head.text}' has too many digits")
        return out

    def _comparison(self, head: Token, items: list[Value]) -> Formula:
        """Neighbouring operands are compared; ``=`` is two inequalities."""
        if len(items) < 2:
            raise self.fail(head.position, f"'{head.text}' needs two arguments, not {len(items)}")
        parts = [self._linear(item, head) for item in items]
        atoms: list[int] = []
        for left, right in itertools.pairwise(parts):
            directions = []
            if head.text in ("<=", "<", "="):
                directions.append((left, right))
            if head.text in (">=", ">", "="):
                directions.append((right, left))
            for small, large in directions:
                atom = self._atom(small, large, head.text in "<>", head.position)
                if atom is False:
                    return Formula([], True)
                if atom is not True:
                    atoms.append(atom)
        return Formula([tuple(atoms)], True)

    def _atom(self, small: Linear, large: Linear, strict: bool, position: int) -> int | bool:
        """``small <= large`` (``<`` when strict) as an atom's index, or its truth when no variable is left."""
        difference = _sum([Linear(dict(small.coefficients), small.constant), _scaled(large, Fraction(-1))])
        coefficients, right = difference.coefficients, -difference.constant
        if not coefficients:
            return right > 0 or (right == 0 and not strict)
        if len(coefficients) == 1:
            ((variable, c),) = coefficients.items()
            right = right / abs(c)
            if variable >= 0:
                value = right if c > 0 else -right
                if abs(value) > _FLOAT_MAX:
                    raise self.fail(position, f"the bound of X_{variable} is outside the range of float32")
                self.atoms.append(_Bound(UPPER if c > 0 else LOWER, variable, value, strict, position))
                return len(self.atoms) - 1
            coefficients = {variable: Fraction(1 if c > 0 else -1)}
        scale = self._scale(list(coefficients.values()), position)
        right = right * scale
        if abs(right) > _DOUBLE_MAX:
            raise self.fail(position, "the constant of this comparison is outside the range of floating point")
        key = (tuple(sorted((v, c * scale) for v, c in coefficients.items())), right, strict)
        if key not in self.rows:
            self.rows[key] = len(self.rows)
            self.row_position.append(position)
        self.atoms.append(self.rows[key])
        return len(self.atoms) - 1

    def _scale(self, coefficients: list[Fraction], position: int) -> Fraction:
        """A positive factor that makes all coefficients exact in float64; 1 when they already are."""
        scale = exact_scale(coefficients)
        if scale is None:
            raise self.unsupported(
                position, "the coefficients of this comparison have no exact common scale in float64; use fewer digits"
            )
        return scale

    # -- result

    def problem(self, n_in: int | None, n_out: int | None) -> Problem:
        """The arrays; call after :meth:`run`."""
        inputs = self._count("X", "input", n_in)
        outputs = self._count("Y", "output", n_out)
        self._refuse_inverted()
        bounds = [atom for atom in self.atoms if isinstance(atom, _Bound)]
        values = sorted({bound.value for bound in bounds})
        rank = {value: i for i, value in enumerate(values)}
        kind = np.full(len(self.atoms), ROW, dtype=np.int8)
        target = np.zeros(len(self.atoms), dtype=np.int64)
        key = np.zeros(len(self.atoms), dtype=np.int64)
        for i, atom in enumerate(self.atoms):
            if isinstance(atom, _Bound):
                shift = (1 if atom.kind == LOWER else -1) if atom.strict else 0
                kind[i], target[i], key[i] = atom.kind, atom.variable, 2 * rank[atom.value] + shift
            else:
                target[i] = atom
        base: list[int] = []
        groups: list[Group] = []
        for formula in self.asserts:
            if formula.plain and len(formula.alternatives) == 1:
                base.extend(formula.alternatives[0])
            else:
                groups.append(_group(formula.alternatives))
        atoms, rows = Atoms(kind, target, key), rows_of(list(self.rows), inputs, outputs)
        return assemble(
            Tables(inputs, numbers.from_fractions(values), atoms, rows),
            np.array(base, dtype=np.int64),
            groups,
            self._missing,
            self.deadline,
        )

    def _count(self, kind: str, what: str, expected: int | None) -> int:
        declared = self.declared[kind]
        if not declared:
            raise InputError(f"{self.source.name} declares no {what} ({kind}_0, {kind}_1, ...)")
        for place, index in enumerate(sorted(declared)):
            if place != index:
                raise self.fail(
                    declared[index], f"{kind}_{index} is declared but {kind}_{place} is not; indices must not gap"
                )
        if expected is not None and len(declared) != expected:
            raise InputError(
                f"{self.source.name} declares {len(declared)} {what}s ({kind}_0 to {kind}_{len(declared) - 1}), "
                f"the network has {expected}; check that they belong together"
            )
        return len(declared)

    def _refuse_inverted(self) -> None:
        """A variable whose only two bounds outside any ``or`` contradict each other is a mistake in the file."""
        given: dict[int, list[_Bound]] = {}
        for formula in self.asserts:
            if formula.plain and len(formula.alternatives) == 1:
                for index in formula.alternatives[0]:
                    atom = self.atoms[index]
                    if isinstance(atom, _Bound):
                        given.setdefault(atom.variable, []).append(atom)
        for variable, bounds in given.items():
            if len(bounds) == 2 and {bound.kind for bound in bounds} == {LOWER, UPPER}:
                low, high = sorted(bounds, key=lambda bound: bound.kind)
                if low.value > high.value:
                    raise self.fail(
                        bounds[1].position,
                        f"the lower bound of X_{variable} ({float(low.value):.9g}) is above its upper bound "
                        f"({float(high.value):.9g})",
                    )

    def _missing(self, variable: int, side: str) -> Exception:
        where = self.source.at(self.declared["X"][variable])
        return UnsupportedPropertyError(f"{where}: X_{variable} has no {side} bound in some case; bound every input")


def read(source: Source, n_in: int | None, n_out: int | None, deadline: Deadline | None) -> Problem:
    """Read any supported property.

    Raises:
        InputError: malformed text; UnsupportedPropertyError: a construct outside the fragment.
    """
    reader = GeneralReader(source, deadline)
    reader.run()
    return reader.problem(n_in, n_out)


def _group(alternatives: list[tuple[int, ...]]) -> Group:
    sizes = np.fromiter(map(len, alternatives), dtype=np.int64, count=len(alternatives))
    flat = np.fromiter(itertools.chain.from_iterable(alternatives), dtype=np.int64, count=int(sizes.sum()))
    return Group(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), flat)


def _scaled(value: Linear, factor: Fraction) -> Linear:
    if factor == 0:
        return Linear({}, Fraction(0))
    return Linear({v: c * factor for v, c in value.coefficients.items()}, value.constant * factor)


def _sum(parts: list[Linear]) -> Linear:
    """Adds into the largest operand, which is consumed; coefficients that cancel disappear."""
    largest = max(range(len(parts)), key=lambda i: len(parts[i].coefficients))
    total, constant = parts[largest].coefficients, Fraction(0)
    for i, part in enumerate(parts):
        constant += part.constant
        if i != largest:
            for variable, c in part.coefficients.items():
                value = total.get(variable, 0) + c
                if value:
                    total[variable] = value
                else:
                    del total[variable]
    return Linear(total, constant)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
