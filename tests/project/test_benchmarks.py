"""benchmarks/: what others disturbed is neither written nor drawn, but named; bfloat16 only where
the processor has it; and since nothing else runs these scripts, a smallest piece of each."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.fixture(autouse=True)
def _next_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def module(name: str) -> Any:
    found = importlib.import_module(name)
    if Path(str(found.__file__)).parent == BENCHMARKS:
        return found
    # A helper of the tests has this name too.
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# --- a busy machine ------------------------------------------------------------------------------


def write_proc(folder: Path, cpu: str, processes: dict[int, tuple[int, str]]) -> Path:
    """A /proc of these numbers: of all cores, and of each process its parent and its ticks."""
    folder.mkdir()
    (folder / "stat").write_text(f"cpu  {cpu} 7 7\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    for pid, (parent, ticks) in processes.items():
        (folder / str(pid)).mkdir()
        before = f"{pid} (a ) b) S {parent} 1 1 0 -1 4194304 9 9 9 9"
        (folder / str(pid) / "stat").write_text(f"{before} {ticks} 20 0 1 0 1000 1 1\n")
    return folder


def test_others_are_what_is_busy_or_stolen_and_not_ours(tmp_path: Path) -> None:
    quiet = module("quiet")
    # 50 is ours; its child has a smaller number, and a child itself, which ends before the end.
    family = {50: (1, "100 10 5 5"), 40: (50, "30 0 0 0"), 60: (40, "20 5 0 0"), 70: (1, "9 9 9 9")}
    before = quiet.read_ticks(write_proc(tmp_path / "a", "200 0 50 900 30 1 2 4", family), 50)
    assert (before.whole, before.busy, before.ours) == (1187, 257, 175)
    # 60 ended with 65 more ticks: its parent has waited for it. 70 is another's, and used 40.
    later = {50: (1, "130 20 5 5"), 40: (50, "50 0 80 10"), 70: (1, "49 9 9 9")}
    after = quiet.read_ticks(write_proc(tmp_path / "b", "350 20 62 1040 40 1 4 10", later), 50)
    assert (after.whole - before.whole, after.ours - before.ours) == (340, 125)
    assert quiet.share_of_others(before, after) == pytest.approx((190 - 125) / 340)
    assert quiet.share_of_others(before, before) is None
    assert quiet.read_ticks(tmp_path / "none") is None
    assert quiet.percent(quiet.share_of_others(None, None)) == "not measured"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_counts_this_process() -> None:
    quiet = module("quiet")
    ours, began = quiet.read_ticks().ours, os.times()
    while os.times().user - began.user < 0.05:
        pass
    assert quiet.read_ticks().ours > ours


def shares(monkeypatch: pytest.MonkeyPatch, values: list[float | None]) -> None:
    """What others use in the rounds to come."""
    given = iter(values)
    monkeypatch.setattr(module("quiet").Watch, "others", lambda _: next(given))


@pytest.mark.parametrize(
    ("others", "numbers", "most"),
    [
        ([0.01, 0.04, 0.0], [0, 1, 2], 0.04),
        ([0.01, 0.3, 0.02, 0.0], [0, 1, 2], 0.02),
        ([0.3, 0.01, 0.2], [0, 1], 0.3),
        ([None, None, None], [0, 1, 2], None),
    ],
)
def test_a_disturbed_round_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
    others: list[float | None],
    numbers: list[int],
    most: float | None,
) -> None:
    shares(monkeypatch, others)
    found = module("quiet").quiet_rounds(lambda number: number, rounds=3)
    assert found == (numbers, most)


def rows(what: str, others: float | None) -> list[Any]:
    found = module("rows")
    rounds = [{found.OURS: 200.0, "peer": 100.0}, {found.OURS: 300.0, "peer": 100.0}]
    return list(found.rows_of(what, "tokens/s", rounds, others=others))


def test_what_others_disturbed_is_named_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = module("everything")
    page, picture = tmp_path / "page.md", tmp_path / "page.svg"
    monkeypatch.setattr(everything, "PAGE", page)
    monkeypatch.setattr(everything, "PICTURE", picture)
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    how = {"command": "make bench", "minutes": 12.3}
    with pytest.raises(
        SystemExit, match=r"keeps its figures(.|\n)*loud \(pretrain, peer\), .*23 %"
    ):
        everything.write_page(rows("loud", 0.23), **how)
    assert "old" in page.read_text()
    assert not picture.exists()

    everything.write_page(rows("calm", 0.04) + rows("loud", 0.23), **how)
    written = page.read_text()
    assert written.startswith("before\n<!-- figures -->\n")
    assert written.endswith("<!-- /figures -->\nafter\n")
    assert "old" not in written
    assert "12 minutes" in written
    assert "| calm | peer | 100 (100 to 100) tokens/s | 2.50 (2.00 to 3.00) |" in written
    assert "| loud" not in written
    assert "left out: loud (pretrain, peer), others used 23 % of the processors\n" in written
    assert "at most 4 % in a round" in written
    assert "calm, peer" in picture.read_text()
    assert "loud" not in picture.read_text()

    everything.write_page(rows("calm", None)[:1], **how)
    assert "not measured" in page.read_text()
    assert "svg" not in page.read_text()


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("who", ["nanoGPT", "nanochat"])
def test_peers_have_bfloat16_where_the_processor_has_it(who: str, bf16: bool) -> None:
    text_settings = module("text_settings")
    settings = text_settings.settings_of(who, bf16=bf16)
    assert len(set(settings)) == 6
    assert all(("bfloat16" in each) == bf16 for each in settings)
    other = text_settings.settings_of(who, bf16=not bf16)
    without = [[word for word in each.split() if "float" not in word] for each in settings]
    assert without == [[word for word in each.split() if "float" not in word] for each in other]
    for setting in settings:
        variables, words = text_settings.words_of(who, setting, 7)
        assert all(word.startswith("--") for word in words)
        assert all("float" in value for value in variables.values())


def test_ours_has_what_peers_have(monkeypatch: pytest.MonkeyPatch) -> None:
    text_settings = module("text_settings")
    for bf16, precision in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(text_settings, "has_bf16", lambda has=bf16: has)
        (setting, *others) = text_settings.settings_of(text_settings.OURS, bf16=bf16)
        assert len({setting, *others}) == 6
        assert f"--train.precision {precision}" in " ".join(
            text_settings.words_of(text_settings.OURS, setting, 7)[1]
        )


def test_what_a_run_of_text_was_disturbed_by_is_in_its_table() -> None:
    text = module("text")
    given = {"kind": "run", "seed": 1, "minutes": 1, "steps": 9, "step_seconds": 0.1}
    given |= {"who": "pretrain", "setting": "--model.size 2", "bits_per_byte": 1.5}
    given |= {"seconds": 50.0, "whole_seconds": 60.0}
    # A line of before has no share.
    ran = [text.Ran(**given), text.Ran(**given, others=0.234)]
    lines = list(text.table({"pretrain": ran[1:]}, {"pretrain": ran}))
    assert "| not measured, 23 % | --model.size 2 |" in lines[2]
    assert "others used 23 %" in lines[-1]


# --- a smallest piece of each --------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {"ablations", "variants"}))
def test_what_it_imports_is_there(script: str) -> None:
    """The names that its functions import too."""
    module(script)
    tree = ast.parse((BENCHMARKS / f"{script}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "pretrain":
            source = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(source, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_throughput_of_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, contestants = module("throughput"), module("contestants")
    shares(monkeypatch, [0.01])
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context": 8, "vocab_size": 64}
    shape = contestants.Shape(**sizes, batch_tokens=32, threads=1)
    contestants.transformers(shape)()
    (row,) = throughput.compare(shape, {throughput.OURS: None}, rounds=1, steps=1)
    assert row.values[0] > 0
    assert row.memory > 1e7
    assert not row.is_disturbed
    assert "GFLOP/s" in row.note


def test_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    generating = module("generating")
    shares(monkeypatch, [0.01])
    monkeypatch.setattr(generating, "TOKENS", 3)
    monkeypatch.setattr(generating, "TEXTS", 2)
    monkeypatch.setattr(generating, "CONTEXT", 8)
    names = [row.who for row in generating.measure(nanogpt=None, rounds=1)]
    assert names == ["pretrain", "pretrain, 2 texts", "transformers"]


def test_a_step_on_a_prepared_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `waiting.py` and `corpus_size.py` ask their processes for."""
    from pretrain.data.preparation import prepare

    corpus_size = module("corpus_size")
    monkeypatch.setattr(corpus_size, "WARM_TURNS", 0)
    monkeypatch.setattr(corpus_size, "TURNS", 1)
    prepare(str(corpus), tmp_path / "prepared", vocab_size=300)
    found = corpus_size.one_round({25: tmp_path / "prepared"}, 1)
    speed, reading, opening, peak = found[25]
    assert speed > 0
    assert 0 < reading < 1
    assert opening > 0
    assert peak > 1e7


