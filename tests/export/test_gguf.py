"""GGUF files, written and read: the same weights, and the same logits in llama.cpp and
transformers."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from exports import same_weights
from oracles import config_of, random_decoder
from pretrain.corpus.reading import read_documents
from pretrain.distributed import open_world
from pretrain.evaluate.loss import ScoredModel, score_texts
from pretrain.export.gguf import write_gguf
from pretrain.export.importing import import_model
from pretrain.export.layouts import FormatError
from pretrain.export.verification import AGREES, TEXTS, Exported, make_request, verify_export
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer
from texts import LLAMA_OPTIONS, train_sentencepiece

gguf = pytest.importorskip("gguf")

# Rows of 64 are whole blocks of Q8_0.
WIDE: dict[str, Any] = {"d_model": 64, "d_ff": 96, "context_length": 64}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama"},
    "llama 3.1": {
        "family": "llama",
        "n_kv_heads": 2,
        "rope_factor": 8.0,
        "rope_original_context": 32,
        "rope_theta": 5e5,
        "context_length": 64,
    },
    "llama 3.2": {"family": "llama", "tied_head": True},
}


def write_model(file: Path, decoder: Decoder, tokenizer: Tokenizer, numbers: str = "f32") -> None:
    write_gguf(file, decoder=decoder, tokenizer=tokenizer, numbers=numbers)


def decoder_of(case: str, tokenizer: Tokenizer) -> Decoder:
    config = config_of(**{**WIDE, **CASES[case]})
    return random_decoder(config, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("numbers", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_export_and_import_keep_the_rounded_weights(
    case: str, numbers: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder, original = decoder_of(case, tokenizer), decoder_of(case, tokenizer)
    file = tmp_path / "model.gguf"
    write_model(file, decoder, tokenizer, numbers)
    imported = import_model(file)
    assert imported.config.family == decoder.config.family
    assert imported.config.rope_factor == decoder.config.rope_factor
    assert imported.config.rope_original_context == decoder.config.rope_original_context
    assert imported.config.norm_epsilon == decoder.config.norm_epsilon
    assert imported.tokenizer.sha256 == tokenizer.sha256
    assert same_weights(imported.build(), decoder)
    error = 0.0
    for name, p in imported.build().named_parameters():
        exact = original.get_parameter(name).detach()
        error = max(error, float((p.detach() - exact).abs().max() / exact.abs().max()))
    # Half of a step: of 127 steps, of a float16; none in float32.
    assert error <= {"f32": 0.0, "f16": 2**-11, "q8_0": 0.5 / 127 * 1.05}[numbers]
    assert error > 0 or numbers == "f32"


@pytest.mark.parametrize("case", ["llama", "llama 3.2"])
def test_transformers_reads_the_same_model(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers ignores the context of GPT-2 and the scaled positions of Llama 3.1;
    llama.cpp reads both, see below."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    decoder = decoder_of(case, tokenizer)
    write_model(tmp_path / "model.gguf", decoder, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = decoder.logits(decoder(ids))
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("numbers", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_reads_the_same_model(
    case: str, numbers: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Greedy text, logits, divergence of distributions, ids and perplexity, as in a certificate."""
    pytest.importorskip("llama_cpp")
    decoder = decoder_of(case, tokenizer)
    assert certificate_of(decoder, tokenizer, tmp_path, numbers)["verdict"] == AGREES


@pytest.mark.parametrize("kind", ["llama3", "smollm", "sentencepiece", "gpt2 itself"])
def test_llama_cpp_reads_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    if kind == "gpt2 itself":
        tokenizer = load_tokenizer("gpt2")
    elif kind == "sentencepiece":
        tokenizer = load_tokenizer(
            train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS)
        )
    else:
        texts = [d.text for d in list(read_documents("bundled"))[:20]]
        tokenizer = train_tokenizer(texts, vocab_size=600, split=kind)  # type: ignore[arg-type]
    decoder = random_decoder(config_of("llama", **WIDE), vocab_size=tokenizer.vocab_size)
    assert certificate_of(decoder, tokenizer, tmp_path, "f32")["verdict"] == AGREES


def certificate_of(
    decoder: Decoder, tokenizer: Tokenizer, folder: Path, numbers: str
) -> dict[str, Any]:
    file = folder / "out" / "model.gguf"
    file.parent.mkdir()
    write_model(file, decoder, tokenizer, numbers)
    text = "The capital of France is Paris. " * 10
    score = score_texts(ScoredModel(decoder, tokenizer, open_world("cpu", threads=1)), [text])
    return verify_export(Exported(file, "gguf", numbers, decoder, tokenizer), text, score)


