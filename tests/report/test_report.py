"""The report and the trackers, on finished, unfinished, broken and hostile run directories."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pages import Page, assert_harmless
from pretrain.report.chart import Series, downsample, line_chart
from pretrain.report.config import ReportConfig, require_packages
from pretrain.report.page import write_report
from pretrain.report.run import Record, read_run_files
from pretrain.report.trackers import follow
from pretrain.report.units import axis_number, count, decimal, duration, short_count, size

SUMMARY: Record = {
    "parameters": 4_212_992,
    "steps": 40,
    "tokens": 81_920,
    "val_nats_per_token": 3.5361,
    "val_perplexity": 34.3333,
    "val_bits_per_byte": 1.4171,
    "val_bits_per_byte_stderr": 0.0213,
    "tokens_per_second": 11_640.2,
    "train_seconds": 182.4,
    "total_seconds": 240.0,
    "peak_memory_bytes": 812_400_000,
    "checkpoint": "checkpoints/step-00000040",
}
BASELINES = [
    {"name": "trigram", "nats_per_token": 4.57, "perplexity": 96.5, "bits_per_byte": 1.83},
    {"name": "bigram", "nats_per_token": 4.94, "perplexity": 139.8, "bits_per_byte": 1.98},
    {"name": "xz", "nats_per_token": None, "perplexity": None, "bits_per_byte": 2.16, "note": "-9"},
]


def train_line(step: int, loss: object = None) -> str:
    nats = 3 + 5 / step if loss is None else loss
    record = {"kind": "train", "step": step, "tokens": step * 2048, "loss": nats, "grad_norm": 1.2}
    speed = {"tokens_per_second": 12_000.0, "seconds": step * 0.17, "epoch": step / 1000}
    bits = {"bits_per_byte": nats / 2.4953 if isinstance(nats, float) else nats}
    return json.dumps(record | bits | {"learning_rate": 0.003} | speed) + "\n"


def evaluate_line(step: int, nats: float) -> str:
    record = {"kind": "evaluate", "step": step, "val_nats_per_token": nats, "seconds": step * 0.17}
    return json.dumps(record | {"val_bits_per_byte": nats / 2.4953, "val_perplexity": 30.0}) + "\n"


def make_run(folder: Path, *, metrics: str | None = None, is_finished: bool = True) -> Path:
    folder.mkdir()
    if metrics is None:
        metrics = "".join(train_line(step) for step in range(1, 41)) + evaluate_line(40, 3.5361)
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "config.yaml").write_text("train:\n  steps: 40\n  batch_tokens: 2048\n")
    (folder / "baselines.json").write_text(
        json.dumps({"val_tokens": 9, "val_bytes": 412_331, "baselines": BASELINES})
    )
    (folder / "environment.json").write_text(
        json.dumps({"started": "2026-11-22T23:00:00Z", "command": "pretrain train english --a 'b'"})
    )
    if is_finished:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def test_report_of_a_finished_run_is_one_offline_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "english-1")
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(p.name for p in run.iterdir() if "report" in p.name) == ["report.html"]

    page = Page(path)
    assert_harmless(page)
    assert (
        "1.42 bits per byte on 412,331 bytes of held-out text, after 40 steps and 3 min 2 s: "
        "better than trigram (1.83), bigram (1.98), xz (2.16)."
    ) in page.flat
    for figure in ("1.42", "34.3", "3.536", "4.21 M", "4,212,992", "81,920", "11,640", "3 min 2 s"):
        assert figure in page.flat
    assert "held out; ± 0.021, one standard error" in page.flat
    assert "1.417 ± 0.021" in page.flat
    for figure in ("4 min in all", "812 MB", "finished", "40", "0.04 epochs", "of 2,048 tokens"):
        assert figure in page.flat
    assert "pretrain train english --a 'b'" in page.text
    assert f"pretrain generate {run.as_posix()}" in page.text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 4
    assert re.search("this model.*trigram.*bigram.*xz", page.flat.split("simple baselines")[1])
    assert "--share:65.6%" in page.source  # of the bar of xz, the widest
    assert "held-out 1.417 to 1.417" in labels[0]
    assert write_report(run).read_text(encoding="utf-8") == page.source  # a function of the files


def test_tasks_have_charts_with_error_bands_and_a_table(tmp_path: Path) -> None:
    def row(step: int, value: float, name: str = "piqa", **more: object) -> str:
        record = {"kind": "task", "step": step, "task": name, "metric": "accuracy", "value": value}
        usual = {"stderr": 0.05, "examples": 200, "chance": 0.5, "seconds": 1.5}
        return json.dumps(record | usual | more) + "\n"

    rows = row(20, 0.45) + row(40, 0.55) + row(40, 1.25, "<b>.txt", chance=None, stderr=None)
    page = Page(write_report(make_run(tmp_path / "run", metrics=train_line(1) + rows)))
    assert_harmless(page)
    section = page.flat.partition("Tasks")[2]
    assert re.search(r"piqa ?accuracy ?0.550 ± 0.050 ?0.500 ?200 ?40", section)
    assert re.search(r"<b>.txt ?accuracy ?1.250 ?– ?200 ?40", section)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "piqa, accuracy, by step: piqa 0.45 to 0.55" in labels
    # The band is 0.40 to 0.50 at step 20 and 0.50 to 0.60 at step 40, on an axis from 0 to 5 %
    # above 0.60.
    (band,) = re.findall('<polygon class="band" points="([^"]+)"', page.source)
    top = 0.6 + 0.05 * (0.6 - 0.4)
    corners = [(0, 0.4), (100, 0.5), (100, 0.6), (0, 0.5)]
    assert band.split() == [f"{x:.2f},{(top - y) / top * 100:.2f}" for x, y in corners]


def test_report_of_an_unfinished_run_has_its_last_step(tmp_path: Path) -> None:
    lines = "".join(train_line(step) for step in range(1, 26))
    run = make_run(tmp_path / "run", metrics=lines + train_line(26)[:-30], is_finished=False)
    page = Page(write_report(run))
    assert "still running or stopped at step 25 of 40" in page.text
    assert "Training loss 3.20 nats per token after 25 steps" in page.flat
    assert f"pretrain train --run {run.as_posix()} --resume" in page.text
    assert "could be read" not in page.text  # an incomplete last line is not an error


def test_report_warns_of_a_rising_held_out_loss(tmp_path: Path) -> None:
    lines = train_line(1) + evaluate_line(1, 4.9) + train_line(2) + evaluate_line(2, 5.1)
    page = Page(write_report(make_run(tmp_path / "run", metrics=lines, is_finished=False)))
    assert (
        "2.04 bits per byte on 412,331 bytes of held-out text, after 2 steps and 0.3 s: "
        "not yet as good as trigram (1.83), bigram (1.98), "
        "though better than xz (2.16)."
    ) in page.flat
    assert (
        "held-out loss was lowest at step 1 (1.96 bits per byte) and has risen since" in page.flat
    )


def epochs_run(
    folder: Path, held_out: list[float], train: list[float], *, n_epochs: float = 2.0
) -> Path:
    """A run of 10 steps before each of its evaluations, in bits per byte."""
    lines, steps = "", 10 * len(held_out)
    for step in range(1, steps + 1):
        bits = train[(step - 1) // 10]
        line = json.loads(train_line(step)) | {"epoch": n_epochs * step / steps}
        lines += json.dumps(line | {"bits_per_byte": bits}) + "\n"
        if step % 10 == 0:
            lines += evaluate_line(step, held_out[step // 10 - 1] * 2.4953)
    return make_run(folder, metrics=lines)


@pytest.mark.parametrize(
    ("held_out", "train", "sentence"),
    [
        (
            [2.0, 1.5, 1.6, 1.8],
            [2.0, 1.5, 1.2, 1.0],
            "Held-out text was best after 1.00 epochs (1.500 bits per byte) and is at 1.800 after "
            "2.00. Training text continued to fall, from 1.500 to 1.100, so further epochs were "
            "memorising; more text would help, and the best checkpoint is kept.",
        ),
        (
            [2.0, 1.5, 1.6, 1.8],
            [2.0, 1.5, 1.6, 1.8],
            "Training text did not fall either, from 1.550 to 1.700, so the run became unstable",
        ),
        (
            [2.0, 1.5, 1.505, 1.51],
            [2.0, 1.5, 1.2, 1.0],
            "and is less than 1 % above that after 2.00: further epochs neither helped nor harmed.",
        ),
        (
            [2.0, 1.8, 1.7, 1.6],
            [2.0, 1.7, 1.6, 1.5],
            "best after 2.00 epochs (1.600 bits per byte), at the end: it was still falling, so "
            "more text or a longer run would help.",
        ),
        (
            [2.0, 1.8, 1.7, 1.6],
            [2.0, 1.5, 1.0, 0.5],
            "at the end, while training text is at 0.750: the model memorises it",
        ),
    ],
)
def test_the_epoch_where_more_epochs_stopped_helping_is_marked(
    tmp_path: Path, held_out: list[float], train: list[float], sentence: str
) -> None:
    page = Page(write_report(epochs_run(tmp_path / "run", held_out, train)))
    assert_harmless(page)
    assert "bits per byte, by epoch" in page.flat
    assert sentence in page.flat
    best = min(held_out)
    epoch = (held_out.index(best) + 1) / 2
    assert f"best: {best:.3f}, epoch {epoch:.2f}" in page.flat
    (mark,) = re.findall('<circle class="mark" cx="([0-9.]+)%"', page.source)
    assert float(mark) == pytest.approx(100 * (epoch - 0.05) / (2 - 0.05), abs=0.01)
    assert f"<title>epoch {epoch:.2f}: {best:g}</title>" in page.source


@pytest.mark.parametrize("why", ["a fraction of an epoch", "several sources"])
def test_a_run_without_epochs_of_its_own_is_drawn_by_step(tmp_path: Path, why: str) -> None:
    n_epochs = 0.4 if why == "a fraction of an epoch" else 2.0
    run = epochs_run(tmp_path / "run", [2.0, 1.5, 1.8], [2.0, 1.5, 1.2], n_epochs=n_epochs)
    if why == "several sources":
        metrics = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(metrics.replace('"epoch"', '"sources": {}, "epoch"'))
    page = Page(write_report(run))
    assert "bits per byte, by step" in page.flat
    assert "Held-out text was best" not in page.flat
    assert 'class="mark"' not in page.source
    assert "lowest at step 20 (1.50 bits per byte) and has risen" in page.flat


def test_reasons_to_doubt_the_number_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for notes in (["99 % of it <b>", "only 40 bytes"], 3, None):
        (run / "summary.json").write_text(json.dumps(SUMMARY | {"held_out": {"notes": notes}}))
        page = Page(write_report(run))
        assert ("Note: 99 % of it <b>." in page.flat) == isinstance(notes, list)


def test_a_number_and_its_unit_stay_on_one_line(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "3\xa0min\xa02\xa0s" in page


def test_score_is_shown_with_the_step_of_its_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"checkpoint": "checkpoints/step-20"}))
    assert "after 20 steps, the best of 40, and 3 min 2 s" in Page(write_report(run)).flat


def test_an_empty_config_is_enough_and_an_empty_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert "No numbers yet" in Page(write_report(tmp_path)).text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="is not a folder"):
        read_run_files(tmp_path / "absent")


@pytest.mark.parametrize("name", ["baselines.json", "environment.json", "summary.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\x00\xff", "9" * 5000, '{"baselines": [3, {}]}'])
def test_a_broken_file_is_reported(tmp_path: Path, name: str, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    page = Page(write_report(run))
    assert (f"{name} (not a JSON object)" in page.text) == (not content.startswith('{"'))
    assert "1.42 bits per byte" in page.flat


def test_broken_lines_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b'{"kind"\n\xff\xfe\n[1]\n' + train_line(1).encode())
    (run / "config.yaml").write_text("a: [")
    page = Page(write_report(run))
    assert "metrics.jsonl (3 broken lines); config.yaml (not YAML sections)" in page.text


@pytest.mark.parametrize("loss", [math.nan, "NaN", None, math.inf, 10**400, True, [1]])
def test_a_loss_that_is_not_finite_is_a_warning(tmp_path: Path, loss: object) -> None:
    lines = "".join(train_line(step) for step in range(1, 20))
    lines += "".join(
        train_line(step).replace(f'"loss": {3 + 5 / step}', f'"loss": {json.dumps(loss)}')
        for step in range(20, 30)
    )
    page = Page(write_report(make_run(tmp_path / "run", metrics=lines, is_finished=False)))
    assert "not a finite number from step 20 on" in page.flat
    assert "nan" not in page.source.partition("<body>")[2].lower().replace("nance", "")


def test_a_chart_without_finite_losses_has_no_values(tmp_path: Path) -> None:
    lines = "".join(train_line(step, "NaN") for step in range(1, 4))
    page = Page(write_report(make_run(tmp_path / "run", metrics=lines, is_finished=False)))
    assert "No values yet." in page.text


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    hostile = "</p><script>alert(1)</script><img src=http://x onerror='a'>\"&\x00\x1b\ud800</style>"
    run = make_run(tmp_path / "a&b <i>")
    sample = {"step": 40, "prompt": hostile, "text": hostile + "x" * 5000, hostile: hostile}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "config.yaml").write_text(json.dumps({"<b>": {hostile[:30]: "<b>"}, "x": "</style>"}))
    (run / "environment.json").write_text(json.dumps({"command": hostile, "<u>": hostile}))
    evil = {"baselines": [{"name": hostile, "bits_per_byte": 2.0, "nats_per_token": 4.0}]}
    (run / "baselines.json").write_text(json.dumps(evil))
    page = Page(write_report(run))
    assert_harmless(page)
    assert "<script>alert(1)</script>" in page.text
    assert "… and 3,500 more characters" in page.text
    assert not {"i", "u"} & set(page.tags)


def test_config_is_shown_verbatim(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    written = "data:\n  source: [{path: a.txt, weight: 2}, b.txt]  # two\n  none: null\nseed: 1\n"
    (run / "config.yaml").write_text(written)
    assert written in Page(write_report(run)).text


def test_samples_are_shown_latest_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records = [{"step": s, "prompt": "Once", "text": f"Once text {s}"} for s in range(0, 400, 10)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "samples.jsonl").write_text(lines + '{"step": 400, "text": ""}\n{"text": "lost"}\n')
    page = Page(write_report(run))
    assert page.tags.count("li") == 12
    assert page.text.index("it ended at once") < page.text.index(" text 360")
    assert page.text.index(" text 360") < page.text.index(" text 0")


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    lines = [train_line(step) + "" for step in range(1, 100_001)]
    lines += [evaluate_line(step, 3.5 + 1 / step) for step in range(100, 100_001, 100)]
    run = make_run(tmp_path / "run", metrics="".join(lines), is_finished=False)
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 20  # about 2 s
    assert path.stat().st_size < 300_000


def test_downsampling_keeps_the_extremes() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    points[5000] = (5000.0, 99.0)
    buckets = downsample(points, 600)
    assert len(buckets) <= 600
    assert max(high for _, _, _, high in buckets) == 99.0
    assert min(low for _, low, _, _ in buckets) == 0.0
    assert [x for x, *_ in buckets] == sorted(x for x, *_ in buckets)


def test_one_spike_does_not_flatten_the_curve() -> None:
    points = [(float(i), 3.0 + 0.001 * (i % 9)) for i in range(500)] + [(500.0, 1e300)]
    chart = line_chart(
        [Series("loss", points, "noisy")], title="Loss", unit="", levels=[("far", 9.0)]
    )
    assert "3.004" in [text for _, text in chart["y_ticks"]]
    assert "e+" not in str(chart["curves"][0]["lines"])
    assert chart["levels"] == []  # a level far from the curve would flatten it as well


@pytest.mark.parametrize("points", [[(1.0, 0.0)], [(5.0, 2.0), (9.0, 2.0)], [(0.0, -1e-9)]])
def test_constant_curves_and_single_points_are_drawn(points: list[tuple[float, float]]) -> None:
    for is_small in (False, True):
        chart = line_chart([Series("a", points)], title="A", unit="", is_small=is_small)
        assert "nan" not in str(chart)
        assert len(chart["curves"][0]["dots"]) == (len(points) == 1)


def test_numbers_are_formatted_with_units() -> None:
    times = [duration(s) for s in (0.44, 42, 59.6, 182, 180, 3601, 7260, 187_000)]
    assert "|".join(times) == "0.4 s|42 s|1 min|3 min 2 s|3 min|1 h|2 h 1 min|2 d 3 h"
    sizes = [size(n) for n in (12, 1500, 812_400_000, 1.25e9)]
    assert "|".join(sizes) == "12 B|1.50 kB|812 MB|1.25 GB"
    counts = [short_count(n) for n in (999, 9_999, 11_640, 999_960, 4_212_992, 1.5e9)]
    assert "|".join(counts) == "999|9,999|11,640|1.00 M|4.21 M|1.50 B"
    ticks = [axis_number(v) for v in (0, 2e-5, 0.003, 2.5, 1000, 12_000, 1.5e6)]
    assert "|".join(ticks) == "0|2e-5|0.003|2.5|1,000|12k|1.5M"
    assert {f(None) for f in (count, decimal, short_count, size, duration)} == {"–"}


def test_the_page_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from pretrain.report import trackers; "
        "from pretrain.report.page import write_report; "
        f"write_report({str(run)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_trackers_are_rejected() -> None:
    assert ReportConfig(to=("tensorboard", "wandb")).to == ("tensorboard", "wandb")
    with pytest.raises(ValueError, match=r"'mlflow'.*tensorboard, wandb"):
        ReportConfig(to=("mlflow",))  # type: ignore[arg-type]


def test_error_of_a_missing_package_has_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.report.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r" -m pip install .*tensorboard"):
        follow(make_run(tmp_path / "run"), ["tensorboard"])
    require_packages([])


def read_events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of RUN/tensorboard, by its tag; more than one event file is an error."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = (run / "tensorboard").iterdir()
    scalars: dict[str, list[tuple[int, float]]] = {}
    for raw in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(raw)
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_gets_each_record_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path / "run")
    for _ in range(2):  # a second tracker replaces the file of the first
        assert follow(run, ["tensorboard"]) == 41
        scalars = read_events(run)
        assert [step for step, _ in scalars["train/loss"]] == list(range(1, 41))
        assert scalars["train/loss"][-1][1] == pytest.approx(3.125)
        assert [step for step, _ in scalars["evaluate/val_nats_per_token"]] == [40]


def test_tensorboard_has_a_group_of_curves_per_task(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    lines = [
        {"kind": "task", "step": step, "task": name, "value": value, "stderr": None, "seconds": 9}
        for step, name, value in ((1, "piqa", 0.5), (1, "copa", 0.25), (2, "piqa", 0.75))
    ]
    metrics = train_line(1) + "".join(json.dumps(line) + "\n" for line in lines)
    run = make_run(tmp_path / "run", metrics=metrics)
    assert follow(run, ["tensorboard"]) == 4
    scalars = read_events(run)
    assert scalars["task/piqa/value"] == [(1, 0.5), (2, 0.75)]
    assert scalars["task/copa/value"] == [(1, 0.25)]


def test_tracker_notices_a_truncated_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path / "run", metrics="", is_finished=False)
    metrics = run / "metrics.jsonl"
    n_sent: list[int] = []
    tracker = threading.Thread(
        target=lambda: n_sent.append(follow(run, ["tensorboard"], poll_seconds=0.02))
    )
    tracker.start()
    metrics.write_text("".join(train_line(s) for s in range(1, 11)) + train_line(11)[:20])
    time.sleep(0.3)
    metrics.write_text("".join(train_line(s) for s in range(1, 6)))  # truncated to step 5 ...
    time.sleep(0.3)
    replaced = metrics.with_suffix(".new")  # ... then replaced, and on to step 12
    replaced.write_text("".join(train_line(s) for s in range(1, 13)))
    os.replace(replaced, metrics)
    (run / "summary.json").write_text("{}")
    tracker.join(timeout=30)
    assert n_sent == [12]
    assert [step for step, _ in read_events(run)["train/loss"]] == list(range(1, 13))


def test_tracker_ends_with_its_parent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path / "run", is_finished=False)
    code = (
        "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-m', "
        f"'pretrain.report.trackers', {str(run)!r}, '--to', 'tensorboard', '--parent', "
        "str(os.getpid())], start_new_session=True); time.sleep(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (run / "tensorboard").is_dir() and "train/loss" in read_events(run):
            break
        time.sleep(0.2)
    assert len(read_events(run)["train/loss"]) == 40


def test_wandb_runs_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "pretrain.report.trackers", str(run), "--to", "wandb"]
    subprocess.run(command, check=True, timeout=120)
    files = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"train/loss" in files[0].read_bytes()
