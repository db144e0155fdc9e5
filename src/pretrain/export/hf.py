"""A Hugging Face directory, as transformers writes and reads it: config.json, safetensors,
tokenizer.

Only safetensors are read: a .bin or .pt is a pickle, which can run any code when it is opened.
Every name and shape is checked against config.json before a number is read.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.export.families import hf_layout, is_native
from pretrain.export.hf_config import from_hf_config, to_hf_config
from pretrain.export.layouts import (
    FormatError,
    ImportedModel,
    Shape,
    StoredTensor,
    checked_vocab_size,
    find_tensors,
    padded_to,
    stored_tensors,
    to_parameters,
    to_stored,
    valid_stop_ids,
)
from pretrain.fileio import read_json, write_json
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer, template_adds_bos

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_LARGEST_FILE_BYTES = 5 << 30
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MODELING = "modeling_pretrain.py"
_FLOATS = ("F64", "F32", "F16", "BF16")


def write_hugging_face(
    folder: Path,
    *,
    decoder: Decoder,
    tokenizer: Tokenizer,
    numbers: str = "f32",
    largest_file_bytes: int = _LARGEST_FILE_BYTES,
) -> None:
    """Write a model directory into an existing folder, with a copy of one file's weights at a time.
    The decoder's weights are rounded to the numbers in the files."""
    from safetensors.torch import save_file

    config, dtype, stops = decoder.config, _DTYPES[numbers], tokenizer.stop_ids
    special = {
        "bos_token_id": tokenizer.start_of_text,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
    }
    content = {
        **to_hf_config(config),
        **special,
        "vocab_size": tokenizer.vocab_size,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", content, indent=2)
    generation = special if is_native(config) else {**special, "use_cache": False}
    write_json(folder / "generation_config.json", generation, indent=2)
    if not is_native(config):
        source = importlib.resources.files("pretrain.export") / _MODELING
        (folder / _MODELING).write_bytes(source.read_bytes())
    tokenizer.save(folder, bos_template=True)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(tokenizer.start_of_text),
        "eos_token": tokenizer.id_to_token(stops[0]),
        "model_max_length": config.window_tokens,
        "clean_up_tokenization_spaces": False,
        # As here, the name of a special token in a text is text.
        "split_special_tokens": True,
    }
    write_json(folder / "tokenizer_config.json", content, indent=2)

    files: list[list[StoredTensor]] = [[]]
    file_bytes = total_bytes = 0
    for stored in stored_tensors(config, hf_layout(config), vocab_size=tokenizer.vocab_size):
        n_bytes = torch.Size(stored.shape).numel() * dtype.itemsize
        if files[-1] and file_bytes + n_bytes > largest_file_bytes:
            files.append([])
            file_bytes = 0
        files[-1].append(stored)
        file_bytes += n_bytes
        total_bytes += n_bytes
    file_of: dict[str, str] = {}
    own = {name: p.detach() for name, p in decoder.named_parameters()}
    for number, group in enumerate(files, start=1):
        name = _WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {stored.name: to_stored(stored, own).to(dtype).contiguous() for stored in group}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        if dtype != torch.float32:
            for stored in group:
                for own_name, values in to_parameters(stored, tensors[stored.name]):
                    own[own_name].copy_(values)
        file_of |= dict.fromkeys(tensors, name)
        del tensors  # before those of the next file exist
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
        write_json(folder / _INDEX, index, indent=2)


def open_hugging_face(folder: Path) -> ImportedModel:
    """Open and check a model directory. FormatError for damage or another architecture."""
    from safetensors import SafetensorError, safe_open

    content = _read_json(folder / "config.json")
    files = _weight_files(folder)
    readers: dict[str, Any] = {}
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            reader: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file} must be a complete safetensors file: {error}") from None
        for name in reader.keys():  # noqa: SIM118 - it is not a dict
            if name in readers:
                raise FormatError(
                    f"each tensor must be in one file of {folder} (got {name:.200} in {file.name} "
                    "and in another)"
                )
            readers[name], shapes[name] = reader, tuple(reader.get_slice(name).get_shape())
    try:
        config = from_hf_config(content)
        vocab_size = checked_vocab_size(content.get("vocab_size"))
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from None
    layout = hf_layout(config)
    tensors = find_tensors(config, layout, vocab_size=vocab_size, shapes=shapes, where=folder)
    for tensor in tensors:
        dtype = readers[tensor.name].get_slice(tensor.name).get_dtype()
        if dtype not in _FLOATS:
            raise FormatError(
                f"{folder}: the type of {tensor.name} must be one of {', '.join(_FLOATS)} (got "
                f"{dtype})"
            )

    def read(name: str) -> Tensor:
        values: Tensor = readers[name].get_tensor(name)
        return values

    return ImportedModel(
        f"transformers' {content['model_type']}",
        (folder / "config.json", *files),
        config,
        padded_to(_tokenizer_of(folder), vocab_size),
        tensors,
        read,
    )


def _tokenizer_of(folder: Path) -> Tokenizer:
    """The folder's tokenizer. A tokenizer.json with Metaspace is not read here, but a
    tokenizer.model next to it is, if it has the same vocabulary."""
    json_file, file = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        try:
            tokenizer = load_tokenizer(folder)
        except ValueError:
            content = _read_json(json_file) if json_file.is_file() and file.is_file() else {}
            parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
            if '"Metaspace"' not in parts:
                raise
            tokenizer, model = load_tokenizer(file), content.get("model")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            ids = range(tokenizer.vocab_size)
            if not isinstance(vocabulary, dict) or any(
                vocabulary.get(tokenizer.id_to_token(id_)) != id_ for id_ in ids
            ):
                raise ValueError(
                    f"{file.name} and {json_file.name} must have the same vocabulary"
                ) from None
    except ValueError as error:
        raise FormatError(f"{folder}: the tokenizer cannot be used: {error!s:.300}") from error
    tokenizer.add_bos = _adds_bos(folder)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    eos_ids = [_read_json(file).get("eos_token_id") for file in files if file.is_file()]
    first = next((each for each in eos_ids if each is not None), None)
    tokenizer.stop_ids = valid_stop_ids(tokenizer, first)
    return tokenizer


def _adds_bos(folder: Path) -> bool:
    """Whether transformers puts a token before a text, according to the folder's files."""
    settings = folder / "tokenizer_config.json"
    add_bos = _read_json(settings).get("add_bos_token") if settings.is_file() else None
    if isinstance(add_bos, bool):
        return add_bos
    if (folder / "tokenizer.json").is_file():
        return template_adds_bos(_read_json(folder / "tokenizer.json"))
    return (folder / "tokenizer.model").is_file()  # SentencePiece, as Llama has it


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        if pickles := sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s)):
            raise FormatError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when "
                "it is opened; save them as safetensors with the program that wrote it"
            )
        raise FormatError(f"{folder} must have a file {_WEIGHTS} or {_INDEX}")
    places = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise FormatError(f"{folder / _INDEX} must have a weight_map of texts")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
            raise FormatError(
                f"each file in the weight_map of {folder / _INDEX} must be in its folder (got "
                f"{name!r:.200})"
            )
    return [folder / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, unique=False)  # as transformers reads it
    except (OSError, ValueError) as error:
        raise FormatError(str(error)) from None
