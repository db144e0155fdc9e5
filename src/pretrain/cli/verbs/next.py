"""The distribution over the next token: what the model expects after a prompt, and how surely.

pretrain next runs/english-1 --prompt "The United States of" --top 5
"""

from __future__ import annotations

import argparse

from pretrain.cli.models import HELP
from pretrain.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text before the token [none]")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="how many tokens [10]")
    parser.add_argument(
        "--special", action="store_true", help="special tokens in the prompt stand for themselves"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def run(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.top < 1:
        raise ValueError(f"--top is {arguments.top}; it must be at least 1")
    from pretrain.cli.models import open_model

    model = open_model(arguments.model, device=arguments.device)

    from pretrain.generate import next_distribution

    probabilities = next_distribution(
        model.decoder, model.tokenizer, arguments.prompt, special=arguments.special
    )
    values, ids = probabilities.topk(min(arguments.top, len(probabilities)))
    rows = [
        {"id": i, "text": model.tokenizer.decode([i]), "probability": p}
        for i, p in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    for row in rows:
        bar = "#" * round(40 * row["probability"])
        output.say(f"{row['probability']:8.4f}  {row['text']!r:<16} {bar}")
    output.result({"tokens": rows})
    return 0
