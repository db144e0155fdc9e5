"""Activations that are not kept for the backward pass, but made again in it, block by block.

"Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016), by torch's checkpoint. Masks of
dropout are a function of their place, so they are the same the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain.model import Decoder
from pretrain.parallel.config import ActivationCheckpointing


def recompute(decoder: Decoder, kind: ActivationCheckpointing) -> None:
    """Let each block keep its inputs only (`full`), or those and the results of its matrix products
    and of attention (`selective`: what costs most to make)."""
    if kind == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _products())
    for block in decoder.blocks.values():
        block.forward = partial(checkpoint, block.forward, **how)


def _products() -> list[Callable[..., Any]]:
    aten = torch.ops.aten
    found: list[Callable[..., Any]] = []
    found += [aten.mm.default, aten.addmm.default, aten.bmm.default]
    for backend in ("flash", "efficient", "cudnn"):
        found.append(getattr(aten, f"_scaled_dot_product_{backend}_attention").default)
    found.append(aten._scaled_dot_product_flash_attention_for_cpu.default)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        found.append(torch.ops.mkldnn._linear_pointwise.default)
    return found
