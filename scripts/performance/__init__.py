"""What ``scripts/bench_performance.py`` measures, a module for each kind of figures, and its tables."""
