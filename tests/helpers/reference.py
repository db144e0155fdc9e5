"""The loss by torch's own operators, with which the chunked one is compared."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pretrain.model.loss import IGNORE_INDEX


def reference_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the summed cross-entropy by F.cross_entropy and autograd, from all logits at once.

    Its value includes smoothing and z_loss.
    """
    logits_NV = hidden_ND @ weight_VD.T
    loss = F.cross_entropy(
        logits_NV,
        targets_N,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=smoothing,
    )
    if z_loss:
        is_valid_N = targets_N != IGNORE_INDEX
        loss = loss + z_loss * (logits_NV.logsumexp(-1).square() * is_valid_N).sum()
    return loss