def test_small_pieces(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert module("starting").seconds_to_help() > 0
    products = module("products")
    monkeypatch.setattr(products, "ROWS", 8)
    monkeypatch.setattr(sys, "argv", ["products.py", "--threads", "1", "--d-model", "8"])
    products.main()
    assert "oneDNN" in capsys.readouterr().out
    curves = {"pretrain": [(1.0, 2.0)], "nanoGPT": [(3.0, 2.5)]}
    assert "2.500 after 3 s" in module("loss_over_time").picture(curves)


def test_every_held_out_id_of_a_peer_is_scored_once() -> None:
    import numpy as np
    import torch

    peers = module("peers")

    def nats(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        counted = targets != peers.IGNORE_INDEX
        assert torch.equal(targets[counted], inputs[counted] + 1)
        return 0.5 * torch.sum(counted)

    assert peers.total_nats(nats, np.arange(100), context=7) == 99 * 0.5


def test_preparing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preparing = module("preparing")
    train = preparing.train_tokenizer
    monkeypatch.setattr(
        preparing, "train_tokenizer", lambda texts, vocab_size: train(texts, vocab_size=300)
    )
    bench = preparing.Bench(tmp_path, corpus, 0.02, 1)
    assert bench.n_bytes >= 20_000
    bench.parts_of_ours()
    bench.nanogpt()


def test_same_numbers_says_where_two_readings_differ() -> None:
    reading = module("same_numbers_reading")
    one, other = ({"loss": [1.0, value], "seconds": value} for value in (2.0, 3.0))
    flat = [reading.flat(json.loads(json.dumps(each)), {}) for each in (one, other)]
    assert reading.first_difference(flat[0], flat[0]) is None
    assert "/loss/1" in reading.first_difference(*flat)
    assert module("same_numbers_settings").settings_of("a.b 1 c {text}", text="x") == {
        "a.b": 1,
        "c": "x",
    }
