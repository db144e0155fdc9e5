"""Jobs that tests run on each of several processes; `processes.Pool` finds these by name.

Torch is imported inside, in the process that needs it.
"""

from __future__ import annotations

import errno
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pretrain.parallel.config import ParallelConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"dropout": 0.1, "tied_head": True},
    "llama": {"n_kv_heads": 2},
    "fast": {"ngram_rows": 256, "longest_ngram": 2, "table_dropout": 0.2},
}
# Of a matrix of five rows the last of four processes has none.
THIN: dict[str, dict[str, Any]] = {"thin llama": {"d_ff": 5}}
VOCAB, CONTEXT, SEED, RATE = 67, 16, 3, 1e-2
MOST_PROCESSES = 4


def device_here() -> str:
    """GPUs and NCCL if there are enough for the largest layout; else the CPU and gloo."""
    import torch

    return "cuda" if torch.cuda.device_count() >= MOST_PROCESSES else "cpu"


class Trainee:
    """A small model over the processes of the environment, and its optimizer."""

    def __init__(
        self, family: str, optimizer: str, *, precision: str = "fp32", **axes: Any
    ) -> None:
        import torch

        from oracles import config_of
        from pretrain.distributed import open_world
        from pretrain.model.decoder import build
        from pretrain.model.loss import LMLoss
        from pretrain.optim.config import OptimizerConfig
        from pretrain.optim.param_groups import build_optimizer
        from pretrain.parallel import tensor
        from pretrain.parallel.model import parallelize

        # Several chunks of logits, of a vocabulary that is not divisible.
        tensor._CHUNK_LOGITS = 300
        self.world = open_world(device_here(), threads=1)
        sizes = (FAMILIES | THIN).get(family, {})
        config = config_of(family.removeprefix("thin "), context_length=CONTEXT, **sizes)
        self.layout = ParallelConfig(**axes).resolve(self.world.size)
        is_sharded = self.layout.shards_weights
        place, seed = ("meta", None) if is_sharded else (self.world.device, SEED)
        decoder = build(config, vocab_size=VOCAB, seed=seed, device=place)
        lm_loss, self.precision = LMLoss(decoder, seed=SEED), precision
        self.model = parallelize(lm_loss, self.layout, self.world, precision=precision)
        if is_sharded:
            self.model.initialize(SEED)
        self.optimizer = build_optimizer(
            self.model.local_parameters(),
            config=OptimizerConfig(
                name=optimizer,  # type: ignore[arg-type]
                learning_rate=RATE,
                row_norm=family == "fast",
            ),
            batch_tokens=8 * CONTEXT,
            orthogonalizer=self.model.orthogonalizer,
        )
        for group in self.optimizer.param_groups:
            # In float32 the matmuls of Muon would differ by 1e-8 of a weight.
            if "dtype" in group:
                group["dtype"] = torch.get_default_dtype()

    def weights(self) -> dict[str, Any]:
        """Bounds and values of this process's shards."""
        return {
            name: (shard.bounds, shard.local.detach().cpu().numpy().copy())
            for name, shard in self.model.shards.items()
        }

    def evaluate(self, ids: Any) -> float:
        """Nats of some ids, as a run evaluates them between two steps."""
        import torch

        from pretrain.data.batches import evaluation_batches
        from pretrain.evaluate.loss import score_batches

        number, n = self.model.axes.batch_part(self.world.rank, evaluation=True)
        each = {"rank": number, "size": n}
        batches = evaluation_batches(ids, context_length=CONTEXT, rows=2, limit_tokens=400, **each)
        ones = torch.ones(VOCAB, dtype=torch.int64)
        return score_batches(
            self.model.lm_loss,
            batches,
            byte_lengths_V=ones,
            world=self.world,
            precision=self.precision,
            counts=self.model.axes.reports_loss(self.world.rank),
        ).nats

    def sample(self) -> list[int]:
        """A few generated ids, as a run samples them after an evaluation."""
        from pretrain.generate.sampling import Sampling, generate_ids

        self.model.unshard()
        with self.world.autocast(self.model.compute_dtype):
            (ids,) = generate_ids(
                self.model.lm_loss.decoder, [1, 2], max_tokens=8, sampling=Sampling(seed=SEED)
            )
        return ids


