"""One file per set of ops, in the form that other packages use; what is in this folder counts as the verifier's own.

A module has some of ``OPS``, ``TRANSLATORS``, ``CONVERTERS``, ``SAMPLES`` and ``NODES``, see
:class:`verifier.ops.registry.OpSet`. Nobody imports one by name: they are found by their folder when a network is read.
"""
