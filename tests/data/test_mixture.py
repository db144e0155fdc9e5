"""Mixtures: exact weights in every block, every window once an epoch, stages, and the inverse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prepared import read_everything
from pretrain.cli import main
from pretrain.config import compose, read_yaml, to_dict
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.format import MixedData
from pretrain.data.order import BLOCK_SAMPLES, MixtureOrder, SourceSpan, Tracer
from pretrain.data.preparation import prepare
from texts import prose
from tiny import TINY

CONTEXT = 8


def mixture(
    stages: list[tuple[int, list[float]]], *, tokens: tuple[int, ...] = (30_000, 9_000, 500)
) -> MixtureOrder:
    starts = np.cumsum([0, *tokens])
    spans = [SourceSpan(f"s{n}", int(starts[n]), size) for n, size in enumerate(tokens)]
    return MixtureOrder(spans, stages=stages, context_length=CONTEXT, seed=3)


def source_of(mixed: MixtureOrder, starts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.searchsorted([p.start for p in mixed.spans], starts, side="right") - 1


def samples_by_source(mixed: MixtureOrder, n_samples: int) -> list[float]:
    return [each["tokens"] / CONTEXT for each in mixed.sources(n_samples).values()]


def test_every_block_has_the_exact_weights() -> None:
    mixed = mixture([(0, [5.0, 3.0, 2.0])])
    assert mixed.stages[0].counts == (512, 307, 205)
    for block in (0, 1, 7):
        samples = np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES)
        found = source_of(mixed, mixed.window_starts(samples))
        assert np.bincount(found).tolist() == [512, 307, 205]
        # Shuffled, not one source after the other.
        assert np.bincount(found[:256], minlength=3).min() > 20


def test_each_source_is_read_window_by_window() -> None:
    mixed = mixture([(0, [5.0, 3.0, 2.0])])
    samples = np.arange(4 * BLOCK_SAMPLES)
    starts = mixed.window_starts(samples)
    found = source_of(mixed, starts)
    for number, span in enumerate(mixed.spans):
        mine = starts[found == number]
        assert mine.min() >= span.start
        assert mine.max() + CONTEXT + 1 <= span.start + span.n_tokens
        # The windows of its own order, from the first on, without a gap.
        expected = span.start + mixed.orders[number].window_starts(np.arange(len(mine)))
        assert sorted(mine.tolist()) == sorted(expected.tolist())
    assert samples_by_source(mixed, len(samples)) == np.bincount(found).tolist()
    # Sources have different offsets and orders.
    assert len({order.epoch_offset(0) for order in mixed.orders}) > 1


@pytest.mark.parametrize("seed", range(5))
def test_the_tokens_of_each_source_agree_with_counting(seed: int) -> None:
    draw = random.Random(seed)
    first = draw.randrange(1, 3000)
    mixed = mixture([(0, [1.0, 2.0, 0.0]), (first, [0.0, 0.3, 0.7]), (first + 2500, [1, 0, 0])])
    samples = np.arange(first + 4000)
    found = source_of(mixed, mixed.window_starts(samples))
    for n in (0, 1, first - 1, first, first + 1, first + 1024, first + 3000, len(samples)):
        assert samples_by_source(mixed, n) == np.bincount(found[:n], minlength=3).tolist()
    assert 2 not in found[:first]
    assert set(found[first + 2500 :].tolist()) == {0}


@pytest.mark.parametrize("second", [700, 1024, 2000])
def test_tracing_a_mixture_is_the_same_in_both_directions(second: int) -> None:
    mixed = mixture([(0, [1.0, 2.0, 0.1]), (second, [3.0, 0.0, 1.0])], tokens=(900, 400, 200))
    offsets = np.array([1, 40, 300, 899, 901, 1000, 1290, 1301, 1400, 1500])
    tracer = Tracer(mixed, offsets, batch_size=4)
    steps = 900
    forward = {
        (s.document, s.sample, s.first_token, s.stop_token)
        for step in range(1, steps + 1)
        for s in tracer.occurrences_in(step)
    }
    backward = {
        (s.document, s.sample, s.first_token, s.stop_token)
        for document in (0, 1, 2, 4, 5, 7, 8)
        for s in tracer.occurrences_of(document, n_steps=steps)
    }
    # Documents 3 and 6 cross two sources, as the end-of-text token between two streams does.
    assert backward == {occurrence for occurrence in forward if occurrence[0] not in (3, 6)}
    assert len(backward) > 3000


def test_impossible_weights_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"'s1' would be 0\.01 % of its stage"):
        mixture([(0, [1.0, 0.0001, 0.0])])
    with pytest.raises(ValueError, match="does not fit a training text of 5 ids"):
        mixture([(0, [1.0, 1.0])], tokens=(900, 5)).window_starts(np.arange(10))


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ("[]", "data.source is"),
        ("[{weight: 1}]", "needs a value for 'path'"),
        ("[{path: a}]", "needs either a weight or epochs"),
        ("[{path: a, weight: 1, epochs: 1}]", "needs either a weight or epochs"),
        ("[{path: a, weight: 0}]", "it must be above 0"),
        ("[{path: a, weight: .nan}]", "finite number"),
        ("[{path: a, weight: 1, stage: 1}]", r"must be in \[0, 1\)"),
        ("[{path: a, weight: 1, stage: 0.5}]", "first stage begins at 0.5"),
        ("[{path: a, weight: 1}, {path: b, epochs: 1}]", "both weights and epochs"),
        ("[{path: a, weight: 1}, {path: a, weight: 2}]", "has the same path twice"),
        ("[{path: a, weihgt: 1}]", r"did you mean 'data.source\[0\].weight'"),
        ("[a, {path: b, weight: 1}]", "data.source is 'a'"),
        ("{path: a}", "must be"),
    ],
)
def test_wrong_lists_of_sources(sources: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        compose([{"data": {"source": read_yaml(sources, name="test")}}])


def test_a_list_of_sources_is_the_same_after_yaml() -> None:
    text = "[{path: a, weight: 1}, {path: b, weight: 3}, {path: b, epochs: 2, stage: 0.5}]"
    config = compose([{"data": {"source": read_yaml(text, name="test")}}])
    assert config.data.paths == ("a", "b")
    assert compose([to_dict(config)]) == config


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    draw = random.Random(0)
    found = []
    for name, n in (("books", 120), ("letters", 40)):
        path = folder / f"{name}.jsonl"
        lines = [
            json.dumps({"id": f"{name}-{i}", "text": " ".join(prose(draw, 80))}) for i in range(n)
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
        found.append(path)
    return found


def sources(paths: list[Path], **second: float) -> tuple[SourceConfig, ...]:
    given: dict[str, Any] = second or {"weight": 3.0}
    kind = "epochs" if "epochs" in given else "weight"
    first: dict[str, Any] = {kind: 1.0}
    return (SourceConfig(path=str(paths[0]), **first), SourceConfig(path=str(paths[1]), **given))


def test_mixed_data_of_texts_prepared_together(texts: list[Path], tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "out", tokenizer="bytes", val_fraction=0.1)
    mixed = MixedData(DataConfig(source=sources(texts)), [data])
    order = mixed.order(context_length=16, seed=1, steps=100, batch_size=4)
    assert isinstance(order, MixtureOrder)
    stream, tokenizer = mixed.split("train"), mixed.tokenizer()
    assert stream.n_tokens == data.split("train").n_tokens
    offsets = stream.document_offsets
    files = [origin.file for origin in stream.origins()]
    assert mixed.spans.keys() == {str(path) for path in texts}
    for start, number in zip(
        order.window_starts(np.arange(400)), order.locate(np.arange(400))[0], strict=True
    ):
        # All but the closing end-of-text of the window belong to documents of that source.
        for place in range(start + 1, start + 17):
            document = int(np.searchsorted(offsets, place, side="right")) - 1
            assert files[document].endswith(texts[number].name)
    assert tokenizer.vocab_size == 257
    epochs = MixedData(DataConfig(source=sources(texts, epochs=4.0)), [data])
    n_first, n_second = (span.n_tokens for span in epochs.spans.values())
    assert epochs.tokens_for_epochs == n_first + 4 * n_second
    staged = DataConfig(source=sources(texts, epochs=4.0, stage=0.5))
    with pytest.raises(ValueError, match=r"has epochs and stages, so train\.steps must be set"):
        _ = MixedData(staged, [data]).tokens_for_epochs
    mixed = MixedData(DataConfig(source=sources(texts), exhausted="error"), [data])
    with pytest.raises(ValueError, match=r"letters\.jsonl' [\d.]+ times, and data\.exhausted"):
        mixed.order(context_length=16, seed=1, steps=2000, batch_size=4)
    mixed.order(context_length=16, seed=1, steps=10, batch_size=4)
    once = DataConfig(source=sources(texts, epochs=1.0), exhausted="error")
    mixed = MixedData(once, [data])
    assert mixed.tokens_for_epochs is not None
    for rows in (4, 8, 16, 32):
        options = {"context_length": 32, "seed": 1, "batch_size": rows}
        steps = round(mixed.tokens_for_epochs / (rows * 32))
        mixed.order(steps=steps, **options)
        with pytest.raises(ValueError, match=r"data\.exhausted is 'error'"):
            mixed.order(steps=2 * steps, **options)
    late = MixedData(DataConfig(source=sources(texts, weight=3.0, stage=0.95)), [data])
    with pytest.raises(ValueError, match="8 steps are too few for 2 stages"):
        late.order(context_length=16, seed=1, steps=8)


def test_a_source_with_nothing_left_is_an_error(texts: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    again.write_bytes(texts[0].read_bytes())
    data = prepare([texts[0], again], tmp_path / "out", tokenizer="bytes")
    with pytest.raises(ValueError, match=r"'.*again\.jsonl' has no text left to train on"):
        MixedData(DataConfig(source=sources([texts[0], again])), [data])


def test_prepared_folders_are_concatenated(texts: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / path.stem for path in texts]
    each = [prepare(p, f, tokenizer="bytes") for p, f in zip(texts, folders, strict=True)]
    mixed = MixedData(DataConfig(source=sources(folders)), each)
    read_everything(mixed)
    stream = mixed.split("train")
    whole = np.concatenate([d.split("train").read(0, d.split("train").n_tokens) for d in each])
    assert stream.read(0, stream.n_tokens).tolist() == whole.tolist()
    middle = each[0].split("train").n_tokens
    assert stream.read(middle - 5, middle + 5).tolist() == whole[middle - 5 : middle + 5].tolist()
    offsets, n_first = stream.document_offsets, each[0].split("train").n_documents
    assert len(offsets) == stream.n_documents + 1
    origins = list(stream.origins())
    assert {origin.id.partition("-")[0] for origin in origins[:n_first]} == {"books"}
    number = n_first + 2
    origin = origins[number]
    line = texts[1].read_text().splitlines()[int(origin.id.partition("-")[2])]
    text = json.loads(line)["text"]
    found = stream.read(int(offsets[number]), int(offsets[number + 1]) - 1)
    assert mixed.tokenizer().decode(found) == text
    other = prepare(texts[1], tmp_path / "other", vocab_size=300)
    with pytest.raises(ValueError, match="different tokenizers"):
        MixedData(DataConfig(source=sources(folders)), [each[0], other])


def test_a_mixed_run_reports_tokens_of_each_source(
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    entry = "{path: %s, weight: %s, stage: %s}"
    given = [(texts[0], 3, 0), (texts[1], 1, 0), (texts[1], 1, 0.5)]
    source = "[" + ", ".join(entry % each for each in given) + "]"
    run = tmp_path / "run"
    args = ["train", "--run", str(run), "--data.source", source, *TINY, "--train.steps", "20"]
    assert main(args) == 0
    assert "mixed" in capsys.readouterr().out
    books = str(texts[0])
    summary = json.loads((run / "summary.json").read_text())
    assert sum(row["tokens"] for row in summary["sources"].values()) == summary["tokens"]
    assert 0.25 < summary["sources"][books]["share"] < 0.5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(sum(line["sources"].values()) == line["tokens"] for line in steps)
    half = next(line["sources"][books] for line in steps if line["step"] == 10)
    assert half == steps[-1]["sources"][books] == summary["sources"][books]["tokens"]
    page = (run / "report.html").read_text().split("Tokens by source")[1]
    assert f"{summary['sources'][books]['tokens']:,}</td>" in page
    assert f"{summary['sources'][books]['share']:.2%}</td>" in page
    # Other weights need no new preparation.
    assert len(list((tmp_path / "cache/prepared").iterdir())) == 1
    assert (
        main(
            [
                *args[:2],
                f"{run}2",
                "--data.source",
                source.replace("weight: 3", "weight: 9"),
                *args[5:],
            ]
        )
        == 0
    )
    assert len(list((tmp_path / "cache/prepared").iterdir())) == 1
    capsys.readouterr()
    assert main(["trace", str(run), "--step", "15", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["seen"]
    assert {row["id"].partition("-")[0] for row in seen} == {"letters"}
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
