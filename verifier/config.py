"""The typed configuration of a run. Unknown keys are errors; every key has a default that works.

Settings come from YAML files, then from assignments such as ``bab.batch_size=64``; later ones win. Sizes accept bytes
or a string such as ``512MiB``. ``auto`` lets the strategy decide from the problem's features. No import of torch here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from verifier.core import folders, plugins
from verifier.core.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_MAX_FILE_BYTES = 1 << 20

# Names that stand for no heuristic of neurons.
NOT_NEURONS = ("auto", "input")
# Names of ours; other packages add theirs by entry points (:mod:`verifier.core.plugins`).
BRANCHING = ("auto", *folders.HEURISTICS, "input")
ATTACK_METHODS = tuple(folders.ATTACKS)


def parse_size(value: object) -> object:
    """Bytes of ``"8GiB"``, ``"1.5 GB"`` or a plain integer; other types are left for the type check to refuse."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"a size is bytes or a number with a unit such as 512MiB or 8GiB, not '{value}'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class _Words(str):
    """Among annotations: what values a setting takes, where its type does not say it."""


Size = Annotated[
    int,
    _Words("a size"),
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\d"}]}),
    Field(ge=1),
]


def _named(group: str, ours: Sequence[str]) -> Callable[[str], str]:
    """Checks that a name is one of ours, at no cost, or one that an installed package adds."""

    def check(name: str) -> str:
        if name not in ours:
            others = plugins.foreign(group, ours)
            if name not in others:
                raise PydanticCustomError("unknown_name", "{names}", {"names": plugins.choices(ours, others)})
        return name

    return check


def _placement(name: str) -> str:
    """A name of ours; other packages cannot add any."""
    if name not in folders.BACKENDS:
        raise PydanticCustomError("unknown_name", "{names}", {"names": ", ".join(folders.BACKENDS)})
    return name


def _parts(value: object) -> object:
    """The names of a list, or of a text with commas; other types are left for the type check to refuse."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Branching = Annotated[
    str,
    _Words("auto, input or the name of a heuristic"),
    AfterValidator(_named(plugins.HEURISTICS, BRANCHING)),
    WithJsonSchema({"type": "string", "examples": list(BRANCHING)}),
]
Backend = Annotated[
    str,
    _Words("the name of a backend"),
    AfterValidator(_placement),
    WithJsonSchema({"type": "string", "enum": list(folders.BACKENDS)}),
]
Methods = Annotated[
    tuple[Annotated[str, AfterValidator(_named(plugins.ATTACKS, ATTACK_METHODS))], ...],
    BeforeValidator(_parts),
    Field(min_length=1),
    WithJsonSchema(
        {
            "anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "string"}],
            "examples": list(ATTACK_METHODS),
        }
    ),
]


class Section(BaseModel):
    """Base of all sections: frozen, strictly typed, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AttackConfig(Section):
    """Search for counterexamples."""

    enabled: bool = Field(default=True, description="search for counterexamples before and while proving")
    methods: Methods = Field(default=("pgd",), description="which attacks, in this order")
    restarts: int = Field(default=100, ge=1, description="random starting points per round")
    steps: int = Field(default=60, ge=1, description="gradient steps per restart")
    time_fraction: float = Field(default=0.1, ge=0, le=1, description="share of the time limit for the first attack")


class AlphaConfig(Section):
    """Slope optimisation (alpha-CROWN)."""

    iterations: int = Field(default=40, ge=0, description="optimiser steps for the final rows at the root")
    intermediate_iterations: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="steps for every hidden node"
    )
    learning_rate: float = Field(default=0.25, gt=0, description="step size of the slopes")
    decay: float = Field(default=0.97, gt=0, le=1, description="factor on the learning rate after every step")


class BoundsConfig(Section):
    """Bound propagation at the root."""

    method: Literal["auto", "ibp", "crown", "alpha-crown"] = Field(
        default="auto", description="the tightest method that is used"
    )
    alpha: AlphaConfig = Field(default=AlphaConfig(), description="slope optimisation")


class BabConfig(Section):
    """Branch and bound."""

    enabled: bool = Field(default=True, description="search after the root bounds")
    branching: Branching = Field(default="auto", description="what is split and how")
    input_split: Literal["smart", "longest"] = Field(
        default="smart", description="which input is split: the one that matters most to the bounds, or the widest"
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="domains bounded at once"
    )
    iterations: int = Field(default=20, ge=0, description="optimiser steps per batch of domains")
    learning_rate_alpha: float = Field(default=0.1, gt=0, description="step size of the slopes")
    learning_rate_beta: float = Field(default=0.05, gt=0, description="step size of the split multipliers")
    candidates: int = Field(default=3, ge=1, description="k of kFSB: candidate splits tried per domain")
    probes: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="sides of other splits tried per domain; one that is refuted fixes its neuron"
    )
    max_domains: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="stop with unknown after this many bounded domains"
    )
    cuda_graphs: bool = Field(default=True, description="replay work of equal shapes as CUDA graphs, on a GPU")
    leaf_lp: bool = Field(default=True, description="solve an LP where every neuron is decided")
    value_splits: bool = Field(
        default=True, description="in networks with other nonlinearities than ReLU, split what they read as well"
    )
    clip: bool = Field(default=True, description="cut input boxes by the final linear bounds (input splits)")


