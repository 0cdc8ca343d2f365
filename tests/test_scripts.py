"""The measuring scripts: what they count, decided on small inputs."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import bench_instances, bench_ranks, bench_vnncomp, compare_speed, deadline_test, measure, soundness_suite
from scripts.performance.busy import covered
from verifier.api import verify
from verifier.config import load_config


def record(name: str, verdict: str) -> dict[str, object]:
    return {
        "onnx": {"path": f"/s/{name}.onnx"},
        "vnnlib": {"path": f"/s/{name}.vnnlib"},
        "verdict": verdict,
        "witness": None,
        "seconds": {"total": 1.5},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sample of one category with five instances."""
    (tmp_path / "cat").mkdir()
    lines = [f"onnx/{'big' if i % 2 else 'small'}{i}.onnx,vnnlib/p{i}.vnnlib,30" for i in range(5)]
    (tmp_path / "cat" / "instances.csv").write_text("\n".join(lines) + "\n")
    rows = [f"cat,cat/onnx/small0.onnx,cat/vnnlib/p0.vnnlib,30,{v}" for v in ("unsat",)]
    (tmp_path / "verdicts.csv").write_text("category,onnx,vnnlib,timeout,verdict\n" + "\n".join(rows) + "\n")
    return tmp_path


def test_selection(folder: Path) -> None:
    everything = measure.selected(folder, measure.Selection.parse("cat"), None)
    assert len(everything) == 5
    assert all(Path(row[0]).is_absolute() for row in everything)
    part = measure.selected(folder, measure.Selection.parse("cat:big"), None)
    assert [Path(row[0]).stem for row in part] == ["big1", "big3"]
    spread = measure.selected(folder, measure.Selection("cat"), 2)
    assert [Path(row[0]).stem for row in spread] == ["small0", "small2"]


def test_known_verdicts(folder: Path, tmp_path: Path) -> None:
    known = measure.truths(folder)
    assert list(known.values()) == ["unsat"]
    (row,) = measure.selected(folder, measure.Selection("cat"), 1)
    assert (row[0], row[1]) in known
    assert measure.truths(tmp_path / "nowhere") == {}


def test_summary_counts_wrong_verdicts_and_bad_witnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"a": "sat", "b": "unsat", "c": "unsat", "d": "timeout", "e": "sat"}
    truth = {"a": "unsat", "b": "unsat", "c": "sat", "d": "sat", "e": "sat"}
    records = [record(name, verdict) for name, verdict in told.items()]
    known = {(f"/s/{name}.onnx", f"/s/{name}.vnnlib"): verdict for name, verdict in truth.items()}
    monkeypatch.setattr(bench_vnncomp, "check_witness", lambda r: "invalid: x" if "e" in r["onnx"]["path"] else "valid")
    row = bench_vnncomp.summary("cat", records, known)
    assert {key: row[key] for key in ("instances", "solved", "sat", "unsat", "timeout", "wrong", "bad witness")} == {
        "instances": 5, "solved": 4, "sat": 2, "unsat": 2, "timeout": 1, "wrong": 2, "bad witness": 1,
    }  # fmt: skip
    assert len(row["problems"]) == 3
    table = bench_vnncomp.markdown([row, row], known=True).splitlines()
    assert table[-1].startswith("| all | 10 | 8 |")
    assert len({line.count("|") for line in table}) == 1


def test_missing_witness_is_bad() -> None:
    assert bench_vnncomp.check_witness(record("a", "sat")).startswith("invalid")


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("unsat\n", ""),
        ("timeout", ""),
        ("sat\n((X_0 0.5)\n (X_1 -1e-3)\n (Y_0 2.0))\n", ""),
        ("", "first line"),
        ("Unsat\n", "first line"),
        ("unsat\n((X_0 1.0))\n", "text after"),
        ("sat\n", "incomplete"),
        ("sat\n((X_0 0.5)\n (X_2 1.0)\n (Y_0 2.0))\n", "incomplete"),
        ("sat\n((X_0 0.5)\n", "incomplete"),
        ("sat\n((X_0 0.5)\n (Y_0 2.0)\n", "incomplete"),
    ],
)
def test_result_files_are_judged(tmp_path: Path, text: str, flaw: str) -> None:
    path = tmp_path / "results.txt"
    path.write_text(text)
    found = deadline_test.flaw(path)
    assert flaw in found and bool(found) == bool(flaw)


