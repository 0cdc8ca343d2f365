"""Nothing leaves the machine: onnxruntime's wheels send telemetry unless a variable is set before the import.

Some seconds after the first session such a wheel looks up its vendor's host, stores an identifier in a file ``.ses`` of
the temporary folder, under a name that others can guess and replace by a link, and creates a database in the home
folder.
"""

from __future__ import annotations

import logging
import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"
_MODULE = "onnxruntime"

_log = logging.getLogger(__name__)
_seen_before = False


def switch_off() -> None:
    """Set the variable for this process and all that it starts, whatever it was; ``import verifier`` does this."""
    global _seen_before
    _seen_before = _seen_before or (_MODULE in sys.modules and os.environ.get(VARIABLE) != "1")
    os.environ[VARIABLE] = "1"


def warn_if_late() -> None:
    """Warn if a program has imported onnxruntime before this package, and without the variable."""
    if _seen_before:
        _log.warning(
            "onnxruntime was imported before verifier and without %s=1, and may send telemetry; import verifier first",
            VARIABLE,
        )
