"""The performance benchmark: what is counted, how tables render, and that a section replaces only itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_performance
from scripts.bench_performance import Options
from scripts.measure import figure, put_section, table
from scripts.networks import save_mlp
from scripts.performance import modes, search
from scripts.performance.instances import Instance, Shape, select
from scripts.performance.modes import Modes
from scripts.performance.root import RootRows, root_row
from scripts.performance.tables import TABLES, render, write
from scripts.roofline import Counter, Rates, Work, roofline
from verifier import api
from verifier.config import load_config

RATES = Rates(flops=100.0, flops64=50.0, bytes=10.0)
CPU = load_config(values={"device": "cpu"})
TINY = Shape("tiny", 1.0, lambda path: save_mlp(path, (5, 12, 12, 3), gain=2.0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return TINY.write(tmp_path_factory.mktemp("network"))


def options(tiny: Instance) -> Options:
    return Options(CPU, 0.2, 60.0, RATES, [tiny], [tiny], [tiny], [tiny], mode_steps=[1])


# ----------------------------------------------------------------------------------------------------------- counting


def test_the_slower_of_products_and_traffic_decides() -> None:
    work = Work(flops=300.0, flops64=100.0, bytes=40.0)
    assert roofline(work, RATES) == 5.0  # 3 s and 2 s of products, 4 s of traffic
    assert roofline(Work(flops=300.0, bytes=40.0), RATES) == 4.0
    assert roofline(Work(flops=300.0, bytes=40.0), RATES, memory=False) == 3.0


def test_products_and_traffic_are_counted() -> None:
    a, b, x, w = torch.ones(3, 4), torch.ones(4, 5), torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3)
    with Counter() as counter:
        torch.mm(a, b)
        torch.nn.functional.conv2d(x, w)
    assert counter.work == Work(2 * 3 * 4 * 5 + 2 * 2 * 9 * 3 * 16, 0.0, 4.0 * (12 + 20 + 15 + 72 + 54 + 48))
    with Counter() as counter:
        torch.bmm(a.double()[None], b.double()[None])
    assert (counter.work.flops, counter.work.flops64) == (0.0, 120.0)


def test_views_move_nothing_and_expanded_tensors_little() -> None:
    row, out = torch.ones(1, 100), torch.zeros(50, 100)
    with Counter() as counter:
        wide = row.expand(50, 100)
        wide.t()
        out[:, :50]
    assert counter.work.bytes == 0
    with Counter() as counter:
        out.add_(wide)
    assert counter.work.bytes == 4.0 * (100 + 5000)


# ------------------------------------------------------------------------------------------------------ tables, pages


def test_figures_are_short() -> None:
    shown = {0.012345: "0.0123", 1234.5: "1,230", 12: "12", 4.2e-6: "4.2e-06", None: "-", -21.968: "-22"}
    assert {value: figure(value) for value in shown} == shown


def test_tables_have_equal_lines() -> None:
    lines = table(["what", "s"], [["a", "1"], ["b", "22"]]).splitlines()
    assert lines == ["| what | s |", "| --- | ---: |", "| a | 1 |", "| b | 22 |"]


def test_a_section_replaces_only_itself() -> None:
    page = "# Title\n\n<!-- end of sections -->\n\ntext after\n"
    page = put_section(page, "cpu", "old")
    page = put_section(page, "gpu", "other")
    assert page.index("old") < page.index("other") < page.index("<!-- end of sections -->") < page.index("text after")
    again = put_section(page, "cpu", "new\n")
    assert again == page.replace("old", "new")
    assert put_section(again, "cpu", "new") == again


def test_pages_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        put_section("text", "cpu", "body")
    with pytest.raises(ValueError, match="does not end"):
        put_section("<!-- begin: cpu -->\n", "cpu", "body")


def test_the_page_takes_sections(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(bench_performance.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    part = {"rows": [], "command": "python x", "rates": str(RATES), "circumstances": "load 0.5"}
    write({"another device": {"start": part}}, page)
    assert "### another device\n\n**Start**" in page.read_text(encoding="utf-8")


def test_every_part_has_tables() -> None:
    assert list(TABLES) == list(bench_performance.PARTS)


# ---------------------------------------------------------------------------------------------------------- instances


def test_patterns_find_instances(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    lines = ["onnx/a.onnx,vnnlib/p1.vnnlib,9", "onnx/b.onnx,vnnlib/p1.vnnlib,9", "onnx/b.onnx,vnnlib/p2.vnnlib,9"]
    (tmp_path / "cat" / "instances.csv").write_text("\n".join(lines) + "\n")

    def found(pattern: str) -> str:
        return select(tmp_path, pattern).name

    assert found("cat:*:*") == "cat a p1"
    assert found("cat:b*:*") == "cat b p1"
    assert found("cat:*:p2*") == "cat b p2"
    assert found("cat:a*:p2*") == "cat a p2"  # no line has both
    for bad, words in (("cat:c*:*", "nothing that fits"), ("cat", "CATEGORY:NETWORK:PROPERTY")):
        with pytest.raises(ValueError, match=words):
            select(tmp_path, bad)


# -------------------------------------------------------------------------------------------------- what is measured


def test_searches_are_measured_and_shown(tiny: Instance) -> None:
    (name, ready), *_ = options(tiny).ready
    found = search.measure(ready, RATES, "search", 0.5)
    assert name == "tiny" and found["children_per_s"] > 0 and found["mean_bound"] <= 0
    text = "\n".join(t.render([{"instance": name, **found}]) for t in TABLES["search"])
    assert len(text.splitlines()) == 3 and len({line.count("|") for line in text.splitlines()}) == 1


def test_root_bounds_are_measured_and_shown(tiny: Instance) -> None:
    row = root_row(tiny, CPU, RATES)
    assert row["rows"] == 2
    assert row["alpha"]["bound"] >= row["crown"]["bound"] and row["reference"]["bound"] >= row["crown"]["bound"]
    assert row["alpha"]["work"]["flops"] > row["crown"]["work"]["flops"] > 0
    assert row["crown"]["work"]["flops64"] > 0  # what is certified
    for shown in TABLES["root"]:
        lines = shown.render([{"instance": "tiny", **row}]).splitlines()
        assert len({line.count("|") for line in lines}) == 1


def test_ways_to_bound_a_root_are_ordered(tiny: Instance) -> None:
    """All gain on CROWN; what is optimised jointly never ends above what is optimised layer by layer."""
    problem = api.load_problem(tiny.vnnlib)
    network = api.load_any(tiny.onnx, (1, problem.n_in))
    ways = Modes(RootRows(network.graph, problem, CPU))
    crown, rows, layers, joint = ways.crown(), ways.rows_only(60), ways.layerwise(60), ways.joint(60)
    assert crown <= rows <= layers + 1e-3
    assert rows < joint <= layers + 1e-3
    (shown,) = TABLES["modes"]
    found = [{"instance": "tiny", **row} for row in modes.measure(tiny, CPU, [1])]
    header, _, first, *others = shown.render(found).splitlines()
    assert header.startswith("| instance | mode") and "CROWN" in first and len(others) == 3


def test_memory_holds_the_weights_in_a_fresh_process_too(tiny: Instance) -> None:
    config = load_config(values={"device": "cpu", "threads": 1})
    here = bench_performance.memory_row(tiny, "crown", config)
    assert here["weights"] == 4 * (5 * 12 + 12 + 12 * 12 + 12 + 12 * 3 + 3)
    assert here["peak"] >= here["resident"] >= here["weights"]
    assert bench_performance.apart(bench_performance.memory_row, tiny, "crown", config) == here


def test_a_part_is_kept_and_rendered(tiny: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_performance, "apart", lambda work, *arguments: work(*arguments))
    part = bench_performance.measured_part("memory", options(tiny))
    assert [row["method"] for row in part["rows"]] == ["crown", "alpha-crown"]
    text = render("a device", {"memory": json.loads(json.dumps(part))})
    assert text.startswith("### a device\n\n**Memory**") and text.count("| tiny |") == 2 and str(RATES) in text


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_performance.arguments_of(["--parts", "root,start"]).parts == ["root", "start"]
    with pytest.raises(SystemExit):
        bench_performance.arguments_of(["--parts", "roots"])
    assert "roots" in capsys.readouterr().err


def test_queries_take_the_place_of_the_usual_networks(
    tiny: Instance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--query", str(tiny.onnx), str(tiny.vnnlib), "--steps", "3", "--batch", "7", "--set", "threads=1"]
    arguments = bench_performance.arguments_of([*words, "--device", "cpu"])
    config = bench_performance.config_of(arguments)
    assert (config.bab.iterations, config.bab.batch_size, config.threads, config.device) == (3, 7, 1, "cpu")
    found = bench_performance.options_of(arguments, config, RATES, tmp_path)
    for group in (found.searched, found.networks, found.sized, found.optimised):
        assert [(i.name, i.onnx) for i in group] == [("tiny tiny", tiny.onnx)]
    assert arguments.out is None and list(tmp_path.iterdir()) == []
    assert bench_performance.arguments_of([]).out == bench_performance.RESULTS
    with pytest.raises(SystemExit):
        bench_performance.arguments_of([*words, "--write"])
    assert "--query does not go with --write" in capsys.readouterr().err
    assert "modes" not in bench_performance.arguments_of([]).parts