def test_missing_result_file_is_a_flaw(tmp_path: Path) -> None:
    assert deadline_test.flaw(tmp_path / "none") == "no result file"


def test_hard_instances_come_from_every_category(tmp_path: Path) -> None:
    header = "category,onnx,vnnlib,timeout,verdict,best_tool,best_time"
    rows = ["a,a/1,a/1,9,unsat,t,1.0", "a,a/2,a/2,9,unsat,t,5.0", "a,a/3,a/3,9,unknown,,", "b,b/1,b/1,9,sat,t,2.0"]
    (tmp_path / "verdicts.csv").write_text("\n".join([header, *rows]) + "\n")
    picked = deadline_test.hard_instances(tmp_path, 3)
    assert [(q.category, q.onnx.name) for q in picked] == [("a", "3"), ("b", "1"), ("a", "2")]


def test_made_instances_are_what_they_say(tmp_path: Path) -> None:
    made = deadline_test.large_property(tmp_path, slivers=50)
    text = made.vnnlib.read_text()
    assert text.count("(and") == 100
    assert text.count("(") == text.count(")")
    assert len(text) / 50 * 90_000 > 30e6
    leaf = deadline_test.leaf_network(tmp_path)
    assert leaf.onnx.is_file() and leaf.vnnlib.read_text().count("assert") == 129


def test_searches_are_read_from_records() -> None:
    groups = [{"domains": 4, "received": 1}, {"domains": 6, "received": 2}]
    parts = {"input_split": {"domains": 10, "groups": groups}, "relu_split": {"domains": 10, "groups": groups}}
    seconds = {"total": 9.0, "branch and bound on inputs": 1.0, "branch and bound on neurons": 2.0}
    found = bench_ranks.read({"verdict": "unsat", "seconds": seconds, "domains": 20, "statistics": parts})
    assert found == bench_ranks.Search("unsat", 3.0, 20, (8, 12), 6)
    alone = {"relu_split": {"domains": 7}, "root": {"open": 1}}
    found = bench_ranks.read({"verdict": "timeout", "seconds": {}, "domains": None, "statistics": alone})
    assert found == bench_ranks.Search("timeout", 0, 0)


@pytest.mark.parametrize("family", bench_ranks.FAMILIES, ids=lambda f: f.name)
def test_generated_networks_are_answered(family: bench_ranks.Family, tmp_path: Path) -> None:
    bench_ranks.write(family, tmp_path / family.name, 1, 30.0)
    ((onnx, vnnlib, _),) = measure.selected(tmp_path, measure.Selection(family.name))
    result = verify(onnx, vnnlib, {"bab.enabled": False}, timeout=60.0)
    assert result.verdict in ("unknown", "unsat")  # the threshold lies below all that a search for points finds


@pytest.mark.parametrize(("cold", "resident", "allowed"), [(1.2, 0.5, True), (1.4, 0.5, False), (1.2, 0.7, False)])
def test_start_up_is_judged_by_medians(cold: float, resident: float, allowed: bool) -> None:
    found = {"imports": [1.0, 0.9, 5.0], "verify": [1.0, 9.0, 1.1], "cold": [cold], "resident": [9.0, resident, 0.1]}
    lines, verdict = bench_instances.report(found)
    assert verdict == allowed
    assert sum("TOO SLOW" in line for line in lines) == (not allowed)


def test_a_remark_on_stderr_is_not_measured() -> None:
    command = [sys.executable, "-c", "import sys; sys.stderr.write('note')"]
    assert measure.seconds(command, {}, silent=False) > 0
    with pytest.raises(measure.Failed, match="note"):
        measure.seconds(command, {})


