"""Gradients -> updates.

`param_groups` builds the optimizer, in which each group of parameters has its own rule: AdamW,
`muon` or row-wise Adagrad. `schedule` has the learning rate as a function of the step. Parameters
come in by name and the state goes out by name: a checkpoint depends on no order of tensors.
"""
