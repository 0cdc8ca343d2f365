"""The warm server: queries handed over, everything that can be wrong with it, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import ROOT, SCRIPTS, environment, no_process_mentions, scripted_python
from verifier.config import Config, load_config
from verifier.core.messages import decode, encode
from verifier.runtime import gpu_context, warm_client, warm_link
from verifier.runtime.messages import Answer, Caller, Prepare, QueryFields
from verifier.runtime.query import Query
from verifier.runtime.warm_link import LOCK, SOCKET, Unavailable, open_folder, peer_is_us

Completed = subprocess.CompletedProcess[str]


def until(true: Callable[[], Any], seconds: float = 20.0) -> float:
    """Wait for it; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + seconds
        time.sleep(0.01)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@dataclass
class Place:
    """The competition's scripts with a scripted solver and a warm server of their own."""

    folder: Path
    variables: dict[str, str]

    @property
    def resident(self) -> Path:
        return self.folder / "resident"

    def prepare(self, **extra: str) -> Completed:
        args = [str(SCRIPTS / "prepare_instance.sh"), "v1", "c", "n.onnx", "p.vnnlib"]
        variables = {**self.variables, **extra}
        done = subprocess.run(
            args, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0
        return done

    def start(self, words: str, name: str = "r", limit: float = 300, **extra: str) -> subprocess.Popen[str]:
        """Run_instance.sh with results in ``name.txt``."""
        (self.folder / f"{name}.vnnlib").write_text(words)
        args = [str(SCRIPTS / "run_instance.sh"), "v1", "c", "n.onnx", f"{name}.vnnlib", f"{name}.txt", str(limit)]
        pipe = subprocess.PIPE
        variables = {**self.variables, **extra}
        return subprocess.Popen(args, cwd=self.folder, env=variables, stdout=pipe, stderr=pipe, text=True)

    def run(self, words: str, name: str = "r", limit: float = 300, **extra: str) -> tuple[str, str, str]:
        """First line of the results, stdout and stderr."""
        process = self.start(words, name, limit, **extra)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0
        return (self.folder / f"{name}.txt").read_text().split("\n")[0], stdout, stderr

    def server(self) -> int:
        """Process id of the warm server, 0 when there is none."""
        return next(iter(self.servers()), 0)

    def servers(self) -> list[int]:
        """The server, and those that have not yet noticed that there is one."""
        text = f"vnncomp\0resident\0--resident-folder\0{self.resident}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if text in (entry / "cmdline").read_bytes() and alive(pid):
                    found.append(pid)
        return [pid for pid in found if os.getsid(pid) == pid]

    def state(self, name: str = "state") -> dict[str, Any]:
        path = self.folder / name
        until(path.exists)
        values = json.loads(path.read_text())
        path.unlink()
        return values


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "n.onnx").write_bytes(b"")
    settings = {
        "VERIFIER_RESIDENT_SECONDS": "60",
        "VERIFIER_RESIDENT_PATIENCE": "20",  # the machine may be busy
        "VERIFIER_RESIDENT_FOLDER": str(tmp_path / "resident"),
    }
    place = Place(tmp_path, environment(VERIFIER_PYTHON=str(scripted_python(tmp_path)), **settings))
    yield place
    server = place.server()
    if server:
        os.kill(server, signal.SIGCONT)
        os.kill(server, signal.SIGTERM)
    until(lambda: no_process_mentions(str(tmp_path)))


# ------------------------------------------------------------------------------------------------------ handing over


def test_a_query_is_handed_over_and_inherits_from_its_client(place: Place) -> None:
    assert place.prepare().stderr == ""
    server = place.server()
    extra = {"COLOUR": "blue", "SHLVL": "9"}
    assert place.run("state state unsat", **extra) == ("unsat", "unsat\n", "")
    warm = place.state()
    assert warm["parent"] == server
    assert place.run("state state unsat", VERIFIER_RESIDENT_SECONDS="0", **extra)[0] == "unsat"
    cold = place.state()
    assert cold["parent"] != server
    assert warm["group"] == warm["pid"] and cold["group"] == cold["pid"]
    for values in (warm, cold):
        del values["pid"], values["parent"], values["group"], values["variables"]["VERIFIER_RESIDENT_SECONDS"]
    assert warm == cold
    assert warm["folder"] == str(place.folder) and warm["variables"]["COLOUR"] == "blue"


