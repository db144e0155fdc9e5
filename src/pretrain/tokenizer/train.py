"""Text -> a new tokenizer: byte-level BPE, GPT's BPE of 2018, single characters, or plain bytes.

A stream of texts comes in and is sampled into bounded memory; the same texts give the same
tokenizer.json to the byte, whatever their order. A vocabulary size that the text cannot fill is a
ValueError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from pretrain import needs_package
from pretrain.fileio import without_surrogates
from pretrain.tokenizer.byte_level import (
    Split,
    byte_level_bpe,
    byte_symbols,
    special_token,
    spelled,
)
from pretrain.tokenizer.config import N_BYTES_VOCABULARY, TRAINED_NAMES, TokenizerConfig
from pretrain.tokenizer.encode import END_OF_WORD, split_text
from pretrain.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

SAMPLE_BYTES = 24_000_000
"""Default bytes of text from which BPE is trained: more cost time and memory, and change little in
a vocabulary of some thousand tokens."""
MAX_SAMPLE_BYTES = 1 << 30
"""The library counts pairs in 31 bits."""
MIN_MERGED_BYTES = 100_000
"""Of less text, merged tokens occur too rarely: 50 kB of a novel reached 2.53 bits per byte with a
vocabulary of 512 and 2.39 with single bytes."""
LOG_SECONDS = 10.0
UNKNOWN = "<unk>"
_FIRST_PRIVATE = 0xF0000
"""First of the 65,534 characters of Unicode's private plane 15."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    name: str = "bpe",
    vocab_size: int | None = None,
    split: Split = "gpt2",
    sample_bytes: int = SAMPLE_BYTES,
    fast: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> Tokenizer:
    """Train a tokenizer on texts: `name` is bpe, gpt, characters or bytes.

    bpe and gpt are trained on a uniform sample of at most `sample_bytes` of the text; bpe cuts it
    into words by the pre-tokenizer `split`. Without a `vocab_size`, `default_vocab_size` computes
    one; bpe has no merges below MIN_MERGED_BYTES. Text with fewer pairs to merge (by default: that
    occur twice) gets a smaller vocabulary. `fast` uses another trainer, see
    `_train_gigatoken`. `log` gets a line every ten seconds, for text without spaces takes minutes.
    ValueError for an impossible vocab_size, or no text.
    """
    TokenizerConfig(name=name, vocab_size=vocab_size)  # raises an error for a wrong size
    if name not in TRAINED_NAMES:
        raise ValueError(f"tokenizer.name must be one of {', '.join(TRAINED_NAMES)}, not {name!r}")
    if name != "bpe" and (fast or split != "gpt2"):
        raise ValueError(f"only bpe has other pre-tokenizers and a fast trainer, not {name!r}")
    if name == "bytes":
        vocabulary = {symbol: 1 + value for value, symbol in enumerate(byte_symbols())}
        return Tokenizer(byte_level_bpe(vocabulary, [], split="gpt2", added={END_OF_TEXT: 0}))
    if name == "characters":
        return _characters_tokenizer(texts, vocab_size)

    sample, n_bytes = sample_text(texts, min(sample_bytes, MAX_SAMPLE_BYTES))
    if not sample:
        raise ValueError(f"cannot train a tokenizer {name!r}: there is no text")
    size = vocab_size if vocab_size is not None else default_vocab_size(n_bytes)
    if vocab_size is None and name == "bpe" and n_bytes < MIN_MERGED_BYTES:
        size = N_BYTES_VOCABULARY
    # A pair that occurs once teaches nothing, but a requested size should be reached.
    min_frequency = 2 if vocab_size is None else 1
    library = None
    if name == "gpt":
        library = train_gpt(sample, size)
    elif fast:
        library = _train_gigatoken(sample, size, split, min_frequency)
    if library is None:
        library = byte_level_bpe({}, [], split=split, added={})
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            special_tokens=[special_token(END_OF_TEXT)],
            initial_alphabet=list(byte_symbols()),
            show_progress=False,
        )
        chunks, start = (chunk.decode() for chunk in sample), time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(library.train_from_iterator, chunks, trainer, len(sample))
            while wait([training], LOG_SECONDS).not_done:
                n_bytes, seconds = sum(map(len, sample)), time.monotonic() - start
                log(f"training a tokenizer on {n_bytes / 1e6:,.1f} MB of text, {seconds:.0f} s")
        training.result()
    tokenizer = Tokenizer(library)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        log(f"vocabulary {tokenizer.vocab_size:,}, not {vocab_size:,}: no more pairs to merge")
    return tokenizer


def default_vocab_size(n_bytes: int) -> int:
    """Vocabulary size for `n_bytes` of text: the power of two nearest to the square root of
    n_bytes, from 512 to 8192.

    That is 512 up to 500 kB, 1024 at 1 MB, 4096 at 12 MB, 8192 from 34 MB: few enough that each
    token occurs often, as small models on small texts need.
    """
    power = round(math.log2(math.sqrt(max(n_bytes, 1))))
    return min(max(1 << power, 512), 8192)


