"""`parallelize`: an objective over the processes of a run, each with its own rows of a batch.

Copies of the whole model are torch's DistributedDataParallel ("PyTorch Distributed", Li et al.,
2020); a copy laid over several processes is its FSDP2 ("PyTorch FSDP", Zhao et al., 2023), and both
together (HSDP) are copies of such copies. `tensor` and `context` say what their axes do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pretrain.distributed import World
from pretrain.model import LMLoss
from pretrain.parallel.activation_checkpointing import recompute
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.deterministic import Elastic
from pretrain.parallel.model import ParallelModel
from pretrain.parallel.shards import local_shard

if TYPE_CHECKING:
    from pretrain.parallel.sharded import Meshes


def parallelize(
    lm_loss: LMLoss, config: ParallelConfig, world: World, *, precision: str = "fp32"
) -> ParallelModel:
    """Lay an objective over the processes of `world`, by a config whose axes are filled.

    Where weights are laid over processes the objective comes without memory (device meta), so that
    no process ever holds it whole, and must be given values: by `initialize`, or those of a
    checkpoint. For the `precision` bf16 blocks are gathered in bfloat16, their norms too; what each
    process keeps, and sums of gradients, are float32.
    """
    if not config.shards_weights:
        recompute(lm_loss.decoder, config.activation_checkpointing)
    if config.elastic:
        return Elastic(lm_loss, world)
    if world.size == 1:
        return ParallelModel(lm_loss, world)
    assert config.data is not None
    if not config.shards_weights:
        return _copied(lm_loss, world)
    # Half a second that one process need not spend.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from pretrain.parallel.sharded import Sharded

    meshes = _arrange(config, world)
    decoder, laid = lm_loss.decoder, meshes.laid
    if config.pipeline > 1:
        from pretrain.parallel.pipeline import Pipe, keep_layers

        keep_layers(decoder, dist.get_rank(meshes.pipeline), config.pipeline)
    if config.tensor > 1:
        from pretrain.parallel.tensor import lay_over_tensor_axis

        lay_over_tensor_axis(lm_loss, laid["tensor"])
    recompute(decoder, config.activation_checkpointing)
    if config.data * config.shard * config.context > 1:
        over = laid["laid"] if config.data == 1 else laid["data", "laid"]
        narrow = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(narrow, narrow and torch.float32, cast_forward_inputs=False)
        for block in decoder.blocks.values():
            fully_shard(block, mesh=over, mp_policy=policy)
        # With embedding and head: where they are one parameter, it must be in one group.
        fully_shard(decoder, mesh=over)
    lm_loss.to_empty(device=world.device)
    return Sharded(
        lm_loss,
        world,
        model_parallel_size=config.tensor * config.pipeline,
        n_loss_ranks=config.tensor,
        shards={name: local_shard(parameter) for name, parameter in decoder.named_parameters()},
        compute_dtype=precision,
        meshes=meshes,
        pipe=Pipe(lm_loss, meshes.pipeline) if config.pipeline > 1 else None,
    )


def _copied(lm_loss: LMLoss, world: World) -> ParallelModel:
    """Copies of the whole model, whose gradients are summed while they are made."""
    ngrams = lm_loss.decoder.ngrams
    tables = dict(ngrams.named_parameters()) if ngrams and ngrams.sparse_gradients else {}
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(lm_loss, [f"decoder.ngrams.{name}" for name in tables])  # type: ignore[no-untyped-call]
    # Weights are a function of the seed, and so the same everywhere.
    copies = DistributedDataParallel(
        lm_loss,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        init_sync=False,
        gradient_as_bucket_view=True,
    )
    return ParallelModel(lm_loss, world, module=copies, tables=list(tables.values()))


def _arrange(config: ParallelConfig, world: World) -> Meshes:
    """Ranks by axis: tensor within context within shard within data within pipeline, so that those
    that talk most are neighbours."""
    from pretrain.parallel.sharded import Meshes

    assert config.data is not None
    n_laid, n_stages, kind = config.shard * config.context, config.pipeline, world.device.type
    n_rows = config.data * config.shard

    def arranged(**axes: int) -> DeviceMesh:
        return init_device_mesh(kind, tuple(axes.values()), mesh_dim_names=tuple(axes))

    stages = arranged(pipeline=n_stages, within=world.size // n_stages)
    windows = arranged(before=n_stages * n_rows, context=config.context, tensor=config.tensor)
    copies = arranged(before=n_stages * config.data, holders=n_laid * config.tensor)
    laid = arranged(pipeline=n_stages, data=config.data, laid=n_laid, tensor=config.tensor)
    # Those that have the two ends of a pipeline; every process takes part in making each group.
    within = world.size // n_stages
    pairs = [dist.new_group(sorted({n, world.size - within + n})) for n in range(within)]
    return Meshes(
        laid,
        windows["context"].get_group(),
        copies["holders"].get_group(),
        stages["pipeline"].get_group(),
        pairs[world.rank % within],
    )
