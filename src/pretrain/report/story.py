"""What a run's numbers mean, in plain words: in comes a `Run`, out go sentences (not yet escaped).

A number that the files do not know is left out of a sentence, never guessed.
"""

from __future__ import annotations

from itertools import takewhile

from pretrain.report.run import Record, Run, curve, fields, number
from pretrain.report.units import count, decimal, duration

MODEL = "this model"


def ranking(run: Run) -> list[tuple[float, Record]]:
    """Bits per byte of each baseline and, if it has been evaluated, the model; the best first."""
    model: Record = {
        "name": MODEL,
        "bits_per_byte": run.figure("val_bits_per_byte"),
        "perplexity": run.figure("val_perplexity"),
        "note": f"after {count(run.scored_step)} steps",
    }
    pairs = [(number(entry.get("bits_per_byte")), entry) for entry in (*run.baselines, model)]
    ranks = [(bits, entry) for bits, entry in pairs if bits is not None]
    return sorted(ranks, key=lambda rank: rank[0])


def state(run: Run) -> str:
    """`finished`, or how far the run has come."""
    if run.is_finished:
        return "finished"
    planned = run.setting("train", "steps") or 0
    goal = f" of {count(planned)}" if planned >= max(run.last_step, 1) else ""
    return f"still running or stopped at step {count(run.last_step)}{goal}"


def verdict(run: Run) -> tuple[str, str]:
    """One sentence in two parts, of which the first is to be emphasised."""
    bits, loss = run.figure("val_bits_per_byte"), run.figure("loss")
    seconds = run.figure("train_seconds")
    after = f"after {count(run.scored_step)} steps"
    if run.scored_step < run.last_step:
        after += f", the best of {count(run.last_step)},"
    after += "" if seconds is None else f" and {duration(seconds)}"
    if bits is not None:
        size = "" if run.val_bytes is None else f"{count(run.val_bytes)} bytes of "
        return f"{decimal(bits)} bits per byte", f" on {size}held-out text, {after}{_beside(run)}."
    if loss is not None:
        told = f" {after}; nothing held out has been evaluated yet."
        return f"Training loss {decimal(loss)} nats per token", told
    return "No numbers yet", ": the run has not reported a step."


def warnings(run: Run) -> list[str]:
    """What a reader must know before he believes the curves."""
    found = []
    broken = list(takewhile(lambda record: number(record.get("loss")) is None, run.train[::-1]))
    if broken:
        first = count(number(broken[-1].get("step")))
        found.append(
            f"The training loss is not a finite number from step {first} on: the run diverged. "
            "A lower learning rate, a longer warm-up or gradient clipping usually helps."
        )
    points = curve(run.evaluations, "val_nats_per_token")
    step, best = min(points, key=lambda point: point[1], default=(0.0, 0.0))
    if points and points[-1][1] > best * 1.01:
        found.append(
            f"The held-out loss was lowest at step {count(step)} ({decimal(best)}) and has risen "
            "since: the model learns its training text by heart, or became unstable."
        )
    if run.unreadable:
        files = "; ".join(f"{name} ({why})" for name, why in run.unreadable.items())
        found.append(f"Not everything could be read: {files}.")
    return found


def memorised(row: Record) -> str:
    """What is to be known of a row of overlap.json besides its numbers."""
    told = []
    if short := number(row.get("too_short")):
        told.append(
            f"{count(short)} of {count(number(row.get('examples')))} have fewer than 8 words"
        )
    if most := fields(row.get("most")):
        percent = decimal(number(most.get("percent")), 1)
        told.append(f"most, {percent} %: {most.get('example')}, “{most.get('begins')} …”")
    if score := fields(row.get("score")):
        values = [decimal(number(score.get(key)), 4) for key in ("value", "value_without")]
        others = count(number(score.get("examples_without")))
        told.append(f"{score.get('metric')} {values[0]}; of the {others} without any {values[1]}")
    if longest := fields(row.get("longest")):
        where = fields(longest.get("document")).get("id")
        words = count(number(longest.get("words")))
        told.append(f"longest, {words} words of {where}: “{longest.get('text')}”")
    return ". ".join(told)


def _beside(run: Run) -> str:
    """How the model compares with all baselines."""
    ranks = ranking(run)
    told = [f"{entry.get('name')} ({decimal(bits)})" for bits, entry in ranks]
    place = [entry.get("name") for _, entry in ranks].index(MODEL)
    better, worse = ", ".join(told[:place]), ", ".join(told[place + 1 :])
    if better:
        return f": not yet as good as {better}" + (f", though better than {worse}" if worse else "")
    return f": better than {worse}" if worse else ""
