"""One file -> its bytes in chunks, decompressed, with every cut-off or broken end noticed.

A `SourceFile` comes in, chunks of bytes go out, of UTF-16 and UTF-32 as UTF-8; memory stays at a
few MiB whatever the compression ratio. Compression is told by the first bytes, not by the name.
Damage is raised as `DamagedStreamError` after the good bytes were handed out, and a missing
decompressor is a ValueError with the command that installs it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import BinaryIO, Protocol, cast

from pretrain import missing_package
from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.files import (
    COMPRESSIONS,
    HEAD_BYTES,
    SourceFile,
    compression_of,
)

CHUNK_BYTES = 1 << 18
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Text shrinks five to ten times, logs a hundred times: what grows more than this is a bomb.
BOMB_RATIO = 256
BOMB_BYTES = 1 << 26
# zstd can grow 32,000-fold and its streaming object has no limit on output: feed it little at a
# time.
_ZSTD_CHUNK_BYTES = 1 << 12


class DamagedStreamError(Exception):
    """A compressed file ends too early or is broken; what came before was handed out."""


class _Reads(Protocol):
    def read1(self, size: int, /) -> bytes: ...


def read_chunks(file: SourceFile, *, report: ReadingReport) -> Iterator[bytes]:
    """The (decompressed) bytes of a file, in order. Counts the bytes on disk into
    `report.n_read_bytes`."""
    with open(file.path, "rb") as raw:
        counted = n_unpacked = 0
        for chunk in _narrow(_chunks(raw, file)):
            n_unpacked += len(chunk)
            if n_unpacked > max(BOMB_BYTES, BOMB_RATIO * file.n_bytes):
                raise DamagedStreamError(
                    f"a bomb: it unpacks to more than {BOMB_RATIO} times its size"
                )
            position = raw.tell()
            report.n_read_bytes += position - counted
            counted = position
            yield chunk


def read_head(file: SourceFile) -> bytes:
    """The first (decompressed) bytes of a file, HEAD_BYTES of them if there are as many."""
    head = b""
    with open(file.path, "rb") as raw, suppress(DamagedStreamError):
        for chunk in _narrow(_chunks(raw, file)):
            head += chunk
            if len(head) >= HEAD_BYTES:
                break
    return head[:HEAD_BYTES]


class ChunkFile(io.RawIOBase):
    """The chunks of a file as something to `read` from, for libraries that want a file.

    Where the stream is damaged it ends, and `damage` tells what happened.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self.damage: DamagedStreamError | None = None
        self._chunks, self._rest, self._position = chunks, b"", 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            try:
                chunk = next(self._chunks, None)
            except DamagedStreamError as damage:
                self.damage = damage
                return 0
            if chunk is None:
                return 0
            self._rest = chunk
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        self._position += n
        return n


def _narrow(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """As UTF-8 what has a mark of UTF-16 or UTF-32, all else as it is."""
    first = next(chunks, b"")
    encoding = next((name for mark, name in _WIDE_MARKS.items() if first.startswith(mark)), None)
    if encoding is None:
        yield from chain([first], chunks)
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chain([first], chunks):
            yield decoder.decode(chunk).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DamagedStreamError(f"the mark is of {encoding}, but {error.reason}") from error


def _chunks(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    compression = compression_of(raw.read(8))
    raw.seek(0)
    expected = COMPRESSIONS.get(os.path.splitext(file.path.name.lower())[1])
    if expected and not compression:
        kind = "an empty file" if file.n_bytes == 0 else "by its first bytes it"
        raise DamagedStreamError(f"{kind} is no {expected} file, as its name says")
    if compression == "zstandard":
        yield from _zstandard_chunks(raw)
        return
    stream: _Reads
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=raw, mode="rb")
    elif compression == "bzip2":
        stream = bz2.BZ2File(raw, "rb")
    elif compression == "xz":
        stream = lzma.LZMAFile(raw, "rb")  # noqa: SIM115 `raw` is the caller's
    else:
        stream = cast(_Reads, raw)
    while True:
        # read1, not read: read would lose what it has gathered when it meets the damage.
        try:
            chunk = stream.read1(CHUNK_BYTES)
        except EOFError as error:
            raise DamagedStreamError(f"the {compression} file is cut off") from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            kind = f"{compression} file" if compression else "file"
            raise DamagedStreamError(f"the {kind} is broken: {error}") from error
        if not chunk:
            return
        yield chunk


def _zstandard_chunks(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing_package("a zstandard file", "zstandard") from error

    # Its stream reader is silent about a missing end, therefore frame by frame, each with its own
    # `eof`.
    frame = None
    while True:
        data = raw.read(_ZSTD_CHUNK_BYTES)
        if not data:
            break
        while data:
            if frame is None:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedStreamError(f"the zstandard file is broken: {error}") from error
            if chunk:
                yield chunk
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None or raw.tell() == 0:
        raise DamagedStreamError("the zstandard file is cut off")
