"""SentencePiece models: ids equal the package's, damaged and unsupported files are rejected."""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oracles import config_of, random_decoder
from pretrain.cli import main
from pretrain.cli.harness import HarnessModel
from pretrain.data.preparation import prepare
from pretrain.export.hf import write_hugging_face
from pretrain.generate import sampling
from pretrain.tokenizer.encode import SPACE, SentencePieceEncoder
from pretrain.tokenizer.load import Piece, bpe_from_pieces, load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer
from texts import prose, random_unicode_text, train_sentencepiece


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


def reference(path: Path) -> Any:
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))


def test_ids_equal_those_of_sentencepiece(llama: Path, tmp_path: Path) -> None:
    tokenizer, oracle = load_tokenizer(llama), reference(llama)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (600, oracle.eos_id())
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256
    draw = random.Random(1)
    for number in range(2000):
        text = random_unicode_text(draw) if number % 2 else "  ".join(prose(draw, 9)) + " \n "
        ids = tokenizer.encode(text).tolist()
        assert ids == oracle.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
        assert again.encode(text).tolist() == ids
        # The space before the text is a byte of the ids but not of the text.
        assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode()) + bool(text)


def test_both_libraries_and_all_chunk_sizes_agree(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(random_unicode_text(random.Random(n)) for n in range(300))
    tokenizer = load_tokenizer(llama)
    encoder = tokenizer.encoder
    assert isinstance(encoder, SentencePieceEncoder)
    assert encoder.fast is not None
    whole = tokenizer.encode(text).tolist()
    assert whole == reference(llama).encode(text)
    monkeypatch.setattr(encoder, "chunk_characters", 300)
    assert len(list(tokenizer.encode_chunks(text))) > 10
    assert tokenizer.encode(text).tolist() == whole
    monkeypatch.setattr(encoder, "fast", None)
    assert tokenizer.encode(text).tolist() == whole


def test_special_token_names_in_a_text_are_text(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    for text in ("<s>a</s>", "</s>", "x<unk>y <0x41>", SPACE):
        ids = tokenizer.encode(text).tolist()
        assert ids == reference(llama).encode(text)
        assert not {0, 1, 2} & set(ids)
        # The character for a space is a space to SentencePiece.
        assert tokenizer.decode(ids) == text.replace(SPACE, " ")


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt"])
def test_continuation_keeps_the_space_before_it(
    kind: str, llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `generate`, the harness, `next`; nothing is before what has no prompt."""
    texts = ["the people of the house and the sea " * 9]
    tokenizer = load_tokenizer(llama) if kind == "sentencepiece" else None
    tokenizer = tokenizer or train_tokenizer(texts, name="gpt", vocab_size=34)
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    write_hugging_face(tmp_path, decoder=decoder, tokenizer=tokenizer)
    before, expected = "of the", " house"
    added = tokenizer.encode(before + expected)[len(tokenizer.encode(before)) :].tolist()
    monkeypatch.setattr(sampling, "generate_ids", lambda *_, **__: [added])
    monkeypatch.setattr("pretrain.evaluate.run_tasks.generate_ids", lambda *_, **__: [added])
    assert sampling.generate(decoder, tokenizer, before) == [expected]
    assert sampling.generate(decoder, tokenizer, "") == ["house"]
    request = SimpleNamespace(args=(before, {}))
    assert HarnessModel(str(tmp_path), device="cpu").generate_until([request]) == [expected]

    words = ["next", str(tmp_path), "--prompt", before, "--top", "600", "--json"]
    spaced = tokenizer.token_bytes(added[0]).decode()
    assert " " in spaced
    for more in ([], ["--answer", expected]):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert spaced in {token["text"] for token in found["tokens"]}
        assert not more or found["answer"]["tokens"][0]["text"] == spaced


def test_text_is_prepared_with_sentencepiece(llama: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = [" ".join(prose(draw, 60)) for _ in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    data = prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", tokenizer=llama)
    stream, tokenizer = data.split("train"), data.tokenizer()
    assert isinstance(tokenizer, Tokenizer)
    offsets = stream.document_offsets
    ids = stream.read(int(offsets[0]), int(offsets[1]) - 1)
    assert tokenizer.decode(ids) in texts
    assert data.split("val").n_bytes + stream.n_bytes == sum(map(len, texts))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 400}, "not BPE"),
        ({"byte_fallback": False, "vocab_size": 300}, "has 0"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text"),
        ({"remove_extra_whitespaces": True}, "changes the text"),
        ({"split_by_whitespace": False}, "has a space inside"),
        ({"user_defined_symbols": ["the"]}, "'the' is user-defined"),
    ],
)
def test_models_that_lose_text_are_rejected(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(train_sentencepiece(tmp_path / "other.model", **options))


def test_model_without_space_prefix(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "plain.model", add_dummy_prefix=False)
    tokenizer, oracle = load_tokenizer(path), reference(path)
    for text in ("a house", " a house", "", "  "):
        assert tokenizer.encode(text).tolist() == oracle.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_package_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ValueError,
        match=r"': a SentencePiece model needs the package sentencepiece: .* -m pip install "
        r".*sentencepiece",
    ):
        load_tokenizer(llama)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "must have different tokens; of its 0 tokens 0 are different"),
        ([("a", 0.0, 2)] * 3, "must have different tokens; of its 3 tokens 1 are different"),
        ([("a", 0.0, 1)], "must have 1 unknown token, not 0"),
    ],
)
def test_contradictory_pieces_are_rejected(pieces: list[Piece], message: str) -> None:
    with pytest.raises(ValueError, match=f"^the vocabulary {message}$"):
        bpe_from_pieces(pieces, has_prefix=True)


def test_damaged_files_are_rejected(llama: Path, tmp_path: Path) -> None:
    data = llama.read_bytes()
    draw = random.Random(3)
    path = tmp_path / "bad.model"
    for number in range(300):
        bad = bytearray(data[: draw.randrange(len(data))] if number % 3 == 0 else data)
        for _ in range(draw.randint(0, 4) if number % 3 else 0):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(draw.randbytes(500) if number % 10 == 9 else bytes(bad))
        with suppress(ValueError):  # and nothing else
            load_tokenizer(path).encode("a text")
