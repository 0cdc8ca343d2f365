"""Learning from what is refuted: conflict-driven search over the phases of neurons, with certified clauses."""
