"""The beginning of a GGUF file, walked before the package gguf reads it: every count against what
the file has.

The package trusts the counts: an array of a million million entries in a file of 49 bytes keeps it
busy for days. What is cut, nested, of another version or of an unknown kind is a FormatError that
names the byte.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from pretrain.export.layouts import FormatError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a value of each kind, by the number of the kind.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The largest vocabularies have 256,000 entries and 500,000 merges.
_MOST_ENTRIES, _MOST_KEYS, _MOST_TENSORS, _MOST_DIMS = 1 << 22, 1 << 16, 1 << 17, 4


def refuse_broken_header(file: Path) -> None:
    """FormatError where keys, values and the list of tensors do not end inside of the file."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        try:
            walk.header()
        except (struct.error, ValueError) as error:
            raise FormatError(
                f"{file} is no whole GGUF file: byte {walk.place:,}: {error}"
            ) from None


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def header(self) -> None:
        version = self.number("<I", most=1 << 32)
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; legal: {_VERSIONS}, little-endian")
        n_tensors, n_keys = self.number("<Q", _MOST_TENSORS), self.number("<Q", _MOST_KEYS)
        for _ in range(n_keys):
            self.string()
            self.value(self.number("<I", most=1 << 32))
        for _ in range(n_tensors):
            self.string()
            self.skip(8 * self.number("<I", _MOST_DIMS) + 4 + 8)  # dims, kind, offset

    def number(self, form: str, most: int) -> int:
        (value,) = struct.unpack_from(form, self.data, self.place)
        if value > most:
            raise ValueError(f"a count of {value:,}; legal: at most {most:,}")
        self.place += struct.calcsize(form)
        return int(value)

    def skip(self, n_bytes: int) -> None:
        if n_bytes > len(self.data) - self.place:
            raise ValueError(f"{n_bytes:,} bytes follow in a file of {len(self.data):,}")
        self.place += n_bytes

    def string(self) -> None:
        self.skip(self.number("<Q", most=1 << 64))

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            inner, n = self.number("<I", most=1 << 32), self.number("<Q", _MOST_ENTRIES)
            if inner == _STRING:
                for _ in range(n):
                    self.string()
            else:
                self.skip(n * self.size(inner))
        else:
            self.skip(self.size(kind))

    def size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value of the kind {kind}, or an array of it; legal: plain ones")
        return _SIZES[kind]
