"""Continue a prompt with a trained model.

pretrain generate runs/english-1 --prompt "The people of the United States" --n 3
"""

from __future__ import annotations

import argparse

from pretrain.cli.options import add_device, add_model, add_prompt
from pretrain.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_prompt(parser, "text to continue [none]")
    parser.add_argument(
        "--max-tokens", type=int, default=200, metavar="N", help="length limit [200]"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: greedy decoding [0.8]"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most probable tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most probable tokens whose probabilities add up to P",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of sampling [1]")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="number of completions [1]")
    add_device(parser)


def run(args: argparse.Namespace, output: Output) -> int:
    if args.max_tokens < 1 or args.n < 1:
        raise ValueError(
            f"--max-tokens is {args.max_tokens} and --n is {args.n}; both must be at least 1"
        )
    from pretrain.runner.open import load_model

    completions = load_model(args.model, device=args.device).generate(
        args.prompt,
        max_tokens=args.max_tokens,
        n=args.n,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        special=args.special,
    )
    output.log("\n\n".join(args.prompt + completion for completion in completions))
    output.result({"completions": completions})
    return 0
