"""The section `corpus` of a config: which documents are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pretrain.validation import Checked, FieldError, Matching

FILTERS = ("gopher", "c4", "fineweb")
"""The published sets of quality rules, see `filters`."""
_FILTER = Matching("|".join(FILTERS), f"one of {', '.join(FILTERS)}")
_LANGUAGE = Matching("[a-z]{2,3}", "a code of two or three letters, such as en")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig(Checked):
    """The section `corpus`."""

    section = "corpus"

    deduplicate: Literal["none", "exact", "near"] = "exact"
    """keep only the first of equal documents (exact), or of nearly equal ones too (near)"""
    filters: tuple[Annotated[str, _FILTER], ...] = ()
    """published sets of quality rules that a document must pass: gopher, c4, fineweb"""
    languages: tuple[Annotated[str, _LANGUAGE], ...] = ()
    """codes of languages to keep, such as en; empty: all"""
    evaluation_texts: tuple[str, ...] = ()
    """files of texts that the model will be evaluated on; their overlap with the corpus is
    reported"""
    remove_overlap: bool = False
    """remove documents that share 13 consecutive words with an evaluation text"""

    def conflicts(self) -> Iterator[FieldError]:
        if self.remove_overlap and not self.evaluation_texts:
            yield (
                "remove_overlap evaluation_texts",
                "corpus.remove_overlap needs corpus.evaluation_texts to compare with",
            )

    @property
    def inspects_text(self) -> bool:
        """Whether documents are removed for their content, not only as duplicates."""
        return bool(self.filters or self.languages or self.evaluation_texts)
