"""Measures what every parallel mode takes: bytes at rest by kind and the peak of every rank, one process per cell.

    python scripts/bench_memory.py [--out results/memory] [--quick] [--networks mlp-256x4,...] [--methods ibp,crown]
                                   [--modes single,fsdp] [--ranks 1,2,4,8] [--part 1/2] [--device cpu] [--check]
                                   [--trained FOLDER]

A cell is a network, a method, a mode and a number of ranks; it runs through the command line of the verifier. Networks
have seeded random weights and are written when a cell needs them. The folder ``--out`` keeps one line of JSON per cell
(``cells.jsonl``) and the bounds (``bounds/``); a cell that is in the file is not run again. Then the table is printed,
maxima over ranks, with the ratio of the peak to that of ``single`` and whether the bounds are the same bit for bit.
``--check`` holds the table against the targets (docs: reading-results) and exits with 1 when one is missed; it runs
nothing with ``--check-only``.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.measure import ROOT, append_line, call, environment, parser_of, read_lines, table, verifier
from scripts.networks import ResNet, save_box, save_conv3, save_mlp, save_resnet

MIB = 1 << 20
KINDS = ("weights", "A", "slopes", "gradients", "optimizer", "domains")
STREAM = "8MiB"


# ------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Case:
    """A network with a box.

    Attributes:
        sizes: layer sizes of an MLP; empty for the others.
        radius: of the box around a random point of [0, 1]^n.
        widest: elements of the largest value, which chunks are measured by.
        methods: what is worth running on it.
        alpha_steps: optimiser steps of the output rows and of hidden rows.
        files: network and property, where they exist already.
    """

    name: str
    radius: float
    widest: int
    n_in: int
    n_out: int
    sizes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ("ibp", "crown")
    alpha_steps: tuple[int, int] = (10, 2)
    files: tuple[Path, Path] | None = None

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write network and property."""
        if self.files is not None:
            return self.files
        onnx, vnnlib = folder / f"{self.name}.onnx", folder / f"{self.name}.vnnlib"
        if self.sizes:
            save_mlp(onnx, self.sizes)
        elif self.name == "conv3":
            save_conv3(onnx)
        else:
            save_resnet(ResNet().calm(0), onnx)
        centre = np.random.default_rng(1).random(self.n_in, dtype=np.float32)
        lower, upper = centre - np.float32(self.radius), centre + np.float32(self.radius)
        threshold = _undecided(onnx, lower, upper) if "bab" in self.methods else 1e6
        save_box(vnnlib, lower, upper, self.n_out, threshold)
        return onnx, vnnlib


def _undecided(onnx: Path, lower: np.ndarray, upper: np.ndarray) -> float:
    """A value of the first output that bounds do not exclude and no sample reaches, so that a search has work to do."""
    from verifier import api

    network = api.load_any(onnx, ())
    points = np.random.default_rng(2).uniform(lower, upper, (200, lower.size))
    reached = float(network.evaluate(points)[:, 0].max())
    settings = {"numerics.certify": False, "bounds.alpha.iterations": 5, "bounds.alpha.intermediate_iterations": 2}
    box = (end.reshape(network.input_shape) for end in (lower, upper))
    excluded = float(verifier.compute_bounds(network, *box, "alpha-crown", config=settings).upper.flatten()[0])
    return reached + 0.5 * (excluded - reached)


def mlp(hidden: int, depth: int, radius: float, **options: Any) -> Case:
    """784-h-...-h-10."""
    sizes = (784, *[hidden] * depth, 10)
    return Case(f"mlp-{hidden}x{depth}", radius, max(784, hidden), 784, 10, sizes, **options)


def one_wide(hidden: int, radius: float) -> Case:
    """4096-h-1: one layer that is too large to gather."""
    return Case(f"wide-{hidden}", radius, hidden, 4096, 1, (4096, hidden, 1))


