"""All op classes, found in the modules of this package: what tests and ``verifier inspect`` go through."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import verifier.ops
from verifier.graph.op import Op


def op_classes() -> tuple[type[Op], ...]:
    """Every concrete op class of ``verifier.ops``, sorted by name."""
    found: set[type[Op]] = set()
    for module in pkgutil.iter_modules(verifier.ops.__path__):
        loaded = importlib.import_module(f"verifier.ops.{module.name}")
        for _, cls in inspect.getmembers(loaded, inspect.isclass):
            public = not cls.__name__.startswith("_") and cls.__module__ == loaded.__name__
            if public and issubclass(cls, Op) and not inspect.isabstract(cls):
                found.add(cls)
    return tuple(sorted(found, key=lambda c: c.__name__))