def test_nothing_is_carried_from_one_query_to_the_next(place: Place) -> None:
    place.prepare()
    server = place.server()
    states = []
    for words in ("torch state state disturb unsat", "torch state state sat"):
        assert place.run(words)[2] == ""
        states.append(place.state())
        place.prepare()
    assert place.server() == server == states[0]["parent"] == states[1]["parent"]
    assert states[0].pop("pid") != states[1].pop("pid")
    assert states[0].pop("group") != states[1].pop("group")
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "words", ["sat", "unsat", "unknown", "crash", "segv", "input", "unsupported", "kill", "mismatch"]
)
def test_answers_are_the_same_as_without(words: str, place: Place) -> None:
    place.prepare()
    words = f"print noise note text {words}"
    warm = place.run(f"state state {words}")
    assert place.state()["parent"] == place.server()
    text = (place.folder / "r.txt").read_text()
    assert place.run(words, VERIFIER_RESIDENT_SECONDS="0") == warm
    assert (place.folder / "r.txt").read_text() == text


@pytest.mark.timing
@pytest.mark.parametrize("words", ["phase lp sleep 60", "spin 60", "wait"])
def test_the_limit_holds_and_the_query_is_gone(words: str, place: Place) -> None:
    place.prepare()
    began = time.monotonic()
    assert place.run(f"state state {words}", limit=2)[::2] == ("timeout", "")
    assert time.monotonic() - began < 2.0
    pid = place.state()["pid"]
    until(lambda: not alive(pid), 1.0)


def test_prepare_leaves_the_server_on_its_own(place: Place) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    args = [str(SCRIPTS / "prepare_instance.sh"), "v1", "c", "n.onnx", "p.vnnlib"]
    process = subprocess.Popen(args, cwd=place.folder, env=place.variables, pass_fds=[write], start_new_session=True)
    process.wait(timeout=60)
    os.close(write)
    assert os.read(read, 1) == b""  # nobody holds what the script inherited
    os.close(read)
    server = place.server()
    assert server and os.getsid(server) == server
    for pid in (server, *children(server)):
        assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
        assert os.readlink(f"/proc/{pid}/cwd") == "/"


# --------------------------------------------------------------------------------------------------- one, while needed


def test_prepares_at_once_make_one_server(place: Place) -> None:
    args = [str(SCRIPTS / "prepare_instance.sh"), "v1", "c", "n.onnx", "p.vnnlib"]
    several = [subprocess.Popen(args, cwd=place.folder, env=place.variables) for _ in range(3)]
    assert [process.wait(timeout=60) for process in several] == [0, 0, 0]
    until(lambda: len(place.servers()) == 1)
    (server,) = place.servers()
    (prepared,) = children(server)
    assert place.run("state state unsat")[2] == ""
    assert place.state()["pid"] == prepared


def test_it_ends_after_the_idle_limit(place: Place) -> None:
    place.prepare(VERIFIER_RESIDENT_SECONDS="1.5")
    server = place.server()
    assert alive(server)
    until(lambda: not alive(server))
    until(lambda: no_process_mentions(str(place.resident)), 1.0)
    assert [path.name for path in place.resident.iterdir()] == [LOCK]


def test_a_working_server_is_not_idle(place: Place) -> None:
    place.prepare(VERIFIER_RESIDENT_SECONDS="1.5")  # time for a client to start on a busy machine
    process = place.start("sleep 3 state state sleep 0.2 sat", VERIFIER_RESIDENT_SECONDS="1.5")
    assert alive(place.state()["parent"])
    assert process.communicate(timeout=20) == ("sat\n", "")


def test_it_can_be_stopped(place: Place) -> None:
    place.prepare()
    pids = [place.server(), *children(place.server())]
    warm_client.stop_server(place.resident)
    until(lambda: not any(map(alive, pids)))
    assert not (place.resident / SOCKET).exists()