def test_vocabularies_are_imported_unchanged(tmp_path: Path) -> None:
    """SentencePiece's scores and kinds, the pre-split of Llama 3, and an added token that is not
    special: both programs find it in a text, and the verification compares it."""
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    plain = train_tokenizer(texts, vocab_size=500, split="llama3")
    library = Library.from_str(json.dumps(plain.description))
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    for tokenizer in (
        load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS)),
        plain,
        Tokenizer(library),
    ):
        decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
        file = tmp_path / f"{tokenizer.vocab_size}.gguf"
        write_model(file, decoder, tokenizer)
        imported = import_model(file).tokenizer
        assert (imported.start_of_text, imported.end_of_text) == (
            tokenizer.start_of_text,
            tokenizer.end_of_text,
        )
        for text in (*TEXTS, "a <think> b", texts[0]):
            assert imported.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert imported.decode(imported.encode(text)) == text
    kinds = gguf.GGUFReader(file).fields["tokenizer.ggml.token_type"].contents()
    assert kinds[-1] == gguf.TokenType.USER_DEFINED
    exported = Exported(file, "gguf", "f32", decoder, imported)
    request = make_request(exported, texts[0], library="llama_cpp", threads=1)
    assert "a <think> b" in request["texts"]


def test_add_bos_is_read_from_the_file_or_the_default_of_llama_cpp(tmp_path: Path) -> None:
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    pieces = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    llama3 = train_tokenizer(texts, vocab_size=500, split="llama3")
    gpt2 = train_tokenizer(texts, vocab_size=400)
    bos, kind = "tokenizer.ggml.add_bos_token", gguf.GGUFValueType.BOOL
    prefix = "tokenizer.ggml.add_space_prefix"
    for tokenizer, default in ((pieces, True), (llama3, True), (gpt2, False)):
        file = tmp_path / f"{tokenizer.vocab_size}.gguf"
        decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
        write_model(file, decoder, tokenizer)
        assert import_model(file).tokenizer.add_bos is True  # as for all tokenizers of pretrain
        rewrite(file, keys={bos: (False, kind)})
        assert import_model(file).tokenizer.add_bos is False
        rewrite(file, keys={bos: (None, kind), prefix: (False, kind)})
        assert import_model(file).tokenizer.add_bos is default


