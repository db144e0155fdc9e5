"""A tokenizer and a folder of another program, for all tests of exports and imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from exports import write_hf
from oracles import config_of, random_decoder
from pretrain.corpus.reading import read_documents
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    return train_tokenizer(texts, vocab_size=400)


@pytest.fixture(scope="package")
def hf_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a Llama of grouped heads."""
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, vocab_size=400, split="llama3")
    decoder = random_decoder(config_of("llama", n_kv_heads=2), vocab_size=400)
    return write_hf(tmp_path_factory.mktemp("transformers") / "llama", decoder, tokenizer)
