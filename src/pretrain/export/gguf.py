"""GGUF, the file of llama.cpp and what builds on it: one file with architecture, vocabulary,
weights.

Written for gpt2 and llama, the families that llama.cpp has; read for the same, plain or quantized
(Q8_0, Q4_0, Q4_1 are turned into float32). By the package gguf, the extra of that name. A damaged
file is a FormatError, and every name and shape is checked before a number is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.export.architectures import is_native
from pretrain.export.gguf_header import refuse_broken_header
from pretrain.export.gguf_vocabulary import read_vocabulary, write_vocabulary
from pretrain.export.imported import ImportedModel, checked_parameters, checked_vocab_size, fitting
from pretrain.export.layouts import (
    GGUF,
    FormatError,
    Read,
    Rounded,
    StoredTensor,
    leave,
    match_tensors,
    stored_tensors,
    to_parameters,
    to_stored,
)
from pretrain.model import ModelConfig
from pretrain.model.families import FAMILIES
from pretrain.model.rope import rope_frequencies
from pretrain.tokenizer import Tokenizer

NUMBERS = ("f32", "f16", "q8_0")
"""How numbers may be written."""
_READ = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = 32  # numbers that share a scale in Q8_0

# Our field -> their key, after the name of the architecture.
_KEYS = {
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "context_length": "context_length",
}
KEYS: dict[str, dict[str, str]] = {
    "gpt2": {**_KEYS, "norm_epsilon": "attention.layer_norm_epsilon"},
    "llama": {
        **_KEYS,
        "n_kv_heads": "attention.head_count_kv",
        "norm_epsilon": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "rope_original_context": "rope.scaling.original_context_length",
    },
}
_DEFAULTS = {"n_kv_heads": None, "rope_theta": 10_000.0, "rope_original_context": None}


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"GGUF"


def refuse_architecture(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """ValueError for a model that llama.cpp could not run, or without the package that writes."""
    _require()
    if config.family not in GGUF or not is_native(config):
        raise ValueError(
            f"llama.cpp has no architecture for this model of the family {config.family}; legal "
            f"for gguf: {', '.join(GGUF)} with their own choices. --format hf takes any model"
        )
    if tokenizer.kind != "bpe":
        raise ValueError(f"llama.cpp has no tokenizer of the kind {tokenizer.kind}; legal: bpe")


def write_gguf(
    file: Path,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
    read: Read,
    numbers: str = "f32",
    rounded: Rounded = leave,
) -> None:
    """Write a model file; one tensor at a time is held in memory. `rounded` is given our parameters
    whose numbers are rounded in the file, to float16 or to blocks of 8 bits, as they are there.

    Vectors and learned positions stay float32; rows that are not whole blocks of 32 become float16.
    """
    import gguf

    refuse_architecture(config, tokenizer)
    writer = gguf.GGUFWriter(file, arch=config.family)
    _add_description(writer, config, tokenizer, numbers)
    tensors = stored_tensors(config, GGUF[config.family], vocab_size=tokenizer.vocab_size)
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
    """Everything in the file but tensors."""
    import gguf

    writer.add_name("pretrain")
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[numbers]))
    for ours, theirs in KEYS[config.family].items():
        value = getattr(config, ours)
        value = {"d_ff": config.feed_forward_width, "n_kv_heads": config.kv_heads}.get(ours, value)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{config.family}.{theirs}", value)
    writer.add_vocab_size(tokenizer.vocab_size)
    if config.position == "rotary":
        writer.add_rope_dimension_count(config.d_head)
    write_vocabulary(writer, tokenizer)


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def _kind_of(stored: StoredTensor, numbers: str) -> str:
    if len(stored.shape) == 1 or stored.parts == ("position_embedding.weight",):
        return "F32"
    if numbers == "q8_0" and stored.shape[-1] % _BLOCK:
        return "F16"
    return numbers.upper()


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """What each rotary wavelength is multiplied by, (E/2), as llama.cpp has Llama 3.1's positions;
    None where nothing is."""
    if config.rope_factor == 1.0:
        return None
    plain, stretched = rope_frequencies(config, scaled=False), rope_frequencies(config)
    factors: NDArray[np.float32] = (plain / stretched).numpy()
    return factors


def open_gguf(file: Path) -> ImportedModel:
    """A model file, checked. FormatError for one that is damaged, or is not one of ours."""
    _require()
    import gguf

    refuse_broken_header(file)
    try:
        reader = gguf.GGUFReader(file)
        values = {name: each.contents() for name, each in reader.fields.items()}
    except Exception as error:  # the package trusts the file: anything may come of it
        raise FormatError(
            f"{file} is no whole GGUF file: {type(error).__name__}: {error!s:.200}"
        ) from None
    entries = {each.name: each for each in reader.tensors}
    try:
        config = _config_of(values, entries, n_tensors=len(entries))
        tokenizer = read_vocabulary(values)
        vocab_size = tokenizer.vocab_size
        if "token_embd.weight" in entries:
            vocab_size = checked_vocab_size(int(entries["token_embd.weight"].shape[-1]))
        layout = GGUF[config.family]
        tensors = stored_tensors(config, layout, vocab_size=vocab_size)
        tokenizer = fitting(tokenizer, vocab_size)
    except (FormatError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{file}: {error}") from None
    shapes = {name: tuple(int(n) for n in e.shape[::-1]) for name, e in entries.items()}
    names = match_tensors(tensors, shapes, layout=layout, what=str(file))
    odd = [
        f"{e.name} is {e.tensor_type.name}"
        for e in entries.values()
        if e.tensor_type.name not in _READ
    ]
    if odd:
        raise FormatError(f"{file}: {odd[0]}; legal: {', '.join(_READ)}")

    def read(name: str) -> Tensor:
        entry = entries[name]
        numbers = gguf.quants.dequantize(entry.data, entry.tensor_type)
        return torch.from_numpy(np.array(numbers, np.float32)).view(shapes[name])

    def parameters() -> Iterator[tuple[str, Tensor]]:
        return checked_parameters(tensors, read, layout=layout, names=names)

    return ImportedModel("GGUF", (file,), config, tokenizer, parameters)


def _config_of(
    values: Mapping[str, Any], entries: Mapping[str, Any], *, n_tensors: int
) -> ModelConfig:
    family = values.get("general.architecture")
    if family not in KEYS:
        raise FormatError(f"the architecture {family!r:.60} is not one of {', '.join(KEYS)}")
    found = FAMILIES[family]()
    for ours, theirs in KEYS[family].items():
        value = values.get(f"{family}.{theirs}", _DEFAULTS.get(ours))
        wants_float = ours in ("norm_epsilon", "rope_theta")
        if value is None and ours in _DEFAULTS:
            continue
        if type(value) is not (float if wants_float else int):
            raise FormatError(f"{family}.{theirs} is {value!r:.60}")
        # Their numbers are float32: 0.00001 comes as 0.00000999999975.
        found[ours] = float(f"{value:.7g}") if wants_float else value
    if found["n_layers"] > n_tensors:
        raise FormatError(f"{found['n_layers']:,} layers in {n_tensors:,} tensors")
    head = "output.weight" if family == "llama" else None
    found["tied_head"] = head not in entries
    try:
        config = ModelConfig(**found)
    except ValueError as error:
        raise FormatError(str(error)) from None
    _refuse_settings(values, config)
    return _with_stretched_positions(config, entries)


def _refuse_settings(values: Mapping[str, Any], config: ModelConfig) -> None:
    """FormatError for what llama.cpp would compute otherwise than we. Of the keys that change
    positions, attention or scales, one that is not known here is refused too."""
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
        # Whether positions were tuned after they were stretched changes nothing.
        if name == key or name in (*KEYS[family].values(), "rope.scaling.finetuned"):
            continue
        changes = name.startswith(("rope.", "attention.")) or name.endswith("_scale")
        if name in known and value not in known[name]:
            raise FormatError(f"{key:.100} is {value!r:.60}; legal: {known[name][-1]}")
        if name not in known and changes:
            raise FormatError(f"{key:.100} is {value!r:.60}; legal: the key is not there")


def _with_stretched_positions(config: ModelConfig, entries: Mapping[str, Any]) -> ModelConfig:
    """The file holds only what each wavelength is multiplied by; it must be what Llama 3.1's rule
    gives with its published numbers and the file's original context."""
    from dataclasses import replace

    if _ROPE_FACTORS not in entries:
        return config
    factors = np.array(entries[_ROPE_FACTORS].data, np.float32).ravel()
    if factors.shape != (config.d_head // 2,):  # before anything of that length is made
        raise FormatError(f"{_ROPE_FACTORS} is of {len(factors)}, not {config.d_head // 2}")
    largest = float(f"{factors.max(initial=1.0):.7g}")
    try:
        stretched = replace(config, rope_factor=largest)
    except ValueError as error:
        raise FormatError(f"{_ROPE_FACTORS}: {error}") from None
    ours = rope_factors(stretched)
    ours = np.ones(config.d_head // 2, np.float32) if ours is None else ours
    if not np.allclose(ours, factors, rtol=1e-4):
        raise FormatError(f"{_ROPE_FACTORS} is not what Llama 3.1's rule gives")
    return stretched


def _require() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("gguf files need the package gguf: python -m pip install 'pretrain[gguf]'")
