"""Corpora for preparation, and the bytes of prepared folders."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from pretrain.corpus.config import CorpusConfig
from pretrain.data.format import SPLITS, PreparedData
from texts import prose, replace_words

FILTERED = CorpusConfig(deduplicate="near", filters=("gopher",))


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def read_everything(data: PreparedData) -> None:
    """Read all of a prepared folder, which compares all of its checksums."""
    data.tokenizer()
    for name in SPLITS:
        stream = data.split(name)
        stream.read(0, stream.n_tokens)
        assert len(stream.document_offsets) == len(list(stream.origins())) + 1


def write_dirty_corpus(folder: Path) -> Path:
    """Write files of two formats with duplicates, invalid records, and texts that a filter
    removes."""
    folder.mkdir()
    draw = random.Random(0)
    originals = [prose(draw, draw.randint(60, 400)) for _ in range(150)]
    for number in range(4):
        texts = [" ".join(replace_words(draw, draw.choice(originals), 0.01)) for _ in range(60)]
        texts += [" ".join(prose(draw, 10))] * 5
        lines = [json.dumps({"id": f"{number}-{n}", "text": t}) for n, t in enumerate(texts)]
        lines.insert(draw.randrange(60), "no json")
        (folder / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / f"{number}.txt").write_text(" ".join(originals[number]), encoding="utf-8")
    return folder
