"""metrics.jsonl and samples.jsonl: their keys, truncation, flushing, and the best evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pretrain.run.log import (
    METRICS_KEYS,
    SAMPLES_KEYS,
    BestEvaluation,
    RunLog,
    nats_of_choice,
    read_lines,
)


def test_best_evaluation_of_a_log() -> None:
    best = BestEvaluation.from_log(
        [
            {"kind": "evaluate", "step": s, "val_nats_per_token": v}
            for s, v in ((1, 3), (2, 2), (3, 4))
        ]
    )
    assert (best.step, best.n_evaluations_since) == (2, 1)


def test_best_evaluation_ignores_nan_and_is_a_function_of_the_log() -> None:
    best = BestEvaluation()
    values = [2.0, math.nan, 1.5, math.nan, 1.6]
    for step, nats in enumerate(values):
        best.update(step, nats)
    lines = [
        {"kind": "evaluate", "step": n, "val_nats_per_token": None if math.isnan(v) else v}
        for n, v in enumerate(values)
    ]
    assert BestEvaluation.from_log(lines) == best
    assert (best.step, best.n_evaluations_since) == (2, 2)


def test_choice_is_free_where_the_halves_agree_and_costs_what_they_differ_by() -> None:
    def bias(*halves: tuple[float | None, float]) -> float:
        return nats_of_choice([{"kind": "evaluate", "nats_of_halves": pair} for pair in halves])

    assert bias() == bias((5, 5)) == bias((9, 9), (5, 5), (7, 8)) == 0
    assert bias((None, 1), (5, 5)) == 0
    assert bias((9, 0), (5, 0), (7, 0)) == 0, "one window has no second half"
    # The first half is best at the second step, the other at the first: 6 + 6.5 instead of 9.
    assert bias((6, 4), (3, 6.5), (4, 5)) == pytest.approx((6 + 6.5) - 9)
    assert nats_of_choice([{"kind": "evaluate"}, {"kind": "train"}]) == 0


def test_log_with_unicode_line_separators_is_truncated_by_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    text = "a\u2028b\u0085c\x0cd\n"
    for step in (1, 2, 3):
        log.append_sample({"step": step, "text": text})
        log.append_metrics({"kind": "train", "step": step, "loss": math.nan})
    log.truncate(2)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"step": s, "text": text} for s in (1, 2)]
    assert log.metrics()[0]["loss"] is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are found by descriptor")
def test_sync_flushes_files_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, synced, real = RunLog(tmp_path), set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log.append_metrics({"step": 1})
    log.append_sample({"step": 1})
    log.sync()
    assert synced == {tmp_path, tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"}


@pytest.mark.parametrize(
    ("name", "keys"),
    [("metrics.jsonl", METRICS_KEYS), ("samples.jsonl", {None: SAMPLES_KEYS})],
)
def test_keys_of_a_line_are_documented(
    finished_run: Path, name: str, keys: Mapping[str | None, Mapping[str, str]]
) -> None:
    lines = [record for record, _ in read_lines(finished_run / name)]
    assert lines
    for line in lines:
        kind = line.pop("kind", None)
        assert line.keys() <= keys[kind].keys()