def sample_text(texts: Iterable[str], max_bytes: int) -> tuple[list[bytes], int]:
    """Sample chunks of at most `max_bytes` in total; returns them and the bytes of all texts.

    A chunk is in the sample if its hash is below a bound, and the bound is halved whenever the
    sample is too large. So every chunk has the same chance, and the sample does not depend on the
    order of the texts.
    """
    bound = 1 << 64
    sample: list[bytes] = []
    n_sampled = n_bytes = 0
    for text in texts:
        for chunk in split_text(without_surrogates(text)):
            data = chunk.encode()
            n_bytes += len(data)
            if bound < 1 << 64 and _hash(data) >= bound:
                continue
            sample.append(data)
            n_sampled += len(data)
            while n_sampled > max_bytes and bound > 1:
                bound //= 2
                sample = [each for each in sample if _hash(each) < bound]
                n_sampled = sum(map(len, sample))
    return sample, n_bytes


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _characters_tokenizer(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(without_surrogates(text))
    if not alphabet:
        raise ValueError("cannot train a tokenizer 'characters': there is no text")
    size = len(alphabet) + 1
    if vocab_size is not None and vocab_size != size:
        raise ValueError(
            f"tokenizer.vocab_size must be {size}, not {vocab_size}: this text has "
            f"{len(alphabet)} characters, and there is an end-of-text token; omit it, or use "
            "--tokenizer.name bpe"
        )

    vocabulary = {END_OF_TEXT: 0}
    vocabulary |= {character: 1 + i for i, character in enumerate(sorted(alphabet))}
    library = LibraryTokenizer(models.WordLevel(vocab=vocabulary, unk_token=END_OF_TEXT))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens([special_token(END_OF_TEXT)])
    return Tokenizer(library)


def train_gpt(sample: list[bytes], vocab_size: int) -> LibraryTokenizer:
    """Train the BPE of GPT (2018): words in lower case, each with END_OF_WORD at its end.

    Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, learned
    40,000 merges of such words after Sennrich et al., 2016, a vocabulary of 40,478. The tokenizer
    is the same as transformers' OpenAIGPTTokenizer. Case, accents and kinds of space are lost, and
    characters that are not in the training text become <unk>: no other tokenizer here loses text.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()

    def words_of(chunk: bytes) -> list[str]:
        text = normalizer.normalize_str(chunk.decode())
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    # The library's own end_of_word_suffix gives other ids in each training (tokenizers 0.23.3), so
    # a private character stands for each letter at the end of a word while it trains.
    letters = sorted({letter for chunk in sample for word in words_of(chunk) for letter in word})
    final = {letter: chr(_FIRST_PRIVATE + number) for number, letter in enumerate(letters)}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, END_OF_TEXT],
        initial_alphabet=letters,
        show_progress=False,
    )
    learner = LibraryTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = (" ".join(w[:-1] + final[w[-1]] for w in words_of(chunk)) for chunk in sample)
    learner.train_from_iterator(lines, trainer=trainer, length=len(sample))

    spelled = {ord(private): letter + END_OF_WORD for letter, private in final.items()}
    model = json.loads(learner.to_str())["model"]
    vocabulary = {token.translate(spelled): id_ for token, id_ in model["vocab"].items()}
    merges = [
        (left.translate(spelled), right.translate(spelled)) for left, right in model["merges"]
    ]
    bpe = models.BPE(vocabulary, merges, unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD)
    library = LibraryTokenizer(bpe)
    library.normalizer = normalizer
    library.pre_tokenizer = splitter
    library.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    library.add_special_tokens([special_token(UNKNOWN), special_token(END_OF_TEXT)])
    return library


def _train_gigatoken(
    sample: list[bytes], vocab_size: int, split: Split, min_frequency: int
) -> LibraryTokenizer | None:
    """Train byte-level BPE with gigatoken (extra `fast`): about six times as fast.

    On ordinary text its merges are those of the library. Where pairs run out, it repeats merges and
    adds some that the text does not contain (gigatoken 0.10); returns None if there is such a one.
    """
    if split != "gpt2":
        raise ValueError(f"the fast trainer supports only the split gpt2, not {split}")
    with needs_package("the fast trainer", "gigatoken", extra="fast"):
        import gigatoken
    data = b"\0".join(sample)
    with _silent_output():
        _, pairs = gigatoken.train_bpe(data, vocab_size - 1, [], separator=b"\0")
    merges = [(spelled(left), spelled(right)) for left, right in pairs]
    tokens = [END_OF_TEXT, *sorted(byte_symbols())] + [left + right for left, right in merges]
    id_of = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    library = byte_level_bpe(id_of, merges, split="gpt2", added={END_OF_TEXT: 0})

    # How often each merge is used: the tokens of the text, and those inside of later tokens.
    encoder = Tokenizer(library).encoder
    counts = np.zeros(len(id_of), np.int64)
    for chunk in sample:
        counts += np.bincount(encoder.encode(chunk.decode(), is_first=True), minlength=len(id_of))
    for left, right in reversed(merges):
        n_uses = counts[id_of[left + right]]
        counts[[id_of[left], id_of[right]]] += n_uses
        if n_uses < min_frequency:
            return None
    return library if len(set(merges)) == len(merges) else None


@contextmanager
def _silent_output() -> Iterator[None]:
    """Discard the output of a library that prints from outside Python."""
    sys.stdout.flush()
    copies = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in copies:
            os.dup2(null, descriptor)
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(null)