def test_none_is_started_when_not_wanted(place: Place) -> None:
    place.prepare(VERIFIER_RESIDENT_SECONDS="0")
    assert not place.resident.exists() and not place.server()


# ------------------------------------------------------------------------------------------- what can be wrong with it


def test_busy(place: Place) -> None:
    place.prepare()
    first = place.start("state first sleep 60", "first")
    working = place.state("first")
    verdict, _, stderr = place.run("state state unsat")
    assert verdict == "unsat" and "it is busy" in stderr
    assert place.state()["parent"] != working["parent"]
    began = time.monotonic()
    place.prepare()  # does not wait for somebody else's query
    assert time.monotonic() - began < 10
    assert alive(working["pid"])
    first.terminate()
    first.communicate(timeout=10)


def test_not_ready_yet(place: Place) -> None:
    args = [str(place.folder / "python"), "-P", "-m", "verifier", "vnncomp", "prepare", "c", "n.onnx", "p.vnnlib"]
    # Without the script, so that there is one process to kill; the script puts the tool in front of the module path.
    path = f"{ROOT}:{place.variables['PYTHONPATH']}"
    variables = {**place.variables, "SCRIPTED_WARM_UP": "sleep", "PYTHONPATH": path}
    with subprocess.Popen(args, cwd=place.folder, env=variables) as preparing:
        until(lambda: (place.resident / SOCKET).exists())
        verdict, _, stderr = place.run("unsat")
        preparing.kill()
    assert verdict == "unsat" and "it is not ready" in stderr


def test_a_warm_up_that_fails_is_reported(place: Place) -> None:
    stderr = place.prepare(SCRIPTED_WARM_UP="crash").stderr
    assert "no resident worker: its warm-up failed: ZeroDivisionError: cold" in stderr
    until(lambda: not place.server())
    assert place.run("unsat") == ("unsat", "unsat\n", "")


@pytest.mark.parametrize("who", ["server", "prepared"])
def test_one_that_hangs_costs_a_fraction_of_a_second(who: str, place: Place) -> None:
    place.prepare()
    server = place.server()
    (prepared,) = children(server)
    os.kill(server if who == "server" else prepared, signal.SIGSTOP)
    (place.folder / "p.vnnlib").write_text("unsat")
    query = Query(place.folder / "n.onnx", place.folder / "p.vnnlib", Config(), 30.0, time.monotonic(), quiet=True)
    verdict, _, stderr = place.run("unsat", VERIFIER_RESIDENT_PATIENCE="0.3")
    assert verdict == "unsat" and "no answer in 0.3 s" in stderr
    began = time.monotonic()
    with pytest.raises(Unavailable):
        warm_client.start_warm(query, place.resident)
    assert time.monotonic() - began < 1.0
    if who == "server":
        began = time.monotonic()
        assert "no answer in" in place.prepare().stderr
        assert time.monotonic() - began < 10.0
    else:  # given up, replaced, and in order again
        until(lambda: not alive(prepared))
        place.prepare()
        assert place.run("unsat")[2] == ""


@pytest.mark.parametrize("who", ["server", "prepared"])
def test_one_that_was_killed(who: str, place: Place) -> None:
    place.prepare()
    server = place.server()
    (prepared,) = children(server)
    os.kill(server if who == "server" else prepared, signal.SIGKILL)
    until(lambda: not alive(prepared))
    assert place.run("unsat")[0] == "unsat"
    place.prepare()
    assert place.run("state state sat")[::2] == ("sat", "")
    assert (place.state()["parent"] == server) == (who == "prepared")


def test_a_socket_nobody_listens_at(place: Place) -> None:
    place.resident.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(place.resident / SOCKET))
    assert place.run("unsat") == ("unsat", "unsat\n", "")
    place.prepare()
    assert place.run("state state unsat")[2] == ""
    assert place.state()["parent"] == place.server()


