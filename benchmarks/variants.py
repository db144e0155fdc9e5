"""What was tried in `fast` and is not in it: each a function that changes classes of this process.

`ablations.py` compares them with `fast` as it is. They live here and not behind an option: one
that nobody should set is a burden to all who read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.model import decoder as decoders
from pretrain.model import loss as losses
from pretrain.model import ngrams
from pretrain.model.decoder import Decoder
from pretrain.model.layers import Attention, Linear, rope_cos_sin
from pretrain.model.loss import LMLoss
from pretrain.model.ngrams import NgramEmbedding
from pretrain.optim import muon, param_groups, schedule


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
    plain = Decoder.embed

    def embed(self: Any, *given: Any) -> Tensor:
        x = plain(self, *given)
        return x + self.smear_bias * F.pad(x, (0, 0, 1, 0))[:, :-1]

    Decoder.embed = embed  # type: ignore[method-assign]


def value_embeddings() -> None:
    """Values of every other layer, the last too, take an embedding of their id: "Value Residual
    Learning" (Zhou et al., 2024) as in modded-nanogpt."""
    seen: dict[str, Tensor] = {}

    class Value(Linear):
        def forward(self, x: Tensor) -> Tensor:
            value, embedding = super().forward(x), getattr(self, "embedding", None)
            return value if embedding is None else value + embedding(seen["ids"])

    plain, embed = Attention.__init__, Decoder.embed

    def init(self: Attention, config: Any, layer: int) -> None:
        plain(self, config, layer)
        self.value = Value(config.d_model, config.d_model, bias=False)

    def remember(self: Decoder, ids_BT: Tensor, *given: Any) -> Tensor:
        seen["ids"] = ids_BT
        return embed(self, ids_BT, *given)

    Attention.__init__ = init  # type: ignore[method-assign]
    Decoder.embed = remember  # type: ignore[method-assign]

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
        row_norm: bool = False,
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


def signs() -> None:
    """Each n-gram multiplies the rows that it shares by signs of its own: modded-nanogpt."""

    def forward(self: NgramEmbedding, ids_BT: Tensor, previous_BP: Tensor, *_: Any) -> Tensor:
        T = ids_BT.shape[1]
        ids_BS = torch.cat([previous_BP, ids_BT], dim=1)
        total = torch.zeros(())
        for n, table in self.parts.items():
            hashes_BT = ngrams.ngram_hashes(ids_BS, int(n))[:, -T:]
            rows = F.embedding(self._table_rows(hashes_BT), table.weight, sparse=True)
            own = ngrams._mix(hashes_BT[..., None] * (2 * torch.arange(self.n_parts) + 1) ^ 0x55AA)
            bits = own[..., None] >> torch.arange(rows.shape[-1]).clamp(max=61)
            total = total + (rows * (1 - 2 * (bits & 1)).to(rows.dtype)).flatten(2)
        for n, table in self.recalled.items():
            next_ids = ngrams.induction_ids(ids_BS, int(n))[:, -T:]
            total = total + F.embedding(next_ids, table.weight, sparse=True)
        return total

    NgramEmbedding.forward = forward  # type: ignore[method-assign]


