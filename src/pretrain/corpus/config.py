"""Which documents stay: the fields of the section `corpus` of a config, and their ranges.

Plain values come in from a file or the command line; a value out of range is a ValueError before
anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

FILTERS = ("gopher", "c4", "fineweb")
"""The published sets of quality rules, see `filters`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """The section `corpus`."""

    deduplicate: Literal["none", "exact", "near"] = "exact"
    """Of equal documents (exact), or of nearly equal ones too (near), only the first is kept."""
    filters: tuple[str, ...] = ()
    """Sets of quality rules that a document must pass: gopher, c4, fineweb."""
    languages: tuple[str, ...] = ()
    """Codes such as en: documents in other languages are removed; by default all stay."""
    evaluation_texts: tuple[str, ...] = ()
    """Files of texts that will judge the model: how much of them the corpus holds is reported."""
    remove_overlap: bool = False
    """Remove documents that share 13 words in a row with an evaluation text."""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        for name in self.filters:
            if name not in FILTERS:
                yield "filters", f"corpus.filters has {name!r}; legal: {', '.join(FILTERS)}"
        for code in self.languages:
            if not (2 <= len(code) <= 3 and code.isascii() and code.islower()):
                yield (
                    "languages",
                    f"corpus.languages has {code!r}; legal: codes of two or three letters, as en",
                )
        if self.remove_overlap and not self.evaluation_texts:
            yield (
                "remove_overlap evaluation_texts",
                "corpus.remove_overlap needs corpus.evaluation_texts to compare with",
            )

    @property
    def looks_at_text(self) -> bool:
        """Whether a document can be removed for what it says, rather than for being double."""
        return bool(self.filters or self.languages or self.evaluation_texts)
