"""Hashes of words and n-grams."""

from __future__ import annotations

import random

from pretrain.corpus.words import ngram_hashes, word_hashes
from texts import prose


def test_case_and_punctuation_do_not_change_word_hashes() -> None:
    one = word_hashes("The whale, it SWAM (in 1851) -- déjà vu!")
    assert one.tolist() == word_hashes("the Whale it swam in 1851 DÉJÀ vu").tolist()
    assert len(set(one.tolist())) == len(one) == 8
    assert len(word_hashes("中文字 かな")) == 5
    assert len(word_hashes("\U0001f3f3\U0001f308")) == 2
    assert word_hashes(" .,- \n").size == word_hashes("").size == 0
    # Letters in another order, a word cut elsewhere, are other words.
    assert len({int(word_hashes(word)[0]) for word in ("ab", "ba", "abc", "ac")}) == 4
    assert word_hashes("ab c").tolist() != word_hashes("a bc").tolist()


def test_long_text_is_hashed_word_by_word() -> None:
    words = prose(random.Random(0), 60_000)
    text = " ".join(words)
    assert len(text) > 1 << 18
    assert word_hashes(text).tolist() == [int(word_hashes(word)[0]) for word in words]


def test_different_ngrams_have_different_hashes() -> None:
    words = word_hashes(" ".join(str(n) for n in range(1000)))
    phrases = ngram_hashes(words, 13)
    assert len(set(phrases.tolist())) == 988
    assert ngram_hashes(words[5:18], 13).tolist() == phrases[5:6].tolist()
    assert ngram_hashes(words[:12], 13).size == 0
