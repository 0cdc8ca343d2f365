"""Verdict and reason, as the console shows them at the end."""

from __future__ import annotations

from verifier.report.formats import Answer


def render(answer: Answer) -> str:
    found = answer.outcome
    return f"{found.verdict}: {found.reason}\n" if found.reason else f"{found.verdict}\n"
