"""One file -> its bytes in chunks: decompressed, UTF-16 and UTF-32 as UTF-8, damage detected.

Memory stays at a few MiB whatever the compression ratio. The compression is detected from the first
bytes, not from the name. Damage is raised as `DamagedStreamError` after the valid bytes have been
yielded; a missing decompressor is a ValueError with the command that installs it.
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
from pretrain.corpus.files import COMPRESSIONS, HEAD_BYTES, SourceFile, compression_of

CHUNK_BYTES = 1 << 18
# UTF-32 first: its little-endian byte order mark begins with that of UTF-16.
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Text is compressed five to ten times, logs a hundred times: a higher ratio is a bomb.
BOMB_RATIO = 256
BOMB_BYTES = 1 << 26
# zstd can grow 32,000-fold, and its streaming object cannot limit its output: feed it small chunks.
_ZSTD_CHUNK_BYTES = 1 << 12


class DamagedStreamError(Exception):
    """A compressed file ends too early or is broken; the bytes before that were yielded."""


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


def read_chunks(file: SourceFile, report: ReadingReport) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a file; adds the bytes on disk to `report.n_read_bytes`."""
    with open(file.path, "rb") as raw:
        n_reported = n_decompressed = 0
        for chunk in _as_utf8(_decompress(raw, file)):
            n_decompressed += len(chunk)
            if n_decompressed > max(BOMB_BYTES, BOMB_RATIO * file.n_bytes):
                raise DamagedStreamError(
                    f"a decompression bomb: more than {BOMB_RATIO} times its size on disk"
                )
            report.n_read_bytes += raw.tell() - n_reported
            n_reported = raw.tell()
            yield chunk


def read_head(file: SourceFile) -> bytes:
    """Return the first (decompressed) bytes of a file, at most HEAD_BYTES."""
    head = b""
    with open(file.path, "rb") as raw, suppress(DamagedStreamError):
        for chunk in _as_utf8(_decompress(raw, file)):
            head += chunk
            if len(head) >= HEAD_BYTES:
                break
    return head[:HEAD_BYTES]


class ChunkFile(io.RawIOBase):
    """Chunks as a readable file object, for libraries that need one.

    The file ends where the stream is damaged, and `damage` is the error.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self.damage: DamagedStreamError | None = None
        self._chunks = chunks
        self._buffer = b""
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._buffer:
            try:
                chunk = next(self._chunks, None)
            except DamagedStreamError as damage:
                self.damage = damage
                return 0
            if chunk is None:
                return 0
            self._buffer = chunk
        n = min(len(buffer), len(self._buffer))
        buffer[:n] = self._buffer[:n]
        self._buffer = self._buffer[n:]
        self._position += n
        return n


def _as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Convert UTF-16 and UTF-32 with a byte order mark to UTF-8; pass on everything else."""
    first = next(chunks, b"")
    encoding = next((e for mark, e in _WIDE_ENCODINGS.items() if first.startswith(mark)), None)
    if encoding is None:
        yield first
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chain([first], chunks):
            yield decoder.decode(chunk).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        reason = f"it starts with the byte order mark of {encoding}, but {error.reason}"
        raise DamagedStreamError(reason) from error


def _decompress(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    compression = compression_of(raw.read(8))
    raw.seek(0)
    expected = COMPRESSIONS.get(os.path.splitext(file.path.name.lower())[1])
    if expected and not compression:
        content = "is empty" if file.n_bytes == 0 else f"does not start like a {expected} file"
        raise DamagedStreamError(f"its name is that of a {expected} file, but it {content}")
    if compression == "zstandard":
        yield from _decompress_zstandard(raw)
        return

    stream: _Readable
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=raw, mode="rb")
    elif compression == "bzip2":
        stream = bz2.BZ2File(raw, "rb")
    elif compression == "xz":
        stream = lzma.LZMAFile(raw, "rb")  # noqa: SIM115 `raw` is the caller's
    else:
        stream = cast(_Readable, raw)
    while True:
        # read1, not read: at damage, read would lose the bytes that it has already decompressed.
        try:
            chunk = stream.read1(CHUNK_BYTES)
        except EOFError as error:
            raise DamagedStreamError(f"the {compression} file is truncated") from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            kind = f"{compression} file" if compression else "file"
            raise DamagedStreamError(f"the {kind} is broken: {error}") from error
        if not chunk:
            return
        yield chunk


def _decompress_zstandard(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing_package("a zstandard file", "zstandard") from error

    # zstandard's stream reader does not report a truncated end. Therefore each frame is
    # decompressed by its own object, whose `eof` tells whether it was complete.
    frame = None
    while data := raw.read(_ZSTD_CHUNK_BYTES):
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
        raise DamagedStreamError("the zstandard file is truncated")
