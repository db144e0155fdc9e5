"""GGUF, the file format of llama.cpp: architecture, vocabulary and weights in one file.

Written and read for the families that llama.cpp has, with plain or quantized numbers (Q8_0, Q4_0
and Q4_1 are read as float32). Uses the package gguf, the extra of that name. A damaged file is a
FormatError, and every name and shape is checked before a number is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain import missing_package
from pretrain.export.families import FORMATS, GgufFormat, is_native
from pretrain.export.gguf_header import check_header
from pretrain.export.gguf_vocabulary import read_vocabulary, write_vocabulary
from pretrain.export.imported import (
    ImportedModel,
    checked_parameters,
    checked_vocab_size,
    padded_to,
)
from pretrain.export.layouts import (
    FormatError,
    Read,
    Rounded,
    StoredTensor,
    ignore_rounded,
    match_tensors,
    stored_tensors,
    to_parameters,
    to_stored,
)
from pretrain.model.config import ModelConfig
from pretrain.model.families import FAMILIES
from pretrain.model.rope import rope_frequencies
from pretrain.tokenizer.tokenizer import Tokenizer

NUMBERS = ("f32", "f16", "q8_0")
"""The number types that can be written."""
_READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = 32  # numbers with one scale in Q8_0

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# Values of llama.cpp for missing keys.
_DEFAULTS = {"n_kv_heads": None, "rope_theta": 10_000.0, "rope_original_context": None}


def gguf_format(family: Any) -> GgufFormat:
    """The names of a family. FormatError for one that llama.cpp does not have."""
    formats = FORMATS.get(family) if isinstance(family, str) else None
    if formats is None or formats.gguf is None:
        raise FormatError(f"the architecture must be one of {gguf_families()} (got {family!r:.60})")
    return formats.gguf


def gguf_families() -> str:
    return ", ".join(family for family, formats in FORMATS.items() if formats.gguf is not None)


def is_gguf(file: Path) -> bool:
    """Whether a file starts with the magic number of GGUF."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"GGUF"


def require_gguf_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """ValueError for a model that llama.cpp cannot run, or if the package gguf is missing."""
    _require_package()
    formats = FORMATS.get(config.family)
    if formats is None or formats.gguf is None or not is_native(config):
        raise ValueError(
            f"a model for gguf must be of a family {gguf_families()}, without changes to its "
            f"architecture (got one of {config.family}); --format hf takes any model"
        )
    if tokenizer.kind != "bpe":
        raise ValueError(f"the tokenizer for gguf must be of the kind bpe (got {tokenizer.kind})")


def write_gguf(
    file: Path,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
    read: Read,
    numbers: str = "f32",
    rounded: Rounded = ignore_rounded,
) -> None:
    """Write a model file, with one tensor at a time in memory. `rounded` is called with every
    parameter that the file has in float16 or in blocks of 8 bits, as the file has it.

    Vectors and learned positions stay float32; rows that are not full blocks of 32 become float16.
    """
    import gguf

    require_gguf_model(config, tokenizer)
    writer = gguf.GGUFWriter(file, arch=config.family)
    _add_description(writer, config, tokenizer, numbers)
    tensors = stored_tensors(
        config, gguf_format(config.family).layout, vocab_size=tokenizer.vocab_size
    )
    kinds = [getattr(gguf.GGMLQuantizationType, _kind_of(each, numbers)) for each in tensors]
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for stored, kind in zip(tensors, kinds, strict=True):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = torch.Size(stored.shape).numel() // block * block_bytes
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(stored.name, stored.shape, dtype, n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for stored, kind in zip(tensors, kinds, strict=True):
        data = gguf.quants.quantize(to_stored(stored, read).float().numpy(), kind)
        writer.write_tensor_data(data)
        if kind != gguf.GGMLQuantizationType.F32:
            there = torch.from_numpy(gguf.quants.dequantize(data, kind)).view(stored.shape)
            for name, values in to_parameters([stored], {stored.name: there}.__getitem__):
                rounded(name, values)
    writer.close()


def _add_description(writer: Any, config: ModelConfig, tokenizer: Tokenizer, numbers: str) -> None:
    """Add everything but the tensors."""
    import gguf

    writer.add_name("pretrain")
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[numbers]))
    values = {
        **asdict(config),
        "d_ff": config.feed_forward_width,
        "n_kv_heads": config.kv_heads,
    }
    for field, key in gguf_format(config.family).keys.items():
        value = values[field]
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{config.family}.{key}", value)
    writer.add_vocab_size(tokenizer.vocab_size)
    if config.position == "rotary":
        writer.add_rope_dimension_count(config.d_head)
    write_vocabulary(writer, tokenizer)


