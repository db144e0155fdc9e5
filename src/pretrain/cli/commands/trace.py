"""Which documents a training step read, or which steps read a document: exactly, without a log.

pretrain trace runs/english-1 --step 100
pretrain trace runs/english-1 --document moby-dick-chapter-1

Steps count from 1. A step read a document if one of its tokens was an input or a target.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.cli.options import RUN, option
from pretrain.cli.output import Output
from pretrain.config import RunConfig
from pretrain.data.format import PreparedData
from pretrain.data.order import Occurrence, Tracer
from pretrain.run.directory import read_environment
from pretrain.run.identity import check_config, read_records, word_of
from pretrain.run.log import RunLog
from pretrain.runner.checks import lr_schedule_of, read_run_config, settings_of
from pretrain.runner.text import prepared_text
from pretrain.train.config import filled
from pretrain.train.monitor import rollbacks_of

OPTIONS = (
    RUN,
    option("--step N", "a step, past or future", type=int),
    option("--document ID", "the id of a document, or the file that it came from"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    if (args.step is None) == (args.document is None):
        raise ValueError("trace needs either --step N or --document ID")
    folder = Path(args.run)
    config = read_run_config(folder)
    data = prepared_text(config, log=output.log, run=folder)
    first, before = _first_step_of_text(folder, config, data)
    # The settings that the order of the text depends on.
    names = ("data.", "train.seed", "train.batch_tokens", "model.context_length")
    now = {name: value for name, value in settings_of(config).items() if name.startswith(names)}
    started = read_environment(folder)["fingerprint"].get("settings", {})
    check_config(folder, now, started, step=0)
    context, n_steps = config.model.window_tokens, lr_schedule_of(folder, config).steps
    batch_size = filled(config.train.batch_tokens) // context
    order = data.order(
        context_length=context, seed=config.train.seed, steps=n_steps, batch_size=batch_size
    )
    records = RunLog(folder).metrics()
    tracer = Tracer(order, data.split("train").document_offsets, batch_size, rollbacks_of(records))
    if args.step is not None:
        if not first <= args.step <= n_steps:
            was = f"; before step {first} the run read {before}" if first > 1 else ""
            raise ValueError(f"--step must be {first} to {n_steps} (got {args.step}){was}")
        occurrences = tracer.occurrences_in(args.step)
        numbers = {each.document for each in occurrences}
        documents = enumerate(data.split("train").origins())
        origins = {n: origin for n, origin in documents if n in numbers}
        rows = [_row(each, tracer, data) | asdict(origins[each.document]) for each in occurrences]
        for row in rows:
            output.log(
                f"sample {row['sample']}  {row['id']}  {row['file']} at byte {row['offset']}, "
                f"tokens {row['first_token']} to {row['stop_token']}\n    {_shortened(row['text'])}"
            )
        output.result({"step": args.step, "seen": rows})
    else:
        done = max((record["step"] for record in records), default=0)
        _show_document(tracer, data, args.document, output, first=first, n_steps=done)


def _first_step_of_text(folder: Path, config: RunConfig, data: PreparedData) -> tuple[int, str]:
    """The first step (from 1) that read the run's current text, and the source it read before."""
    seen, since = read_environment(folder)["fingerprint"]["training text"], 0
    records = read_records(folder)
    for each in records:
        if each["what"] == word_of("training text"):
            seen, since = each["new"], each["step"]
    if data.split("train").sha256 != seen:
        raise ValueError(
            f"{', '.join(config.data.paths)} has changed since the run; trace needs the text that "
            "the run read: restore it"
        )
    old = [r["old"] for r in records if (r["step"], r["what"]) == (since, "data.source")]
    return since + 1, old[0] if old else "the same files as they were then"


def _show_document(
    tracer: Tracer, data: PreparedData, name: str, output: Output, *, first: int, n_steps: int
) -> None:
    """Show which of the steps `first` to `n_steps` read the document."""
    stream = data.split("train")
    matches = [(n, each) for n, each in enumerate(stream.origins()) if name in (each.id, each.file)]
    if not matches:
        if any(origin.id == name for origin in data.split("val").origins()):
            raise ValueError(f"{name!r} is held out: no step of any run on this text reads it")
        example = next(stream.origins()).id
        raise ValueError(f"there is no document {name!r} here; ids are like {example!r}")
    documents = []
    for number, origin in matches:
        occurrences = tracer.occurrences_of(number, n_steps=n_steps)
        rows = [_row(each, tracer, data) for each in occurrences if each.step >= first]
        documents.append({**asdict(origin), "seen": rows})
        n_tokens = int(tracer.document_offsets[number + 1] - tracer.document_offsets[number])
        output.log(
            f"{origin.id}  {origin.file} at byte {origin.offset}, {n_tokens:,} tokens: read in "
            f"{len({row['step'] for row in rows})} of {n_steps} steps"
        )
        for row in rows:
            output.log(
                f"  step {row['step']}  tokens {row['first_token']} to {row['stop_token']}  "
                f"{_shortened(row['text'])}"
            )
    output.result({"steps": n_steps, "documents": documents})


def _row(occurrence: Occurrence, tracer: Tracer, data: PreparedData) -> dict[str, Any]:
    """An occurrence with its text, for `--json`."""
    begin = int(tracer.document_offsets[occurrence.document])
    ids = data.split("train").read(begin + occurrence.first_token, begin + occurrence.stop_token)
    return {**asdict(occurrence), "text": data.tokenizer().decode(ids.tolist())}


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}")
