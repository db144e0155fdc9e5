"""The text of a task's file -> examples, and the shots before them.

Files are JSON lines in the documented form (docs/how-to/tasks.md), HellaSwag's six lines an
example, SQuAD's JSON, or plain text; examples have one shape for all kinds of task. A missing field
or one of the wrong type is a ValueError with file and line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from string import Formatter
from typing import Any

from pretrain.evaluate.tasks import Kind, Task, tasks

Record = Mapping[str, Any]

# The field of a record in the documented form -> the kind of its task.
_KIND_BY_FIELD: dict[str, Kind] = {
    "context_options": "schema",
    "choices": "choice",
    "good": "pair",
    "continuation": "cloze",
    "answers": "answer",
    "answer": "answer",
    "text": "text",
}
_CONTEXT_FIELDS = ("context", "query", "question")


@dataclass(frozen=True, slots=True)
class Example:
    """One example. Its options are all pairs of a context and a continuation, of which one or the
    other is single. The continuations of an open answer are its references."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    """The number of the right option."""
    input: str = ""
    """The record's field `input`, for tasks that take one text."""

    def options(self, delimiter: str) -> list[tuple[str, str]]:
        """Context and continuation of each option."""
        pairs = product(self.contexts, self.continuations)
        return [(context, delimiter + continuation) for context, continuation in pairs]


def read_examples(
    task: Task, text: str, *, file: str = "the text", limit: int | None = None
) -> list[Example]:
    """The first `limit` examples in the text of a task's file. ValueError with the name of the
    `file` for a text without examples, or with one that is not of the task's form."""
    examples: list[Example] = []
    for location, record in _records(task.form, text, file):
        if len(examples) == limit:
            break
        try:
            examples.append(_example(task, record))
        except ValueError as error:
            raise ValueError(f"{file}, {location}: {error}") from None
    if not examples:
        raise ValueError(f"{file} contains no example")
    return examples


def kind_of(text: str, *, file: str = "the text") -> Kind:
    """The kind of task of a text in the documented form, by the fields of its first record.
    ValueError if no field gives it."""
    for _, record in _records("jsonl", text, file):
        for field, kind in _KIND_BY_FIELD.items():
            if field in record:
                return kind
        fields = ", ".join(_KIND_BY_FIELD)
        raise ValueError(f"{file}: a record must have one of the fields {fields}")
    raise ValueError(f"{file} contains no example")


def with_shots(task: Task, examples: Sequence[Example], *, shots: int, seed: int) -> list[Example]:
    """The examples with the task's description and `shots` solved ones before each context.

    The shots are the same for all examples, drawn by `seed`, except that an example is never its
    own shot: the next one drawn takes the place. ValueError if there are too few examples, or if
    the kind of task has no context.
    """
    if shots and task.kind in ("pair", "text"):
        raise ValueError(
            f"--shots must be 0 for {task.name}, a task of the kind {task.kind} (got {shots})"
        )
    if shots >= len(examples):
        raise ValueError(f"--shots must be less than the {len(examples)} examples (got {shots})")
    rng = random.Random(seed)
    numbers = range(len(examples))
    drawn = rng.sample(numbers, shots + 1) if shots else []
    questions = [e.contexts if any(e.contexts) else e.continuations for e in examples]
    if shots and len(set(questions)) < len(questions):  # then more than one may have to be skipped
        drawn = list(dict.fromkeys(drawn + rng.sample(numbers, len(examples))))
    shot_texts = {n: solved_text(task, examples[n]) for n in drawn}

    with_context = []
    for question, example in zip(questions, examples, strict=True):
        usable = [text for n, text in shot_texts.items() if questions[n] != question][:shots]
        if len(usable) < shots:
            raise ValueError(
                f"--shots must be at most the {len(usable)} examples with another question (got "
                f"{shots})"
            )
        prefix = task.description + "".join(text + task.between for text in usable)
        contexts = tuple(prefix + context for context in example.contexts)
        with_context.append(replace(example, contexts=contexts))
    return with_context


def prompt(task: Task, text: str) -> str:
    """The context of a task that takes one text, without shots. ValueError for a task that takes
    more, or whose answer is not text."""
    if task.name not in promptable_tasks():
        raise ValueError(
            f"{task.name} does not take one text; the task must be one of "
            f"{', '.join(promptable_tasks())}"
        )
    fields = _template_fields(task)
    context = _filled(task.context, dict.fromkeys(fields, text)) if fields else text
    return task.description + context


def promptable_tasks() -> list[str]:
    """Names of the tasks in the table that take one text and answer with text."""
    return [t.name for t in tasks().values() if t.kind == "answer" and len(_template_fields(t)) < 2]


def _template_fields(task: Task) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(task.context) if field}


def demonstration(task: Task, records: Sequence[Record]) -> str:
    """Solved records of a task one after the other, as shots are: text to train on."""
    solved = [solved_text(task, _example(task, record)) for record in records]
    return task.description + task.between.join(solved)


def solved_text(task: Task, example: Example) -> str:
    """An example with its right answer, as one text."""
    return "".join(example.options(task.delimiter)[example.gold])


