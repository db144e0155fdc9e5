"""Batches -> better weights.

`loop` is the whole run in the order of time, `step` one update; `state` is a run in memory and its
checkpoints; `resolve` fills the empty fields of a config, `build` makes model, optimizer and
batches of it. Around the loop: `eval_hooks` evaluates, `monitor` detects loss spikes, `console`
shows what a user sees, `signals` stops a run, `profile` measures a step.
"""

from pretrain import make_callable

make_callable(__name__)
