"""The report of a run: a run directory comes in, `report.html` goes out, one page without scripts.

The templates have the layout and all fixed text; here is what they show. A number that the files do
not have is left out of the text, never guessed.
"""

from __future__ import annotations

import math
import shlex
import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

from pretrain.fileio import replace_file
from pretrain.report.chart import Series, line_chart
from pretrain.report.html import heat_map_data, render
from pretrain.report.run import Record, RunFiles, curve, fields, read_run_files, records_in
from pretrain.report.units import UNKNOWN, count, decimal, duration, number
from pretrain.run.directory import CROSS_VALIDATION, MIX_FOLDER, REPORT
from pretrain.run.log import CHARTS

MODEL = "this model"
# Steps whose samples are shown, and samples of a step.
MAX_MOMENTS, MAX_SAMPLES = 12, 4


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run directory, atomically; return its path. The page is a
    function of the run's files."""
    run = read_run_files(run_dir)
    diverged = list(takewhile(lambda record: number(record.get("loss")) is None, run.train[::-1]))
    overlap = [fields(run.overlap.get(part)) for part in ("sets", "writing")]
    facts = {k: v for k, v in run.environment.items() if isinstance(v, str | int | float)}
    facts.pop("command", None)
    cards = records_in(run.predictions.get("cards"))
    crossed = fields(run.summary.get(CROSS_VALIDATION))
    ranks = ranking(run, crossed)
    readings = [fields(each.get("facts")) for each in records_in(run.summary.get("reading"))]
    page = render(
        "report.html",
        MODEL=MODEL,
        run=run,
        started=str(run.environment.get("started", UNKNOWN)).replace("T", " ").replace("Z", " UTC"),
        verdict=verdict(run, ranks, crossed),
        diverged=diverged[-1:],
        loss_chart=learning_curves(run),
        small_charts=[
            line_chart([Series(title, curve(run.train, key))], title, unit, is_small=True)
            for key, (title, unit) in CHARTS.items()
        ],
        tasks=tasks(run),
        ranking=ranks,
        sources={k: fields(v) for k, v in fields(run.summary.get("sources")).items()},
        reading=[(label, str(text).split("\n")) for r in readings for label, text in r.items()],
        moments=moments(run),
        cards=[card | {"tokens": records_in(card.get("most_probable"))} for card in cards],
        passage=heat_map_data(records_in(run.predictions.get("passage"))),
        overlap=[{k: fields(v) for k, v in part.items()} for part in overlap if part],
        facts=facts,
        folder=shlex.quote(run.folder.as_posix()),
    )
    path = run.folder / REPORT
    replace_file(path, page.encode())
    return path


def learning_curves(run: RunFiles) -> dict[str, Any]:
    """The chart of bits per byte by epoch, or by step of less than half an epoch or of several
    sources, which have epochs of their own; and the numbers of its best evaluation."""
    last: Record = run.train[-1] if run.train else {}
    epochs, step = number(last.get("epoch")) or 0.0, number(last.get("step")) or math.inf
    by_epoch = epochs >= 0.5 and "sources" not in last
    scale, x_name = (epochs / step, "epoch") if by_epoch else (1.0, "step")
    train, held_out = (
        [(x * scale, y) for x, y in curve(records, key)]
        for records, key in ((run.train, "bits_per_byte"), (run.evaluations, "val_bits_per_byte"))
    )
    series = [Series("training", train), Series("held-out", held_out, "dots")]
    facts: dict[str, Any] = {"x_name": x_name}
    if held_out[1:] and train:
        best, end = min(held_out, key=lambda point: point[1]), held_out[-1]
        near = [sorted(train, key=lambda p: abs(p[0] - x))[:20] for x in (best[0], end[0])]
        before, after = (statistics.median(y for _, y in points) for points in near)
        facts |= {"best": best, "end": end, "before": before, "after": after}
        series += [Series(f"best: {best[1]:.3f}, epoch {best[0]:.2f}", [best], "mark")] * by_epoch
    levels = [(str(row.get("name")), bits) for bits, row in ranking(run) if row["name"] != MODEL]
    return facts | line_chart(series, "Loss", f"bits per byte, by {x_name}", levels)


