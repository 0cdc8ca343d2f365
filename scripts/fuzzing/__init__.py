"""A fuzzer of the whole verifier; ``scripts/fuzz.py`` is its command.

One module per kind of case (``search``, ``frontend``, ``vnnlib``, ``files``, ``ranks``, ``numerics``, ``warm``,
``parts``), and what they share: random networks (``networks``), what is true (``truth``, ``relus``, ``formulas``),
paths and settings (``settings``), what is wrong with an answer (``checks``), how a case becomes small (``reducer``) and
a test (``written``).
"""

from __future__ import annotations

import os

# onnxruntime starts a thread that talks to its vendor unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
