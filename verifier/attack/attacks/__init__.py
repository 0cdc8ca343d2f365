"""One attack per file, with the name that ``attack.methods`` takes: a function ``attack`` of a ``Target``."""