def _kind_of(stored: StoredTensor, numbers: str) -> str:
    if len(stored.shape) == 1 or stored.parameters == ("position_embedding.weight",):
        return "F32"
    if numbers == "q8_0" and stored.shape[-1] % _BLOCK:
        return "F16"
    return numbers.upper()


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """The factor of each rotary wavelength (E/2), as llama.cpp stores the scaling of Llama 3.1;
    None without scaling."""
    if config.rope_factor == 1.0:
        return None
    plain = rope_frequencies(config, scaled=False)
    factors: NDArray[np.float32] = (plain / rope_frequencies(config)).numpy()
    return factors


def open_gguf(file: Path) -> ImportedModel:
    """Open and check a model file. FormatError if it is damaged, or of another architecture."""
    _require_package()
    import gguf

    check_header(file)
    try:
        reader = gguf.GGUFReader(file)
        values = {name: each.contents() for name, each in reader.fields.items()}
    except Exception as error:  # the package trusts the file, so any error is possible
        raise FormatError(
            f"{file} is not a complete GGUF file: {type(error).__name__}: {error!s:.200}"
        ) from None
    file_tensors = {file_tensor.name: file_tensor for file_tensor in reader.tensors}
    try:
        config = _config_of(values, file_tensors, n_tensors=len(file_tensors))
        tokenizer = read_vocabulary(values)
        vocab_size = tokenizer.vocab_size
        if "token_embd.weight" in file_tensors:
            vocab_size = checked_vocab_size(int(file_tensors["token_embd.weight"].shape[-1]))
        layout = gguf_format(config.family).layout
        tensors = stored_tensors(config, layout, vocab_size=vocab_size)
        tokenizer = padded_to(tokenizer, vocab_size)
    except (FormatError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{file}: {error}") from None
    shapes = {name: tuple(int(n) for n in e.shape[::-1]) for name, e in file_tensors.items()}
    names = match_tensors(tensors, shapes, layout=layout, what=str(file))
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

    def parameters() -> Iterator[tuple[str, Tensor]]:
        return checked_parameters(tensors, read, layout=layout, names=names)

    return ImportedModel("GGUF", (file,), config, tokenizer, parameters)


def _config_of(
    values: Mapping[str, Any], file_tensors: Mapping[str, Any], *, n_tensors: int
) -> ModelConfig:
    family = values.get("general.architecture")
    names = gguf_format(family)
    fields = FAMILIES[str(family)]()
    for field, key in names.keys.items():
        value = values.get(f"{family}.{key}", _DEFAULTS.get(field))
        if value is None and field in _DEFAULTS:
            continue
        number_type = float if field in ("norm_epsilon", "rope_theta") else int
        if type(value) is not number_type:
            raise FormatError(f"{family}.{key} must be {number_type.__name__} (got {value!r:.60})")
        # Floats are float32 in the file: 0.00001 is read as 0.00000999999975.
        fields[field] = float(f"{value:.7g}") if number_type is float else value
    if fields["n_layers"] > n_tensors:
        raise FormatError(f"{fields['n_layers']:,} layers in {n_tensors:,} tensors")
    if "head" in names.layout.outside.values():
        fields["tied_head"] = "output.weight" not in file_tensors
    try:
        config = ModelConfig(**fields)
    except ValueError as error:
        raise FormatError(str(error)) from None
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
        if name in known and value not in known[name]:
            raise FormatError(f"{key:.100} must be {known[name][-1]} (got {value!r:.60})")
        if name not in known and changes:
            raise FormatError(f"{key:.100} must be absent (got {value!r:.60})")


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
    expected = rope_factors(scaled)
    if expected is None:
        expected = np.ones(config.d_head // 2, np.float32)
    if not np.allclose(expected, factors, rtol=1e-4):
        raise FormatError(f"{_ROPE_FACTORS} does not agree with the rule of Llama 3.1")
    return scaled


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf files", "gguf", extra="gguf")
