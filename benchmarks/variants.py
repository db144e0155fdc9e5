"""What was tried in `fast` and is not in it: each a function that changes classes of this process.

`ablations.py` compares them with `fast` as it is. They live here and not behind an option: one
that nobody should set is a burden to all who read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model import loss as losses
from pretrain.model.decoder import Decoder
from pretrain.model.layers import Attention, Linear, rope_cos_sin
from pretrain.model.loss import LMLoss
from pretrain.optim import muon, param_groups


def _with_parameters(make: Callable[[Decoder], dict[str, nn.Module | nn.Parameter]]) -> None:
    """More parameters for each decoder that is built; names that end in `bias` start at zero."""
    plain = Decoder.__init__

    def init(self: Decoder, *given: Any, **named: Any) -> None:
        plain(self, *given, **named)
        for name, part in make(self).items():
            setattr(self, name, part)

    Decoder.__init__ = init  # type: ignore[method-assign]


def x0_skips() -> None:
    """Before each block the embedding is added again, by a learned weight: nanochat."""
    _with_parameters(lambda d: {"x0_bias": nn.Parameter(torch.zeros(d.config.n_layers))})

    def forward(self: Any, ids_BT: Tensor, *, cache: Any = None, dropout_rng: Any = None) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1])
        x = x0 = self.embed(ids_BT, positions_T, cache, dropout_rng)
        rotation = rope_cos_sin(positions_T, self.config)
        for i, block in enumerate(self.blocks.values()):
            x = block(x + self.x0_bias[i] * x0, rotation, cache, dropout_rng)
        return self.final_norm(x)  # type: ignore[no-any-return]

    Decoder.forward = forward  # type: ignore[method-assign]


def smear() -> None:
    """Each embedding takes a learned share of the one before it: modded-nanogpt."""
    _with_parameters(lambda d: {"smear_bias": nn.Parameter(torch.zeros(d.config.d_model))})
    plain = Decoder._embed

    def embed(self: Any, *given: Any) -> Tensor:
        x = plain(self, *given)
        return x + self.smear_bias * F.pad(x, (0, 0, 1, 0))[:, :-1]

    Decoder._embed = embed  # type: ignore[method-assign]


def value_embeddings() -> None:
    """Values of every other layer, the last too, take an embedding of their id: "Value Residual
    Learning" (Zhou et al., 2024) as in modded-nanogpt."""
    seen: dict[str, Tensor] = {}

    class Value(Linear):
        embedding: nn.Embedding | None = None

        def forward(self, x: Tensor) -> Tensor:
            value = super().forward(x)
            return value if self.embedding is None else value + self.embedding(seen["ids"])

    plain, embed = Attention.__init__, Decoder._embed

    def init(self: Attention, config: Any, layer: int) -> None:
        plain(self, config, layer)
        self.value = Value(config.d_model, config.d_model, bias=False)

    def remember(self: Decoder, ids_BT: Tensor, *given: Any) -> Tensor:
        seen["ids"] = ids_BT
        return embed(self, ids_BT, *given)

    Attention.__init__ = init  # type: ignore[method-assign]
    Decoder._embed = remember  # type: ignore[method-assign]

    def tables(decoder: Decoder) -> dict[str, nn.Module | nn.Parameter]:
        for block in list(decoder.blocks.values())[::-2]:
            value: Any = block.get_submodule("attention.value")
            value.embedding = nn.Embedding(decoder.vocab_size, decoder.config.d_model)
        return {}

    _with_parameters(tables)


def softcap() -> None:
    """Logits between -15 and 15 by a tanh: "Gemma 2" (2024)."""

    def capped(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, **_: Any) -> Tensor:
        logits = 15 * torch.tanh((hidden_ND @ weight_VD.T).float() / 15)
        return F.cross_entropy(logits, targets_N, ignore_index=-100, reduction="sum")

    losses.chunked_cross_entropy = capped  # type: ignore[assignment]


