"""The header of a GGUF file, checked before the package gguf reads it: every count must fit the
file.

The package trusts the counts: an array of 10^12 elements in a file of 49 bytes keeps it busy for
days. A truncated file, a nested array, another version or an unknown type is a FormatError with the
byte.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from pretrain.export.layouts import FormatError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a value, by the number of its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The largest vocabularies have 256,000 tokens and 500,000 merges.
_MAX_ELEMENTS = 1 << 22
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_DIMS = 4


def check_header(file: Path) -> None:
    """FormatError if keys, values and the list of tensors do not end within the file."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        try:
            header.read()
        except (struct.error, ValueError) as error:
            raise FormatError(
                f"{file} is not a complete GGUF file: byte {header.place:,}: {error}"
            ) from None


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4  # after the magic number

    def read(self) -> None:
        version = self.number("<I", most=1 << 32)
        if version not in _VERSIONS:
            raise ValueError(
                f"the version must be one of {_VERSIONS}, little-endian (got {version})"
            )
        n_tensors, n_keys = self.number("<Q", _MAX_TENSORS), self.number("<Q", _MAX_KEYS)
        for _ in range(n_keys):
            self.string()
            self.value(self.number("<I", most=1 << 32))
        for _ in range(n_tensors):
            self.string()
            self.skip(8 * self.number("<I", _MAX_DIMS) + 4 + 8)  # dims, type, offset

    def number(self, form: str, most: int) -> int:
        (value,) = struct.unpack_from(form, self.data, self.place)
        if value > most:
            raise ValueError(f"a count must be at most {most:,} (got {value:,})")
        self.place += struct.calcsize(form)
        return int(value)

    def skip(self, n_bytes: int) -> None:
        if n_bytes > len(self.data) - self.place:
            raise ValueError(f"{n_bytes:,} bytes should follow in a file of {len(self.data):,}")
        self.place += n_bytes

    def string(self) -> None:
        self.skip(self.number("<Q", most=1 << 64))

    def value(self, type_: int) -> None:
        if type_ == _STRING:
            self.string()
        elif type_ == _ARRAY:
            inner, n = self.number("<I", most=1 << 32), self.number("<Q", _MAX_ELEMENTS)
            if inner == _STRING:
                for _ in range(n):
                    self.string()
            else:
                self.skip(n * self.size(inner))
        else:
            self.skip(self.size(type_))

    def size(self, type_: int) -> int:
        if type_ not in _SIZES:
            raise ValueError(f"values must be numbers, booleans or texts (got type {type_})")
        return _SIZES[type_]
