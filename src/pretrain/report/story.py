"""What a run's numbers mean, in plain words: in comes a `Run`, out go sentences (not yet escaped).

A number that the files do not know is left out of a sentence, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.report.run import Run, curve, number
from pretrain.report.units import count, decimal, duration


@dataclass(frozen=True, slots=True)
class Baseline:
    """A simple model of the same held-out text, or the run's own model beside them."""

    name: str
    bits_per_byte: float
    perplexity: float | None
    note: str
    is_model: bool = False


def ranking(run: Run) -> list[Baseline]:
    """The baselines and, if it has been evaluated, the model; the best first."""
    rows = [
        Baseline(str(entry.get("name")), bits, number(entry.get("perplexity")), _note(entry))
        for entry in run.baselines
        if (bits := number(entry.get("bits_per_byte"))) is not None
    ]
    bits = run.figure("val_bits_per_byte")
    if bits is not None:
        note = f"after {count(run.last_step)} steps"
        rows.append(Baseline("this model", bits, run.figure("val_perplexity"), note, is_model=True))
    return sorted(rows, key=lambda row: row.bits_per_byte)


def state(run: Run) -> str:
    """`finished`, or how far the run has come."""
    if run.is_finished:
        return "finished"
    planned = number(run.setting("train", "steps"))
    goal = f" of {count(planned)}" if planned and planned >= run.last_step else ""
    return f"still running or stopped at step {count(run.last_step)}{goal}"


def verdict(run: Run) -> tuple[str, str]:
    """One sentence in two parts, of which the first is to be emphasised."""
    bits = run.figure("val_bits_per_byte")
    steps = run.last_step
    after = f"after {count(steps)} step{'' if steps == 1 else 's'}"
    if (seconds := run.figure("train_seconds")) is not None:
        after += f" and {duration(seconds)}"
    if bits is None:
        loss = run.figure("loss")
        if loss is None:
            return "No numbers yet", ": the run has not reported a step."
        told = f" {after}; nothing held out has been evaluated yet."
        return f"Training loss {decimal(loss)} nats per token", told
    size = "" if run.val_bytes is None else f"{count(run.val_bytes)} bytes of "
    return f"{decimal(bits)} bits per byte", f" on {size}held-out text, {after}{_beside(run)}."


def warnings(run: Run) -> list[str]:
    """What a reader must know before he believes the curves."""
    found = []
    broken = run.first_broken_step()
    if broken is not None:
        found.append(
            f"The training loss is not a finite number from step {count(broken)} on: the run "
            "diverged. A lower learning rate, a longer warm-up or gradient clipping usually helps."
        )
    if run.unreadable:
        found.append(f"Not everything could be read: {'; '.join(run.unreadable)}.")
    return found


def about_loss(run: Run) -> str:
    """How to read the curve of the loss, and whether the last evaluation was the best."""
    told = "Nats per token; lower is better."
    if run.baselines:
        told += " Dashed: what simple counting reaches on the held-out text."
    points = curve(run.evaluations, "val_nats_per_token")
    if not points:
        return told
    best_step, best = min(points, key=lambda point: point[1])
    if points[-1][1] > best * 1.01:
        told += (
            f" The held-out loss was lowest at step {count(best_step)} ({decimal(best)}) and "
            "has risen since: the model learns its training text by heart, or became unstable."
        )
    return told


def _note(entry: dict[str, object]) -> str:
    return str(entry.get("note") or "")


def _beside(run: Run) -> str:
    rows = ranking(run)
    place = next(i for i, row in enumerate(rows) if row.is_model)
    better, worse = rows[:place], rows[place + 1 :]
    if better:
        told = f": not yet as good as {_named(_two(better[::-1]))}"
        return told + (f", though better than {_named(_two(worse))}" if worse else "")
    return f": better than {_named(_two(worse))}" if worse else ""


def _two(rows: Sequence[Baseline]) -> Sequence[Baseline]:
    """The nearest row, and the nearest of the other kind (counts, compressors) or else the next."""
    others = [row for row in rows[1:] if _is_counts(row) != _is_counts(rows[0])]
    return [*rows[:1], *(others or rows[1:])[:1]]


def _is_counts(row: Baseline) -> bool:
    return row.name.endswith("gram")


def _named(rows: Sequence[Baseline]) -> str:
    return " and ".join(
        f"{row.name}{' counts' if _is_counts(row) else ''} ({decimal(row.bits_per_byte)})"
        for row in rows
    )