def _attention_by(
    attention: Callable[..., Tensor], of_layer: Callable[[Any], tuple[int, ...]]
) -> None:
    """Compute the attention of each layer by a function of the layer, its queries, keys, values,
    and a parameter of the shape `of_layer`, which starts at 0; the layer's input is `layer.x`."""
    plain = Attention.__init__

    def init(self: Any, config: Any, layer: int) -> None:
        plain(self, config, layer)
        self.own_bias = nn.Parameter(torch.zeros(of_layer(config)))

    def forward(self: Any, x_BTD: Tensor, rope: Any, *_: Any) -> Tensor:
        query = self._norm_and_rope(self._split_heads(self.query(x_BTD)), rope)
        key = self._norm_and_rope(self._split_heads(self.key(x_BTD)), rope)
        self.x = x_BTD
        own = self.own_bias.to(query.dtype)
        y = attention(self, query, key, self._split_heads(self.value(x_BTD)), own)
        return self.output(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    Attention.__init__ = init  # type: ignore[method-assign]
    Attention.forward = forward  # type: ignore[method-assign]


def query_gain(first: float) -> None:
    """A learned scale of each head's queries, from `first` on: openai/parameter-golf."""

    def attention(_: Any, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        query = query * (first + own)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    _attention_by(attention, lambda config: (config.n_heads,))


def xsa() -> None:
    """An attention's output loses a learned part of what lies along its own value:
    modded-nanogpt."""

    def attention(_: Any, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        unit = F.normalize(value, dim=-1)
        return y - (y * unit).sum(-1, keepdim=True) * own[:, None, None] * unit

    _attention_by(attention, lambda config: (config.n_heads,))


def head_gates() -> None:
    """Each head's output is multiplied by a gate of the layer's input: modded-nanogpt."""

    def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        gates_BTH = 2 * torch.sigmoid(F.linear(self.x, own.view(query.shape[1], -1)))
        return y * gates_BTH.mT[..., None]

    _attention_by(attention, lambda config: (config.n_heads * config.d_model,))


def heads_apart() -> None:
    """The update of each head's query and key is orthogonalized alone."""
    plain = muon.Orthogonalizer.orthogonalize

    def orthogonalize(self: Any, parameters: Any, updates: Any, **named: Any) -> Any:
        done = list(plain(self, parameters, updates, **named))
        for i, parameter in enumerate(parameters):
            if getattr(parameter, "is_query_or_key", False):
                heads = updates[i].view(-1, 64, updates[i].shape[1])
                # As large as an update of the whole matrix is.
                done[i] = muon.orthogonalize(heads, **named).reshape(updates[i].shape)
        return done

    role = param_groups.role_of

    def mark(name: str, parameter: Any) -> str:
        parameter.is_query_or_key = name.endswith(("query.weight", "key.weight"))
        return role(name, parameter)

    muon.Orthogonalizer.orthogonalize = orthogonalize  # type: ignore[method-assign]
    param_groups.role_of = mark


def power_fall(power: float) -> None:
    """The rate falls by a power of what is left."""
    plain = schedule.lr_fraction

    def lr_fraction(step: int, shape: Any, steps: int) -> float:
        fraction = plain(step, shape, steps)
        return fraction**power if step >= (1 - shape.decay_fraction) * steps else fraction

    schedule.lr_fraction = lr_fraction


def prefix_tokens(share: float) -> None:
    """A share of the target is the longest other token that the target begins with:
    modded-nanogpt. It falls to 0 in the first half of the fall (of calls that train)."""
    plain = losses.chunked_cross_entropy
    state: dict[str, Any] = {"calls": 0}

    def cross_entropy(hidden: Tensor, weight: Tensor, targets_N: Tensor, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(hidden, weight, targets_N, **named)
        prefix_V = PREFIXES["of"]
        state["calls"] += 1
        now = share * max(0.0, 1 - state["calls"] / (0.7 * PREFIXES["calls"]))

        def mix(rows: slice, grad_NV: Tensor, targets: Tensor, smoothing: float) -> None:
            one = grad_NV.new_full((len(grad_NV), 1), now)
            grad_NV.scatter_add_(1, targets[:, None], one)
            grad_NV.scatter_add_(1, prefix_V[targets][:, None], -one)

        return plain(hidden, weight, targets_N, mix_target_=mix, **named)

    losses.chunked_cross_entropy = cross_entropy  # type: ignore[assignment]


PREFIXES: dict[str, Any] = {}


def prefixes(tokenizer: Any) -> Tensor:
    """Return for each id that of the longest other token that it begins with, else itself."""
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    found = [
        next((ids[t[:n]] for n in range(len(t) - 1, 0, -1) if t[:n] in ids), i)
        for i, t in enumerate(tokens)
    ]
    return torch.tensor(found)


def value_tables() -> None:
    """The values of each layer take rows of n-gram tables of their own: nanochat, 2026."""
    seen: dict[str, Any] = {}
    plain, embed, rows = Attention.__init__, Decoder.embed, decoders.initial_rows

    def initial_rows(config: Any, name: str, *given: Any, **named: Any) -> Tensor:
        name = name[name.find("ngrams.") :] if "ngrams." in name else name
        return rows(config, name, *given, **named)

    def init(self: Any, config: Any, layer: int) -> None:
        plain(self, config, layer)
        value = self.value
        value.ngrams = NgramEmbedding(replace(config, induction=0), 1)
        own = value.forward
        value.forward = lambda x: own(x) + value.ngrams(seen["ids"], seen["ids"][:, :0]).to(x.dtype)

    def remember(self: Decoder, ids_BT: Tensor, *given: Any) -> Tensor:
        seen["ids"] = ids_BT
        return embed(self, ids_BT, *given)

    decoders.initial_rows = initial_rows
    Attention.__init__ = init  # type: ignore[method-assign]
    Decoder.embed = remember  # type: ignore[method-assign]
    NgramEmbedding.sparse_gradients = True


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
        signs,
        xsa,
        head_gates,
        heads_apart,
        value_tables,
    )
}
VARIANTS |= {
    "query_gain_1.5": partial(query_gain, 1.5),
    "query_gain_2.5": partial(query_gain, 2.5),
    "power_fall_1.3": partial(power_fall, 1.3),
    "power_fall_1.7": partial(power_fall, 1.7),
    "prefix_0.1": partial(prefix_tokens, 0.1),
    "prefix_0.2": partial(prefix_tokens, 0.2),
}
