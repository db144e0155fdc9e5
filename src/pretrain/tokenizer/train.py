"""Text -> a new tokenizer: byte-level BPE, single characters, or plain bytes.

A stream of texts comes in and is sampled into bounded memory; the same texts give the same
tokenizer.json to the byte, in whatever order they come. It refuses vocabulary sizes that the text
cannot fill.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pretrain.tokenizer.byte_level import Split, byte_level_bpe, byte_symbols, pre_tokenizer
from pretrain.tokenizer.config import TRAINED_NAMES, check_vocab_size
from pretrain.tokenizer.encode import pieces
from pretrain.tokenizer.tokenizer import Tokenizer, without_surrogates
from pretrain.tokenizer.tokenizer_json import END_OF_TEXT

if TYPE_CHECKING:
    import tokenizers

SAMPLE_BYTES = 24_000_000
"""Most text that BPE learns from unless more is asked for: for a vocabulary of some thousand
entries more changes little and costs time and memory."""
MAX_SAMPLE_BYTES = 1 << 30
"""Most that can be asked for: the library counts pairs in 31 bits."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    name: str = "bpe",
    vocab_size: int | None = None,
    split: Split = "gpt2",
    sample_bytes: int = SAMPLE_BYTES,
    fast: bool = False,
) -> Tokenizer:
    """Make a tokenizer for these texts: `name` is bpe, gpt, characters or bytes.

    bpe and gpt learn from at most `sample_bytes` of text, a uniform sample of pieces by their hash;
    bpe cuts it into words by the pre-split `split`. A `vocab_size` of None is derived from the
    amount of text, see `default_vocab_size`; a smaller vocabulary comes out where the text has no
    more pairs that occur twice. `fast` takes another trainer, see `_train_fastly`. Raises
    ValueError for a vocab_size that cannot be had, or if there is no text.
    """
    check_vocab_size(vocab_size, name=name)
    if name != "bpe" and (fast or split != "gpt2"):
        raise ValueError(f"a tokenizer {name!r} has no pre-split and no fast trainer; bpe has")
    if name == "bytes":
        return _bytes_tokenizer()
    if name == "characters":
        return _characters_tokenizer(texts, vocab_size)
    if name in ("bpe", "gpt"):
        sample, n_bytes = _sample(texts, min(sample_bytes, MAX_SAMPLE_BYTES))
        if not sample:
            raise ValueError(f"cannot train a tokenizer {name!r}: there is no text")
        wanted = vocab_size if vocab_size is not None else default_vocab_size(n_bytes)
        if name == "gpt":
            library = train_gpt(sample, wanted, end_of_text=END_OF_TEXT)
        elif fast:
            library = _train_fastly(sample, wanted, split)
        else:
            # A pair seen once teaches nothing; but who asks for a size shall have whatever the text
            # can give.
            library = _train(sample, wanted, split, 2 if vocab_size is None else 1)
        return _checked(Tokenizer(library), vocab_size)
    raise ValueError(f"cannot train a tokenizer {name!r}; legal: {', '.join(TRAINED_NAMES)}")


def default_vocab_size(n_bytes: int) -> int:
    """Entries for `n_bytes` of text: the power of two nearest to its square root, from 512 to 8192.

    That is 512 up to 500 kB, 1024 at 1 MB, 4096 at 12 MB, 8192 from 34 MB: few enough that each
    entry is seen often, as small models on small texts need.
    """
    power = round(math.log2(math.sqrt(max(n_bytes, 1))))
    return min(max(1 << power, 512), 8192)


def _bytes_tokenizer() -> Tokenizer:
    vocabulary = {symbol: 1 + i for i, symbol in enumerate(byte_symbols())}
    return Tokenizer(byte_level_bpe(vocabulary, [], split="gpt2", added={END_OF_TEXT: 0}))


def _characters_tokenizer(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(without_surrogates(text))
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


def _checked(tokenizer: Tokenizer, vocab_size: int | None) -> Tokenizer:
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size: asked for {vocab_size}, this corpus yields only "
            f"{tokenizer.vocab_size} entries; legal: at most {tokenizer.vocab_size}"
        )
    return tokenizer


def _train(
    sample: list[bytes], vocab_size: int, split: Split, min_frequency: int
) -> tokenizers.Tokenizer:
    """Byte-level BPE by the library that writes tokenizer.json."""
    from tokenizers import AddedToken, decoders, models, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizer(split)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=list(byte_symbols()),
        show_progress=False,
    )
    texts = (piece.decode() for piece in sample)
    library.train_from_iterator(texts, trainer=trainer, length=len(sample))
    return library


def _train_fastly(sample: list[bytes], vocab_size: int, split: Split) -> tokenizers.Tokenizer:
    """By gigatoken, of the extra `fast`: some six times as fast, for GPT-2's split only.

    On ordinary text its merges are those of `_train`; on text of very few different words they are
    not, therefore it has to be asked for.
    """
    if split != "gpt2":
        raise ValueError(f"the fast trainer knows the split gpt2 only, not {split}")
    try:
        import gigatoken
    except ImportError:
        raise ValueError(
            "the fast trainer is gigatoken: python -m pip install 'pretrain[fast]'"
        ) from None
    data = b"\0".join(sample)
    with _silent_output():
        _, found = gigatoken.train_bpe(data, vocab_size - 1, [], separator=b"\0")
    symbols = byte_symbols()
    merges = [
        ("".join(symbols[b] for b in left), "".join(symbols[b] for b in right))
        for left, right in found
    ]
    entries = dict.fromkeys([END_OF_TEXT, *sorted(symbols), *(a + b for a, b in merges)])
    vocabulary = {entry: id_ for id_, entry in enumerate(entries)}
    return byte_level_bpe(vocabulary, merges, split="gpt2", added={END_OF_TEXT: 0})


@contextmanager
def _silent_output() -> Iterator[None]:
    """What a library prints from outside Python must not stand among our own output."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    kept_error = os.dup(2)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 1)
        os.dup2(kept_error, 2)
        for descriptor in (kept, kept_error, nowhere):
            os.close(descriptor)


def _sample(texts: Iterable[str], most_bytes: int) -> tuple[list[bytes], int]:
    """Pieces of at most `most_bytes` together, and the number of bytes of all texts.

    Once there is too much, a piece stays while its hash is below a bound, which halves whenever
    that is needed: every piece has the same chance, and which ones stay does not depend on the
    order of the texts.
    """
    bound = 1 << 64
    kept: list[bytes] = []
    n_kept = n_bytes = 0
    for text in texts:
        for piece in pieces(without_surrogates(text)):
            data = piece.encode()
            n_bytes += len(data)
            if bound < 1 << 64 and _hash(data) >= bound:
                continue
            kept.append(data)
            n_kept += len(data)
            while n_kept > most_bytes and bound > 1:
                bound //= 2
                kept = [each for each in kept if _hash(each) < bound]
                n_kept = sum(map(len, kept))
    return kept, n_bytes


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


UNKNOWN = "<unk>"


def train_gpt(
    sample: Sequence[bytes], vocab_size: int, *, end_of_text: str
) -> tokenizers.Tokenizer:
    """A library tokenizer of at most `vocab_size` entries, learned from texts in UTF-8."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix="</w>",
        special_tokens=[
            AddedToken(name, special=True, normalized=False) for name in (UNKNOWN, end_of_text)
        ],
        show_progress=False,
    )
    texts = (text.decode() for text in sample)
    library.train_from_iterator(texts, trainer=trainer, length=len(sample))
    return library