def train(
    family: str,
    optimizer: str,
    *,
    steps: int,
    rows: int,
    dtype: str = "float32",
    **axes: Any,
) -> dict[str, Any]:
    """Train some steps, with an evaluation after each second one; return all numbers."""
    import torch

    from pretrain.data.order import Order
    from pretrain.evaluate.loss import Ids
    from pretrain.train.build import TrainingBatches, rows_of
    from pretrain.train.step import training_steps

    torch.set_default_dtype(getattr(torch, dtype))
    try:
        trainee = Trainee(family, optimizer, **axes)
        first = trainee.weights()
        ids = Ids(np.random.default_rng(0).integers(0, VOCAB, 4000))
        batches = TrainingBatches(
            stream=ids,  # type: ignore[arg-type]
            order=Order(ids.n_tokens, CONTEXT, SEED),
            batch_size=rows,
            micro_batch_rows=2,
            byte_lengths_V=torch.ones(VOCAB, dtype=torch.int64),
            own_rows=rows_of(trainee.world.rank, trainee.layout, rows, micro_batch_rows=2),
        )
        read: set[str] = set()  # dtypes of the weights in forward
        for block in trainee.model.lm_loss.decoder.blocks.values():
            block.get_submodule("feed_forward.up").register_forward_pre_hook(
                lambda layer, given: read.add(str(layer.weight.dtype))
            )
        reports, evaluations, checksums = [], [], []
        saved_bytes = 0

        def count_saved(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved_bytes
            saved_bytes += tensor.numel() * tensor.element_size()
            return tensor

        updates = training_steps(
            trainee.model,
            trainee.optimizer,
            batches.at,
            lr_at=lambda step: RATE,
            steps=steps,
            clip=1.0,
            world=trainee.world,
            precision=trainee.precision,
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor)
        while True:
            with (
                hooks
                if axes.get("activation_checkpointing") and trainee.world.size == 1
                else nullcontext()
            ):
                report = next(updates, None)
            if report is None:
                break
            reports.append(report)
            share = trainee.layout.batch_part(0)[1] / trainee.world.size
            checksums.append(trainee.world.all_sum(batches.checksum)[0] * share)
            if len(reports) % 2 == 0:
                evaluations.append(trainee.evaluate(ids))
        return {
            "losses": [r.nats_per_token for r in reports],
            "norms": [r.grad_norm for r in reports],
            "counts": [r.count for r in reports],
            "evaluations": evaluations,
            "checksums": checksums,
            "saved bytes": saved_bytes,
            "norm of each": trainee.model.gradient_norms(),
            "sample": trainee.sample(),
            "read": sorted(read),
            "first": first,
            "last": trainee.weights(),
        }
    finally:
        torch.set_default_dtype(torch.float32)


def save(folder: str, axes: dict[str, int]) -> None:
    """A step, and a checkpoint of it and its average, written by all processes together."""
    from pretrain.optim.param_groups import update_averages

    run = _run_of(folder, axes, fresh=True)
    update_averages(run.optimizer, 0.5)
    for shard in run.model.shards.values():
        shard.local.data += 1  # the weights differ from their average
    run.save(wait=True)


def load(folder: str, axes: dict[str, int]) -> dict[str, Any]:
    """This process's slices of the tensors of that checkpoint: bounds and values."""
    from pretrain.checkpoint.load import Checkpoint
    from pretrain.optim.param_groups import optimizer_state

    run = _run_of(folder, axes, fresh=False)
    run.restore(Checkpoint(Path(folder) / "checkpoints" / "step-00000001"))
    parameters = run.model.named_parameters()
    tensors = {f"model/{name}": p.detach() for name, p in parameters}
    state = optimizer_state(run.optimizer, parameters)
    tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
    slices = {}
    for name, tensor in tensors.items():
        shard = run.model.shard_of(name.split("/")[1], tensor.ndim)
        slices[name] = (None if shard is None else shard[1], tensor.cpu().numpy().copy())
    return slices


def _run_of(folder: str, axes: dict[str, Any], *, fresh: bool) -> Any:
    import torch

    from pretrain.config import RunConfig
    from pretrain.run.log import RunLog
    from pretrain.train.config import TrainConfig
    from pretrain.train.console import Console
    from pretrain.train.state import Run, Saver

    trainee = Trainee("fast", "muon", **axes)
    if fresh:
        # No zeros in any optimizer state, and equal numbers in all layouts.
        for part in trainee.model.shards.values():
            full = torch.arange(part.shape.numel(), dtype=torch.float32).view(part.shape)
            own = full[tuple(slice(*pair) for pair in part.bounds)] * 1e-4
            part.local.grad = own.to(trainee.world.device)
        trainee.optimizer.step()
    world = trainee.world
    console = Console(sys.stderr)
    run = Run(
        folder=Path(folder),
        data=None,  # type: ignore[arg-type]
        config=RunConfig(
            train=TrainConfig(steps=1, save_every=1, ema_decay=0.5), parallel=trainee.layout
        ),
        world=world,
        console=console,
        identity={},
        step=1,
    )
    run.batches = _NoBatches()  # type: ignore[assignment]
    run.model, run.optimizer = trainee.model, trainee.optimizer
    run.log = RunLog(Path(folder), writes=world.is_main)
    run.saver = Saver(Path(folder) / "checkpoints", world, console)
    return run


class _NoBatches:
    @staticmethod
    def position(step: int) -> int:
        return step


def fail_to_save(folder: str, failing: int) -> str:
    """A save in which the disk of one process is full; return the error of each."""
    import torch

    from pretrain.checkpoint import save as page
    from pretrain.distributed import open_world

    world = open_world("cpu", threads=1)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    tensors = {"model/x": torch.ones(3)} if world.is_main else {"model/y": torch.ones(2)}
    disk_is_full = mock.patch.object(page, "write_tensors", full)
    try:
        with disk_is_full if world.rank == failing else nullcontext():
            page.save_checkpoint(Path(folder), step=1, tensors=tensors, state={}, world=world)
    except OSError as error:
        return f"{error.errno} {error}"
    return "saved"


def talk() -> dict[str, Any]:
    """The results of all collectives."""
    import torch

    from pretrain.distributed import open_world

    world = open_world("cpu", threads=1)
    world.wait_for_main()
    return {
        "rank": world.rank,
        "is_main": world.is_main,
        "texts": world.all_gather_str("é" * world.rank),
        "broadcast": world.broadcast_str(f"from {world.rank}"),
        "all_gather": world.all_gather([world.rank, 0.5]),
        "fsum": world.fsum([[1e16, 1.0], [-1e16], []][world.rank]),
        "all_sum": world.all_sum(world.rank + 1, 1e15 + world.rank),
        "all_reduce": world.all_reduce_(torch.tensor([1.0, world.rank])).tolist(),
        "single": world.single_process().all_sum(world.rank)[0],
    }


def differ() -> str:
    """The error of processes that would not compute the same."""
    from pretrain.distributed import open_world
    from pretrain.runner.launch import check_same_on_all_ranks

    world = open_world("cpu", threads=1)
    check_same_on_all_ranks(world, {"seed": 1})
    try:
        check_same_on_all_ranks(world, {"seed": 1, "code": "abc" if world.rank < 1 else "xyz"})
    except ValueError as error:
        return str(error)
    return ""


def listeners() -> list[str]:
    """The addresses at which this process listens, as /proc has them."""
    import os

    from pretrain.distributed import open_world

    open_world("cpu", threads=1)
    mine = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            (
                _,
                local,
                _,
                state,
                *_,
            ) = fields = line.split()
            if state == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(local.partition(":")[0])
    return found


def unresponsive_ranks(absent: int) -> str:
    """The ranks that do not answer, as each of the others reports them."""
    import time

    from pretrain import distributed as page

    page.ROLL_CALL_SECONDS = 2
    here = page.open_world("cpu", threads=1)
    if here.rank == absent:
        time.sleep(3)
        return ""
    return here.unresponsive_ranks()
