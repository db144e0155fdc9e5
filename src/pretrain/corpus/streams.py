"""One file -> its bytes in chunks, decompressed, with every cut-off or broken end noticed.

A `SourceFile` comes in, chunks of bytes go out; memory stays at a few MiB whatever the compression
ratio. Damage is raised as `DamagedStreamError` after the good bytes were handed out, and a missing
decompressor is a ValueError with the command that installs it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol, cast

from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.files import SourceFile

CHUNK_BYTES = 1 << 18
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
    try:
        raw: BinaryIO = open(file.path, "rb")  # noqa: SIM115 closed below
    except OSError as error:
        raise ValueError(f"cannot read {str(file.path)!r}: {error.strerror}") from error
    with raw:
        counted = 0
        chunks = _chunks(raw, file.compression, file.n_bytes)
        for chunk in chunks:
            position = raw.tell()
            report.n_read_bytes += position - counted
            counted = position
            yield chunk


def _chunks(raw: BinaryIO, compression: str, n_bytes: int) -> Iterator[bytes]:
    if compression == "zstandard":
        yield from _zstandard_chunks(raw)
        return
    if compression and n_bytes == 0:
        raise DamagedStreamError(f"an empty file is no {compression} file")
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
        raise ValueError(
            "reading .zst needs the package zstandard: python -m pip install zstandard"
        ) from error

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
