"""Show the distribution over the next token after a prompt.

pretrain next runs/english-1 --prompt "The United States of" --top 5
pretrain next runs/english-1 --prompt "The United States of" --answer " America"
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from pretrain.cli.options import DEVICE, MODEL, SPECIAL, option
from pretrain.cli.output import Output
from pretrain.runner.open import LoadedModel, load_model

OPTIONS = (
    MODEL,
    option("--prompt TEXT", "text before the token [none]", ""),
    SPECIAL,
    option("--top K", "number of tokens", 10, least=1),
    option("--answer TEXT", "the true continuation: probability and rank of each of its tokens"),
    DEVICE,
)


def run(args: argparse.Namespace, output: Output) -> None:
    if args.answer is not None and args.special:
        raise ValueError("--answer needs a prompt in plain text; leave out --special")
    model = load_model(args.model, device=args.device)
    if args.answer is not None:
        _show_answer(model, args, output)
        return
    tokens = model.next_tokens(args.prompt, top=args.top, special=args.special)
    rows = [token._asdict() for token in tokens]
    _show_tokens(rows, output)
    output.result({"tokens": rows})


def _show_tokens(rows: list[dict[str, Any]], output: Output) -> None:
    for row in rows:
        bar = "#" * round(40 * row["probability"])
        output.log(f"{row['probability']:8.4f}  {row['text']!r:<16} {bar}")


def _show_answer(model: LoadedModel, args: argparse.Namespace, output: Output) -> None:
    """Show the most probable tokens, and then those of the answer."""
    from pretrain.evaluate.loglikelihood import encode_pair
    from pretrain.evaluate.token_stats import token_losses

    tokenizer = model.tokenizer
    pair = encode_pair(tokenizer, args.prompt, args.answer)
    losses = token_losses(model, pair, top=args.top)
    rows = [
        {"id": id_, "text": tokenizer.token_text(id_), "probability": probability}
        for id_, probability in losses[0].most_probable
    ]
    answer = [{"id": loss.id, **loss.row(tokenizer)} for loss in losses]
    nats = math.fsum(loss.nats for loss in losses)
    _show_tokens(rows, output)
    output.log("the answer:")
    for row in answer:
        output.log(
            f"{row['probability']:8.4f}  {row['text']!r:<16} rank {row['rank']:,}, "
            f"{row['nats']:.2f} nats"
        )
    if len(answer) > 1:
        output.log(f"{math.exp(-nats):8.4f}  all of it, {nats:.2f} nats")
    output.result({"tokens": rows, "answer": {"nats": nats, "tokens": answer}})
