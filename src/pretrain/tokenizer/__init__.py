"""Text -> ids and back, without torch.

`tokenizer` holds the one class `Tokenizer` over a `tokenizer.json` of the library `tokenizers`,
whether it is bpe, characters or bytes; `train` makes one from text, `load` from a file;
`encode` cuts text where no token can reach across, which is what makes long texts cheap;
`byte_level` is the byte alphabet of GPT-2. The end-of-text token is `<|endoftext|>`;
the same letters in a text are ordinary text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.tokenizer.config import TokenizerConfig
    from pretrain.tokenizer.load import load_tokenizer
    from pretrain.tokenizer.tokenizer import Tokenizer
    from pretrain.tokenizer.train import default_vocab_size, train_tokenizer

__getattr__ = lazily(
    __name__,
    config="TokenizerConfig",
    load="load_tokenizer",
    tokenizer="Tokenizer",
    train="default_vocab_size train_tokenizer",
)
__all__ = [
    "Tokenizer",
    "TokenizerConfig",
    "default_vocab_size",
    "load_tokenizer",
    "train_tokenizer",
]