def suite(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(root / "scripts" / "soundness_suite.py"),
        "--device",
        "cpu",
        "--workers",
        "1",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_suite_runs_what_is_named_and_counts_it(root: Path) -> None:
    done = suite(root, "tests/ops/test_registry.py")
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"(\d+) passed in .*tests    (\d+) passed, 0 failed, 0 skipped", done.stdout, re.DOTALL)
    assert counted is not None and counted[1] == counted[2] != "0" and "device   cpu: CPU" in done.stdout


def test_a_suite_in_which_nothing_ran_has_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[list[str]] = []
    monkeypatch.chdir(soundness_suite.ROOT)
    monkeypatch.setattr(
        pytest, "main", lambda words, plugins: ended.append(words) or pytest.ExitCode.NO_TESTS_COLLECTED
    )
    assert soundness_suite.main(["--device", "cpu", "tests/ops/test_registry.py", "-k", "nothing"]) == 1
    assert ended[0][-3:] == ["tests/ops/test_registry.py", "-k", "nothing"]


def test_the_suite_takes_its_own_folders_where_none_is_named() -> None:
    options = soundness_suite.argparse.Namespace(device="cpu", quick=True, workers=2)
    words = soundness_suite.arguments_of(options, ["-k", "crown"], files=False)
    assert words[: len(soundness_suite.SUITE)] == list(soundness_suite.SUITE) and words[-2:] == ["-k", "crown"]
    assert all((soundness_suite.ROOT / name).exists() for name in (*soundness_suite.SUITE, *soundness_suite.WITH_FILES))
    assert words[words.index("--every") + 1] == str(soundness_suite.QUICK)
    assert soundness_suite.arguments_of(options, ["tests/bounds"], files=True)[0] == "--device"


def test_the_suite_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soundness_suite, "name_of", lambda device: None)
    assert soundness_suite.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(soundness_suite, "NEEDED", {"torch": "torch", "no_such_module": "no-such-package"})
    assert soundness_suite.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("pip install no-such-package")


def timed(name: str, verdict: str, seconds: float) -> bench_instances.Timed:
    return bench_instances.Timed(f"/v/onnx/{name}.onnx", f"/v/vnnlib/{name}.vnnlib", verdict, seconds)


def test_whole_instances_are_held_against_known_verdicts_and_limits() -> None:
    found = [timed("a", "sat", 0.5), timed("b", "unsat", 6.0), timed("c", "timeout", 1.0)]
    known = {(t.onnx, t.vnnlib): "unsat" for t in found}
    assert bench_instances.wrong({"prepared": found}, known) == ["a a prepared: sat, known to be unsat"]
    assert bench_instances.wrong({"prepared": found}, {}) == []
    assert bench_instances.slow(found, start=1.0, longest=5.0, over=0.5) == ["b b takes 6.00 s"]
    assert bench_instances.slow(found, start=0.4, longest=7.0, over=0.5) == [
        "the median is 1.00 s, 0.60 s more than a process start"
    ]
    assert bench_instances.line("x", found) == "| x | 3 | 1.00 | 6.00 (b b) | 1 sat 1 timeout 1 unsat |"


# ------------------------------------------------------------------------------------------- two commits, several ranks


def pair(name: str, old: tuple[str, float], new: tuple[str, float], float32: bool = True) -> dict[str, object]:
    covers = {"float32": float32, "reason": "because"}
    sides = [{"verdict": verdict, "covers": covers, "seconds": seconds} for verdict, seconds in (old, new)]
    return {
        "category": "cat",
        "onnx": f"/s/{name}.onnx",
        "vnnlib": f"/s/{name}.vnnlib",
        "old": sides[0],
        "new": sides[1],
    }


