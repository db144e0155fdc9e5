"""Text -> a new tokenizer: byte-level BPE, single characters, or plain bytes.

A stream of texts comes in and is sampled into bounded memory; the same texts give the same
tokenizer.json to the byte, in whatever order they come. It refuses vocabulary sizes that the text
cannot fill.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

from pretrain.tokenizer.alphabet import byte_symbols
from pretrain.tokenizer.config import N_BYTES_VOCABULARY, TRAINED_NAMES, check_vocab_size
from pretrain.tokenizer.pieces import pieces
from pretrain.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

SAMPLE_BYTES = 50_000_000
"""Most text that BPE learns from; more changes a vocabulary of some thousand entries little and
costs time."""


def train_tokenizer(
    texts: Iterable[str], *, name: str = "bpe", vocab_size: int | None = None
) -> Tokenizer:
    """Make a tokenizer for these texts: `name` is bpe, characters or bytes.

    bpe learns from at most SAMPLE_BYTES of text, a uniform sample of pieces by their hash. A
    `vocab_size` of None is derived from the amount of text, see `default_vocab_size`; a smaller
    vocabulary comes out where the text has no more pairs that occur twice. Raises ValueError for a
    vocab_size that cannot be had, or if there is no text.
    """
    check_vocab_size(vocab_size, name=name)
    if name == "bytes":
        return _bytes_tokenizer()
    if name == "characters":
        return _characters_tokenizer(texts, vocab_size)
    if name == "bpe":
        return _bpe_tokenizer(texts, vocab_size)
    raise ValueError(f"cannot train a tokenizer {name!r}; legal: {', '.join(TRAINED_NAMES)}")


def default_vocab_size(n_bytes: int) -> int:
    """Entries for `n_bytes` of text: the power of two nearest to its square root, from 512 to 8192.

    That is 512 up to 500 kB, 1024 at 1 MB, 4096 at 12 MB, 8192 from 34 MB: few enough that each
    entry is seen often, as small models on small texts need.
    """
    power = round(math.log2(math.sqrt(max(n_bytes, 1))))
    return min(max(1 << power, 512), 8192)


def _bytes_tokenizer() -> Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocabulary = {END_OF_TEXT: 0} | {symbol: 1 + i for i, symbol in enumerate(byte_symbols())}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library)


def _characters_tokenizer(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    alphabet = {
        "\ufffd" if "\ud800" <= character <= "\udfff" else character for character in alphabet
    }
    if not alphabet:
        raise ValueError("cannot make a tokenizer 'characters': there is no text")
    if vocab_size is not None and vocab_size != len(alphabet) + 1:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size}, but this text has {len(alphabet)} "
            "characters, which with the "
            f"end-of-text token makes {len(alphabet) + 1}; leave it out, or take "
            "--tokenizer.name bpe"
        )

    vocabulary = {END_OF_TEXT: 0}
    vocabulary |= {character: 1 + i for i, character in enumerate(sorted(alphabet))}
    library = Library(models.WordLevel(vocab=vocabulary, unk_token=END_OF_TEXT))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library)


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    sample, n_bytes = _sample(texts)
    if not sample:
        raise ValueError("cannot train a tokenizer 'bpe': there is no text")
    wanted = vocab_size if vocab_size is not None else default_vocab_size(n_bytes)

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        # A pair seen once teaches nothing; but who asks for a size shall have whatever the text can
        # give.
        min_frequency=2 if vocab_size is None else 1,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=list(byte_symbols()),
        show_progress=False,
    )
    library.train_from_iterator(sample, trainer=trainer, length=len(sample))
    tokenizer = Tokenizer(library)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size: asked for {vocab_size}, this corpus yields only "
            f"{tokenizer.vocab_size} entries; "
            f"legal: {N_BYTES_VOCABULARY}..{tokenizer.vocab_size}"
        )
    return tokenizer


def _sample(texts: Iterable[str]) -> tuple[list[str], int]:
    """Pieces of at most SAMPLE_BYTES together, in a fixed order, and the number of bytes of all
    texts.

    A piece stays while its hash is below a bound, which halves whenever there is too much: every
    piece has the same chance, and which ones stay does not depend on the order of the texts.
    """
    bound = 1 << 64
    kept: list[tuple[int, str, int]] = []
    n_kept = n_bytes = 0
    for piece, data in _hashable_pieces(texts):
        n_bytes += len(data)
        key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if key >= bound:
            continue
        kept.append((key, piece, len(data)))
        n_kept += len(data)
        while n_kept > SAMPLE_BYTES and bound > 1:
            bound //= 2
            kept = [entry for entry in kept if entry[0] < bound]
            n_kept = sum(entry[2] for entry in kept)
    return [piece for _, piece, _ in sorted(kept)], n_bytes


def _hashable_pieces(texts: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for text in texts:
        for piece in pieces(text):
            try:
                data = piece.encode()
            except UnicodeEncodeError:
                data = piece.encode("utf-16-le", "surrogatepass")
                piece = data.decode("utf-16-le", "replace")
                data = piece.encode()
            yield piece, data