def test_other_variables_are_refused(place: Place) -> None:
    place.prepare()
    for name, value in (("OMP_NUM_THREADS", "2"), ("CUDA_VISIBLE_DEVICES", "7"), ("LD_PRELOAD", "")):
        assert place.variables.get(name) != value
        verdict, _, stderr = place.run("state state unsat", **{name: value})
        assert verdict == "unsat" and f"another {name}" in stderr
        assert place.state()["parent"] != place.server()
    assert place.run("unsat")[2] == ""  # it has waited for one that fits
    server = place.server()
    place.prepare(OMP_NUM_THREADS="2")
    assert place.server() not in (0, server)
    assert place.run("unsat", OMP_NUM_THREADS="2")[2] == ""


def test_other_code_is_refused(place: Place) -> None:
    place.prepare()
    server = place.server()
    shim = place.folder / "python"
    before = shim.read_text()
    shim.write_text(before.replace(" -m ", " -O -m "))
    verdict, _, stderr = place.run("state state unsat")
    assert verdict == "unsat" and "other code or another interpreter" in stderr
    assert place.state()["parent"] != server
    place.prepare()
    assert place.server() not in (0, server)
    assert place.run("unsat")[2] == ""


def test_identity_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "verifier" / "bounds"
    code.mkdir(parents=True)
    (code / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(warm_link.verifier, "__file__", str(tmp_path / "verifier" / "__init__.py"))
    seen = [warm_link.identity(), warm_link.identity()]
    assert seen[0] == seen[1]
    (code / "a.py").write_text("x = 2\n")
    seen.append(warm_link.identity())
    (code / "b.py").write_text("")
    seen.append(warm_link.identity())
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    seen.append(warm_link.identity())
    assert len(set(seen)) == 4


def test_circumstances_name_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = warm_link.circumstances()
    assert warm_link.difference(before, warm_link.circumstances()) is None
    monkeypatch.setenv("MKL_NUM_THREADS", "17")
    monkeypatch.setenv("SHLVL", "17")
    assert warm_link.difference(before, warm_link.circumstances()) == "MKL_NUM_THREADS"
    assert {"CPU affinity", "nice value", "resource limits", "control group", "root folder"} <= before.keys()
    json.dumps(before)


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.mark.timing
@pytest.mark.parametrize("victim", ["script", "client", "server, then client"])
def test_a_query_dies_with_its_client(victim: str, place: Place) -> None:
    place.prepare()
    server = place.server()
    process = place.start("phase search state state spin 60")
    pid = place.state()["pid"]
    (client,) = children(process.pid)
    if victim.startswith("server"):
        os.kill(server, signal.SIGKILL)
        until(lambda: not alive(server))
        time.sleep(0.1)
        assert alive(pid)
    os.kill(process.pid if victim == "script" else client, signal.SIGKILL)
    until(lambda: not alive(pid), 1.0)
    process.communicate(timeout=10)
    assert (place.folder / "r.txt").read_text() in {"unknown\n", "error\n"}


def test_a_query_outlives_the_server(place: Place) -> None:
    place.prepare()
    process = place.start("state state sleep 0.6 sat")
    parent = place.state()["parent"]
    os.kill(parent, signal.SIGKILL)
    assert process.communicate(timeout=20) == ("sat\n", "")
    assert (place.folder / "r.txt").read_text().startswith("sat\n((X_0 ")


def test_a_stopped_server_lets_its_query_finish(place: Place) -> None:
    place.prepare()
    process = place.start("state state sleep 0.6 sat")
    parent = place.state()["parent"]
    os.kill(parent, signal.SIGTERM)
    assert process.communicate(timeout=20) == ("sat\n", "")
    until(lambda: not alive(parent))


def test_a_worker_that_is_killed_leaves_a_valid_file(place: Place) -> None:
    place.prepare()
    process = place.start("phase search state state sleep 60")
    os.kill(place.state()["pid"], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=20)
    assert stdout == "error\n" and stderr.startswith("Error: killed (signal 9) during search")
    assert (place.folder / "r.txt").read_text() == "error\n"
    place.prepare()
    assert place.run("unsat")[2] == ""


# ------------------------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize("flaw", ["open to others", "another owner", "a link", "a file"])
def test_a_folder_that_is_not_ours_alone(flaw: str, place: Place) -> None:
    if flaw == "open to others":
        place.resident.mkdir()
        place.resident.chmod(0o755)
    elif flaw == "another owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        place.resident.mkdir(mode=0o700)
        os.chown(place.resident, 12345, 12345)
    elif flaw == "a link":
        (place.folder / "real").mkdir(mode=0o700)
        place.resident.symlink_to(place.folder / "real")
    else:
        place.resident.write_text("")
    assert str(place.resident) in place.prepare().stderr
    assert not place.server()
    verdict, _, stderr = place.run("unsat")
    assert verdict == "unsat" and str(place.resident) in stderr


def test_what_is_made_is_closed_to_others(place: Place) -> None:
    place.prepare()
    modes = {path.name: path.stat().st_mode & 0o777 for path in [place.resident, *place.resident.iterdir()]}
    assert modes.pop(place.resident.name) == 0o700
    assert modes.keys() == {LOCK, SOCKET} and not any(mode & 0o077 for mode in modes.values())


def test_the_user_at_the_other_end_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert peer_is_us(ours)
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        assert not peer_is_us(ours)


def test_a_listener_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.close(open_folder(tmp_path / "f", create=True))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "f" / SOCKET))
        listener.listen()
        monkeypatch.setattr(warm_client, "peer_is_us", lambda connection: False)
        with pytest.raises(Unavailable, match="another user"):
            warm_client.connect(tmp_path / "f", 1.0)


