"""Texts that tests make: random English-like prose, random Unicode, and a SentencePiece model."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = (
    "the of and a to in he was that it his her with as had for she not at but on they you be is all"
    " from this have by one which so or were there said their when we an no would them been more"
    " him who if will what out up some into could then my very time now than any like see has over"
    " only other such good man made old little house long great new morning water road garden"
).split()


def prose(draw: random.Random, n_words: int) -> list[str]:
    """Random words in sentences of eight, which pass the quality rules."""
    words = [draw.choice(VOCABULARY) + draw.choice(["", "", "er", "ing"]) for _ in range(n_words)]
    for place in range(7, n_words, 8):
        words[place] += "."
    return words


def replace_words(draw: random.Random, words: list[str], share: float) -> list[str]:
    """Replace about this share of the words by others."""
    return [draw.choice("abcdefgh") * 5 if draw.random() < share else word for word in words]


ODD_WORDS = [
    *"The whale's 1234567 don't\tEND\n\n été 中文字 ﷽ xx  \r\n _-+=".split(" "),
    "\u200b\u00a0a\u0301",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
]


def random_unicode_text(draw: random.Random) -> str:
    """Random words, spaces of all kinds, numbers, and characters of several scripts."""
    blocks = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x3040, 0x30FF), (0x4E00, 0x9FA5)]
    blocks += [(0x1F300, 0x1F64F), (0x2000, 0x206F), (0x600, 0x6FF), (0x900, 0x97F)]
    blocks += [(0xAC00, 0xD7A3)]
    spaces = [" ", "\n", "\t", "\r\n", "\u00a0", "  ", "\u2028", "\x85"]
    parts = []
    for _ in range(draw.randint(1, 12)):
        match draw.randrange(4):
            case 0:
                parts.append(draw.choice(ODD_WORDS))
            case 1:
                parts.append(draw.choice(spaces))
            case 2:
                low, high = draw.choice(blocks)
                parts.append("".join(chr(draw.randint(low, high)) for _ in range(4)))
            case _:
                parts.append(str(draw.randrange(10**9)))
    return "".join(parts)


LLAMA_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 600,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.999,
    "num_threads": 1,
    "minloglevel": 2,
}
"""The options with which the tokenizers of Llama 1 and 2 were trained, with a small vocabulary."""


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """Train a SentencePiece model on random prose, by default with Llama's options."""
    sentencepiece = pytest.importorskip("sentencepiece")
    draw = random.Random(0)
    texts = [" ".join(prose(draw, 40)) + " of the house  été 中文 12345\t" for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **LLAMA_OPTIONS | options
    )
    path.write_bytes(model.getvalue())
    return path
