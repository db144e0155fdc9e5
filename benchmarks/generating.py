"""500 tokens from a model of 12 M parameters: ours, nanoGPT's sampler, transformers with its cache.

python benchmarks/generating.py [--nanogpt CHECKOUT] [--rounds 3]

All are a GPT-2 (d 384, 6 layers, vocabulary 4,096, context 512) with random weights, since the
speed does not hang on them, and draw from the 50 likeliest at temperature 0.8; one text, float32.
Everybody works in this process, by turns. Ours is also timed for 16 texts at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

TOKENS, CONTEXT = 500, 512
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4096}
Generate = Callable[[], int]


def ours(n: int) -> Generate:
    from pretrain.generate import Sampling
    from pretrain.generate.sampling import generate_ids, lay_out_for_generation
    from pretrain.model import ModelConfig, build
    from pretrain.model.config import model_defaults

    sizes = {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": CONTEXT}
    config = ModelConfig(**{**model_defaults({"family": "gpt2"}), **sizes})
    decoder = build(config, vocab_size=4096, seed=1)
    lay_out_for_generation(decoder)
    sampling = Sampling(temperature=0.8, top_k=50)
    return lambda: sum(
        map(len, generate_ids(decoder, [1], max_tokens=TOKENS, n=n, sampling=sampling))
    )


def nanogpt(checkout: str) -> Generate:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(1)
    everybody = {"pretrain": ours(1), "pretrain, 16 texts": ours(16)}
    everybody["transformers"] = transformers()
    if asked.nanogpt:
        everybody["nanoGPT"] = nanogpt(asked.nanogpt)
    seconds: dict[str, list[float]] = {name: [] for name in everybody}
    tokens = {}
    for _ in range(asked.rounds):
        for name, generate in everybody.items():
            began = time.perf_counter()
            tokens[name] = generate()
            seconds[name].append(time.perf_counter() - began)
    print(f"{'':20}{'tokens':>7} {'seconds':>8} {'ours over it':>24}")
    for name, times in seconds.items():
        assert tokens[name] in (TOKENS, 16 * TOKENS), f"{name} made {tokens[name]} tokens"
        ratios = sorted(a / b for a, b in zip(times, seconds["pretrain"], strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:20}{tokens[name]:7,} {statistics.median(times):8.2f} {ratio:>24}")


if __name__ == "__main__":
    main()
