"""A step of a large model on many simulated devices: traced with fake tensors, which have a shape
and no memory, in a fake process group with one process.

The traced operations are counted; no formula is used here.
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
from pretrain.data.batches import MicroBatch
from pretrain.distributed import World, open_world
from pretrain.model import loss
from pretrain.model.config import ModelConfig, model_defaults
from pretrain.model.decoder import Decoder, build
from pretrain.model.loss import LMLoss
from pretrain.parallel import model as parallel_model
from pretrain.parallel.config import ParallelConfig

VOCAB = 128_256


class Traffic(TorchDispatchMode):
    """Bytes and calls by kind of collective; its largest tensor is the full one."""

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


class SavedActivations:
    """Bytes that backward will read, without weights; each storage counts once."""

    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}
        self._decoder, self._vocab_size = decoder, vocab_size

    def __enter__(self) -> SavedActivations:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        weights = {_local(p).untyped_storage()._cdata for p in self._decoder.parameters()}
        # The head's gradient is computed in forward; it has the size of the head.
        is_head = tensor.shape[:1] == (self._vocab_size,)
        if storage._cdata not in weights and storage._cdata not in self._seen and not is_head:
            self._seen[storage._cdata] = tensor  # kept, so that its address is not reused
            self.bytes += storage.nbytes()
        return tensor


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def trace(
    preset: str, *, size: int, tokens: int, plant: bool = False, **axes: Any
) -> dict[str, Any]:
    """Memory and traffic of one process of `size`, in one micro-batch of a single row. With `plant`
    a block is gathered once too often."""
    dist.init_process_group("fake", rank=0, world_size=size, store=_store())
    world = World(0, size, torch.device("cpu"), threads=1)
    defaults = model_defaults({"family": "llama", "preset": preset})
    config = ModelConfig(**{**defaults, "context_length": tokens})
    parallel = ParallelConfig(**axes).resolve(size)
    mesh, traffic = parallel_model.build_mesh(parallel, world), Traffic()
    flatten_mesh(mesh["dp_shard", "cp"])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(parallel_model, "build_mesh", return_value=mesh),
        mock.patch.object(parallel_model, "gather_slices", return_value=[{}]),
        # It reads numbers, which fake tensors do not have.
        mock.patch.object(loss, "_any_underflow", return_value=False),
        mock.patch.object(LMLoss, "to_empty"),
        mock.patch.object(DeviceMesh, "_concatenate", staticmethod(_really_concatenated)),
    ):
        decoder = Decoder(config, vocab_size=VOCAB)
        sizes = {name: p.numel() for name, p in decoder.named_parameters()}
        ends = sum(n for name, n in sizes.items() if not name.startswith("blocks."))
        model = parallel_model.parallelize(LMLoss(decoder, seed=1), parallel, world)
        stored = sum(part.local.numel() for part in model.shards.values())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        batch = MicroBatch(ids, ids.clone(), torch.zeros(1, dtype=torch.int64))
        saved = SavedActivations(decoder, VOCAB)
        with traffic:
            with saved:
                nats, _ = model.nats(batch, "fp32")
            if plant:
                block: Any = decoder.blocks["0"]
                block.unshard()
                block.reshard()
            nats.backward()  # type: ignore[no-untyped-call]
        model.reshard()
        for part in model.shards.values():
            part.localize_grad()
        grads = [p.local.grad for p in model.shards.values()]
    return {
        "parameters": sum(sizes.values()),
        "embedding and head": ends,
        "stored": stored,
        "gradients": sum(grad.numel() for grad in grads if grad is not None),
        "bytes": dict(traffic.bytes),
        "calls": dict(traffic.calls),
        "saved": saved.bytes,
        "width": config.d_model,
        "layers": config.n_layers,
    }


def count(rows: int, *, precision: str = "fp32", **axes: Any) -> dict[str, Any]:
    """Traffic of one micro-batch of a small llama on real processes."""
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
    with Traffic() as traffic, world.autocast(precision):
        nats, _ = model.nats(MicroBatch(ids, ids.clone(), torch.arange(rows)), precision)
        nats.backward()  # type: ignore[no-untyped-call]
    return {
        "parameters": sum(sizes.values()),
        "embedding and head": sum(n for name, n in sizes.items() if not name.startswith("blocks.")),
        "bytes": dict(traffic.bytes),
        "calls": dict(traffic.calls),
        "width": config.d_model,
        "layers": config.n_layers,
        "tokens": rows * T,
    }


_concatenate = DeviceMesh._concatenate


def _really_concatenated(meshes: list[DeviceMesh]) -> DeviceMesh:
    """The mesh of ranks must have real numbers also while all other tensors are fake."""
    with unset_fake_temporarily():
        return _concatenate(meshes)


def _store() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
