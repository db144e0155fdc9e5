"""Weights -> numbers: nats, perplexity and bits per byte of text, accuracies of tasks.

`evaluate` measures a loaded model on texts and tasks. `loss` scores texts and token streams, and
`loglikelihood` scores pairs, log p(continuation | context); every number that is reported of a
model comes from one of these two. A task (`tasks`) has examples, read from a file (`examples`,
`task_files`); `run_tasks` evaluates a model on them, and `metrics` and `bootstrap` turn the
statistics into a value, a standard error, or a comparison of two models. `token_stats` gives the
loss of each token of a text, `overlap` what of it was in the training text, `baselines` the loss of
simple models. `lm_eval` makes our models available to lm-evaluation-harness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.evaluate.baselines import measure_baselines
    from pretrain.evaluate.bootstrap import compare, estimate
    from pretrain.evaluate.evaluation import Evaluation, Model, evaluate
    from pretrain.evaluate.examples import Example, read_examples
    from pretrain.evaluate.loglikelihood import Pair, PairScore, encode_pair, score_pairs
    from pretrain.evaluate.loss import Score, byte_lengths, score, score_each, score_texts
    from pretrain.evaluate.run_tasks import TaskResults, evaluate_in_loop, evaluate_task
    from pretrain.evaluate.task_files import EvalTask
    from pretrain.evaluate.tasks import Task, task_named
    from pretrain.evaluate.token_stats import TokenLoss, annotated_text, token_losses

__getattr__ = lazily(
    __name__,
    baselines="measure_baselines",
    bootstrap="compare estimate",
    evaluation="Evaluation Model evaluate",
    examples="Example read_examples",
    loglikelihood="Pair PairScore encode_pair score_pairs",
    loss="Score byte_lengths score score_each score_texts",
    run_tasks="TaskResults evaluate_in_loop evaluate_task",
    task_files="EvalTask",
    tasks="Task task_named",
    token_stats="TokenLoss annotated_text token_losses",
)
__all__ = [
    "EvalTask",
    "Evaluation",
    "Example",
    "Model",
    "Pair",
    "PairScore",
    "Score",
    "Task",
    "TaskResults",
    "TokenLoss",
    "annotated_text",
    "byte_lengths",
    "compare",
    "encode_pair",
    "estimate",
    "evaluate",
    "evaluate_in_loop",
    "evaluate_task",
    "measure_baselines",
    "read_examples",
    "score",
    "score_each",
    "score_pairs",
    "score_texts",
    "task_named",
    "token_losses",
]
