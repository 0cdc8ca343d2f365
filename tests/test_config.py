"""Configuration: defaults, files, assignments, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from verifier.config import (
    Config,
    as_config,
    described,
    dump_config,
    known_keys,
    load_config,
    nearest_key,
    parse_size,
    section_names,
)
from verifier.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_default_file_equals_the_defaults_and_is_complete() -> None:
    path = ROOT / "configs" / "default.yaml"
    assert load_config([path]) == Config()
    assert set(DEFAULT_LINES) == {*known_keys(), *section_names()}


def default_lines() -> dict[str, str]:
    """The comments of configs/default.yaml by key: what stands beside a setting, or in the line above it."""
    found: dict[str, str] = {}
    inside: list[tuple[int, str]] = []
    above = ""
    for line in (ROOT / "configs" / "default.yaml").read_text().splitlines():
        if line.lstrip().startswith("#"):
            above = line.lstrip()[2:]
        elif line:
            setting, _, beside = line.partition("  # ")
            depth, name = len(line) - len(line.lstrip()), setting.strip().partition(":")[0]
            inside = [*(entry for entry in inside if entry[0] < depth), (depth, name)]
            found[".".join(name for _, name in inside)] = beside or above
            above = ""
    return found


DEFAULT_LINES = default_lines()


@pytest.mark.parametrize("key", DEFAULT_LINES)
def test_the_default_file_says_what_the_settings_say(key: str) -> None:
    """In words that are made from a setting's type."""
    assert DEFAULT_LINES[key] == described(key)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_file_loads_and_says_what_it_is_for(path: Path) -> None:
    load_config([path])
    assert path.read_text().startswith("# ")


def test_shipped_examples_exist() -> None:
    assert len(list((ROOT / "configs" / "examples").glob("*.yaml"))) >= 4


def test_dump_round_trips(tmp_path: Path) -> None:
    changes = ["bab.batch_size=7", "memory.device_limit=2GiB", "bounds.alpha.learning_rate=1e-3"]
    config = load_config(assignments=changes)
    assert load_config([write(tmp_path, dump_config(config))]) == config


def test_later_settings_win(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nbab:\n  iterations: 3\n  candidates: 5\n")
    config = load_config([path], ["bab.iterations=4"], {"seed": 9})
    assert (config.seed, config.bab.iterations, config.bab.candidates) == (9, 4, 5)
    assert config.bab.leaf_lp is Config().bab.leaf_lp


def test_empty_file_and_commented_sections_are_the_defaults(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "")]) == Config()
    assert load_config([write(tmp_path, "# nothing\nbab:\n  # iterations: 3\n")]) == Config()


def test_assignments_are_typed_by_yaml() -> None:
    config = load_config(
        assignments=["bab.enabled=false", "bab.max_domains=10", "attack.time_fraction=5e-1", "bab.batch_size=auto"]
    )
    assert config.bab.enabled is False
    assert config.bab.max_domains == 10
    assert config.attack.time_fraction == 0.5
    assert config.bab.batch_size == "auto"
    assert load_config(assignments=["bab.max_domains=null"]).bab.max_domains is None


def test_as_config_takes_what_the_api_takes(tmp_path: Path) -> None:
    made = Config(seed=3)
    assert as_config(made) is made
    assert as_config(None) == Config()
    assert as_config({"seed": 3}) == made
    assert as_config({"bab": {"iterations": 2}}) == as_config({"bab.iterations": 2})
    assert as_config(write(tmp_path, "seed: 3\n")) == made


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("512 MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("100", 100), ("2kib", 2048), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert load_config(assignments=[f"memory.chunk_bytes={text}"]).memory.chunk_bytes == size


MALFORMED = {
    "unknown key": ("bab:\n  batchsize: 3\n", ":2:", "bab.batchsize", "bab.batch_size"),
    "unknown section": ("bound:\n  method: ibp\n", ":1:", "bound", "bounds.method"),
    "misplaced key": ("iterations: 3\n", ":1:", "iterations", ".iterations"),
    "duplicate key": ("seed: 1\nseed: 2\n", ":2:", "seed", "line 1"),
    "nested duplicate": ("bab:\n  clip: true\n  clip: true\n", ":3:", "bab.clip", "line 2"),
    "wrong type": ("seed: yes\n", ":1:", "seed", "integer"),
    "quoted number": ("attack:\n  steps: '3'\n", ":2:", "attack.steps", "integer"),
    "float for integer": ("seed: 1.0\n", ":1:", "seed", "integer"),
    "out of range": ("attack:\n  time_fraction: 2\n", ":2:", "attack.time_fraction", "at most 1"),
    "not a number": ("attack:\n  time_fraction: .nan\n", ":2:", "attack.time_fraction", "nan"),
    "infinite": ("bounds:\n  alpha:\n    learning_rate: .inf\n", ":3:", "bounds.alpha.learning_rate", "inf"),
    "not a choice": ("device: gpu\n", ":1:", "device", "auto, cpu, cuda"),
    "bad size": ("memory:\n  device_limit: 8 apples\n", ":2:", "memory.device_limit", "8GiB"),
    "negative size": ("memory:\n  chunk_bytes: -5\n", ":2:", "memory.chunk_bytes", "at least 1"),
    "list": ("seed: [1]\n", ":1:", "seed", "integer"),
    "section as value": ("bab: 3\n", ":1:", "bab", "mapping"),
    "value as section": ("seed:\n  x: 3\n", ":1:", "seed", "integer"),
    "list at top": ("- seed\n", ":1:", "the file", "mapping"),
    "number as key": ("5: 3\n", ":1:", "5", "not a name"),
    "truncated": ("bab: {clip: true\n", ":2:", "not valid YAML", ""),
    "tab": ("bab:\n\tclip: true\n", ":2:", "not valid YAML", ""),
    "object": ("seed: !!python/object/apply:os.getcwd []\n", ":1:", "not valid YAML", ""),
    "alias": ("attack: &a\n  steps: 3\nbab: *a\n", ":3:", "aliases", ""),
    "two documents": ("---\nseed: 1\n---\nseed: 2\n", ":3:", "document", ""),
    "binary": (b"\xff\xfe\x00", "", "not UTF-8", ""),
    "deep": (b"[" * 5000, "", "not valid YAML", ""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str, tmp_path: Path) -> None:
    text, line, *words = MALFORMED[name]
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    message = str(caught.value)
    assert message.startswith(str(path) + line if line else str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("bab.batchsize=3", "bab.batch_size"),
        ("bab=3", "is a section"),
        ("bab", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("seed={a: 1}", "one value"),
        ("seed=[", "YAML scalar"),
        ("seed=many", "integer"),
        ("bounds.method=crwon", "alpha-crown"),
    ],
)
def test_malformed_assignments(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set ") as caught:
        load_config(assignments=[text])
    assert word in str(caught.value)


def test_missing_file_and_huge_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match="at most"):
        load_config([write(tmp_path, b"#" * (2 << 20))])


def test_several_wrong_values_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 more"):
        load_config([write(tmp_path, "seed: x\ndevice: y\n")])


@pytest.mark.parametrize("key", list(known_keys()))
def test_one_dropped_letter_finds_the_key(key: str) -> None:
    head, _, last = key.rpartition(".")
    if len(last) > 3:
        typo = f"{head}.{last[:-2]}{last[-1]}".lstrip(".")
        assert nearest_key(typo) == key


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 4  # type: ignore[misc]


def test_schema_describes_every_key() -> None:
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        assert all("description" in value for value in section["properties"].values())
