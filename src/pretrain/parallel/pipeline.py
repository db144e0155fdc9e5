"""The pipeline axis: each process has some layers, and passes hidden states of micro-batches on.

"PipeDream" (Narayanan et al., 2019) and "GPipe" (Huang et al., 2019), by torch's own schedules. All
processes of an axis read the same rows, which are a function of the step, so nothing but hidden
states and their slopes is sent. Where embedding and head are one parameter, the first and the last
process have it both, and sum its gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from pretrain.distributed import World
from pretrain.model import Decoder, LMLoss
from pretrain.model.dropout import DropoutRng
from pretrain.model.loss import IGNORE_INDEX


class Pipe:
    """One process of a pipeline, with an objective of which only its part is left (`keep_layers`);
    the objective is changed in place to ask the others for the rest."""

    def __init__(self, lm_loss: LMLoss, group: dist.ProcessGroup) -> None:
        self._objective, self._group = lm_loss, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._received: Tensor | None = None
        self._is_in_schedule = False
        decoder = lm_loss.decoder
        self._whole_forward = decoder.forward
        self._whole_logits = decoder.logits
        if not self.is_first:
            decoder.embed = self._embed  # type: ignore[method-assign,assignment]
        decoder.forward = self._forward  # type: ignore[method-assign]
        decoder.logits = self._logits  # type: ignore[method-assign]
        lm_loss.forward = self._score  # type: ignore[method-assign]
        self._module = _Stage(self)
        self._schedules: dict[tuple[int, ...], Any] = {}

    @property
    def is_first(self) -> bool:
        return self._rank == 0

    @property
    def is_last(self) -> bool:
        return self._rank == self._size - 1

    # --- a step ---------------------------------------------------------------------------------

    def run(self, batches: list[Any], world: World, precision: str) -> tuple[Tensor, Tensor]:
        """Forward and back with all micro-batches of a step; the nats and the count, which the last
        process has, and nothing in the others."""
        self._module.begin([batch.to(world.device) for batch in batches])
        schedule = self._schedule(len(batches), self._module.batches[0].inputs, precision, world)
        targets = torch.cat([batch.targets for batch in self._module.batches])
        losses: list[Tensor] = []
        self._is_in_schedule = True
        try:
            if self.is_first:
                schedule.step(torch.cat([batch.inputs for batch in self._module.batches]))
            elif self.is_last:
                schedule.step(target=targets, losses=losses)
            else:
                schedule.step()
        finally:
            self._is_in_schedule = False
        nothing = torch.zeros((), dtype=torch.float64, device=world.device)
        nats = torch.stack(losses).sum().detach() if losses else nothing
        return nats, (targets != IGNORE_INDEX).sum() if self.is_last else nothing.long()

    def _schedule(self, n: int, inputs_BT: Tensor, precision: str, world: World) -> Any:
        """Torch's schedule for so many micro-batches, made once."""
        key = (n, *inputs_BT.shape)
        if key not in self._schedules:
            D, real = self._objective.decoder.config.d_model, torch.get_default_dtype()
            hidden = torch.empty(*inputs_BT.shape, D, device=world.device, dtype=real)
            stage = PipelineStage(
                self._module,
                self._rank,
                self._size,
                world.device,
                input_args=inputs_BT if self.is_first else hidden.requires_grad_(),
                output_args=torch.empty_like(hidden).requires_grad_(),
                group=self._group,
            )
            # With fewer micro-batches than processes nothing can go back early.
            kind = Schedule1F1B if n >= self._size else ScheduleGPipe
            nats = partial(self._nats, precision, world)
            self._schedules[key] = kind(stage, n, loss_fn=nats, scale_grads=False)
            self._module.autocast = partial(world.autocast, precision)
        return self._schedules[key]

    def _nats(self, precision: str, world: World, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        lm_loss = self._objective
        with world.autocast(precision):
            return lm_loss.cross_entropy(
                hidden_BTD.flatten(0, 1),
                lm_loss.decoder.head_weight,
                targets_BT.flatten(),
                smoothing=lm_loss.label_smoothing if lm_loss.training else 0.0,
                z_loss=lm_loss.z_loss if lm_loss.training else 0.0,
            )

    # --- reading, without a step ------------------------------------------------------------------

    def _embed(self, *_: Any) -> Tensor:
        assert self._received is not None
        return self._received

    def _forward(self, ids_BT: Tensor, **how: Any) -> Tensor:
        """The decoder's own forward, with what the process before has come to."""
        if self._is_in_schedule:
            return self._whole_forward(ids_BT, **how)
        if not self.is_first:
            decoder = self._objective.decoder
            real = next(decoder.parameters()).dtype
            hidden = torch.empty(
                *ids_BT.shape, decoder.config.d_model, device=ids_BT.device, dtype=real
            )
            dist.recv(hidden, group=self._group, group_src=self._rank - 1)
            self._received = hidden
        found = self._whole_forward(ids_BT, **how)
        if not self.is_last:
            dist.send(found.contiguous(), group=self._group, group_dst=self._rank + 1)
        return found

    def _score(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Nats and count, in the last process; the others come to nothing."""
        lm_loss, targets_N = self._objective, batch.targets.flatten()
        hidden_BTD = lm_loss.decoder(batch.inputs)
        if not self.is_last:
            return hidden_BTD.new_zeros((), dtype=torch.float64), torch.tensor(0)
        nats = lm_loss.cross_entropy(
            hidden_BTD.flatten(0, 1), lm_loss.decoder.head_weight, targets_N
        )
        return nats, (targets_N != IGNORE_INDEX).sum()

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of the last process's hidden states, for everybody."""
        V = self._objective.decoder.vocab_size
        if self.is_last:
            logits = self._whole_logits(hidden).to(hidden.dtype).contiguous()
        else:
            logits = hidden.new_empty(*hidden.shape[:-1], V)
        dist.broadcast(logits, group=self._group, group_src=self._size - 1)
        return logits


class _Stage(nn.Module):
    """What torch's schedule calls: the micro-batches in their order, one after another."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe, self._at = pipe, 0
        self.batches: list[Any] = []
        self.autocast: Any = None
        self.decoder = pipe._objective.decoder

    def begin(self, batches: list[Any]) -> None:
        self.batches, self._at = batches, 0

    def forward(self, x: Tensor) -> Tensor:
        batch, lm_loss = self.batches[self._at], self._pipe._objective
        self._at += 1
        self._pipe._received = x
        drops = lm_loss.training and self.decoder.config.dropout > 0
        with self.autocast():
            found: Tensor = self.decoder(
                batch.inputs, dropout_rng=DropoutRng(lm_loss.seed, batch.samples) if drops else None
            )
        return found


def keep_layers(decoder: Decoder, rank: int, size: int) -> None:
    """Let go of what other processes of the pipeline have; nothing of it has memory yet."""
    n = len(decoder.blocks)
    kept = range(rank * n // size, (rank + 1) * n // size)
    for layer in range(n):
        if layer not in kept:
            del decoder.blocks[str(layer)]
    is_first, is_last = rank == 0, rank == size - 1
    if not is_first:
        decoder.position_embedding = decoder.ngrams = None
    if not is_first and not (is_last and decoder.head is None):
        decoder.token_embedding = None  # type: ignore[assignment]
    if not is_last:
        decoder.final_norm = decoder.head = None
