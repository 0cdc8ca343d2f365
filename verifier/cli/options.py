"""Options that several commands share or that belong together; a command gets each group as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from verifier.core.errors import InputError

if TYPE_CHECKING:
    from verifier.config import Config

FILE = click.Path(path_type=Path)
DEVICES = click.Choice(["auto", "cpu", "cuda"])

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def grouped(name: str, kind: type[Any], *options: Decorator) -> Decorator:
    """Options, in the order of the help text, whose values a command gets as one argument.

    Args:
        name: of the argument.
        kind: a dataclass that has a field for every option.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def gathered(**values: Any) -> Any:
            group = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            return command(**values, **{name: group})

        decorated: Command = gathered
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


@dataclass(frozen=True)
class QueryFiles:
    """Network and property."""

    onnx: Path
    vnnlib: Path


query_files = grouped(
    "files",
    QueryFiles,
    click.option("--onnx", required=True, type=FILE, help="Network (ONNX, perhaps .gz)."),
    click.option("--vnnlib", required=True, type=FILE, help="Property (VNN-LIB, perhaps .gz)."),
)


@dataclass(frozen=True)
class VerifyFiles:
    """Networks and property: ``QUERY --network NAME=FILE ...`` as in the standard, or ``--onnx`` and ``--vnnlib``."""

    query: Path | None
    network: tuple[str, ...]
    onnx: Path | None
    vnnlib: Path | None

    @property
    def property(self) -> Path:
        """
        Raises:
            InputError: it is not given once.
        """
        if (self.query is None) == (self.vnnlib is None):
            raise InputError("give one property: verify QUERY, or --vnnlib FILE")
        return self.query or self.vnnlib or Path()

    def find(self) -> tuple[Path, tuple[tuple[str, Path], ...], Path]:
        """The (first) network, all networks with names, and the property; they exist.

        Raises:
            InputError: one does not, or what is given does not make a query.
        """
        from verifier.cli.instances import check_networks, existing, find_networks

        property = self.property
        if (self.onnx is None) == (not self.network):
            raise InputError("give the network: --onnx FILE, or --network NAME=FILE for every network of the property")
        if self.onnx is not None:
            return *find_networks(str(self.onnx)), existing(property, "property")
        pairs = [(name.strip(), path) for name, _, path in (text.partition("=") for text in self.network)]
        wrong = next((text for text in self.network if not text.partition("=")[2]), None)
        if wrong is not None:
            raise InputError(f"--network {wrong}: give a name and a file, NAME=FILE")
        return *check_networks(pairs, " ".join(self.network)), existing(property, "property")


verify_files = grouped(
    "files",
    VerifyFiles,
    click.argument("query", required=False, type=FILE),
    click.option("--network", multiple=True, metavar="NAME=FILE", help="Network that QUERY names; repeatable."),
    click.option("--onnx", type=FILE, help="The only network (ONNX, perhaps .gz)."),
    click.option("--vnnlib", type=FILE, help="Property (VNN-LIB, perhaps .gz), instead of QUERY."),
)


@dataclass(frozen=True)
class Settings:
    """Where the configuration comes from: files, single keys, and short forms of common keys."""

    config_file: Path | None
    assignments: tuple[str, ...]
    device: str | None
    seed: int | None
    ranks: int | None

    def load(self) -> Config:
        """The configuration that is asked for.

        Raises:
            InputError: a file cannot be read, or a setting is wrong.
        """
        from verifier.config import load_config

        named = (("device", self.device), ("seed", self.seed), ("parallel.ranks", self.ranks))
        short = {key: value for key, value in named if value is not None}
        return load_config([self.config_file] if self.config_file else [], self.assignments, short)


