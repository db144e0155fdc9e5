"""Tokenizers as other programs save them: names of end-of-text, idle normalizers, Metaspace, and
files that only look like a tokenizer."""

from __future__ import annotations

import base64
import json
import random
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer
from tokenizers import Tokenizer as LibraryTokenizer

from pretrain.data.preparation import prepare
from pretrain.tokenizer.encode import SPACE
from pretrain.tokenizer.load import load_tokenizer
from texts import prose, random_unicode_text, train_sentencepiece

TEXTS = ["the ship and the sea, two ships at sea", "a house of stone <s> </s> [EOS]"] * 9


def byte_level(*special: str) -> Any:
    """A tokenizer of the library's class for "how to train" guides."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        TEXTS, vocab_size=300, special_tokens=[*special], show_progress=False
    )
    return tokenizer


def saved(folder: Path, *special: str, **change: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = json.loads(byte_level(*special)._tokenizer.to_str()) | change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_vocab_and_merges_have_the_special_tokens_of_the_same_tokenizer_json(
    tmp_path: Path,
) -> None:
    """`ByteLevelBPETokenizer.save_model` of tokenizers 0.23.3 writes <s> and </s> into vocab.json,
    and nothing says that they are special."""
    library = byte_level("<s>", "<pad>", "</s>", "<unk>")
    for name in ("one", "two", "windows"):
        (tmp_path / name).mkdir()
    library.save(str(tmp_path / "one/tokenizer.json"))
    library.save_model(str(tmp_path / "two"))
    library.save_model(str(tmp_path / "windows"))
    merges = tmp_path / "windows/merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    one, two, windows = (load_tokenizer(tmp_path / name) for name in ("one", "two", "windows"))
    assert (two.start_of_text, two.end_of_text) == (one.start_of_text, one.end_of_text) == (0, 2)
    assert windows.sha256 == two.sha256
    for text in (*TEXTS, "<s> <pad></s>", "< [x"):
        assert two.encode(text).tolist() == one.encode(text).tolist()
        assert two.decode(two.encode(text)) == text
        assert not {0, 1, 2, 3} & set(two.encode(text).tolist())


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": []},  # DeepSeek's
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Sequence", "normalizers": []},
                {"type": "Strip", "strip_left": False, "strip_right": False},
            ],
        },
        {"type": "Replace", "pattern": {"String": "x"}, "content": "x"},
        {"type": "Prepend", "prepend": ""},
        {
            "type": "BertNormalizer",
            "clean_text": False,
            "handle_chinese_chars": False,
            "strip_accents": None,
            "lowercase": False,
        },
    ],
)
def test_normalizers_that_change_nothing_are_left_out(
    normalizer: dict[str, Any], tmp_path: Path
) -> None:
    plain = load_tokenizer(saved(tmp_path / "plain", "</s>"))
    odd = load_tokenizer(saved(tmp_path / "odd", "</s>", normalizer=normalizer))
    assert odd.sha256 == plain.sha256


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Replace", "pattern": {"String": "x"}, "content": "y"},
        {"type": "Replace", "pattern": {"Regex": "x"}, "content": "x"},
    ],
)
def test_normalizers_that_change_text_are_rejected(
    normalizer: dict[str, Any], tmp_path: Path
) -> None:
    kind = normalizer["normalizers"][0] if "normalizers" in normalizer else normalizer
    message = f"the tokenizer has a normalizer, {kind['type']}, which changes text"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(saved(tmp_path, "</s>", normalizer=normalizer))


def test_nested_normalizers_of_sentencepiece_are_read(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model")
    plain = load_tokenizer(path)
    content = plain.description
    parts = content["normalizer"]["normalizers"]
    empty = {"type": "Sequence", "normalizers": []}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Sequence", "normalizers": [parts[0], empty]}, parts[1]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    nested = load_tokenizer(tmp_path / "tokenizer.json")
    assert (nested.space_prefix, nested.end_of_text) == (SPACE, plain.end_of_text)
    assert nested.encode(" a  ship").tolist() == plain.encode(" a  ship").tolist()


@pytest.mark.parametrize(
    ("end", "start"),
    [
        ("<eos>", "<bos>"),
        ("[EOS]", "[BOS]"),
        ("<EOT>", None),
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    ],
)
def test_known_names_of_end_of_text(end: str, start: str | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, "<unk>", end, *([start] if start else [])))
    assert tokenizer.end_of_text == 1
    assert tokenizer.start_of_text == (2 if start else 1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>"}),
        ("generation_config.json", {"eos_token_id": 2}),
        ("generation_config.json", {"eos_token_id": [2, 1]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_files_next_to_a_tokenizer_name_its_end_of_text(
    file: str, content: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers 5.23 writes them. The saved tokenizer.json knows it without those files, and
    its hash depends on it."""
    folder = saved(tmp_path / "theirs", "<unk>", "<|start|>", "<|im_end|>")
    with pytest.raises(ValueError, match=r"to end a document: <\|endoftext\|>, .*, or the eos_"):
        load_tokenizer(folder)
    (folder / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.end_of_text, tokenizer.start_of_text) == (2, 2)
    tokenizer.save(tmp_path / "ours")
    assert [each.name for each in (tmp_path / "ours").iterdir()] == ["tokenizer.json"]
    again = load_tokenizer(tmp_path / "ours")
    assert (again.sha256, again.end_of_text) == (tokenizer.sha256, 2)
    assert tokenizer.padded(303).end_of_text == 2
    name = file.removesuffix(".json")
    key = "bos_token" if name in ("tokenizer_config", "special_tokens_map") else "bos_token_id"
    value = "<|start|>" if key == "bos_token" else 1
    (folder / file).write_text(json.dumps(content | {key: value}))
    both = load_tokenizer(folder)
    assert (both.end_of_text, both.start_of_text) == (2, 1)
    assert both.sha256 != tokenizer.sha256
    both.save(tmp_path / "template", bos_template=True)
    again = load_tokenizer(tmp_path / "template")
    assert (again.sha256, again.end_of_text, again.start_of_text) == (both.sha256, 2, 1)
    library = LibraryTokenizer.from_file(str(tmp_path / "template/tokenizer.json"))
    assert library.encode("a ship").ids == both.encode_prompt("a ship")


