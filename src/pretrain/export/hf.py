"""A Hugging Face directory, as transformers writes and reads it: config.json, safetensors,
tokenizer.

Only safetensors are read: a .bin or .pt is a pickle, which can run any code when it is opened.
Every name and shape is checked against config.json before a number is read. Settings that our
decoder does not have (another activation, scaled attention, windows) are a FormatError with key and
value; nothing is guessed, and nothing is silently dropped.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.format import write_tensors
from pretrain.export.families import FORMATS, checked_config, hf_layout, is_native
from pretrain.export.layouts import (
    FormatError,
    ImportedModel,
    StoredTensor,
    matched_model,
    stored_tensors,
    to_parameters,
    to_stored,
    valid_stop_ids,
)
from pretrain.fileio import check_not_pointer, read_json, write_json
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.model.families import FAMILIES
from pretrain.tokenizer.load import MAX_FILE_BYTES, load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer, template_adds_bos

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_LARGEST_FILE_BYTES = 5 << 30
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = {
    ("*.onnx", "onnx/*.onnx", "openvino_*.xml", "*.h5", "*.msgpack"): "converted for another "
    "program); import the folder that it was converted from",
    ("*.bin", "*.pt", "*.pth"): "a pickle, which can run any code when it is opened); save them as "
    "safetensors with the program that wrote it",
}
_MODELING = "modeling_pretrain.py"
_MAX_SETTINGS_BYTES, _MAX_INDEX_BYTES = 1 << 20, 1 << 24
_FLOATS = ("F64", "F32", "F16", "BF16")

OWN_TYPE = "pretrain"
# With the value 1 these change nothing, and transformers' own class ignores them.
_ROPE_ONES = frozenset({"partial_rotary_factor", "attention_factor"})
_ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_low_factor": "low_freq_factor",
    "rope_high_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}


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
    config, dtype, stops = decoder.config, _DTYPES[numbers], tokenizer.stop_ids
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.start_of_text,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
    }
    if "pad_token" in tokenizer.carried:
        special["pad_token_id"] = tokenizer.token_to_id(tokenizer.carried["pad_token"])
    content = {
        **to_hf_config(config),
        **special,
        "vocab_size": tokenizer.vocab_size,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", content, indent=2)
    # Without a length transformers generates 256 tokens, beyond the positions of a small model. The
    # code that is shipped has no cache, and continues beyond the context.
    native = {"max_length": config.window_tokens}
    generation = {**special, **(native if is_native(config) else {"use_cache": False})}
    write_json(folder / "generation_config.json", generation, indent=2)
    if not is_native(config):
        source = importlib.resources.files("pretrain.export") / _MODELING
        (folder / _MODELING).write_bytes(source.read_bytes())
    tokenizer.save(folder, bos_template=True)
    description, eos_token = tokenizer.description, tokenizer.id_to_token(stops[0])
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(tokenizer.start_of_text),
        "eos_token": eos_token,
        # CTranslate2 needs one; OpenAI's GPT-2 has its end-of-text token here.
        "unk_token": description["model"].get("unk_token") or eos_token,
        # transformers takes the template of tokenizer.json; transformers.js and onnxruntime-genai
        # put a start token only where this says so, and the latter an end token without the other.
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        # Without this, transformers 4 adds token types, which GPT-2 looks up as if they were ids.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.window_tokens,
        "clean_up_tokenization_spaces": False,
        **tokenizer.carried,
    }
    added = [each["content"] for each in description["added_tokens"] if each["special"]]
    content["additional_special_tokens"] = [name for name in added if name not in content.values()]
    write_json(folder / "tokenizer_config.json", content, indent=2)

    groups, total_bytes, left_bytes = list[list[StoredTensor]](), 0, 0
    for stored in stored_tensors(config, hf_layout(config), vocab_size=tokenizer.vocab_size):
        n_bytes = math.prod(stored.shape) * dtype.itemsize
        if not groups or n_bytes > left_bytes:
            groups.append([])
            left_bytes = largest_file_bytes
        groups[-1].append(stored)
        left_bytes -= n_bytes
        total_bytes += n_bytes
    file_of: dict[str, str] = {}
    own = {name: p.detach() for name, p in decoder.named_parameters()}
    n_files = len(groups)
    for number, group in enumerate(groups, start=1):
        name = _WEIGHTS if n_files == 1 else f"model-{number:05}-of-{n_files:05}.safetensors"
        tensors = {stored.name: to_stored(stored, own).to(dtype) for stored in group}
        write_tensors(folder / name, tensors, metadata={"format": "pt"})
        if dtype != torch.float32:
            for stored in group:
                for own_name, values in to_parameters(stored, tensors[stored.name]):
                    own[own_name].copy_(values)
        file_of |= dict.fromkeys(tensors, name)
        del tensors  # before those of the next file exist
    if n_files > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
        write_json(folder / _INDEX, index, indent=2)


def open_hugging_face(folder: Path) -> ImportedModel:
    """Open and check a model directory. FormatError for damage or another architecture."""
    from safetensors import SafetensorError, safe_open

    content = _read_json(folder / "config.json")
    for key in ("quantization_config", "quantization", "compression_config"):
        if content.get(key):
            raise FormatError(
                f"{folder} must have plain numbers (got {key} in config.json: the model is "
                "quantized); import the folder that it was made from"
            )
    files = _weight_files(folder)
    readers: dict[str, Any] = {}
    for file in files:
        try:
            check_not_pointer(file)
            reader: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file} must be a complete safetensors file: {error}") from None
        for name in reader.keys():  # noqa: SIM118 - it is not a dict
            if name in readers:
                raise FormatError(
                    f"each tensor must be in one file of {folder} (got {name:.200} in {file.name} "
                    "and in another)"
                )
            readers[name] = reader
    try:
        config = from_hf_config(content)
    except FormatError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from None
    slices = {name: reader.get_slice(name) for name, reader in readers.items()}
    return matched_model(
        f"transformers' {content['model_type']}",
        (folder / "config.json", *files),
        config=config,
        layout=hf_layout(config),
        tokenizer=_tokenizer_of(folder),
        vocab_size=content.get("vocab_size"),
        tensors={name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()},
        readable=_FLOATS,
        read=lambda name: readers[name].get_tensor(name),
        where=folder,
    )


def _tokenizer_of(folder: Path) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        has_model = (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file()
        advice = "; remove tokenizer.json to use tokenizer.model instead" if has_model else ""
        raise FormatError(
            f"{folder}: the tokenizer cannot be used: {error!s:.300}{advice}"
        ) from error
    tokenizer.add_bos = _adds_bos(folder)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    eos_ids = [_read_json(file).get("eos_token_id") for file in files if file.is_file()]
    first = next((each for each in eos_ids if each is not None), None)
    tokenizer.stop_ids = valid_stop_ids(tokenizer, first)
    tokenizer.carried = _carried(folder, tokenizer)
    return tokenizer


def _carried(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template and the padding token of a folder, as keys of tokenizer_config.json."""
    settings: dict[str, Any] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        with suppress(FormatError):  # none, or damaged: the model does not need it
            settings |= _read_json(file, most_bytes=MAX_FILE_BYTES)
    padding, template = settings.get("pad_token"), settings.get("chat_template")
    if isinstance(padding, dict):
        padding = padding.get("content")
    file, carried = folder / "chat_template.jinja", dict[str, Any]()
    if file.is_file() and file.stat().st_size <= _MAX_SETTINGS_BYTES:
        template = file.read_text(encoding="utf-8", errors="replace")
    if isinstance(padding, str) and tokenizer.token_to_id(padding) is not None:
        carried["pad_token"] = padding
    named = template if isinstance(template, list) else []  # several, each with a name
    if isinstance(template, str) or (
        named and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in named)
    ):
        carried["chat_template"] = template
    return carried


