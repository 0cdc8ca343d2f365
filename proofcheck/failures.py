"""The two ways in which a check ends without acceptance."""

from __future__ import annotations


class Refused(Exception):
    """The proof is wrong, incomplete, damaged or not about this network and property; says what and where."""


class NotCovered(Exception):
    """The network, the property or the proof's version has something that this checker does not know."""


def require(condition: object, message: str) -> None:
    """Refuse unless the condition is true. Comparisons are written so that NaN makes them false."""
    if not condition:
        raise Refused(message)
