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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.data import MicroBatch
from pretrain.model import Decoder, ModelConfig, Objective
from pretrain.model.config import model_defaults
from pretrain.parallel import ParallelConfig, layout, sharded
from pretrain.world import World

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
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            kind = next(k for k in ("gather", "scatter", "reduce", "broadcast") if k in name)
            kind = "scatter" if "scatter" in name else kind
            self.bytes[kind] += max(t.numel() * t.element_size() for t in _tensors(args))
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def trace(
    preset: str, *, size: int, tokens: int, plant: bool = False, **axes: Any
) -> dict[str, Any]:
    """What one process of `size` holds, and what is moved, in one micro-batch of a single row. With
    `plant` a block is gathered once too often."""
    dist.init_process_group("fake", rank=0, world_size=size, store=_store())
    world = World(0, size, torch.device("cpu"), threads=1)
    defaults = model_defaults({"family": "llama", "preset": preset})
    config = ModelConfig(**{**defaults, "context_length": tokens})
    parallel = ParallelConfig(**axes).laid_out(size)
    meshes, moved = layout._arrange(parallel, world), Moved()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(layout, "_arrange", return_value=meshes),
        mock.patch.object(sharded, "Map"),
        mock.patch.object(Objective, "to_empty"),
    ):
        decoder = Decoder(config, vocab_size=VOCAB)
        sizes = {name: p.numel() for name, p in decoder.named_parameters()}
        in_the_ends = sum(n for name, n in sizes.items() if not name.startswith("blocks."))
        model = layout.parallelize(Objective(decoder, seed=1), parallel, world)
        held = sum(part.local.numel() for part in model.parts.values())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        batch = MicroBatch(ids, ids.clone(), torch.zeros(1, dtype=torch.int64))
        with moved:
            nats, _ = model.module(batch)
            if plant:
                block: Any = decoder.blocks["0"]
                block.unshard()
                block.reshard()
            nats.backward()  # type: ignore[no-untyped-call]
        model.let_go()
        for part in model.parts.values():
            part.take_gradient()
        slopes = [p.local.grad for p in model.parts.values()]
    return {
        "parameters": sum(sizes.values()),
        "in the ends": in_the_ends,
        "held": held,
        "gradients": sum(slope.numel() for slope in slopes if slope is not None),
        "bytes": dict(moved.bytes),
        "calls": dict(moved.calls),
        "layers": config.n_layers,
    }


def _store() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
