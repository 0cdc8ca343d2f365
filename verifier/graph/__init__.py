"""The network as an immutable graph of ops, and the passes that bring it to canonical form."""
