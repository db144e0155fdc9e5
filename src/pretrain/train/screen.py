"""What a person sees while a run goes on: the plan, a progress bar, evaluations, samples, a
summary.

On a terminal there is a bar that redraws itself; in a file the same facts are plain lines, a few a
minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

# Between two plain lines when the output is no terminal.
_LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 02 s`, `41 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def with_error(row: Mapping[str, Any]) -> str:
    """`0.412 +- 0.035`: a task's value, and its standard error where there is one."""
    value, error = row["value"], row["stderr"]
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without whoever read this, such as `head`: rich would end the program."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Screen:
    """Writes for people to `file`; never to standard output when that must carry JSON."""

    def __init__(self, file: TextIO) -> None:
        self._console = _Console(file=file, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0

    def line(self, text: str = "", *, style: str = "") -> None:
        self._console.print(Text(text, style=style))

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Labels and values in two columns."""
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            self._console.print(Text.assemble((f"  {label:<{width}}  ", "dim"), value))

    @contextmanager
    def progress(self, *, steps: int, done: int) -> Iterator[None]:
        """Show the steps as they come; a bar on a terminal, nothing but the lines elsewhere."""
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=steps, completed=done, facts="")
            yield
        self._bar = None

    def step(
        self, done: int, steps: int, *, loss: float, bits_per_byte: float, rate: float, speed: float
    ) -> None:
        """One update is made: `done` of `steps`, with the nats per token of its batch and tokens a
        second."""
        if self._bar is not None:
            facts = f"loss {loss:.3f} | {bits_per_byte:.3f} bits/byte | {speed:,.0f} tok/s"
            self._bar.update(self._task, completed=done, facts=facts)
            return
        now = time.monotonic()
        if done not in (1, steps) and now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        self.line(
            f"step {done:>6,}/{steps:,} | loss {loss:.3f} | {bits_per_byte:.3f} bits/byte | "
            f"{speed:>7,.0f} tok/s | lr {rate:.1e}"
        )

    def evaluation(
        self,
        done: int,
        *,
        nats_per_token: float,
        bits_per_byte: float,
        left_seconds: float,
        best: bool,
    ) -> None:
        mark = ", the best so far" if best else ""
        self.line(
            f"step {done:>6,} | held-out text: {nats_per_token:.3f} nats/token, "
            f"{bits_per_byte:.3f} bits/byte{mark} | {duration(left_seconds)} left",
            style="bold",
        )

    def tasks(self, done: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """What tasks came to, all in one line."""
        said = [f"{row['task']} {row['metric']} {with_error(row)}" for row in rows]
        seconds = sum(row["seconds"] for row in rows)
        self.line(f"step {done:>6,} | {'; '.join(said)} | asked in {seconds:.1f} s")

    def sample(self, text: str) -> None:
        """Text of the model's own making, on one line or more, never read as markup."""
        self._console.print(Text("  " + " ".join(text.split()), style="italic"))
