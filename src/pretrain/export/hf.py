"""A Hugging Face directory, as transformers writes and reads it: config.json, safetensors,
tokenizer.

Only safetensors are read: a .bin or .pt is a pickle, which can run any code when it is opened.
Every name and shape is checked against config.json before a number is read.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.export.families import hf_layout, is_native
from pretrain.export.hf_config import from_hf_config, to_hf_config
from pretrain.export.imported import (
    ImportedModel,
    checked_parameters,
    checked_vocab_size,
    padded_to,
    valid_stop_ids,
)
from pretrain.export.layouts import (
    FormatError,
    Read,
    Rounded,
    Shape,
    StoredTensor,
    ignore_rounded,
    match_tensors,
    stored_tensors,
    to_parameters,
    to_stored,
)
from pretrain.model.config import ModelConfig
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.tokenizer_json import template_adds_bos

NUMBERS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""The number types that can be written."""
_LARGEST_FILE_BYTES = 5 << 30
_LARGEST_JSON_BYTES = 64 << 20
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MODELING = "modeling_pretrain.py"
_FLOATS = ("F64", "F32", "F16", "BF16")


def write_hugging_face(
    folder: Path,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
    read: Read,
    numbers: str = "f32",
    rounded: Rounded = ignore_rounded,
    largest_file_bytes: int = _LARGEST_FILE_BYTES,
) -> None:
    """Write a model directory into an existing folder, with one file of weights at a time in
    memory. `read` reads our parameters by name; `rounded` is called with those that the files have
    in fewer bits, as the files have them."""
    description = to_hf_config(config)
    special = {
        "bos_token_id": tokenizer.start_of_text,
        "eos_token_id": tokenizer.stop_ids
        if len(tokenizer.stop_ids) > 1
        else tokenizer.stop_ids[0],
    }
    content = {
        **description,
        **special,
        "vocab_size": tokenizer.vocab_size,
        "torch_dtype": str(NUMBERS[numbers]).removeprefix("torch."),
    }
    _write_json(folder / "config.json", content)
    generation = special if is_native(config) else {**special, "use_cache": False}
    _write_json(folder / "generation_config.json", generation)
    if not is_native(config):
        source = importlib.resources.files("pretrain.export") / _MODELING
        (folder / _MODELING).write_bytes(source.read_bytes())
    _write_tokenizer(folder, tokenizer, config)
    stored = stored_tensors(config, hf_layout(config), vocab_size=tokenizer.vocab_size)
    groups = _files_of(stored, NUMBERS[numbers].itemsize, largest_file_bytes)
    _write_weights(folder, groups, read, rounded, NUMBERS[numbers])


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    tokenizer.save(folder, bos_template=True)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(tokenizer.start_of_text),
        "eos_token": tokenizer.id_to_token(tokenizer.stop_ids[0]),
        "model_max_length": config.window_tokens,
        "clean_up_tokenization_spaces": False,
        # As here, the name of a special token in a text is text.
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer_config.json", content)


def _files_of(
    tensors: list[StoredTensor], number_bytes: int, largest_file_bytes: int
) -> list[list[StoredTensor]]:
    """The tensors of each file, in their order."""
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for stored in tensors:
        n_bytes = torch.Size(stored.shape).numel() * number_bytes
        if groups[-1] and filled + n_bytes > largest_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(stored)
        filled += n_bytes
    return groups


