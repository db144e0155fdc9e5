"""GGUF, the file format of llama.cpp: architecture, vocabulary and weights in one file.

Written and read for the families that llama.cpp has, with plain or quantized numbers (Q8_0, Q4_0
and Q4_1 are read as float32). Uses the package gguf, the extra of that name. A damaged file is a
FormatError, and every name and shape is checked before a number is read.

Byte-level BPE is llama.cpp's tokenizer `gpt2` with the name of a pre-split, SentencePiece its
tokenizer `llama`. An unknown pre-split is a FormatError, because text would get other ids.
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain import missing_package
from pretrain.export.families import FORMATS, GgufFormat, checked_config, is_native
from pretrain.export.layouts import (
    FormatError,
    ImportedModel,
    checked_vocab_size,
    find_tensors,
    padded_to,
    stored_tensors,
    to_parameters,
    to_stored,
    valid_stop_ids,
)
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.model.families import FAMILIES
from pretrain.model.layers import rope_frequencies
from pretrain.tokenizer.byte_level import Split, byte_level_bpe
from pretrain.tokenizer.load import PieceType, bpe_from_pieces
from pretrain.tokenizer.tokenizer import Tokenizer

_READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = 32  # numbers with one scale in Q8_0

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a value, by the number of its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The largest vocabularies have 256,000 tokens and 500,000 merges.
_MAX_ELEMENTS, _MAX_KEYS, _MAX_TENSORS, _MAX_DIMS = 1 << 22, 1 << 16, 1 << 17, 4

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


def gguf_format(family: object) -> GgufFormat:
    """The names of a family. FormatError for one that llama.cpp does not have."""
    known = {name: formats.gguf for name, formats in FORMATS.items() if formats.gguf is not None}
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
    _require_package()
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
    for field, key in names.keys.items():
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
    for stored in stored_tensors(config, names.layout, vocab_size=tokenizer.vocab_size):
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
        writer.write_tensor_data(data)
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
    _require_package()
    import gguf

    _check_header(file)
    try:
        reader = gguf.GGUFReader(file)
        values = {name: each.contents() for name, each in reader.fields.items()}
    except Exception as error:  # the package trusts the file, so any error is possible
        raise FormatError(
            f"{file} must be a complete GGUF file: {type(error).__name__}: {error!s:.200}"
        ) from None
    file_tensors = {file_tensor.name: file_tensor for file_tensor in reader.tensors}
    try:
        config = _config_of(values, file_tensors)
        tokenizer = read_vocabulary(values)
        vocab_size = tokenizer.vocab_size
        if "token_embd.weight" in file_tensors:
            vocab_size = checked_vocab_size(int(file_tensors["token_embd.weight"].shape[-1]))
        tokenizer = padded_to(tokenizer, vocab_size)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None
    shapes = {name: tuple(int(n) for n in e.shape[::-1]) for name, e in file_tensors.items()}
    layout = gguf_format(config.family).layout
    tensors = find_tensors(config, layout, vocab_size=vocab_size, shapes=shapes, where=file)
    for name, file_tensor in file_tensors.items():
        if file_tensor.tensor_type.name not in _READABLE:
            raise FormatError(
                f"{file}: the type of {name} must be one of {', '.join(_READABLE)} (got "
                f"{file_tensor.tensor_type.name})"
            )

    def read(name: str) -> Tensor:
        file_tensor = file_tensors[name]
        numbers = gguf.quants.dequantize(file_tensor.data, file_tensor.tensor_type)
        return torch.from_numpy(np.array(numbers, np.float32)).view(shapes[name])

    return ImportedModel("GGUF", (file,), config, tokenizer, tensors, read)


def _check_header(file: Path) -> None:
    """FormatError with the byte if keys, values and the list of tensors do not end within the file.

    The package gguf trusts the counts: an array of 10^12 elements in a file of 49 bytes keeps it
    busy for days.
    """
    place = 4  # after the magic number
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def number(form: str, most: int = 1 << 64) -> int:
            nonlocal place
            (value,) = struct.unpack_from(form, data, place)
            if value > most:
                raise ValueError(f"a count must be at most {most:,} (got {value:,})")
            place += struct.calcsize(form)
            return int(value)

        def skip(n_bytes: int) -> None:
            nonlocal place
            if n_bytes > len(data) - place:
                raise ValueError(f"{n_bytes:,} more bytes must follow (got {len(data) - place:,})")
            place += n_bytes

        def skip_values(kind: int, n: int = 1) -> None:
            if kind == _STRING:
                for _ in range(n):
                    skip(number("<Q"))
            elif kind in _SIZES:
                skip(n * _SIZES[kind])
            else:
                raise ValueError(f"values must be numbers, booleans or texts (got type {kind})")

        try:
            if (version := number("<I")) not in _VERSIONS:
                raise ValueError(
                    f"the version must be one of {_VERSIONS}, little-endian (got {version})"
                )
            n_tensors, n_keys = number("<Q", _MAX_TENSORS), number("<Q", _MAX_KEYS)
            for _ in range(n_keys):
                skip_values(_STRING)
                kind = number("<I")
                if kind == _ARRAY:
                    skip_values(number("<I"), number("<Q", _MAX_ELEMENTS))
                else:
                    skip_values(kind)
            for _ in range(n_tensors):
                skip_values(_STRING)
                skip(8 * number("<I", _MAX_DIMS) + 4 + 8)  # dims, type, offset
        except (struct.error, ValueError) as error:
            raise FormatError(
                f"{file} must be a complete GGUF file: byte {place:,}: {error}"
            ) from None


def _config_of(values: Mapping[str, Any], file_tensors: Mapping[str, Any]) -> ModelConfig:
    family = values.get("general.architecture")
    keys = gguf_format(family).keys
    fields = dict(FAMILIES[str(family)])
    for field, key in keys.items():
        value = values.get(f"{family}.{key}", _DEFAULTS.get(field))
        if value is not None or field not in _DEFAULTS:
            # Floats are float32 in the file: 0.00001 is read as 0.00000999999975.
            fields[field] = float(f"{value:.7g}") if isinstance(value, float) else value
    if not fields["tied_head"]:
        fields["tied_head"] = "output.weight" not in file_tensors
    config = checked_config(fields)
    _check_settings(values, config)
    return _with_rope_scaling(config, file_tensors)


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
    for key, value in values.items():
        name = key.removeprefix(f"{family}.")
        # Whether the model was finetuned after scaling changes nothing.
        if name == key or name in (*gguf_format(family).keys.values(), "rope.scaling.finetuned"):
            continue
        changes = name.startswith(("rope.", "attention.")) or name.endswith("_scale")
        if value not in known[name] if name in known else changes:
            expected = known[name][-1] if name in known else "absent"
            raise FormatError(f"{key:.100} must be {expected} (got {value!r:.60})")


def _with_rope_scaling(config: ModelConfig, file_tensors: Mapping[str, Any]) -> ModelConfig:
    """Recover rope_factor: the file has only the factor of each wavelength. These must be what the
    rule of Llama 3.1 gives with its published numbers and the file's original context."""
    if _ROPE_FACTORS not in file_tensors:
        return config
    factors = np.array(file_tensors[_ROPE_FACTORS].data, np.float32).ravel()
    if factors.shape != (config.d_head // 2,):  # before an array of the other length exists
        raise FormatError(
            f"{_ROPE_FACTORS} must have {config.d_head // 2} numbers (got {len(factors)})"
        )
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
        split, whole_words = tokenizer.split, bool(description["model"].get("ignore_merges"))
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
    try:
        if model == "llama":
            scores = values.get("tokenizer.ggml.scores")
            if not isinstance(scores, list) or len(scores) != len(tokens):
                raise FormatError("tokenizer.ggml.scores must have a number for each token")
            pieces = list(zip(tokens, map(float, scores), map(int, kinds), strict=True))
            has_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
            tokenizer = Tokenizer(bpe_from_pieces(pieces, has_prefix=has_prefix))
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
            tokenizer = Tokenizer(library_tokenizer)
    except BaseException as error:
        # The library raises bare Exceptions, and its PanicException is only a BaseException.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"the tokenizer cannot be used: {error!s:.300}") from None
    # What the file does not have is as llama.cpp has it for this vocabulary.
    add_bos = values.get("tokenizer.ggml.add_bos_token", model == "llama" or split == "llama3")
    tokenizer.add_bos = add_bos is True
    tokenizer.stop_ids = valid_stop_ids(tokenizer, values.get("tokenizer.ggml.eos_token_id"))
    return tokenizer


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf files", "gguf", extra="gguf")
