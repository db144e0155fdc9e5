"""What naming the task does: p(output | input, task) beside another task of the input, and none.

Examples of a task that was asked of one text each come in; nats of their references under each
condition go out, and what the task's metric makes of answers that need no model. "Language Models
are Unsupervised Multitask Learners" (Radford et al., 2019) conditions on the task in the same way,
by words before the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.corpus.demonstrations import split_sentences
from pretrain.distributed import World
from pretrain.evaluate.examples import Example, prompt
from pretrain.evaluate.loglikelihood import encode_pair, score_pairs
from pretrain.evaluate.metrics import Array, statistics_of_answer
from pretrain.evaluate.tasks import Task, task_named
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

CONDITIONS = ("task", "wrong", "none")
"""The task itself; another one, asked of the same input; the input alone."""
METRIC = "nats_per_byte"


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
    """By condition, of each example the nats and the bytes of its first reference (examples, 2).
    None has shots, which would say more than the name of a task."""
    wrong = task_named(task.wrong)
    texts = {
        "task": [(prompt(task, e.input), task.delimiter) for e in examples],
        "wrong": [(prompt(wrong, e.input), wrong.delimiter) for e in examples],
        "none": [(e.input, task.delimiter) for e in examples],
    }
    references = [example.continuations[0] for example in examples]
    pairs = [
        encode_pair(tokenizer, context, delimiter + reference)
        for name in CONDITIONS
        for (context, delimiter), reference in zip(texts[name], references, strict=True)
    ]
    answers = score_pairs(decoder, pairs, world=world, precision=precision, stride=stride)
    nats = np.array([answer.nats for answer in answers]).reshape(len(CONDITIONS), -1)
    n_bytes = np.array([len(text.encode("utf-8", "replace")) for text in references], np.float64)
    return {
        name: np.stack([row, n_bytes], axis=1) for name, row in zip(CONDITIONS, nats, strict=True)
    }


def baselines(metric: str, examples: Sequence[Example]) -> dict[str, Array]:
    """Statistics of two answers that need no model: the input itself, and its first sentence."""
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
