"""Writes a run's report: in comes a run directory, out goes one offline page, `report.html`.

The page needs no network, no script and no other file; every text that comes from a file is
escaped, because samples are a model's output and may contain anything.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from pretrain.report.chart import Series, line_chart
from pretrain.report.document import document
from pretrain.report.heat_map import heat_map
from pretrain.report.run import Record, Run, curve, fields, number, read_run, records_in
from pretrain.report.story import MODEL, memorised, ranking, state, verdict, warnings
from pretrain.report.units import UNKNOWN, count, decimal, duration, short_count, size, text

MOST_MOMENTS, MOST_SAMPLES, MOST_LETTERS = 12, 4, 1500  # steps shown, samples a step, text a sample
NOTHING = "(nothing: it ended at once)"  # in place of an empty sample


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run directory, all at once or not at all; returns its path."""
    run = read_run(run_dir)
    path, temporary = run.folder / "report.html", run.folder / f".report-{os.getpid()}.tmp"
    try:
        temporary.write_text(render(run), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except PermissionError as error:
        raise PermissionError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(run: Run) -> str:
    """The whole page as HTML. The same files give the same page."""
    parts = (
        _header,
        _tiles,
        _learning,
        _tasks,
        _baselines,
        _sources,
        _samples,
        _cards,
        _surprises,
        _overlap,
        _settings,
    )
    body = "".join(part(run) for part in parts)
    return document(f"{run.name}: {verdict(run)[0]}", body)


def _section(title: str, body: str, lead: str = "") -> str:
    """A part of the page, or nothing where there is nothing to show."""
    lead = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>\n" if body else ""


def _row(name: object, *cells: object, note: object = "", attributes: str = "") -> str:
    """A row of a table that begins with its name; every cell is escaped here."""
    data = "".join(f"<td>{text(cell)}</td>" for cell in cells)
    head = f'<th scope="row">{text(name)}<small>{text(note)}</small></th>'
    return f"<tr {attributes}>{head}{data}</tr>"


def _table(rows: str, css: str = "settings", names: Sequence[str] = ()) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    head = f"<thead><tr><td></td>{head}</tr></thead>" if head else ""
    return f'<table class="{css}">{head}<tbody>{rows}</tbody></table>' if rows else ""


def _header(run: Run) -> str:
    strong, rest = verdict(run)
    started = str(run.environment.get("started", UNKNOWN)).replace("T", " ").replace("Z", " UTC")
    alarms = "".join(f'<p class="warning">{text(warning)}</p>' for warning in warnings(run))
    return (
        '<header><p class="eyebrow"><span>Pre-training run</span>'
        f'<span class="state{"" if run.is_finished else " open"}">{text(state(run))}</span>'
        f"<span>started {text(started)}</span></p><h1>{text(run.name)}</h1>"
        f'<p class="verdict"><strong>{text(strong)}</strong>{text(rest)}</p>{alarms}</header>\n'
    )


def _tiles(run: Run) -> str:
    """The key figures; a note that would tell nothing new is left out."""
    figure, parameters = run.figure, run.figure("parameters")
    nats, seconds = decimal(figure("val_nats_per_token"), 3), duration(figure("total_seconds"))
    batch, device = run.setting("train", "batch_tokens"), run.environment.get("device", UNKNOWN)
    tiles = (
        ("Bits per byte", decimal(figure("val_bits_per_byte")), "held out; lower is better"),
        ("Perplexity", decimal(figure("val_perplexity"), 1), f"{nats} nats per token"),
        ("Parameters", short_count(parameters), count(parameters)),
        ("Tokens seen", short_count(figure("tokens")), f"{decimal(figure('epoch'))} epochs"),
        ("Tokens per second", short_count(figure("tokens_per_second")), f"on {device}"),
        ("Training time", duration(figure("train_seconds")), f"{seconds} in all"),
        ("Peak memory", size(figure("peak_memory_bytes")), ""),
        ("Steps", count(run.last_step), f"of {count(batch)} tokens"),
    )
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>"
        f"{'' if UNKNOWN in note or note == value else text(note)}</dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{shown}</dl>\n'


def _learning(run: Run) -> str:
    pairs = [(str(one.get("name")), number(one.get("nats_per_token"))) for one in run.baselines]
    levels = [(name, nats) for name, nats in pairs if nats is not None]
    training = Series("training", curve(run.train, "loss"))
    held_out = Series("held-out", curve(run.evaluations, "val_nats_per_token"), "dots")
    loss = line_chart([training, held_out], "Loss", "nats per token, by step", levels)
    small = "".join(
        line_chart([Series(title, curve(run.train, key))], title, unit, is_small=True)
        for title, unit, key in (
            ("Learning rate", "by step", "learning_rate"),
            ("Throughput", "tokens per second", "tokens_per_second"),
            ("Gradient norm", "before clipping", "grad_norm"),
        )
    )
    lead = "Lower is better. Dashed: what simple counting reaches on the held-out text."
    return _section("How it learned", f'{loss}<div class="trio">{small}</div>', lead)


def _tasks(run: Run) -> str:
    """A small chart for each task that was followed, and a table of the last values."""
    by_name: dict[str, list[Record]] = {}
    for row in run.tasks:
        if number(row.get("value")) is not None and number(row.get("step")) is not None:
            by_name.setdefault(str(row.get("task")), []).append(row)
    charts, rows = "", ""
    for name, found in by_name.items():
        last, metric = found[-1], str(found[-1].get("metric")).replace("_", " ")
        errors = [number(row.get("stderr")) for row in found]
        known = [e for e in errors if e is not None]
        series = Series(
            name, curve(found, "value"), "dots", known if len(known) == len(found) else ()
        )
        chance, error = number(last.get("chance")), number(last.get("stderr"))
        levels = [] if chance is None else [("chance", chance)]
        charts += line_chart([series], name, f"{metric}, by step", levels, is_small=True)
        value = decimal(number(last.get("value")), 3)
        cells = (
            value if error is None else f"{value} ± {decimal(error, 3)}",
            decimal(chance, 3),
            count(number(last.get("examples"))),
            count(number(last.get("step"))),
        )
        rows += _row(name, *cells, note=metric)
    table = _table(rows, "numbers", ("Value", "Chance", "Examples", "At step"))
    lead = (
        "Asked through training, always the same examples; a band, and what stands behind ±, is one"
        " standard error over the examples."
    )
    return _section("What it can do", charts and f'<div class="trio">{charts}</div>{table}', lead)


def _baselines(run: Run) -> str:
    """A table with a bar beneath each name."""
    ranks, rows = ranking(run) if run.baselines else [], ""
    for bits, entry in ranks:
        name, share = entry.get("name"), bits / (ranks[-1][0] or 1)
        attributes = f'style="--share:{share:.1%}"' + (' class="model"' if name == MODEL else "")
        cells = (decimal(bits, 3), decimal(number(entry.get("perplexity")), 1))
        rows += _row(name, *cells, note=entry.get("note") or "", attributes=attributes)
    return _section(
        "Beside simple baselines",
        _table(rows, "numbers bars", ("Bits per byte", "Perplexity")),
        "How many bits each needs for one byte of the same held-out text: the fewer, the better it "
        "foresees the text. Knowing nothing costs 8.",
    )


def _sources(run: Run) -> str:
    found, rows = run.summary.get("sources"), ""
    for name, row in found.items() if isinstance(found, dict) else ():
        row = row if isinstance(row, dict) else {}
        tokens, share, epochs = (number(row.get(key)) for key in ("tokens", "share", "epochs"))
        rows += _row(name, count(tokens), f"{share or 0:.2%}", decimal(epochs))
    table = _table(rows, "numbers", ("Tokens", "Share", "Epochs"))
    return _section("What was read of each source", table)


def _samples(run: Run) -> str:
    moments: dict[int, list[Record]] = {}
    for sample in run.samples:
        if (step := number(sample.get("step"))) is not None:
            moments.setdefault(round(step), []).append(sample)
    steps = sorted(moments, reverse=True)
    if len(steps) > MOST_MOMENTS:  # spread evenly, with the first and the last
        gap = (len(steps) - 1) / (MOST_MOMENTS - 1)
        steps = [steps[round(i * gap)] for i in range(MOST_MOMENTS)]
    items = "".join(_moment(run, step, moments[step], is_open=step == steps[0]) for step in steps)
    return _section(
        "What it wrote",
        items and f'<ol class="timeline">{items}</ol>',
        "Samples through training, the latest first; prompts are in colour. All of them are in "
        "samples.jsonl.",
    )


def _moment(run: Run, step: int, samples: Sequence[Record], *, is_open: bool) -> str:
    """What the model wrote after one step, to be unfolded."""
    known = [bits for at, bits in curve(run.evaluations, "val_bits_per_byte") if at <= step]
    bits = f"{decimal(known[-1])} bits per byte" if known else ""
    shown = ""
    for one in samples[:MOST_SAMPLES]:
        prompt = str(one.get("prompt") or "")
        written = str(one.get("text") or "").removeprefix(prompt) or NOTHING
        more = len(written) - MOST_LETTERS
        rest = f"\n… and {more:,} more characters" if more > 0 else ""
        drawn = ", ".join(f"{key} {one[key]}" for key in ("temperature", "seed") if key in one)
        shown += (
            f'<p class="sample" dir="auto"><b>{text(prompt[:MOST_LETTERS])}</b>'
            f'{text(written[:MOST_LETTERS])}<span class="about">{rest}</span></p>'
            f'<p class="about">{text(drawn)}</p>'
        )
    glimpse = " ".join(str(samples[0].get("text") or "")[:160].split())
    return (
        f"<li><details{' open' if is_open else ''}><summary>"
        f'<span class="when">Step {count(step)}</span> '
        f'<span class="about">{bits}</span><span class="glimpse">{text(glimpse)}</span></summary>'
        f"{shown}</details></li>"
    )


def _cards(run: Run) -> str:
    """Flash cards: a context, the likeliest tokens with a bar each, and the one that came."""
    shown = ""
    for one in records_in(run.predictions.get("cards")):
        answer = one.get("answer")
        answer = answer if isinstance(answer, dict) else {}
        rows = "".join(
            _row(
                repr(str(row.get("text"))),
                decimal(p := number(row.get("probability")), 3),
                attributes=f'style="--share:{min(p or 0.0, 1.0):.1%}"'
                + (' class="model"' if row.get("text") == answer.get("text") else ""),
            )
            for row in records_in(one.get("likeliest"))
        )
        probability, nats = (number(answer.get(key)) for key in ("probability", "nats"))
        came = (
            f"came {str(answer.get('text'))!r}: probability {decimal(probability, 4)}, rank "
            f"{count(number(answer.get('rank')))}, {decimal(nats)} nats"
        )
        context = f'<p class="sample" dir="auto">…{text(one.get("context"))}<b>?</b></p>'
        table = _table(rows, "numbers bars")
        shown += f'<div class="card">{context}{table}<p class="about">{text(came)}</p></div>'
    lead = (
        "Flash cards from held-out text, at even distances: the five tokens that the model finds"
        " likeliest, and the one that came, in colour where it is among them."
    )
    return _section("What comes next", shown and f'<div class="cards">{shown}</div>', lead)


def _surprises(run: Run) -> str:
    lead = (
        "A held-out passage, token by token: the redder, the less the model foresaw it. The pointer"
        " upon a token is told its nats, probability and rank."
    )
    return _section("What surprised it", heat_map(records_in(run.predictions.get("passage"))), lead)


def _overlap(run: Run) -> str:
    """Two tables, where `pretrain evaluate --overlap` has written what is in the training text."""
    names = ("8 in a row", "In training text", "Median", "Texts with none")
    tables = ""
    for part in ("sets", "writing"):
        rows = ""
        for name, row in fields(run.overlap.get(part)).items():
            share, middle = (number(fields(row).get(k)) for k in ("percent", "median_percent"))
            ngrams, without = (number(fields(row).get(k)) for k in ("ngrams", "without"))
            percents = (UNKNOWN if v is None else f"{v:.2f} %" for v in (share, middle))
            cells = (count(ngrams), *percents, count(without))
            rows += _row(name, *cells, note=memorised(fields(row)))
        tables += _table(rows, "numbers", names)
    return _section(
        "What it has seen before",
        tables,
        "Different 8 words in a row, case and punctuation aside, that stand in the training text "
        "too: of what judges the model, and of what it writes. The held-out split is of the same "
        "source, and so what the others are to be compared with.",
    )


def _settings(run: Run) -> str:
    """The configuration as it is written, the environment, and commands to go on from here."""
    where = shlex.quote(run.folder.as_posix())
    commands = (
        ("Train it again", str(run.environment.get("command") or "")),
        ("Go on training", "" if run.is_finished else f"pretrain train --run {where} --resume"),
        ("See it write", f'pretrain generate {where} --prompt "Once upon a time"'),
        ("Measure it on your own text", f"pretrain evaluate {where} --text FILE"),
        (
            "See what surprises it",
            f"pretrain evaluate {where} --text FILE --heat-map surprises.html",
        ),
    )
    blocks = "".join(
        f'<h3>{name}</h3><pre class="command">{text(line)}</pre>' for name, line in commands if line
    )
    facts = {k: v for k, v in run.environment.items() if isinstance(v, str | int | float)}
    facts.pop("command", None)
    config = f'<pre class="command config">{text(run.config_text)}</pre>' if run.config_text else ""
    environment = _table("".join(_row(name, fact) for name, fact in facts.items()))
    return (
        _section("Configuration", config)
        + _section("Where it ran", environment)
        + _section("Again, and further", blocks)
        + "<footer>Written by pretrain from the files of the run. This page loads nothing.</footer>"
    )
