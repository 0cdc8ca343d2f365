"""Data sets: what is certified and falsified at which radius."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import verifier
from tests.support.device import ON_DEVICE
from verifier.certification import questions
from verifier.certification.campaign import certified_radius, certify
from verifier.certification.questions import Questions
from verifier.cli.main import invoke
from verifier.core.errors import ConfigError, InputError
from verifier.core.result import Verdict
from verifier.spec.build import robustness

RINGS = Path(__file__).parents[2] / "examples" / "rings.onnx"
RADII = (0.05, 0.2, 0.4, 0.8)
HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None


def points(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Points of the plane between the middle of the disc and the ring, and what they are."""
    distance = np.linspace(0.1, 2.0, count)
    angle = np.arange(count)
    x = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1).astype(np.float32)
    return x, (distance > 1.3).astype(int)


def image_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 4))


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 6, 6)).astype(np.float32)


def test_the_answers_are_those_of_verify() -> None:
    x, y = points()
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE)
    words = {Verdict.UNSAT: "certified", Verdict.SAT: "falsified"}
    for i in range(len(x)):
        for k, epsilon in enumerate(RADII):
            result = verifier.verify(RINGS, robustness(x[i], epsilon, int(y[i]), 2), ON_DEVICE, timeout=60)
            assert found.status[i, k] == words[result.verdict], (i, epsilon)
    assert {a.by for row in found.answers for a in row} >= {"bounds", "attack", "implied"}


def test_neither_bounds_nor_attack_decide_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(5)
    expected = certify(RINGS, x, y, RADII, config=ON_DEVICE).status
    monkeypatch.setattr(Questions, "quick", lambda self, pairs, deadline: np.zeros(len(pairs), dtype=bool))
    monkeypatch.setattr(Questions, "attack", lambda self, pairs, deadline: [None] * len(pairs))
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE)
    assert (found.status == expected).all()
    assert {a.by for row in found.answers for a in row} <= {"verify", "implied", "input"}


def test_what_follows_from_other_radii_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []
    ask = Questions.ask
    monkeypatch.setattr(Questions, "quick", lambda self, pairs, deadline: np.zeros(len(pairs), dtype=bool))
    monkeypatch.setattr(Questions, "attack", lambda self, pairs, deadline: [None] * len(pairs))
    monkeypatch.setattr(Questions, "ask", lambda self, i, e, t: (asked.append((i, e)), ask(self, i, e, t))[1])
    x, y = points(4)
    radii = np.linspace(0.02, 1.0, 15)
    found = certify(RINGS, x, y, list(radii), config=ON_DEVICE)
    assert len(asked) <= 4 * 4 < 4 * 15 and len(set(asked)) == len(asked)
    for row in found.status:
        assert list(row) == sorted(row)  # certified before falsified, and nothing is unknown


def test_adversarial_examples_have_the_shape_of_inputs_and_hold() -> None:
    module, x = image_classifier(), images()
    found = certify(module, x, None, (0.01, 2.0), config=ON_DEVICE)
    assert found.correct.all() and (found.status[:, 1] == "falsified").all()
    with torch.no_grad():
        for (index, epsilon), example in found.adversarial.items():
            assert example.shape == x.shape[1:]
            assert np.abs(example - x[index].astype(np.float64)).max() <= epsilon
            y = module(torch.from_numpy(example).float()[None])[0]
            assert (y.max() == y[y.argsort()[-1]]) and int(found.labels[index]) in range(4)
            others = y.clone()
            others[found.labels[index]] = -torch.inf
            assert others.max() >= y[found.labels[index]]


def test_a_misclassified_input_is_its_own_adversarial_example() -> None:
    x, y = points(4)
    found = certify(RINGS, x, 1 - y, RADII, config=ON_DEVICE)
    assert not found.correct.any() and (found.status == "falsified").all()
    assert found.answers[0][0].by == "input"
    assert np.abs(found.adversarial[0, RADII[0]] - x[0]).max() <= RADII[0]


def test_valid_inputs_are_clipped() -> None:
    x = np.array([[0.0, 0.0]], dtype=np.float32)
    wide = certify(RINGS, x, [0], [3.0], config=ON_DEVICE)
    clipped = certify(RINGS, x, [0], [3.0], clip=(-0.2, 0.2), config=ON_DEVICE)
    assert wide.status[0, 0] == "falsified" and clipped.status[0, 0] == "certified"


