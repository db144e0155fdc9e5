"""The effect of naming the task: p(answer | input, task), next to p(answer | input, another task)
and p(answer | input).

"Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) conditions on the task
in the same way, by words before the answer. Two baselines need no model: the input itself as the
answer, and its first sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.corpus.demonstrations import split_sentences
from pretrain.distributed import World
from pretrain.evaluate.bootstrap import compare
from pretrain.evaluate.examples import Example, prompt
from pretrain.evaluate.loglikelihood import encode_pair, score_pairs
from pretrain.evaluate.metrics import Array, statistics_of_answer, value
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.tasks import Task, task_named
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer

CONDITIONS = ("task", "wrong", "none")
"""The task itself, another task with the same input, and the input alone."""
METRIC = "nats_per_byte"


def condition_metrics(
    decoder: Decoder,
    tokenizer: Tokenizer,
    eval_task: EvalTask,
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> dict[str, Any]:
    """Nats per byte of the references under each condition, the p-values of the differences to the
    task itself, and the task's metric for the two baselines."""
    task, examples = eval_task.task, eval_task.examples
    nats = reference_nats(
        decoder, tokenizer, task, examples, world=world, precision=precision, stride=stride
    )
    return {
        METRIC: {name: float(value(METRIC, rows.sum(0))) for name, rows in nats.items()},
        "p": {
            name: compare(METRIC, nats["task"], rows, seed=eval_task.seed).p
            for name, rows in nats.items()
            if name != "task"
        },
        "baselines": {
            name: float(value(task.metric, rows.sum(0)))
            for name, rows in baseline_statistics(task.metric, examples).items()
        },
    }


def reference_nats(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    world: World,
    precision: str = "fp32",
    stride: int | None = None,
) -> dict[str, Array]:
    """By condition, the nats and the bytes of each example's first reference (examples, 2). Without
    shots, which would name the task in another way."""
    wrong = task_named(task.wrong)
    contexts = {
        "task": [(prompt(task, e.input), task.delimiter) for e in examples],
        "wrong": [(prompt(wrong, e.input), wrong.delimiter) for e in examples],
        "none": [(e.input, task.delimiter) for e in examples],
    }
    references = [example.continuations[0] for example in examples]
    pairs = [
        encode_pair(tokenizer, context, delimiter + reference)
        for condition in CONDITIONS
        for (context, delimiter), reference in zip(contexts[condition], references, strict=True)
    ]
    scores = score_pairs(decoder, pairs, world=world, precision=precision, stride=stride)
    nats = np.array([score.nats for score in scores]).reshape(len(CONDITIONS), -1)
    n_bytes = np.array([len(text.encode("utf-8", "replace")) for text in references], np.float64)
    return {
        condition: np.stack([row, n_bytes], axis=1)
        for condition, row in zip(CONDITIONS, nats, strict=True)
    }


def baseline_statistics(metric: str, examples: Sequence[Example]) -> dict[str, Array]:
    """Statistics of two answers without a model: the input itself, and its first sentence."""
    answers = {
        "copy": [example.input for example in examples],
        "lead": [split_sentences(example.input)[0] for example in examples],
    }
    return {
        name: np.array(
            [
                statistics_of_answer(metric, text, example.continuations)
                for text, example in zip(texts, examples, strict=True)
            ],
            np.float64,
        )
        for name, texts in answers.items()
    }
