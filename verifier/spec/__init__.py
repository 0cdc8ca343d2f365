"""Properties: VNN-LIB files and Python objects are read, counterexamples are written, replayed and validated."""
