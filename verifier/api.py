"""The Python interface: ``verify`` a property. Importing it imports neither torch nor ONNX and changes nothing; the
command line goes through here too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from verifier.config import Config, as_config
from verifier.core import plugins
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError, InputError, UnsupportedError
from verifier.core.formats import read_foreign
from verifier.core.progress import Progress, SilentProgress

# What Python runs as a rank that is started here.
RANK_COMMAND = ("-m", "verifier", "rank")
Report = TypeVar("Report")

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from verifier.core.problem import Problem
    from verifier.core.question import Question
    from verifier.core.result import Result, Witness
    from verifier.frontend.network import Network
    from verifier.parallel.world import World
    from verifier.solver.phases import Phase
    from verifier.solver.proofs import Wanted


Files = Mapping[str, str | Path]  # ONNX files by the names that a property gives to networks


def verify(
    network: str | Path | nn.Module | Network | Files,
    property: str | Path | Problem,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    timeout: float | None = None,
    *,
    input_shape: tuple[int, ...] | None = None,
    proof: str | Path | None = None,
) -> Result:
    """Prove that no input of the property's set violates it, or find a counterexample.

    Args:
        network: an ONNX file, a torch module, or a network that was loaded before; for a property in VNN-LIB 2.0 also
            files by name, as in ``{"f": "a.onnx", "g": "b.onnx"}``.
        property: a VNN-LIB file or a problem.
        config: settings: a :class:`Config`, values by key (``{"bab.batch_size": 64}``), or a YAML file.
        timeout: seconds from now.
        input_shape: what a torch module takes, leading batch dimension of 1 included; default the shape of the point
            or box that the problem was made from.
        proof: file for the proof of an ``unsat``, see docs/proof-format.md; network and property must be files.

    Returns:
        ``unsat`` (proved), ``sat`` with a replayed witness, or ``unknown``/``timeout`` with the reason.

    Raises:
        InputError: a file or a setting is wrong.
        UnsupportedError: the network or the property uses something that is not handled.
        DeadlineExceeded: the time was over before solving began.
    """
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout is {timeout}; give a positive number of seconds")
    settings, deadline = as_config(config), Deadline(timeout)
    with job(settings) as ranks:
        terms = Terms(deadline, ranks=ranks, proof=None if proof is None else Path(proof))
        return answer(network, property, settings, terms, input_shape)


class Job:
    """The ranks that answer a query together; they start up while this one reads files.

    Attributes:
        rank: of this process; rank 0 reads the files and has the answer, the others take part.
        joined: called once several ranks have met.
    """

    def __init__(self, rank: int, join: Callable[[Deadline], World], stop: Callable[[], None] | None = None) -> None:
        self.rank = rank
        self.joined: Callable[[], None] = lambda: None
        self._join, self._stop = join, stop
        self._world: World | None = None

    def join(self, deadline: Deadline | None = None) -> World:
        """Wait for all ranks.

        Raises:
            DeadlineExceeded: they did not come in time.
        """
        if self._world is None:
            self._world = self._join(deadline or Deadline())
            if self._world.size > 1:
                self.joined()
        return self._world

    @property
    def witness(self) -> Witness | None:
        """A counterexample that was replayed, or None."""
        return None if self._world is None else self._world.witness

    def close(self) -> None:
        """End the other ranks, whatever they do."""
        if self._world is not None:
            self._world.close()
        elif self._stop is not None:
            self._stop()


@contextmanager
def job(config: Config, fatal: Callable[[str], None] | None = None) -> Iterator[Job]:
    """The ranks that a configuration asks for, or that torchrun has started; ended on the way out.

    Args:
        fatal: called from another thread when a rank was lost and this one is stuck waiting for it.

    Raises:
        ConfigError: what was started does not match what is configured; a process alone is told when it joins.
    """
    found = _start(config, fatal)
    try:
        yield found
    finally:
        found.close()


def _start(config: Config, fatal: Callable[[str], None] | None) -> Job:
    if config.parallel.ranks == 1 and "WORLD_SIZE" not in os.environ:
        return Job(0, lambda _: _alone(config))
    from verifier.parallel.launch import LocalRanks
    from verifier.parallel.world import join, rank_device, under_torchrun
    from verifier.solver.setup import check_parallel, device_of, rank_threads

    wanted = config.parallel.ranks
    started = under_torchrun()
    if started is not None:
        if wanted not in (1, "auto", started.size):
            raise ConfigError(
                f"torchrun started {started.size} ranks but parallel.ranks is {wanted}; leave it out or make them equal"
            )
        check_parallel(config, started.size)
        device = rank_device(config.device, started.local_rank)
        return Job(started.rank, lambda deadline: join(started, device, fatal=fatal, deadline=deadline))
    if wanted == "auto":
        import torch

        wanted = max(1, torch.cuda.device_count()) if device_of(config).type == "cuda" else 1
    check_parallel(config, wanted)
    if wanted == 1:
        return Job(0, lambda _: _alone(config))
    command = [*RANK_COMMAND, "--device", config.device]
    ranks = LocalRanks(wanted, command, config.parallel.logs, rank_threads(config, wanted))
    return Job(0, lambda deadline: ranks.lead(rank_device(config.device, 0), fatal, deadline), ranks.close)


def _alone(config: Config) -> World:
    from verifier.parallel.world import solo
    from verifier.solver.setup import check_parallel, device_of

    check_parallel(config, 1)
    return solo(device_of(config))


def bound_network(
    ranks: Job,
    load: Callable[[], Network],
    config: Config,
    wanted: Phase[Report],
    kind: type[Report],
    deadline: Deadline | None = None,
) -> Report:
    """Bounds of a network, computed by all ranks of a job.

    Args:
        load: gives the network; called on rank 0 alone.
        wanted: the boxes and what to compute.
        kind: of what it gives.
        deadline: default none.

    Raises:
        DeadlineExceeded: time ran out.
    """
    from verifier.solver.phases import RankState
    from verifier.solver.ranks import broadcast_end, broadcast_query, rank_loop, run_on_all
    from verifier.solver.setup import cpu_threads, set_up

    if ranks.rank != 0:
        return rank_loop(ranks.join(), kind)
    network = load()
    world = ranks.join(deadline)
    with world.explained(), cpu_threads(network.graph, config, world.local_size):
        broadcast_query(world, network.graph, None, config)
        setup = set_up(network.graph, config, world)
        state = RankState(None, config, world, setup, deadline or Deadline())
        found = run_on_all(state, wanted)
        broadcast_end(world, found)
    return found


def round_down(values: np.ndarray) -> np.ndarray:
    """The largest float32 values that do not exceed the given float64 ones."""
    import numpy as np

    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)


@dataclass(frozen=True)
class Terms:
    """On which a query is answered.

    Attributes:
        deadline: when to stop; its clock may have started earlier.
        progress: who listens.
        ranks: of the job; all of them return the answer of rank 0. Default: this process alone.
        proof: file for the proof of an ``unsat``.
    """

    deadline: Deadline = field(default_factory=Deadline)
    progress: Progress = field(default_factory=SilentProgress)
    ranks: Job | None = None
    proof: Path | None = None


def answer(
    network: str | Path | nn.Module | Network | Files,
    property: str | Path | Problem,
    config: Config,
    terms: Terms,
    input_shape: tuple[int, ...] | None = None,
) -> Result:
    """:func:`verify` on terms of the caller."""
    deadline, progress, ranks = terms.deadline, terms.progress, terms.ranks
    if ranks is not None and ranks.rank != 0:
        from verifier.core.result import Result
        from verifier.solver.ranks import rank_loop

        return rank_loop(ranks.join(), Result)
    with plugins.noted():
        progress.phase("property")
        asked = load_question(property, deadline)
        progress.phase("network")
        from verifier.solver.pipeline import solve

        deadline.check("start-up")
        wanted = None if terms.proof is None else _wanted(terms.proof, network, property)
        loaded, problem = load_both(network, asked, input_shape, deadline, wanted is not None)
        deadline.check("loading")
        if ranks is None:
            return solve(loaded, problem, config, deadline, progress, wanted=wanted)
        progress.phase("ranks")
        return solve(loaded, problem, config, deadline, progress, ranks.join(deadline), wanted)


def _wanted(path: Path, network: object, property: object) -> Wanted:
    """A proof file of two files.

    Raises:
        InputError: one of them is no file.
    """
    from verifier.solver.proofs import Wanted

    if not isinstance(network, str | Path) or not isinstance(property, str | Path):
        raise InputError("a proof file speaks of an ONNX file and a VNN-LIB file; give both as files")
    return Wanted(path, Path(property))


def _shapes(problem: Problem, given: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """What one sample of a torch module may look like: as it was said, or as the problem's point suggests."""
    if given is not None:
        return [tuple(given)]
    shape = problem.input_shape or (problem.n_in,)
    found = [(1, *shape)]
    return [*found, tuple(shape)] if len(shape) > 1 and shape[0] == 1 else found


