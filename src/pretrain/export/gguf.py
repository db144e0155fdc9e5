"""GGUF, the file format of llama.cpp: architecture, vocabulary and weights in one file.

Written and read for the families that llama.cpp has, with plain or quantized numbers (Q8_0, Q4_0
and Q4_1 are read as float32). Uses the package gguf, the extra of that name. A damaged file is a
FormatError, and every name and shape is checked before a number is read.

Byte-level BPE is llama.cpp's tokenizer `gpt2` with the name of a pre-split, SentencePiece its
tokenizer `llama`. An unknown pre-split is a FormatError, because text would get other ids.
"""

from __future__ import annotations

import errno
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain import needs_package
from pretrain.export.families import FORMATS, FamilyFormat, checked_config, is_native
from pretrain.export.layouts import (
    FormatError,
    ImportedModel,
    Shape,
    matched_model,
    stored_tensors,
    to_parameters,
    to_stored,
    valid_stop_ids,
)
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.model.families import FAMILIES
from pretrain.model.layers import rope_frequencies
from pretrain.tokenizer.byte_level import Split, byte_level_bpe, split_of
from pretrain.tokenizer.load import PieceType, bpe_from_pieces
from pretrain.tokenizer.tokenizer import Tokenizer

_READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_ROPE_FACTORS = "rope_freqs.weight"
_CHAT_TEMPLATE = "tokenizer.chat_template"
_BLOCK = 32  # numbers with one scale in Q8_0

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Values of one type, by its number.
_DTYPES = dict(enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 ?".split())) | {10: "<u8", 11: "<i8", 12: "<f8"}
# The largest vocabularies have 256,000 tokens and 500,000 merges.
_MAX_ELEMENTS, _MAX_KEYS, _MAX_TENSORS, _MAX_DIMS = 1 << 21, 1 << 16, 1 << 17, 4

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# Values of llama.cpp for missing keys.
_DEFAULTS = {"n_kv_heads": None, "rope_theta": 10_000.0, "rope_original_context": None}
# llama.cpp's name of a pre-split -> ours, and whether a word in the vocabulary is one token at once
# (ignore_merges).
_SPLITS: dict[str, tuple[Split, bool]] = {
    "gpt-2": ("gpt2", False),
    "dbrx": ("llama3", False),
    "llama-bpe": ("llama3", True),
    "llama3": ("llama3", True),
    "llama-v3": ("llama3", True),
    "gpt-4o": ("o200k", False),
    "smollm": ("smollm", False),
}


def gguf_format(family: object) -> FamilyFormat:
    """The names of a family. FormatError for one that llama.cpp does not have."""
    known = {name: names for name, names in FORMATS.items() if names.gguf_keys}
    if family not in list(known):  # which may be unhashable
        raise FormatError(
            f"a GGUF file must be of one of the families {', '.join(known)} (got {family!r:.60}); "
            "--format hf exports any model"
        )
    return known[str(family)]


def write_gguf(file: Path, *, decoder: Decoder, tokenizer: Tokenizer, numbers: str = "f32") -> None:
    """Write a model file, with a copy of one tensor at a time. The decoder's weights are rounded to
    the numbers in the file: floats, or blocks of 8 bits. ValueError for a model that llama.cpp
    cannot run, or if the package gguf is missing.

    Vectors and learned positions stay float32; rows that are not full blocks of 32 become float16.
    """
    with needs_package("gguf files", "gguf", extra="gguf"):
        import gguf

    config, names = decoder.config, gguf_format(decoder.config.family)
    if not is_native(config):
        raise ValueError(
            f"a model for gguf must have the architecture of its family {config.family} without "
            "changes; --format hf exports any model"
        )
    if tokenizer.kind != "bpe":
        raise ValueError(f"the tokenizer for gguf must be of the kind bpe (got {tokenizer.kind})")
    writer = gguf.GGUFWriter(file, arch=config.family)
    writer.add_name("pretrain")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[numbers]])
    settings = {**asdict(config), "d_ff": config.feed_forward_width, "n_kv_heads": config.kv_heads}
    for field, key in names.gguf_keys.items():
        add = writer.add_float32 if isinstance(settings[field], float) else writer.add_uint32
        add(f"{config.family}.{key}", settings[field])
    writer.add_vocab_size(tokenizer.vocab_size)
    if config.position == "rotary":
        writer.add_rope_dimension_count(config.d_head)
    write_vocabulary(writer, tokenizer)
    factors = rope_factors(config)
    if config.rope_factor != 1.0:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    tensors = []
    for stored in stored_tensors(config, names.gguf_layout, vocab_size=tokenizer.vocab_size):
        name = numbers.upper()
        if len(stored.shape) == 1 or stored.parameters == ("position_embedding.weight",):
            name = "F32"
        elif numbers == "q8_0" and stored.shape[-1] % _BLOCK:
            name = "F16"
        kind = gguf.GGMLQuantizationType[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = torch.Size(stored.shape).numel() // block * block_bytes
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(stored.name, stored.shape, dtype, n_bytes, raw_dtype=kind)
        tensors.append((stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if config.rope_factor != 1.0:
        writer.write_tensor_data(factors)
    own = {name: p.detach() for name, p in decoder.named_parameters()}
    for stored, kind in tensors:
        data = gguf.quants.quantize(to_stored(stored, own).float().numpy(), kind)
        try:
            writer.write_tensor_data(data)
        except OSError as error:  # numpy's has no number when the disk is full
            raise OSError(error.errno or errno.ENOSPC, str(error), str(file)) from None
        if kind != gguf.GGMLQuantizationType.F32:
            rounded = torch.from_numpy(gguf.quants.dequantize(data, kind)).view(stored.shape)
            for name, values in to_parameters(stored, rounded):
                own[name].copy_(values)
    writer.close()


def rope_factors(config: ModelConfig) -> NDArray[np.float32]:
    """The factor of each rotary wavelength (E/2), as llama.cpp stores the scaling of Llama 3.1."""
    factors: NDArray[np.float32] = (
        rope_frequencies(config, scaled=False) / rope_frequencies(config)
    ).numpy()
    return factors


def open_gguf(file: Path) -> ImportedModel:
    """Open and check a model file. FormatError if it is damaged, or of another architecture."""
    values, tensors = _read_file(file)
    try:
        config = _config_of(values, tensors)
        tokenizer = read_vocabulary(values)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    embedding = tensors.get("token_embd.weight")
    return matched_model(
        "GGUF",
        (file,),
        config=config,
        layout=gguf_format(config.family).gguf_layout,
        tokenizer=tokenizer,
        vocab_size=embedding.shape[0] if embedding else tokenizer.vocab_size,
        tensors={name: (tensor.shape, tensor.type) for name, tensor in tensors.items()},
        readable=_READABLE,
        read=lambda name: torch.from_numpy(tensors[name].read()),
        where=file,
    )


@dataclass(frozen=True, slots=True)
class _FileTensor:
    shape: Shape
    type: str
    data: NDArray[np.uint8]
    """The bytes of the file, in the shape of the tensor."""

    def read(self) -> NDArray[np.float32]:
        """The numbers in the tensor's shape."""
        import gguf

        return np.array(
            gguf.quants.dequantize(self.data, gguf.GGMLQuantizationType[self.type]), np.float32
        )


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, _FileTensor]]:
    """The keys of a file with their values, and its tensors. FormatError with the byte if one of
    them does not end within the file.

    The reader of the package gguf trusts the counts (an array of 10^12 elements in a file of 49
    bytes keeps it busy for days), and makes several objects of each element.
    """
    with needs_package("gguf files", "gguf", extra="gguf"):
        import gguf

    place, n_elements = 4, 0  # after the magic number
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def take(n_bytes: int) -> bytes:
        nonlocal place
        if n_bytes > len(mapped) - place:
            raise ValueError(f"{n_bytes:,} more bytes must follow (got {len(mapped) - place:,})")
        place += n_bytes
        return mapped[place - n_bytes : place]

    def bounded(value: int, most: int, what: str = "a count") -> int:
        if value > most:
            raise ValueError(f"{what} must be at most {most:,} (got {value:,})")
        return value

    def number(form: str, most: int = 1 << 64) -> int:
        return bounded(int(struct.unpack(form, take(struct.calcsize(form)))[0]), most)

    def text() -> str:
        return take(int.from_bytes(take(8), "little")).decode()

    def elements(kind: int, n: int) -> list[Any]:
        nonlocal n_elements
        n_elements = bounded(n_elements + n, _MAX_ELEMENTS, "all values together")
        if kind == _STRING:
            return [text() for _ in range(n)]
        if kind not in _DTYPES:
            raise ValueError(f"values must be numbers, booleans or texts (got type {kind})")
        dtype = np.dtype(_DTYPES[kind])
        numbers: list[Any] = np.frombuffer(take(n * dtype.itemsize), dtype).tolist()
        return numbers

    values: dict[str, Any] = {}
    tensors: dict[str, _FileTensor] = {}
    try:
        if (version := number("<I")) not in _VERSIONS:
            raise ValueError(
                f"the version must be one of {_VERSIONS}, little-endian (got {version})"
            )
        n_tensors, n_keys = number("<Q", _MAX_TENSORS), number("<Q", _MAX_KEYS)
        for _ in range(n_keys):
            key, kind = text(), number("<I")
            if kind == _ARRAY:
                values[key] = elements(number("<I"), number("<Q"))
            else:
                values[key] = elements(kind, 1)[0]
        described = []
        for _ in range(n_tensors):
            name, n_dims = text(), number("<I", _MAX_DIMS)
            shape = tuple(number("<Q") for _ in range(n_dims))[::-1]
            described.append((name, shape, number("<I"), number("<Q")))
        alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        data_start = place + -place % alignment
        for name, shape, type_, offset in described:
            kind = gguf.GGMLQuantizationType(type_)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f"the rows of {name:.200} must be blocks of {block}")
            row_bytes = shape[-1] // block * block_bytes
            n_bytes = math.prod(shape[:-1]) * row_bytes
            # ValueError where the file ends before the data does.
            data = np.frombuffer(mapped, np.uint8, n_bytes, data_start + offset)
            tensors[name] = _FileTensor(shape, kind.name, data.reshape(*shape[:-1], row_bytes))
        if len(values) + len(tensors) < n_keys + n_tensors:
            raise ValueError("the names of keys and of tensors must be different")
    except (struct.error, ValueError, TypeError, ArithmeticError) as error:
        raise FormatError(f"{file} must be a complete GGUF file: byte {place:,}: {error}") from None
    return values, tensors


