"""`parallelize`: an objective over the processes of a run, each with its own rows of a batch.

Copies of the whole model are torch's DistributedDataParallel ("PyTorch Distributed", Li et al.,
2020); a copy laid over several processes is its FSDP2 ("PyTorch FSDP", Zhao et al., 2023), and both
together (HSDP) are copies of such copies.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pretrain.model import Objective
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.elastic import Elastic
from pretrain.parallel.model import Parallel
from pretrain.parallel.shards import Part
from pretrain.world import World


def parallelize(objective: Objective, config: ParallelConfig, world: World) -> Parallel:
    """Lay an objective over the processes of `world`, by a config whose axes are filled.

    With `shard` above 1 the objective comes without memory (device meta), so that no process ever
    holds it whole, and must be given values: `Parallel.initialize`, or those of a checkpoint.
    """
    if config.elastic:
        return Elastic(objective, objective, world, n_copies=world.size)
    if world.size == 1:
        return Parallel(objective, objective, world)
    assert config.data is not None
    if config.shard == 1:
        on_gpu = [world.device] if world.device.type == "cuda" else None
        ngrams = objective.decoder.ngrams
        tables = dict(ngrams.named_parameters()) if ngrams and ngrams.sparse_gradients else {}
        names = [f"decoder.ngrams.{name}" for name in tables]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(objective, names)  # type: ignore[no-untyped-call]
        # Weights are a function of the seed, and so the same everywhere.
        copies = DistributedDataParallel(
            objective, device_ids=on_gpu, init_sync=False, gradient_as_bucket_view=True
        )
        return Parallel(objective, copies, world, n_copies=world.size, tables=list(tables.values()))
    # Half a second that one process need not spend.
    from torch.distributed.fsdp import fully_shard

    axes = (config.data, config.shard)
    mesh = init_device_mesh(world.device.type, axes, mesh_dim_names=("data", "shard"))
    laid_over = mesh["shard"] if config.data == 1 else mesh
    decoder = objective.decoder
    for block in decoder.blocks.values():
        fully_shard(block, mesh=laid_over)
    # With the embedding and the head: where they are one parameter, it must be in one group.
    fully_shard(decoder, mesh=laid_over)
    objective.to_empty(device=world.device)
    parts = {name: part_of(parameter) for name, parameter in decoder.named_parameters()}
    return Parallel(objective, objective, world, n_copies=config.data, mesh=mesh, parts=parts)


def part_of(parameter: nn.Parameter) -> Part:
    """This process's rows of a parameter that is laid over several."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    data = parameter.detach()
    assert isinstance(data, DTensor)
    local_shape, offset = compute_local_shape_and_global_offset(
        data.shape, data.device_mesh, data.placements
    )
    box = tuple((start, start + n) for start, n in zip(offset, local_shape, strict=True))
    return Part(parameter, nn.Parameter(data.to_local()), parameter.shape, box)
