"""The BPE of GPT (2018): words of lower-cased, cleaned text, each with a sign at its end.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, learned 40,000
merges over such words after Sennrich et al., 2016, which made 40,478 entries. What is made here is
what transformers' OpenAIGPTTokenizer makes. Case, accents and kinds of space are lost, and
characters that the training text had not become <unk>: no other tokenizer here loses text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "<unk>"
WORD_END = re.compile("</w>$")
"""What ends an entry that ends a word; a space stands there in a text."""


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


def is_gpt(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    normalizer, model = description.get("normalizer") or {}, description["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and model.get("type") == "BPE"
        and model.get("end_of_word_suffix") == "</w>"
    )