_ALL = ("ibp", "crown", "alpha-crown")
CASES = (
    mlp(256, 4, 0.02, methods=(*_ALL, "bab")),
    mlp(1024, 4, 0.01, methods=_ALL),
    mlp(4096, 4, 3e-4, methods=_ALL, alpha_steps=(10, 0)),
    mlp(4096, 8, 1e-4),
    mlp(8192, 4, 1e-4),
    one_wide(131072, 1e-3),
    Case("conv3", 2e-3, 32 * 32 * 32, 3072, 10, methods=_ALL, alpha_steps=(10, 1)),
    Case("resnet", 1e-3, 64 * 32 * 32, 3072, 100, methods=_ALL, alpha_steps=(10, 0)),
)


def trained(folder: Path) -> Case:
    """The residual network and the property that ``scripts/train_resnet.py`` left in a folder."""
    files = folder / "resnet.onnx", folder / "resnet.vnnlib"
    return Case("trained", 1 / 255, 64 * 32 * 32, 3072, 100, methods=_ALL, alpha_steps=(10, 0), files=files)


# The small set: every mode on networks that take seconds. The wide layer has a sixteenth of its size.
QUICK = (mlp(256, 4, 0.02, methods=_ALL), one_wide(8192, 1e-3))


def _mode(backend: str, **values: Any) -> dict[str, Any]:
    return {f"parallel.{k}": v for k, v in {"backend": backend, **values}.items()}


MODES: Mapping[str, Mapping[str, Any]] = {
    "single": _mode("single"),
    "single-stream": _mode("single", stream=STREAM),
    "offload": _mode("single", offload=True, prefetch=False),
    "offload-prefetch": _mode("single", offload=True),
    "rows": _mode("single", rows="sharded"),
    "fsdp-replicated": _mode("fsdp", rows="replicated", prefetch=False),
    "fsdp-replicated-prefetch": _mode("fsdp", rows="replicated"),
    "fsdp-replicated-stream": _mode("fsdp", rows="replicated", prefetch=False, stream=STREAM),
    "fsdp": _mode("fsdp", prefetch=False),
    "fsdp-prefetch": _mode("fsdp"),
    "fsdp-stream": _mode("fsdp", prefetch=False, stream=STREAM),
    "tp": _mode("tp"),
    "tp-ibp": _mode("tp", tp_intermediate="ibp"),
}
_ONE_RANK = ("single", "single-stream", "offload", "offload-prefetch")
_SEVERAL_RANKS = ("rows", "tp", "tp-ibp")
_SEARCH = ("single", "rows", "fsdp")  # modes that branch and bound is measured in
# Modes whose bounds promise to be those of another mode bit for bit.
SAME_BITS = {
    "offload": "single",
    "offload-prefetch": "single",
    "rows": "single",
    "fsdp-replicated": "single",
    "fsdp-replicated-prefetch": "single",
    "fsdp-replicated-stream": "single-stream",
    "fsdp": "single",
    "fsdp-prefetch": "single",
    "fsdp-stream": "single-stream",
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    network: str
    method: str
    mode: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.network}_{self.method}_{self.mode}_{self.ranks}"

    def other(self, mode: str) -> Cell:
        """The same in another mode on one rank."""
        return Cell(self.network, self.method, mode, 1)


def cells(
    cases: Iterable[Case], methods: Sequence[str] | None, modes: Sequence[str] | None, ranks: Sequence[int]
) -> list[Cell]:
    """Every combination that means something, the references first."""
    out = []
    for case in cases:
        for method in case.methods:
            for mode in MODES:
                if (methods and method not in methods) or (modes and mode not in modes):
                    continue
                if method == "bab" and mode not in _SEARCH:
                    continue
                if mode == "tp-ibp" and method == "ibp":
                    continue  # the same as tp
                counts = [1] if mode in _ONE_RANK else [p for p in ranks if p > 1 or mode not in _SEVERAL_RANKS]
                out += [Cell(case.name, method, mode, p) for p in counts]
    return out