def test_a_known_end_of_text_comes_before_a_named_one(tmp_path: Path) -> None:
    """In a chat model the named one ends a turn, not a text; documents end as in pre-training."""
    folder = saved(tmp_path, "<|endoftext|>", "<|im_end|>")
    plain = load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(folder).sha256 == plain.sha256
    assert plain.end_of_text == 0


@pytest.mark.parametrize("named", ["ship", "", 5000, -1, [], None, {"content": 3}])
def test_an_end_of_text_must_be_a_special_token(named: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, "<unk>")
    key = "eos_token_id" if isinstance(named, int | list) else "eos_token"
    for file in ("tokenizer_config.json", "config.json"):
        (folder / file).write_text(json.dumps({key: named}))
    with pytest.raises(ValueError, match="must have a special token to end a document"):
        load_tokenizer(folder)


def test_a_renamed_end_of_text_prepares_again(tmp_path: Path) -> None:
    """Prepared text is found again by the content of the files that name the token, too."""
    folder = saved(tmp_path / "theirs", "<|a|>", "<|b|>")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS) * 9)
    ends = []
    for number, name in enumerate(("<|a|>", "<|b|>")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        data = prepare(tmp_path / "text.txt", tmp_path / f"out{number}", tokenizer=folder)
        ends.append(data.manifest.end_of_text)
        assert data.tokenizer().end_of_text == number
    assert ends == [0, 1]


def metaspace(folder: Path, *, scheme: str = "first") -> Path:
    """The tokenizer.json that transformers 5.23 saves for a SentencePiece model of Llama."""
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    content = tokenizer.description
    before = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    content |= {"normalizer": None, "pre_tokenizer": before}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("scheme", "has_prefix"), [("first", True), ("never", False)])
def test_metaspace_has_the_ids_of_the_sentencepiece_model(
    scheme: str, has_prefix: bool, tmp_path: Path
) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model", add_dummy_prefix=has_prefix)
    oracle = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(metaspace(tmp_path, scheme=scheme))
    draw = random.Random(1)
    for number in range(500):
        plain = random_unicode_text(draw) if number % 2 else " ".join(prose(draw, 9)) + " \n "
        for text in (plain, " " + plain):
            ids = tokenizer.encode(text).tolist()
            assert ids == oracle.encode(text), repr(text)
            assert tokenizer.decode(ids) == text


