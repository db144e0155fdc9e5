"""Per-example statistics -> a metric: statistics are summed first, the metric is a function of the
sums.

So the bootstrap and the comparison of models work for every metric in the same way. Open answers
are compared with their references here. A library that is not installed is a ValueError with the
command that installs it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain import needs_package

Array = NDArray[np.float64]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# White space, dollar signs, and commas between thousands.
_IGNORED_IN_NUMBERS = re.compile(r"[\s$]|(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"[^\W_]+")
_PUNCTUATION = frozenset(string.punctuation)
MAX_EXPONENT = 700.0  # exp() of more is infinite


def value(metric: str, sums: Array) -> Array:
    """The metric of sums (..., k) of statistics, of shape (...)."""
    if metric == "bleu":
        return np.apply_along_axis(_bleu_of_sums, -1, sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Array = sums[..., 0] / sums[..., 1]
    if metric.endswith("perplexity"):
        return np.exp(np.minimum(mean, MAX_EXPONENT))
    return mean


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces
    ("SQuAD", Rajpurkar et al., 2016, evaluation script)."""
    without_punctuation = "".join(c for c in answer.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())


def exact_match(answer: str, references: Iterable[str]) -> float:
    """1 if the normalised answer equals a reference, else 0. An empty answer equals only an empty
    reference, not one such as "A", of which nothing is left."""
    if not answer.strip():
        return float(any(not reference.strip() for reference in references))
    return float(normalized(answer) in {normalized(reference) for reference in references})


def final_answer(answer: str, references: Iterable[str]) -> float:
    """1 if the answer equals a reference as a number is read, else 0: white space, dollar signs,
    commas between thousands and a point at the end are ignored."""

    def cleaned(text: str) -> str:
        return _IGNORED_IN_NUMBERS.sub("", text).removesuffix(".")

    return float(cleaned(answer) in {cleaned(reference) for reference in references})


def f1(answer: str, references: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of normalised words, for the best reference."""
    if not answer.strip():
        return exact_match(answer, references)
    words = normalized(answer).split()
    scores = []
    for reference_words in (normalized(reference).split() for reference in references):
        n_shared = sum((Counter(words) & Counter(reference_words)).values())
        n_both = len(words) + len(reference_words)
        scores.append(2 * n_shared / n_both if n_both else 1.0)
    return max(scores)


def statistics_of_answer(metric: str, answer: str, references: Sequence[str]) -> tuple[float, ...]:
    """The statistics of one open answer. Of BLEU these are the sums of the corpus: matching
    n-grams, all n-grams, lengths. Other metrics are those of the best reference.

    Sources: "BLEU" (Papineni et al., 2002), as in sacrebleu: "A Call for Clarity in Reporting BLEU
    Scores" (Post, 2018); "chrF" (Popovic, 2015), 0 to 100; "ROUGE" (Lin, 2004), 0 to 1.
    """
    own = {"exact_match": exact_match, "final_answer": final_answer, "f1": f1}
    if metric in own:
        return own[metric](answer, references), 1.0
    if metric == "bleu":
        bleu = _sacrebleu().corpus_bleu([answer], [[reference] for reference in references])
        return (*map(float, bleu.counts), *map(float, bleu.totals), bleu.sys_len, bleu.ref_len)
    if metric == "chrf":
        return float(_sacrebleu().sentence_chrf(answer, list(references)).score), 1.0
    scorer = _rouge_scorer(metric)
    return max(float(scorer.score(r, answer)[metric].fmeasure) for r in references), 1.0


def _bleu_of_sums(sums: Array) -> float:
    *counts, length, reference_length = (round(each) for each in sums.tolist())
    orders = len(counts) // 2
    bleu = _sacrebleu().BLEU.compute_bleu(
        counts[:orders], counts[orders:], length, reference_length, smooth_method="exp"
    )
    return float(bleu.score)


def _rouge_scorer(kind: str) -> Any:
    with needs_package(kind, "rouge-score", extra="tasks"):
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    ascii_tokenizer = DefaultTokenizer(use_stemmer=True)

    class WordTokenizer:
        """The library's own words (a-z, 0-9, stemmed), but other letters are not dropped."""

        def tokenize(self, text: str) -> list[str]:
            words: list[str] = []
            for word in _WORD.findall(text.lower()):
                words += ascii_tokenizer.tokenize(word) if word.isascii() else [word]
            return words

    return RougeScorer([kind], tokenizer=WordTokenizer())


def _sacrebleu() -> Any:
    with needs_package("bleu and chrf", "sacrebleu", extra="tasks"):
        import sacrebleu
    return sacrebleu
