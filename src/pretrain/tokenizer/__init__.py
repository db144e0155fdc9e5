"""Text -> ids and back, without torch.

`Tokenizer` owns a `tokenizer.json` of the library `tokenizers` and encodes with the `encode` module
of its kind: bpe, gpt, characters or bytes. `train` trains one on text, `load` reads one from files,
also those of GPT-2, tiktoken and SentencePiece. `byte_level` has GPT-2's byte alphabet and the
known pre-tokenizers. The end-of-text token is usually `<|endoftext|>`; the same characters in a
text are ordinary text.
"""
