"""One file -> its bytes: decompressed, UTF-16 and UTF-32 as UTF-8, damage detected.

Memory stays at a few MiB whatever the compression ratio. The compression is detected from the first
bytes, not from the name. A stream ends where its file is damaged; a missing decompressor is a
ValueError with the command that installs it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Generator, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

from pretrain import missing_package
from pretrain.corpus.documents import Counter, ReadingReport
from pretrain.corpus.files import COMPRESSIONS, SourceFile, compression_of

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


class FileStream(io.BufferedReader):
    """The (decompressed) bytes of a file, which is opened when they are first read.

    The stream ends where the file is damaged: that is a problem in `report`, and `damage`.
    """

    def __init__(self, file: SourceFile, report: ReadingReport) -> None:
        self.file = file
        self.report = report
        self.damage: DamagedStreamError | None = None
        super().__init__(_RawStream(self), CHUNK_BYTES)

    def add_problem(
        self,
        reason: str,
        *,
        line: int | None = None,
        offset: int | None = None,
        counter: Counter | None = None,
    ) -> None:
        """Add a problem of this file to the report."""
        self.report.add(self.file.name, reason, line=line, offset=offset, counter=counter)

    def end(self, damage: DamagedStreamError, n_bytes: int) -> None:
        """Report that the file is damaged after this number of bytes."""
        reason = f"{damage}; the {n_bytes:,} bytes before that were read"
        self.add_problem(reason, offset=n_bytes, counter="n_partial_files")
        self.damage = damage


class _RawStream(io.RawIOBase):
    """What a FileStream reads from: it fills the given buffer unless the file ends."""

    def __init__(self, stream: FileStream) -> None:
        super().__init__()
        self._stream = stream
        self._chunks = _read_chunks(stream.file, stream.report)
        self._damage: DamagedStreamError | None = None
        self._rest = b""
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        n = 0
        while n < len(buffer):
            if not self._rest:
                try:
                    self._rest = next(self._chunks)
                except StopIteration:
                    break
                except DamagedStreamError as damage:
                    self._damage = damage
                    break
            part = self._rest[: len(buffer) - n]
            buffer[n : n + len(part)] = part
            self._rest = self._rest[len(part) :]
            n += len(part)
        self._position += n
        # Not before the bytes are used: a binary file is skipped after a look at its first ones.
        if not n and self._damage and not self._stream.damage:
            self._stream.end(self._damage, self._position)
        return n

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _read_chunks(file: SourceFile, report: ReadingReport) -> Generator[bytes, None, None]:
    """Yield the bytes of a file in chunks; adds the bytes on disk to `report.n_read_bytes`."""
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
    try:
        if compression == "zstandard":
            yield from _decompress_zstandard(raw)
        else:
            openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
            stream: Any = openers[compression](raw) if compression else raw
            # read1, not read: at damage, read would lose the bytes that it has already
            # decompressed.
            yield from iter(partial(stream.read1, CHUNK_BYTES), b"")
    except EOFError as error:
        raise DamagedStreamError(f"the {compression} file is truncated") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise DamagedStreamError(f"the {compression or 'plain'} file is broken: {error}") from error


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
                raise OSError(str(error)) from error
            if chunk:
                yield chunk
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError
