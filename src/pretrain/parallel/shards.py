"""What one process holds of a parameter: a box of it, as a plain tensor that an optimizer updates.

The parameter of a model that is laid over processes comes in; the box, and a local parameter that
shares its memory, go out. Rules that look at each number, or at each row, need no more.
`ShardLayout` knows what all the others hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.distributed import World

ShardSlice = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A box of a parameter."""

    parameter: nn.Parameter
    """the model's own parameter"""
    local: nn.Parameter
    """the memory of this process's box; the parameter itself, where that is all of it"""
    shape: torch.Size
    """of the whole parameter"""
    bounds: ShardSlice
    """(start, stop) a dim"""

    def localize_grad(self) -> None:
        """Let the local parameter have the gradient of its box."""
        if self.local is self.parameter:
            return
        gradient, whole = self.parameter.grad, cast(Any, self.parameter)
        # It may come as it was made: a sum that is not yet made, or more than the box.
        laid = (
            None
            if gradient is None
            else cast(Any, gradient).redistribute(whole.device_mesh, whole.placements)
        )
        self.local.grad = None if laid is None else laid.to_local()


def full_shard(parameter: nn.Parameter) -> LocalShard:
    """All of a parameter."""
    return LocalShard(parameter, parameter, parameter.shape, tuple((0, n) for n in parameter.shape))


def local_shard(parameter: nn.Parameter) -> LocalShard:
    """This process's box of a parameter, where that is laid over several."""
    from torch.distributed.tensor import DTensor

    data = parameter.detach()
    if not isinstance(data, DTensor):
        return full_shard(parameter)
    mesh, coordinate = data.device_mesh, data.device_mesh.get_coordinate()
    assert coordinate is not None
    box = [(0, n) for n in data.shape]
    # Inner axes have cut first: the tensor axis before that over which weights are laid.
    for placement, n, number in list(zip(data.placements, mesh.shape, coordinate, strict=True))[
        ::-1
    ]:
        if not placement.is_replicate():
            dim = cast(Any, placement).dim
            start, stop = box[dim]
            each = -(-(stop - start) // n)
            first = min(start + number * each, stop)
            box[dim] = first, min(first + each, stop)
    local = data.to_local()
    assert list(local.shape) == [stop - start for start, stop in box], "torch cuts otherwise"
    return LocalShard(parameter, nn.Parameter(local), parameter.shape, tuple(box))


def cut(whole: Tensor, box: ShardSlice) -> Tensor:
    """A view of the box of a whole tensor."""
    return whole[tuple(slice(*pair) for pair in box)]


class ShardLayout:
    """Which process holds which box of each parameter."""

    def __init__(self, parts: Mapping[str, LocalShard], world: World) -> None:
        told = world.all_gather_str(json.dumps({name: part.bounds for name, part in parts.items()}))
        self._boxes = [
            {name: tuple(map(tuple, box)) for name, box in json.loads(text).items()}
            for text in told
        ]
        self._rank = world.rank

    def box(self, name: str, rank: int) -> ShardSlice | None:
        return self._boxes[rank].get(name)

    @property
    def names(self) -> list[str]:
        """Those of all parameters, in one order for everybody."""
        return sorted({name for boxes in self._boxes for name in boxes})

    def holders(self, name: str) -> list[int]:
        """The ranks of those that hold what this process holds, itself too."""
        mine = self._boxes[self._rank][name]
        return [rank for rank, boxes in enumerate(self._boxes) if boxes.get(name) == mine]

    def is_first(self, name: str, *, of_any_box: bool = False) -> bool:
        """Whether this process is the first of those that hold its box, or any box: to save it is
        its task."""
        having = [rank for rank, boxes in enumerate(self._boxes) if name in boxes]
        return (having if of_any_box else self.holders(name))[0] == self._rank
