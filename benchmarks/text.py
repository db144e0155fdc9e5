"""Who models a text best in the same wall clock: ours compared with nanoGPT and nanochat, on a CPU.

python benchmarks/text.py --source CORPUS --out FOLDER --nanogpt CHECKOUT --nanochat CHECKOUT

The text is prepared once, and everybody gets the same ids; one document in a hundred is held out.
Each contestant first tries --tries settings for --try-minutes each, and continues with the one that
models the held-out documents best: --minutes for each seed, by turns, with all cores to itself. The
clock runs from a process' start until its weights are on the disk. Everybody makes as many steps as
fit, from earlier runs; peers train by their own scripts, and ours is the mean of a network and the
counts of the text, as a run that is given minutes makes it. Scoring is outside the clock for all:
every held-out token once, in windows of the contestant's own context.
What was measured is in FOLDER/results.jsonl, with the share of the processors that other programs
used meanwhile, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from quiet import Watch, percent
from rows import OURS
from text_settings import PROBE, compiles, has_bf16, settings_of, words_of

from pretrain.data.format import open_prepared

PEERS = Path(__file__).resolve().parent / "peers.py"
# Share of the clock that is planned for: what else a machine does makes a run longer.
PLANNED = 0.98


@dataclass(frozen=True, kw_only=True)
class Ran:
    who: str
    setting: str
    kind: str
    """compiling and probe, which are short; try; run"""
    seed: int
    minutes: float
    """of the clock that it was to fit"""
    steps: int
    step_seconds: float
    """of a typical step"""
    seconds: float
    """from the process' start until its weights were on the disk"""
    whole_seconds: float
    """of the process; ours also scores itself, and count tables and xz"""
    bits_per_byte: float
    """of the held-out documents; NaN for a probe of a peer"""
    others: float | None = None
    """share of the processors that others used meanwhile"""
    alone: float = math.nan
    """bits per byte of the network of ours"""

    @property
    def key(self) -> tuple[object, ...]:
        return self.who, self.setting, self.kind, self.minutes, self.seed


@dataclass(frozen=True, kw_only=True)
class Text:
    """The prepared text, and the same ids for others."""

    prepared: Path
    ids: Path
    n_targets: int
    n_bytes: int


def prepare(source: list[str], out: Path) -> Text:
    prepared, ids = out / "prepared", out / "ids"
    if not prepared.is_dir():
        words = ["prepare", *source, "--out", str(prepared), "--vocab-size", "4096"]
        words += ["--val-fraction", "0.01", "--workers", str(os.cpu_count() or 1)]
        subprocess.run([sys.executable, "-m", "pretrain", *words], check=True)
    data = open_prepared(prepared)
    ids.mkdir(exist_ok=True)
    for name in ("train", "val"):
        stream = data.split(name)
        with open(ids / f"{name}.bin", "wb") as file:
            for start in range(0, stream.n_tokens, 1 << 22):
                stop = min(start + (1 << 22), stream.n_tokens)
                file.write(stream.read(start, stop).astype(np.uint16).tobytes())
    (ids / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.manifest.vocab_size}))
    held_out = data.split("val").read(1, data.split("val").n_tokens)
    n_bytes = int(data.tokenizer().byte_lengths[held_out].sum())
    return Text(prepared=prepared, ids=ids, n_targets=len(held_out), n_bytes=n_bytes)


def timed(words: list[str], *, cwd: Path, variables: dict[str, str]) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - began, done.stdout


