"""Overlap between evaluation texts and a corpus, counted in n-grams of words.

While a corpus is prepared, the n-grams of evaluation texts are in a hash table and each document is
compared with it: exact, and only the evaluation texts are in memory. Later the corpus is a Bloom
filter and any text can be compared with it, as in Radford et al., "Language Models are Unsupervised
Multitask Learners", 2019, section 4. Both count the same n-grams. The removal of documents with 13
shared words in a row follows Brown et al., "Language Models are Few-Shot Learners", 2020,
appendix C. `longest_matches` finds the longest sequence of words that a text shares with a corpus.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.words import Hashes, ngram_hashes, word_hash_windows, word_hashes
from pretrain.fileio import file_sha256, replacing
from pretrain.rng import splitmix64

REPORT_WORDS = 8
"""Words of an n-gram in all reports."""
REMOVE_WORDS = 13
_PREFILTER_BITS = 24
_WINDOW_WORDS = 1 << 16

FALSE_POSITIVES = 1e-8
"""The bound in Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
section 4."""
# A filter with this rate is smallest with 27 probes (38.3 bits per hash). 16 probes need 42.1 bits,
# but save 11 cache misses per look-up.
N_PROBES = 16
# Hashes that are added at once: so few that two of them are rarely in the same word.
_BATCH = 1 << 16


class HashTable:
    """A sorted set of hashes with fast batch look-up."""

    hashes: Hashes
    """Sorted, without duplicates."""

    def __init__(self, hashes: Iterable[Hashes]) -> None:
        self.hashes = _unique(hashes)
        # A flag for each value of the low 24 bits (16 MiB) avoids nearly all binary searches.
        self._may_contain = np.zeros(1 << _PREFILTER_BITS, bool)
        self._may_contain[_low_bits(self.hashes)] = True

    def find(self, hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the given hashes that are in the table, and their indices in `self.hashes`."""
        queries = np.flatnonzero(self._may_contain[_low_bits(hashes)])
        if not queries.size:
            return queries, np.empty(0, np.int64)
        slots = np.searchsorted(self.hashes, hashes[queries])
        slots = np.minimum(slots, len(self.hashes) - 1)
        is_equal = self.hashes[slots] == hashes[queries]
        return queries[is_equal], slots[is_equal]


