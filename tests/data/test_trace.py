"""Tracing: both directions against a walk over every window, and the command on a real run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.data.order import Occurrence, Order, Tracer
from pretrain.run.identity import record, write_records
from tiny import TINY

Capture = pytest.CaptureFixture[str]


def tracer(seed: int, *, longest: int, context: int, rows: int) -> Tracer:
    """A stream of documents of 1 to `longest` ids, their end-of-text included."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, longest) for _ in range(draw.randint(8, 60))]
    offsets = np.cumsum([1, *sizes])
    return Tracer(Order(int(offsets[-1]), context, seed), offsets, rows)


def by_walking(tracer: Tracer, step: int) -> set[tuple[int, int, int, int]]:
    """(sample, document, first, stop) of a step (from 1), id by id."""
    samples = np.arange((step - 1) * tracer.batch_size, step * tracer.batch_size)
    seen: dict[tuple[int, int], list[int]] = {}
    for sample, start in zip(
        samples.tolist(), tracer.order.window_starts(samples).tolist(), strict=True
    ):
        for token in range(start, start + tracer.order.context_length + 1):
            document = int(np.searchsorted(tracer.document_offsets, token, side="right")) - 1
            if document >= 0:
                seen.setdefault((sample, document), []).append(
                    token - int(tracer.document_offsets[document])
                )
    return {(*key, tokens[0], tokens[-1] + 1) for key, tokens in seen.items()}


def places(occurrences: list[Occurrence]) -> set[tuple[int, int, int, int]]:
    return {(s.sample, s.document, s.first_token, s.stop_token) for s in occurrences}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("longest", "context"), [(3, 4), (40, 16), (400, 8)])
def test_both_directions_agree_with_a_walk_over_every_id(
    seed: int, longest: int, context: int
) -> None:
    traced = tracer(seed, longest=longest, context=context, rows=3)
    assert isinstance(traced.order, Order)
    # Two epochs and a half: offsets differ, and the last epoch is incomplete.
    steps = max(1, int(2.5 * traced.order.n_windows / traced.batch_size))
    walked = {step: by_walking(traced, step) for step in range(1, steps + 1)}
    for step in walked:
        occurrences = traced.occurrences_in(step)
        assert places(occurrences) == walked[step]
        assert len(occurrences) == len(walked[step])
        assert {s.step for s in occurrences} <= {step}
    for document in range(len(traced.document_offsets) - 1):
        occurrences = list(traced.occurrences_of(document, n_steps=steps))
        expected = {seen for found in walked.values() for seen in found if seen[1] == document}
        assert places(occurrences) == expected
        assert len(occurrences) == len(expected)
        assert all(s.sample // traced.batch_size + 1 == s.step <= steps for s in occurrences)


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    draw = random.Random(1)
    words = "sea ship whale captain wind sail harpoon deck night water".split()
    lines = [
        {"id": f"d{n}", "text": " ".join(draw.choice(words) for _ in range(80))} for n in range(60)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tiny = [*TINY[:-1], "280"]
    words = [str(folder / "log.jsonl"), *tiny, "--train.steps", "5", "--run", str(folder / "run")]
    assert main(["train", *words]) == 0
    return folder / "run"


def run_command(capsys: Capture, *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_command_gives_the_same_text_in_both_directions(
    traced_run: Path, capsys: Capture
) -> None:
    source = (traced_run.parent / "log.jsonl").read_text(encoding="utf-8")
    texts = {record["id"]: record["text"] for record in map(json.loads, source.splitlines())}
    seen = [
        row
        for step in range(1, 6)
        for row in run_command(capsys, "trace", str(traced_run), "--step", str(step))["seen"]
    ]
    assert {row["step"] for row in seen} == set(range(1, 6))
    chosen = seen[0]["id"]
    assert all(row["text"].replace("<|endoftext|>", "") in texts[row["id"]] for row in seen)
    answer = run_command(capsys, "trace", str(traced_run), "--document", chosen)
    (document,) = answer["documents"]
    assert answer["steps"] == 5

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["step"], row["sample"], row["first_token"], row["stop_token"], row["text"])

    assert sorted(map(key, document["seen"])) == sorted(
        key(row) for row in seen if row["id"] == chosen
    )


@pytest.mark.parametrize("has_moved", [True, False])
def test_a_run_whose_text_was_replaced_is_traced_from_that_step_on(
    traced_run: Path, capsys: Capture, tmp_path: Path, has_moved: bool
) -> None:
    run = Path(shutil.copytree(traced_run, tmp_path / "run"))
    before = [run_command(capsys, "trace", str(run), "--step", str(step)) for step in range(1, 6)]
    late, early = ({row["id"] for row in before[n]["seen"]} for n in (4, 0))
    names = min(late), min(early - late)
    place = run / "environment.json"
    environment = json.loads(place.read_text(encoding="utf-8"))
    text = environment["fingerprint"]["training text"]
    environment["fingerprint"]["training text"] = "0" * 64
    place.write_text(json.dumps(environment), encoding="utf-8")
    source = environment["fingerprint"]["settings"]["data.source"]
    moved = record(3, "data.source", "old.jsonl", source, by="accept")
    made = [moved] if has_moved else []
    records = [record(1, "training-text", "0", "1", by="accept"), *made]
    write_records(run, [*records, record(3, "training-text", "1", text, by="accept")])
    for step in (4, 5):
        assert run_command(capsys, "trace", str(run), "--step", str(step)) == before[step - 1]
    assert main(["trace", str(run), "--step", "3"]) == 2
    was = "old.jsonl" if has_moved else "the same files as they were then"
    message = f"--step must be 4 to 5 (got 3); before step 4 the run read {was}\n"
    assert message in capsys.readouterr().err
    for name, is_seen in zip(names, (True, False), strict=True):
        (document,) = run_command(capsys, "trace", str(run), "--document", name)["documents"]
        (whole,) = run_command(capsys, "trace", str(traced_run), "--document", name)["documents"]
        assert whole["seen"]
        assert document["seen"] == [row for row in whole["seen"] if row["step"] >= 4]
        assert bool(document["seen"]) == is_seen


def test_impossible_requests_are_rejected(
    traced_run: Path, capsys: Capture, tmp_path: Path
) -> None:
    run = str(traced_run)
    for args, message in (
        ([run, "--document", "nope"], "there is no document 'nope' here; ids are like 'd"),
        ([run, "--step", "0"], "--step must be 1 to 5 (got 0)\n"),
        ([run, "--step", "6"], "--step must be 1 to 5 (got 6)\n"),
        ([str(tmp_path), "--step", "1"], "is not a run directory: it has no config.yaml"),
    ):
        assert main(["trace", *args]) == 2
        assert message in capsys.readouterr().err
    log = traced_run.parent / "log.jsonl"
    before = log.read_text(encoding="utf-8")
    try:
        log.write_text(before.replace("whale", "shark"), encoding="utf-8")
        assert main(["trace", run, "--step", "1"]) == 2
        assert "has changed since the run" in capsys.readouterr().err
    finally:
        log.write_text(before, encoding="utf-8")
