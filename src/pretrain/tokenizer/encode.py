"""Cuts text where no token of GPT-2's pre-split can reach across, so that pieces encode exactly as
the whole does.

GPT-2's pattern never puts a whitespace character behind another character into one token, and it
never looks back. So every change from non-space to space is a place where the ids of the left and
of the right are independent. Text comes in, its pieces in order go out; nothing is refused, and
only a stretch longer than the limit without any such place is cut blindly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 14
"""A longer run without a safe place (no space in 16,384 characters) is cut blindly: it would cost
time beyond measure in the trainer, and the cut changes at most the tokens that touch it."""

# Python's \s has U+001C..U+001F, Unicode's White_Space (which the library asks) has not.
_OTHER = r"[\S\x1c-\x1f]"
# A plain space behind a non-space is a safe place for every pre-split in use (GPT-4's pulls
# newlines to the left).
_SAFE_PLACE = re.compile(f"{_OTHER}(?= )")


def pieces(text: str, *, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters whose ids, joined, are those of the whole text."""
    start = 0
    while len(text) - start > limit:
        stop = _last_safe_place(text, start, start + limit)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _last_safe_place(text: str, start: int, stop: int) -> int:
    """The last safe place in (start, stop], else `stop`."""
    space = stop
    while (space := text.rfind(" ", start + 1, space + 1)) > start:
        if _SAFE_PLACE.match(text, space - 1):
            return space
        space -= 1
    return stop
