"""The same few documents as files of every format that can be read, plain and compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.corpus.files import Source
from pretrain.corpus.reading import read_documents


def zstd_compress(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


COMPRESSORS: list[tuple[str, Callable[[bytes], bytes]]] = [
    (".gz", gzip.compress),
    (".bz2", lambda data: bz2.compress(data, 1)),
    (".xz", lambda data: lzma.compress(data, preset=0)),
    (".zst", zstd_compress),
]


ROWS: list[dict[str, object]] = [
    {"id": "a", "title": "A", "text": "First, with a comma;\nand a line."},
    {"id": "b", "title": "B", "text": 'Zweiter "Text" — mit Ümlaut\tund Tab.'},
]
PAGE = (
    "<!DOCTYPE html><html><head><meta charset='utf-8'><title>A page</title></head><body><nav>"
    "<a href='x'>Home</a></nav><main><h1>Whales</h1><p>Of the <b>whale</b> much is told, \u00e4nd "
    "this paragraph is long enough to be what the page is about.</p></main></body></html>"
)


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "title", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet(kind: str = "string") -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist([{**row, "n": 1, "tags": ["x"]} for row in ROWS])
    table = table.set_column(2, "text", table["text"].cast(kind))
    parquet.write_table(table, out)
    return out.getvalue()


def as_warc() -> bytes:
    def record(kind: str, address: str, content_type: str, body: bytes) -> bytes:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n"
        block = http + body if kind == "response" else body
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\n"
            f"WARC-Record-ID: <urn:uuid:0>\r\nContent-Type: "
            f"{'application/http; msgtype=response' if kind == 'response' else content_type}\r\n"
            f"Content-Length: {len(block)}\r\n\r\n"
        )
        return head.encode() + block + b"\r\n\r\n"

    return b"".join(
        [
            record("warcinfo", "", "application/warc-fields", b"software: test\r\n"),
            record("response", "http://a/", "text/html; charset=utf-8", PAGE.encode()),
            record("response", "http://a/p.png", "image/png", b"\x89PNG\0\0"),
            record("conversion", "http://b/", "text/plain", "Plain tëxt.".encode()),
        ]
    )


FORMATS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    "rows.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "rows.csv": lambda: as_csv(","),
    "semicolons.csv": lambda: as_csv(";"),
    "rows.tsv": lambda: as_csv("\t"),
    "blank.csv": lambda: b"\r\n \n" + as_csv(","),
    "views.parquet": lambda: as_parquet("string_view"),
    "rows.parquet": as_parquet,
}
WIDE = ("rows.jsonl", "rows.json", "rows.csv")
PACKING: list[tuple[str, Callable[[bytes], bytes]]] = [("", bytes), *COMPRESSORS]


def read_texts(source: Source, **options: Any) -> list[str]:
    """The texts of all documents of a source."""
    return [document.text for document in read_documents(source, **options)]


def write_records(path: Path, *records: object) -> Path:
    """Write a file of JSON lines."""
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    return path