def part_of(everything: Sequence[Cell], text: str) -> list[Cell]:
    """Part i of n, from 1, of the cells; each part takes whole networks as far as that balances."""
    first, _, count = text.partition("/")
    i, n = int(first), int(count)
    if not 1 <= i <= n:
        raise ValueError(f"--part {text}: expected I/N with 1 <= I <= N")
    size = -(-len(everything) // n)
    return list(everything[(i - 1) * size : i * size])


def command(cell: Cell, case: Case, onnx: Path, vnnlib: Path, json_file: Path, options: Options) -> list[str]:
    """The command line of one cell."""
    steps, hidden = case.alpha_steps
    settings: dict[str, Any] = {
        **MODES[cell.mode],
        "parallel.ranks": cell.ranks,
        # Four values of the widest layer per row are what the engine counts, see ``row_cost``.
        "memory.chunk_bytes": options.chunk_rows * 16 * case.widest,
        "bounds.alpha.iterations": steps,
        "bounds.alpha.intermediate_iterations": hidden,
        "threads": options.threads,
        "device": options.device,
    }
    if cell.method == "bab":
        settings |= {"attack.enabled": False, "bab.max_domains": 2000, "bab.branching": "babsr"}
        words = ["verify", "--timeout", str(options.timeout)]
    else:
        settings["numerics.certify"] = False
        words = ["bounds", "--method", cell.method, "--intermediate", "--slopes"]
    files = ["--onnx", onnx, "--vnnlib", vnnlib, "--json", json_file]
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return verifier(*words, *files, settings=[f"{key}={text}" for key, text in texts.items()])


@dataclass(frozen=True)
class Options:
    """What all cells share."""

    chunk_rows: int = 256
    threads: int = 1
    device: str = "auto"
    timeout: int = 1800


def run_cell(cell: Cell, case: Case, onnx: Path, vnnlib: Path, out: Path, options: Options) -> dict[str, Any]:
    """Run one cell in a process of its own; its line for the results file."""
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "record.json"
        words = command(cell, case, onnx, vnnlib, json_file, options)
        ended = call(words, environment({"OMP_NUM_THREADS": str(options.threads)}), options.timeout, ROOT)
        record = json.loads(json_file.read_text(encoding="utf-8")) if json_file.is_file() else None
    settings = [word for before, word in pairwise(words) if before == "--set"]
    line: dict[str, Any] = {"cell": asdict(cell), "settings": settings, "wall": ended.seconds}
    if ended.code != 0 or record is None or not record.get("memory"):
        return {**line, "error": ended.complaint}
    return {**line, **digest(cell, record, out)}


def digest(cell: Cell, record: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What is kept of a record: memory, hashes, and the bounds in a file of their own."""
    line: dict[str, Any] = {"ranks": record["memory"]["ranks"], "seconds": record["seconds"]["total"]}
    line["device"], line["torch"] = record["device"], record["versions"]["torch"]
    if cell.method == "bab":
        return {**line, "verdict": record["verdict"], "domains": record["domains"]}
    arrays = {
        f"{name}:{side}": np.array([_number(t) for t in values], dtype=np.float32)
        for name, sides in record["bounds"].items()
        for side, values in sides.items()
    }
    folder = out / "bounds"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{cell.name}.npz", **arrays)  # type: ignore[arg-type]
    line["bounds"] = text_hash(record["bounds"])
    line["slopes"] = text_hash(record["slopes"]) if record.get("slopes") else None
    return line


def text_hash(value: Any) -> str:
    """SHA-256 of a part of a record as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _number(text: str) -> float:
    return float(text) if text.endswith("inf") else float.fromhex(text)


# ------------------------------------------------------------------------------------------------------ the results

Lines = Mapping[Cell, Mapping[str, Any]]


def read_cells(path: Path) -> dict[Cell, dict[str, Any]]:
    """The newest line of every cell."""
    return {Cell(**line["cell"]): line for line in read_lines(path)}


def largest(line: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by kind and the peak, the largest of all ranks."""
    ranks = line["ranks"]
    out = {kind: max(r["resident"][kind] for r in ranks) for kind in KINDS}
    return {**out, "chunks": max(r["chunks"] for r in ranks), "peak": max(r["peak"] for r in ranks)}


def peak_ratio(cell: Cell, lines: Lines) -> float | None:
    """Peak against that of ``single``, when both were measured in the same way."""
    base, line = lines.get(cell.other("single")), lines.get(cell)
    if not _measured(base) or not _measured(line):
        return None
    assert base is not None and line is not None
    if base["ranks"][0]["peak_kind"] != line["ranks"][0]["peak_kind"]:
        return None
    return largest(line)["peak"] / largest(base)["peak"]


def _measured(line: Mapping[str, Any] | None) -> bool:
    return line is not None and "error" not in line


def same_bits(cell: Cell, lines: Lines) -> bool | None:
    """Whether bounds and slopes are those of the mode they promise to equal; None without a promise or a reference."""
    base, line = lines.get(cell.other(SAME_BITS.get(cell.mode, ""))), lines.get(cell)
    if not _measured(base) or not _measured(line) or cell.method == "bab":
        return None
    assert base is not None and line is not None
    return (base["bounds"], base["slopes"]) == (line["bounds"], line["slopes"])


def difference(cell: Cell, out: Path) -> float | None:
    """Largest difference to the bounds of ``single``, relative to the largest bound of the same node."""
    paths = [out / "bounds" / f"{c.name}.npz" for c in (cell, cell.other("single"))]
    if not all(path.is_file() for path in paths):
        return None
    with np.load(paths[0]) as ours, np.load(paths[1]) as theirs:
        return relative_difference(dict(ours), dict(theirs))


def relative_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest |ours - theirs| over the largest magnitude of the same bounds; infinite when infinities differ."""
    if set(ours) != set(theirs) or any(ours[k].shape != theirs[k].shape for k in ours):
        return math.inf
    worst = 0.0
    for key, reference in theirs.items():
        a, b = ours[key].astype(np.float64), reference.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite]):
            return math.inf
        gap = np.abs(a[finite] - b[finite]).max(initial=0.0)
        scale = np.abs(b[finite]).max(initial=0.0)
        if gap > 0:
            worst = max(worst, float(gap / scale) if scale > 0 else math.inf)
    return worst


HEAD = ("network", "method", "mode", "P", *KINDS, "peak", "of single", "bits", "difference", "s")


def shown(lines: Lines, out: Path) -> str:
    """The table, sizes in MiB."""
    rows: list[list[str]] = []
    for cell, line in lines.items():
        head = [cell.network, cell.method, cell.mode, str(cell.ranks)]
        if "error" in line:
            rows.append([*head, line["error"], *[""] * (len(HEAD) - 5)])
            continue
        sizes = largest(line)
        kinds = [f"{sizes[k] / MIB:.1f}" if sizes[k] else "-" for k in KINDS]
        ratio, bits = peak_ratio(cell, lines), same_bits(cell, lines)
        gap = difference(cell, out) if cell.mode != "single" else None
        rows.append(
            [
                *head,
                *kinds,
                f"{sizes['peak'] / MIB:.1f}" + ("" if line["ranks"][0]["peak_kind"] != "rss" else " (process)"),
                "-" if ratio is None else f"{ratio:.3f}",
                "-" if bits is None else ("same" if bits else "DIFFER"),
                line.get("verdict", "-") if gap is None else f"{gap:.1e}",
                f"{line['seconds']:.1f}",
            ]
        )
    return table(HEAD, rows)


# ------------------------------------------------------------------------------------------------------- the targets

LARGE, SMALL, WIDE = "mlp-4096x8", "mlp-1024x4", "wide-131072"
SINGLE_MIB = {LARGE: 490.0, SMALL: 25.0}
# Peak of CROWN on LARGE against single, by mode and ranks.
FSDP_RATIOS = {
    ("", 4): 0.43,
    ("", 8): 0.31,
    ("-prefetch", 4): 0.56,
    ("-prefetch", 8): 0.44,
    ("-stream", 4): 0.31,
    ("-stream", 8): 0.19,
}
TP_RATIOS = {2: 0.52, 4: 0.27}
_ENOUGH_CHUNKS = 8  # from 480 rows on slopes of a start node are in so many chunks at least
_SMALLEST_WEIGHTS = 1 << 20  # below, the padding of biases shows


@dataclass(frozen=True)
class Verdict:
    """One target held against one measurement; ``value`` is None when it was not measured."""

    what: str
    value: float | None
    limit: float
    met: bool

    def __str__(self) -> str:
        word = "not measured" if self.value is None else ("met" if self.met else "MISSED")
        return f"{word}: {self.what}: {'-' if self.value is None else f'{self.value:.4g}'} (limit {self.limit:g})"


def at_most(what: str, value: float | None, limit: float) -> Verdict:
    return Verdict(what, value, limit, value is not None and value <= limit)


def judge(lines: Lines, out: Path | None = None) -> list[Verdict]:
    """Every target that the measured cells speak of, and the ones on named cells whether measured or not."""
    return [*_peaks(lines), *_shares(lines), *_bits(lines), *_tp(lines, out)]


def _peaks(lines: Lines) -> Iterator[Verdict]:
    for network, limit in SINGLE_MIB.items():
        line = lines.get(Cell(network, "crown", "single", 1))
        value = largest(line)["peak"] / MIB if _measured(line) and line is not None else None
        yield at_most(f"{network} crown single: peak in MiB", value, limit)
    for (kind, ranks), limit in FSDP_RATIOS.items():
        for rows in ("fsdp", "fsdp-replicated"):
            cell = Cell(LARGE, "crown", rows + kind, ranks)
            yield at_most(f"{cell.name}: peak of single's", peak_ratio(cell, lines), limit)
    for ranks, limit in TP_RATIOS.items():
        cell = Cell(WIDE, "crown", "tp", ranks)
        yield at_most(f"{cell.name}: peak of single's", peak_ratio(cell, lines), limit)


def _shares(lines: Lines) -> Iterator[Verdict]:
    """What is dealt to ranks is dealt evenly: the largest share against 1/P."""
    for cell, line in lines.items():
        base = lines.get(cell.other("single"))
        # A search keeps converted copies of resident weights: at rest says nothing there.
        if cell.ranks == 1 or cell.method == "bab" or not _measured(line) or not _measured(base):
            continue
        assert base is not None
        ours, theirs = largest(line), largest(base)
        if cell.mode.startswith(("fsdp", "tp")) and theirs["weights"] >= _SMALLEST_WEIGHTS:
            off = abs(ours["weights"] * cell.ranks / theirs["weights"] - 1)
            yield at_most(f"{cell.name}: weights at rest off 1/P", off, 0.02)
        sharded = cell.mode.startswith(("fsdp", "rows")) and "replicated" not in cell.mode
        even = theirs["chunks"] >= _ENOUGH_CHUNKS and theirs["chunks"] % cell.ranks == 0
        if cell.method == "alpha-crown" and sharded and even:
            for kind in ("slopes", "gradients", "optimizer"):
                if theirs[kind]:
                    off = ours[kind] * cell.ranks / theirs[kind] - 1
                    yield at_most(f"{cell.name}: {kind} off 1/P", abs(off), 0.05)


def _bits(lines: Lines) -> Iterator[Verdict]:
    for cell in lines:
        equal = same_bits(cell, lines)
        if equal is not None:
            yield Verdict(f"{cell.name}: bounds differ from {SAME_BITS[cell.mode]}", float(not equal), 0, equal)


def _tp(lines: Lines, out: Path | None) -> Iterator[Verdict]:
    for cell, line in lines.items():
        if cell.mode == "tp" and _measured(line) and cell.method != "bab" and out is not None:
            yield at_most(f"{cell.name}: relative difference to single", difference(cell, out), 1e-5)


# ---------------------------------------------------------------------------------------------------------- the loop


def run_all(
    wanted: Sequence[Cell], cases: Mapping[str, Case], out: Path, options: Options, say: Callable[[str], None]
) -> None:
    """Run what is not in the results file yet; every network is made once and removed after its last cell."""
    path = out / "cells.jsonl"
    done = read_cells(path)
    left = [cell for cell in wanted if cell not in done]
    say(f"{len(left)} cells to run, {len(wanted) - len(left)} are in {path}")
    for name in dict.fromkeys(cell.network for cell in left):
        case = cases[name]
        with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
            onnx, vnnlib = case.save(Path(folder))
            for cell in (c for c in left if c.network == name):
                line = run_cell(cell, case, onnx, vnnlib, out, options)
                append_line(path, line)
                outcome = line.get("error") or f"peak {largest(line)['peak'] / MIB:.1f} MiB"
                say(f"{cell.name}: {outcome}, {line['wall']:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, sample=False)
    parser.add_argument("--out", type=Path, default=Path("results/memory"), help="folder of results")
    parser.add_argument("--quick", action="store_true", help="small networks, up to two ranks")
    parser.add_argument("--networks", help="comma-separated names, default all")
    parser.add_argument("--methods", help="comma-separated: ibp, crown, alpha-crown, bab")
    parser.add_argument("--modes", help=f"comma-separated: {', '.join(MODES)}")
    parser.add_argument("--ranks", help="comma-separated, default 1,2,4,8")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="what train_resnet.py wrote, to be used as network 'trained'"
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="run only the I-th of N parts of the cells")
    parser.add_argument("--chunk-rows", type=int, default=256, help="rows of a chunk at the widest layer")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cell-timeout", type=int, default=1800, help="seconds after which a cell has failed")
    parser.add_argument("--retry", action="store_true", help="run cells again that failed before")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a target is missed or, without --quick, not measured"
    )
    parser.add_argument("--check-only", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended and temporary files go
    known = {case.name: case for case in ((*CASES, *QUICK) if arguments.quick else (*QUICK, *CASES))}
    if arguments.trained:
        known["trained"] = trained(arguments.trained)
        if not all(path.is_file() for path in known["trained"].files or ()):
            parser.error(f"--trained {arguments.trained}: resnet.onnx and resnet.vnnlib are not there")
    names = (
        arguments.networks.split(",") if arguments.networks else [c.name for c in (QUICK if arguments.quick else CASES)]
    )
    if set(names) - set(known):
        parser.error(f"unknown network {', '.join(sorted(set(names) - set(known)))}; there are {', '.join(known)}")
    modes = arguments.modes.split(",") if arguments.modes else None
    unknown = set(modes or ()) - set(MODES)
    if unknown:
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    ranks = [int(p) for p in (arguments.ranks or ("1,2" if arguments.quick else "1,2,4,8")).split(",")]
    methods = arguments.methods.split(",") if arguments.methods else None
    wanted = part_of(cells([known[n] for n in names], methods, modes, ranks), arguments.part)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "cells.jsonl"
    if arguments.retry:
        kept = [line for line in read_cells(path).values() if "error" not in line]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    options = Options(arguments.chunk_rows, arguments.threads, arguments.device, arguments.cell_timeout)
    if not arguments.check_only:
        run_all(wanted, known, arguments.out, options, lambda text: print(text, flush=True))
    lines = read_cells(path)
    print(shown(lines, arguments.out))
    if not (arguments.check or arguments.check_only):
        return 0
    verdicts = judge(lines, arguments.out)
    if arguments.quick:  # the named targets are those of large networks
        verdicts = [v for v in verdicts if v.value is not None]
    print("\n".join(str(v) for v in verdicts if not v.met))
    print(f"{sum(v.met for v in verdicts)} of {len(verdicts)} targets met")
    return 0 if all(v.met for v in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