def _adds_bos(folder: Path) -> bool:
    """Whether transformers 5 puts a token before a text, according to the folder's files: of a
    tokenizer.json the template counts, of other files add_bos_token."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if file.is_file():
        return template_adds_bos(_read_json(file, most_bytes=MAX_FILE_BYTES))
    content = _read_json(settings, most_bytes=MAX_FILE_BYTES) if settings.is_file() else {}
    return content.get("add_bos_token") is True


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        for patterns, reason in _OTHER_WEIGHTS.items():
            if others := sorted(p.name for pattern in patterns for p in folder.glob(pattern)):
                raise FormatError(
                    f"{folder} must have its weights as safetensors (got {others[0]}, {reason}"
                )
        raise FormatError(f"{folder} must have a file {_WEIGHTS} or {_INDEX}")
    places = _read_json(folder / _INDEX, most_bytes=_MAX_INDEX_BYTES).get("weight_map")
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


def _read_json(file: Path, *, most_bytes: int = _MAX_SETTINGS_BYTES) -> dict[str, Any]:
    try:
        # Of a duplicate key the last value counts, as in transformers.
        return read_json(file, unique=False, most_bytes=most_bytes)
    except (OSError, ValueError) as error:
        raise FormatError(str(error)) from None


# config.json -------------------------------------------------------------------------------------


def _repeated_keys(config: ModelConfig) -> dict[str, Any]:
    """What the section `pretrain` has too, under the keys that other programs read."""
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.window_tokens,
        "tie_word_embeddings": config.tied_head,
    }


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The architecture's part of config.json."""
    if not is_native(config):
        own = {**asdict(config), "d_ff": config.feed_forward_width, "preset": None}
        return {
            "model_type": OWN_TYPE,
            "architectures": ["PretrainForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_pretrain.PretrainConfig",
                "AutoModelForCausalLM": "modeling_pretrain.PretrainForCausalLM",
            },
            "pretrain": own,
            **_repeated_keys(config),
        }
    hf = FORMATS[config.family]
    values = {**asdict(config), "n_kv_heads": config.kv_heads, "d_ff": config.feed_forward_width}
    content = {"model_type": hf.model_type, "architectures": [hf.architecture], **hf.fixed}
    # We have no padding; a class whose default is an id would not train that row.
    content["pad_token_id"] = None
    content |= {key: values[field] for field, key in hf.keys.items()}
    if config.position == "rotary":
        content["rope_theta"] = config.rope_theta
        if config.rope_factor != 1.0:
            scaling = {key: values[field] for field, key in _ROPE_KEYS.items()}
            content["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if config.position == "learned":
        content["n_ctx"] = config.window_tokens  # as published; mlx-lm and llama.cpp read it
    if "dropout" in hf.keys:
        content["embd_pdrop"] = config.dropout
        content["attn_pdrop"] = config.dropout if config.attention_dropout else 0.0
    return content


def from_hf_config(content: Mapping[str, Any]) -> ModelConfig:
    """The architecture of a config.json. FormatError if our decoder is not that architecture."""
    model_type = content.get("model_type")
    if model_type == OWN_TYPE:
        values = content.get("pretrain")
        if not isinstance(values, dict):
            raise FormatError(
                f"config.json must have a section 'pretrain' (got {values!r:.60}); export the "
                "model again"
            )
        config = checked_config(values)
        _check_keys(content, _repeated_keys(config))
        return config
    by_type = {hf.model_type: family for family, hf in FORMATS.items()}
    if model_type not in list(by_type):  # it may be a list
        known = ", ".join([*by_type, OWN_TYPE])
        raise FormatError(f"model_type must be one of {known} (got {model_type!r:.60})")
    hf = FORMATS[by_type[model_type]]
    _check_keys({**hf.defaults, **content}, hf.fixed)
    values = dict(FAMILIES[by_type[model_type]])
    for field, key in hf.keys.items():
        if key not in content and key not in hf.defaults:
            raise FormatError(f"config.json must have the key {key!r}, for model.{field}")
        values[field] = content.get(key, hf.defaults.get(key))
    if values["position"] == "rotary":
        values |= _rotary_values(content)
    if "dropout" in hf.keys:
        # GPT and GPT-2 have three dropout rates; we have one, and attention may have none.
        dropout = values["dropout"]
        attention = content.get("attn_pdrop", dropout)
        embedding = content.get("embd_pdrop", dropout)
        if embedding != dropout or attention not in (0, dropout):
            raise FormatError(
                "resid_pdrop, embd_pdrop and attn_pdrop must be equal, or attn_pdrop 0 (got "
                f"{dropout!r:.60}, {embedding!r:.60} and {attention!r:.60}); they matter in "
                "training only, so the file may be edited"
            )
        values["attention_dropout"] = bool(attention == dropout)
    config = checked_config(values)
    if content.get("head_dim") is not None:
        _check_keys(content, {"head_dim": config.d_head})
    return config


def _check_keys(content: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """FormatError that lists all keys with another value than this architecture's."""
    wrong = [
        f"{key} must be {value!r} (got {content[key]!r:.60})"
        for key, value in fixed.items()
        if key in content and content[key] != value
    ]
    if wrong:
        raise FormatError(f"this decoder cannot compute the model: {'; '.join(wrong)}")


def _rotary_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config, in the spelling of transformers 4 or 5. A setting that is in
    two places must be the same there: which one wins has changed between releases."""
    sections = {name: content.get(name) for name in ("rope_parameters", "rope_scaling")}
    for name, section in sections.items():
        if section is not None and not isinstance(section, Mapping):
            raise FormatError(f"{name} must be an object or null (got {section!r:.60})")
    top_level = {
        key: content[key]
        for key in ("rope_theta", "original_max_position_embeddings", *sorted(_ROPE_ONES))
        if content.get(key) is not None
    }
    rope: dict[str, Any] = {}
    for section in [*sections.values(), top_level]:
        for key, value in (section or {}).items():
            name = "rope_type" if key == "type" else key  # the older spelling of transformers 4
            if value is not None and rope.setdefault(name, value) != value:
                raise FormatError(
                    f"{name} must have one value (got {rope[name]!r:.60} and {value!r:.60})"
                )
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise FormatError(f"rotary positions must be of type default or llama3 (got {kind!r:.60})")
    values = {"rope_theta": rope.pop("rope_theta", 10_000.0)}
    if kind == "llama3":
        values |= {field: rope.pop(key, None) for field, key in _ROPE_KEYS.items()}
    elif "original_max_position_embeddings" in top_level:
        del rope["original_max_position_embeddings"]  # has no effect without scaling
    for key, value in rope.items():
        if key not in {"factor", *_ROPE_ONES} or value != 1:
            raise FormatError(
                f"{key} must be absent for rotary positions of type {kind} (got {value!r:.60})"
            )
    return values
