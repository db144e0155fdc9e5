"""manifest.json: what a prepared folder says about itself, and the check that it says something
possible.

A `Manifest` goes to disk and comes back typed. Refused, as ValueError naming the file, are other
formats and versions, fields that are missing or of the wrong kind, and file names that lead out of
the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pretrain.fileio import write_json

FORMAT = "pretrain-shards"
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")

_MAX_MANIFEST_BYTES = 1 << 28


@dataclass(slots=True, kw_only=True)
class SourceShare:
    """What one source gave to a stream: documents that lie one after the other."""

    source: str
    n_documents: int = 0
    n_tokens: int = 0
    """End-of-text tokens included; the stream has one more, before the first source."""
    n_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What the manifest says about one stream."""

    file: str
    offsets_file: str
    documents_file: str
    """A line of JSON for each document: where it came from."""
    n_tokens: int
    n_documents: int
    n_bytes: int
    """Bytes of text (UTF-8) behind the tokens."""
    max_id: int
    sha256: str
    """Of the ids as they lie in the file, header aside."""
    offsets_sha256: str
    documents_sha256: str
    sources: list[SourceShare]
    """In the order of the stream."""
    block_bytes: int
    block_checksums: list[int]
    """CRC-32 of each `block_bytes` of ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json of a prepared folder."""

    format: str
    format_version: int
    package_version: str
    vocab_size: int
    id_bytes: int
    """2 or 4: ids are unsigned, little-endian."""
    start_of_text: int
    """Stands before each document where it is not end_of_text, which then stands behind it only."""
    end_of_text: int
    tokenizer_sha256: str
    source_sha256: str
    """Hash of the documents' texts in their order: equal texts give equal hashes, wherever they
    lie."""
    split_policy: str
    """"documents": whole documents are validation; "tails": the end of each document is."""
    settings: dict[str, Any]
    streams: dict[str, StreamInfo] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a prepared folder."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(path: Path) -> Manifest:
    content = _json_object(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a folder that `pretrain prepare` wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {content.get('format_version')!r}, this package reads "
            f"{FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        streams = {name: _stream_info(value) for name, value in content["streams"].items()}
        if set(streams) != set(SPLITS):
            raise ValueError(f"streams are {sorted(streams)}")
        manifest = Manifest(**{**_typed(Manifest, content), "streams": streams})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    return manifest


def _stream_info(content: Mapping[str, Any]) -> StreamInfo:
    info = StreamInfo(**_typed(StreamInfo, content))
    shares = [SourceShare(**_typed(SourceShare, share)) for share in content["sources"]]
    if 1 + sum(share.n_tokens for share in shares) != info.n_tokens:
        raise ValueError("the tokens of the sources are not those of the stream")
    return replace(info, sources=shares)


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder written by `prepare`, whole or damaged."""
    try:
        content = _json_object(Path(path) / MANIFEST_NAME)
    except ValueError:
        return False
    return content.get("format") == FORMAT


def size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _json_object(path: Path) -> dict[str, Any]:
    n_bytes = size_of(path)
    if n_bytes > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: {n_bytes:,} bytes are too many for a manifest")
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return content


def _typed(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass out of JSON, checked. A manifest may have been changed by
    anybody."""
    types: dict[str, Any] = {"int": int, "str": str, "list[int]": list, "dict[str, Any]": dict}
    types["list[SourceShare]"] = list
    found: dict[str, Any] = {}
    for each in fields(kind):
        value: Any = content[each.name]
        expected = types.get(str(each.type), dict)
        is_possible = isinstance(value, expected) and not isinstance(value, bool)
        if is_possible and expected is int:
            is_possible = value >= (1 if each.name == "block_bytes" else 0)
        if is_possible and each.type == "list[int]":
            is_possible = all(type(item) is int for item in value)
        if is_possible and each.name in ("file", "offsets_file", "documents_file"):
            # A plain name: a manifest must not lead out of its folder.
            is_possible = os.path.basename(value) == value
        if not is_possible:
            raise ValueError(f"{each.name} is {value!r:.80}")
        found[each.name] = value
    return found