def _unique(hashes: Iterable[Hashes]) -> Hashes:
    """Join arrays of hashes, sorted and without duplicates."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _low_bits(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _PREFILTER_BITS) - 1)).astype(np.int64)


# Evaluation texts in a table, documents compared with it


class EvaluationNgrams:
    """The n-grams of evaluation texts, with which documents are compared."""

    def __init__(self, texts: dict[str, Hashes], remove: Hashes) -> None:
        """Take over the REPORT_WORDS-grams of each text, by name, and all REMOVE_WORDS-grams."""
        self._texts = texts
        self._report = HashTable(texts.values())
        self._remove = HashTable([remove])

    @staticmethod
    def from_texts(texts: Iterable[tuple[str, str]]) -> EvaluationNgrams:
        """Create the tables from (name, text) pairs; texts with the same name are joined."""
        report: dict[str, list[Hashes]] = {}
        remove: list[Hashes] = []
        for name, text in texts:
            words = word_hashes(text)
            report.setdefault(name, []).append(np.unique(ngram_hashes(words, REPORT_WORDS)))
            remove.append(np.unique(ngram_hashes(words, REMOVE_WORDS)))
        by_name = {name: _unique(ngrams) for name, ngrams in report.items()}
        return EvaluationNgrams(by_name, _unique(remove))

    def save(self, path: Path) -> None:
        names = np.array([*self._texts])
        ngrams = {f"grams{number}": each for number, each in enumerate(self._texts.values())}
        np.savez(path, names=names, remove=self._remove.hashes, **ngrams)  # type: ignore[arg-type]

    @staticmethod
    def open(path: Path) -> EvaluationNgrams:
        with np.load(path) as file:
            names = file["names"].tolist()
            texts = {name: file[f"grams{number}"] for number, name in enumerate(names)}
            return EvaluationNgrams(texts, file["remove"])

    def shares_long_phrase(self, words: Hashes) -> bool:
        """Whether any evaluation text contains REMOVE_WORDS consecutive words of a document, given
        as `word_hashes`."""
        return bool(self._remove.find(ngram_hashes(words, REMOVE_WORDS))[1].size)

    def shared(self, words: Hashes) -> Hashes:
        """The REPORT_WORDS-grams of a document that any evaluation text contains, sorted."""
        slots = self._report.find(ngram_hashes(words, REPORT_WORDS))[1]
        return self._report.hashes[np.unique(slots)]

    def shares(self, shared: Hashes) -> dict[str, dict[str, int | float]]:
        """For each evaluation text, the share of its distinct REPORT_WORDS-grams that is in
        `shared`."""
        return {
            name: ngram_share(len(ngrams), int(np.isin(ngrams, shared).sum()))
            for name, ngrams in self._texts.items()
        }


def ngram_share(n_ngrams: int, n_in_corpus: int) -> dict[str, int | float]:
    """Counts of n-grams, in all and in the corpus, and the percentage, as JSON; 0 % of none."""
    percent = round(100 * n_in_corpus / max(1, n_ngrams), 3)
    return {"ngrams": n_ngrams, "in_corpus": n_in_corpus, "percent": percent}


# The corpus in a Bloom filter, texts compared with it


class BloomFilter:
    """A set of 64-bit hashes in few bits, which never misses one that was added.

    Source: Bloom, "Space/time trade-offs in hash coding with allowable errors", 1970, with double
    hashing: Kirsch and Mitzenmacher, "Less Hashing, Same Performance: Building a Better Bloom
    Filter", 2006. The bits are the same on every machine.
    """

    def __init__(self, words: Hashes) -> None:
        """Take over the bits, 64 in each word; `with_capacity` creates an empty filter."""
        self._words = words

    @staticmethod
    def with_capacity(n_hashes: int) -> BloomFilter:
        """An empty filter whose rate is at most FALSE_POSITIVES with `n_hashes` hashes."""
        fill = FALSE_POSITIVES ** (1 / N_PROBES)
        n_bits = -N_PROBES * max(n_hashes, 1) / math.log1p(-fill)
        return BloomFilter(np.zeros(math.ceil(n_bits / 64), np.uint64))

    @property
    def n_bytes(self) -> int:
        return self._words.nbytes

    @property
    def false_positives(self) -> float:
        """Current false positive rate, from the fraction of bits that are set."""
        n_set = sum(int(np.unpackbits(b.view(np.uint8)).sum()) for b in _batches(self._words))
        return float((n_set / (64 * len(self._words))) ** N_PROBES)

    def add(self, hashes: Hashes) -> None:
        words = self._words
        for batch in _batches(hashes):
            for index, bit in self._probes(batch):
                # If two hashes set bits of the same word, numpy writes only one of them: repeat.
                while index.size:
                    words[index] |= bit
                    is_lost = words[index] & bit == 0
                    index, bit = index[is_lost], bit[is_lost]

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Whether each hash was added (or is a false positive), shape (n,)."""
        flags = [np.ones(len(batch), bool) for batch in _batches(hashes)]
        for is_present, batch in zip(flags, _batches(hashes), strict=True):
            for index, bit in self._probes(batch):
                is_present &= self._words[index] & bit != 0
        return np.concatenate([np.empty(0, bool), *flags])

    def _probes(self, hashes: Hashes) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
        """Yield N_PROBES times the index of a word and a bit in it, for each hash."""
        position = hashes.copy()
        step = splitmix64(hashes) | np.uint64(1)
        n_words = np.uint64(len(self._words))
        for _ in range(N_PROBES):
            index = ((position >> np.uint64(32)) * n_words) >> np.uint64(32)
            yield index.astype(np.int64), np.uint64(1) << (position & np.uint64(63))
            position += step

    def save(self, path: Path) -> None:
        """Write the bits atomically as a .npy file, followed by the SHA-256 of that."""
        with replacing(path) as file:
            np.save(file, self._words)
            file.write(bytes.fromhex(file_sha256(file.path)))

    @staticmethod
    def open(path: Path) -> BloomFilter:
        """Map a saved filter into memory. ValueError if any of its bits has changed."""
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        if hashlib.sha256(content[:-32].data).digest() != content[-32:].tobytes():
            raise ValueError(f"{path} is damaged: its content has another SHA-256")
        return BloomFilter(np.load(path, mmap_mode="r"))


def _batches(hashes: Hashes) -> Iterator[Hashes]:
    return (hashes[start : start + _BATCH] for start in range(0, len(hashes), _BATCH))


def corpus_ngram_filter(chunks: Callable[[], Iterable[tuple[int, str]]]) -> BloomFilter:
    """A Bloom filter of the REPORT_WORDS-grams of a corpus.

    `chunks` returns numbered documents as `words.word_hash_windows` takes them. It is called twice,
    first to count.
    """
    n = REPORT_WORDS
    n_ngrams = sum(max(0, len(words) - n + 1) for _, words in word_hash_windows(chunks(), n))
    corpus = BloomFilter.with_capacity(n_ngrams)
    for _, words in word_hash_windows(chunks(), n):
        corpus.add(ngram_hashes(words, n))
    return corpus


