"""What a warm server and its clients share: where they meet, what must agree between them, and how messages travel.

They talk over a socket in a folder that only its user can open. A request (:mod:`verifier.runtime.messages`) is one
message, with file descriptors beside it when it is a query. On the command line the server is the resident worker.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import resource
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import verifier
from verifier.core.errors import VerifierError
from verifier.core.messages import Message, MessageError, decode, encode
from verifier.runtime.messages import Caller, QueryFields
from verifier.runtime.query import Query

SOCKET = "socket"
LOCK = "lock"

M = TypeVar("M", bound=Message)

_MESSAGE_BYTES = 1 << 20
_MAX_DESCRIPTORS = 8

# Variables that libraries read while they are imported or while the device is touched.
_READ_AT_IMPORT = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "DNNL_", "ONEDNN_"),
    *("CUDA", "CUBLAS", "CUDNN", "NVIDIA_", "NCCL_", "GLOO_", "HIP_", "HSA_", "ROCR_"),
    *("TORCH", "PYTORCH", "ATEN_", "C10_", "TRITON", "ORT_", "ONNX", "NPY_", "NUMPY_", "PYTHON"),
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"),
    *("LD_", "MALLOC_", "GLIBC_", "LC_", "LANG", "TZ", "TMPDIR", "HOME"),
)
_NAMESPACES = ("mnt", "pid", "user", "time")


class Unavailable(VerifierError):
    """There is a warm server, or a trace of one, that cannot be used; says why."""


# ------------------------------------------------------------------------------------------------- the meeting place


def default_folder() -> Path:
    """The folder of this user's warm server."""
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"verifier-{os.geteuid()}"


def open_folder(path: Path, create: bool) -> int:
    """A descriptor of the folder, which is ours and closed to everyone else; all else is opened relative to it.

    Raises:
        Unavailable: it belongs to somebody else, others can open it, or it is no folder.
        FileNotFoundError: it does not exist and ``create`` is false.
    """
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"{path} cannot be opened as a folder: {error.strerror}") from None
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(folder)
        raise Unavailable(f"{path} is not a folder that only user {os.geteuid()} can open")
    return folder


def socket_path(folder: int) -> str:
    """The socket, reached through the open folder: of any length, and in no other folder than the one checked."""
    return f"/proc/self/fd/{folder}/{SOCKET}"


def peer_is_us(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to our user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.geteuid()


# ---------------------------------------------------------------------------------------------------- what must agree


def command() -> list[str]:
    """How this program was called, without its arguments."""
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]


def identity() -> str:
    """A hash of the interpreter, the program and the code it runs, from the files' times and sizes."""
    site = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    parts: list[object] = [sys.version, sys.prefix, list(sys.flags), sys.path, command()]
    parts += [[path, os.stat(path).st_mtime_ns] for path in site if os.path.isdir(path)]
    parts += sorted(_code(Path(verifier.__file__).parent))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code(folder: Path | str) -> Iterator[list[str | int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _code(entry.path)
            elif entry.name.endswith(".py"):
                status = entry.stat()
                yield [entry.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def caller() -> Caller:
    """What a client says of itself."""
    return Caller(identity(), circumstances())


def circumstances() -> dict[str, str]:
    """What a process inherits and a query could notice: the server must have been started with the same."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_READ_AT_IMPORT)}
    found["CPU affinity"] = str(sorted(os.sched_getaffinity(0)))
    found["nice value"] = str(os.getpriority(os.PRIO_PROCESS, 0))
    found["groups"] = str([*os.getresuid(), *os.getresgid(), *sorted(os.getgroups())])
    limits = {name: resource.getrlimit(kind) for name, kind in vars(resource).items() if name.startswith("RLIMIT_")}
    found["resource limits"] = str(sorted(limits.items()))
    root = os.stat("/")
    found["root folder"] = str([root.st_dev, root.st_ino])
    for name in _NAMESPACES:
        with contextlib.suppress(OSError):
            found[f"{name} namespace"] = os.readlink(f"/proc/self/ns/{name}")
    with contextlib.suppress(OSError):
        found["control group"] = Path("/proc/self/cgroup").read_text()
    return found


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first thing in which two circumstances differ."""
    return next((name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)), None)


# ----------------------------------------------------------------------------------------------------------- messages


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """One message; never waits for long, the kernel buffers it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([encode(message)], rights)


def receive(connection: socket.socket, *kinds: type[M]) -> tuple[M | None, list[int]]:
    """One message and the descriptors that came with it; ``None`` when the other end is closed.

    Args:
        kinds: the messages that are expected.

    Raises:
        MessageError: what came is none of them; its descriptors are closed.
    """
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MessageError("a message was cut off")
        message = decode(data, *kinds) if data else None
    except MessageError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, list(descriptors)


def pack(query: Query) -> QueryFields:
    """A query as it travels."""
    settings = None if query.settings is None else query.settings.model_dump_json()
    return QueryFields(query.onnx, query.vnnlib, settings, query.timeout, query.start, dict(query.networks))


def unpack(given: QueryFields) -> Query:
    """The query that was packed; ``time.monotonic()`` is the same in both processes."""
    from verifier.config import Config

    settings = None if given.settings is None else Config.model_validate_json(given.settings)
    networks = tuple(given.networks.items())
    return Query(given.onnx, given.vnnlib, settings, given.timeout, given.start, quiet=True, networks=networks)
