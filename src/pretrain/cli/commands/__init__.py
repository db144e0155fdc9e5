"""A file a command: its arguments, and `run`, which returns the exit code, or None for 0."""
