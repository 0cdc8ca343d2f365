"""The Python interface: ``verify`` a property, or ``compute_bounds`` over a box. Importing it imports neither torch nor
ONNX and changes nothing; the command line goes through here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verifier.config import Config, as_config
from verifier.core.deadline import Deadline
from verifier.core.errors import InputError
from verifier.core.inventory import Inventory
from verifier.core.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from verifier.bounds.api import Method, NetworkBounds
    from verifier.core.interval import Interval
    from verifier.core.problem import Problem
    from verifier.core.result import Result
    from verifier.frontend.network import Network
    from verifier.solver.place import Placed


@dataclass(frozen=True)
class Bounds:
    """What :func:`compute_bounds` returns; float32, on the CPU; valid in exact arithmetic unless ``numerics.certify``
    is off.

    Attributes:
        lower, upper: of the output, in its shape.
        intermediate: bounds of every pre-activation by name, empty unless asked for.
    """

    lower: Tensor
    upper: Tensor
    intermediate: Mapping[str, Interval] = field(default_factory=dict)


def verify(
    network: str | Path | nn.Module | Network,
    property: str | Path | Problem,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    timeout: float | None = None,
    *,
    input_shape: tuple[int, ...] | None = None,
) -> Result:
    """Prove that no input of the property's set violates it, or find a counterexample.

    Args:
        network: an ONNX file, a torch module, or a network that was loaded before.
        property: a VNN-LIB file or a problem.
        config: settings: a :class:`Config`, values by key (``{"bab.batch_size": 64}``), or a YAML file.
        timeout: seconds from now.
        input_shape: what a torch module takes, leading batch dimension of 1 included; default ``(1, n_inputs)``.

    Returns:
        ``unsat`` (proved), ``sat`` with a replayed witness, or ``unknown``/``timeout`` with the reason.

    Raises:
        InputError: a file or a setting is wrong.
        UnsupportedError: the network or the property uses something that is not handled.
        DeadlineExceeded: the time was over before solving began.
    """
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout is {timeout}; give a positive number of seconds")
    return answer(network, property, as_config(config), Deadline(timeout), SilentProgress(), input_shape)


def compute_bounds(
    module: nn.Module | Network | str | Path,
    lower: Tensor | np.ndarray,
    upper: Tensor | np.ndarray,
    method: Method = "crown",
    return_intermediate: bool = False,
    config: Config | Mapping[str, Any] | str | Path | None = None,
) -> Bounds:
    """Lower and upper bounds of a network's outputs over a box of inputs.

    Args:
        module: a torch module, a loaded network or an ONNX file.
        lower, upper: the box, in the shape the network takes, leading batch dimension of 1 included.
        method: ``ibp``, ``crown`` or ``alpha-crown``.
        return_intermediate: bounds of every pre-activation too.
        config: settings, as for :func:`verify`.

    Raises:
        InputError: the box is malformed or does not fit the network.
        UnsupportedError: the network uses something that is not handled.
    """
    import numpy as np

    if method not in ("ibp", "crown", "alpha-crown"):
        raise InputError(f"method is '{method}'; it is one of ibp, crown, alpha-crown")
    low, up = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    if low.shape != up.shape:
        raise InputError(f"lower has shape {list(low.shape)} and upper {list(up.shape)}; give one shape")
    if not (np.isfinite(low).all() and np.isfinite(up).all()):
        raise InputError("a bound of the box is not finite; every input needs two finite bounds")
    if not (low <= up).all():
        raise InputError(f"lower exceeds upper at {int((~(low <= up)).sum())} inputs")
    network = load_any(module, low.shape)
    if network.n_in != low.size:
        raise InputError(f"the box has {low.size} inputs but the network takes {list(network.input_shape)}")
    settings = as_config(config)
    _, found = bound_network(network, round_down(low), -round_down(-up), settings, method, return_intermediate)
    name = network.graph.nodes[network.graph.output].name
    bounds = found.certified if settings.numerics.certify else found.plain
    return Bounds(bounds[name].lower, bounds[name].upper, dict(bounds) if return_intermediate else {})


def bound_network(
    network: Network, lower: np.ndarray, upper: np.ndarray, config: Config, method: Method, intermediate: bool
) -> tuple[Placed, NetworkBounds]:
    """Bounds over a float32 box (n_in,), and where the network was placed."""
    import numpy as np
    import torch

    from verifier.bounds.alpha import Schedule
    from verifier.bounds.api import compute_graph_bounds
    from verifier.solver.place import place

    alpha = config.bounds.alpha
    hidden = alpha.iterations if alpha.intermediate_iterations == "auto" else alpha.intermediate_iterations
    placed = place(network.graph, config)

    def work() -> NetworkBounds:
        return compute_graph_bounds(
            network.graph,
            placed.backend,
            torch.from_numpy(np.array(lower, dtype=np.float32).reshape(-1)),
            torch.from_numpy(np.array(upper, dtype=np.float32).reshape(-1)),
            method,
            intermediate,
            Schedule(hidden, alpha.learning_rate, decay=alpha.decay),
            Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay),
            certify=config.numerics.certify,
        )

    return placed, placed.retry(work)


def measured_bounds(
    network: Network, lower: np.ndarray, upper: np.ndarray, config: Config, method: Method, intermediate: bool
) -> tuple[NetworkBounds, list[Inventory]]:
    """:func:`bound_network`, and what it took of every rank's memory, from the placing of the weights on."""
    from verifier.core.tracker import measured_peak
    from verifier.solver.place import device_of

    with measured_peak(device_of(config), network.graph.parameters.values()) as peak:
        placed, found = bound_network(network, lower, upper, config, method, intermediate)
    backend = placed.backend
    return found, [Inventory(backend.rank, backend.weights.resident_bytes(), backend.usage, peak.bytes, peak.kind)]


def round_down(values: np.ndarray) -> np.ndarray:
    """The largest float32 values that do not exceed the given float64 ones."""
    import numpy as np

    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)


def answer(
    network: str | Path | nn.Module | Network,
    property: str | Path | Problem,
    config: Config,
    deadline: Deadline,
    progress: Progress,
    input_shape: tuple[int, ...] | None = None,
) -> Result:
    """:func:`verify` with a clock that may have started earlier and someone who listens."""
    progress.phase("property")
    problem = load_problem(property, deadline)
    progress.phase("network")
    from verifier.solver.pipeline import solve

    loaded = load_any(network, input_shape or (1, problem.n_in))
    check_sizes(loaded, problem)
    deadline.check("loading")
    return solve(loaded, problem, config, deadline, progress)


def load_problem(property: str | Path | Problem, deadline: Deadline | None = None) -> Problem:
    """The problem itself, or the one in a VNN-LIB file."""
    if not isinstance(property, str | Path):
        return property
    from verifier.spec.vnnlib import parse_vnnlib

    return parse_vnnlib(property, deadline=deadline)


def load_any(network: str | Path | nn.Module | Network, input_shape: tuple[int, ...]) -> Network:
    """A network from an ONNX file or a torch module; a loaded one is returned as it is.

    Args:
        input_shape: for a torch module.
    """
    import torch

    from verifier.frontend.network import Network, from_module, load_network

    if isinstance(network, str | Path):
        return load_network(network)
    if isinstance(network, torch.nn.Module):
        return from_module(network, torch.zeros(input_shape))
    if isinstance(network, Network):
        return network
    raise InputError(f"a network is an ONNX file or a torch.nn.Module, not a {type(network).__name__}")


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


def resolve_device(name: str) -> str:
    """The device that ``auto`` means here."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