class ParallelConfig(Section):
    """Where weights and work live."""

    backend: Backend = Field(
        default="single",
        description="weights of a group: on every rank, sharded (fsdp), or split by features (tp)",
    )
    ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1, description="processes to start here; auto: one per GPU (under torchrun its world size counts)"
    )
    domains: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="groups that search apart; auto: every rank for single, one for fsdp and tp"
    )
    rows: Literal["sharded", "replicated"] = Field(
        default="sharded", description="start rows of bounds dealt to the ranks, or all rows on every rank"
    )
    tp_intermediate: Literal["crown", "ibp"] = Field(
        default="crown", description="hidden bounds under tp; ibp is looser, for comparison"
    )
    prefetch: bool = Field(default=True, description="gather or copy the next layer's weights while one computes")
    stream: Size | None = Field(
        default=None, description="bytes of a column block of large linear layers, e.g. 8MiB; null: whole layers"
    )
    offload: bool = Field(default=False, description="keep weights in host memory and copy each layer before use")
    logs: str | None = Field(default=None, description="folder for the log of every started rank; null: no logs")


class MemoryConfig(Section):
    """Budgets; they decide chunk and batch sizes."""

    device_limit: Size | None = Field(
        default=None, description="bytes the device may use, e.g. 8GiB; null: what is free"
    )
    chunk_bytes: Size | Literal["auto"] = Field(
        default="auto", description="bytes of coefficients alive in one chunk of rows; auto: by the kind of device"
    )


class NumericsConfig(Section):
    """What a proof rests on."""

    certify: bool = Field(
        default=True, description="re-evaluate proofs in float64 with every rounding error accounted for"
    )
    semantics: Literal["real", "float32"] = Field(
        default="real", description="what unsat must hold for: the network in real arithmetic, or its float32 runs too"
    )


class Config(Section):
    """All settings of a run."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes the GPU when there is one")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="same seed and device: same record, times aside")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(default="auto", description="CPU threads")
    attack: AttackConfig = Field(default=AttackConfig(), description="search for counterexamples")
    bounds: BoundsConfig = Field(default=BoundsConfig(), description="bound propagation at the root")
    bab: BabConfig = Field(default=BabConfig(), description="branch and bound")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="where weights and work live")
    memory: MemoryConfig = Field(default=MemoryConfig(), description="budgets; they decide chunk and batch sizes")
    numerics: NumericsConfig = Field(default=NumericsConfig(), description="what a proof rests on")


# ---------------------------------------------------------------------------------------------------------- loading


def load_config(
    files: Iterable[str | Path] = (), assignments: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """The configuration that YAML files, ``key=value`` texts and values by dotted key give, later ones winning.

    Args:
        files: YAML files; each needs to hold only what it changes.
        assignments: texts such as ``bab.batch_size=64``; the value is read as a YAML scalar.
        values: typed values by dotted key (``{"bab.batch_size": 64}``) or nested mappings.

    Raises:
        ConfigError: naming the source, the key and, for an unknown one, the nearest key that exists.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for path in files:
        _merge(merged, sources, _read_yaml(Path(path)))
    for text in assignments:
        _merge(merged, sources, [_read_assignment(text)])
    for key, value in _leaves(values or {}):
        _merge(merged, sources, [(key, value, f"setting {key}")])
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from None


def as_config(value: Config | Mapping[str, Any] | str | Path | None) -> Config:
    """A configuration from what the Python API accepts: one, values by key, a YAML file, or nothing (defaults)."""
    if isinstance(value, Config):
        return value
    if isinstance(value, Mapping):
        return load_config(values=value)
    return load_config([] if value is None else [value])


def dump_config(config: Config) -> str:
    """YAML of every setting; reading it back gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings (not of the sections)."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def section_names(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield prefix + name
            yield from section_names(info.annotation, f"{prefix}{name}.")


class _Loader(yaml.SafeLoader):
    """The safe loader; numbers such as ``1e-3`` are floats here."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)

Entry = tuple[str, Any, str]  # dotted key, value, where it was set


