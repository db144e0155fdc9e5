"""The byte alphabet of GPT-2: each byte value is one printable character in the vocabulary file.

Byte values come in and characters go out, or the reverse; a character outside the alphabet is a
KeyError for the caller to name. Source: Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019.
"""

from __future__ import annotations

from functools import cache


@cache
def byte_symbols() -> tuple[str, ...]:
    """The character of each byte value, 256 of them.

    Printable Latin-1 characters stand for themselves, the other 68 values follow each other from
    U+0100.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols = []
    n_moved = 0
    for value in range(256):
        if value in printable:
            symbols.append(chr(value))
        else:
            symbols.append(chr(0x100 + n_moved))
            n_moved += 1
    return tuple(symbols)


@cache
def symbol_bytes() -> dict[str, int]:
    """The byte value of each character of the alphabet."""
    return {symbol: value for value, symbol in enumerate(byte_symbols())}
