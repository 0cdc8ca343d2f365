"""The command line: exit status 0 for an accepted proof, 6 for a refused one, 3 for what is not covered."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from proofcheck import network, vnnlib
from proofcheck.archive import Archive
from proofcheck.check import Checker
from proofcheck.failures import NotCovered, Refused

ACCEPTED, NOT_COVERED, REFUSED = 0, 3, 6


def main(arguments: list[str] | None = None) -> int:
    """Check a proof and say what came of it."""
    parser = argparse.ArgumentParser("proofcheck", description="Checks a proof that a network has a property.")
    parser.add_argument("--onnx", type=Path, required=True, help="the network")
    parser.add_argument("--vnnlib", type=Path, required=True, help="the property")
    parser.add_argument("proof", type=Path, help="the proof")
    modes = "float64 with bounds of all rounding errors (default), or exact rational numbers"
    parser.add_argument("--mode", choices=("float", "exact"), default="float", help=modes)
    samples = "check all leaves in float mode, and N random ones in exact arithmetic as well"
    parser.add_argument("--sample", type=int, default=0, metavar="N", help=samples)
    parser.add_argument("--max-bytes", type=int, default=1 << 32, help="refuse proofs with more bytes of arrays")
    options = parser.parse_args(arguments)
    if options.sample < 0:
        parser.error("--sample must not be negative")
    start = time.monotonic()
    try:
        with np.errstate(all="ignore"):
            summary = Checker(
                network.load(options.onnx),
                vnnlib.load(options.vnnlib),
                Archive(options.proof, options.max_bytes),
                options.mode == "exact" and not options.sample,
                options.sample,
            ).run()
    except NotCovered as reason:
        return _say(NOT_COVERED, f"not covered: {reason}")
    except Refused as reason:
        return _say(REFUSED, f"refused: {reason}")
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        return _say(REFUSED, f"refused: it cannot be read: {type(error).__name__}: {error}")
    except MemoryError:
        return _say(REFUSED, "refused: there is not enough memory for this proof")
    exact = options.mode == "exact" and not options.sample
    how = "all in exact arithmetic"
    if not exact:
        how = f"all in float64 with error bounds, {summary.exactly} of them exactly as well"
    took = time.monotonic() - start
    return _say(ACCEPTED, f"accepted: {summary.claims} hidden bounds, {summary.leaves} leaves ({how}), {took:.2f} s")


def _say(status: int, text: str) -> int:
    sys.stdout.write(text + "\n")
    return status
