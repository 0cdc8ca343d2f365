"""What has been answered, line by line in a file, so that a run that was ended goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verifier.certification.answers import Answer, Status
from verifier.core.errors import InputError


class Journal:
    """A file of JSON lines, one per answer; a line that was cut off by a kill is left out.

    Args:
        path: None: nothing is kept.
        fingerprints: of the inputs: a line counts for an input of the same network, numbers, label and settings,
            wherever it stands in the data set.
    """

    def __init__(self, path: str | Path | None, fingerprints: Sequence[str]) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprints = fingerprints
        self._cut = False

    def read(self) -> list[Answer]:
        """Answers that still count: what is unknown is asked again.

        Raises:
            InputError: the file is something else.
        """
        if self.path is None or not self.path.exists():
            return []
        places: dict[str, list[int]] = {}
        for index, key in enumerate(self.fingerprints):
            places.setdefault(key, []).append(index)
        out = []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        self._cut = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.splitlines()):
            try:
                row = json.loads(line)
                found = _answer(row)
                key = row["key"]
            except (ValueError, KeyError, TypeError) as error:
                if number == 0 and line.strip():
                    raise InputError(f"{self.path}: is no record of certify or radius; give another file") from error
                continue
            if found.status is not Status.UNKNOWN:
                out += [found.at(index) for index in places.get(key, [])]
        return out

    def add(self, answers: Sequence[Answer]) -> None:
        """Write answers, and wait until the disk has them."""
        if self.path is None or not answers:
            return
        with self.path.open("a", encoding="utf-8") as file:
            if self._cut:
                file.write("\n")
                self._cut = False
            for found in answers:
                file.write(json.dumps({"key": self.fingerprints[found.index], **_row(found)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _row(found: Answer) -> dict[str, Any]:
    adversarial = None if found.adversarial is None else [float(v) for v in found.adversarial.reshape(-1)]
    return {
        "input": found.index,
        "epsilon": found.epsilon,
        "status": found.status.value,
        "by": found.by,
        "reason": found.reason,
        "seconds": round(found.seconds, 4),
        "adversarial": adversarial,
    }


def _answer(row: dict[str, Any]) -> Answer:
    adversarial = None if row["adversarial"] is None else np.asarray(row["adversarial"], dtype=np.float64)
    return Answer(
        int(row["input"]),
        float(row["epsilon"]),
        Status(row["status"]),
        str(row["by"]),
        str(row["reason"]),
        float(row["seconds"]),
        adversarial,
    )
