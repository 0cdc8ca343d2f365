"""The attacks there are, by name: one per file of ``attacks/``. Other packages add theirs (``verifier.attacks``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from verifier.attack.target import Attack, Target
from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.plugins import ATTACKS as GROUP
from verifier.core.plugins import lookup
from verifier.core.result import Witness

ATTACKS: Mapping[str, Attack] = folders.ATTACKS


def attack(name: str) -> Attack:
    """The attack of a name.

    Raises:
        ConfigError: there is none, or it cannot be imported or called.
    """
    found = lookup(GROUP, name, ATTACKS)
    if not callable(found):
        raise ConfigError(f"the attack '{name}' is a {type(found).__name__}, which cannot be called")
    return found


def search(target: Target, names: Iterable[str]) -> Witness | None:
    """Attack in turn, until there is a witness or no time; the first attack is always called."""
    for number, name in enumerate(names):
        if number and target.over:
            break
        attack(name)(target)
    return target.witness
