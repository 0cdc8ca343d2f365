"""An output format: verify --write markdown FILE."""

from __future__ import annotations

from verifier.report.formats import Answer


def render(answer: Answer) -> str:
    """A page with the answer, what was asked, and the counterexample if there is one."""
    record = answer.record
    lines = [
        f"# {record['verdict']}",
        "",
        f"{record['reason'] or 'No reason is given'}.",
        "",
        "| | |",
        "|---|---|",
        f"| network | `{record['onnx']['path']}` |",
        f"| property | `{record['vnnlib']['path']}` |",
        f"| certified | {'yes' if record['certified'] else 'no'} |",
        f"| seconds | {record['seconds']['total']} |",
    ]
    lines += [f"| with | {plugin['name']} of {plugin['package']} |" for plugin in record["plugins"]]
    if record["witness"] is not None:
        pairs = zip("XY", (record["witness"]["inputs"], record["witness"]["outputs"]), strict=True)
        lines += ["", "## Counterexample", ""]
        lines += [f"- `{letter}_{i}` = {value!r}" for letter, values in pairs for i, value in enumerate(values)]
    return "\n".join(lines) + "\n"