def compared_part(task: Task, text: str) -> str:
    """The part of an answer, or of a reference, that is compared: all of it, or the line after the
    task's `answer_after`."""
    if not task.answer_after:
        return text
    part = text.rpartition(task.answer_after)[2] if task.answer_after in text else ""
    return cut_at_stop(part, task.stops).strip().partition("\n")[0]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


def _records(form: str, text: str, file: str) -> Iterator[tuple[str, Record]]:
    """Yield each record with its location. ValueError for a text of another form."""
    if form == "text":
        yield "all of it", {"text": text}
    elif form == "squad":  # "SQuAD" (Rajpurkar et al., 2016)
        content = _object(text, file, "all of it")
        try:
            for article in content["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        answers = [answer["text"] for answer in question["answers"]]
                        fields = {"question": question["question"], "answers": answers}
                        record = {"context": paragraph["context"], **fields}
                        yield f"question {question['id']}", record
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not SQuAD's JSON: {error!r}") from None
    elif form == "six lines":
        lines = text.removesuffix("\n").split("\n") if text else []
        if len(lines) % 6:
            raise ValueError(f"{file} must have 6 lines for each example (got {len(lines)} lines)")
        for first in range(0, len(lines), 6):
            context, gold, *choices = lines[first : first + 6]
            yield f"line {first + 1}", {"context": context, "gold": gold, "choices": choices}
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            location = f"line {number}"
            yield location, {"text": line} if form == "lines" else _object(line, file, location)


def _object(line: str, file: str, location: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, {location} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file}, {location} must be a JSON object (got {line:.60})")
    return record


def _example(task: Task, record: Record) -> Example:
    if task.kind == "text":
        return Example(("",), (_string(record, "text"),))
    if task.kind == "pair":
        return Example(("",), (_string(record, "good"), _string(record, "bad")))
    if task.kind == "schema":
        contexts = _strings(record, "context_options")
        return Example(contexts, (_string(record, "continuation"),), _gold(task, record, contexts))
    if task.context:
        context = _filled(task.context, record)
    else:
        names = [name for name in _CONTEXT_FIELDS if name in record] or [_CONTEXT_FIELDS[0]]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} mean the same; the full prompt must be in one of them"
            )
        # An empty one is valid: a start-of-text is the context.
        context = _string(record, names[0], may_be_empty=True)
    if task.kind == "cloze":
        return Example((context,), (_string(record, "continuation"),))
    if task.kind == "answer":
        references: list[Any] = []  # all right answers, each once
        for name in ("answers", "answer", "aliases"):
            value = record.get(name, [])
            references += value if isinstance(value, list) else [value]
        if not references or not all(isinstance(text, str) for text in references):
            raise ValueError(
                f"the answers must be a text or a list of texts (got {references!r:.60})"
            )
        if task.answer_after and not all(compared_part(task, text) for text in references):
            raise ValueError(
                f"an answer must have text after {task.answer_after!r}, which is compared"
            )
        return Example(
            (context,), tuple(dict.fromkeys(references)), input=str(record.get("input", ""))
        )
    choices = tuple(_filled(c, record) for c in task.choices) or _strings(record, "choices")
    if "" in choices:
        raise ValueError("a choice must not be empty")
    return Example((context,), choices, _gold(task, record, choices))


class _RecordFormatter(Formatter):
    """Fills the fields of a template with texts and numbers, and nothing else."""

    def get_field(self, name: str, args: Any, kwargs: Any) -> Any:
        first = kwargs[name.partition("[")[0]]
        value, key = super().get_field(name, args, kwargs)
        if isinstance(first, str) and "[" in name:  # a character of a text
            raise ValueError(f"{name} must be an element of a list of texts (got {first!r:.60})")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{name} must be a text or a number (got {value!r:.60})")
        return value, key


def _filled(template: str, record: Record) -> str:
    try:
        return _RecordFormatter().vformat(template, (), record)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"the record has no field {error}, which the prompt needs") from None


def _string(record: Record, name: str, *, may_be_empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value or may_be_empty):
        expected = "a text" if may_be_empty else "a text that is not empty"
        raise ValueError(f"{name} must be {expected} (got {value!r:.60})")
    return value


def _strings(record: Record, name: str) -> tuple[str, ...]:
    values = record.get(name)
    texts = [v for v in values if isinstance(v, str) and v] if isinstance(values, list) else []
    if len(texts) < 2 or texts != values:
        expected = "a list of two texts or more, none of them empty"
        raise ValueError(f"{name} must be {expected} (got {values!r:.60})")
    return tuple(texts)


def _gold(task: Task, record: Record, options: Sequence[str]) -> int:
    """The number of the right option, given as a number or as one of the task's labels."""
    value = record.get(task.gold)
    labels = task.labels or tuple(map(str, range(len(options))))
    if str(value) not in labels[: len(options)]:
        valid = ", ".join(task.labels) or f"0 to {len(options) - 1}"
        raise ValueError(f"{task.gold} must be one of {valid} (got {value!r:.60})")
    return labels.index(str(value))