@dataclass(frozen=True, slots=True)
class TextOverlap:
    """One text compared with a corpus."""

    name: str
    text: str
    grams: Hashes
    """Its distinct REPORT_WORDS-grams; empty for a text with fewer words."""
    in_corpus: NDArray[np.bool_]
    """Whether each of them is in the corpus, up to the filter's false positives."""

    @property
    def percent(self) -> float:
        return float(100 * self.in_corpus.sum() / max(1, len(self.grams)))


def measure_overlap(texts: Iterable[tuple[str, str]], corpus: BloomFilter) -> list[TextOverlap]:
    """Compare each of the (name, text) pairs with a corpus."""
    overlaps = []
    for name, text in texts:
        grams = np.unique(ngram_hashes(word_hashes(text), REPORT_WORDS))
        overlaps.append(TextOverlap(name, text, grams, corpus.contains(grams)))
    return overlaps


# The longest sequence of words in both


@dataclass(frozen=True, slots=True)
class Match:
    """Consecutive words of a text that are also in a document."""

    n_words: int
    first_word: int
    """Index in the text."""
    document: int
    """Number of the first document that contains them."""


def longest_matches(texts: Sequence[str], chunks: Iterable[tuple[int, str]]) -> list[Match | None]:
    """For each text its longest match in a corpus, or None below REPORT_WORDS words.

    `chunks` are numbered documents as `words.word_hash_windows` takes them; the corpus is read
    once, and only the texts are in memory.
    """
    ngrams = [ngram_hashes(word_hashes(text), REPORT_WORDS) for text in texts]
    # Number the n-grams of all texts, with a gap between texts so that no match crosses it.
    first_numbers = np.cumsum([0, *(len(each) + 1 for each in ngrams)])
    numbers = [
        first + np.arange(len(each)) for first, each in zip(first_numbers, ngrams, strict=False)
    ]
    all_ngrams = np.concatenate([np.empty(0, np.uint64), *ngrams])
    all_numbers = np.concatenate([np.empty(0, np.int64), *numbers])
    order = np.argsort(all_ngrams, kind="stable")
    all_ngrams, all_numbers = all_ngrams[order], all_numbers[order]
    table = HashTable([all_ngrams])
    longest: list[Match | None] = [None] * len(texts)
    # A match is at most as long as its text, so it is inside one of windows with this overlap.
    overlap = max(map(len, ngrams), default=1) + REPORT_WORDS - 1
    for document, words in word_hash_windows(chunks, overlap + 1):
        for start in range(0, max(1, len(words) - overlap), _WINDOW_WORDS):
            window = ngram_hashes(words[start : start + _WINDOW_WORDS + overlap], REPORT_WORDS)
            # Every pair of an n-gram of the window and an occurrence of it in the texts.
            queries, slots = table.find(window)
            starts = np.searchsorted(all_ngrams, table.hashes[slots], side="left")
            counts = np.searchsorted(all_ngrams, table.hashes[slots], side="right") - starts
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            occurrences = all_numbers[np.repeat(starts, counts) + within]
            firsts, lengths = _runs(np.repeat(queries, counts), occurrences)
            text_numbers = np.searchsorted(first_numbers, firsts, side="right") - 1
            # By text, then longest first, then first in the text: the first row of each text.
            order = np.lexsort((firsts, -lengths, text_numbers))
            best_rows = order[np.unique(text_numbers[order], return_index=True)[1]]
            for row in best_rows.tolist():
                text = int(text_numbers[row])
                n_words = int(lengths[row]) + REPORT_WORDS - 1
                best = longest[text]
                if best is None or n_words > best.n_words:
                    first_word = int(firsts[row] - first_numbers[text])
                    longest[text] = Match(n_words, first_word, document)
    return longest


def _runs(
    queries: NDArray[np.int64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First number and length of each run of pairs in which both sides increase by one.

    Example: the pairs (0, 5), (1, 6), (7, 2) give firsts [2, 5] and lengths [1, 2].
    """
    order = np.lexsort((numbers, numbers - queries))
    queries, numbers = queries[order], numbers[order]
    is_first = np.ones(len(numbers), bool)
    is_first[1:] = (np.diff(numbers) != 1) | (np.diff(queries) != 1)
    starts = np.flatnonzero(is_first)
    return numbers[starts], np.diff(starts, append=len(numbers))
