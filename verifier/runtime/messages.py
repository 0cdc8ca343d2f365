"""Everything that processes of one query say to each other; :mod:`verifier.core.messages` writes and reads it.

A worker tells its parent through a pipe, one message a line. The warm server, its clients and the process that it keeps
warm talk over sockets that keep messages apart; file descriptors travel beside some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from verifier.report.record import Outcome

Figure = float | int | str | None

# ------------------------------------------------------------------------------------------ from a worker to its parent


@dataclass(frozen=True)
class PhaseBegun:
    """The worker begins with something else."""

    name: str


@dataclass(frozen=True)
class Figures:
    """New values of some figures (:class:`verifier.core.progress.Progress`)."""

    values: Mapping[str, Figure]


@dataclass(frozen=True)
class Note:
    """A setting that was ignored or a path that fell back, in words."""

    text: str


@dataclass(frozen=True)
class Standing:
    """A proof that holds whatever comes, while the worker tries to make it say more."""

    outcome: Outcome


@dataclass(frozen=True)
class Finished:
    """How the query ended; the last message of a worker."""

    outcome: Outcome


@dataclass(frozen=True)
class WorkerHeartbeat:
    """A worker that other ranks wait for is alive. After the first, silence means that it is not."""


WorkerMessage = PhaseBegun | Figures | Note | Standing | Finished | WorkerHeartbeat
WORKER_MESSAGES: tuple[type[WorkerMessage], ...] = (PhaseBegun, Figures, Note, Standing, Finished, WorkerHeartbeat)

# ------------------------------------------------------------------------------------- from a client to the warm server


@dataclass(frozen=True)
class Caller:
    """What must be the same for a client and the server.

    Attributes:
        identity: a hash of interpreter, program and code.
        circumstances: what a process inherits and a query could notice, by name, as text.
    """

    identity: str
    circumstances: Mapping[str, str]


@dataclass(frozen=True)
class QueryFields:
    """A query: as :class:`verifier.runtime.query.Query`, with the settings as JSON of their own."""

    onnx: Path
    vnnlib: Path
    settings: str | None
    timeout: float | None
    start: float
    networks: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepare:
    """Answered by Ready, Busy, Retired or Failed, after WarmingUp when that is not known at once."""

    caller: Caller


@dataclass(frozen=True)
class Answer:
    """Answered by Refused, or by Accepted (from the warm process) and later Ended. Beside it travel the pipe for the
    worker's messages, the read end of the lifetime pipe, and the client's folder.

    Attributes:
        environ: the client's variables.
    """

    caller: Caller
    query: QueryFields
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Stop:
    """Answered by closing the connection."""


Request = Prepare | Answer | Stop
REQUESTS: tuple[type[Request], ...] = (Prepare, Answer, Stop)

# ------------------------------------------------------------------------------------- from the warm server to a client


@dataclass(frozen=True)
class Ready:
    """A query can be sent. The warm process also says it to the server."""


@dataclass(frozen=True)
class Busy:
    """The server works for somebody else."""


@dataclass(frozen=True)
class WarmingUp:
    """Another answer follows when that is over."""


@dataclass(frozen=True)
class Retired:
    """The server ends; another one can be started."""

    why: str


@dataclass(frozen=True)
class Failed:
    """The warm-up failed. The warm process also says it to the server."""

    why: str


@dataclass(frozen=True)
class Refused:
    """The query must go elsewhere."""

    why: str


@dataclass(frozen=True)
class Accepted:
    """The warm process works on the query."""

    pid: int


@dataclass(frozen=True)
class Ended:
    """The process of the query has ended, with this wait status."""

    status: int


Reply = Ready | Busy | WarmingUp | Retired | Failed | Refused | Accepted | Ended
REPLIES: tuple[type[Reply], ...] = (Ready, Busy, WarmingUp, Retired, Failed, Refused, Accepted, Ended)

# --------------------------------------------------------------------------------- between the server and its processes


@dataclass(frozen=True)
class HandOver:
    """A query for the warm process, with the descriptors of Answer and the connection to the client."""

    query: QueryFields
    environ: Mapping[str, str]


WARM_UP_REPORTS: tuple[type[Ready | Failed], ...] = (Ready, Failed)
