"""Counterexamples as text, in the forms of VNN-LIB 1.0 (as VNN-COMP has it) and 2.0: writing and parsing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verifier.core.errors import InputError
from verifier.core.problem import Variable
from verifier.core.result import Verdict, Witness
from verifier.spec.source import read_bytes

_PAIR = re.compile(r"\(\s*([XY])_([0-9]{1,9})\s+([^\s()]+)\s*\)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class Answer:
    """What a results file says; ``inputs`` and ``outputs`` (float64, flat) only after ``sat``."""

    verdict: Verdict
    inputs: np.ndarray | None = None
    outputs: np.ndarray | None = None


def format_number(value: float) -> str:
    """17 significant digits: read back, they give the same float64, so also the same float32."""
    return f"{float(value):#.17g}"


def format_witness(witness: Witness) -> str:
    """The lines that follow ``sat`` in a results file: X then Y, row-major; or tensor by tensor, if they have names."""
    if witness.variables:
        return format_tensors(witness)
    pairs = [f"(X_{i} {format_number(v)})" for i, v in enumerate(witness.inputs)]
    pairs += [f"(Y_{j} {format_number(v)})" for j, v in enumerate(witness.outputs)]
    return "(" + "\n ".join(pairs) + ")\n"


def format_tensors(witness: Witness) -> str:
    """The form of 2.0: for every tensor a line ``NAME TYPE [d1,d2]``, then one value per line, row-major."""
    lines: list[str] = []
    for variable in witness.variables:
        lines.append(f"{variable.name} {variable.dtype} [{','.join(map(str, variable.shape))}]")
        values = (witness.inputs if variable.is_input else witness.outputs)[variable.index]
        whole = "int" in variable.dtype
        lines += [str(int(v)) if whole and math.isfinite(v) else format_number(v) for v in values]
    return "\n".join(lines) + "\n"


def read_witness(
    text: str, variables: Sequence[Variable], where: str = "the witness", first_line: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`parse_witness`, or :func:`parse_tensors` where tensors have names."""
    if variables:
        return parse_tensors(text, variables, where, first_line)
    return parse_witness(text, where, first_line)


def parse_tensors(
    text: str, variables: Sequence[Variable], where: str = "the witness", first_line: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Read what :func:`format_tensors` writes; arguments and results as of :func:`parse_witness`.

    Raises:
        InputError: tensors are missing or in another order, a number is not finite, or inputs that the property equates
            differ.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), first_line)]
    lines = [(number, line) for number, line in lines if line]
    sides: dict[bool, dict[int, float]] = {True: {}, False: {}}
    place = 0
    for variable in variables:
        wanted = f"{variable.name} {variable.dtype} [{','.join(map(str, variable.shape))}]"
        number, line = lines[place] if place < len(lines) else (first_line + len(text.splitlines()), "the end")
        if line.replace(", ", ",").split() != wanted.split():
            raise InputError(f"{where}, line {number}: '{line[:60]}' found where '{wanted}' should stand")
        place += 1
        for k, at in enumerate(variable.index.tolist()):
            number, line = lines[place] if place < len(lines) else (number + 1, "the end")
            place += 1
            value = float(line) if _NUMBER.fullmatch(line) else math.nan
            if not math.isfinite(value) and (variable.is_input or place > len(lines)):
                raise InputError(f"{where}, line {number}: '{line[:40]}' is no finite number for {variable.name}")
            if variable.is_input and sides[True].get(at, value) != value:
                raise InputError(
                    f"{where}, line {number}: element {k} of {variable.name} differs from an input that equals it"
                )
            sides[variable.is_input][at] = value
    if place < len(lines):
        number, line = lines[place]
        raise InputError(f"{where}, line {number}: '{line[:40]}' stands after the last tensor")
    inputs, outputs = (
        np.array([v for _, v in sorted(sides[side].items())], dtype=np.float64) for side in (True, False)
    )
    return inputs, outputs


def parse_witness(text: str, where: str = "the witness", first_line: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Read ``((X_0 v) ... (Y_0 v) ...)``.

    Args:
        text: the part of a results file after the verdict.
        where, first_line: name of the file and line of the text's beginning, for messages.

    Returns:
        inputs (n_in,) and outputs (n_out,), float64; outputs may be empty.

    Raises:
        InputError: anything else stands there, an index is missing or repeated, or a number is not finite.
    """
    values: dict[str, list[float]] = {"X": [], "Y": []}
    for match in _PAIR.finditer(text):
        name, index, number = match.groups()
        place = f"{where}, line {first_line + text.count(chr(10), 0, match.start())}"
        if int(index) != len(values[name]) or (name == "X" and values["Y"]):
            expected = f"Y_{len(values['Y'])}" if values["Y"] else f"X_{len(values['X'])}"
            raise InputError(f"{place}: {name}_{index} found where {expected} should stand; list X, then Y, from 0")
        value = float(number) if _NUMBER.fullmatch(number) else math.nan
        if not math.isfinite(value) and name == "X":
            raise InputError(f"{place}: the value '{number[:40]}' of X_{index} is not a finite number")
        values[name].append(value)
    rest = _PAIR.sub(lambda match: "\n" * match.group().count("\n"), text)
    if re.sub(r"\s", "", rest) not in ("()", ""):
        lines = rest.split("\n")
        odd = next((i for i, words in enumerate(lines) if words.strip(" \t\r()")), len(lines) - 1)
        raise InputError(f"{where}, line {first_line + odd}: the witness is not of the form ((X_0 v) ... (Y_0 v) ...)")
    return np.array(values["X"], dtype=np.float64), np.array(values["Y"], dtype=np.float64)


def parse_results(path: str | Path, variables: Sequence[Variable] = ()) -> Answer:
    """Read a results file (plain or gzip).

    Args:
        variables: the tensors that the property names, if it does.

    Raises:
        InputError: the file is missing, its first line is no verdict, or the witness is malformed.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    head, _, rest = text.partition("\n")
    words = [verdict.value for verdict in Verdict]
    if head.strip() not in words:
        raise InputError(f"{path}, line 1: '{head.strip()[:40]}' is not one of {', '.join(words)}")
    verdict = Verdict(head.strip())
    if verdict is not Verdict.SAT:
        return Answer(verdict)
    inputs, outputs = read_witness(rest, variables, str(path), 2)
    return Answer(verdict, inputs, outputs)


def clamp(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """The point of ``[lower, upper]`` nearest to ``x``, representable in ``dtype``; NaN becomes the lower bound.

    Args:
        x: (..., n_in); lower, upper: (n_in,) or broadcastable, numbers of ``dtype``, the box.
        dtype: of the network's input, float32 or float64.

    Returns:
        float64 (..., n_in).
    """
    with np.errstate(over="ignore"):
        point = np.asarray(x).astype(dtype)
    return np.clip(np.where(np.isnan(point), lower, point), lower, upper).astype(np.float64)
