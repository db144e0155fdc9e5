"""Which documents a step of a run saw, or which steps saw a document: exactly, and without a log.

  pretrain trace runs/english-1 --step 100
  pretrain trace runs/english-1 --document moby-dick-chapter-1

Steps count from 0. A step saw a document if a token of it was an input or a target.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.environment import read_environment
from pretrain.cli.output import Output
from pretrain.train.changes import read_records, word_of
from pretrain.train.records import Records
from pretrain.train.watch import Rollback, position_of, rollbacks_of

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.data import PreparedData
    from pretrain.data.trace import Sight, Tracer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=int, metavar="N", help="the step, made or still to come")
    question.add_argument(
        "--document", metavar="ID", help="the id of a document, or the file that it came from"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.config import compose, read_file
    from pretrain.data.trace import Tracer
    from pretrain.runner.text import prepared_text

    folder = Path(arguments.run)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run directory: it has no config.yaml")
    config = compose([read_file(folder / "config.yaml")])
    data = prepared_text(config)
    since, before = _text_since(folder, config, data)
    train, model, stream = config.train, config.model, data.split("train")
    assert train.batch_tokens is not None
    rows = train.batch_tokens // model.window_tokens
    assert train.steps is not None
    order = data.order(
        context_length=model.window_tokens, seed=train.seed, steps=train.steps, batch_rows=rows
    )
    tracer = Tracer(order, stream.document_offsets, rows)
    records = Records(folder).metrics()
    steps_made = max((r["step"] for r in records), default=0)
    history = History(rollbacks_of(records), steps_made, since)
    if arguments.step is not None:
        if not since <= arguments.step < train.steps:
            was = f"; before step {since} the run read {before}" if since else ""
            raise ValueError(f"--step is {arguments.step}; legal: {since}..{train.steps - 1}{was}")
        return _show_step(tracer, data, arguments.step, history, output)
    return _show_document(tracer, data, arguments.document, history, output)


def _text_since(folder: Path, config: RunConfig, data: PreparedData) -> tuple[int, str]:
    """The step from which the run read its present text, and the source it read before."""
    seen, since = read_environment(folder)["fingerprint"]["training text"], 0
    records = read_records(folder)
    for each in records:
        if each["what"] == word_of("training text"):
            seen, since = each["new"], each["step"]
    if data.split("train").sha256 != seen:
        raise ValueError(
            f"the text at {', '.join(config.data.paths)} has changed since the run, so its order "
            "tells nothing about what the run saw"
        )
    old = [r["old"] for r in records if (r["step"], r["what"]) == (since, "data.source")]
    return since, old[0] if old else "the same files as they were then"


@dataclass(frozen=True, slots=True)
class History:
    """Which batch of the data each step read: its own number, unless the run has rolled back."""

    rollbacks: list[Rollback]
    steps: int
    """updates made so far"""
    since: int
    """the first step that read the run's present text"""

    def position(self, step: int) -> int:
        return position_of(step, self.rollbacks)

    def made(self, sights: Iterable[Sight]) -> Iterator[Sight]:
        """Sights of batches as sights of the steps that read them; some batches were passed
        over."""
        steps = {self.position(step): step for step in range(self.steps)} if self.rollbacks else {}
        for sight in sights:
            step = steps.get(sight.step, -1) if self.rollbacks else sight.step
            if step >= self.since:
                yield replace(sight, step=step)


def _show_step(
    tracer: Tracer, data: PreparedData, step: int, history: History, output: Output
) -> int:
    sights = [replace(s, step=step) for s in tracer.documents_of(history.position(step))]
    numbers = {sight.document for sight in sights}
    origins = dict(data.split("train").origins(lambda number, _: number in numbers))
    read, rows = _reader(tracer, data), []
    for sight in sights:
        row = read(sight) | asdict(origins[sight.document])
        rows.append(row)
        output.say(
            f"sample {sight.sample}  {row['id']}  {row['file']} at byte {row['offset']}, tokens "
            f"{sight.first_token} to {sight.stop_token}\n    {_shortened(row['text'])}"
        )
    output.result({"step": step, "seen": rows})
    return 0


def _show_document(
    tracer: Tracer, data: PreparedData, name: str, history: History, output: Output
) -> int:
    stream = data.split("train")
    found = list(stream.origins(lambda _, origin: name in (origin.id, origin.file)))
    if not found:
        held_out = data.split("val").origins(lambda _, o: o.id == name)
        if next(held_out, None):
            raise ValueError(f"{name!r} is held out: no step of any run on this text sees it")
        (_, first), *_ = stream.origins(lambda number, _: number == 0)
        raise ValueError(f"there is no document {name!r} here; ids are like {first.id!r}")
    read, documents = _reader(tracer, data), []
    for number, origin in found:
        batches = history.position(history.steps - 1) + 1
        found_in = history.made(tracer.steps_of(number, steps=batches))
        sights = [read(sight) for sight in found_in]
        documents.append({**asdict(origin), "seen": sights})
        n_tokens = int(tracer.offsets[number + 1] - tracer.offsets[number])
        output.say(
            f"{origin.id}  {origin.file} at byte {origin.offset}, {n_tokens:,} tokens: seen in "
            f"{len({row['step'] for row in sights})} of {history.steps} steps"
        )
        for row in sights:
            output.say(
                f"  step {row['step']}  tokens {row['first_token']} to {row['stop_token']}  "
                f"{_shortened(row['text'])}"
            )
    output.result({"steps": history.steps, "documents": documents})
    return 0


def _reader(tracer: Tracer, data: PreparedData) -> Callable[[Sight], dict[str, Any]]:
    """What makes a row of a sight: its places, and its text."""
    stream, tokenizer = data.split("train"), data.tokenizer()

    def row(sight: Sight) -> dict[str, Any]:
        begin = int(tracer.offsets[sight.document])
        ids = stream.read(begin + sight.first_token, begin + sight.stop_token)
        return {**asdict(sight), "text": tokenizer.decode(ids.tolist())}

    return row


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}")
