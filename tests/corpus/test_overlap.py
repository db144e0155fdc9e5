"""Overlap of texts with a corpus: Bloom filter, n-gram shares and longest matches."""

from __future__ import annotations

import hashlib
import json
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.corpus import overlap as overlap_module
from pretrain.corpus.overlap import (
    BloomFilter,
    EvaluationNgrams,
    Match,
    corpus_ngram_filter,
    longest_matches,
    measure_overlap,
)
from pretrain.corpus.reading import read_documents
from pretrain.corpus.words import ngram_hashes, split_words, word_hash_windows, word_hashes
from pretrain.data.preparation import prepare
from pretrain.evaluate.overlap import (
    document_texts,
    overlap_row,
)
from pretrain.rng import splitmix64
from texts import prose

SEA = "The sea was calm, and the SEA was wide; the sun went down at nine."  # 15 words, 8 n-grams


SHIP = "one old ship came home from the south with forty tired men on deck"  # 14 words, 7 n-grams


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_bloom_filter_contains_all_added_hashes(first: list[int], second: list[int]) -> None:
    corpus = BloomFilter.with_capacity(1)  # far too small: never a miss, however full
    for part in (first, second):
        corpus.add(np.array(part, np.uint64))
    assert corpus.contains(np.array(first + second, np.uint64)).all()


def test_bloom_filter_has_the_false_positive_rate_of_its_capacity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n, n_others, rate = 100_000, 1_000_000, 1e-3
    # The bits of a hash at the paper's rate: 16 / -ln(1 - 10^(-8/16)).
    assert BloomFilter.with_capacity(n).n_bytes * 8 / n == pytest.approx(42.09, abs=0.01)
    monkeypatch.setattr(overlap_module, "FALSE_POSITIVES", rate)
    corpus = BloomFilter.with_capacity(n)
    hashes = splitmix64(np.arange(n + n_others, dtype=np.uint64))
    corpus.add(hashes[:n])
    assert corpus.contains(hashes[:n]).all()
    found = int(corpus.contains(hashes[n:]).sum())
    assert abs(found - rate * n_others) < 5 * math.sqrt(rate * n_others)
    assert corpus.false_positives == pytest.approx(rate, rel=0.02)


def test_bloom_filter_bits_are_the_same_after_saving(tmp_path: Path) -> None:
    corpus = corpus_ngram_filter(lambda: [(0, SEA), (1, SHIP)])
    corpus.save(tmp_path / "kept.npy")
    kept = BloomFilter.open(tmp_path / "kept.npy")
    bits = np.load(tmp_path / "kept.npy")
    assert bits.dtype.str == "<u8"
    assert hashlib.sha256(bits.tobytes()).hexdigest()[:16] == "de0c6800cc6a493a"
    assert [f"{h:016x}" for h in ngram_hashes(word_hashes(SHIP), 8)[:2]] == [
        "e879af318efb2030",
        "14430020ad8e6060",
    ]
    assert kept.contains(ngram_hashes(word_hashes(SEA), 8)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npy"]


def test_a_filter_with_a_changed_bit_is_rejected(tmp_path: Path) -> None:
    """numpy 2 reads a .npy file with changed bits, or with bytes after the array, silently."""
    path = tmp_path / "kept.npy"
    corpus_ngram_filter(lambda: [(0, SEA), (1, SHIP)]).save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-40] ^= 1
    for damaged in (
        b"",
        content[:20],
        content[: len(content) // 2],
        content[:-32],  # as an older version wrote it
        content + b"more",
        content.replace(b"<u8", b"<u4", 1),
        bytes(flipped),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"kept\.npy is damaged: its content has another SHA"):
            BloomFilter.open(path)


def test_split_words_returns_the_hashed_words() -> None:
    assert (
        split_words(SEA)
        == "the sea was calm and the sea was wide the sun went down at nine".split()
    )
    assert split_words("Über 中文, x2—y") == ["über", "中", "文", "x2", "y"]
    assert split_words(" . ") == split_words("") == []
    for document in list(read_documents("bundled"))[:3]:
        assert len(split_words(document.text)) == len(word_hashes(document.text))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "characters"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1 << 19])
