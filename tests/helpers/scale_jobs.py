"""A step of a large model on many devices, without any: traced with tensors that have a shape and
no memory, in a group of processes of which only one is there.

What is counted is what the traced operations move; no formula is used here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.compat import flatten_mesh
from pretrain.data import MicroBatch
from pretrain.distributed import World, open_world
from pretrain.model import Decoder, LMLoss, ModelConfig, build, loss
from pretrain.model.config import model_defaults
from pretrain.parallel import ParallelConfig
from pretrain.parallel import model as parallel_model

VOCAB = 128_256


class Moved(TorchDispatchMode):
    """Bytes by collective: the largest tensor of each, the whole of which all have parts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kinds = str(func), ("scatter", "gather", "reduce", "broadcast")
        kind = next((k for k in kinds if k in name), "")
        if name.startswith(("c10d.", "_c10d_functional.")) and kind and "wait" not in name:
            self.bytes[kind] += max(t.numel() * t.element_size() for t in _tensors(args))
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


class Kept:
    """Bytes that the way back will read and that are no weight's: each piece of memory once."""

    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}
        self._decoder, self._vocab_size = decoder, vocab_size

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        memory = _here(tensor).untyped_storage()
        weights = {_here(p).untyped_storage()._cdata for p in self._decoder.parameters()}
        # The head's gradient is made on the way forward; it is the size of the head.
        is_head = tensor.shape[:1] == (self._vocab_size,)
        if memory._cdata not in weights and memory._cdata not in self._seen and not is_head:
            self._seen[memory._cdata] = tensor  # so that its place is not another's
            self.bytes += memory.nbytes()
        return tensor


def _here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def trace(
    preset: str, *, size: int, tokens: int, plant: bool = False, **axes: Any
) -> dict[str, Any]:
    """What one process of `size` holds, and what is moved, in one micro-batch of a single row. With
    `plant` a block is gathered once too often."""
    dist.init_process_group("fake", rank=0, world_size=size, store=_store())
    world = World(0, size, torch.device("cpu"), threads=1)
    defaults = model_defaults({"family": "llama", "preset": preset})
    config = ModelConfig(**{**defaults, "context_length": tokens})
    parallel = ParallelConfig(**axes).resolve(size)
    mesh, moved = parallel_model.build_mesh(parallel, world), Moved()
    flatten_mesh(mesh["dp_shard", "cp"])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(parallel_model, "build_mesh", return_value=mesh),
        mock.patch.object(parallel_model, "ShardLayout"),
        # A question about numbers, of which there are none.
        mock.patch.object(loss, "_any_underflow", return_value=False),
        mock.patch.object(LMLoss, "to_empty"),
        mock.patch.object(DeviceMesh, "_concatenate", staticmethod(_really_concatenated)),
    ):
        decoder = Decoder(config, vocab_size=VOCAB)
        sizes = {name: p.numel() for name, p in decoder.named_parameters()}
        in_the_ends = sum(n for name, n in sizes.items() if not name.startswith("blocks."))
        model = parallel_model.parallelize(LMLoss(decoder, seed=1), parallel, world)
        held = sum(part.local.numel() for part in model.shards.values())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        batch = MicroBatch(ids, ids.clone(), torch.zeros(1, dtype=torch.int64))
        kept = Kept(decoder, VOCAB)
        with moved:
            with kept:
                nats, _ = model.loss(batch, "fp32")
            if plant:
                block: Any = decoder.blocks["0"]
                block.unshard()
                block.reshard()
            nats.backward()  # type: ignore[no-untyped-call]
        model.reshard()
        for part in model.shards.values():
            part.localize_grad()
        slopes = [p.local.grad for p in model.shards.values()]
    return {
        "parameters": sum(sizes.values()),
        "in the ends": in_the_ends,
        "held": held,
        "gradients": sum(slope.numel() for slope in slopes if slope is not None),
        "bytes": dict(moved.bytes),
        "calls": dict(moved.calls),
        "kept": kept.bytes,
        "width": config.d_model,
        "layers": config.n_layers,
    }


def count(rows: int, *, precision: str = "fp32", **axes: Any) -> dict[str, Any]:
    """What is moved in one micro-batch of a small llama by processes that are there."""
    from oracles import T, V, config_of

    world = open_world("cpu", threads=1)
    config = config_of("llama", n_kv_heads=2)
    decoder = build(config, vocab_size=V, seed=None, device="meta")
    sizes = {name: p.numel() for name, p in decoder.named_parameters()}
    parallel = ParallelConfig(**axes).resolve(world.size)
    model = parallel_model.parallelize(
        LMLoss(decoder, seed=1), parallel, world, precision=precision
    )
    model.initialize(1)
    ids = torch.zeros(rows, T, dtype=torch.int64)
    with Moved() as moved:
        batch = MicroBatch(ids, ids.clone(), torch.arange(rows))
        nats, _ = model.loss(batch, precision)
        nats.backward()  # type: ignore[no-untyped-call]
    return {
        "parameters": sum(sizes.values()),
        "in the ends": sum(n for name, n in sizes.items() if not name.startswith("blocks.")),
        "bytes": dict(moved.bytes),
        "calls": dict(moved.calls),
        "width": config.d_model,
        "layers": config.n_layers,
        "tokens": rows * T,
    }


_concatenate = DeviceMesh._concatenate


def _really_concatenated(meshes: list[DeviceMesh]) -> DeviceMesh:
    """Which process is where must be known, also where tensors have no numbers."""
    with unset_fake_temporarily():
        return _concatenate(meshes)


def _store() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
