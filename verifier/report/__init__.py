"""Answers out: result files, JSON records, the console, tables."""
