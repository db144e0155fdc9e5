"""The text of a task's file -> examples, and the shots before them.

Text comes in as JSON lines in the documented form (docs/how-to/tasks.md), as
HellaSwag's six lines an example, as SQuAD's JSON, or as plain text; examples of one shape for all
kinds go out. What is missing in a record, or is of the wrong type, is refused with file and line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from pretrain.evaluate.tasks import Kind, Task, tasks

Record = Mapping[str, Any]

# The fields by which a record in the documented form says what it asks.
_TOLD_BY: tuple[tuple[str, Kind], ...] = (
    ("context_options", "schema"),
    ("choices", "choice"),
    ("good", "pair"),
    ("continuation", "cloze"),
    ("answers", "answer"),
    ("answer", "answer"),
    ("text", "text"),
)
_CONTEXTS = ("context", "query", "question")
_LINES_OF_AN_EXAMPLE = 6


@dataclass(frozen=True, slots=True)
class Example:
    """Each context with each continuation is an option; of contexts or continuations there is only
    one. An open answer's continuations are its references."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    """The option that is right."""
    input: str = ""
    """What a task with the one field `input` was asked of."""

    def options(self, delimiter: str) -> list[tuple[str, str]]:
        """Context and continuation of each option."""
        return [(c, delimiter + after) for c in self.contexts for after in self.continuations]


def read_examples(
    task: Task, text: str, *, file: str = "the text", limit: int | None = None
) -> list[Example]:
    """The examples in the text of a task's file, the first `limit` of them. ValueError, with the
    name of the `file`, where there are none, or one is not of the task's form."""
    examples: list[Example] = []
    for place, record in _records(task.form, text, file):
        if len(examples) == limit:
            break
        try:
            examples.append(_example(task, record))
        except _Missing as missing:
            raise ValueError(f"{file}, {place}: {missing}") from None
    if not examples:
        raise ValueError(f"{file} holds no example")
    return examples


def kind_of(text: str, *, file: str = "the text") -> Kind:
    """What a text in the documented form asks, by its first record. ValueError where that says
    nothing."""
    for _, record in _records("jsonl", text, file):
        for field, kind in _TOLD_BY:
            if field in record:
                return kind
        fields = ", ".join(field for field, _ in _TOLD_BY)
        raise ValueError(f"{file}: nothing says what is asked; legal: one of the fields {fields}")
    raise ValueError(f"{file} holds no example")


def with_shots(task: Task, examples: Sequence[Example], *, shots: int, seed: int) -> list[Example]:
    """The examples with the task's description and `shots` solved ones before each context.

    They are the same for all, drawn from the examples by `seed`; one that is asked itself, or asks
    the same, gives its place to the next. ValueError where there are not enough, or the kind has no
    context.
    """
    if shots and task.kind in ("pair", "text"):
        raise ValueError(f"{task.name} is of the kind {task.kind}, which takes no shots")
    if shots >= len(examples):
        raise ValueError(f"{shots} shots of {len(examples)} examples; legal: fewer than there are")
    draw, everything = random.Random(seed), range(len(examples))
    drawn = draw.sample(everything, shots + 1) if shots else []
    asked = [e.contexts if any(e.contexts) else e.continuations for e in examples]
    if len(set(asked)) < len(asked) and shots:  # more may have to give their place
        drawn = list(dict.fromkeys([*drawn, *draw.sample(everything, len(examples))]))
    texts = {n: solved_text(task, examples[n]) for n in drawn}
    found = []
    for same, example in zip(asked, examples, strict=True):
        solved = [text for n, text in texts.items() if asked[n] != same][:shots]
        if len(solved) < shots:
            raise ValueError(f"{shots} shots of {len(solved)} examples that ask something else")
        before = task.description + "".join(text + task.between for text in solved)
        found.append(replace(example, contexts=tuple(before + c for c in example.contexts)))
    return found


def prompt(task: Task, text: str) -> str:
    """The context in which a text alone is asked about, without shots. ValueError for a task that
    asks for more than a text, or for something else than an answer in words."""
    if task.name not in askable():
        raise ValueError(f"{task.name} is not asked of a text; legal: {', '.join(askable())}")
    field = _fields(task)
    asked = _filled(task.context, dict.fromkeys(field, text)) if field else text
    return task.description + asked


def askable() -> list[str]:
    """Names of the tasks of the table that are asked of one text and answered in words."""
    return [t.name for t in tasks().values() if t.kind == "answer" and len(_fields(t)) < 2]


def _fields(task: Task) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(task.context) if field}


def demonstration(task: Task, records: Sequence[Record]) -> str:
    """Records of a task, solved one after the other, as shots are: text for a corpus."""
    return task.description + task.between.join(
        solved_text(task, _example(task, r)) for r in records
    )


def solved_text(task: Task, example: Example) -> str:
    """An example with what is right, as a text."""
    return "".join(example.options(task.delimiter)[example.gold])


def compared_part(task: Task, text: str) -> str:
    """What of an answer, or of a reference, is held against the other: all of it, or the line
    behind the task's `answer_after`."""
    if not task.answer_after:
        return text
    part = text.rpartition(task.answer_after)[2] if task.answer_after in text else ""
    for stop in task.stops:
        part = part.partition(stop)[0]
    return part.strip().partition("\n")[0]


