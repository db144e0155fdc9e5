"""Weights -> numbers: nats, perplexity and bits per byte of text, accuracies of tasks.

`evaluate` measures a loaded model on texts and tasks. `loss` scores texts and token streams, and
`loglikelihood` scores pairs, log p(continuation | context); every number that is reported of a
model comes from one of these two. A task (`tasks`) has examples, read from a file (`examples`,
`task_files`); `run_tasks` evaluates a model on them, and `metrics` and `bootstrap` turn the
statistics into a value, a standard error, or a comparison of two models. `token_stats` gives the
loss of each token of a text, `overlap` what of it was in the training text, `held_out` where its
number would mislead, `baselines` the loss of simple models, such as `counts` of n-grams.
"""

from pretrain import make_callable

make_callable(__name__)