def test_a_folder_that_transformers_5_saved_has_its_ids(tmp_path: Path) -> None:
    """transformers 5.23 writes no tokenizer.model. Of a text that begins with a space it loses this
    space, which SentencePiece and we keep."""
    transformers = pytest.importorskip("transformers", minversion="5")
    path = train_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.model").exists()
    tokenizer = load_tokenizer(tmp_path / "saved")
    draw = random.Random(2)
    for text in (random_unicode_text(draw).lstrip(" ") for _ in range(300)):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).tolist() == expected, repr(text)
    assert tokenizer.encode(" sea").tolist() == load_tokenizer(path).encode(" sea").tolist()
    # tokenizer.json has none there; a GGUF needs it.
    assert tokenizer.description["model"]["unk_token"] == "<unk>"


@pytest.mark.parametrize("fault", ["split", "no byte_fallback"])
def test_other_metaspace_is_rejected(fault: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model")
    folder = metaspace(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["split"] = fault == "split"
    content["model"]["byte_fallback"] = fault == "split"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    message = r"type is BPE \(pre-tokenizer: Metaspace\); it must be byte-level BPE, SentencePiece"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "merges.txt", "a.tiktoken"])
def test_pointers_of_git_lfs_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    if name == "merges.txt":
        (tmp_path / "vocab.json").write_text("{}")
    message = f"{tmp_path / name} is a pointer of Git LFS; it must be the file that it points to"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_mistrals_names_of_files(tmp_path: Path) -> None:
    """mistral-common 1.13.1 has tokenizer.model.v1, .v2 and tekken.json."""
    plain = load_tokenizer(train_sentencepiece(tmp_path / "plain.model"))
    (tmp_path / "v1").mkdir()
    (tmp_path / "plain.model").rename(tmp_path / "v1/tokenizer.model.v1")
    assert load_tokenizer(tmp_path / "v1/tokenizer.model.v1").sha256 == plain.sha256
    assert load_tokenizer(tmp_path / "v1").sha256 == plain.sha256
    (tmp_path / "tekken.json").write_text('{"config": {"version": "v3"}, "vocab": [{"rank": 0}]}')
    with pytest.raises(ValueError, match=r"has no 'model'; a tekken.json of Mistral is not read"):
        load_tokenizer(tmp_path / "tekken.json")


def test_a_failing_import_of_protobuf_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protobuf raises a TypeError where its version does not fit the generated code."""
    path = train_sentencepiece(tmp_path / "tokenizer.model")

    class Failing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.setitem(sys.modules, "sentencepiece", Failing("sentencepiece"))
    with pytest.raises(ValueError, match="needs the package sentencepiece, whose import fails"):
        load_tokenizer(path)


def test_ids_are_checked_before_the_library_reads_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library fills what lies between two ids."""
    content = json.loads(byte_level("</s>")._tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["ship"] = len(vocabulary) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.setattr("pretrain.tokenizer.load.LibraryTokenizer", None)
    n = len(vocabulary)
    message = f"'tokenizer.json': id {n - 1} is missing; the ids of {n} tokens must be 0 to {n - 1}"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer("tokenizer.json")


def test_ranks_of_tiktoken_must_be_a_whole_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {256: ("gpt2", 257, {"<|endoftext|>": 256})}
    monkeypatch.setattr("pretrain.tokenizer.load._TIKTOKEN_VOCABULARIES", table)
    lines = [base64.b64encode(bytes([byte])).decode() + f" {byte}" for byte in range(256)]
    (tmp_path / "a.tiktoken").write_text("\n".join(lines))
    assert load_tokenizer(tmp_path).vocab_size == 257
    (tmp_path / "a.tiktoken").write_text("\n".join([*lines[:255], lines[255] + "9"]))
    with pytest.raises(ValueError, match="id 257 is missing; the ids of 258 tokens must be 0 to"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("id_", [1 << 40, -5, 3, 1])
def test_ids_of_encoder_json_are_checked(id_: int, tmp_path: Path) -> None:
    (tmp_path / "vocab.bpe").write_text("a b\n")
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, "ab": id_}))
    reason = "3 tokens have 2 ids" if id_ == 1 else "id 2 is missing; the ids of 3 tokens must be"
    with pytest.raises(ValueError, match=rf"encoder\.json': {reason}"):
        load_tokenizer(tmp_path)
