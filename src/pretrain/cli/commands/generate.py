"""Continue a prompt with a trained model.

pretrain generate runs/english-1 --prompt "The people of the United States" --n 3
"""

from __future__ import annotations

import argparse

from pretrain.cli.options import DEVICE, MODEL, SPECIAL, option
from pretrain.cli.output import Output
from pretrain.runner.open import load_model

OPTIONS = (
    MODEL,
    option("--prompt TEXT", "text to continue [none]", ""),
    SPECIAL,
    option("--max-tokens N", "length limit", 200, least=1),
    option("--temperature T", "0: greedy decoding", 0.8),
    option("--top-k K", "sample from the K most probable tokens", type=int),
    option(
        "--top-p P",
        "sample from the most probable tokens whose probabilities add up to P",
        type=float,
    ),
    option("--seed S", "seed of sampling", 1),
    option("--n N", "number of completions", 1, least=1),
    DEVICE,
)


def run(args: argparse.Namespace, output: Output) -> None:
    names = ("max_tokens", "n", "temperature", "top_k", "top_p", "seed", "special")
    options = {name: getattr(args, name) for name in names}
    completions = load_model(args.model, device=args.device).generate(args.prompt, **options)
    output.log("\n\n".join(args.prompt + completion for completion in completions))
    output.result({"completions": completions})
