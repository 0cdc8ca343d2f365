"""The memory benchmark: which cells there are, that a run goes on where it stopped, and what the targets judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import bench_memory
from scripts.bench_memory import MIB, MODES, QUICK, SAME_BITS, Case, Cell, Options
from verifier.config import load_config

TINY = Case("tiny", 0.3, 12, 5, 3, (5, 12, 12, 3), ("ibp", "crown", "alpha-crown"))


def line(cell: Cell, peak: float = 100.0, share: float = 1.0, bounds: str = "b", **more: Any) -> dict[str, Any]:
    """A result: MiB of peak, and the share of a whole that each rank has of everything else."""
    kinds = {"weights": 400, "A": 8, "slopes": 80, "gradients": 20, "optimizer": 80, "domains": 0}
    resident = {k: int(v * MIB * (share if k != "A" else 1)) for k, v in kinds.items()}
    rank = {"resident": resident, "chunks": round(48 * share), "peak": int(peak * MIB), "peak_kind": "tensors"}
    ranks = [{"rank": r, **rank} for r in range(cell.ranks)]
    return {"cell": vars(cell), "ranks": ranks, "seconds": 1.0, "bounds": bounds, "slopes": None, **more}


def lines(*found: tuple[Cell, dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
    return dict(found)


def crown(mode: str, ranks: int, network: str = bench_memory.LARGE) -> Cell:
    return Cell(network, "crown", mode, ranks)


def judged(results: dict[Cell, dict[str, Any]], words: str) -> list[bench_memory.Verdict]:
    return [v for v in bench_memory.judge(results) if words in v.what]


# ------------------------------------------------------------------------------------------------------------- cells


def test_every_mode_is_a_valid_configuration() -> None:
    for settings in MODES.values():
        load_config(values=settings)
    assert set(SAME_BITS) <= set(MODES) and set(SAME_BITS.values()) <= set(MODES)


def test_cells_cover_what_means_something() -> None:
    cells = bench_memory.cells(bench_memory.CASES, None, None, [1, 2, 4, 8])
    assert len(cells) == len(set(cells)) == len({c.name for c in cells})
    assert {c.ranks for c in cells if c.mode in ("single", "offload")} == {1}
    assert {c.ranks for c in cells if c.mode == "fsdp"} == {1, 2, 4, 8}
    assert {c.ranks for c in cells if c.mode in ("tp", "rows")} == {2, 4, 8}
    assert {c.network for c in cells if c.method == "bab"} == {"mlp-256x4"}
    for cell in cells:  # a reference is run before what is compared with it
        for base in {"single", SAME_BITS.get(cell.mode, "single")}:
            if cell.method != "bab":
                assert cells.index(cell.other(base)) <= cells.index(cell)
    some = bench_memory.cells(QUICK, ["crown"], ["single", "tp"], [1, 2])
    assert [(c.mode, c.ranks) for c in some] == [("single", 1), ("tp", 2)] * 2


def test_parts_cover_all_cells_once() -> None:
    cells = bench_memory.cells(QUICK, None, None, [1, 2])
    for n in (1, 2, 3, 7):
        parts = [bench_memory.part_of(cells, f"{i}/{n}") for i in range(1, n + 1)]
        assert [c for part in parts for c in part] == cells
    for bad in ("0/2", "3/2"):
        with pytest.raises(ValueError, match="I/N"):
            bench_memory.part_of(cells, bad)


def test_the_command_line_says_everything() -> None:
    options = Options(chunk_rows=64, threads=2, device="cpu")
    words = bench_memory.command(crown("fsdp-stream", 4, "tiny"), TINY, Path("n"), Path("p"), Path("j"), options)
    assert words[1:6] == ["-m", "verifier", "bounds", "--method", "crown"]
    settings = load_config(assignments=[w for w in words if "=" in w])
    assert (settings.parallel.backend, settings.parallel.ranks, settings.parallel.stream) == ("fsdp", 4, 8 * MIB)
    assert settings.parallel.prefetch is False and settings.numerics.certify is False
    assert settings.memory.chunk_bytes == 64 * 16 * 12 and settings.threads == 2
    search = bench_memory.command(Cell("tiny", "bab", "rows", 2), TINY, Path("n"), Path("p"), Path("j"), options)
    assert search[3] == "verify"
    assert load_config(assignments=[w for w in search if "=" in w]).numerics.certify is True


# --------------------------------------------------------------------------------------------------- files and loop


def test_a_real_cell_and_its_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, said = Cell("tiny", "alpha-crown", "single", 1), []
    bench_memory.run_all([cell], {"tiny": TINY}, tmp_path, Options(device="cpu"), said.append)
    (found,) = bench_memory.read_cells(tmp_path / "cells.jsonl").values()
    assert "error" not in found, found
    sizes = bench_memory.largest(found)
    parameters = 5 * 12 + 12 + 12 * 12 + 12 + 12 * 3 + 3
    assert sizes["weights"] == 4 * parameters < sizes["peak"]
    assert sizes["slopes"] > 0 and sizes["chunks"] >= 1
    assert found["ranks"][0]["peak_kind"] == "tensors"
    assert len(found["bounds"]) == len(found["slopes"]) == 64
    with np.load(tmp_path / "bounds" / f"{cell.name}.npz") as arrays:
        assert {a.shape for a in arrays.values()} == {(12,), (3,)}
        assert bench_memory.relative_difference(dict(arrays), dict(arrays)) == 0

    def never(*_: object) -> None:
        raise AssertionError("a cell that is in the file ran again")

    monkeypatch.setattr(bench_memory, "run_cell", never)
    bench_memory.run_all([cell], {"tiny": TINY}, tmp_path, Options(device="cpu"), said.append)
    assert said[-1].startswith("0 cells to run, 1 are in")
    text = bench_memory.shown(bench_memory.read_cells(tmp_path / "cells.jsonl"), tmp_path)
    assert len(text.splitlines()) == 3 and "| 1.000 |" in text


def test_only_missing_cells_run_and_networks_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Cell("tiny", m, "single", 1) for m in ("ibp", "crown", "alpha-crown")]
    (tmp_path / "cells.jsonl").write_text(json.dumps(line(wanted[1])) + '\n{"cell": {"netw')
    ran: list[Cell] = []
    made: list[Path] = []

    def fake(cell: Cell, case: Case, onnx: Path, *_: object) -> dict[str, Any]:
        ran.append(cell)
        made.append(onnx)
        assert onnx.is_file()
        return {**line(cell), "wall": 1.0}

    monkeypatch.setattr(bench_memory, "run_cell", fake)
    # The line that was cut off ends without a newline; what is appended must not be lost with it.
    bench_memory.run_all(wanted, {"tiny": TINY}, tmp_path, Options(), lambda _: None)
    assert ran == [wanted[0], wanted[2]]
    assert len(set(made)) == 1 and not made[0].exists()
    assert set(bench_memory.read_cells(tmp_path / "cells.jsonl")) == set(wanted)


def test_failures_are_lines_too(tmp_path: Path) -> None:
    cell = Cell("tiny", "crown", "single", 1)
    onnx, vnnlib = TINY.save(tmp_path)
    onnx.write_bytes(b"nothing")
    found = bench_memory.run_cell(cell, TINY, onnx, vnnlib, tmp_path, Options(device="cpu"))
    assert "not an ONNX file" in found["error"]
    slow = bench_memory.run_cell(cell, TINY, onnx, vnnlib, tmp_path, Options(device="cpu", timeout=0))
    assert "no end after" in slow["error"]
    text = bench_memory.shown({cell: found}, tmp_path)
    assert "not an ONNX file" in text.splitlines()[-1]


def test_the_newest_line_counts(tmp_path: Path) -> None:
    cell = crown("fsdp", 2)
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join(json.dumps(line(cell, peak)) for peak in (5.0, 7.0)) + "\n")
    assert bench_memory.largest(bench_memory.read_cells(path)[cell])["peak"] == 7 * MIB
    assert bench_memory.read_cells(tmp_path / "none") == {}


def test_relative_difference() -> None:
    a = {"y:lower": np.array([1.0, 2.0, -np.inf]), "z:lower": np.array([100.0])}
    b = {"y:lower": np.array([1.0, 2.002, -np.inf]), "z:lower": np.array([100.01])}
    assert bench_memory.relative_difference(a, a) == 0
    assert bench_memory.relative_difference(b, a) == pytest.approx(1e-3)
    assert bench_memory.relative_difference({**a, "y:lower": np.array([1.0, 2.0, 0.0])}, a) == np.inf
    assert bench_memory.relative_difference({"y:lower": a["y:lower"]}, a) == np.inf
    assert bench_memory.relative_difference({**a, "z:lower": np.array([np.nan])}, a) == np.inf
    zero = {"y:lower": np.zeros(2)}
    assert bench_memory.relative_difference({"y:lower": np.full(2, 1e-9)}, zero) == np.inf


# -------------------------------------------------------------------------------------------------------- the targets


def test_maxima_over_ranks_decide() -> None:
    cell = crown("fsdp", 4)
    uneven = line(cell, 100.0)
    uneven["ranks"][2]["peak"] = 300 * MIB
    results = lines((crown("single", 1), line(crown("single", 1), 480.0)), (cell, uneven))
    assert bench_memory.peak_ratio(cell, results) == pytest.approx(300 / 480, rel=1e-3)


@pytest.mark.parametrize(("peak", "met"), [(489.0, True), (491.0, False)])
def test_peak_of_single(peak: float, met: bool) -> None:
    cell = crown("single", 1)
    (verdict,) = judged(lines((cell, line(cell, peak))), "mlp-4096x8 crown single")
    assert verdict.met is met and verdict.value == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "ranks", "limit"),
    [("fsdp", 4, 0.43), ("fsdp", 8, 0.31), ("fsdp-prefetch", 4, 0.56), ("fsdp-prefetch", 8, 0.44)]
    + [("fsdp-stream", 4, 0.31), ("fsdp-stream", 8, 0.19), ("fsdp-replicated", 4, 0.43)],
)
def test_peaks_of_fsdp(mode: str, ranks: int, limit: float) -> None:
    cell, base = crown(mode, ranks), crown("single", 1)
    for peak, met in ((limit * 480 - 1, True), (limit * 480 + 1, False)):
        results = lines((base, line(base, 480.0)), (cell, line(cell, peak, 1 / ranks)))
        (verdict,) = judged(results, f"{cell.name}: peak")
        assert (verdict.met, verdict.limit) == (met, limit)


def test_peaks_of_tensor_parallelism() -> None:
    for ranks, limit in ((2, 0.52), (4, 0.27)):
        cell, base = crown("tp", ranks, bench_memory.WIDE), crown("single", 1, bench_memory.WIDE)
        for peak, met in ((limit * 1000 - 1, True), (limit * 1000 + 1, False)):
            results = lines((base, line(base, 1000.0)), (cell, line(cell, peak, 1 / ranks)))
            assert [v.met for v in judged(results, f"{cell.name}: peak")] == [met]


def test_what_was_not_measured_is_not_met() -> None:
    verdicts = bench_memory.judge({})
    assert verdicts and not any(v.met for v in verdicts)
    assert all("not measured" in str(v) for v in verdicts)
    cell, base = crown("fsdp", 4), crown("single", 1)
    results = lines((base, {"cell": vars(base), "error": "no"}), (cell, line(cell)))
    assert not judged(results, f"{cell.name}: peak")[0].met


def test_peaks_measured_in_another_way_are_not_compared() -> None:
    cell, base = crown("fsdp", 4), crown("single", 1)
    other = line(cell, 1.0)
    other["ranks"][0]["peak_kind"] = "rss"
    assert bench_memory.peak_ratio(cell, lines((base, line(base)), (cell, other))) is None


@pytest.mark.parametrize(("share", "met"), [(0.25, True), (0.254, True), (0.26, False), (0.2, False)])
def test_weights_are_dealt_evenly(share: float, met: bool) -> None:
    cell, base = crown("fsdp", 4), crown("single", 1)
    (verdict,) = judged(lines((base, line(base)), (cell, line(cell, share=share))), "weights at rest")
    assert verdict.met is met


@pytest.mark.parametrize(("share", "met"), [(0.25, True), (0.26, True), (0.28, False), (1.0, False)])
def test_state_of_rows_is_dealt_evenly(share: float, met: bool) -> None:
    cell, base = Cell("n", "alpha-crown", "fsdp", 4), Cell("n", "alpha-crown", "single", 1)
    verdicts = judged(lines((base, line(base)), (cell, line(cell, share=share))), "off 1/P")
    state = [v for v in verdicts if "weights" not in v.what]
    assert [v.met for v in state] == [met] * 3
    replicated = Cell("n", "alpha-crown", "fsdp-replicated", 4)
    found = judged(lines((base, line(base)), (replicated, line(replicated))), "slopes")
    assert found == []  # every rank has all rows there


def test_few_rows_are_not_judged() -> None:
    cell, base = Cell("n", "alpha-crown", "fsdp", 4), Cell("n", "alpha-crown", "single", 1)
    results = lines((base, line(base, share=0.1)), (cell, line(cell, share=0.1)))
    assert judged(results, "slopes") == []


def test_bits_are_compared_with_what_promises_them() -> None:
    base, blocks = crown("single", 1), crown("single-stream", 1)
    equal, streamed, tp = crown("fsdp", 2), crown("fsdp-stream", 2), crown("tp", 2)
    results = lines(
        (base, line(base, bounds="b")),
        (blocks, line(blocks, bounds="s")),
        (equal, line(equal, bounds="b")),
        (streamed, line(streamed, bounds="s")),
        (tp, line(tp, bounds="t")),
    )
    assert bench_memory.same_bits(equal, results) is True
    assert bench_memory.same_bits(streamed, results) is True
    assert bench_memory.same_bits(tp, results) is None
    results[equal] = line(equal, bounds="b", slopes="other")
    results[streamed] = line(streamed, bounds="b")
    assert bench_memory.same_bits(equal, results) is False
    assert [v.met for v in judged(results, "bounds differ")] == [False, False]


def test_tensor_parallelism_may_differ_by_rounding(tmp_path: Path) -> None:
    cell, base = crown("tp", 2), crown("single", 1)
    folder = tmp_path / "bounds"
    folder.mkdir()
    np.savez(folder / f"{base.name}.npz", y=np.array([1.0, -3.0], dtype=np.float32))
    for gap, met in ((1e-6, True), (1e-3, False)):
        np.savez(folder / f"{cell.name}.npz", y=np.array([1.0 + gap, -3.0], dtype=np.float32))
        found = [v for v in bench_memory.judge(lines((cell, line(cell))), tmp_path) if "relative difference" in v.what]
        assert [v.met for v in found] == [met]


def test_the_exit_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_memory.main(["--out", str(tmp_path), "--check-only"]) == 1
    assert "0 of" in capsys.readouterr().out
    cell, base = Cell("n", "crown", "fsdp", 4), Cell("n", "crown", "single", 1)
    for share, status in ((0.25, 0), (0.5, 1)):
        text = "".join(json.dumps({**line(c, share=s), "slopes": None}) + "\n" for c, s in ((base, 1.0), (cell, share)))
        (tmp_path / "cells.jsonl").write_text(text)
        assert bench_memory.main(["--out", str(tmp_path), "--quick", "--check-only"]) == status
    assert "MISSED: n_crown_fsdp_4: weights at rest" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_memory.main(["--out", str(tmp_path), "--modes", "magic"])
    with pytest.raises(SystemExit):
        bench_memory.main(["--out", str(tmp_path), "--networks", "magic"])


# ----------------------------------------------------------------------------------------------------------- networks


def test_all_cases_have_their_own_names() -> None:
    names = [c.name for c in (*bench_memory.CASES, *QUICK)]
    assert len(set(names)) == len(names) - 1  # the quick set shares one
    assert {bench_memory.LARGE, bench_memory.SMALL, bench_memory.WIDE} <= set(names)
