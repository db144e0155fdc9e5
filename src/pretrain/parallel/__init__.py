"""Parallelism from outside: `parallelize` distributes a loss module over processes.

`model` has `parallelize`, which applies the modes in one order, activation checkpointing, data
parallelism, and `ParallelModel`, which computes gradients. Each other mode has a module: `sharded`
(FSDP), `tensor`, `context`, `pipeline` and `deterministic`. The model knows none of them.
"""
