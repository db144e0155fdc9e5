"""A run directory on the disk, without torch.

`directory` names its files, `log` reads and writes metrics.jsonl and samples.jsonl, and `identity`
compares a run with what it was: fingerprint, settings, accepted changes.
"""