settings = grouped(
    "settings",
    Settings,
    click.option("--config", "config_file", type=FILE, help="Settings (YAML) on top of the defaults."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set one key; repeatable."),
    click.option("--device", type=DEVICES, help="Same as --set device=NAME."),
    click.option("--seed", type=click.IntRange(min=0), help="Same as --set seed=N."),
    click.option("--ranks", type=click.IntRange(min=1), help="Same as --set parallel.ranks=N."),
)


@dataclass(frozen=True)
class BoundsOptions:
    """Which bounds."""

    method: Literal["ibp", "crown", "alpha-crown"]
    intermediate: bool
    slopes: bool
    case: int


bounds_options = grouped(
    "wanted",
    BoundsOptions,
    click.option("--method", type=click.Choice(["ibp", "crown", "alpha-crown"]), default="crown", show_default=True),
    click.option("--intermediate", is_flag=True, help="Bounds of every pre-activation too."),
    click.option("--slopes", is_flag=True, help="Shape and hash of every optimised slope."),
    click.option("--case", type=click.IntRange(min=0), default=0, show_default=True, help="Which input box."),
)


def check_timeout(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A time limit in seconds."""
    from verifier.cli.instances import parse_timeout

    if value is None:
        return None
    try:
        return parse_timeout(value, f"--{parameter.name}")
    except InputError as error:
        raise click.BadParameter(str(error).partition(": ")[2], context, parameter) from None


@dataclass(frozen=True)
class DataSet:
    """Labelled inputs, and how long may be worked on them.

    Attributes:
        clip: range of valid inputs.
        timeout: seconds for each question that the verifier is asked; ``total_timeout``: for all of them.
    """

    file: Path
    limit: int | None
    clip: tuple[float, float] | None
    timeout: float | None
    total_timeout: float | None


data_set = grouped(
    "data",
    DataSet,
    click.argument("file", metavar="DATA", type=FILE),
    click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many inputs."),
    click.option("--clip", type=(float, float), metavar="LOW HIGH", help="Range of valid inputs, such as 0 1."),
    click.option(
        "--timeout",
        callback=check_timeout,
        default="60",
        show_default=True,
        metavar="SECONDS",
        help="Limit for each input and radius that bounds do not settle.",
    ),
    click.option("--total-timeout", callback=check_timeout, metavar="SECONDS", help="Limit for all of them."),
)


def check_retry(context: click.Context, parameter: click.Parameter, value: str | None) -> frozenset[str]:
    """Verdicts that leave a question open, separated by commas."""
    from verifier.cli.ledger import UNDECIDED

    words = frozenset(word.strip() for word in (value or "").split(",") if word.strip())
    if words - set(UNDECIDED) or (value is not None and not words):
        raise click.BadParameter(f"'{value}' is not a list of some of {','.join(UNDECIDED)}", context, parameter)
    return words


@dataclass(frozen=True)
class Repeat:
    """What is done again of what an ``--out`` file holds.

    Attributes:
        resume: go on with a file that holds something.
        fresh: answer every instance of the lists again.
        retry: answer those with these verdicts again.
    """

    resume: bool = False
    fresh: bool = False
    retry: frozenset[str] = frozenset()

    @property
    def goes_on(self) -> bool:
        return self.resume or self.fresh or bool(self.retry)


repeat = grouped(
    "repeat",
    Repeat,
    click.option("--resume", is_flag=True, help="Go on with an --out file: keep what it holds and still counts."),
    click.option("--fresh", is_flag=True, help="Go on with an --out file, but repeat every instance of the lists."),
    click.option(
        "--retry",
        callback=check_retry,
        metavar="VERDICTS",
        help="Like --resume, and repeat these too: some of unknown,error,timeout.",
    ),
)


@dataclass(frozen=True)
class CompetitionInstance:
    """What the competition's script is called with.

    Attributes:
        timeout: the limit in seconds, as the script got it.
    """

    category: str
    onnx: Path
    vnnlib: Path
    results: Path
    timeout: str


competition_instance = grouped(
    "instance",
    CompetitionInstance,
    click.argument("category"),
    click.argument("onnx", type=FILE),
    click.argument("vnnlib", type=FILE),
    click.argument("results", type=FILE),
    click.argument("timeout"),
)


@dataclass(frozen=True)
class WarmServerOptions:
    """Where the warm server is and how long it stays."""

    resident_folder: Path | None
    idle: float

    @property
    def folder(self) -> Path:
        from verifier.runtime.warm_link import default_folder

        return self.resident_folder or default_folder()


warm_server = grouped(
    "server",
    WarmServerOptions,
    click.option(
        "--resident-folder",
        type=FILE,
        envvar="VERIFIER_RESIDENT_FOLDER",
        help="Folder of the resident worker, open to this user alone.  [default: verifier-UID in $TMPDIR or /tmp]",
    ),
    click.option(
        "--idle",
        type=click.FloatRange(min=0),
        envvar="VERIFIER_RESIDENT_SECONDS",
        default=600.0,
        show_default=True,
        help="Seconds without work after which the resident worker ends; 0: none is started or used.",
    ),
)
