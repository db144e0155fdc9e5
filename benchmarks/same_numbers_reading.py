"""How `same_numbers.py` reads what two checkouts wrote, and finds where two readings differ first.

In come files, JSON values and tables of new names; out come leaves and tensors by name, of which
nothing but names is known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

VERSIONS = {"package_version", "format_version", "pretrain"}
"""JSON keys whose values may differ between versions of the package."""
NOT_COMPARED = re.compile(r"seconds|per_second|peak_memory|minutes|started")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


def flat(value: Any, renamed: Mapping[str, str], *, numbers_only: bool = False) -> dict[str, Any]:
    """The leaves of a JSON value by their path, times and versions aside, in the new names."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                key = renamed.get(key, key)
                if key not in VERSIONS and not NOT_COMPARED.search(key):
                    walk(each, f"{path}/{key}")
        elif isinstance(value, list):
            for i, each in enumerate(value):
                walk(each, f"{path}/{i}")
        elif isinstance(value, str):
            if not numbers_only:
                found[path] = renamed.get(value, value)
        else:
            found[path] = value

    walk(value, "")
    return found


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; bfloat16 as the integers of its bits."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            values = np.frombuffer(data[start + a : start + b], DTYPES.get(entry["dtype"], "u1"))
            found[name] = values.reshape(entry["shape"])
    return found


def same_bytes(old: Path, new: Path) -> bool:
    one, other = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (old, new)
    )
    return one == other


def exported_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of an export, and the content of its config and tokenizer."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_safetensors(file)
    for file in sorted(folder.glob("*.gguf")):
        from gguf import GGUFReader

        reader = GGUFReader(file)
        found |= {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        found |= {f"{k} (field)": repr(f.contents()) for k, f in reader.fields.items()}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            leaves = flat(read_json(folder / name), {})
            found |= {f"{name}{path}": leaf for path, leaf in leaves.items()}
    return found


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Where two readings differ first, with both values; None where they are equal."""
    for name, one in old.items():
        if name not in new:
            return f"{name}: only in old ({_shown(one)})"
        other = new[name]
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            if one.dtype != other.dtype or one.shape != other.shape:
                return f"{name}: {one.dtype}{one.shape} / {other.dtype}{other.shape}"
            if one.tobytes() != other.tobytes():
                a, b = (each.reshape(-1) for each in (one, other))
                bits = np.frombuffer(a.tobytes(), "u1") != np.frombuffer(b.tobytes(), "u1")
                at = int(np.flatnonzero(bits)[0]) // a.itemsize
                n = int(np.any(bits.reshape(-1, a.itemsize), axis=1).sum())
                return f"{name}[{at}]: {a[at]!r} / {b[at]!r} ({n} of {a.size} differ)"
        elif repr(one) != repr(other):  # 1 is not 1.0, and nan is nan
            return f"{name}: {_shown(one)} / {_shown(other)}"
    extra = [name for name in new if name not in old]
    return f"{extra[0]}: only in new ({_shown(new[extra[0]])})" if extra else None


def _shown(value: Any) -> str:
    text = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
