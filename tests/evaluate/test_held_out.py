"""Where bits/byte of a held-out text would mislead, a sentence says so, and only there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pretrain.data.preparation import prepare
from pretrain.evaluate import held_out
from pretrain.evaluate.held_out import compare_splits


def text_of(words: str, *, n: int, seed: int) -> str:
    """Sentences of these words, each word about half as frequent as the one before."""
    rng, choices = random.Random(seed), words.split()
    weights = [1 / (1 + rank) for rank in range(len(choices))]
    lines = (" ".join(rng.choices(choices, weights, k=12)) for _ in range(n))
    return ".\n".join(lines)


ENGLISH = (
    "the of and to in that was he she with his her for as had you not be at on by which have or "
    "from this him but all said were when there been would they their one so an who what if out "
    "up into time little some could them very no than like then now made great before house such"
)
GERMAN = (
    "der die und in den von zu das mit sich des auf nicht ein eine auch es an werden aus er "
    "hat dass nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
    "aber zur bis mehr durch man sein wurde sei wenn schon ihr ihre ich wieder können"
)


def notes(tmp_path: Path, text: str, tokenizer: str = "bytes") -> list[str]:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    size = 400 if tokenizer == "bpe" else None
    data = prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer=tokenizer, vocab_size=size)
    shown: list[str] = compare_splits(data)["notes"]
    return shown


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize(
    "text",
    [
        "hello " * 10_000,
        "the same line again\n" * 2000,
        text_of(ENGLISH, n=200, seed=1) * 2,
        text_of(ENGLISH, n=200, seed=1) * 10,
    ],
    ids=["a word", "a line", "a text twice", "a text ten times"],
)
def test_a_held_out_text_that_is_also_trained_on_is_remembered(
    tmp_path: Path, text: str, tokenizer: str
) -> None:
    (note,) = notes(tmp_path, text, tokenizer)
    assert note.startswith(("99 % of the", "100 % of the", "98 % of the"))
    assert "stands word for word in the training text" in note
    assert "says how well that is remembered" in note


def test_the_share_is_of_the_held_out_text(tmp_path: Path) -> None:
    text = text_of(ENGLISH, n=900, seed=1)
    copy = text[:2000]
    (note,) = notes(tmp_path, text + copy)
    percent = int(note.split(" %")[0])
    assert percent == pytest.approx(100 * 2000 / 6000, abs=2)  # 6,000 bytes are held out


@pytest.mark.parametrize("n_german", [90, 900], ids=["only its end", "half of it"])
def test_a_text_that_ends_in_another_language_is_reported(tmp_path: Path, n_german: int) -> None:
    text = text_of(ENGLISH, n=900, seed=1) + text_of(GERMAN, n=n_german, seed=2)
    (note,) = notes(tmp_path, text)
    assert "of another kind (language?) than most" in note


def test_two_languages_in_two_files_are_both_held_out(tmp_path: Path) -> None:
    for name, words in (("en.txt", ENGLISH), ("de.txt", GERMAN)):
        (tmp_path / name).write_text(text_of(words, n=900, seed=1), encoding="utf-8")
    data = prepare([tmp_path / "en.txt", tmp_path / "de.txt"], tmp_path / "out", tokenizer="bytes")
    assert compare_splits(data)["notes"] == []


@pytest.mark.parametrize("n", [300, 3000])
def test_a_usual_text_has_no_note(tmp_path: Path, n: int) -> None:
    assert notes(tmp_path, text_of(ENGLISH, n=n, seed=3)) == []


@pytest.mark.parametrize(("n_bytes", "held"), [(200, "only 4"), (1000, "only 20")])
def test_few_held_out_bytes_are_reported(tmp_path: Path, n_bytes: int, held: str) -> None:
    (note,) = notes(tmp_path, text_of(ENGLISH, n=50, seed=1)[:n_bytes])
    assert note.startswith(held)
    assert note.endswith("too few; use more text")


def test_of_a_long_text_the_last_tokens_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "MAX_TOKENS", 20_000)
    monkeypatch.setattr(held_out, "CHUNK_TOKENS", 7_000)
    (note,) = notes(tmp_path, text_of(ENGLISH, n=100, seed=1) * 10)
    assert note.startswith("at least 100 %")
