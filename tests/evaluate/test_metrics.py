"""Metrics of open answers, compared with values computed by hand and by other libraries."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pretrain.evaluate.metrics import (
    exact_match,
    f1,
    normalized,
    statistics_of_answer,
    value,
)


def test_answers_are_compared_as_in_squad() -> None:
    assert normalized("  The  Cat's, an   apple. ") == "cats apple"
    assert exact_match("the U.S.", ["a US", "x"]) == 1
    assert exact_match("US of A", ["US"]) == 0
    assert f1("the black cat", ["cat", "a black dog"]) == pytest.approx(2 / 3)
    assert f1("dog", ["cat"]) == 0
    assert f1("the", ["a"]) == 1  # nothing on both sides
    assert f1(" ", ["A"]) == exact_match("", ["A"]) == 0  # no answer at all
    assert f1("", ["cat", ""]) == exact_match("", ["cat", ""]) == 1
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3)


def test_bleu_of_sums_equals_sacrebleu_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog barked loudly at the moon", "yes"]
    references = [
        ["the cat sat on a mat today", "one cat sat on the mat"],
        ["a dog barked at the moon", "the dog barked loudly at a moon"],
        ["yes", "no"],
    ]
    rows = [statistics_of_answer("bleu", a, r) for a, r in zip(answers, references, strict=True)]
    streams = [list(each) for each in zip(*references, strict=True)]
    expected = sacrebleu.corpus_bleu(answers, streams).score
    assert float(value("bleu", np.array(rows).sum(0))) == pytest.approx(expected, abs=1e-9)
    assert expected > 10
    chrf = statistics_of_answer("chrf", answers[0], references[0])[0]
    assert chrf == pytest.approx(sacrebleu.sentence_chrf(answers[0], references[0]).score)


def test_rouge_takes_the_best_reference() -> None:
    pytest.importorskip("rouge_score")
    found = statistics_of_answer("rouge1", "the black cat", ["a dog", "the cat"])
    assert found == pytest.approx((0.8, 1.0))
    assert statistics_of_answer("rougeL", "cats", ["cat"])[0] == 1  # stems are compared
    for text in ("Москва — столица России", "東京は日本の首都です", "un été"):
        assert statistics_of_answer("rouge1", text, [text])[0] == 1
    assert statistics_of_answer("rouge1", "un éte", ["un été"])[0] == 0.5


def test_words_of_rouge_equal_the_library() -> None:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    draw = random.Random(1)
    scorer = scorers.RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(200):
        one, other = ("".join(draw.choices("abS ing_-'9.\n", k=40)) for _ in range(2))
        expected = scorer.score(other, one)["rougeL"].fmeasure
        assert statistics_of_answer("rougeL", one, [other])[0] == pytest.approx(expected)
