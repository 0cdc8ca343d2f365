"""Search for counterexamples; attacks return candidates, never verdicts."""