def two_tokens() -> None:
    """In training the id after the next one is predicted too, through a matrix of its own, at a
    fifth of the weight: "Better & Faster Large Language Models via Multi-token Prediction"
    (Gloeckle et al., 2024)."""
    _with_parameters(lambda d: {"second": Linear(d.config.d_model, d.config.d_model, bias=False)})

    def forward(self: LMLoss, batch: Any) -> tuple[Tensor, Tensor]:
        decoder: Any = self.decoder
        hidden = decoder(batch.inputs)
        targets_N = batch.targets.flatten()
        nats = losses.chunked_cross_entropy(hidden.flatten(0, 1), decoder.head_weight, targets_N)
        if self.training:
            later = F.pad(batch.targets, (0, 1), value=-100)[:, 1:].flatten()
            more = losses.chunked_cross_entropy(
                decoder.second(hidden).flatten(0, 1), decoder.head_weight, later
            )
            nats = nats + 0.2 * (more - more.detach())
        return nats, (targets_N != losses.IGNORE_INDEX).sum()

    LMLoss.forward = forward  # type: ignore[method-assign]


def normuon() -> None:
    """Rows of an update are divided by a running size of theirs: "NorMuon" (Li et al., 2025)."""
    # Each shape is a stack of its own, once a step.
    squares: dict[torch.Size, Tensor] = {}
    plain = muon.orthogonalize

    def orthogonalize(matrices_NMK: Tensor, **named: Any) -> Tensor:
        updates = plain(matrices_NMK, **named)
        now = updates.square().mean(2, keepdim=True)
        key = updates.shape
        squares[key] = squares.get(key, torch.zeros_like(now)).lerp(now, 0.05)
        evened = updates / (squares[key].sqrt() + 1e-8)
        norms = updates.norm(dim=(1, 2), keepdim=True)
        return evened * norms / (evened.norm(dim=(1, 2), keepdim=True) + 1e-8)

    muon.orthogonalize = orthogonalize  # type: ignore[assignment]


def cautious_decay() -> None:
    """Only weights that the update makes smaller anyway are decayed: "Cautious Weight Decay" (Chen
    et al., 2025)."""
    plain = param_groups.muon_update

    @torch.no_grad()
    def muon_update(matrices: list[Tensor], *given: Any, **named: Any) -> None:
        before = [matrix.clone() for matrix in matrices]
        plain(matrices, *given, **{**named, "weight_decay": 0.0})
        for matrix, old in zip(matrices, before, strict=True):
            is_shrinking = (old - matrix) * old > 0
            matrix.sub_(old * is_shrinking, alpha=named["lr"] * named["weight_decay"])

    param_groups.muon_update = muon_update  # type: ignore[attr-defined]


def soap() -> None:
    """Adam in the eigenbasis of Shampoo's two sides, which a QR step turns along at every tenth
    step, with updates as large as Muon's: "SOAP" (Vyas et al., 2024), algorithm 3."""
    # Each shape is a stack of its own, once a step: sides, their bases, Adam's two memories, steps.
    seen: dict[torch.Size, dict[str, Any]] = {}

    @torch.no_grad()
    def muon_update(
        matrices: list[Tensor],
        memories: list[Tensor],
        gradients: list[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        orthogonalizer: muon.Orthogonalizer,
    ) -> None:
        grad = torch.stack(list(gradients))
        sides = (grad @ grad.mT, grad.mT @ grad)
        state = seen.setdefault(grad.shape, {"steps": 0, "square": torch.zeros_like(grad)})
        if not state["steps"]:
            state["sides"] = sides
            state["bases"] = tuple(torch.linalg.eigh(side)[1] for side in sides)
        state["steps"] += 1
        for side, now in zip(state["sides"], sides, strict=True):
            side.lerp_(now, 0.05)
        left, right = state["bases"]
        rotated = left.mT @ grad @ right
        state["square"].lerp_(rotated.square(), 0.05)
        torch._foreach_lerp_(memories, gradients, 1 - momentum)
        mean = left.mT @ torch.stack(list(memories)) @ right / (1 - momentum ** state["steps"])
        square = state["square"] / (1 - 0.95 ** state["steps"])
        update = left @ (mean / (square.sqrt() + 1e-8)) @ right.mT
        update *= muon.ADAMW_RMS / (update.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-8)
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, update.unbind(), alpha=-lr)
        if state["steps"] % 10 == 0:
            state["bases"] = tuple(
                torch.linalg.qr(side @ basis)[0]
                for side, basis in zip(state["sides"], state["bases"], strict=True)
            )

    param_groups.muon_update = muon_update  # type: ignore[attr-defined]


VARIANTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        x0_skips,
        smear,
        value_embeddings,
        softcap,
        two_tokens,
        normuon,
        cautious_decay,
        soap,
    )
}
