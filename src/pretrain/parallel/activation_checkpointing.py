"""Activation checkpointing: recompute a block's activations in backward instead of storing them.

"Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016), by torch's checkpoint. Dropout
masks are a function of their position, so they are the same in both computations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain.compat import matmul_and_attention_ops
from pretrain.model.decoder import Decoder
from pretrain.parallel.config import ActivationCheckpointing


def apply_activation_checkpointing(decoder: Decoder, kind: ActivationCheckpointing) -> None:
    """Let each block store its inputs only (`full`), or its inputs and the results of matmuls and
    attention, which take longest to recompute (`selective`)."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        ops = matmul_and_attention_ops()
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ops)
    for block in decoder.blocks.values():
        block.forward = partial(checkpoint, block.forward, **options)
