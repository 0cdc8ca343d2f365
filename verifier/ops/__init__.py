"""One file per op family; see ``verifier/graph/op.py`` for what an op says about itself."""
