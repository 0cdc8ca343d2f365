"""What a parent makes of its worker's messages, whatever they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from verifier.core.messages import encode
from verifier.report.record import Outcome
from verifier.runtime.handle import WorkerHandle
from verifier.runtime.messages import Figures, Finished, Standing
from verifier.runtime.query import Query


@dataclass
class Process:
    """Nobody; it can be killed."""

    killed: int = 0

    def kill(self) -> None:
        self.killed += 1

    def reap(self, seconds: float) -> int | None:
        return None


def heard(data: bytes) -> tuple[WorkerHandle, Process]:
    """A parent that has read some bytes."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    os.set_blocking(read, False)
    process = Process()
    handle = WorkerHandle(Query(Path("a.onnx"), Path("b.vnnlib"), None, None, 0.0), process, read)
    handle.read()
    handle.close()
    return handle, process


STANDING = encode(Standing(Outcome("unsat", "proved"))) + b"\n"
FINISHED = encode(Finished(Outcome("sat", "found"))) + b"\n"


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b'{"kind": "Finished"}\n', b'{"kind": "Note", "text": 3}\n', b"\xff\n"]
)
def test_a_message_that_says_nothing_ends_its_query_alone(line: bytes) -> None:
    handle, process = heard(encode(Figures({"open": 3})) + b"\n" + line)
    assert handle.outcome is not None and handle.outcome.verdict == "error" and handle.outcome.exit_code == 1
    assert (
        handle.outcome.reason.startswith("internal error: a message is")
        or "Note.text" in handle.outcome.reason
        or ("Finished has no field" in handle.outcome.reason)
    )
    assert handle.outcome.statistics == {"open": 3} and process.killed > 1
    # A proof that stands does so still, and an outcome that was heard is one.
    assert heard(STANDING + line)[0].outcome == Outcome("unsat", "proved")
    assert heard(FINISHED + line)[0].outcome == Outcome("sat", "found")
