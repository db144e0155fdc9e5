"""A model and a run that take seconds, for tests of training and of the command line."""

from __future__ import annotations

from pathlib import Path

TINY = [
    *"--model.n_layers 2 --model.n_heads 2 --model.d_model 32 --model.context_length 32".split(),
    *"--model.ngram_rows 1024".split(),  # 131,072 rows are 84 MB in each checkpoint
    *"--train.batch_tokens 256 --train.evaluate_tokens 512 --train.threads 1".split(),
    *"--train.device cpu --tokenizer.vocab_size 400".split(),
]


def write_llama(folder: Path, *, context_length: int, add_bos: bool = True) -> Path:
    """Write a random llama with 400 token ids in transformers' format, with or without a
    beginning-of-text token. Unlike a run of a few steps, its predictions depend on the context."""
    from oracles import config_of, random_decoder
    from pretrain.corpus.reading import read_documents
    from pretrain.export.hf import write_hugging_face
    from pretrain.tokenizer.train import train_tokenizer

    texts = [document.text for document in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    tokenizer.add_bos = add_bos
    config = config_of("llama", context_length=context_length)
    decoder = random_decoder(config, vocab_size=tokenizer.vocab_size)
    write_hugging_face(folder, decoder=decoder, tokenizer=tokenizer)
    return folder
