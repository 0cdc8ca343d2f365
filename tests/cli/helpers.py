"""Running the command in its own process, with the real or the scripted solver."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from verifier.cli.main import invoke

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "vnncomp_scripts"
VERDICTS = {"sat", "unsat", "unknown", "timeout", "error"}
Completed = subprocess.CompletedProcess[str]


def environment(**extra: str) -> dict[str, str]:
    """Variables for a command; without a resident worker unless asked for, so that tests do not meet in one."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VERIFIER_RESIDENT_SECONDS": "0"}
    return {**os.environ, **ours, **extra}


def command(args: Sequence[object], scripted: bool = True) -> list[str]:
    return [sys.executable, "-m", "tests.cli.scripted" if scripted else "verifier", *map(str, args)]


def run(*args: object, scripted: bool = True, timeout: float = 60) -> Completed:
    """Run to the end; text of both streams."""
    return subprocess.run(
        command(args, scripted), capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


@contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        yield stdout, stderr


def inside(*args: object) -> Completed:
    """Run a command that needs no worker inside this process, which has paid for its imports."""
    with _captured() as (stdout, stderr):
        code = invoke(list(map(str, args)))
    return Completed(list(map(str, args)), code, stdout.getvalue(), stderr.getvalue())


def start(*args: object) -> subprocess.Popen[str]:
    """Start the scripted command."""
    return subprocess.Popen(command(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def script(folder: Path, words: str, name: str = "p.vnnlib") -> list[str]:
    """Arguments for a query whose solver does what the words say."""
    network, property = folder / "n.onnx", folder / name
    network.write_bytes(b"")
    property.write_text(words)
    return ["--onnx", str(network), "--vnnlib", str(property)]


def scripted_python(folder: Path) -> Path:
    """An interpreter for the competition scripts: ``-P -m verifier`` becomes the scripted solver."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nshift 3\nexec "{sys.executable}" -m tests.cli.scripted "$@"\n')
    path.chmod(0o755)
    return path


def no_process_mentions(text: str, within: float = 10.0) -> bool:
    """Whether no process is left whose command line holds the text, after some seconds at most: ending takes time."""
    end = time.monotonic() + within
    while not _none_mentions(text):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _none_mentions(text: str) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                zombie = "State:\tZ" in (entry / "status").read_text()
                if text.encode() in (entry / "cmdline").read_bytes() and not zombie:
                    return False
            except OSError:
                continue
    return True
