"""Which documents hold what will judge the model, and which texts a corpus holds: n words in a row
that both have.

While a corpus is prepared, evaluation texts are a table of hashes that documents are held against
as they go by: exact, and only these texts are in memory. Later the corpus is a Bloom filter that
any text is held against, as in Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019, section 4; both count the same n-grams. Removal by 13 words in a row is that of
Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.bloom import BloomFilter
from pretrain.corpus.words import Hashes, ngram_hashes, windows_of, word_hashes

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
        self._report = HashTable([text.grams for text in texts])
        self._remove = HashTable([remove])

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
            rates[text.name] = rate(len(text.grams), found)
        return rates


def rate(n_grams: int, n_found: int) -> dict[str, int | float]:
    """How many of so many n-grams are in a corpus, as JSON; of none 0 %."""
    percent = round(100 * n_found / max(1, n_grams), 3)
    return {"ngrams": n_grams, "in_corpus": n_found, "percent": percent}


def corpus_filter(pieces: Callable[[], Iterable[tuple[int, str]]]) -> BloomFilter:
    """The REPORT_WORDS-grams of a corpus of documents, numbered and long ones in pieces as
    `words.windows_of` takes them; `pieces` is called twice, once to count."""
    n = REPORT_WORDS
    counts = (len(words) - n + 1 for _, words in windows_of(pieces(), n))
    corpus = BloomFilter.sized(sum(max(0, count) for count in counts))
    for _, words in windows_of(pieces(), n):
        corpus.add(ngram_hashes(words, n))
    return corpus


@dataclass(frozen=True, slots=True)
class Found:
    """One text held against a corpus."""

    name: str
    text: str
    grams: Hashes
    """Its different REPORT_WORDS-grams; a text of fewer words has none."""
    is_found: NDArray[np.bool_]
    """Which of them the corpus has, but for the filter's false positives."""

    @property
    def percent(self) -> float:
        return float(100 * self.is_found.sum() / max(1, len(self.grams)))


def look_up(texts: Iterable[tuple[str, str]], corpus: BloomFilter) -> list[Found]:
    """Names and texts, each held against a corpus."""
    found = []
    for name, text in texts:
        grams = np.unique(ngram_hashes(word_hashes(text), REPORT_WORDS))
        found.append(Found(name, text, grams, corpus.holds(grams)))
    return found


class HashTable:
    """A set of hashes, quick to search for many at once."""

    hashes: Hashes
    """Sorted, each once."""

    def __init__(self, hashes: list[Hashes]) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_low_bits(self.hashes)] = True

    def places_of(self, hashes: Hashes) -> NDArray[np.int64]:
        """Where in the table those of the hashes stand that it holds, each place once."""
        return np.unique(self.pairs(hashes)[1])

    def pairs(self, hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the hashes the table holds, and where each of these stands in it."""
        which = np.flatnonzero(self._filter[_low_bits(hashes)])
        if not which.size:
            return which, np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(self.hashes, hashes[which]), len(self.hashes) - 1)
        is_there = self.hashes[places] == hashes[which]
        return which[is_there], places[is_there]


def _low_bits(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)