def _load_shaped(
    network: str | Path | nn.Module | Network,
    shapes: Sequence[tuple[int, ...]],
    deadline: Deadline | None,
    aligned: bool = False,
) -> Network:
    """The network on a sample of the first shape that it runs on; an error is that of the first one."""
    first: InputError | None = None
    for shape in shapes:
        try:
            return load_any(network, shape, deadline, aligned)
        except InputError as error:
            first = first or error
    assert first is not None
    if isinstance(network, str | Path) or "does not run" not in str(first):
        raise first
    raise InputError(
        f"{first}; it was given a sample of shape {list(shapes[0])}: pass input_shape=(1, ...), or make the property "
        "from a point in the shape that the network takes"
    ) from first


def load_question(property: str | Path | Problem, deadline: Deadline | None = None) -> Problem | Question:
    """The problem itself, or what a file asks: VNN-LIB, or of a kind that another package reads."""
    if not isinstance(property, str | Path):
        return property
    from verifier.core.problem import Problem
    from verifier.spec.vnnlib import parse_any

    found = read_foreign(Path(property))
    if found is not None:
        if not isinstance(found, Problem):
            raise InputError(f"{property}: was read as a {type(found).__name__}, which is no property")
        return found

    return parse_any(property, deadline)


def load_problem(property: str | Path | Problem, deadline: Deadline | None = None) -> Problem:
    """:func:`load_question` for what is about one network with one input and one output.

    Raises:
        UnsupportedError: the property is about several tensors or networks.
    """
    from verifier.core.problem import Problem

    found = load_question(property, deadline)
    if isinstance(found, Problem):
        return found
    if not found.is_plain:
        raise UnsupportedError(f"{found.source} is about several tensors or networks; this is answered by verify alone")
    return found.problem


