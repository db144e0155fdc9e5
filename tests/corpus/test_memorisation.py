"""What of a text is in the training text: filter, shares and stretches held to sets, to brute force
and to numbers that are worked out by hand."""

from __future__ import annotations

import hashlib
import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.cli import main
from pretrain.corpus import overlap as overlap_module
from pretrain.corpus import read_documents
from pretrain.corpus.bloom import BloomFilter
from pretrain.corpus.overlap import (
    EvaluationNgrams,
    Match,
    TextOverlap,
    corpus_ngram_filter,
    longest_matches,
    measure_overlap,
)
from pretrain.corpus.words import ngram_hashes, split_words, word_hash_windows, word_hashes
from pretrain.data import PreparedData, open_prepared, prepare
from pretrain.evaluate import overlap as memorisation
from pretrain.evaluate.documents import document_texts
from pretrain.evaluate.overlap import (
    CONTINUATIONS,
    PROMPT_TOKENS,
    WRITTEN_TOKENS,
    _held_out_places,
    row_of,
    score_without,
)
from pretrain.report import write_report
from pretrain.rng import splitmix64
from tiny import TINY

SEA = "The sea was calm, and the SEA was wide; the sun went down at nine."  # 15 words, 8 n-grams
SHIP = "one old ship came home from the south with forty tired men on deck"  # 14 words, 7 n-grams


# --- the filter


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_what_was_put_in_is_always_found(first: list[int], second: list[int]) -> None:
    corpus = BloomFilter.with_capacity(1)  # far too small: never a miss, however full
    for part in (first, second):
        corpus.add(np.array(part, np.uint64))
    assert corpus.contains(np.array(first + second, np.uint64)).all()


def test_what_was_not_in_corpus_as_rarely_as_was_asked() -> None:
    n, n_others, rate = 100_000, 1_000_000, 1e-3
    corpus = BloomFilter.with_capacity(n, false_positives=rate)
    hashes = splitmix64(np.arange(n + n_others, dtype=np.uint64))
    corpus.add(hashes[:n])
    assert corpus.contains(hashes[:n]).all()
    found = int(corpus.contains(hashes[n:]).sum())
    assert abs(found - rate * n_others) < 5 * math.sqrt(rate * n_others)
    assert corpus.false_positives == pytest.approx(rate, rel=0.02)
    # The bits of a hash at the paper's rate: 16 / -ln(1 - 10^(-8/16)).
    assert BloomFilter.with_capacity(n).n_bytes * 8 / n == pytest.approx(42.09, abs=0.01)
    with pytest.raises(ValueError, match="false_positives must be between 0 and 1, not 0"):
        BloomFilter.with_capacity(n, false_positives=0)


def test_a_filter_is_the_same_bits_everywhere_and_after_it_was_kept(tmp_path: Path) -> None:
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


# --- words, and documents in pieces


def test_words_are_what_is_hashed() -> None:
    assert (
        split_words(SEA)
        == "the sea was calm and the sea was wide the sun went down at nine".split()
    )
    assert split_words("Über 中文, x2—y") == ["über", "中", "文", "x2", "y"]
    assert split_words(" . ") == split_words("") == []
    for document in list(read_documents("bundled"))[:3]:
        assert len(split_words(document.text)) == len(word_hashes(document.text))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "characters"])
