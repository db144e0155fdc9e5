"""The documents of a stream as text again: what a run was trained on, wherever its sources are now.

A stream and the tokenizer that wrote it come in, text goes out, byte for byte that of the documents
but for what a tokenizer itself changes (`gpt` lowers case). Nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from pretrain.data.format import TokenStream
from pretrain.tokenizer.tokenizer import Tokenizer

_PIECE_TOKENS = 1 << 19


def document_texts(
    stream: TokenStream, tokenizer: Tokenizer, *, piece_tokens: int = _PIECE_TOKENS
) -> Iterator[tuple[int, str]]:
    """Number and text of each document, in the order of the stream; one of more than so many tokens
    comes in pieces, cut at white space where there is any."""
    entries = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    for number, (begin, end) in enumerate(pairwise(stream.document_offsets.tolist())):
        rest = b""
        for start in range(begin, end, piece_tokens):
            stop = min(start + piece_tokens, end)
            ids = stream.read(start, stop).tolist()
            text = b"".join([rest, *map(entries.__getitem__, ids)])
            cut = len(text) if stop == end else _cut(text)
            yield number, text[:cut].decode("utf-8", "replace")
            rest = text[cut:]


def _cut(text: bytes) -> int:
    """Where a piece ends: before its last white space, or before its last character."""
    cut = max(text.rfind(b" "), text.rfind(b"\n"))
    if cut <= 0:
        cut = max(len(text) - 1, 0)
        while cut and text[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
    return cut
