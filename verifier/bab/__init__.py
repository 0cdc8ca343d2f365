"""Branch and bound: domain pools, branching heuristics, the search loops, the LP at decided leaves."""
