"""Writes a run's report: in comes a run directory, out goes one offline page, `report.html`.

The page needs no network, no script and no other file; every text that comes from a file is
escaped, because samples are a model's output and may contain anything. Refused is a folder that
is not a run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from importlib.resources import files
from itertools import islice
from pathlib import Path

from pretrain.report.chart import Bar, Level, Series, bar_chart, line_chart
from pretrain.report.run import Record, Run, curve, number, read_run
from pretrain.report.story import about_loss, ranking, state, verdict, warnings
from pretrain.report.units import UNKNOWN, count, decimal, duration, short_count, size, text

# Even a page that was tampered with may load nothing and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MOST_MOMENTS, MOST_SAMPLES, MOST_LETTERS = 12, 4, 1500  # steps shown, samples a step, text a sample
MOST_FIELDS = 60  # of one section of the configuration


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
    css = files("pretrain.report").joinpath("page.css").read_text(encoding="utf-8")
    bits = run.figure("val_bits_per_byte")
    title = run.name + ("" if bits is None else f": {decimal(bits)} bits per byte")
    body = (
        _header(run),
        _tiles(run),
        _learning(run),
        _baselines(run),
        _sources(run),
        _samples(run),
        _configuration(run),
        _environment(run),
        _commands(run),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{css}</style></head>\n"
        f"<body><main>\n{''.join(body)}</main></body></html>\n"
    )


def _header(run: Run) -> str:
    strong, rest = verdict(run)
    started = str(run.environment.get("started") or "").replace("T", " ").replace("Z", " UTC")
    pill = f'<span class="state{"" if run.is_finished else " open"}">{text(state(run))}</span>'
    when = f"<span>started {text(started)}</span>" if started else ""
    alarms = "".join(f'<p class="warning">{text(warning)}</p>' for warning in warnings(run))
    return (
        f'<header><p class="eyebrow"><span>Pre-training run</span>{pill}{when}</p>'
        f"<h1>{text(run.name)}</h1>"
        f'<p class="verdict"><strong>{text(strong)}</strong>{text(rest)}</p>{alarms}</header>\n'
    )


def _tiles(run: Run) -> str:
    nats, total = run.figure("val_nats_per_token"), run.figure("total_seconds")
    epochs = curve(run.train, "epoch")
    vocabulary = number(run.setting("tokenizer", "vocab_size"))
    of_vocabulary = "" if vocabulary is None else f" of {count(vocabulary)}"
    tiles = (
        ("Bits per byte", decimal(run.figure("val_bits_per_byte")), "held out; lower is better"),
        (
            "Perplexity",
            decimal(run.figure("val_perplexity"), 1),
            f"per token{of_vocabulary}" if nats is None else f"{decimal(nats, 3)} nats per token",
        ),
        ("Parameters", short_count(run.figure("parameters")), _exactly(run.figure("parameters"))),
        (
            "Tokens seen",
            short_count(run.figure("tokens")),
            f"{epochs[-1][1]:.2f} epochs" if epochs else "",
        ),
        ("Tokens per second", short_count(run.figure("tokens_per_second")), _device(run)),
        (
            "Training time",
            duration(run.figure("train_seconds")),
            "" if total is None else f"{duration(total)} in all",
        ),
        ("Peak memory", size(run.figure("peak_memory_bytes")), ""),
        ("Steps", count(run.last_step), _batch(run)),
    )
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{text(value)}</dd><dd class='note'>{text(note)}</dd></div>"
            for name, value, note in tiles
        )
        + "</dl>\n"
    )


def _exactly(value: float | None) -> str:
    return "" if value is None or value < 999_500 else count(value)


def _device(run: Run) -> str:
    device, threads = run.environment.get("device"), run.environment.get("threads")
    if device is None:
        return ""
    return f"{device}, {threads} threads" if device == "cpu" and threads else str(device)


def _batch(run: Run) -> str:
    tokens = number(run.setting("train", "batch_tokens"))
    return "" if tokens is None else f"of {count(tokens)} tokens"


def _learning(run: Run) -> str:
    levels = [
        Level(str(entry.get("name")), nats)
        for entry in run.baselines
        if (nats := number(entry.get("nats_per_token"))) is not None
    ]
    loss = line_chart(
        [
            Series("training", curve(run.train, "loss"), "noisy"),
            Series("held-out", curve(run.evaluations, "val_nats_per_token"), "dots"),
        ],
        title="Loss",
        unit="nats per token, by step",
        levels=levels,
    )
    clip = number(run.setting("optimizer", "clip"))
    small = "".join(
        line_chart(
            [
                Series(
                    title.lower(), curve(run.train, key), "line" if unit == "by step" else "noisy"
                )
            ],
            title=title,
            unit=unit,
            levels=[Level("clipped at", clip)] if clip and key == "grad_norm" else (),
            from_zero=True,
            is_small=True,
        )
        for title, unit, key in (
            ("Learning rate", "by step", "learning_rate"),
            ("Throughput", "tokens per second", "tokens_per_second"),
            ("Gradient norm", "before clipping", "grad_norm"),
        )
    )
    lead = f'<p class="lead">{text(about_loss(run))}</p>'
    trio = f'<div class="trio">{small}</div>'
    return f"<section><h2>How it learned</h2>{lead}{loss}{trio}</section>\n"


def _baselines(run: Run) -> str:
    rows = ranking(run)
    if not run.baselines or not rows:
        return ""
    bars = [Bar(row.name, row.bits_per_byte, row.is_model) for row in rows]
    table = "".join(
        f'<tr class="{"model" if row.is_model else "baseline"}"><th scope="row">{text(row.name)}'
        f"<small>{text(row.note)}</small></th><td>{decimal(row.bits_per_byte, 3)}</td>"
        f"<td>{decimal(row.perplexity, 1)}</td></tr>"
        for row in rows
    )
    return (
        "<section><h2>Beside simple baselines</h2>"
        '<p class="lead">How many bits each needs for one byte of the same held-out text: the '
        "fewer, the better it foresees the text. Knowing nothing costs 8.</p>"
        f"{bar_chart(bars, title='Bits per byte', unit='lower is better')}"
        '<table class="numbers"><thead><tr><td></td><th scope="col">Bits per byte</th>'
        f'<th scope="col">Perplexity</th></tr></thead><tbody>{table}</tbody></table></section>\n'
    )


def _sources(run: Run) -> str:
    found = run.summary.get("sources")
    if not isinstance(found, dict):
        return ""
    table = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{count(number(row.get("tokens")))}</td>'
        f"<td>{decimal(100 * (number(row.get('share')) or 0), 2)} %</td>"
        f"<td>{decimal(number(row.get('epochs')), 2)}</td></tr>"
        for name, row in found.items()
        if isinstance(row, dict)
    )
    return (
        '<section><h2>What was read of each source</h2><table class="numbers"><thead><tr><td></td>'
        '<th scope="col">Tokens</th><th scope="col">Share</th><th scope="col">Epochs</th></tr>'
        f"</thead><tbody>{table}</tbody></table></section>\n"
    )


def _samples(run: Run) -> str:
    moments: dict[int, list[Record]] = {}
    for sample in run.samples:
        if (step := number(sample.get("step"))) is not None:
            moments.setdefault(round(step), []).append(sample)
    if not moments:
        return ""
    steps = _spread(sorted(moments), MOST_MOMENTS)[::-1]
    items = [f'<li class="latest">{_when(run, steps[0])}{_texts(moments[steps[0]])}</li>']
    for step in steps[1:]:
        first = moments[step][0]
        glimpse = f"{first.get('prompt') or ''}{first.get('text') or ''}"[:160].split()
        items.append(
            f"<li><details><summary>{_when(run, step)}"
            f'<span class="glimpse">{text(" ".join(glimpse))}</span></summary>'
            f"{_texts(moments[step])}</details></li>"
        )
    return (
        "<section><h2>What it wrote</h2>"
        '<p class="lead">Samples through training, the latest first; prompts are in colour.</p>'
        f'<ol class="timeline">{"".join(items)}</ol></section>\n'
    )


def _when(run: Run, step: int) -> str:
    known = [bits for at, bits in curve(run.evaluations, "val_bits_per_byte") if at <= step]
    bits = f' <span class="about">{decimal(known[-1])} bits per byte</span>' if known else ""
    return f'<span class="when">Step {count(step)}</span>{bits}'


def _texts(samples: list[Record]) -> str:
    parts = []
    for sample in samples[:MOST_SAMPLES]:
        prompt, written = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        if prompt and written.startswith(prompt):
            written = written[len(prompt) :]
        more = len(written) - MOST_LETTERS
        rest = f'\n<span class="about">… and {more:,} more characters</span>' if more > 0 else ""
        shown = (
            text(written[:MOST_LETTERS]) or '<span class="about">(nothing: it ended at once)</span>'
        )
        head = f"<b>{text(prompt[:MOST_LETTERS])}</b>" if prompt else ""
        drawn = ", ".join(
            f"{key} {text(sample[key])}" for key in ("temperature", "seed") if key in sample
        )
        parts.append(
            f'<p class="sample" dir="auto">{head}{shown}{rest}</p><p class="about">{drawn}</p>'
        )
    if len(samples) > MOST_SAMPLES:
        parts.append(f'<p class="about">{len(samples) - MOST_SAMPLES:,} more in samples.jsonl</p>')
    return "".join(parts)


def _spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    sections = {
        name: one if isinstance(one, dict) else {"": one} for name, one in run.config.items()
    }
    cards = "".join(
        f"<section><h3>{text(name)}</h3>{_settings(fields.items())}</section>"
        for name, fields in sections.items()
        if fields
    )
    return f'<section><h2>Configuration</h2><div class="cards">{cards}</div></section>\n'


def _environment(run: Run) -> str:
    facts = [
        (key.replace("_", " "), value)
        for key, value in run.environment.items()
        if key != "command" and value is not None
    ]
    if not facts:
        return ""
    return f"<section><h2>Where it ran</h2>{_settings(facts)}</section>\n"


def _settings(fields: Iterable[tuple[object, object]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(key)}</th><td>{text(_plain(value))}</td></tr>'
        for key, value in list(fields)[:MOST_FIELDS]
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


def _plain(value: object, depth: int = 0) -> str:
    """A value of a config in one line, much as YAML writes it; long and deep ones are cut."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        if depth > 2:
            return "…"
        pairs = value.items() if isinstance(value, dict) else (("", one) for one in value)
        parts = [f"{key} {_plain(one, depth + 1)}".strip() for key, one in islice(pairs, 8)]
        return ", ".join(parts) + (", …" if len(value) > 8 else "") or UNKNOWN
    told = f"{value:g}" if isinstance(value, float) else str(value)
    return told if len(told) <= 300 else told[:299] + "…"


def _commands(run: Run) -> str:
    where = shlex.quote(run.folder.as_posix())
    told = [("See it write", f'pretrain generate {where} --prompt "Once upon a time"')]
    told.append(("Measure it on your own text", f"pretrain evaluate {where} --text FILE"))
    if not run.is_finished:
        told.insert(0, ("Go on training", f"pretrain train --run {where} --resume"))
    command = run.environment.get("command")
    if command:
        told.insert(0, ("Train it again", str(command)))
    blocks = "".join(
        f'<h3>{name}</h3><pre class="command">{text(line)}</pre>' for name, line in told
    )
    version = run.environment.get("pretrain")
    by = f"pretrain {text(version)}" if version else "pretrain"
    return (
        f"<section><h2>Again, and further</h2>{blocks}</section>"
        f"<footer>Written by {by} from the files of the run. This page loads nothing.</footer>\n"
    )
