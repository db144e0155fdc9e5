"""Tokenizers: no text is lost, ids equal the library's on full texts, wrong files are rejected."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.corpus.reading import read_documents
from pretrain.tokenizer import train
from pretrain.tokenizer.byte_level import Split, pre_tokenizer
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.encode import split_text
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer, inspect
from pretrain.tokenizer.train import default_vocab_size, train_tokenizer

NASTY = [
    "",
    " ",
    "\n\n  \n",
    "don't we'll I'M",
    "<|endoftext|> in the text<|endoftext|>",
    "\x00\x1c\x85\u2028\u180e\u3000",
    "naïve 数学 🤷🏽‍♀️ שלום",
    "a  b   c \t d\r\n",
]


@cache
def english() -> tuple[str, ...]:
    return tuple(document.text for document in list(read_documents("bundled"))[:12])


@cache
def bpe() -> Tokenizer:
    return train_tokenizer(english(), name="bpe", vocab_size=700)


@cache
def library_of(tokenizer_json: bytes) -> Any:
    library = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    library.encode_special_tokens = True
    return library


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode the full text at once with the library `tokenizers`."""
    library = library_of(tokenizer._canonical)
    ids: list[int] = library.encode(text, add_special_tokens=False).ids
    return ids


# Letters, digits, punctuation and every kind of space, so that each rule of the split is met.
TEXT = st.text(
    st.one_of(
        st.sampled_from(
            list("ab'stdrelvm19.,!-<|>  \n\n\t\r") + list("\x1c\x1f\x85\xa0\u2028\u180e\u200b")
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(TEXT)
def test_encode_equals_library_and_decodes_back(text: str) -> None:
    tokenizer = bpe()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == library_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


@settings(max_examples=400, deadline=None)
@given(TEXT, st.integers(12, 40))
def test_chunks_encode_like_the_full_text(text: str, limit: int) -> None:
    cut = list(split_text(text, limit=limit))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= limit for piece in cut)
    # Blind cuts aside: the limit is tiny here, so a long run of one kind may have no safe place.
    if all(not left[-1].isspace() and right[0] == " " for left, right in pairwise(cut)):
        tokenizer = bpe()
        joined = [id_ for piece in cut for id_ in library_ids(tokenizer, piece)]
        assert joined == library_ids(tokenizer, text)


def test_ordinary_text_is_split_at_spaces_only() -> None:
    text = english()[0]
    cut = list(split_text(text, limit=500))
    assert len(cut) > 10
    assert all(piece.startswith(" ") for piece in cut[1:])
    tokenizer = bpe()
    assert [i for piece in cut for i in library_ids(tokenizer, piece)] == library_ids(
        tokenizer, text
    )


@pytest.mark.parametrize("name", ["bpe", "characters", "bytes"])
def test_all_kinds_encode_nasty_strings(name: str, tmp_path: Path) -> None:
    size = 300 if name == "bpe" else None
    tokenizer = train_tokenizer([*english()[:2], *NASTY], name=name, vocab_size=size)
    assert tokenizer.kind == name
    assert tokenizer.end_of_text == 0
    assert tokenizer.token_bytes(0) == b""
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.sha256) == (name, tokenizer.sha256)
    assert (tmp_path / "tokenizer.json").read_bytes() == loaded._canonical
    for text in NASTY:
        ids = loaded.encode(text)
        assert ids.tolist() == library_ids(tokenizer, text)
        assert 0 not in ids
        assert loaded.decode(ids) == text
        assert int(loaded.byte_lengths[ids].sum()) == len(text.encode())


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    first = train_tokenizer(english(), vocab_size=600)
    assert train_tokenizer(list(english()), vocab_size=600).sha256 == first.sha256
    assert train_tokenizer(reversed(english()), vocab_size=600).sha256 == first.sha256
    assert train_tokenizer(english()[1:], vocab_size=600).sha256 != first.sha256


def test_sample_is_bounded() -> None:
    texts = english()
    sample, n_bytes = train.sample_text(texts, 60_000)
    assert n_bytes == sum(len(text.encode()) for text in texts)
    assert 0 < sum(map(len, sample)) <= 60_000
    assert sorted(train.sample_text(reversed(texts), 60_000)[0]) == sorted(sample)


@pytest.mark.parametrize("split", ["gpt2", "cl100k", "o200k", "llama3"])
def test_training_with_each_pre_tokenizer(split: Split, tmp_path: Path) -> None:
    text = " ".join(english()) + " 1234567 12 don't DON'T \n\n x" * 50
    tokenizer = train_tokenizer([text], vocab_size=900, split=split)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 900
    for nasty in NASTY:
        assert loaded.decode(loaded.encode(nasty)) == nasty
        assert loaded.encode(nasty).tolist() == library_ids(tokenizer, nasty)
    # GPT-2 keeps a number whole, the others cut it after three digits.
    assert len(pre_tokenizer(split).pre_tokenize_str("1234567")) == (1 if split == "gpt2" else 3)
    parts = [part for part, _ in pre_tokenizer(split).pre_tokenize_str("I'LL 12345")]
    assert len(parts) == {"gpt2": 4, "cl100k": 5, "o200k": 4, "llama3": 5}[split]


def test_fast_trainer_gives_the_same_merges_on_english(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gigatoken")
    plain = train_tokenizer(english(), vocab_size=3000)
    assert train_tokenizer(english(), vocab_size=3000, fast=True).sha256 == plain.sha256
    assert capfd.readouterr() == ("", "")  # though the library prints
    with pytest.raises(ValueError, match="supports only the split gpt2, not llama3"):
        train_tokenizer(english(), vocab_size=3000, fast=True, split="llama3")


@pytest.mark.parametrize("vocab_size", [None, 260])
@pytest.mark.parametrize(
    "text", ["0000 0000 0000\n" * 10, "haha haha hahaha" * 9, "-----" * 9, "", "a b"]
)
def test_fast_trainer_equals_the_other_where_pairs_run_out(
    text: str, vocab_size: int | None
) -> None:
    """There gigatoken 0.10 repeats merges and adds some that the text does not contain."""
    pytest.importorskip("gigatoken")
    text = text or english()[0][:500]
    found = []
    for fast in (False, True):
        try:
            found.append(train_tokenizer([text], vocab_size=vocab_size, fast=fast).sha256)
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_training_logs_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNA without spaces takes minutes."""
    monkeypatch.setattr(train, "LOG_SECONDS", 0.01)
    draw = random.Random(1)
    lines: list[str] = []
    text = "".join(draw.choices("ACGT", k=60_000))
    train_tokenizer([text], vocab_size=280, log=lines.append)
    assert lines[0] == "training a tokenizer on 0.1 MB of text, 0 s"


def test_inspection_counts_tokens() -> None:
    texts = ["the cat sat on the mat " * 50 + "-" * 64 + "\u4e2d" * 9]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    report = inspect(tokenizer, [("a", "the cat " * 200), ("b", "zz" * 30), ("a", "the")])
    ids = tokenizer.encode("the cat " * 200).tolist() + tokenizer.encode("the").tolist()
    assert report["sources"]["a"]["tokens"] == len(ids)
    assert report["sources"]["b"] == {"bytes": 60, "tokens": 60, "bytes_per_token": 1.0}
    used = {*ids, *tokenizer.encode("z").tolist()}
    assert report["n_unused"] == tokenizer.vocab_size - 1 - len(used)  # end-of-text has no text
    assert report["longest"][0]["bytes"] == max(tokenizer.byte_lengths)
    assert any(set(entry["text"]) == {"-"} for entry in report["strangest"])
    assert report["n_rare"] == sum(ids.count(i) < 100 for i in set(ids)) + 1


@pytest.mark.parametrize(
    ("n_bytes", "size"),
    [
        (0, 512),
        (5_000, 512),
        (1_000_000, 1024),
        (1_115_394, 1024),
        (11_972_889, 4096),
        (50_000_000, 8192),
        (10**12, 8192),
    ],
)
def test_default_vocab_size(n_bytes: int, size: int) -> None:
    assert default_vocab_size(n_bytes) == size


def test_a_small_text_gets_single_bytes() -> None:
    text = english()[0]
    small, large = (train_tokenizer([text[:60] * n]) for n in (1600, 1700))
    assert (small.vocab_size, large.vocab_size > 257) == (257, True)
    pieces = [small.token_bytes(id_) for id_ in small.encode(text).tolist()]
    assert pieces == [bytes([byte]) for byte in text.encode()]


@pytest.mark.parametrize("name", ["bpe", "gpt"])
def test_a_text_with_few_pairs_gets_a_smaller_vocabulary(name: str) -> None:
    log: list[str] = []
    tokenizer = train_tokenizer(["abcdef"], name=name, vocab_size=400, log=log.append)
    size = tokenizer.vocab_size
    assert size == (262 if name == "bpe" else 14)
    assert log == [f"vocabulary {size}, not 400: no more pairs to merge"]
    assert tokenizer.decode(tokenizer.encode("abcdef")) == "abcdef"


def test_impossible_vocab_sizes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"is 256; it must be at least 257"):
        train_tokenizer(["abc"], vocab_size=256)
    assert train_tokenizer(["abcdef"], vocab_size=262).vocab_size == 262
    assert train_tokenizer(["abcdef"]).vocab_size == 257
    with pytest.raises(ValueError, match="it must be 257"):
        train_tokenizer(["abc"], name="bytes", vocab_size=300)
    with pytest.raises(ValueError, match="must be 4, not 5: this text has 3 characters"):
        train_tokenizer(["abc"], name="characters", vocab_size=5)
    with pytest.raises(ValueError, match=r"must be one of bpe, gpt, .*, not 'wordpiece'"):
        train_tokenizer(["abc"], name="wordpiece")
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([""])
    with pytest.raises(ValueError, match="it must be at least 257"):
        TokenizerConfig(vocab_size=10)


def test_unknown_character_is_named() -> None:
    tokenizer = train_tokenizer(["abc\n"], name="characters")
    assert tokenizer.vocab_size == 5
    for character, code in (("é", "U+00E9"), ("\U0001f600", "U+1F600")):
        with pytest.raises(ValueError, match=code.replace("+", r"\+")):
            tokenizer.encode("ab" + character)


def test_lone_surrogates_become_the_replacement_character() -> None:
    for name in ("bpe", "bytes", "characters"):
        tokenizer = train_tokenizer(["a\ud800b"], name=name)
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("a\udfffb")) == "a\ufffdb"


def test_decode_rejects_unknown_ids() -> None:
    for id_ in (-1, bpe().vocab_size):
        with pytest.raises(ValueError, match=f"token id {id_} must be between 0 and 699"):
            bpe().decode([5, id_])


def test_long_texts_take_linear_time() -> None:
    start = time.process_time()
    for text in ("a" * 1_000_000, " " * 1_000_000, "ab" * 500_000, "字" * 300_000):
        assert bpe().decode(bpe().encode(text)) == text
    assert time.process_time() - start < 60


def cut_first(kind: str, **options: str) -> dict[str, Any]:
    """A pre-tokenizer of that kind before the byte-level one."""
    byte_level = json.loads(bpe()._canonical)["pre_tokenizer"]
    return {"type": "Sequence", "pretokenizers": [{"type": kind, **options}, byte_level]}


def stripping(name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 700, "content": "sea", **flags, name: True}


def damaged(change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(bpe()._canonical)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "tokenizer.json is damaged: it is not JSON"),
        ("{}", "is not a tokenizer.json"),
        ("[1, 2", "tokenizer.json is damaged: it is not JSON"),
        (lambda c: c["model"]["vocab"].pop("A"), "is missing|is not a tokenizer.json"),
        (
            lambda c: c["model"]["vocab"].update({"zzz": 5000}),
            "id 700 is missing; the ids of 701 tokens must be 0 to 700",
        ),
        (lambda c: c.update(added_tokens=[]), "must have a special token to end a document: <"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "byte-level BPE"),
        (
            lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
            "does not decode ids",
        ),
        (
            lambda c: c.update(pre_tokenizer=cut_first("WhitespaceSplit")),
            "does not decode ids",
        ),
        (
            lambda c: c.update(pre_tokenizer=cut_first("CharDelimiterSplit", delimiter="w")),
            "does not decode ids",
        ),
        (lambda c: c["added_tokens"].append(stripping("lstrip")), "'sea' removes spaces"),
        (
            lambda c: c["added_tokens"].append(stripping("single_word")),
            "'sea' removes spaces",
        ),
        (lambda c: c["model"]["merges"].append(["q", "@@@"]), "is not a tokenizer.json"),
        (
            lambda c: c["model"]["merges"].append(c["model"]["merges"][0]),
            " must be there once, not 2 times",
        ),
        (lambda c: c["model"]["vocab"].update({"": 700}), "no token may be empty"),
        (
            lambda c: c["model"]["vocab"].update({"\u4e2d": 700}),
            "the token '\u4e2d' must have only characters of GPT-2's byte alphabet",
        ),
        (
            lambda c: c["model"]["vocab"].update(tilde=c["model"]["vocab"].pop("~")),
            "for each of the 256 bytes, or text would be lost; it lacks 1, the first is 0x7E",
        ),
        (lambda c: c["model"].update(dropout=0.5), "has dropout 0.5; it must have none, or a"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end of words"),
        ('{"model": {"vocab": {"a": 0, "a": 1}}}', "duplicate key 'a'"),
    ],
)
def test_wrong_files_are_rejected(
    tmp_path: Path, content: str | Callable[[dict[str, Any]], object], reason: str
) -> None:
    text = content if isinstance(content, str) else damaged(content)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist; it must be bpe, gpt, characters, bytes"):
        load_tokenizer(tmp_path / "gpt3")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="damaged: it is not JSON: 'utf-8' codec can't decode"):
        load_tokenizer(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXT, st.sampled_from(["The Whale's", "É\u0301 \u4e2d\u6587 <unk>", "a\x00b"])))
def test_gpt_equals_the_openai_gpt_tokenizer(text: str) -> None:
    tokenizer, reference = gpt()
    assert tokenizer.encode(text, special=True).tolist() == reference(text)["input_ids"]


def test_special_tokens_are_encoded_only_on_request() -> None:
    for tokenizer in (bpe(), train_tokenizer(["abc<|endoftext|>"], name="characters")):
        text = "abc<|endoftext|>abc"
        plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert tokenizer.end_of_text not in plain
        assert tokenizer.decode(plain) == text
        middle = [tokenizer.end_of_text]
        assert special.tolist() == [*tokenizer.encode("abc"), *middle, *tokenizer.encode("abc")]
        prompt = tokenizer.encode_prompt("<|endoftext|>abc", special=True)
        assert prompt == tokenizer.encode_prompt("abc") == [*middle, *tokenizer.encode("abc")]


def test_gpt_keeps_words_but_not_case(tmp_path: Path) -> None:
    tokenizer, _ = gpt()
    assert tokenizer.kind == "gpt"
    assert tokenizer.decode(tokenizer.encode("The  Whale swam,\nand swam")) == (
        "the whale swam , and swam"
    )
    assert tokenizer.decode(tokenizer.encode("\u4e2d")) == ""  # never seen
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    text = english()[0]
    assert len(tokenizer.encode(text * 3)) == 3 * len(tokenizer.encode(text))


def test_gpt_training_is_repeatable() -> None:
    """tokenizers 0.23.3 gives other ids in each training with an end-of-word suffix
    (findings/tokenizers-end-of-word-suffix.sh)."""
    hashes = {train_tokenizer(english(), name="gpt", vocab_size=600).sha256 for _ in range(3)}
    assert len(hashes) == 1, hashes


@cache
def gpt() -> tuple[Tokenizer, Any]:
    """A GPT tokenizer trained here, and transformers' with its vocabulary."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([*english(), "x<unk>y"], name="gpt", vocab_size=900)
    model = json.loads(tokenizer._canonical)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return tokenizer, transformers.OpenAIGPTTokenizer(vocab=model["vocab"], merges=merges)
