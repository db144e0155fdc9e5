"""A file a verb: its arguments, and `run`, which returns the exit code."""
