"""Draws the texts of `evaluate` token by token, as an HTML file that needs nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.output import Output
from pretrain.report import heat_map_page

if TYPE_CHECKING:
    from pretrain.runner.open import LoadedModel

# A page of more is slow to look at, and nobody does.
MOST_TOKENS = 20_000


def draw_texts(model: LoadedModel, arguments: argparse.Namespace, output: Output) -> None:
    """Write the page; of all texts together the first MOST_TOKENS are drawn."""
    from pretrain.corpus import read_documents
    from pretrain.evaluate import Pair, annotated_text, token_losses

    tokenizer, left, drawn = model.tokenizer, MOST_TOKENS, {}
    for name in arguments.text:
        documents = read_documents(name, text_field=arguments.text_field)
        for number, document in enumerate(documents, start=1):
            if not left:
                break
            ids = tokenizer.encode(document.text).tolist()[:left]
            if not ids:
                continue
            left -= len(ids)
            found = token_losses(
                model.decoder,
                Pair((tokenizer.start_of_text, *ids), 1),
                world=model.world,
                precision=model.precision,
                stride=arguments.stride,
                top=1,
            )
            rows: list[dict[str, Any]] = annotated_text(tokenizer, found)
            drawn[name if number == 1 else f"{name}, document {number:,}"] = rows
    cut = "" if left else f" Drawn are the first {MOST_TOKENS:,} tokens."
    note = "The redder a token, the less the model foresaw it from what stands before." + cut
    page = heat_map_page(drawn, model=str(model.path), note=note)
    Path(arguments.heat_map).write_text(page, encoding="utf-8", newline="\n")
    output.say(f"{arguments.heat_map}: {MOST_TOKENS - left:,} tokens, by their nats")
