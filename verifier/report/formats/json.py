"""The record, over several lines."""

from __future__ import annotations

from verifier.report.formats import Answer
from verifier.report.record import to_json


def render(answer: Answer) -> str:
    return to_json(answer.record, indent=2) + "\n"
