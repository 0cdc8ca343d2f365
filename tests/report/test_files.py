"""Result files of every kind: links, pipes, devices, full disks, other users; nothing of an earlier query survives."""

from __future__ import annotations

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from tests.support.mounts import NOBODY, SOMEBODY, as_user, fill, open_to_all, small_disk
from verifier.core.errors import InputError
from verifier.report.files import is_stream, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_links_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real" / "r.txt"
    real.parent.mkdir()
    real.write_text("unsat\n")
    (tmp_path / "second").symlink_to("real/r.txt")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    write_atomic(tmp_path / "first", "sat\n")
    assert (tmp_path / "first").is_symlink() and (tmp_path / "second").is_symlink()
    assert real.read_text() == "sat\n" and not real.is_symlink()
    assert names(real.parent) == ["r.txt"]


def test_a_link_to_nothing_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_atomic(tmp_path / "link", "sat\n")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "sat\n"


def test_links_in_a_ring_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match=r"cannot write .*symbolic link"):
        write_atomic(tmp_path / "a", "sat\n")


def test_other_names_of_the_file_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("unsat, and much more that was there before\n")
    os.link(tmp_path / "a", tmp_path / "b")
    write_atomic(tmp_path / "a", "sat\n")
    assert (tmp_path / "b").read_text() == "sat\n"
    assert (tmp_path / "a").stat().st_nlink == 2


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_mode_stays(mode: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("unsat\n")
    (tmp_path / "a").chmod(mode)
    write_atomic(tmp_path / "a", "sat\n")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    path, text = tmp_path / "pipe", "sat\n" + "x" * 300_000 + "\n"  # more than it holds
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_atomic(path, text)
    reader.join(10)
    assert read == [text]
    assert is_stream(path)


def test_a_pipe_that_nobody_reads_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: nobody reads from it$"):
        write_atomic(tmp_path / "pipe", "sat\n")
    assert is_stream(tmp_path / "pipe")


def test_a_reader_that_does_not_read_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(InputError, match=r"nobody reads what is written$"):
        write_atomic(tmp_path / "pipe", "x" * 300_000)
    os.close(reader)


@pytest.mark.parametrize(("device", "works"), [("/dev/null", True), ("/dev/full", False)])
@pytest.mark.parametrize("linked", [False, True])
def test_devices_stay_devices(device: str, works: bool, linked: bool, tmp_path: Path) -> None:
    if not Path(device).is_char_device():
        pytest.skip(f"{device} is not here")
    path = Path(device)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(device)
    if works:
        write_atomic(path, "sat\n")
    else:
        with pytest.raises(InputError, match=f"cannot write {path}: No space left on device$"):
            write_atomic(path, "sat\n")
    assert Path(device).is_char_device() and is_stream(path)


def test_what_a_process_has_open_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "open").write_text("unsat\n")
    with open(tmp_path / "open", encoding="utf-8") as handle:
        write_atomic(Path(f"/proc/self/fd/{handle.fileno()}"), "sat\n")
        assert handle.read() == "sat\n"


def test_missing_folders_are_made_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_atomic(tmp_path / "a" / "b" / "r.txt", "sat\n")
    assert (tmp_path / "a" / "b" / "r.txt").read_text() == "sat\n"
    (message,) = caplog.messages
    assert str(tmp_path / "a" / "b") in message


def test_a_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot write {tmp_path}: Is a directory$"):
        write_atomic(tmp_path, "sat\n")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*Not a directory$"):
        write_atomic(tmp_path / "file" / "r.txt", "sat\n")


def test_a_name_as_long_as_it_may_be(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("r" * 255), "sat\n")
    assert (tmp_path / ("r" * 255)).read_text() == "sat\n"


def test_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as disk:
        write_atomic(disk / "r.txt", "unsat\n")
        fill(disk)
        write_atomic(disk / "r.txt", "sat\n")  # a file of its size can be written in place
        assert (disk / "r.txt").read_text() == "sat\n"
        with pytest.raises(InputError, match=r"cannot write .*r\.txt: No space left on device$"):
            write_atomic(disk / "r.txt", "sat\n" + "x" * 100_000)
        assert (disk / "r.txt").read_text() == ""
        with pytest.raises(InputError, match=r"cannot write .*new\.txt: No space left on device$"):
            write_atomic(disk / "new.txt", "sat\n" + "x" * 100_000)
        assert names(disk) == ["filling", "r.txt"]


def test_no_inode_is_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="1m", nr_inodes=3) as disk:
        write_atomic(disk / "r.txt", "unsat\n")
        (disk / "other").write_text("x")
        write_atomic(disk / "r.txt", "sat\n")
        assert (disk / "r.txt").read_text() == "sat\n"
        with pytest.raises(InputError, match=r"No space left on device$"):
            write_atomic(disk / "new.txt", "sat\n")


def test_a_file_system_that_is_read_only_keeps_what_it_holds_and_that_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as disk:
        write_atomic(disk / "r.txt", "unsat\n")
        if os.system(f"mount -o remount,ro '{disk}' 2>/dev/null") != 0:
            pytest.skip("no file system can be made read-only here")
        with pytest.raises(InputError, match=r"Read-only file system; what it held before is still there$"):
            write_atomic(disk / "r.txt", "sat\n")


def others_file(folder: Path, mode: int) -> Path:
    path = folder / "r.txt"
    path.write_text("unsat\n")
    path.chmod(mode)
    os.chown(path, NOBODY, NOBODY)
    return path


def test_another_users_file_in_a_sticky_folder_is_written_in_place(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with open_to_all(tmp_path) as folder:
        path = others_file(folder, 0o666)
        as_user(SOMEBODY, lambda: write_atomic(path, "sat\n"))
    assert path.read_text() == "sat\n" and path.stat().st_uid == NOBODY
    assert names(tmp_path) == ["r.txt"]


def test_another_users_file_that_is_closed_to_us_is_said_to_stay(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def refused() -> None:
        with pytest.raises(InputError, match=r"Permission denied; what it held before is still there$"):
            write_atomic(path, "sat\n")

    with open_to_all(tmp_path) as folder:
        path = others_file(folder, 0o644)
        as_user(SOMEBODY, refused)
    assert names(tmp_path) == ["r.txt"]


def test_root_leaves_a_file_to_its_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = others_file(tmp_path, 0o600)
    write_atomic(path, "sat\n")
    assert path.read_text() == "sat\n"
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (NOBODY, 0o600)


def test_a_folder_that_takes_no_new_file(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = tmp_path / "closed"
    folder.mkdir()
    with open_to_all(tmp_path):
        path = others_file(folder, 0o644)
        folder.chmod(0o555)
        as_user(NOBODY, lambda: write_atomic(path, "sat\n"))
    assert path.read_text() == "sat\n" and names(folder) == ["r.txt"]


def test_a_limit_on_the_size_of_files_is_one_sentence(tmp_path: Path) -> None:
    """As with a quota, the part that fits is not left behind."""
    write_atomic(tmp_path / "r.txt", "unsat\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        for name in ("r.txt", "new.txt"):
            with pytest.raises(InputError, match=rf"cannot write .*{name}: File too large$"):
                write_atomic(tmp_path / name, "sat\n" + "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["r.txt"] and (tmp_path / "r.txt").read_text() == ""