def _write_weights(
    folder: Path, groups: list[list[StoredTensor]], read: Read, rounded: Rounded, dtype: torch.dtype
) -> None:
    from safetensors.torch import save_file

    file_of: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = (
            _WEIGHTS if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        tensors = {stored.name: to_stored(stored, read).to(dtype).contiguous() for stored in group}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(tensors, name)
        total += sum(values.nbytes for values in tensors.values())
        if dtype != torch.float32:
            for part, values in to_parameters(group, tensors.__getitem__):
                rounded(part, values)
    if len(groups) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": file_of}
        _write_json(folder / _INDEX, content)


def open_hugging_face(folder: Path) -> ImportedModel:
    """Open and check a model directory. FormatError for damage or another architecture."""
    content = _read_json(folder / "config.json")
    files = _weight_files(folder)
    with ExitStack() as opened:
        found = _tensors_of(files, opened)
        try:
            config = from_hf_config(content)
            vocab_size = checked_vocab_size(content.get("vocab_size"))
            if config.n_layers > len(found):
                raise FormatError(f"{config.n_layers:,} layers in {len(found):,} tensors")
            layout = hf_layout(config)
            tensors = stored_tensors(config, layout, vocab_size=vocab_size)
        except (FormatError, RuntimeError, OverflowError) as error:
            raise FormatError(f"{folder / 'config.json'}: {error}") from None
        shapes: dict[str, Shape] = {name: shape for name, (_, shape, _) in found.items()}
        names = match_tensors(tensors, shapes, layout=layout, what=str(folder))
        for name in sorted(names.values()):
            if found[name][2] not in _FLOATS:
                raise FormatError(
                    f"{folder}: the type of {name} must be one of {', '.join(_FLOATS)} (got "
                    f"{found[name][2]})"
                )
    places = {theirs: (found[there][0], there) for theirs, there in names.items()}

    def parameters() -> Iterator[tuple[str, Tensor]]:
        with ExitStack() as stack:
            readers = {file: stack.enter_context(_opened(file)) for file in files}

            def read(name: str) -> Tensor:
                file, there = places[name]
                values: Tensor = readers[file].get_tensor(there)
                return values

            yield from checked_parameters(tensors, read, layout=layout, names=names)

    return ImportedModel(
        f"transformers' {content['model_type']}",
        (folder / "config.json", *files),
        config,
        padded_to(_tokenizer_of(folder), vocab_size),
        parameters,
    )


def _tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = _vocabulary_of(folder)
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


def _vocabulary_of(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except ValueError as error:
        try:
            if (found := _sentencepiece_of(folder)) is not None:
                return found
        except ValueError as other:
            raise FormatError(f"{folder}: the tokenizer cannot be used: {other!s:.300}") from error
        raise FormatError(f"{folder}: the tokenizer cannot be used: {error!s:.300}") from error


def _sentencepiece_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.model, if tokenizer.json is the same vocabulary with Metaspace,
    which is not read here; else None."""
    json_file, file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not (json_file.is_file() and file.is_file()):
        return None
    content = _read_json(json_file)
    if '"Metaspace"' not in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        return None
    found, model = load_tokenizer(file), content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or any(
        vocabulary.get(found.id_to_token(id_)) != id_ for id_ in range(found.vocab_size)
    ):
        raise ValueError(f"{file.name} and {json_file.name} must have the same vocabulary")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
        if pickles:
            raise FormatError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when "
                "it is opened; save them as safetensors with the program that wrote it"
            )
        raise FormatError(f"{folder} has no {_WEIGHTS}")
    places = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise FormatError(f"{folder / _INDEX} has no weight_map")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
            raise FormatError(
                f"{folder / _INDEX} names {name!r:.200}, which is not a file in this folder"
            )
    return [folder / name for name in names]


def _tensors_of(files: list[Path], opened: ExitStack) -> dict[str, tuple[Path, Shape, str]]:
    """File, shape and number type of every tensor, from the headers of the files."""
    found: dict[str, tuple[Path, Shape, str]] = {}
    for file in files:
        reader = opened.enter_context(_opened(file))
        for name in reader.keys():  # noqa: SIM118 - it is not a dict
            if name in found:
                raise FormatError(
                    f"{name:.200} is both in {found[name][0].name} and in {file.name}"
                )
            piece = reader.get_slice(name)
            found[name] = (file, tuple(piece.get_shape()), piece.get_dtype())
    return found


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{file} is not a complete safetensors file: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise ValueError("it is too large for JSON")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file} is not a JSON object")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