class Contest:
    """Runs, each done once however often this program is started."""

    def __init__(self, text: Text, out: Path, checkouts: dict[str, Path]) -> None:
        self.text, self.out = text, out
        self.records = out / "results.jsonl"
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        self.ran = [Ran(**json.loads(line)) for line in lines]
        self.names, self.alone = [OURS, *checkouts], math.nan
        for who, checkout in checkouts.items():
            if not (out / who).exists():
                shutil.copytree(checkout, out / who, ignore=shutil.ignore_patterns(".git"))

    def run(self, who: str, setting: str, *, kind: str, minutes: float, seed: int = 1) -> Ran:
        for ran in self.ran:
            if ran.key == (who, setting, kind, minutes, seed):
                return ran
        steps = PROBE[who] if kind in ("compiling", "probe") else self._steps(who, setting, minutes)
        folder = self.out / "run"
        shutil.rmtree(folder, ignore_errors=True)
        variables, words = words_of(who, setting, steps)
        watch = Watch()
        by = self._ours if who == OURS else self._peer
        step_seconds, seconds, whole, bits = by(who, variables, words, seed, kind in ("try", "run"))
        ran = Ran(
            who=who,
            setting=setting,
            kind=kind,
            seed=seed,
            minutes=minutes,
            steps=steps,
            step_seconds=step_seconds,
            seconds=seconds,
            whole_seconds=whole,
            bits_per_byte=bits,
            alone=self.alone if who == OURS else math.nan,
            others=watch.others(),
        )
        shutil.rmtree(folder)
        self.ran.append(ran)
        with open(self.records, "a") as file:
            file.write(json.dumps(asdict(ran)) + "\n")
        print(ran, file=sys.stderr, flush=True)
        return ran

    def _steps(self, who: str, setting: str, minutes: float) -> int:
        """What fits into the clock, by the longest run of this setting and by the shortest."""
        known = sorted(
            (r for r in self.ran if (r.who, r.setting) == (who, setting) and r.kind != "compiling"),
            key=lambda ran: ran.steps,
        )
        short, long = known[0], known[-1]
        each = long.step_seconds
        if long.steps > short.steps:
            # What comes now and then, and is in no typical step.
            seconds_per_step = (long.seconds - short.seconds) / (long.steps - short.steps)
            each = min(max(each, seconds_per_step), 1.25 * each)
        around = long.seconds - each * long.steps
        return max(PROBE[who], int((PLANNED * 60 * minutes - around) / each))

    def _ours(
        self, _: str, variables: dict[str, str], words: list[str], seed: int, __: bool
    ) -> tuple[float, float, float, float]:
        folder = self.out / "run"
        words = [*words, "--data.source", str(self.text.prepared), "--train.seed", str(seed)]
        words = ["-m", "pretrain", *words, "--run", str(folder), "--json"]
        began = time.time()
        whole, output = timed(words, cwd=self.out, variables=variables)
        summary = json.loads(output)
        # Peers are scored by these, and must be by the same.
        counts = (summary["val_tokens"], summary["val_bytes"])
        assert counts == (self.text.n_targets, self.text.n_bytes), counts
        kept = [each.stat().st_mtime for each in folder.glob("checkpoints/*/manifest.json")]
        step_seconds = summary["train_seconds"] / summary["steps"]
        # Held-out text and count tables are scored between the network and its mean with counts.
        seconds = max(kept) - began + summary["seconds"]["the mean"]
        self.alone = summary["mix"][0]["bits_per_byte"]
        return step_seconds, seconds, whole, summary["val_bits_per_byte"]

    def _peer(
        self, who: str, variables: dict[str, str], words: list[str], seed: int, scored: bool
    ) -> tuple[float, float, float, float]:
        command = [str(PEERS), who, str(self.text.ids), str(self.out / "run")]
        # Kept from run to run: what is compiled once is not compiled again.
        variables = {**variables, "TORCHINDUCTOR_CACHE_DIR": str(self.out / "compiled")}
        seconds, output = timed(
            [*command, str(seed), *words], cwd=self.out / who, variables=variables
        )
        steps = [float(ms) for ms in re.findall(r"(?:time|dt:) ([\d.]+)ms", output)]
        bits = math.nan
        if scored:
            variables = {"NANOCHAT_DTYPE": "float32"}
            output = timed(command, cwd=self.out / who, variables=variables)[1]
            nats = float(output.split()[-1])
            bits = nats / math.log(2) / self.text.n_bytes
        return statistics.median(steps) / 1000, seconds, seconds, bits

    def tried(self, who: str, *, tries: int, minutes: float) -> list[Ran]:
        """The best first."""
        found = []
        for setting in settings_of(who, bf16=has_bf16())[:tries]:
            if compiles(who, setting):
                self.run(who, setting, kind="compiling", minutes=0)
            self.run(who, setting, kind="probe", minutes=0)
            found.append(self.run(who, setting, kind="try", minutes=minutes))
        return sorted(found, key=lambda ran: (math.isnan(ran.bits_per_byte), ran.bits_per_byte))


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(tried: dict[str, list[Ran]], final: dict[str, list[Ran]]) -> Iterator[str]:
    middle = {
        who: statistics.median(ran.bits_per_byte for ran in runs) for who, runs in final.items()
    }
    yield (
        "| who | bits/byte, median (lowest to highest) | seconds to weights | whole process "
        "| others used of the processors | |"
    )
    yield "|---|---|---|---|---|---|"
    for who, runs in final.items():
        bits = spread([ran.bits_per_byte for ran in runs], 4)
        seconds = spread([ran.seconds for ran in runs], 0)
        whole = spread([ran.whole_seconds for ran in runs], 0)
        used = ", ".join(percent(ran.others) for ran in runs)
        yield f"| {who} | {bits} | {seconds} | {whole} | {used} | {runs[0].setting} |"
        if who == OURS:
            alone = spread([ran.alone for ran in runs], 4)
            yield f"| {who}, its network without counts | {alone} | | | | |"
    for who, tries in tried.items():
        variables, words = words_of(who, tries[0].setting, final[who][-1].steps)
        before = [f"{name}={value}" for name, value in variables.items()]
        yield f"\n{who}: {' '.join([*before, *words])}"
        for ran in tries:
            used = f"others used {percent(ran.others)}"
            yield f"  {ran.bits_per_byte:.4f} in {ran.seconds:.0f} s by {ran.setting}, {used}"
    if others := {who: bits for who, bits in middle.items() if who != OURS}:
        best = min(others, key=lambda who: others[who])
        share = middle[OURS] / others[best] - 1
        yield f"\n{OURS}: {share:+.1%} bits/byte compared with the best peer, {best}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", nargs="+", required=True, help="what `pretrain prepare` reads")
    parser.add_argument("--out", type=Path, required=True, help="a folder for all that is made")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=6, choices=range(1, 7))
    parser.add_argument("--try-minutes", type=float, default=2)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = {"nanoGPT": args.nanogpt, "nanochat": args.nanochat}
    checkouts = {who: checkout for who, checkout in given.items() if checkout}
    contest = Contest(prepare(args.source, out), out, checkouts)
    tried = {
        who: contest.tried(who, tries=args.tries, minutes=args.try_minutes) for who in contest.names
    }
    final: dict[str, list[Ran]] = {who: [] for who in contest.names}
    for seed in range(1, args.seeds + 1):
        for who, tries in tried.items():
            setting, minutes = tries[0].setting, args.minutes
            final[who].append(contest.run(who, setting, kind="run", minutes=minutes, seed=seed))
    print("\n".join(table(tried, final)))


if __name__ == "__main__":
    main()