def test_a_run_that_was_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(6)
    file = tmp_path / "answers.jsonl"
    first = certify(RINGS, x, y, RADII, config=ON_DEVICE, resume=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][: len(lines[-1]) // 2]]))  # killed while it wrote
    again = certify(RINGS, x, y, RADII, config=ON_DEVICE, resume=file)
    assert (again.status == first.status).all()
    assert all(json.loads(line) for line in file.read_text().splitlines()[len(lines) :])

    def refuse(*_: Any) -> Any:
        raise AssertionError("everything was known")

    for name in ("quick", "attack", "ask"):
        monkeypatch.setattr(Questions, name, refuse)
    order = [3, 1, 5]  # another order of some of the inputs
    some = certify(RINGS, x[order], y[order], RADII, config=ON_DEVICE, resume=file)
    assert (some.status == first.status[order]).all()
    assert {a.by for row in some.answers for a in row} <= {"earlier", "implied"}
    with pytest.raises(AssertionError, match="known"):
        certify(RINGS, x, y, RADII, config=ON_DEVICE, resume=file, clip=(-3, 3))
    with pytest.raises(AssertionError, match="known"):
        certify(RINGS, x + np.float32(1e-6), y, RADII, config=ON_DEVICE, resume=file)


def test_adversarial_examples_from_a_file_are_replayed(tmp_path: Path) -> None:
    x, y = points(3)
    file = tmp_path / "answers.jsonl"
    certify(RINGS, x, y, [0.02], config=ON_DEVICE, resume=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["status"] for row in rows} == {"certified"}
    forged = [{**row, "status": "falsified", "adversarial": [0.0, 0.0]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in forged))
    found = certify(RINGS, x, y, [0.02], config=ON_DEVICE, resume=file)
    assert (found.status == "certified").all()


def test_a_graph_that_differs_from_the_reference_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from verifier.frontend import network

    x, y = points(3)
    asked = Questions(verifier.api.load_any(RINGS, ()), x.astype(float), y, None, verifier.Config(device="cpu"))
    pairs = [(0, 0.01), (1, 0.01)]
    assert asked.quick(pairs, questions.Deadline()).all()
    monkeypatch.setattr(network, "parity", lambda *_: type("Found", (), {"mismatch": "off by one"}))
    assert not asked.quick(pairs, questions.Deadline()).any()


def test_claims_for_float32_runs_are_left_to_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(2)
    found = certify(RINGS, x, y, [0.02], config={**ON_DEVICE, "numerics.semantics": "float32"})
    assert {a.by for row in found.answers for a in row} <= {"verify", "attack"}


def test_time_for_all_runs_out() -> None:
    x, y = points(3)
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE, total_timeout=1e-3)
    assert (found.status == "unknown").all()
    assert "time" in found.answers[0][0].reason


def test_progress_ends_with_everything() -> None:
    x, y = points(5)
    seen: list[Any] = []
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE, progress=seen.append)
    last = seen[-1]
    assert last.done == last.total == 20
    assert last.certified == (found.status == "certified").sum()
    assert [s.done for s in seen] == sorted(s.done for s in seen)


def test_radii_by_bisection() -> None:
    x, y = points(4)
    found = certified_radius(RINGS, x, y, 1.0, 0.02, config=ON_DEVICE)
    for r in found:
        assert r.falsified is not None and r.unknown is None and r.certified < r.falsified <= r.certified + 0.02
        result = verifier.verify(RINGS, robustness(x[r.index], r.certified, int(y[r.index]), 2), ON_DEVICE, timeout=60)
        assert result.verdict is Verdict.UNSAT
        assert r.adversarial is not None and np.abs(r.adversarial - x[r.index]).max() <= r.falsified
    whole = certified_radius(RINGS, x[:1], y[:1], 0.1, config=ON_DEVICE)
    assert whole[0].certified == 0.1 and whole[0].falsified is None
    wrong = certified_radius(RINGS, x[:1], 1 - y[:1], 0.1, config=ON_DEVICE)
    assert wrong[0].certified == 0.0 and wrong[0].falsified == 0.0


def test_tables() -> None:
    x, y = points(6)
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE)
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(rows) == 24 and rows[0].keys() >= {"input", "epsilon", "status", "by"}
    for place, counts in enumerate(found.counts):
        assert counts.certified == (found.status[:, place] == "certified").sum()
        assert counts.total == 6
    assert found.markdown().count("\n") == 2 + len(RADII)
    assert "certified accuracy" in found.table() and f"{found.counts[0].certified}" in found.table()


