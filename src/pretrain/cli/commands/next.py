"""The distribution over the next token: what the model expects after a prompt, and how surely.

pretrain next runs/english-1 --prompt "The United States of" --top 5
pretrain next runs/english-1 --prompt "The United States of" --answer " America"   a flash card
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.runner.open import MODEL_HELP

if TYPE_CHECKING:
    from pretrain.runner.open import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text before the token [none]")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="how many tokens [10]")
    parser.add_argument(
        "--special", action="store_true", help="special tokens in the prompt stand for themselves"
    )
    parser.add_argument(
        "--answer", metavar="TEXT", help="what does come: its probability and rank, token by token"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def run(args: argparse.Namespace, output: Output) -> int:
    if args.top < 1:
        raise ValueError(f"--top is {args.top}; it must be at least 1")
    if args.answer is not None and args.special:
        raise ValueError("--answer goes with a prompt that is plain text; leave out --special")
    from pretrain.runner.open import load_model

    model = load_model(args.model, device=args.device)
    if args.answer is not None:
        return _show_card(model, args, output)

    from pretrain.generate import next_distribution

    with model.world.autocast(model.precision):
        probabilities = next_distribution(
            model.decoder, model.tokenizer, args.prompt, special=args.special
        )
    values, ids = probabilities.topk(min(args.top, len(probabilities)))
    rows = [
        {"id": i, "text": model.tokenizer.token_text(i), "probability": p}
        for i, p in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    _say(rows, output)
    output.result({"tokens": rows})
    return 0


def _say(rows: list[dict[str, Any]], output: Output) -> None:
    for row in rows:
        bar = "#" * round(40 * row["probability"])
        output.log(f"{row['probability']:8.4f}  {row['text']!r:<16} {bar}")


def _show_card(model: LoadedModel, args: argparse.Namespace, output: Output) -> int:
    """What was expected, then what came."""
    from pretrain.evaluate import encode_pair, token_losses

    tokenizer = model.tokenizer
    pair = encode_pair(tokenizer, args.prompt, args.answer)
    found = token_losses(
        model.decoder, pair, world=model.world, precision=model.precision, top=args.top
    )
    rows = [
        {"id": i, "text": tokenizer.token_text(i), "probability": p}
        for i, p in found[0].most_probable
    ]
    answer = [
        {
            "id": each.id,
            "text": tokenizer.token_text(each.id),
            "probability": each.probability,
            "rank": each.rank,
            "nats": each.nats,
        }
        for each in found
    ]
    nats = math.fsum(each.nats for each in found)
    _say(rows, output)
    output.log("and what came:")
    for row in answer:
        output.log(
            f"{row['probability']:8.4f}  {row['text']!r:<16} rank {row['rank']:,}, "
            f"{row['nats']:.2f} nats"
        )
    if len(answer) > 1:
        output.log(f"{math.exp(-nats):8.4f}  all of it, {nats:.2f} nats")
    output.result({"tokens": rows, "answer": {"nats": nats, "tokens": answer}})
    return 0
