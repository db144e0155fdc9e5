"""benchmarks/own_text.py: everybody is scored on the same last tenth, what was measured is not
measured again, and the tables say what is worse. Ours trains in this process; of nanoGPT, which
the suite does not have, only what it would print."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.cli import main
from tiny import TINY

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def own_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("own_text")


class Processes:
    """In the place of `run_python`: the words of each process that there would have been."""

    def __init__(self, module: Any) -> None:
        self.peers, self.process, self.real = module.PEERS, module.Process, module.run_python
        self.words: list[list[str]] = []

    def __call__(self, words: Sequence[object], *, cwd: Path, **variables: str) -> Any:
        given = list(map(str, words))
        self.words.append(given)
        if words[0] == self.peers:
            return self.process(self._nanogpt(Path(given[2]), given[5:]), 1.0, 10**8)
        if given[0] == "-c":
            return self.real(words, cwd=cwd, **variables)
        output = io.StringIO()
        with redirect_stdout(output):
            assert main(given[2:]) == 0
        return self.process(output.getvalue(), 1.0, 10**8)

    @staticmethod
    def _nanogpt(ids: Path, flags: list[str]) -> str:
        if flags:
            return "iter 0: loss 5.0, time 50.00ms\n" * 20
        held_out = np.fromfile(ids / "val.bin", np.uint16)
        assert pickle.loads((ids / "meta.pkl").read_bytes()) == {"vocab_size": 256}
        return f"{(len(held_out) - 1) * np.log(2) * 8}\n"


def test_measures_each_once_and_prints_tables(
    own_text: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    processes = Processes(own_text)
    monkeypatch.setattr(own_text, "run_python", processes)
    monkeypatch.setattr(own_text, "_git", lambda *_: "1234567")
    text, peers, out = tmp_path / "novel.txt", tmp_path / "peers", tmp_path / "out"
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    text.write_text("\r\n\r\n".join(texts), encoding="utf-8")
    (peers / "nanoGPT").mkdir(parents=True)
    words = [str(text), "--sizes", "5kB", "5MB", "--minutes", "0.002", "0.008", "--seeds", "1"]
    words += ["--peers", str(peers), "--tries", "2", "--out", str(out)]
    words += [f"--settings={shlex.join(TINY)}"]
    own_text.main(words)

    printed = capsys.readouterr()
    assert "smaller than 5MB" in printed.err
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["who"].split()[0] for line in lines] == [
        "PPMd,",
        *["pretrain", "nanoGPT", "nanoGPT"] * 2,
    ]
    assert lines[1]["kneser_ney"] > 0
    assert lines[1]["disk"] > 10_000
    (folder,) = (out / "texts").iterdir()
    whole, train, held_out = (
        (folder / f"{name}.txt").read_bytes() for name in ("whole", "train", "held_out")
    )
    assert whole == train + held_out
    assert len(held_out) == pytest.approx(500, rel=0.05)
    evaluated = [each for each in processes.words if "evaluate" in each]
    assert all(str(folder / "held_out.txt") in each for each in evaluated)
    rows = [line for line in printed.out.splitlines() if line.startswith("| novel")]
    assert len(rows) == 2 + 4 + 2
    assert "| nanoGPT | 8.000 |" in printed.out
    assert rows[-1].endswith(
        "4 times the minutes, 0.008 for 0.002 | +0.000 | not worse, one seed |"
    )

    measured = [each for each in processes.words if each[:2] != ["-c", own_text.ASK_AUTOCAST]]
    processes.words.clear()
    own_text.main(words)
    assert len(measured) > 4
    assert processes.words == [["-c", own_text.ASK_AUTOCAST]]
    assert capsys.readouterr().out == printed.out


def test_a_run_that_held_out_something_else_ends_it(
    own_text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words of a text " * 50)
    contest = own_text.Contest(tmp_path / "out")
    summary = own_text.Process(json.dumps({"val_bytes": 7}), 1.0, 1)
    monkeypatch.setattr(own_text, "run_python", lambda *_, **__: summary)
    part = own_text.Text(text, "all", tmp_path)
    with pytest.raises(SystemExit, match=f"7 bytes, not the last {part.n_held_out_bytes}"):
        contest.ours(part, "pretrain", own_text.Arm(tmp_path, []), minutes=1, seed=1)


def test_processes_are_measured(own_text: Any, tmp_path: Path) -> None:
    done = own_text.run_python(["-c", "a = b'x' * 100_000_000; print(len(a))"], cwd=tmp_path)
    assert done.output == "100000000\n"
    assert done.seconds > 0
    assert done.memory > 100_000_000
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        own_text.run_python(["-c", "1 / 0"], cwd=tmp_path)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.3], "**worse**"),
        ([-0.1, -0.2, -0.3], "better"),
        ([0.1, -0.2, 0.15], "within its error"),
        ([0.1], "**worse**, one seed"),
    ],
)
def test_worse_is_more_than_the_error(
    own_text: Any, differences: list[float], verdict: str
) -> None:
    assert importlib.import_module("own_text_tables").verdict(differences) == verdict


@pytest.mark.parametrize(("size", "n"), [("5kB", 5000), ("0.5MB", 500_000), ("all", None)])
def test_sizes(own_text: Any, size: str, n: int | None) -> None:
    assert own_text.bytes_of(size) == n
    with pytest.raises(SystemExit, match="50kB"):
        own_text.bytes_of(f"-{size}")