@pytest.mark.skipif(not HAS_PLOTS, reason="matplotlib is an extra that is not installed here")
def test_plots(tmp_path: Path) -> None:
    x, y = points(4)
    found = certify(RINGS, x, y, RADII, config=ON_DEVICE)
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found.plot(tmp_path / "a.svg")
    assert "radius" in (tmp_path / "a.svg").read_text() or "<path" in (tmp_path / "a.svg").read_text()
    with pytest.raises(InputError, match="cannot be written"):
        found.plot(tmp_path / "a.nonsense")


@pytest.mark.skipif(HAS_PLOTS, reason="matplotlib is installed")
def test_plots_name_the_extra(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="matplotlib"):
        certify(RINGS, *points(1), [0.01], config=ON_DEVICE).plot(tmp_path / "a.png")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = points(5)
    data = tmp_path / "data.npz"
    np.savez(data, inputs=x, labels=y)
    out = {name: tmp_path / name for name in ("a.jsonl", "a.csv", "a.md", "a.npz")}
    options = ["--out", "a.jsonl", "--csv", "a.csv", "--markdown", "a.md", "--adversarial", "a.npz"]
    words = [str(out[w]) if w in out else w for w in options]
    assert invoke(["certify", str(RINGS), str(data), "--eps", "0.05,0.4", *words, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "certified accuracy" in said.out and "10 of 10" in said.err
    assert out["a.csv"].read_text().count("\n") == 11 and out["a.md"].read_text().startswith("| epsilon")
    examples = np.load(out["a.npz"])
    assert len(examples["index"]) == len(examples["inputs"])
    assert invoke(["radius", str(RINGS), str(data), "--max-eps", "0.5", "--limit", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("input,label,certified_radius") and said.out.count("\n") == 4
    for words, complaint in [
        (["certify", str(RINGS), str(data), "--eps", "a"], "no list of numbers"),
        (["certify", str(RINGS), str(RINGS), "--eps", "0.1"], "no .npz"),
        (["certify", str(RINGS), str(data), "--eps", "0.1", "--norm", "l2"], "linf"),
        (["certify", str(tmp_path / "no.onnx"), str(data), "--eps", "0.1"], "no.onnx"),
    ]:
        assert invoke(words) == 2
        assert complaint in capsys.readouterr().err


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    x, y = points(3)
    (tmp_path / "other.txt").write_text("hello\n")
    for bad, words in [
        (lambda: certify(RINGS, x, y, []), "at least one radius"),
        (lambda: certify(RINGS, x, y, [-0.1]), "at least one radius"),
        (lambda: certify(RINGS, x, y[:2], [0.1]), "2 labels for 3 inputs"),
        (lambda: certify(RINGS, x, y + 5, [0.1]), "outside 0 to 1"),
        (lambda: certify(RINGS, x, y + 0.5, [0.1]), "whole numbers"),
        (lambda: certify(RINGS, x[:, :1], y, [0.1]), "takes 2"),
        (lambda: certify(RINGS, x[0], y, [0.1]), "first dimension counts"),
        (lambda: certify(RINGS, x * np.nan, y, [0.1]), "not finite"),
        (lambda: certify(RINGS, x, y, [0.1], norm="l1"), "linf"),
        (lambda: certify(RINGS, x, y, [0.1], resume=tmp_path / "other.txt"), "no record"),
        (lambda: certify(nn.Linear(2, 1), x, y * 0, [0.1]), "one output"),
        (lambda: certified_radius(RINGS, x, y, -1.0), "positive"),
    ]:
        with pytest.raises(InputError) as caught:
            bad()
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"numerics\.certify"):
        certify(RINGS, x, y, [0.1], config={"numerics.certify": False})


def test_the_script_that_trains_on_digits(tmp_path: Path) -> None:
    from scripts.train_digits import make_digits

    assert make_digits(tmp_path, steps=30, count=6) > 0.3
    data = np.load(tmp_path / "digits.npz")
    assert data["inputs"].shape == (6, 1, 14, 14) and data["labels"].shape == (6,)
    found = certify(tmp_path / "digits.onnx", data["inputs"], data["labels"], [1e-4], clip=(0, 1), config=ON_DEVICE)
    assert ((found.status[:, 0] == "certified") == found.correct).all()