def _read_yaml(path: Path) -> list[Entry]:
    """The settings of one file with their lines. Duplicate keys, anchors, tags and non-mappings are refused."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes; a configuration has at most {_MAX_FILE_BYTES}")
    try:
        text = data.decode("utf-8")
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(
                    f"{path}:{event.start_mark.line + 1}: YAML aliases are not allowed; write the value out"
                )
        loader = _Loader(text)
        node = loader.get_single_node()
        return [] if node is None else list(_walk(loader, node, "", path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None


def _walk(loader: _Loader, node: yaml.Node, prefix: str, path: Path) -> Iterator[Entry]:
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        empty = isinstance(node, yaml.ScalarNode) and loader.construct_object(node, deep=True) is None
        if empty:  # a section whose keys are all commented out
            return
        at = f"section '{prefix[:-1]}'" if prefix else "the file"
        raise ConfigError(f"{where}: {at} must be a mapping of keys to values")
    seen: dict[str, int] = {}
    sections = set(section_names())
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{path}:{line}: key {key!r} is not a name")
        if key in seen:
            raise ConfigError(f"{path}:{line}: key '{prefix}{key}' was already set in line {seen[key]}; keep one")
        seen[key] = line
        if prefix + key in sections:
            yield from _walk(loader, value_node, f"{prefix}{key}.", path)
        else:
            yield prefix + key, loader.construct_object(value_node, deep=True), f"{path}:{line}"


def _read_assignment(text: str) -> Entry:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example bab.batch_size=64")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"--set {key}: value '{value}' is not a YAML scalar") from None
    if isinstance(parsed, (dict, list)):
        raise ConfigError(f"--set {key}: one value is expected, not '{value}'; set nested keys one by one")
    return key, parsed, f"--set {key}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(into: dict[str, Any], sources: dict[str, str], entries: Iterable[Entry]) -> None:
    """Put every entry into the nested mapping; unknown keys are refused here, where their source is known."""
    known = set(known_keys())
    for key, value, where in entries:
        if key not in known:
            raise ConfigError(_unknown(key, where))
        *path, last = key.split(".")
        section = into
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
        sources[key] = where


def _unknown(key: str, where: str) -> str:
    if key in set(section_names()):
        inside = ", ".join(k for k in known_keys() if k.startswith(key + "."))
        return f"{where}: '{key}' is a section, not a key; its keys are {inside}"
    return f"{where}: unknown key '{key}'; the nearest known key is '{nearest_key(key)}'"


def nearest_key(key: str) -> str:
    """The known key that looks most like ``key``, judged by the whole dotted name and by its last part."""
    last = key.rsplit(".", 1)[-1]

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        part = difflib.SequenceMatcher(None, last, known.rsplit(".", 1)[-1]).ratio()
        return whole + part

    return max(known_keys(), key=likeness)


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """One sentence for the first setting that has a wrong value, and how many more there are."""
    details = error.errors(include_url=False)
    keys: list[str] = []
    for detail in details:
        path = [str(part) for part in detail["loc"]]
        key = next(
            (".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in sources), ".".join(path)
        )
        if key not in keys:
            keys.append(key)
    first = keys[0]
    value = details[0]["input"]
    more = f" ({len(keys) - 1} more)" if len(keys) > 1 else ""
    shown = {"True": "true", "False": "false", "None": "null"}.get(repr(value), repr(value))
    where = sources.get(first, "configuration")
    return f"{where}: {first} must be {_expected(first, details[0])}, not {shown}{more}"


def _expected(key: str, detail: Any) -> str:
    """What values a key takes, from its annotation and limits; a size error says it in its own words."""
    if detail["type"] == "unknown_name":
        return f"one of {detail['msg']}"
    if detail["type"] == "value_error":
        return "a size in bytes or with a unit such as 512MiB or 8GiB"
    info = _field(key)
    return " or ".join(_type_words(info.annotation, _limits(info.metadata)))


def described(key: str) -> str:
    """What a setting means and what values it takes, as ``configs/default.yaml`` says it; or what a section means."""
    info = _field(key)
    if info.annotation is bool or (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)):
        return f"{info.description}"
    said = [item for item in info.metadata if isinstance(item, _Words)]
    words = said or _type_words(info.annotation, _limits(info.metadata), said=True)
    return f"{info.description} ({' or '.join(words)})"


def _field(key: str) -> FieldInfo:
    section: type[BaseModel] = Config
    *path, last = key.split(".")
    for name in path:
        section = section.model_fields[name].annotation  # type: ignore[assignment]
    return section.model_fields[last]


def _limits(metadata: Sequence[Any]) -> str:
    """The limits among a field's annotations, in words."""
    parts: list[str] = []
    for item in metadata:
        match item:
            case Ge(ge=limit):
                parts.append(f"at least {limit}")
            case Gt(gt=limit):
                parts.append(f"above {limit}")
            case Le(le=limit):
                parts.append(f"at most {limit}")
            case Lt(lt=limit):
                parts.append(f"below {limit}")
            case FieldInfo(metadata=nested):
                parts.extend(filter(None, [_limits(nested)]))
    return " and ".join(parts)


def _type_words(annotation: Any, limits: str = "", said: bool = False) -> list[str]:
    """What a type takes, one phrase for each alternative.

    Args:
        said: use :class:`_Words` where there are any.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        words: list[str] = [item for item in metadata if said and isinstance(item, _Words)]
        return words or _type_words(inner, limits or _limits(metadata), said)
    if origin is tuple:
        return ["names with commas between them"]
    if origin in (Union, UnionType):
        return [word for part in get_args(annotation) for word in _type_words(part, limits, said)]
    if origin is Literal:
        return (
            ["one of " + ", ".join(map(str, get_args(annotation)))]
            if len(get_args(annotation)) > 1
            else [f"'{get_args(annotation)[0]}'"]
        )
    name = {int: "an integer", float: "a number", bool: "true or false", type(None): "null"}.get(annotation, "text")
    return [f"{name} {limits}".strip() if annotation in (int, float) else name]