def ranking(run: RunFiles, crossed: Record | None = None) -> list[tuple[float, Record]]:
    """Bits per byte of each baseline and of the model, if it was evaluated; the best first. Of a
    cross-validation, `crossed`, those over all its parts."""
    parts = [
        f"{row.get('name')} {decimal(number(row.get('bits_per_byte')))}"
        for row in records_in(run.summary.get(MIX_FOLDER))
    ]
    model: Record = {
        "name": MODEL,
        "bits_per_byte": run.figure("val_bits_per_byte"),
        "stderr": run.figure("val_bits_per_byte_stderr"),
        "perplexity": run.figure("val_perplexity"),
        "note": f"the mean of {', '.join(parts)}"
        if parts
        else f"after {count(run.scored_step)} steps",
    }
    baselines = run.baselines
    if crossed:
        baselines = records_in(crossed.get("baselines"))
        bits, stderr = (number(crossed.get(key)) for key in ("bits_per_byte", "stderr"))
        note = f"over {len(records_in(crossed.get('parts')))} parts of the text"
        model |= {"bits_per_byte": bits, "stderr": stderr, "perplexity": None, "note": note}
    pairs = [(number(row.get("bits_per_byte")), row) for row in [*baselines, model]]
    ranks = [(bits, row) for bits, row in pairs if bits is not None]
    return sorted(ranks, key=lambda rank: rank[0])


def verdict(run: RunFiles, ranks: list[tuple[float, Record]], crossed: Record) -> tuple[str, str]:
    """One sentence in two parts, of which the first is emphasised."""
    bits, loss = run.figure("val_bits_per_byte"), run.figure("loss")
    seconds = run.figure("train_seconds")
    after = f"after {count(run.scored_step)} steps"
    if run.scored_step < run.last_step:
        after += f", the best of {count(run.last_step)},"
    if seconds is not None:
        after += f" and {duration(seconds)}"
    if bits is None and loss is None:
        return "No numbers yet", ": the run has not logged a step."
    if bits is None:
        rest = f" {after}; there is no evaluation on held-out text yet."
        return f"Training loss {decimal(loss)} nats per token", rest
    if crossed:
        value, error = (number(crossed.get(key)) for key in ("bits_per_byte", "stderr"))
        after += f", and {decimal(value)} ± {decimal(error, 3)} over all "
        after += f"{len(records_in(crossed.get('parts')))} parts that were held out in turn"
    names = [f"{baseline.get('name')} ({decimal(bits)})" for bits, baseline in ranks]
    place = [baseline.get("name") for _, baseline in ranks].index(MODEL)
    better, worse = ", ".join(names[:place]), ", ".join(names[place + 1 :])
    comparison = f": better than {worse}" if worse else ""
    if better:
        comparison = f": not yet as good as {better}"
        comparison += f", though better than {worse}" if worse else ""
    n_bytes = "" if run.val_bytes is None else f"{count(run.val_bytes)} bytes of "
    return f"{decimal(bits)} bits per byte", f" on {n_bytes}held-out text, {after}{comparison}."


def tasks(run: RunFiles) -> list[dict[str, Any]]:
    """The in-loop tasks: name, metric, a small chart and the last record of each."""
    by_name: dict[str, list[Record]] = {}
    for record in run.tasks:
        if number(record.get("value")) is not None and number(record.get("step")) is not None:
            by_name.setdefault(str(record.get("task")), []).append(record)
    result = []
    for name, records in by_name.items():
        last = records[-1]
        metric, chance = str(last.get("metric")).replace("_", " "), number(last.get("chance"))
        errors = [e for record in records if (e := number(record.get("stderr"))) is not None]
        band = errors if len(errors) == len(records) else []
        chart = line_chart(
            [Series(name, curve(records, "value"), "dots", band)],
            name,
            f"{metric}, by step",
            [] if chance is None else [("chance", chance)],
            is_small=True,
        )
        result.append({"name": name, "metric": metric, "chart": chart, "last": last})
    return result


def moments(run: RunFiles) -> list[dict[str, Any]]:
    """The samples of some steps, the latest first, and bits per byte at each of them."""
    by_step: dict[int, list[Record]] = {}
    for sample in run.samples:
        if (step := number(sample.get("step"))) is not None:
            by_step.setdefault(round(step), []).append(sample)
    steps = sorted(by_step, reverse=True)
    if len(steps) > MAX_MOMENTS:  # evenly spaced, with the first and the last
        gap = (len(steps) - 1) / (MAX_MOMENTS - 1)
        steps = [steps[round(i * gap)] for i in range(MAX_MOMENTS)]
    evaluations = curve(run.evaluations, "val_bits_per_byte")
    result = []
    for step in steps:
        samples = []
        for sample in by_step[step][:MAX_SAMPLES]:
            prompt, text = (str(sample.get(key) or "") for key in ("prompt", "text"))
            text = text.removeprefix(prompt) or "(nothing: it ended at once)"
            samples.append(sample | {"prompt": prompt, "text": text})
        bits = [bits for at, bits in evaluations if at <= step]
        result.append({"step": step, "bits": bits[-1:], "samples": samples})
    return result
