"""Pipeline parallelism: each rank of the pp axis has some blocks and sends hidden states on.

"GPipe" (Huang et al., 2019) and "PipeDream" (Narayanan et al., 2019), by torch's schedules. All
ranks of the axis read the same rows, which are a function of the step, so only hidden states and
their gradients are sent. If embedding and head are tied, the first and the last rank both have
that parameter, and sum its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from pretrain.distributed import World
from pretrain.model.decoder import Decoder
from pretrain.model.loss import IGNORE_INDEX, LMLoss
from pretrain.parallel.sharded import LocalShard
from pretrain.parallel.tensor import full_logits


class StageDecoder(Decoder):
    """The blocks of one rank, and the embedding or the head if it is the first or the last.

    Outside of a training step it can be called as a Decoder: `forward` receives hidden states from
    the rank before and sends its own to the next, and `logits` come from the last rank.
    """

    def __init__(self, decoder: Decoder, group: dist.ProcessGroup) -> None:
        """Take this rank's parts of `decoder`; no parameter has memory yet."""
        nn.Module.__init__(self)
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_first, self.is_last = self.rank == 0, self.rank == self.size - 1
        self.received: Tensor | None = None
        """hidden states (B, T, D) of the rank before"""
        self.in_schedule = False
        """whether torch's schedule sends and receives, as it does in a training step"""

        self.config, self.vocab_size = decoder.config, decoder.vocab_size
        n = self.config.n_layers
        layers = range(self.rank * n // self.size, (self.rank + 1) * n // self.size)
        has_embedding = self.is_first or (self.is_last and decoder.head is None)
        self.token_embedding = decoder.token_embedding if has_embedding else None  # type: ignore[assignment]
        self.position_embedding = decoder.position_embedding if self.is_first else None
        self.ngrams = decoder.ngrams if self.is_first else None
        self.blocks = nn.ModuleDict({str(i): decoder.blocks[str(i)] for i in layers})
        self.final_norm = decoder.final_norm if self.is_last else None
        self.head = decoder.head if self.is_last else None

    def embed(self, ids_BT: Tensor, *context: Any) -> Tensor:
        if self.is_first:
            return super().embed(ids_BT, *context)
        assert self.received is not None
        return self.received

    def forward(self, ids_BT: Tensor, **options: Any) -> Tensor:
        if self.in_schedule:
            return super().forward(ids_BT, **options)
        if not self.is_first:
            shape, dtype = (*ids_BT.shape, self.config.d_model), next(self.parameters()).dtype
            self.received = torch.empty(shape, device=ids_BT.device, dtype=dtype)
            dist.recv(self.received, group=self.group, group_src=self.rank - 1)
        hidden_BTD = super().forward(ids_BT, **options)
        if not self.is_last:
            dist.send(hidden_BTD.contiguous(), group=self.group, group_dst=self.rank + 1)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the last rank's hidden states, on all ranks."""
        if self.is_last:
            logits = full_logits(self, hidden).to(hidden.dtype).contiguous()
        else:
            logits = hidden.new_empty(*hidden.shape[:-1], self.vocab_size)
        dist.broadcast(logits, group=self.group, group_src=self.size - 1)
        return logits


class PipelineLoss(LMLoss):
    """The loss module of one rank of the pipeline."""

    decoder: StageDecoder

    def __init__(self, lm_loss: LMLoss, group: dist.ProcessGroup) -> None:
        super().__init__(
            StageDecoder(lm_loss.decoder, group),
            seed=lm_loss.seed,
            label_smoothing=lm_loss.label_smoothing,
            z_loss=lm_loss.z_loss,
        )
        self.cross_entropy = lm_loss.cross_entropy
        # The first and last rank of this pipeline; the pp axis is the outermost of the mesh. Each
        # process takes part in making every group.
        n_pipelines = dist.get_world_size() // self.decoder.size
        last = dist.get_world_size() - n_pipelines
        groups: list[Any] = [dist.new_group([n, last + n]) for n in range(n_pipelines)]
        self._end_group = groups[dist.get_rank() % n_pipelines]
        self._schedules: dict[tuple[int, ...], Any] = {}
        self.waiting: Iterator[Any] = iter(())
        """micro-batches of the step whose forward pass has not started"""
        self.autocast: Any = None

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Nats and number of valid targets; zeros but on the last rank."""
        if self.decoder.is_last:
            return super().forward(batch)
        hidden_BTD = self.decoder(batch.inputs, dropout_rng=self.dropout_rng(batch))
        return hidden_BTD.new_zeros((), dtype=torch.float64), torch.tensor(0)

    def forward_backward(
        self, micro_batches: list[Any], world: World, precision: str
    ) -> tuple[Tensor, Tensor]:
        """Compute gradients of the micro-batches of a step; return nats and number of valid targets
        on the last rank, and zeros on the others."""
        decoder = self.decoder
        batches = [batch.to(world.device) for batch in micro_batches]
        inputs = torch.cat([batch.inputs for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        self.waiting = iter(batches)
        self.autocast = partial(world.autocast, precision)
        schedule = self._schedule(len(batches), batches[0].inputs, world.device)
        losses: list[Tensor] = []
        decoder.in_schedule = True
        try:
            if decoder.is_first:
                schedule.step(inputs)
            elif decoder.is_last:
                schedule.step(target=targets, losses=losses)
            else:
                schedule.step()
        finally:
            decoder.in_schedule = False
        if decoder.is_last:
            return torch.stack(losses).sum().detach(), (targets != IGNORE_INDEX).sum()
        nothing = torch.zeros((), dtype=torch.float64, device=world.device)
        return nothing, nothing.long()

    def sum_tied_grads(self, shards: Mapping[str, LocalShard]) -> None:
        """Sum the gradients of a tied embedding over the first and the last rank."""
        if self.decoder.is_first or self.decoder.is_last:
            grad = shards["token_embedding.weight"].local.grad
            dist.all_reduce(grad, group=self._end_group)

    def _schedule(self, n: int, inputs_BT: Tensor, device: torch.device) -> Any:
        """Torch's schedule for `n` micro-batches, built once."""
        key = (n, *inputs_BT.shape)
        if key in self._schedules:
            return self._schedules[key]
        decoder, dtype = self.decoder, torch.get_default_dtype()
        hidden = torch.empty(
            *inputs_BT.shape, decoder.config.d_model, device=device, dtype=dtype
        ).requires_grad_()
        nats = torch.empty(1, device=device, dtype=torch.float64).requires_grad_()
        stage = PipelineStage(
            _ScheduledModule(self),
            decoder.rank,
            decoder.size,
            device,
            input_args=inputs_BT if decoder.is_first else hidden,
            output_args=nats if decoder.is_last else torch.empty_like(hidden).requires_grad_(),
            group=decoder.group,
        )
        # With fewer micro-batches than ranks no backward pass can start early.
        kind = Schedule1F1B if n >= decoder.size else ScheduleGPipe
        schedule = kind(stage, n, loss_fn=lambda nats, targets: nats.sum(), scale_grads=False)
        self._schedules[key] = schedule
        return schedule


class _ScheduledModule(nn.Module):
    """The module that torch's schedule calls with received hidden states, or with ids."""

    def __init__(self, lm_loss: PipelineLoss) -> None:
        super().__init__()
        self.lm_loss = lm_loss

    def forward(self, received: Tensor) -> Tensor:
        """Run this rank's blocks on the next micro-batch, and on the last rank the loss too (1);
        the schedule starts micro-batches in order."""
        lm_loss, batch = self.lm_loss, next(self.lm_loss.waiting)
        lm_loss.decoder.received = received
        with lm_loss.autocast():
            if lm_loss.decoder.is_last:
                return lm_loss(batch)[0][None]  # type: ignore[no-any-return]
            return lm_loss.decoder(batch.inputs, dropout_rng=lm_loss.dropout_rng(batch))  # type: ignore[no-any-return]
