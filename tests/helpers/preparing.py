"""Prepare texts with filters, and read which documents were kept or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.corpus.config import CorpusConfig
from pretrain.data.format import PreparedData
from pretrain.data.preparation import prepare


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write texts as records whose ids are their numbers."""
    lines = (json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepare_texts(
    tmp_path: Path, texts: list[str], **options: Any
) -> tuple[PreparedData, dict[str, Any]]:
    """Prepare texts with these options of `CorpusConfig`; returns the data and report.json."""
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    data = prepare(source, out, tokenizer="bytes", corpus=CorpusConfig(**options))
    return data, json.loads((out / "report.json").read_text(encoding="utf-8"))


def kept_ids(data: PreparedData) -> set[int]:
    """Numbers of the texts that were kept."""
    lines: list[str] = []
    for name in ("train", "val"):
        path = data.folder / f"{name}.documents.jsonl"
        lines += path.read_text(encoding="utf-8").splitlines()
    return {int(json.loads(line)["id"]) for line in lines}


def removed_ids(data: PreparedData) -> dict[int, str]:
    """Numbers of the texts that were removed, with the reason."""
    lines = (data.folder / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return {int(line["id"]): line["reason"] for line in map(json.loads, lines)}
