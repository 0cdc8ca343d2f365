"""Which neuron to split: one heuristic per file. A heuristic ranks the columns of a split space."""