def load_both(
    network: str | Path | nn.Module | Network | Files,
    asked: Problem | Question,
    input_shape: tuple[int, ...] | None = None,
    deadline: Deadline | None = None,
    proved: bool = False,
) -> tuple[Network, Problem]:
    """The network, or several as one, and the problem about it; they fit each other.

    Args:
        input_shape: of a torch module.
        proved: a proof file is wanted.

    Raises:
        InputError, UnsupportedError: they do not, or proof files do not speak of them.
    """
    from verifier.core.problem import Problem

    if isinstance(asked, Problem):
        if isinstance(network, Mapping):
            raise InputError("networks have names in VNN-LIB 2.0 alone; give one network for this property")
        loaded = _load_shaped(network, _shapes(asked, input_shape), deadline, proved)
        check_sizes(loaded, asked)
        return loaded, asked
    if proved:
        raise UnsupportedError(f"{asked.source} is in VNN-LIB 2.0, of which proof files do not speak yet")
    if not isinstance(network, Mapping | str | Path):
        if not asked.is_plain:
            raise UnsupportedError(
                f"{asked.source} is about several tensors or networks, which are read from ONNX files alone"
            )
        loaded = load_any(network, input_shape or asked.parts[0].inputs[0].shape, deadline)
        check_sizes(loaded, asked.problem)
        return loaded, asked.problem
    return _load_files(network, asked, deadline), asked.problem


