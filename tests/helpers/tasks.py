"""Small task files, one of each kind, and log-probabilities computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.evaluate.examples import Example, read_examples
from pretrain.evaluate.task_files import read_task_file
from pretrain.evaluate.tasks import Task
from pretrain.runner.open import LoadedModel

RECORDS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"query": "The sea was", "choices": ["calm", "of the United States", "é"], "gold": 1},
        {"query": "We, the people of\n", "choices": ["the", "the people", "a"], "gold": 0},
        {"query": "", "choices": ["Yes", "The people"], "gold": 1},
    ],
    "cloze": [{"context": "the people of the United", "continuation": "States"}] * 2,
    "schema": [
        {"context_options": ["He said the", "She said"], "continuation": "sea.", "gold": 0},
        {"context_options": ["It", "The people of it"], "continuation": "was", "gold": 1},
    ],
    "answer": [
        {"context": "Q: Which is it?\nA:", "answers": ["the sea", "Sea"]},
        {"question": "who", "answer": "Ahab", "aliases": ["Captain Ahab"]},
    ],
    "pair": [{"good": "The people are.", "bad": "The people is."}] * 2,
    "text": [{"text": "The sea was calm, and the sea was wide. " * 5}, {"text": "Yes."}],
}


def write_task(folder: Path, records: list[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def examples_of(task: Task, path: Path, limit: int | None = None) -> list[Example]:
    return read_examples(task, read_task_file(path), file=str(path), limit=limit)


@torch.no_grad()
def log_p(model: LoadedModel, context: str, continuation: str) -> list[float]:
    """The log-probability of each token of a continuation, from one row of logits."""
    stripped = context.rstrip()
    moved = context[len(stripped) :] + continuation
    tokenizer = model.tokenizer
    before = [tokenizer.start_of_text, *tokenizer.encode(stripped).tolist()]
    whole = [tokenizer.start_of_text, *tokenizer.encode(stripped + moved).tolist()]
    ids = [*before, *whole[len(before) :]][-(model.decoder.config.window_tokens + 1) :]
    n = len(whole) - len(before)
    rows = model.decoder.logits(model.decoder(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    return [float(rows[i, ids[i + 1]]) for i in range(len(ids) - 1 - n, len(ids) - 1)]
