"""Properties: VNN-LIB files and Python objects in, counterexamples out, replayed and checked."""
