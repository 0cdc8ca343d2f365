"""VNN-LIB 2.0: grammar and types of the standard, and the way from a query to a :class:`Problem`."""