@pytest.mark.parametrize("piece_tokens", [1, 7, 1 << 19])
def test_a_document_is_decoded_as_it_was(tokenizer: str, piece_tokens: int, tmp_path: Path) -> None:
    texts = ["".join(random.Random(n).choices("ab é中\n😀", k=90)).strip() for n in range(30)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = {"bpe": 300, "bytes": None, "characters": None}[tokenizer]
    data = prepare(file, tmp_path / "out", tokenizer=tokenizer, vocab_size=size)
    found: set[str] = set()
    for split in ("train", "val"):
        stream = data.split(split)
        pieces = list(document_texts(stream, data.tokenizer(), piece_tokens=piece_tokens))
        whole = ["".join(t for n, t in pieces if n == k) for k in range(stream.n_documents)]
        assert [n for n, _ in pieces] == sorted(n for n, _ in pieces)
        for (_, words), text in zip([*word_hash_windows(enumerate(whole), 8)], whole, strict=True):
            assert words.tolist() == word_hashes(text).tolist()
        found.update(whole)
    assert found == set(texts)


@pytest.mark.parametrize("first", range(15))
@pytest.mark.parametrize("second", range(15))
def test_n_grams_go_on_from_piece_to_piece_and_not_from_document_to_document(
    first: int, second: int
) -> None:
    words, cuts = SHIP.split(), [0, *sorted((first, second)), 14]
    pieces = [(0, " ".join(words[begin:end])) for begin, end in pairwise(cuts)]
    windows = word_hash_windows([*pieces, (1, SEA)], 8)
    assert [gram for _, w in windows for gram in ngram_hashes(w, 8).tolist()] == [
        *ngram_hashes(word_hashes(SHIP), 8).tolist(),
        *ngram_hashes(word_hashes(SEA), 8).tolist(),
    ]


# --- shares


def test_shares_are_those_worked_out_by_hand() -> None:
    corpus = corpus_ngram_filter(lambda: [(0, f"Then {SEA} And then?"), (1, "nothing of it")])
    # 10 words of SEA and 4 others: 7 n-grams, of which the first 3 are in the corpus.
    half = " ".join([*split_words(SEA)[:10], "but", "nobody", "was", "there"])
    found = measure_overlap(
        [("whole", SEA.upper()), ("half", half), ("none", SHIP), ("short", "The sea was calm")],
        corpus,
    )
    assert [int(each.in_corpus.sum()) for each in found] == [8, 3, 0, 0]
    row = row_of(found)
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


def test_where_there_is_nothing_to_compare_it_is_said() -> None:
    corpus = corpus_ngram_filter(lambda: [(0, SEA)])
    row = row_of(
        measure_overlap([("empty", ""), ("seven", " ".join(split_words(SEA)[:7]))], corpus)
    )
    assert (row["examples"], row["too_short"], row["ngrams"]) == (2, 2, 0)
    assert row["percent"] is row["median_percent"] is row["most"] is None
    assert row_of([])["examples"] == 0
    nothing = corpus_ngram_filter(lambda: [(0, ""), (1, "too few words")])
    assert row_of(measure_overlap([("sea", SEA)], nothing))["percent"] == 0
    assert row_of(measure_overlap([("sea", SEA)], nothing))["most"] is None


def test_a_metric_without_the_examples_that_were_seen() -> None:
    def example(*flags: bool) -> TextOverlap:
        return TextOverlap("", "", np.arange(len(flags), dtype=np.uint64), np.array(flags, bool))

    right = np.array([[1, 1], [1, 1], [0, 1], [1, 1]], float)
    found = [example(False), example(True, False), example(False, False), example()]
    score = score_without("accuracy", right, found)
    assert (score["value"], score["examples_without"]) == (0.75, 3)
    assert score["value_without"] == pytest.approx(2 / 3)
    assert score_without("accuracy", right[:1], [example(True)])["value_without"] is None


# --- stretches


def by_brute_force(text: list[str], documents: list[list[str]]) -> tuple[int, int] | None:
    """Length of the longest stretch of 8 words or more, and the first document that has it."""
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
def test_stretches_are_what_brute_force_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for text, stretch in zip(
        texts, longest_matches([" ".join(text) for text in texts], pieces), strict=True
    ):
        expected = by_brute_force(text, documents)
        assert (stretch and (stretch.n_words, stretch.document)) == expected
        if stretch is not None:
            copied = text[stretch.first_word : stretch.first_word + stretch.n_words]
            assert " ".join(copied) in " ".join(documents[stretch.document])


def test_a_copy_in_corpus_with_its_length_and_its_document() -> None:
    documents = [document.text for document in list(read_documents("bundled"))[:20]]
    copied = " ".join(split_words(documents[13])[500:560])
    texts = [f"Xyzzy {copied}. Xyzzy", " ".join(copied.split()[:7]), ""]
    found = longest_matches(texts, enumerate(documents))
    assert found == [Match(60, 1, 13), None, None]
    assert longest_matches([], enumerate(documents)) == []


def test_a_stretch_ends_with_its_text() -> None:
    words = split_words(SHIP)
    first, second = " ".join(words[:8]), " ".join(words[1:9])  # the second goes on from the first
    assert longest_matches([first, second], [(0, SHIP)]) == [Match(8, 0, 0)] * 2


def held_out(folder: Path, texts: list[str]) -> PreparedData:
    file = folder / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(file, folder / "out", tokenizer="bytes", val_fraction=0.4)


def test_places_lie_in_one_document_and_a_prompt_is_followed_by_text(tmp_path: Path) -> None:
    texts = [chr(97 + n % 26) * (n * n + 1) for n in range(40)]
    data = held_out(tmp_path, texts)
    stream, tokenizer = data.split("val"), data.tokenizer()
    places = _held_out_places(stream)
    assert 10 < len(places) <= CONTINUATIONS
    for begin, middle, end in places:
        assert begin <= middle < end <= middle + WRITTEN_TOKENS
        assert middle - begin <= PROMPT_TOKENS
        assert len(set(tokenizer.decode(stream.read(begin, end)))) == 1
        assert tokenizer.end_of_text not in stream.read(begin, end)
    assert max(end - begin for begin, _, end in places) == PROMPT_TOKENS + WRITTEN_TOKENS


# --- the command


@pytest.fixture(scope="module")
def own_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a step on a text of its own, which tests may move."""
    folder = tmp_path_factory.mktemp("memorisation")
    # Not that of other tests' runs in another file: whichever lies in the cache would be found.
    lines = corpus.read_bytes().splitlines(keepends=True)
    (folder / "text.jsonl").write_bytes(b"".join(reversed(lines)))
    words = ["train", str(folder / "text.jsonl"), "--run", str(folder / "run"), *TINY]
    assert main([*words, "--train.steps", "1"]) == 0
    return folder / "run"


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:  # as many as it takes, not as it usually does
        patched.setattr(memorisation, "CONTINUATIONS", 3)
        return _asked(capsys, *words)


def _asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert main(["evaluate", *words, "--device", "cpu", "--overlap", "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_evaluate_makes_both_tables(
    own_run: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = next(
        found
        for found in map(open_prepared, (cache / "prepared").glob("*"))
        if found.split("train").sha256
        == json.loads((own_run / "environment.json").read_text())["fingerprint"]["training text"]
    )
    texts = [text for _, text in document_texts(data.split("train"), data.tokenizer())]
    copied = split_words(texts[5])[40:70]
    # What the model wrote at a step is a copy of 30 words of the training text.
    with open(own_run / "samples.jsonl", "a") as file:
        said = "Xyzzy " + " ".join(copied)
        file.write(json.dumps({"step": 1, "prompt": "Xyzzy", "text": said}) + "\n")
    records = [
        {"context": " ".join(copied[:10]), "continuation": "xyzzy xyzzy"},  # 3 n-grams of 5
        {"context": "qq ww ee rr tt yy uu", "continuation": "ii oo"},  # none of 2
        {"context": "We, the", "continuation": "people"},  # too short
    ]
    mine, plain = tmp_path / "mine.jsonl", tmp_path / "plain.txt"
    mine.write_text("".join(json.dumps(record) + "\n" for record in records))
    plain.write_text("Xyzzy.")
    words = [str(own_run), "--task-file", str(mine), "--text", str(plain)]
    found, said = asked(capsys, *words, "--shots", "1")
    assert "reading" in said
    overlap = found["overlap"]
    assert json.loads((own_run / "overlap.json").read_text()) == overlap
    assert overlap["training_text"]["documents"] == len(texts)
    assert overlap["filter"]["false_positives"] < 1.05e-8

    row = overlap["sets"][str(mine)]  # the shots are not of the example
    assert (row["ngrams"], row["in_corpus"], row["percent"]) == (7, 3, 42.857)
    assert (row["examples"], row["too_short"], row["without"]) == (3, 1, 1)
    assert (row["most"]["example"], row["most"]["percent"]) == ("example 0", 60.0)
    assert (row["score"]["metric"], row["score"]["examples_without"]) == ("accuracy", 2)
    assert row["score"]["value"] == found["tasks"][str(mine)]["value"]
    assert f"{mine}: 42.86 % of 7; 1 of 2 texts have none, 1 more are shorter" in said
    assert f"{plain}: nothing to compare: 1 texts of fewer than 8 words" in said
    assert overlap["sets"]["held-out split"]["examples"] == data.split("val").n_documents

    sample, written, there = overlap["writing"].values()
    origins = dict(data.split("train").origins(lambda number, _: number == 5))
    assert (sample["longest"]["words"], sample["longest"]["text"]) == (30, " ".join(copied))
    assert sample["longest"]["document"]["id"] == origins[5].id
    assert sample["in_corpus"] == 23
    assert f"30 words in a row are in {origins[5].id}" in said
    assert written["examples"] == there["examples"] == 3

    page = (own_run / "report.html").read_text(encoding="utf-8")
    assert page.count("In training text") == 2
    assert " ".join(copied) in page
    assert "42.86 %" in page
    assert "reading" not in asked(capsys, *words)[1]  # the filter is kept


def test_a_text_that_moved_is_still_compared_with_and_another_is_not(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = own_run.parent / "text.jsonl"
    before, _ = asked(capsys, str(own_run))
    aside = text.rename(text.with_name("moved.jsonl"))
    after, _ = asked(capsys, str(own_run))
    assert after == before
    text.write_bytes(aside.read_bytes().replace(b"the", b"then"))
    assert main(["evaluate", str(own_run), "--overlap"]) == 2
    assert "has changed since the run" in capsys.readouterr().err
    text.unlink()
    aside.rename(text)


def test_a_model_of_somebody_else_has_no_training_text(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(own_run), "--format", "hf", "--out", str(tmp_path / "theirs")]
    assert main(["export", *words]) in (0, 2)  # without transformers it is not verified
    text = tmp_path / "t.txt"
    text.write_text(SEA)
    capsys.readouterr()
    words = ["evaluate", str(tmp_path / "theirs"), "--text", str(text), "--overlap"]
    assert main(words) == 2
    assert "was not trained here, so there is no training text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"sets": 3, "writing": {"a": null}}',
        '{"sets": {"<script>": {"percent": "x", "most": 4, "score": [], "longest": "<b>"}}}',
        '{"writing": {"w": {"longest": {"document": 3, "text": "<script>", "words": null}}}}',
    ],
)
def test_a_report_shows_whatever_the_tables_hold(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 4.5}\n')
    assert "In training text" not in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "overlap.json").write_text(content)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "4.5" in page
    assert "<script" not in page
    assert "<b>" not in page.partition("What it has seen before")[2].partition("</section>")[0]
