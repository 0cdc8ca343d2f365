"""Ranks of one machine ask no name server.

torch looks up the name of every address that its store connects to, for its logs, and 127.0.0.1 too. Where the C
library's list of hosts does not know the address in that form (it is written as one of IPv6), the question goes to the
name server: it leaves the machine, and the job waits for the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH = "/etc/nsswitch.conf"
_DEFAULT = "files dns"


@contextmanager
def local_names(host: str) -> Iterator[None]:
    """Meanwhile this process looks up hosts in the machine's own list alone, if ``host`` is this machine.

    Does nothing where the C library is not glibc.
    """
    local = is_loopback(host)
    if local:
        _look_up("files")
    try:
        yield
    finally:
        if local:
            _look_up(_configured())


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, as far as its text says so."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _look_up(services: str) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).__nss_configure_lookup(b"hosts", services.encode())


def _configured() -> str:
    """What the machine's configuration says about hosts."""
    with contextlib.suppress(OSError), open(_SWITCH, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, found, services = line.partition("#")[0].partition(":")
            if found and name.strip() == "hosts" and services.strip():
                return services.strip()
    return _DEFAULT
