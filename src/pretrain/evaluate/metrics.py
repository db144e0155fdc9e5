"""From what a model said of each example to a number for all: sums first, the number from the sums.

A metric is a row of statistics an example and a function of their sums, so that a bootstrap and a
comparison of models take any metric alike. Open answers are compared with their references here,
too. A library that is not installed is a ValueError with the command that installs it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain import missing_package

Array = NDArray[np.float64]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PART_OF_A_NUMBER = re.compile(r"[\s$]|(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"[^\W_]+")
_PUNCTUATION = frozenset(string.punctuation)
_LARGEST_EXPONENT = 700.0


def value(metric: str, sums: Array) -> Array:
    """The metric of sums (..., k) of statistics, of any shape (...)."""
    if metric == "bleu":
        return np.apply_along_axis(_bleu_of_sums, -1, sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Array = sums[..., 0] / sums[..., 1]
    if metric.endswith("perplexity"):
        return np.exp(np.minimum(mean, _LARGEST_EXPONENT))
    return mean


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces
    ("SQuAD", Rajpurkar et al., 2016, evaluation script)."""
    plain = "".join(c for c in answer.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, references: Iterable[str]) -> float:
    """1 where the normalised answer is one of the references, else 0. No answer is none of them,
    though nothing is left of a reference such as "A"."""
    if not answer.strip():
        return float(any(not reference.strip() for reference in references))
    return float(normalized(answer) in {normalized(reference) for reference in references})


def final_answer(answer: str, references: Iterable[str]) -> float:
    """1 where the answer is one of the references as mathematics reads them, sign by sign: without
    white space, dollar signs, commas between thousands and a point at the end; else 0."""

    def written(text: str) -> str:
        return _NO_PART_OF_A_NUMBER.sub("", text).removesuffix(".")

    return float(written(answer) in {written(reference) for reference in references})


def f1(answer: str, references: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of normalised words, of the best reference."""
    if not answer.strip():
        return exact_match(answer, references)
    return max(_word_f1(normalized(answer).split(), normalized(r).split()) for r in references)


def _word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def statistics_of_answer(metric: str, answer: str, references: Sequence[str]) -> tuple[float, ...]:
    """An open answer's row of statistics."""
    match metric:
        case "bleu":
            return _bleu_counts(answer, references)
        case "chrf":
            return _chrf(answer, references), 1.0
        case "exact_match":
            return exact_match(answer, references), 1.0
        case "final_answer":
            return final_answer(answer, references), 1.0
        case "f1":
            return f1(answer, references), 1.0
    return _rouge(metric, answer, references), 1.0


def _bleu_counts(answer: str, references: Sequence[str]) -> tuple[float, ...]:
    """What corpus BLEU sums up: n-grams that match, n-grams there are, lengths ("BLEU", Papineni et
    al., 2002, as sacrebleu computes it: "A Call for Clarity in Reporting BLEU Scores", Post, 2018).
    """
    found = _sacrebleu().corpus_bleu([answer], [[reference] for reference in references])
    return (*map(float, found.counts), *map(float, found.totals), found.sys_len, found.ref_len)


def _bleu_of_sums(sums: Array) -> float:
    *counts, n_found, n_wanted = (round(each) for each in sums.tolist())
    orders = len(counts) // 2
    bleu = _sacrebleu().BLEU.compute_bleu(
        counts[:orders], counts[orders:], n_found, n_wanted, smooth_method="exp"
    )
    return float(bleu.score)


def _chrf(answer: str, references: Sequence[str]) -> float:
    """chrF of a sentence, 0 to 100 ("chrF", Popovic, 2015)."""
    return float(_sacrebleu().sentence_chrf(answer, list(references)).score)


def _rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    """ROUGE's F of the best reference, 0 to 1 ("ROUGE", Lin, 2004); words are those of rouge_score
    where all is ASCII."""
    scorer = _rouge_scorer(kind)
    return max(float(scorer.score(r, answer)[kind].fmeasure) for r in references)


def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise missing_package(kind, "rouge-score", extra="tasks") from error
    plain = DefaultTokenizer(use_stemmer=True)

    class Words:
        """The library's own words, which are of a-z and 0-9; letters of others are not dropped."""

        def tokenize(self, text: str) -> list[str]:
            words = _WORD.findall(text.lower())
            return [
                w for word in words for w in (plain.tokenize(word) if word.isascii() else [word])
            ]

    return RougeScorer([kind], tokenizer=Words())


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_package("bleu and chrf", "sacrebleu", extra="tasks") from error
    return sacrebleu