def test_nonsense_does_no_harm(place: Place) -> None:
    place.prepare()
    server = place.server()
    silent = warm_client.connect(place.resident, 1.0)
    wrong = encode(Prepare(Caller("", {}))).replace(b"caller", b"callers")
    short = encode(Answer(Caller("", {}), QueryFields(Path("n"), Path("p"), None, 1.0, 0.0), {}))
    for text in (b"", b"{", b"[]", b'{"kind": "Answer"}', wrong, short.replace(b"1.0", b'"1"'), b"\xff" * 1000):
        connection = warm_client.connect(place.resident, 1.0)
        assert connection is not None
        with connection:
            connection.send(text)
            answer = connection.recv(1 << 16)
            assert answer == b""
    assert silent is not None
    silent.close()
    place.prepare()
    assert place.run("unsat")[2] == ""
    assert alive(server)


def test_every_field_of_a_query_is_passed_on(tmp_path: Path) -> None:
    config = load_config(
        assignments=["seed=7", "bab.learning_rate_beta=0.30000000000000004", "memory.chunk_bytes=1MiB"]
    )
    strange = Path(os.fsdecode(b"a\xff\xe4 b.onnx"))
    for timeout, settings in ((None, config), (0.1 + 0.2, None)):
        query = Query(strange, tmp_path / "p.vnnlib", settings, timeout, 123.456789012345678, quiet=True)
        again = warm_link.unpack(decode(encode(warm_link.pack(query)), QueryFields))
        assert again == query and again.config == query.config == (settings or Config())
    packed = {*(field.name for field in fields(QueryFields)), "quiet", "verbose", "proof"}  # scripts ask for none
    assert packed == {field.name for field in fields(Query)}


# ------------------------------------------------------------------------------------------------------------- device


class Driver:
    """A CUDA driver that notes what is asked of it."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.calls: list[str] = []

    def cuInit(self, flags: int) -> int:
        self.calls.append("init")
        return 0 if self.devices else 100

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        self.calls.append(f"get {ordinal}")
        return 0

    def cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int:
        self.calls.append("retain")
        return 0


@pytest.mark.parametrize(("devices", "calls"), [(1, ["init", "get 0", "retain"]), (0, ["init"])])
def test_the_context_is_begun_in_a_thread(devices: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(devices)
    monkeypatch.setattr(gpu_context.ctypes, "CDLL", lambda name: driver)
    thread = gpu_context.begin_context(Config())
    assert thread is not None
    thread.join(10)
    assert driver.calls == calls


def test_no_context_without_need_or_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_context.begin_context(Config(device="cpu")) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpu_context.begin_context(Config()) is None
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(gpu_context, "_DRIVER", "libnone.so.0")
    thread = gpu_context.begin_context(Config())
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
