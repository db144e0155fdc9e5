"""500 tokens from a model of 12 M parameters: ours, nanoGPT's sampler, transformers with its cache.

python benchmarks/generating.py [--nanogpt CHECKOUT] [--rounds 3]

All are a GPT-2 (d 384, 6 layers, vocabulary 4,096, context 512) with random weights, since the
speed does not depend on them, and draw from the 50 most probable
tokens at temperature 0.8; one text, float32. Everybody works in this process, by turns. Ours is
also timed for 16 texts at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quiet import quiet_rounds
from rows import OURS, Row, rows_of, table

TOKENS, CONTEXT, TEXTS = 500, 512, 16
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4096}
Generate = Callable[[], int]


def ours(n: int) -> Generate:
    from pretrain.generate.packing import pack_weights
    from pretrain.generate.sampling import Sampling, generate_ids
    from pretrain.model.config import ModelConfig, model_defaults
    from pretrain.model.decoder import build

    sizes = {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": CONTEXT}
    config = ModelConfig(**{**model_defaults({"family": "gpt2"}), **sizes})
    decoder = build(config, vocab_size=4096, seed=1)
    pack_weights(decoder)
    sampling = Sampling(temperature=0.8, top_k=50)
    return lambda: sum(
        map(len, generate_ids(decoder, [1], max_tokens=TOKENS, n=n, sampling=sampling))
    )


def by_nanogpt(checkout: str) -> Generate:
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(GPTConfig(**SIZES, block_size=CONTEXT, dropout=0.0)).eval()
    prompt = torch.ones(1, 1, dtype=torch.int64)

    def generate() -> int:
        with torch.no_grad():
            ids = model.generate(prompt, TOKENS, temperature=0.8, top_k=50)
        return int(ids.shape[1]) - 1

    return generate


def transformers() -> Generate:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=CONTEXT, **ends)).eval()
    prompt = torch.ones(1, 1, dtype=torch.int64)

    def generate() -> int:
        with torch.no_grad():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=TOKENS,
                do_sample=True,
                temperature=0.8,
                top_k=50,
                use_cache=True,
            )
        return int(ids.shape[1]) - 1

    return generate


def measure(*, nanogpt: str | None, rounds: int) -> Iterator[Row]:
    torch.manual_seed(1)
    many = f"{OURS}, {TEXTS} texts"
    everybody = {OURS: ours(1), many: ours(TEXTS), "transformers": transformers()}
    if nanogpt:
        everybody["nanoGPT"] = by_nanogpt(nanogpt)

    def one_round(_: int) -> dict[str, float]:
        seconds = {}
        for name, generate in everybody.items():
            began = time.perf_counter()
            made, expected = generate(), TOKENS * (TEXTS if name == many else 1)
            seconds[name] = time.perf_counter() - began
            assert made == expected, f"{name} made {made} tokens of {expected}"
        return seconds

    seconds, others = quiet_rounds(one_round, rounds=rounds)
    yield from rows_of(f"generating {TOKENS} tokens", "s", seconds, others=others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    print("\n".join(table(measure(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
