"""What one process holds of a parameter: a box of it, as a plain tensor that an optimizer updates.

The parameter of a model that is laid over processes comes in; the box, and a local parameter that
shares its memory, go out. Rules that look at each number, or at each row, need no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a parameter."""

    whole: nn.Parameter
    """the model's own parameter"""
    local: nn.Parameter
    """the memory of this process's box; the parameter itself, where that is all of it"""
    shape: torch.Size
    """of the whole parameter"""
    box: Box
    """(start, stop) a dim"""

    @property
    def elements(self) -> tuple[int, int]:
        """The numbers of the box's elements in the whole, in a row since only the first dim is
        cut."""
        row = math.prod(self.shape[1:])
        if not self.shape:
            return 0, 1
        return self.box[0][0] * row, self.box[0][1] * row

    def take_gradient(self) -> None:
        """Let the local parameter have the gradient of its box."""
        if self.local is self.whole:
            return
        gradient: Any = self.whole.grad
        self.local.grad = None if gradient is None else gradient.to_local()


def whole_part(parameter: nn.Parameter) -> Part:
    """All of a parameter."""
    return Part(parameter, parameter, parameter.shape, tuple((0, n) for n in parameter.shape))
