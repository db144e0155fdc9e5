"""Parallelism from outside: `parallelize` distributes a loss module over processes.

`model` has `parallelize`, which applies the modes in one order, and `ParallelModel`, which computes
gradients. Each mode has a module: `replicated` (data), `sharded` (FSDP), `tensor`, `context`,
`pipeline`, `deterministic` and `activation_checkpointing`. The model knows none of them.
"""