class _Missing(Exception):
    """A record is not of the documented form: what is meant instead."""


def _records(form: str, text: str, file: str) -> Iterator[tuple[str, Record]]:
    """Each record with its place. ValueError for a text that is no such file's."""
    if form == "text":
        yield "all of it", {"text": text}
    elif form == "squad":
        yield from _squad(text, file)
    elif form == "six lines":
        lines = text.removesuffix("\n").split("\n") if text else []
        if len(lines) % _LINES_OF_AN_EXAMPLE:
            raise ValueError(f"{file} has {len(lines)} lines; legal: six for each example")
        for first in range(0, len(lines), _LINES_OF_AN_EXAMPLE):
            context, gold, *choices = lines[first : first + _LINES_OF_AN_EXAMPLE]
            yield f"line {first + 1}", {"context": context, "gold": gold, "choices": choices}
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"line {number}"
                yield place, {"text": line} if form == "lines" else _object(line, file, place)


def _object(line: str, file: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, {place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file}, {place} is {line:.60}; legal: an object")
    return record


def _squad(text: str, file: str) -> Iterator[tuple[str, Record]]:
    """SQuAD's JSON ("SQuAD", Rajpurkar et al., 2016): a record for each question."""
    content = _object(text, file, "all of it")
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    record = {"context": paragraph["context"], "question": asked["question"]}
                    yield f"question {asked['id']}", {**record, "answers": answers}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not SQuAD's JSON: {error!r}") from None


def _example(task: Task, record: Record) -> Example:
    if task.kind == "text":
        return Example(("",), (_string(record, "text"),))
    if task.kind == "pair":
        return Example(("",), (_string(record, "good"), _string(record, "bad")))
    if task.kind == "schema":
        contexts = _strings(record, "context_options")
        return Example(contexts, (_string(record, "continuation"),), _gold(task, record, contexts))
    context = _filled(task.context, record) if task.context else _context(record)
    if task.kind == "cloze":
        return Example((context,), (_string(record, "continuation"),))
    if task.kind == "answer":
        references = _references(record)
        if not all(compared_part(task, text) for text in references if task.answer_after):
            raise _Missing(f"an answer has nothing behind {task.answer_after!r}, which is compared")
        return Example((context,), references, input=str(record.get("input", "")))
    choices = tuple(_filled(c, record) for c in task.choices) or _strings(record, "choices")
    if "" in choices:
        raise _Missing("one of the choices is empty")
    return Example((context,), choices, _gold(task, record, choices))


def _context(record: Record) -> str:
    names = [name for name in _CONTEXTS if name in record] or [_CONTEXTS[0]]
    if len(names) > 1:
        raise _Missing(f"{' and '.join(names)} are one field; legal: all of the prompt in one")
    (name,) = names
    found = record.get(name)
    if not isinstance(found, str):  # an empty one is legal: a start-of-text is the context
        raise _Missing(f"{name} is {found!r:.60}; legal: a text")
    return found


class _Filling(Formatter):
    """Texts and numbers in the place of fields, and nothing else."""

    def get_field(self, name: str, args: Any, kwargs: Any) -> Any:
        first = kwargs[name.partition("[")[0]]
        found, used = super().get_field(name, args, kwargs)
        is_part = isinstance(first, str) and "[" in name
        if isinstance(found, bool) or not isinstance(found, str | int | float) or is_part:
            legal = "a list of texts" if is_part else "a text or a number"
            raise _Missing(f"{name} is {first if is_part else found!r:.60}; legal: {legal}")
        return found, used


def _filled(template: str, record: Record) -> str:
    try:
        return _Filling().vformat(template, (), record)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise _Missing(f"the field {error} of the prompt is not there") from None


def _string(record: Record, name: str) -> str:
    found = record.get(name)
    if not (isinstance(found, str) and found):
        raise _Missing(f"{name} is {found!r:.60}; legal: a text that is not empty")
    return found


def _strings(record: Record, name: str) -> tuple[str, ...]:
    found = record.get(name)
    if not (isinstance(found, list) and len(found) > 1 and all(isinstance(t, str) for t in found)):
        raise _Missing(f"{name} is {found!r:.60}; legal: two texts or more")
    if "" in found:
        raise _Missing(f"{name} holds an empty text")
    return tuple(found)


def _references(record: Record) -> tuple[str, ...]:
    """All texts that are right, each once: `answers` or `answer`, one or a list, and `aliases`."""
    found = []
    for name in ("answers", "answer", "aliases"):
        each = record.get(name, [])
        found += each if isinstance(each, list) else [each]
    if not found or not all(isinstance(text, str) for text in found):
        raise _Missing(f"the answers are {found!r:.60}; legal: a text or a list of them")
    return tuple(dict.fromkeys(found))


def _gold(task: Task, record: Record, options: Sequence[str]) -> int:
    found = record.get(task.gold)
    text = str(found)
    number = task.labels.index(text) if text in task.labels else None
    if number is None and not isinstance(found, bool) and text.isdecimal():
        number = int(text)
    if number is None or (task.labels and text not in task.labels) or number >= len(options):
        legal = ", ".join(task.labels) or f"0 to {len(options) - 1}"
        raise _Missing(f"{task.gold} is {found!r:.60}; legal: {legal}")
    return number
