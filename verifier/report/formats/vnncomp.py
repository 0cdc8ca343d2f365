"""The result file of the competition: the verdict, and after ``sat`` the witness."""

from __future__ import annotations

from verifier.report.formats import Answer, result_text


def render(answer: Answer) -> str:
    return result_text(answer.outcome.verdict, answer.outcome.witness_text)
