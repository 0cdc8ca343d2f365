"""The Python interface: ``verify`` a property, or ``compute_bounds`` over a box. Importing it imports neither torch nor
ONNX and changes nothing; the command line goes through here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verifier.config import Config, as_config
from verifier.core.deadline import Deadline
from verifier.core.errors import InputError
from verifier.core.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from torch import nn

    from verifier.core.problem import Problem
    from verifier.core.result import Result
    from verifier.frontend.network import Network


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
