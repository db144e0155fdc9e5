"""A held-out passage at the end of a run: what the model expected, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.evaluate.token_stats import predictions
from pretrain.train.build import uncompiled
from pretrain.train.run import Run

PREDICTIONS = "predictions.json"
PASSAGE_TOKENS = 400
# Of the held-out text: far enough to come upon a document of some length.
_SEARCHED_TOKENS = 20_000


@uncompiled
def look_at_passage(run: Run) -> dict[str, Any]:
    """Pieces and cards of the beginning of the longest document among the first held-out ones."""
    tokenizer, stream = run.data.tokenizer(), run.data.split("val")
    ids = stream.read(0, min(stream.n_tokens, _SEARCHED_TOKENS))
    borders = np.flatnonzero(np.isin(ids, [tokenizer.start_of_text, tokenizer.end_of_text]))
    documents = [ids[: borders[0]] if len(borders) else ids]
    documents += [part[1:] for part in np.split(ids, borders)[1:]]
    passage = max(documents, key=len)[:PASSAGE_TOKENS].tolist()
    if not passage:
        return {"passage": [], "cards": []}
    run.model.unshard()
    return predictions(
        run.lm_loss.decoder,
        tokenizer,
        passage,
        world=run.world,
        precision=run.settings.precision,
    )