def test_commits_are_held_against_each_other() -> None:
    known = {("/s/d.onnx", "/s/d.vnnlib"): "sat"}

    def found(*pairs: dict[str, object]) -> tuple[list[str], bool]:
        text, good = bench_vnncomp.comparison(pairs, known, under=20.0)
        return text.splitlines(), good

    slower, late = pair("a", ("unsat", 4.0), ("unsat", 8.0), False), pair("b", ("sat", 25.0), ("timeout", 30.0))
    lines, good = found(slower, late, pair("e", ("sat", 2.0), ("sat", 2.0)))
    assert good and lines[0] == "cat: a.onnx a.vnnlib: 4.0 -> 8.0 s"
    assert "only real" in lines[1] and lines[2].startswith("late cat: b.onnx b.vnnlib")
    assert lines[3] == "3 instances; decided: old 3, new 2; covers float32: 0/1"
    assert lines[4] == "seconds, new / old, where both decide: median 1.500 of 2"
    for bad, word in (
        (pair("c", ("sat", 1.0), ("unsat", 1.0)), "WRONG"),
        (pair("d", ("unsat", 1.0), ("unsat", 1.0)), "WRONG"),
        (pair("f", ("sat", 1.0), ("timeout", 30.0)), "LOST"),
    ):
        lines, good = found(bad)
        assert not good and lines[0].startswith(f"{word} cat: ")


def test_both_trees_answer_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    trees = [bench_vnncomp.Tree(name, tmp_path) for name in ("old", "new")]
    monkeypatch.setattr(
        bench_vnncomp, "answer", lambda tree, row, options: order.append(tree.name) or {"by": tree.name}
    )
    for turn in range(2):
        assert [r["by"] for r in bench_vnncomp.both(trees, [], [], turn)] == ["old", "new"]
    assert order == ["old", "new", "new", "old"]


def test_one_instance_of_a_tree_is_answered(root: Path) -> None:
    examples = root / "examples"
    row = [str(examples / "rings.onnx"), str(examples / "rings_small.vnnlib"), "30"]
    found = bench_vnncomp.answer(bench_vnncomp.Tree("new", root), row, ["--timeout", "30"])
    assert found["verdict"] == "unsat" and found["seconds"] < 30
    lost = bench_vnncomp.answer(bench_vnncomp.Tree("old", root / "nowhere"), ["no", "files", "30"], ["--bad-option"])
    assert lost["verdict"] == "error" and "bad-option" in lost["reason"]


def test_every_group_is_chosen_from() -> None:
    groups = {"a": [[str(i)] for i in range(10)], "b": [["x"]], "c": []}
    assert bench_ranks.choose(groups, 4) == [["0"], ["x"], ["2"], ["5"]]
    assert len(bench_ranks.choose(groups, 100)) == 11


def test_answers_of_several_ranks_are_held_against_known_ones() -> None:
    records = [record("a", "sat"), record("b", "unsat"), {**record("c", "error"), "reason": "why"}]
    known = {(f"/s/{name}.onnx", f"/s/{name}.vnnlib"): "unsat" for name in "abc"}
    assert bench_ranks.problems(records, known, 60.0) == [
        "a.onnx a.vnnlib: sat, but unsat is known", "c.onnx c.vnnlib: error: why",
    ]  # fmt: skip
    assert len(bench_ranks.problems(records[1:2], known, -4.0)) == 1


def test_runs_that_hang_or_fail_are_told_from_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    run, shown = bench_ranks.examples()[0], "import sys, time; print('unsat')"
    monkeypatch.setattr(bench_ranks, "STRESS_SECONDS", -9.0)
    for code, verdict in (
        (shown, "unsat"),
        (f"{shown}; sys.exit('why')", "error: why"),
        ("import time; time.sleep(60)", "hang"),
    ):
        monkeypatch.setattr(bench_ranks.Run, "command", lambda run, device, code=code: [sys.executable, "-c", code])
        assert bench_ranks.answer(run, "cpu")[0] == verdict


@pytest.mark.parametrize("seed", range(5))
def test_shared_queries_are_valid_settings(seed: int) -> None:
    run = bench_ranks.shared(bench_ranks.examples()[0], random.Random(seed))
    parallel = load_config(assignments=run.settings).parallel
    assert parallel.ranks in (2, 3, 4) and parallel.backend in ("single", "fsdp", "tp")
    assert "parallel.ranks" in " ".join(run.command("cpu"))


