"""Continue a prompt with a trained model.

pretrain generate runs/english-1 --prompt "The people of the United States" --n 3
"""

from __future__ import annotations

import argparse

from pretrain.cli.output import Output
from pretrain.runner.open import MODEL_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue [none]")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="[200]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy [0.8]"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest that reach P"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="[1]")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="completions [1]")
    parser.add_argument(
        "--special", action="store_true", help="special tokens in the prompt stand for themselves"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def run(args: argparse.Namespace, output: Output) -> int:
    if args.max_tokens < 1 or args.n < 1:
        raise ValueError(
            f"--max-tokens is {args.max_tokens} and --n is {args.n}; both must be at least 1"
        )
    from pretrain.runner.open import load_model

    model = load_model(args.model, device=args.device)

    from pretrain.generate import Sampling, generate, pack_weights

    pack_weights(model.decoder)
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    completions = generate(
        model.decoder,
        model.tokenizer,
        args.prompt,
        max_tokens=args.max_tokens,
        n=args.n,
        sampling=sampling,
        special=args.special,
    )
    for number, text in enumerate(completions):
        output.log(f"{'' if number == 0 else chr(10)}{args.prompt}{text}")
    output.result({"completions": completions})
    return 0
