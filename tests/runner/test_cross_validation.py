"""A tiny text: parts of it are held out one after the other, for a number with a smaller error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.config import compose
from pretrain.data.preparation import prepare
from pretrain.run.directory import read_summary
from pretrain.runner import ensemble, start
from pretrain.train.resolve import can_hold_out_others, fit_members
from runs import Killed, kill_in_step
from tiny import TINY

# Far more minutes than one epoch needs, so that the number of steps does not depend on the time.
MINUTES = "--train.minutes 30".split()


@pytest.fixture(scope="module")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_bytes(corpus.read_bytes()[:3000])
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", str(text), *TINY, *MINUTES, "--run", str(run)]) == 0
    return run


def numbers(run: Path) -> Any:
    summary = read_summary(run)
    parts = [{**part, "seconds": 0} for part in summary["cross_validation"]["parts"]]
    return summary["cross_validation"] | {"parts": parts}, summary["val_bits_per_byte"]


def test_parts_are_held_out_until_the_error_is_small(whole: Path) -> None:
    summary = read_summary(whole)
    found = summary["cross_validation"]
    assert summary["val_bits_per_byte_stderr"] > 0.03 * summary["val_bits_per_byte"]
    assert found["stderr"] < summary["val_bits_per_byte_stderr"]
    n = len(found["parts"])
    assert n == 5 or (n >= 2 and found["stderr"] <= 0.03 * found["bits_per_byte"])
    assert found["parts"][0]["bits_per_byte"] == summary["val_bits_per_byte"]
    assert 500 * n < sum(part["bytes"] for part in found["parts"]) <= 3000
    assert [row["name"] for row in found["baselines"]] == [r["name"] for r in summary["baselines"]]
    own = sum(summary["seconds"].values())
    assert 60 * summary["minutes"] >= sum(part["seconds"] for part in found["parts"][1:])
    assert own < summary["total_seconds"]


def test_the_runs_of_parts_are_like_the_first_and_keep_only_their_files(whole: Path) -> None:
    folds = sorted((whole / "folds").iterdir())
    summary = read_summary(whole)
    assert len(folds) == len(summary["cross_validation"]["parts"]) - 1
    for fold in folds:
        own = read_summary(fold)
        assert own["steps"] == summary["steps"]
        assert [part["name"] for part in own["mix"]] == ["network 1", "counts"]
        assert own["val_bits_per_byte"] != summary["val_bits_per_byte"]
        assert not (fold / "checkpoints").exists()
        assert not (fold / "mix").exists()
    assert (whole / summary["checkpoint"]).is_dir()


def test_the_screen_and_the_report_compare_the_number_with_baselines_of_the_same_bytes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(whole)]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert main(["report", str(whole)]) == 0
    page = (whole / "report.html").read_text()
    found = read_summary(whole)["cross_validation"]
    n, bits = len(found["parts"]), found["bits_per_byte"]
    assert f"{bits:.2f} ± {found['stderr']:.3f} over all {n} parts that were held out" in page
    assert f"{bits:.3f} ± {found['stderr']:.3f}" in page
    assert f"over {n} parts of the text" in page


def test_a_run_that_was_killed_in_a_part_goes_on_with_it(
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        train_member = start._train_member

        def killed(*args: Any) -> int:
            kill_in_step(patch, 4)
            return train_member(*args)

        patch.setattr(start, "_train_member", killed)
        with pytest.raises(Killed):
            main(["train", str(text), *TINY, *MINUTES, "--run", str(run)])
    assert "cross_validation" not in read_summary(run)
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "part 2: a run like the first" in out
    n, bytes_ = len(numbers(run)[0]["parts"]), sum(p["bytes"] for p in numbers(run)[0]["parts"])
    assert f"bits/byte over {n} parts of the text, {bytes_:,} bytes" in out
    assert numbers(run) == numbers(whole)


def test_without_time_no_part_is_begun(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "folds")
    summary = {k: v for k, v in read_summary(run).items() if k != "cross_validation"}
    (run / "summary.json").write_text(json.dumps(summary | {"minutes": 29.999}))
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert read_summary(run)["cross_validation"] is None
    assert not (run / "folds").exists()


def test_the_error_is_that_within_the_parts_or_between_them() -> None:
    def part(bits: float, stderr: float | None, n_bytes: int, **baselines: float) -> Any:
        rows = [{"name": name, "bits_per_byte": value} for name, value in baselines.items()]
        keys = ("val_bits_per_byte", "val_bits_per_byte_stderr", "val_bytes", "total_seconds")
        return dict(zip(keys, (bits, stderr, n_bytes, 1.0), strict=True)) | {"baselines": rows}

    equal = ensemble.pooled([part(3.0, 0.1, 100, xz=4.0, a=1.0), part(3.0, 0.1, 100, xz=5.0)])
    assert (equal["bits_per_byte"], equal["stderr"]) == pytest.approx((3.0, 0.1 / 2**0.5))
    assert equal["baselines"] == [{"name": "xz", "bits_per_byte": 4.5}]
    apart = ensemble.pooled([part(2.0, 0.1, 100), part(4.0, 0.1, 300)])
    assert (apart["bits_per_byte"], apart["stderr"]) == pytest.approx((3.5, 1.0))
    assert ensemble.is_rough(ensemble.pooled([part(2.0, None, 100), part(2.0, 0.01, 100)]))


def test_a_text_that_has_changed_is_not_cross_validated(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, run = tmp_path / "own.txt", tmp_path / "run"
    shutil.copy(text, own)
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "cross_validate", lambda *args: 1)
        assert main(["train", str(own), *TINY, *MINUTES, "--run", str(run)]) == 1
    own.write_text("zq xj vk " * 400)
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert "no other part of the text is held out: it has changed" in capsys.readouterr().out
    assert read_summary(run)["cross_validation"] is None
    assert not (run / "folds").exists()


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("data", {"fold": 1}),
        ("data", {"base": "bundled"}),
        ("train", {"minutes": None}),
        ("train", {"teacher": "run"}),
        ("schedule", {"name": "cosine"}),
        ("parallel", {"processes": 2}),
    ],
)
def test_what_no_other_parts_are_held_out_of(
    section: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    layer: Any = {"data": {"source": [str(text)]}, "train": {"minutes": 1.0}}
    assert can_hold_out_others(compose([layer]))
    assert not can_hold_out_others(compose([layer, {section: settings}]))
    prepare(text, tmp_path / "prepared", tokenizer="bytes")
    of_prepared: Any = {"data": {"source": [str(tmp_path / "prepared")]}}
    assert not can_hold_out_others(compose([layer, of_prepared]))


def test_a_tiny_text_has_one_network_so_that_its_parts_have_time() -> None:
    model = {"family": "fast", "ngram_rows": 1024, "longest_ngram": 6}
    manifest = SimpleNamespace(vocab_size=257)
    for n_bytes, train, expected in (
        (1000, {"minutes": 1.0}, 1),
        (5000, {"minutes": 1.0}, 8),
        (1000, {"minutes": 1.0, "init_from": "run"}, 8),
    ):
        stream = SimpleNamespace(n_tokens=4 * n_bytes, n_bytes=n_bytes)
        data: Any = SimpleNamespace(manifest=manifest, split=lambda name, stream=stream: stream)
        assert fit_members(compose([{"model": model, "train": train}]), data, 100.0) == expected
