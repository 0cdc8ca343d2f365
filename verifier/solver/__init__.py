"""The way of one query, and the settings it is run with."""