def _config_of(values: Mapping[str, Any], tensors: Mapping[str, _FileTensor]) -> ModelConfig:
    family = values.get("general.architecture")
    keys = gguf_format(family).gguf_keys
    fields = dict(FAMILIES[str(family)])
    for field, key in keys.items():
        value = values.get(f"{family}.{key}", _DEFAULTS.get(field))
        if value is not None or field not in _DEFAULTS:
            # Floats are float32 in the file: 0.00001 is read as 0.00000999999975.
            fields[field] = float(f"{value:.7g}") if isinstance(value, float) else value
    if not fields["tied_head"]:
        fields["tied_head"] = "output.weight" not in tensors
    config = checked_config(fields)
    _check_settings(values, config)
    return _with_rope_scaling(config, tensors)


def _check_settings(values: Mapping[str, Any], config: ModelConfig) -> None:
    """FormatError for a setting with which llama.cpp would compute something else, and for unknown
    keys of positions, attention or scales."""
    family = config.family
    known: dict[str, tuple[Any, ...]] = {
        "rope.dimension_count": (config.d_head,),
        "attention.key_length": (config.d_head,),
        "attention.value_length": (config.d_head,),
        "attention.causal": (True,),
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0.0, 1.0),
        "rope.scale_linear": (0.0, 1.0),
        "rope.scaling.attn_factor": (0.0, 1.0),
        "expert_count": (0,),
    }
    # Whether the model was finetuned after scaling changes nothing.
    free = (*gguf_format(family).gguf_keys.values(), "rope.scaling.finetuned")
    for key, value in values.items():
        name = key.removeprefix(f"{family}.")
        if name == key or name in free:
            continue
        changes = name.startswith(("rope.", "attention.")) or name.endswith("_scale")
        if value not in known[name] if name in known else changes:
            expected = known[name][-1] if name in known else "absent"
            raise FormatError(f"{key:.100} must be {expected} (got {value!r:.60})")


