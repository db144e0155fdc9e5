"""Exact and near-duplicates: MinHash, connected components, and which document is kept."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from preparing import kept_ids, prepare_texts, removed_ids
from pretrain.corpus import duplicates
from pretrain.corpus.duplicates import (
    DUPLICATE_PAIR,
    HASH_RECORD,
    band_hashes,
    component_roots,
    duplicate_pairs,
    write_records,
)
from texts import prose, replace_words


@pytest.mark.parametrize(("share", "low", "high"), [(0.02, 0.95, 1.0), (0.25, 0.0, 0.1)])
def test_near_duplicates_are_detected_at_the_rate_of_the_formula(
    share: float, low: float, high: float
) -> None:
    draw = random.Random(1)
    found = n = 0
    expected = 0.0
    for _ in range(120):
        words = prose(draw, 300)
        other = replace_words(draw, words, share)
        sets = [set(zip(*(w[k:] for k in range(5)), strict=False)) for w in (words, other)]
        same = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        expected += 1 - (1 - same**8) ** 14
        bands = band_hashes(" ".join(words)), band_hashes(" ".join(other))
        found += bool(np.intersect1d(*bands).size)
        n += 1
    assert low <= found / n <= high
    # Half a dozen standard errors of 120 draws.
    assert abs(found - expected) < 6 * max(1.0, (expected * (1 - expected / n)) ** 0.5)


def brute_force(hashes: list[set[int]]) -> list[int]:
    """The first document of each connected component."""
    first = list(range(len(hashes)))
    for left, right in combinations(range(len(hashes)), 2):
        if hashes[left] & hashes[right]:
            low, high = sorted((first[left], first[right]))
            first = [low if each == high else each for each in first]
    return first


@pytest.mark.parametrize("seed", range(12))
def test_components_equal_brute_force(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "RECORDS_AT_ONCE", 7)  # so that all that spills does
    draw = random.Random(seed)
    n = draw.randint(1, 60)
    hashes = [{draw.randrange(200) * 2**56 for _ in range(draw.randint(0, 4))} for _ in range(n)]
    files, first = [], 0
    while first < n:
        count = min(draw.randint(1, 20), n - first)
        rows = [(h, 0, d) for d in range(count) for h in hashes[first + d]]
        path = tmp_path / f"{first}.npy"
        write_records(path, np.array(rows, HASH_RECORD))
        files.append((path, first))
        first += count
    n_ranges = draw.randint(1, 5)
    pairs = [
        p
        for index in range(n_ranges)
        for p in duplicate_pairs(files, index=index, n_ranges=n_ranges)
    ]
    assert all(p.dtype == DUPLICATE_PAIR for p in pairs)
    roots = component_roots(pairs, n_documents=n, scratch=tmp_path / "roots.npy")
    assert roots.tolist() == brute_force(hashes)


def test_first_of_equal_documents_is_kept(tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = [" ".join(prose(draw, 60)) for _ in range(50)]
    texts = [*texts, texts[3], *texts[10:20], "  " + texts[4], texts[3]]
    data, report = prepare_texts(tmp_path, texts)
    assert kept_ids(data) == {*range(50), 61}
    assert report["removed"] == {"duplicate: equal to an earlier document": 12}
    assert report["n_documents"] == 63
    assert report["n_kept_documents"] == 51
    assert set(removed_ids(data)) == {50, *range(51, 61), 62}
    data, report = prepare_texts(tmp_path, texts, deduplicate="none")
    assert kept_ids(data) == set(range(63))
    assert report["removed"] == {}


def test_first_of_near_duplicates_is_kept(tmp_path: Path) -> None:
    draw = random.Random(3)
    originals = [prose(draw, 200) for _ in range(40)]
    texts = [" ".join(words) for words in originals]
    texts += [" ".join(replace_words(draw, words, 0.01)) for words in originals[:20]]
    texts += [texts[0], "", "one two", "one, two!"]
    data, report = prepare_texts(tmp_path, texts, deduplicate="near")
    assert kept_ids(data) == {*range(40), 62}
    n_equal = len(texts) - len(set(texts))
    assert 1 <= n_equal < 10
    assert report["removed"] == {
        "duplicate: nearly equal to an earlier document": 22 - n_equal,
        "duplicate: equal to an earlier document": n_equal,
    }
