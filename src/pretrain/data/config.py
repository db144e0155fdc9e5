"""What text a run reads: the fields of the section `data` of a config, and their ranges.

Plain values come in from a file or the command line; a value out of range is a ValueError before
anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One of several sources, and how much of it a run sees."""

    path: str
    """A file, folder or pattern of texts, or a prepared folder."""
    weight: float | None = None
    """Its share of the samples, relative to the weights of its stage."""
    epochs: float | None = None
    """How often it is read, instead of a weight: its share is that many times its tokens."""
    stage: float = 0.0
    """The part of the run after which its stage begins, from 0 to below 1. A stage lasts until the
    next one begins, and only its own sources are read in it."""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        if self.path == "":
            yield "path", "data.source has an entry without a path"
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                yield name, f"data.source: {name} of {self.path!r} is {value}; legal: above 0"
        if (self.weight is None) == (self.epochs is None):
            yield (
                "path weight epochs",
                f"data.source: {self.path!r} needs either a weight or epochs",
            )
        if not 0 <= self.stage < 1:
            yield (
                "stage",
                f"data.source: stage of {self.path!r} is {self.stage}; legal: from 0 to below 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The section `data`."""

    source: str | tuple[SourceConfig, ...] = "bundled"
    """A file, folder or pattern of text, HTML, JSON, CSV, Parquet or WARC, plain or compressed; a
    prepared folder; "bundled"; or a list of {path, weight or epochs, stage}."""
    exhausted: Literal["repeat", "error"] = "repeat"
    """What happens with a source of a list that the run would read more than once."""
    text_field: str | None = None
    """The field of records that holds the text; by default it is found in the first
    records."""
    val_fraction: float | None = None
    """Share of the documents kept for validation, above 0 and at most 0.5; by default 400 kB
    to 2 MB of text."""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        if not self.source:
            yield (
                "source",
                f"data.source is {self.source!r}; legal: a path of a file or folder, 'bundled', or "
                "a list of {path, weight}",
            )
        elif not isinstance(self.source, str):
            for sentence in _mistakes_of_mixture(self.source):
                yield "source", sentence
        if self.text_field is not None and not self.text_field:
            yield (
                "text_field",
                "data.text_field is empty; legal: the name of a field, or leave it out",
            )
        try:
            check_val_fraction(self.val_fraction, name="data.val_fraction")
        except ValueError as error:
            yield "val_fraction", str(error)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sources, each once."""
        if isinstance(self.source, str):
            return (self.source,)
        return tuple(dict.fromkeys(entry.path for entry in self.source))


def _mistakes_of_mixture(sources: tuple[SourceConfig, ...]) -> Iterator[str]:
    stages: dict[float, list[SourceConfig]] = {}
    for entry in sources:
        stages.setdefault(entry.stage, []).append(entry)
    if min(stages) != 0:
        yield f"data.source: the first stage begins at {min(stages)}; legal: 0"
    for stage, entries in stages.items():
        if len({entry.weight is None for entry in entries}) > 1:
            yield (
                f"data.source: the stage at {stage} has both weights and epochs; legal: one of them"
            )
        if len({entry.path for entry in entries}) < len(entries):
            yield f"data.source: the stage at {stage} names a path twice"


def check_val_fraction(value: float | None, *, name: str = "val_fraction") -> None:
    """ValueError unless `value` is None or in (0, 0.5]."""
    # Written so that NaN fails too.
    if value is not None and not 0 < value <= 0.5:
        raise ValueError(f"{name} is {value!r}; legal: above 0 and at most 0.5")