def _with_rope_scaling(config: ModelConfig, tensors: Mapping[str, _FileTensor]) -> ModelConfig:
    """Recover rope_factor: the file has only the factor of each wavelength. These must be what the
    rule of Llama 3.1 gives with its published numbers and the file's original context."""
    if _ROPE_FACTORS not in tensors:
        return config
    stored, n = tensors[_ROPE_FACTORS], config.d_head // 2
    if (stored.shape, stored.type) != ((n,), "F32"):  # before an array of the other length exists
        raise FormatError(
            f"{_ROPE_FACTORS} must have {n} numbers of type F32 (got {math.prod(stored.shape)} of "
            f"type {stored.type})"
        )
    factors = stored.read()
    largest = float(f"{factors.max(initial=1.0):.7g}")
    try:
        scaled = replace(config, rope_factor=largest)
    except ValueError as error:
        raise FormatError(f"{_ROPE_FACTORS}: {error}") from None
    if not np.allclose(rope_factors(scaled), factors, rtol=1e-4):
        raise FormatError(
            f"{_ROPE_FACTORS} must have the numbers of Llama 3.1's rule for the factor {largest:g} "
            f"(got others, the first {factors[0]:g}); this scaling of positions is not supported"
        )
    return scaled


def write_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """Add tokens, kinds, merges or scores, and special ids to a GGUFWriter."""
    description = tokenizer.description
    entries = [tokenizer.id_to_token(id_) for id_ in range(tokenizer.vocab_size)]
    kinds = {
        token["content"]: PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        for token in description["added_tokens"]
    }
    merges = [tuple(merge) for merge in description["model"]["merges"]]
    if tokenizer.space_prefix is not None:
        kinds |= {f"<0x{byte:02X}>": PieceType.BYTE for byte in range(256)}
        kinds[description["model"]["unk_token"]] = PieceType.UNKNOWN
        # A token that is merged earlier has a higher score; one that is never merged needs none.
        first = {left + right: n for n, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(first.get(entry, 0)) for entry in entries])
        writer.add_add_space_prefix(bool(tokenizer.space_prefix))
    else:
        names: dict[Any, str] = {known: name for name, known in reversed(_SPLITS.items())}
        split, whole_words = split_of(description), bool(description["model"].get("ignore_merges"))
        name = names.get((split, whole_words)) or names.get((split, not whole_words))
        if name is None:
            known_splits = ", ".join(dict.fromkeys(split for split, _ in _SPLITS.values()))
            raise ValueError(
                f"the pre-split for llama.cpp must be one of {known_splits} (got "
                f"{split or 'another'}); --format hf takes any tokenizer"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(entries)
    writer.add_token_types([kinds.get(entry, PieceType.NORMAL) for entry in entries])
    writer.add_bos_token_id(tokenizer.start_of_text)
    writer.add_eos_token_id(tokenizer.stop_ids[0])
    # Every document in our training text starts with this token.
    writer.add_add_bos_token(tokenizer.add_bos)
    if "chat_template" in tokenizer.carried:
        writer.add_chat_template(tokenizer.carried["chat_template"])
    if "pad_token" in tokenizer.carried:
        writer.add_pad_token_id(tokenizer.token_to_id(tokenizer.carried["pad_token"]))


def read_vocabulary(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a file's key-value pairs. FormatError if it cannot be represented here."""
    tokens, kinds = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise FormatError("tokenizer.ggml.tokens must be a list of texts")
    kinds = kinds if isinstance(kinds, list) else [PieceType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) < len(tokens):
        raise FormatError(
            "tokenizer.ggml.tokens must be different, and tokenizer.ggml.token_type as many (got "
            f"{len(tokens):,}, of which {len(set(tokens)):,} are different, and {len(kinds):,})"
        )
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if model not in ("gpt2", "llama"):
        raise FormatError(f"tokenizer.ggml.model must be gpt2 or llama (got {model!r:.60})")
    split, whole_words = _SPLITS.get(str(pre), (None, False))
    named = dict(enumerate(tokens))
    end, start = (named.get(values.get(f"tokenizer.ggml.{k}_token_id", -1)) for k in ("eos", "bos"))
    try:
        if model == "llama":
            scores = values.get("tokenizer.ggml.scores")
            if not isinstance(scores, list) or len(scores) != len(tokens):
                raise FormatError("tokenizer.ggml.scores must have a number for each token")
            pieces = list(zip(tokens, map(float, scores), map(int, kinds), strict=True))
            has_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
            tokenizer = Tokenizer(
                bpe_from_pieces(pieces, has_prefix=has_prefix), end=end, start=start
            )
        else:
            if split is None:
                raise FormatError(
                    f"tokenizer.ggml.pre must be one of {', '.join(_SPLITS)} (got {pre!r:.60}): "
                    "another pre-split would give text other ids"
                )
            merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges", [])]
            if any(len(merge) != 2 for merge in merges):
                raise FormatError("each of tokenizer.ggml.merges must be two tokens and a space")
            kind_of = dict(zip(tokens, kinds, strict=True))
            ids = {token: id_ for id_, token in enumerate(tokens)}
            library_tokenizer = byte_level_bpe(
                {token: id_ for token, id_ in ids.items() if kind_of[token] == PieceType.NORMAL},
                merges,
                split=split,
                added={t: id_ for t, id_ in ids.items() if kind_of[t] != PieceType.NORMAL},
                non_special={t for t in tokens if kind_of[t] == PieceType.USER_DEFINED},
                ignore_merges=whole_words,
            )
            tokenizer = Tokenizer(library_tokenizer, end=end, start=start)
    except BaseException as error:
        # The library raises bare Exceptions, and its PanicException is only a BaseException.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"the tokenizer cannot be used: {error!s:.300}") from None
    # What the file does not have is as llama.cpp has it for this vocabulary.
    add_bos = values.get("tokenizer.ggml.add_bos_token", model == "llama" or split == "llama3")
    tokenizer.add_bos = add_bos is True
    tokenizer.stop_ids = valid_stop_ids(tokenizer, values.get("tokenizer.ggml.eos_token_id"))
    padding, template = values.get("tokenizer.ggml.padding_token_id"), values.get(_CHAT_TEMPLATE)
    if type(padding) is int and 0 <= padding < tokenizer.vocab_size:
        tokenizer.carried["pad_token"] = tokenizer.id_to_token(padding)
    if isinstance(template, str):
        tokenizer.carried["chat_template"] = template
    return tokenizer
