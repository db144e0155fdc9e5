"""Gradients -> updates.

`param_groups` builds the optimizer, in which each group of parameters has its own rule: AdamW,
`muon` or `adagrad`. `schedule` has the learning rate as a function of the step, and continues
schedules. Parameters come in by name and the state goes out by name, so a checkpoint does not
depend on an order of tensors.
"""
