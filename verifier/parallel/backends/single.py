"""All weights on every rank."""

from __future__ import annotations

from verifier.parallel.backends import WholeNetwork

BACKEND = WholeNetwork()
