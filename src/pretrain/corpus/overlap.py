"""Which documents hold what will judge the model, and which texts a corpus holds: n words in a
row that both have.

While a corpus is prepared, evaluation texts are a table of hashes that documents are held against
as they go by: exact, and only these texts are in memory. Later the corpus is a Bloom filter that
any text is held against, as in Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019, section 4; both count the same n-grams. Removal by 13 words in a row is that of
Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.bloom import BloomFilter
from pretrain.corpus.words import Hashes, ngram_hashes, word_hash_windows, word_hashes

REPORT_WORDS = 8
REMOVE_WORDS = 13
# A flag for each value of the low bits of a hash, 16 MiB: a Bloom filter with one function, which
# spares nearly all searches in the sorted table.
_FILTER_BITS = 24


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text that will apply_filters a model: the REPORT_WORDS-grams of it."""

    name: str
    grams: Hashes
    """Sorted, each once."""


class EvaluationNgrams:
    """Evaluation texts as something to hold documents against."""

    def __init__(self, texts: list[EvaluationText], remove: Hashes) -> None:
        self.texts = texts
        self._report = HashTable([text.grams for text in texts])
        self._remove = HashTable([remove])

    @staticmethod
    def from_texts(texts: Iterable[tuple[str, str]]) -> EvaluationNgrams:
        """From names and texts; those of the same name are one."""
        grams: dict[str, list[Hashes]] = {}
        remove: list[Hashes] = []
        for name, text in texts:
            words = word_hashes(text)
            grams.setdefault(name, []).append(np.unique(ngram_hashes(words, REPORT_WORDS)))
            remove.append(np.unique(ngram_hashes(words, REMOVE_WORDS)))
        return EvaluationNgrams(
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
    def open(path: Path) -> EvaluationNgrams:
        with np.load(path) as file:
            names = file["names"].tolist()
            texts = [EvaluationText(name, file[f"grams{n}"]) for n, name in enumerate(names)]
            return EvaluationNgrams(texts, file["remove"])

    def shares_long_phrase(self, words: Hashes) -> bool:
        """Whether REMOVE_WORDS words in a row of a document, given as `word_hashes`, are in any
        evaluation text."""
        return bool(self._remove.places_of(ngram_hashes(words, REMOVE_WORDS)).size)

    def shared(self, words: Hashes) -> Hashes:
        """The REPORT_WORDS-grams of a document that any evaluation text has."""
        return self._report.hashes[self._report.places_of(ngram_hashes(words, REPORT_WORDS))]

    def shares(self, shared: Hashes) -> dict[str, dict[str, int | float]]:
        """For each evaluation text how many of its different REPORT_WORDS-grams are among those
        `shared` with the corpus."""
        rates: dict[str, dict[str, int | float]] = {}
        for text in self.texts:
            found = int(np.isin(text.grams, shared).sum())
            rates[text.name] = ngram_share(len(text.grams), found)
        return rates


def ngram_share(n_grams: int, n_found: int) -> dict[str, int | float]:
    """How many of so many n-grams are in a corpus, as JSON; of none 0 %."""
    percent = round(100 * n_found / max(1, n_grams), 3)
    return {"ngrams": n_grams, "in_corpus": n_found, "percent": percent}


def corpus_ngram_filter(pieces: Callable[[], Iterable[tuple[int, str]]]) -> BloomFilter:
    """The REPORT_WORDS-grams of a corpus of documents, numbered and long ones in pieces as
    `words.word_hash_windows` takes them; `pieces` is called twice, once to count."""
    n = REPORT_WORDS
    counts = (len(words) - n + 1 for _, words in word_hash_windows(pieces(), n))
    corpus = BloomFilter.sized(sum(max(0, count) for count in counts))
    for _, words in word_hash_windows(pieces(), n):
        corpus.add(ngram_hashes(words, n))
    return corpus


@dataclass(frozen=True, slots=True)
class TextOverlap:
    """One text held against a corpus."""

    name: str
    text: str
    grams: Hashes
    """Its different REPORT_WORDS-grams; a text of fewer words has none."""
    in_corpus: NDArray[np.bool_]
    """Which of them the corpus has, but for the filter's false positives."""

    @property
    def percent(self) -> float:
        return float(100 * self.in_corpus.sum() / max(1, len(self.grams)))


def measure_overlap(texts: Iterable[tuple[str, str]], corpus: BloomFilter) -> list[TextOverlap]:
    """Names and texts, each held against a corpus."""
    found = []
    for name, text in texts:
        grams = np.unique(ngram_hashes(word_hashes(text), REPORT_WORDS))
        found.append(TextOverlap(name, text, grams, corpus.holds(grams)))
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


# Words of a document that are looked at together.
_WINDOW_WORDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Match:
    """Words in a row of a text that a document has too."""

    n_words: int
    first_word: int
    """Where it begins in the text."""
    document: int
    """The number of the first document that has it."""


def longest_matches(texts: Sequence[str], pieces: Iterable[tuple[int, str]]) -> list[Match | None]:
    """For each text the longest stretch in a corpus of documents, numbered and long ones in pieces
    as `words.word_hash_windows` takes them; None where no REPORT_WORDS words in a row are in it."""
    grams = [ngram_hashes(word_hashes(text), REPORT_WORDS) for text in texts]
    # Places of all n-grams, with a gap between texts that no stretch goes over.
    firsts = np.cumsum([0, *(len(each) + 1 for each in grams)])
    places = np.concatenate(
        [np.empty(0, np.int64)]
        + [first + np.arange(len(each)) for first, each in zip(firsts, grams, strict=False)]
    )
    index = _Index(np.concatenate([np.empty(0, np.uint64), *grams]), places)
    longest: list[Match | None] = [None] * len(texts)
    # A stretch is as long as its text at most, so it lies in one of windows that overlap by that.
    overlap = max(map(len, grams), default=1) + REPORT_WORDS - 1
    for document, words in word_hash_windows(pieces, overlap + 1):
        for start in range(0, max(1, len(words) - overlap), _WINDOW_WORDS):
            window = ngram_hashes(words[start : start + _WINDOW_WORDS + overlap], REPORT_WORDS)
            begins, lengths = _runs(*index.pairs(window))
            of_text = np.searchsorted(firsts, begins, side="right") - 1
            order = np.lexsort((begins, -lengths, of_text))
            longest_here = order[np.unique(of_text[order], return_index=True)[1]]
            for place in longest_here.tolist():
                text, n_words = int(of_text[place]), int(lengths[place]) + REPORT_WORDS - 1
                best = longest[text]
                if best is None or n_words > best.n_words:
                    first_word = int(begins[place] - firsts[text])
                    longest[text] = Match(n_words, first_word, document)
    return longest


class _Index:
    """Where each n-gram stands, of which some stand at several places."""

    def __init__(self, grams: Hashes, places: NDArray[np.int64]) -> None:
        self._table = HashTable([grams])
        order = np.argsort(grams, kind="stable")
        self._places = places[order]
        bounds = np.searchsorted(grams[order], self._table.hashes, side="left")
        self._bounds = np.append(bounds, len(grams))

    def pairs(self, grams: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every pair of a number in `grams` and a place at which the same stands."""
        which, entries = self._table.pairs(grams)
        begins = self._bounds[entries]
        counts = self._bounds[entries + 1] - begins
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(which, counts), self._places[np.repeat(begins, counts) + within]


def _runs(
    which: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where pairs that go on by one on both sides begin, and how many there are in a row."""
    order = np.lexsort((places, places - which))
    which, places = which[order], places[order]
    is_first = np.ones(len(places), bool)
    is_first[1:] = (np.diff(places) != 1) | (np.diff(which) != 1)
    firsts = np.flatnonzero(is_first)
    return places[firsts], np.diff(firsts, append=len(places))
