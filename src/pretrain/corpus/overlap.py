"""Which documents hold what will judge the model: n words in a row that an evaluation text has too.

Evaluation texts come in and become a table of hashes; documents are held against it. The corpus is
walked once and only the evaluation texts are in memory, which is the reverse of the Bloom filters
over the corpus of Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
section 4, measures the same, and has no false alarms. Removal by 13 words in a row is that of Brown
et al., "Language Models are Few-Shot Learners", 2020, appendix C.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.words import Hashes, ngram_hashes, word_hashes

REPORT_WORDS = 8
REMOVE_WORDS = 13
# A flag for each value of the low bits of a hash, 16 MiB: a Bloom filter with one function, which
# spares nearly all searches in the sorted table.
_FILTER_BITS = 24


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text that will judge a model: the REPORT_WORDS-grams of it."""

    name: str
    grams: Hashes
    """Sorted, each once."""


class Overlaps:
    """Evaluation texts as something to hold documents against."""

    def __init__(self, texts: list[EvaluationText], remove: Hashes) -> None:
        self.texts = texts
        self._report = _Table([text.grams for text in texts])
        self._remove = _Table([remove])

    @staticmethod
    def of(texts: Iterable[tuple[str, str]]) -> Overlaps:
        """From names and texts; those of the same name are one."""
        grams: dict[str, list[Hashes]] = {}
        remove: list[Hashes] = []
        for name, text in texts:
            words = word_hashes(text)
            grams.setdefault(name, []).append(np.unique(ngram_hashes(words, REPORT_WORDS)))
            remove.append(np.unique(ngram_hashes(words, REMOVE_WORDS)))
        return Overlaps(
            [
                EvaluationText(name, np.unique(np.concatenate(found)))
                for name, found in grams.items()
            ],
            np.unique(np.concatenate(remove)) if remove else np.empty(0, np.uint64),
        )

    def save(self, path: Path) -> None:
        names = np.array([text.name for text in self.texts])
        grams = {f"grams{number}": text.grams for number, text in enumerate(self.texts)}
        np.savez(path, names=names, remove=self._remove.hashes, **grams)  # type: ignore[arg-type]

    @staticmethod
    def open(path: Path) -> Overlaps:
        with np.load(path) as file:
            names = file["names"].tolist()
            texts = [EvaluationText(name, file[f"grams{n}"]) for n, name in enumerate(names)]
            return Overlaps(texts, file["remove"])

    def shares_long_phrase(self, words: Hashes) -> bool:
        """Whether REMOVE_WORDS words in a row of a document, given as `word_hashes`, are in any
        evaluation text."""
        return bool(self._remove.places_of(ngram_hashes(words, REMOVE_WORDS)).size)

    def shared(self, words: Hashes) -> Hashes:
        """The REPORT_WORDS-grams of a document that any evaluation text has."""
        return self._report.hashes[self._report.places_of(ngram_hashes(words, REPORT_WORDS))]

    def rates(self, shared: Hashes) -> dict[str, dict[str, int | float]]:
        """For each evaluation text how many of its different REPORT_WORDS-grams are among those
        `shared` with the corpus."""
        rates: dict[str, dict[str, int | float]] = {}
        for text in self.texts:
            found = int(np.isin(text.grams, shared).sum())
            rates[text.name] = {
                "ngrams": len(text.grams),
                "in_corpus": found,
                "percent": round(100 * found / max(1, len(text.grams)), 3),
            }
        return rates


class _Table:
    """A set of hashes, quick to search for many at once."""

    def __init__(self, hashes: list[Hashes]) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_low_bits(self.hashes)] = True

    def places_of(self, hashes: Hashes) -> NDArray[np.int64]:
        """Where in the table those of the hashes stand that it holds."""
        hashes = hashes[self._filter[_low_bits(hashes)]]
        if not hashes.size or not self.hashes.size:
            return np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.unique(places[self.hashes[places] == hashes])


def _low_bits(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)
