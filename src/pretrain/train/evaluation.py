"""The held-out split in the loop: each process scores its batches of it, and all know the sum."""

from __future__ import annotations

import math

from pretrain.data import evaluation_batches
from pretrain.evaluate import Score, byte_lengths
from pretrain.evaluate.loss import EVALUATION_TOKENS, score_batches
from pretrain.train.build import uncompiled
from pretrain.train.run import Run
from pretrain.train.signals import StopSignals


@uncompiled
def evaluate_split(run: Run, *, whole: bool, stop: StopSignals | None = None) -> Score | None:
    """The held-out split, or the fixed part of it that is looked at during training; None if a
    signal came meanwhile."""
    number, n = run.model.eval_shard
    context = run.lm_loss.decoder.config.window_tokens
    batches = evaluation_batches(
        run.data.split("val"),
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        limit_tokens=None if whole else run.settings.evaluate_tokens,
        rank=number,
        size=n,
    )
    own = score_batches(
        run.lm_loss,
        (batch for batch in batches if stop is None or not stop.breaks_off(run.world)),
        byte_lengths_V=byte_lengths(run.data.tokenizer()),
        world=run.world,
        precision=run.settings.precision,
    )
    if stop is not None and stop.breaks_off(run.world):
        return None
    own = own if run.model.owns_loss else []
    nats = math.fsum(run.world.all_gather_uneven([each.nats for each in own]))
    counts = (sum(each.tokens for each in own), sum(each.bytes for each in own))
    tokens, n_bytes = run.world.all_sum(*counts)
    return Score(nats, int(tokens), int(n_bytes))
