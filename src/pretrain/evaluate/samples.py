"""What lm-evaluation-harness logged of each example (`--log_samples`): its texts and numbers.

The text of a samples_*.jsonl comes in, and a sample for each example that was scored goes out. What
was written (generate_until) is no score, and is refused with file and line, as is any other form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One example as it was asked there."""

    options: tuple[tuple[str, str], ...]
    """Context and continuation of each; the context of a whole text is empty."""
    log_p: tuple[float, ...]
    """Of each option, in nats."""
    target: str
    """What is right: the number of an option, or a text."""
    right: Mapping[str, float]
    """By the name of an accuracy there, whether the answer was right."""


def read_samples(text: str, *, file: str = "the text") -> dict[int, Sample]:
    """The samples by the number of their example. ValueError where one is of another form."""
    samples: dict[int, Sample] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                example, sample = _sample(json.loads(line))
            except _Written:
                raise ValueError(
                    f"{file}, line {number} is of an answer that was written; legal: samples of "
                    "likelihoods"
                ) from None
            except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
                raise ValueError(
                    f"{file}, line {number} is {line:.60}; legal: a line that lm-evaluation-harness"
                    " writes with --log_samples"
                ) from None
            # An example has a line for each filter of its task, of the same answers.
            samples.setdefault(example, sample)
    if not samples:
        raise ValueError(f"{file} holds no sample")
    return samples


class _Written(Exception):
    """The request was to write on."""


def _sample(record: Mapping[str, Any]) -> tuple[int, Sample]:
    arguments = record["arguments"]  # {"gen_args_0": {"arg_0": ...}}, or lists before 0.4.3
    requests = arguments.values() if isinstance(arguments, Mapping) else arguments
    texts = [[*r.values()] if isinstance(r, Mapping) else r for r in requests]
    if any(isinstance(each, Mapping) for request in texts for each in request):
        raise _Written
    options = tuple(("", *request) if len(request) == 1 else tuple(request) for request in texts)
    answers = [responses[0] for responses in record["resps"]]
    log_p = tuple(float(a[0] if isinstance(a, list) else a) for a in answers)
    if len(log_p) != len(options) or not all(isinstance(t, str) for o in options for t in o):
        raise ValueError
    right = {
        name: float(value)
        for name, value in record.items()
        if name.startswith("acc") and isinstance(value, int | float)
    }
    return int(record["doc_id"]), Sample(options, log_p, str(record.get("target", "")), right)
