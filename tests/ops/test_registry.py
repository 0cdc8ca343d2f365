"""No op without samples, and every op says the same about itself as its forward does."""

from __future__ import annotations

from tests.ops.samples import SAMPLES
from verifier.ops.registry import op_classes


def test_every_op_class_has_samples() -> None:
    missing = set(op_classes()) - {type(s.op) for s in SAMPLES}
    assert not missing, f"add samples to tests/ops/samples.py for {sorted(c.__name__ for c in missing)}"


def test_registry_finds_ops() -> None:
    names = {c.__name__ for c in op_classes()}
    assert {"Linear", "Conv", "Relu", "Sigmoid", "MatMul", "Gather"} <= names
    assert not names & {"CurveOp", "StepOp", "StructuralOp", "AffineOp"}


def test_sample_names_are_unique() -> None:
    assert len({s.name for s in SAMPLES}) == len(SAMPLES)
