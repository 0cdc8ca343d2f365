"""Processes: the worker of a query, its watchdog, the warm server, the start of a rank. Nothing numeric imports it."""
