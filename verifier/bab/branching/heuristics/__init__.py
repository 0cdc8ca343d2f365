"""One branching heuristic per file, with the name that ``bab.branching`` takes. ``HEURISTIC`` is a ``Heuristic``, or a
function that scores neurons.
"""
