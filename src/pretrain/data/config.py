"""The section `data` of a config: the text that a run is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pretrain.validation import NON_EMPTY, Checked, FieldError, Matching, Range

ValFraction = Annotated[float | None, Range(gt=0, le=0.5)]
Fold = Annotated[int, Range(0, 10**6)]
TextPath = Annotated[str, Matching(NON_EMPTY, "a path of a file or folder")]
_PATH = Matching(NON_EMPTY, "a path of a file or folder, 'bundled', or a list of {path, weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(Checked):
    """One of several sources, and its share of the samples of a run."""

    section = "data.source"

    path: TextPath
    """a file, folder or pattern of texts, or a prepared folder"""
    weight: Annotated[float | None, Range(gt=0)] = None
    """share of the samples, relative to the weights of its stage"""
    epochs: Annotated[float | None, Range(gt=0)] = None
    """number of times that it is read, instead of a weight: its share is that number times its
    tokens"""
    stage: Annotated[float, Range(0, lt=1)] = 0.0
    """fraction of the run after which its stage begins; a stage lasts until the next one begins,
    and only its own sources are read in it"""

    def conflicts(self) -> Iterator[FieldError]:
        if (self.weight is None) == (self.epochs is None):
            yield (
                "path weight epochs",
                f"data.source: {self.path!r} needs either a weight or epochs",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Checked):
    """The section `data`."""

    section = "data"

    source: Annotated[str, _PATH] | tuple[TextPath, ...] | tuple[SourceConfig, ...] = "bundled"
    """a file, folder or pattern of text, HTML, JSON, CSV, Parquet, PDF, EPUB, mail or the like; a
    prepared folder; "bundled"; a list of these, read as one corpus; or a mixture: a list of {path,
    weight or epochs, stage}"""
    base: Annotated[str | None, Matching(NON_EMPTY, "a path of a file or folder")] = None
    """a larger text of the same language for a run to stand on, such as bundled: it is read alone
    first, and then together with data.source, whose held-out text alone is scored; the tokenizer
    is that of the larger text; empty: none"""
    exhausted: Literal["repeat", "error"] = "repeat"
    """what to do when a run needs more than one epoch of a source in a list: read it again, or
    stop"""
    text_field: Annotated[str | None, Matching(NON_EMPTY, "the name of a field")] = None
    """field of JSON, CSV, Parquet and Arrow records that contains the text, or several that are
    joined, as title,post.body or html:body (its text without tags); empty: detected from the first
    records"""
    document_separator: Annotated[str | None, Matching(NON_EMPTY, "a text")] = None
    """what divides the documents of a text file, such as <|endoftext|>; empty: a file is one
    document"""
    val_fraction: ValFraction = None
    """fraction of the documents kept for validation; empty: 400 kB to 2 MB of text, of less than 4
    MB a tenth, of less than 60 kB up to a fifth"""
    fold: Fold = 0
    """which part of this size is kept for validation: 0 is the end of each document (or the
    documents with the lowest hashes), 1 the part before it (or the next hashes), and so on"""

    def conflicts(self) -> Iterator[FieldError]:
        if self.base is not None and (self.mixture or self.base in self.paths):
            yield (
                "base source",
                f"data.base is {self.base!r}; data.source must be another text, or several without "
                "weights",
            )
        if isinstance(self.source, str):
            return
        if not self.source:
            yield "source", f"data.source is (); it must be {_PATH.expected}"
            return
        stages: dict[float, list[SourceConfig]] = {}
        for entry in self.mixture:
            stages.setdefault(entry.stage, []).append(entry)
        if stages and min(stages) != 0:
            yield "source", f"data.source: the first stage begins at {min(stages)}; it must be at 0"
        for stage, entries in stages.items():
            if len({entry.weight is None for entry in entries}) > 1:
                yield (
                    "source",
                    f"data.source: the stage at {stage} has both weights and epochs; it must have "
                    "one of them",
                )
            if len({entry.path for entry in entries}) < len(entries):
                yield "source", f"data.source: the stage at {stage} has the same path twice"

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources that have shares; none of one corpus, of one path or of several."""
        return tuple(entry for entry in self.source if isinstance(entry, SourceConfig))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sources, each once."""
        entries = (self.source,) if isinstance(self.source, str) else self.source
        paths = [each.path if isinstance(each, SourceConfig) else each for each in entries]
        return tuple(dict.fromkeys(paths))