def _load_files(network: str | Path | Files, asked: Question, deadline: Deadline | None) -> Network:
    """The networks of a question in VNN-LIB 2.0."""
    from verifier.core.arithmetic import plain_arithmetic

    files = network_files(network, asked)
    with plain_arithmetic():
        from verifier.frontend.product import load_plain, load_product

        return load_plain(files, asked, deadline) if asked.is_plain else load_product(files, asked, deadline)


def network_files(network: str | Path | Files, asked: Question) -> dict[str, Path]:
    """The file of every network of a question that needs one.

    Raises:
        InputError: one is missing, or one too many was given.
    """
    if not isinstance(network, Mapping):
        if len(asked.named) > 1:
            names = ", ".join(asked.named)
            raise InputError(f"{asked.source} declares the networks {names}; give each its file (--network NAME=FILE)")
        return {name: Path(network) for name in asked.named}
    given = {name: Path(path) for name, path in network.items()}
    for part in asked.parts:
        own = given.pop(part.name, None)
        if not part.equal_to:
            if own is None:
                raise InputError(f"{asked.source} declares the network '{part.name}', which has no file; give one")
            given[part.name] = own
        elif own is not None:
            first = Path(network[part.equal_to]) if part.equal_to in network else None
            if first is None or not (own == first or _same_bytes(own, first)):
                raise InputError(
                    f"{asked.source} says that '{part.name}' equals '{part.equal_to}', but its file is another one"
                )
    unknown = sorted(set(given) - set(asked.named))
    if unknown:
        raise InputError(f"{asked.source} declares no network '{unknown[0]}', only {', '.join(asked.named)}")
    return given


def _same_bytes(a: Path, b: Path) -> bool:
    from verifier.spec.source import read_bytes

    return read_bytes(a) == read_bytes(b)


def load_any(
    network: str | Path | nn.Module | Network,
    input_shape: tuple[int, ...],
    deadline: Deadline | None = None,
    aligned: bool = False,
) -> Network:
    """A network from a file (ONNX, or of a kind that another package reads) or a torch module; or a loaded one itself.

    Args:
        input_shape: for a torch module.
        aligned: what a nonlinearity of an ONNX file reads stays a tensor of the file.

    Raises:
        DeadlineExceeded: loading takes too long.
    """
    import torch

    from verifier.core.arithmetic import plain_arithmetic
    from verifier.frontend.network import Network, from_module, load_network

    if isinstance(network, str | Path):
        with plain_arithmetic():
            return _load_foreign(Path(network), deadline) or load_network(network, deadline, aligned)
    if isinstance(network, torch.nn.Module):
        with plain_arithmetic(default=None):  # a module's forward may make tensors of the caller's default dtype
            return from_module(network, torch.zeros(input_shape), deadline=deadline)
    if isinstance(network, Network):
        return network
    raise InputError(f"a network is an ONNX file or a torch.nn.Module, not a {type(network).__name__}")


def _load_foreign(path: Path, deadline: Deadline | None) -> Network | None:
    """A network from a file of a kind that another package reads; None for other files."""
    from torch import nn

    from verifier.frontend.network import from_module

    with plugins.noted() as used:
        match read_foreign(path):
            case None:
                return None
            case (nn.Module() as module, tuple() | list() as shape):
                found = from_module(module, input_shape=tuple(shape), name=path.name, deadline=deadline)
                return replace(found, plugins=tuple(used))
            case other:
                raise InputError(
                    f"{path}: was read as a {type(other).__name__}; a network is a pair of a torch.nn.Module and the "
                    "shape of one sample"
                )


def check_sizes(network: Network, problem: Problem) -> None:
    """The property must speak of exactly the network's inputs and outputs."""
    sides = (
        ("inputs", network.input_shape, network.n_in, problem.n_in, "X"),
        ("outputs", network.output_shape, network.n_out, problem.n_out, "Y"),
    )
    for side, shape, size, declared, letter in sides:
        if size != declared:
            raise InputError(
                f"the network has {size} {side} (shape {list(shape)}) but the property declares {declared} "
                f"({letter}_0 to {letter}_{declared - 1}); check that the two belong together"
            )
