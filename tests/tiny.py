"""A model and a run that take seconds: what the tests of training and of the command line work
on."""

from __future__ import annotations

TINY = [
    *"--model.n_layers 2 --model.n_heads 2 --model.d_model 32 --model.context_length 32".split(),
    *"--train.batch_tokens 256 --train.evaluate_tokens 512 --train.threads 1".split(),
    *"--train.device cpu --tokenizer.vocab_size 400".split(),
]