# --------------------------------------------------------------------------------------------- processes and JSON lines


def ends(pid: int, within: float) -> bool:
    """Whether a process is gone, or waits for its parent, after some seconds at most: signals take their time."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1], 'w', 1)); "
    words = [sys.executable, "-c", child + "import time; time.sleep(60)", tmp_path / "pid"]
    ended = measure.call(words, measure.environment(), timeout=3.0)
    assert ended.code is None and "no end after 3 s" in ended.complaint and 3.0 <= ended.seconds < 30.0
    pid = int((tmp_path / "pid").read_text())
    assert ends(pid, within=10.0)


def test_lines_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results" / "lines.jsonl"
    assert measure.read_lines(path) == []
    measure.append_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "cut')
    measure.append_line(path, {"n": 3})
    assert measure.read_lines(path) == [{"n": 1}, {"n": 3}]


def tree_of(folder: Path, domains: int, seconds: float) -> Path:
    """A tree whose verifier sleeps, and says that it bounded so many domains."""
    (folder / "verifier").mkdir(parents=True)
    (folder / "verifier" / "__init__.py").write_text("")
    (folder / "verifier" / "api.py").write_text(
        "import time\nfrom types import SimpleNamespace\n"
        f"def verify(onnx, vnnlib, values, timeout=None):\n    time.sleep({seconds})\n"
        f"    counts = {{'relu_split': {{'domains': {domains}}}, 'root': {{'open': 1}}}}\n"
        "    return SimpleNamespace(statistics=counts, seconds={'root bounds': 1.0 / len(values)}, verdict='unknown')\n"
    )
    return folder


@pytest.mark.parametrize("same", [True, False])
def test_trees_are_compared_by_their_own_code(same: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tree_of(tmp_path / "old", 7, 0.1)
    new = tree_of(tmp_path / "new", 7 if same else 8, 0.02)
    (tmp_path / "list.csv").write_text("a/one.onnx,p.vnnlib,30\nb/two.onnx,p.vnnlib,30\n")
    words = [str(old), str(tmp_path / "list.csv"), "--new", str(new), "--rounds", "2", "--out", str(tmp_path / "lines")]
    assert compare_speed.main(words) == (0 if same else 1)
    said = capsys.readouterr().out
    ratio = float(said.split("ratios: ")[1].split()[0])
    assert 0.1 < ratio < 0.9 and "one.onnx p.vnnlib" in said and ("different work" in said) is not same
    lines = measure.read_lines(tmp_path / "lines")
    assert [line["tree"] for line in lines[:8]] == ["old"] * 4 + ["new"] * 4 and len(lines) == 16


def test_a_phase_is_compared_whatever_was_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a deadline trees may bound different numbers of domains; settings reach the queries."""
    old, new = tree_of(tmp_path / "old", 7, 0.0), tree_of(tmp_path / "new", 8, 0.0)
    (tmp_path / "list.csv").write_text("a/one.onnx,p.vnnlib,30\n")
    words = [str(old), str(tmp_path / "list.csv"), "--new", str(new), "--rounds", "1", "--timeout", "9", "--busy"]
    words += ["--phase", "root bounds", "--set", "bab.enabled=false"]
    assert compare_speed.main(words) == 0
    said = capsys.readouterr().out
    assert "0.250" in said and "ratios: 1.000" in said and ("no GPU" in said or "%" in said)


def test_overlapping_kernels_count_once() -> None:
    assert covered([(0, 10), (5, 12), (20, 30), (21, 22)]) == 22 and covered([]) == 0


def test_a_tree_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("a.onnx,p.vnnlib\n")
    broken = tree_of(tmp_path / "broken", 1, 0.0)
    (broken / "verifier" / "api.py").write_text("raise RuntimeError('no')")
    assert compare_speed.main([str(broken), str(tmp_path / "list.csv"), "--rounds", "1"]) == 1
    assert f"Error: {broken}: RuntimeError: no" in capsys.readouterr().err
