"""A token stream -> the text of its documents, also where the source files are no longer there.

The text is that of the documents byte for byte, except for what a tokenizer itself changes (`gpt`
lower-cases).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from pretrain.data.format import TokenStream
from pretrain.tokenizer.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 19


def document_texts(
    stream: TokenStream, tokenizer: Tokenizer, *, chunk_tokens: int = _CHUNK_TOKENS
) -> Iterator[tuple[int, str]]:
    """Yield number and text of each document, in order. A document of more than `chunk_tokens`
    comes in several chunks, cut at white space where possible."""
    token_bytes = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    for number, (first, end) in enumerate(pairwise(stream.document_offsets.tolist())):
        rest = b""
        for start in range(first, end, chunk_tokens):
            stop = min(start + chunk_tokens, end)
            text = rest + b"".join(token_bytes[id_] for id_ in stream.read(start, stop).tolist())
            cut = len(text) if stop == end else _last_break(text)
            yield number, text[:cut].decode("utf-8", "replace")
            rest = text[cut:]


def _last_break(text: bytes) -> int:
    """Position of the last white space, or else of the last complete character."""
    cut = max(text.rfind(b" "), text.rfind(b"\n"))
    if cut <= 0:
        cut = max(len(text) - 1, 0)
        while cut and text[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
            cut -= 1
    return cut