@pytest.mark.parametrize(
    ("family", "changes", "kind", "message"),
    [
        ("fast", {}, "bpe", "of one of the families gpt2, llama .got 'fast'.; --format hf"),
        ("transformer", {}, "bpe", "families gpt2, llama .got 'transformer'"),
        ("gpt", {}, "bpe", "families gpt2, llama .got 'gpt'"),
        (
            *("llama", {"query_key_norm": True}, "bpe"),
            "must have the architecture of its family llama without changes; --format hf",
        ),
        ("llama", {}, "bytes", "must be of the kind bpe .got bytes"),
        ("llama", {}, "characters", "must be of the kind bpe .got characters"),
        ("llama", {}, "cl100k", "must be one of gpt2, llama3, o200k, smollm .got cl100k"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_rejected(
    family: str, changes: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    texts = ["some words and some more words " * 20]
    is_split = kind == "cl100k"
    how: dict[str, Any] = {"split": kind, "vocab_size": 260} if is_split else {"name": kind}
    tokenizer = train_tokenizer(texts, **how)
    decoder = random_decoder(config_of(family, **changes), vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "model.gguf", decoder, tokenizer)
    assert not (tmp_path / "model.gguf").exists()


def test_damaged_files_are_rejected_or_have_the_same_names(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Cut at 60 places, and bits flipped in 300 files: a typed error, or a model of this shape."""
    file, damaged = tmp_path / "model.gguf", tmp_path / "damaged.gguf"
    write_model(file, decoder_of("llama 3.1", tokenizer), tokenizer)
    data = file.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged.write_bytes(data[: draw.randrange(len(data) - 64)])
        with pytest.raises(FormatError):
            import_model(damaged)
    rejected = 0
    # The format has no checksum of the weights: only bits before them are flipped.
    header = data.index(b"blk.1.ffn_down") + 100
    for number in range(300):
        changed = bytearray(data)
        for _ in range(1 + number % 3):
            changed[4 + draw.randrange(header - 4)] ^= 1 << draw.randrange(8)
        damaged.write_bytes(bytes(changed))
        try:
            import_model(damaged).build()
        except FormatError:
            rejected += 1
    assert rejected > 100


def test_an_unknown_architecture_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, arch="falcon")
    writer.add_uint32("falcon.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(
        FormatError, match=r"must be of one of the families gpt2, llama .got 'falcon'"
    ):
        import_model(file)


def rewrite(
    file: Path,
    *,
    keys: dict[str, tuple[Any, Any]] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """Write a file again with other values: name -> value and its type in gguf; None: without."""
    reader = gguf.GGUFReader(file)
    kind = gguf.GGUFValueType
    writer = gguf.GGUFWriter(file.with_suffix(".new"), arch=reader.fields[ARCHITECTURE].contents())
    old_keys = {
        name: (field.contents(), field.types[0])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != ARCHITECTURE
    }
    for name, (value, type_) in {**old_keys, **(keys or {})}.items():
        if type_ == kind.ARRAY:
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, type_)
    numbers = {each.name: np.array(each.data) for each in reader.tensors}
    for name, values in {**numbers, **(tensors or {})}.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


ARCHITECTURE = "general.architecture"
_KIND = gguf.GGUFValueType
OTHER_KEYS: list[tuple[str, Any, Any, str]] = [
    ("attention.causal", False, _KIND.BOOL, "must be True .got False"),
    ("rope.scale_linear", 8.0, _KIND.FLOAT32, "must be 1.0 .got 8.0"),
    ("rope.scaling.factor", 8.0, _KIND.FLOAT32, "must be 1.0 .got 8.0"),
    ("rope.scaling.attn_factor", 3.0, _KIND.FLOAT32, "must be 1.0 .got 3.0"),
    ("rope.scaling.yarn_log_multiplier", 3.0, _KIND.FLOAT32, "must be absent"),
    ("attention.scale", 1.0, _KIND.FLOAT32, "must be absent"),
    ("attention.sliding_window", 4, _KIND.UINT32, "must be absent"),
    ("logit_scale", 3.0, _KIND.FLOAT32, "must be absent"),
    ("context_length", 2**31, _KIND.UINT32, "context_length is 2147483648; it must be in"),
    ("context_length", None, _KIND.UINT32, "context_length is empty; it must be a number"),
]


@pytest.mark.parametrize(("key", "value", "kind", "message"), OTHER_KEYS)
def test_unsupported_keys_are_rejected(
    key: str, value: Any, kind: Any, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    rewrite(file)
    import_model(file)
    rewrite(file, keys={f"llama.{key}": (value, kind)})
    with pytest.raises(FormatError, match=message):
        import_model(file)


VOCABULARIES: list[tuple[str, Any, str]] = [
    ("model", "bert", "tokenizer.ggml.model must be gpt2 or llama .got 'bert'"),
    ("pre", "other", "tokenizer.ggml.pre must be one of gpt-2, .* .got 'other'"),
    ("tokens", [1, 2], "tokenizer.ggml.tokens must be a list of texts"),
    ("tokens", ["a", "a"], "must be different, .* .got 2, of which 1 are different, and 400"),
    ("merges", ["a b c"], "each of tokenizer.ggml.merges must be two tokens and a space"),
]


@pytest.mark.parametrize(("key", "value", "message"), VOCABULARIES)
def test_invalid_vocabularies_are_rejected(
    key: str, value: Any, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    kind = _KIND.ARRAY if isinstance(value, list) else _KIND.STRING
    rewrite(file, keys={f"tokenizer.ggml.{key}": (value, kind)})
    with pytest.raises(FormatError, match=message):
        import_model(file)


def test_a_vocabulary_without_a_model_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As llama.cpp's own ggml-vocab-*.gguf."""
    file = tmp_path / "vocabulary.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    rewrite(file, tensors=dict.fromkeys(t.name for t in gguf.GGUFReader(file).tensors))
    message = r"has no weights; it must be the file of a model, not of its vocabulary alone"
    with pytest.raises(FormatError, match=message):
        import_model(file)


def test_the_file_names_its_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    tokens = [tokenizer.id_to_token(id_) for id_ in range(tokenizer.vocab_size)]
    tokens[tokenizer.end_of_text] = "<|stop|>"
    rewrite(file, keys={"tokenizer.ggml.tokens": (tokens, _KIND.ARRAY)})
    assert import_model(file).tokenizer.end_of_text == tokenizer.end_of_text


def test_a_key_without_effect_is_accepted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    one = {"llama.rope.scaling.factor": (1.0, _KIND.FLOAT32), "general.x": (1, _KIND.UINT32)}
    rewrite(file, keys={**one, "llama.attention.causal": (True, _KIND.BOOL)})
    import_model(file)


def test_a_head_of_gpt2_must_equal_the_embedding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, decoder = tmp_path / "model.gguf", decoder_of("gpt2", tokenizer)
    write_model(file, decoder, tokenizer)
    head = decoder.token_embedding.weight.detach().numpy().copy()
    rewrite(file, tensors={"output.weight": head})
    assert same_weights(import_model(file).build(), decoder)
    rewrite(file, tensors={"output.weight": head + 1})
    with pytest.raises(FormatError, match=r"head output.weight must be equal to"):
        import_model(file).build()


def test_numbers_that_are_not_finite_are_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    rewrite(file, tensors={"output_norm.weight": np.full(64, np.nan, np.float32)})
    with pytest.raises(FormatError, match=r"all numbers in output_norm.weight must be finite"):
        import_model(file).build()


def test_the_number_of_rope_factors_is_checked_before_they_are_computed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama 3.1", tokenizer), tokenizer)
    rewrite(file, keys={
        "llama.embedding_length": (2**20, _KIND.UINT32),
        "llama.rope.dimension_count": (2**18, _KIND.UINT32),
    })  # fmt: skip
    monkeypatch.setattr("pretrain.export.gguf.rope_factors", None)
    with pytest.raises(FormatError, match=r"must have 131072 numbers of type F32 .got 8 "):
        import_model(file)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(7.0, "must have the numbers of Llama 3.1's rule"), (np.inf, "model.rope_factor is inf")],
)
def test_other_scalings_of_positions_are_rejected(
    factor: float, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama 3.1", tokenizer), tokenizer)
    rewrite(file, tensors={"rope_freqs.weight": np.full(8, factor, np.float32)})
    with pytest.raises(FormatError, match=f"rope_freqs.weight:? {message}"):
        import_model(file)


def _value(kind: int, data: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack(
        "<I", kind
    ) + data  # fmt: skip


BROKEN: dict[str, tuple[bytes, str]] = {
    "an array of 2**40": (
        _value(9, struct.pack("<IQ", 0, 1 << 40)),
        "got 1,099,511",
    ),
    "an array that is not there": (_value(9, struct.pack("<IQ", 4, 99)), "396 more bytes must"),
    "an array of arrays": (_value(9, struct.pack("<IQ", 9, 1) * 9), "got type 9"),
    "a string of 2**62": (
        _value(8, struct.pack("<Q", 1 << 62)),
        "more bytes must follow .got 0",
    ),
    "an unknown kind": (_value(77, b""), "got type 77"),
    "another version": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "got 50331648",
    ),
    "many keys": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63),
        "count .* .got 9,223",
    ),
    "many tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0),
        "count .* .got 9,223",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_counts_are_compared_with_the_file_size_before_it_is_read(
    case: str, tmp_path: Path
) -> None:
    """The reader of the package gguf, 0.19, would count to a million million in a file of 49
    bytes."""
    data, message = BROKEN[case]
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=f"must be a complete GGUF file: byte .*{message}"):
        import_model(tmp_path / "model.gguf")


def test_values_are_counted_over_all_keys_and_read_without_the_package(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary has 400 texts, as many types, and merges."""
    file = tmp_path / "model.gguf"
    decoder = decoder_of("llama", tokenizer)
    write_model(file, decoder, tokenizer)
    monkeypatch.setattr(gguf, "GGUFReader", None)
    assert same_weights(import_model(file).build(), decoder)
    monkeypatch.setattr("pretrain.export.gguf._MAX_ELEMENTS", 700)
    with pytest.raises(FormatError, match=r"all values together must be at most 700 .got \d\d\d"):
        import_model(file)


CHANGED_TENSORS: dict[str, tuple[int, bytes, str]] = {
    "beyond the end": (8 + 4, struct.pack("<Q", 1 << 40), "buffer"),
    "of a type without a name": (8, struct.pack("<I", 999), "999 is not a valid"),
    "half a block": (8, struct.pack("<I", 12), "must be blocks of 256"),  # Q4_K
}


@pytest.mark.parametrize("case", CHANGED_TENSORS)
def test_a_tensor_must_be_whole_and_within_the_file(
    case: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, decoder_of("llama", tokenizer), tokenizer)
    data = bytearray(file.read_bytes())
    distance, content, message = CHANGED_TENSORS[case]
    # After the name: the number of dims, one dim, the type, the offset.
    place = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + distance
    data[place : place + len(content)] = content
    file.write_bytes(data)
    with pytest.raises(FormatError, match=f"must be a complete GGUF file: .*{message}"):
        import_model(file)
