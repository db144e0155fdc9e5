"""What is followed through training: some examples of a task, asked again and again.

Tasks and texts come in, read before training starts and free of torch; what `results` asks of a
model goes out. A text is a task whose examples are its passages, so that it has an error too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from pretrain.evaluate.examples import Example
from pretrain.evaluate.tasks import Task, task_of_kind

PASSAGE_CHARACTERS = 2000
_GUESSED = ("choice", "schema", "pair")


@dataclass(frozen=True, slots=True)
class Followed:
    """A task and those of its examples that are asked."""

    task: Task
    examples: tuple[Example, ...]

    @property
    def chance(self) -> float | None:
        """What guessing reaches: 1 / options, on average over the examples; None where nothing is
        chosen."""
        if self.task.kind not in _GUESSED:
            return None
        options = [len(e.contexts) * len(e.continuations) for e in self.examples]
        return math.fsum(1 / n for n in options) / len(options)


def passages(text: str) -> Iterator[str]:
    """A text in pieces of at most PASSAGE_CHARACTERS, cut before the last white space that there
    is; put together they are the text."""
    start = 0
    while len(text) - start > PASSAGE_CHARACTERS:
        whole = start + PASSAGE_CHARACTERS
        cut = next((i for i in range(whole - 1, start, -1) if text[i].isspace()), whole)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def followed_text(name: str, texts: Iterable[str], *, limit: int) -> Followed:
    """The first passages of some documents, `limit` at most, as a task of the kind `text`. No more
    is read than they need; ValueError where there is none."""
    found = islice((part for text in texts for part in passages(text)), limit)
    examples = tuple(Example(("",), (part,)) for part in found)
    if not examples:
        raise ValueError(f"{name} holds no text")
    return Followed(task_of_kind("text", name), examples)
