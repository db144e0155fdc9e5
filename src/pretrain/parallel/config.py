"""Settings of several processes: how many, and what each axis of the mesh is for. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

_MOST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    processes: int = 1
    """processes to start on this machine; under torchrun there are as many as it has started"""
    data: int | None = None
    """copies of the model, each with its own rows of a batch; empty: as many as the processes
    make"""
    shard: int = 1
    """processes over which the weights of one copy are laid, and their rows of a batch (FSDP)"""
    elastic: bool = False
    """sum gradients in an order that does not hang on the number of processes, so that a run is the
    same bit for bit on any (data axis alone)"""
    timeout_seconds: float = 600.0
    """how long processes wait for one that does not answer before they name it and end"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        wrong = False
        for name in ("processes", "data", "shard"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                legal = "at least 1" if value < 1 else f"at most {_MOST:,}"
                wrong = True
                yield name, f"parallel.{name} is {value}; it must be {legal}"

        if not 0 < self.timeout_seconds <= _MOST:
            legal = f"at most {_MOST:,}" if self.timeout_seconds > 0 else "above 0"
            yield (
                "timeout_seconds",
                f"parallel.timeout_seconds is {self.timeout_seconds}; it must be {legal}",
            )
        if self.elastic and self.shard > 1:
            yield "elastic shard", f"parallel.elastic goes with parallel.shard 1, not {self.shard}"
        if self.processes > 1 and not wrong:
            yield from self._mistakes_of_axes(self.processes)

    def _mistakes_of_axes(self, n_processes: int) -> Iterator[tuple[str, str]]:
        data = self.data or max(1, n_processes // self.shard)
        if data * self.shard != n_processes:
            yield (
                "processes data shard",
                f"parallel.data {data} x parallel.shard {self.shard} is {data * self.shard}, and "
                f"there are {n_processes} processes; the product of the axes must be that number",
            )

    def laid_out(self, n_processes: int) -> ParallelConfig:
        """The same with every axis filled, for so many processes; ValueError where the axes do not
        multiply to them."""
        for _, mistake in self._mistakes_of_axes(n_processes):
            raise ValueError(mistake)
        data = n_processes // self.shard
        return replace(self, processes=n_processes, data=data)
