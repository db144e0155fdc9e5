"""The fault suite: proof that a run survives what can happen to it, by making it happen.

Each part is a file with a function that takes a size and a seed and returns rows of the table:
`kills` (SIGKILL into the real saver), `crash_states` (what a disk may hold after a power loss),
`broken_savers` (twelve wrong ones, which the parts must catch), `corruption` (flipped bits),
`injected` (errors that the system gives), `full_disks` (real ones), `resumes` (SIGKILL into the
real `train`) and `rivals` (two writers, clocks, signals). `python -m faults short|ci|full [PART]`
prints the table; docs/explanation/faults.md explains it. The short form is part of `make test`.
"""