def test_prepared_documents_are_decoded_in_chunks(
    tokenizer: str, chunk_tokens: int, tmp_path: Path
) -> None:
    texts = ["".join(random.Random(n).choices("ab é中\n😀", k=90)).strip() for n in range(30)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = {"bpe": 300, "bytes": None, "characters": None}[tokenizer]
    data = prepare(file, tmp_path / "out", tokenizer=tokenizer, vocab_size=size)
    found: set[str] = set()
    for split in ("train", "val"):
        stream = data.split(split)
        pieces = list(document_texts(stream, data.tokenizer(), chunk_tokens=chunk_tokens))
        whole = ["".join(t for n, t in pieces if n == k) for k in range(stream.n_documents)]
        assert [n for n, _ in pieces] == sorted(n for n, _ in pieces)
        for (_, words), text in zip([*word_hash_windows(enumerate(whole), 8)], whole, strict=True):
            assert words.tolist() == word_hashes(text).tolist()
        found.update(whole)
    assert found == set(texts)


@pytest.mark.parametrize("first", range(15))
@pytest.mark.parametrize("second", range(15))
def test_ngrams_cross_chunks_but_not_documents(first: int, second: int) -> None:
    words, cuts = SHIP.split(), [0, *sorted((first, second)), 14]
    pieces = [(0, " ".join(words[begin:end])) for begin, end in pairwise(cuts)]
    windows = word_hash_windows([*pieces, (1, SEA)], 8)
    assert [gram for _, w in windows for gram in ngram_hashes(w, 8).tolist()] == [
        *ngram_hashes(word_hashes(SHIP), 8).tolist(),
        *ngram_hashes(word_hashes(SEA), 8).tolist(),
    ]


def test_shares_equal_those_computed_by_hand() -> None:
    corpus = corpus_ngram_filter(lambda: [(0, f"Then {SEA} And then?"), (1, "nothing of it")])
    # 10 words of SEA and 4 others: 7 n-grams, of which the first 3 are in the corpus.
    half = " ".join([*split_words(SEA)[:10], "but", "nobody", "was", "there"])
    found = measure_overlap(
        [("whole", SEA.upper()), ("half", half), ("none", SHIP), ("short", "The sea was calm")],
        corpus,
    )
    assert [int(each.in_corpus.sum()) for each in found] == [8, 3, 0, 0]
    row = overlap_row(found)
    # SEA has 15 words and 8 n-grams; 3 of half's are these: 8 + 4 + 7 different ones in all.
    assert (row["ngrams"], row["in_corpus"], row["percent"]) == (19, 8, 42.105)
    assert (row["examples"], row["too_short"], row["without"]) == (4, 1, 1)
    assert row["median_percent"] == 42.857  # of 100, 3 of 7 and 0
    most = {"example": "whole", "ngrams": 8, "in_corpus": 8, "percent": 100.0}
    assert row["most"] == {**most, "begins": SEA.upper()}
    # The table of evaluation texts and the filter of the corpus count the same.
    overlaps = EvaluationNgrams.from_texts([("half", half)])
    assert overlaps.shares(overlaps.shared(word_hashes(SEA)))["half"] == {
        "ngrams": 7,
        "in_corpus": 3,
        "percent": 42.857,
    }


def test_texts_without_ngrams_have_no_share() -> None:
    corpus = corpus_ngram_filter(lambda: [(0, SEA)])
    row = overlap_row(
        measure_overlap([("empty", ""), ("seven", " ".join(split_words(SEA)[:7]))], corpus)
    )
    assert (row["examples"], row["too_short"], row["ngrams"]) == (2, 2, 0)
    assert row["percent"] is row["median_percent"] is row["most"] is None
    assert overlap_row([])["examples"] == 0
    nothing = corpus_ngram_filter(lambda: [(0, ""), (1, "too few words")])
    assert overlap_row(measure_overlap([("sea", SEA)], nothing))["percent"] == 0
    assert overlap_row(measure_overlap([("sea", SEA)], nothing))["most"] is None


def longest_by_brute_force(text: list[str], documents: list[list[str]]) -> tuple[int, int] | None:
    """Length of the longest match of 8 words or more, and the first document that has it."""
    best = None
    for number, document in enumerate(documents):
        for i in range(len(text)):
            for j in range(len(document)):
                k = 0
                while (
                    i + k < len(text) and j + k < len(document) and text[i + k] == document[j + k]
                ):
                    k += 1
                if k >= 8 and (best is None or k > best[0]):
                    best = (k, number)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_longest_matches_equal_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(overlap_module, "_WINDOW_WORDS", draw.choice([3, 10, 1 << 16]))

    def words(most: int) -> list[str]:  # of two words, so that everything repeats itself
        return [draw.choice("ab") for _ in range(draw.randint(0, most))]

    documents, texts = [words(100) for _ in range(5)], [words(40) for _ in range(4)]
    pieces = []
    for number, document in enumerate(documents):
        width = draw.randint(1, 50)
        starts = range(0, max(1, len(document)), width)
        pieces += [(number, " ".join(document[start : start + width])) for start in starts]
    for text, match in zip(
        texts, longest_matches([" ".join(text) for text in texts], pieces), strict=True
    ):
        expected = longest_by_brute_force(text, documents)
        assert (match and (match.n_words, match.document)) == expected
        if match is not None:
            copied = text[match.first_word : match.first_word + match.n_words]
            assert " ".join(copied) in " ".join(documents[match.document])


def test_copied_words_are_found_with_their_document() -> None:
    documents = [document.text for document in list(read_documents("bundled"))[:20]]
    copied = " ".join(split_words(documents[13])[500:560])
    texts = [f"Xyzzy {copied}. Xyzzy", " ".join(copied.split()[:7]), ""]
    found = longest_matches(texts, enumerate(documents))
    assert found == [Match(60, 1, 13), None, None]
    assert longest_matches([], enumerate(documents)) == []


def test_match_does_not_cross_texts() -> None:
    words = split_words(SHIP)
    first, second = " ".join(words[:8]), " ".join(words[1:9])  # the second continues the first
    assert longest_matches([first, second], [(0, SHIP)]) == [Match(8, 0, 0)] * 2


def test_evaluation_overlap_equals_brute_force() -> None:
    draw = random.Random(7)
    shared = prose(draw, 40)
    evaluation = {name: prose(draw, 300) + shared for name in ("a", "b")}
    overlaps = EvaluationNgrams.from_texts(
        (name, " ".join(words)) for name, words in evaluation.items()
    )
    document = prose(draw, 200) + shared[5:30] + prose(draw, 100)

    def grams(words: list[str]) -> set[tuple[str, ...]]:
        plain = [word.strip(".").lower() for word in words]
        return set(zip(*(plain[k:] for k in range(8)), strict=False))

    words = word_hashes(" ".join(document))
    for name, rate in overlaps.shares(overlaps.shared(words)).items():
        assert rate["ngrams"] == len(grams(evaluation[name]))
        assert rate["in_corpus"] == len(grams(evaluation[name]) & grams(document)) > 17
    assert overlaps.shares_long_phrase(words)
    assert not overlaps.shares_long_phrase(word_hashes(" ".join(shared[:12])))
    assert overlaps.shares_long_phrase(word_hashes(" ".join(shared[:13])))
