"""A text of one's own, from 5 kB up: ours compared with an older commit, nanoGPT, and counting.

python benchmarks/own_text.py TEXT [TEXT ...] [--sizes 5kB 50kB 500kB all] [--minutes 0.5 2]
    [--seeds 3] [--old REV] [--peers FOLDER] [--from bundled] [--blind] [--settings WORDS]
    [--out FOLDER]

The last tenth of the first SIZE bytes is held out for all, and all are scored on that file. Ours
is told `data.val_fraction 0.1` and scored by `pretrain evaluate RUN --text`; a run that held out
something else ends the program. Such a run chooses its best checkpoint by the held-out text.
`--blind` adds runs that are given the rest alone, and hold out a part of it themselves; `--from`
those that stand on another text; `--settings` is added to each `pretrain train` of ours.

nanoGPT (FOLDER/nanoGPT, a checkout) runs its own train.py by six settings on the first seed, and by
the best of them on the others; it chooses that setting, and its checkpoint, by the held-out text.
It reads bytes, of more than 1 MB a BPE of 4,096.

All work alone, one after the other. Minutes are those of the steps; processes are timed too, which
prepare the text each time. What was measured is in OUT/results.jsonl, and is not measured again.
Errors are those over seeds. What another tenth would change is not in them: give several texts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from own_text_tables import PPMD, Ran, cells_of, more_minutes, table
from quiet import Watch
from rows import OURS

from pretrain.data.stages import Split
from pretrain.tokenizer.train import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers.py"
HELD_OUT = 0.1
NANOGPT = "nanoGPT"
# Its README's model for a CPU first; 0.2 is its dropout for characters on a GPU.
SETTINGS = (
    "--block_size=64 --batch_size=12 --n_embd=128 --learning_rate=1e-3 --dropout=0.0",
    "--block_size=64 --batch_size=12 --n_embd=128 --learning_rate=1e-3 --dropout=0.2",
    "--block_size=128 --batch_size=16 --n_embd=128 --learning_rate=3e-3 --dropout=0.2",
    "--block_size=128 --batch_size=16 --n_embd=128 --learning_rate=3e-3 --dropout=0.0",
    "--block_size=256 --batch_size=8 --n_embd=192 --learning_rate=3e-3 --dropout=0.2",
    "--block_size=128 --batch_size=8 --n_embd=64 --learning_rate=3e-3 --dropout=0.2",
)
PROBE_STEPS = 20
N_EVALUATIONS = 10
MAX_BYTES_READ_AS_BYTES = 1_000_000
# What the held-out text adds to the compressed text; in this much memory nothing is forgotten. In
# a process of its own: those that are started later would inherit its memory as their most.
COUNT_PPMD = """
import pathlib, pyppmd, sys
texts = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
sizes = [len(pyppmd.compress(t, max_order=6, mem_size=(1 << 20) + 16 * len(t))) for t in texts]
print(8 * (sizes[1] - sizes[0]) / (len(texts[1]) - len(texts[0])))
"""
ASK_AUTOCAST = """
import text_settings
print(text_settings.autocast(bf16=text_settings.has_bf16()), end="")
"""


class Arm(NamedTuple):
    """How ours is run."""

    source: Path
    words: list[str]
    is_blind: bool = False
    """whether it is given the text without the last tenth"""


class Process(NamedTuple):
    output: str
    seconds: float
    memory: int
    """the most that it held, in bytes"""


def run_python(words: Sequence[object], *, cwd: Path, **variables: str) -> Process:
    command = [sys.executable, *map(str, words)]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, **variables}
        child = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{errors.read()[-4000:]}")
        return Process(output.read(), seconds, usage.ru_maxrss * 1024)


def disk_of(folder: Path) -> int:
    """Bytes on the disk of all files in it."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def bytes_of(size: str) -> int | None:
    """Of 5kB, 0.5MB, or all."""
    if size == "all":
        return None
    if not (match := re.fullmatch(r"(\d+|\d*\.\d+)([kMG]?)B", size)):
        raise SystemExit(f"--sizes {size}: must be all, or a size such as 50kB or 2MB")
    return int(float(match[1]) * 1000 ** ["", "k", "M", "G"].index(match[2]))


class Text:
    """The first bytes of a text, as files: whole, for training, and the last tenth."""

    def __init__(self, path: Path, size: str, out: Path) -> None:
        content = path.read_bytes()[: bytes_of(size)].decode("utf-8-sig", errors="ignore")
        text = content.replace("\r\n", "\n").strip()
        # As ours cuts a text of one document.
        parts = dict(Split(val_fraction=HELD_OUT, policy="tails", bound=0).parts(text))
        if "val" not in parts:
            raise SystemExit(f"{path}: {len(text)} characters are too few to hold out a tenth")
        self.train_text, self.held_out_text = parts["train"], parts["val"]
        self.name = f"{path.stem} {hashlib.sha256(text.encode()).hexdigest()[:6]}"
        self.size, self.n_held_out_bytes = size, len(self.held_out_text.encode())
        self.folder = out / "texts" / f"{self.name} {size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.whole = self._write("whole", text)
        self.train = self._write("train", self.train_text)
        self.held_out = self._write("held_out", self.held_out_text)

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.txt"
        path.write_bytes(text.encode())
        return path

    def ids(self) -> Path:
        """A folder with what nanoGPT reads."""
        # As with PPMd, in a process of its own.
        worker = multiprocessing.get_context("spawn").Process(target=self._write_ids)
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"the ids of {self.name} could not be written")
        return self.folder

    def _write_ids(self) -> None:
        texts = (self.train_text, self.held_out_text)
        train, held_out = (list(text.encode()) for text in texts)
        vocab_size = 256
        if len(train) > MAX_BYTES_READ_AS_BYTES:
            tokenizer = train_tokenizer([self.train_text], vocab_size=4096)
            train, held_out = (tokenizer.encode(text) for text in texts)
            vocab_size = tokenizer.vocab_size
        # So that the first held-out id has one before it, and is predicted too.
        for name, ids in (("train", train), ("val", [train[-1], *held_out])):
            np.array(ids, np.uint16).tofile(self.folder / f"{name}.bin")
        (self.folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


class Contest:
    """Runs, each done once however often this program is started."""

    def __init__(self, out: Path) -> None:
        self.out, self.records = out, out / "results.jsonl"
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        self.ran = {ran.key: ran for ran in (Ran(**json.loads(line)) for line in lines)}
        self.scratch = out / "scratch"
        self.run_folder, self.cache = self.scratch / "run", self.scratch / "cache"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self._nanogpt_seconds: dict[tuple[Path, str], tuple[float, float]] = {}

    def once(
        self,
        make: Callable[[], dict[str, Any]],
        text: Text,
        who: str,
        *,
        setting: str = "",
        minutes: float = 0,
        seed: int = 0,
    ) -> Ran:
        where = {"text": text.name, "size": text.size, "minutes": minutes}
        key = {**where, "who": who, "setting": setting, "seed": seed}
        if known := self.ran.get(tuple(key.values())):
            return known
        for folder in (self.run_folder, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
        watch = Watch()
        ran = Ran(**key, **make(), others=watch.others())
        self.ran[ran.key] = ran
        with open(self.records, "a") as file:
            file.write(json.dumps(asdict(ran)) + "\n")
        print(ran, file=sys.stderr, flush=True)
        return ran

    def source_of(self, rev: str) -> Path:
        """The package of a commit."""
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", rev, "src"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(self.scratch / rev, filter="data")
        return self.scratch / rev / "src"

    def ppmd(self, text: Text) -> Ran:
        def make() -> dict[str, Any]:
            done = run_python(["-c", COUNT_PPMD, text.train, text.whole], cwd=self.scratch)
            seconds = {"seconds": done.seconds, "process_seconds": done.seconds}
            return {
                **seconds,
                "bits_per_byte": float(done.output),
                "memory": done.memory,
                "disk": 0,
            }

        return self.once(make, text, PPMD)

    def ours(self, text: Text, who: str, arm: Arm, *, minutes: float, seed: int) -> Ran:
        run = self.run_folder
        how = {"PYTHONPATH": str(arm.source), "PRETRAIN_CACHE": str(self.cache)}

        def make() -> dict[str, Any]:
            words = [*f"--train.minutes {minutes} --train.seed {seed}".split(), *arm.words]
            words += [] if arm.is_blind else ["--data.val_fraction", str(HELD_OUT)]
            given = text.train if arm.is_blind else text.whole
            command = ["-m", "pretrain", "train", given, *words, "--run", run, "--json"]
            done = run_python(command, cwd=self.scratch, **how)
            summary = json.loads(done.output)
            if not arm.is_blind and summary["val_bytes"] != text.n_held_out_bytes:
                counts = f"{summary['val_bytes']} bytes, not the last {text.n_held_out_bytes}"
                raise SystemExit(f"{who} held out {counts}, on which all others are scored")
            command = ["-m", "pretrain", "evaluate", run, "--text", text.held_out, "--json"]
            scored = json.loads(run_python(command, cwd=self.scratch, **how).output)
            # A blind run has tables of less text, one with --from of more.
            is_comparable = not arm.is_blind and "--from" not in words
            tables = [
                row["bits_per_byte"]
                for row in summary["baselines"]
                if row["name"] in ("four-gram", "five-gram", "byte six-gram") and is_comparable
            ]
            used = 60 * summary["minutes"] if "minutes" in summary else summary["train_seconds"]
            return {
                "bits_per_byte": scored["text"][str(text.held_out)]["bits_per_byte"],
                "seconds": used,
                "process_seconds": done.seconds,
                "memory": done.memory,
                "disk": disk_of(run),
                "kneser_ney": min(tables, default=None),
            }

        setting = " ".join(arm.words)
        return self.once(make, text, who, setting=setting, minutes=minutes, seed=seed)

    def nanogpt(self, text: Text, setting: str, *, minutes: float, seed: int) -> Ran:
        def make() -> dict[str, Any]:
            ids = text.ids()
            if (ids, setting) not in self._nanogpt_seconds:
                _, times = self._train_nanogpt(ids, setting, PROBE_STEPS, PROBE_STEPS, seed)
                step = statistics.median(times)
                # The last step is one with an evaluation, and writes a checkpoint.
                self._nanogpt_seconds[ids, setting] = step, max(times[-1] - step, 0.0)
            step, evaluation = self._nanogpt_seconds[ids, setting]
            n_steps = int((60 * minutes - (1 + N_EVALUATIONS) * evaluation) / step)
            n_steps = max(n_steps, PROBE_STEPS)
            every = n_steps // N_EVALUATIONS
            done, times = self._train_nanogpt(ids, setting, every * N_EVALUATIONS, every, seed)
            command = [PEERS, NANOGPT, ids, self.run_folder]
            nats = float(run_python(command, cwd=self.scratch / NANOGPT).output.split()[-1])
            return {
                "bits_per_byte": nats / math.log(2) / text.n_held_out_bytes,
                "seconds": sum(times),
                "process_seconds": done.seconds,
                "memory": done.memory,
                "disk": disk_of(self.run_folder),
            }

        return self.once(make, text, NANOGPT, setting=setting, minutes=minutes, seed=seed)

    def _train_nanogpt(
        self, ids: Path, setting: str, n_steps: int, every: int, seed: int
    ) -> tuple[Process, list[float]]:
        """Its process, and the seconds of each step."""
        flags = (
            "--device=cpu --dtype=float32 --compile=False --gradient_accumulation_steps=1 "
            "--n_layer=4 --n_head=4 --weight_decay=0.1 --beta2=0.99 --eval_iters=20 "
            f"--always_save_checkpoint=False --log_interval=1 --eval_interval={every} "
            f"--max_iters={n_steps} --lr_decay_iters={n_steps} --warmup_iters={every} "
        )
        given = dict(flag.split("=") for flag in (flags + setting).split())
        variables = {"AUTOCAST": given.pop("AUTOCAST", "")}
        given["--min_lr"] = str(float(given["--learning_rate"]) / 10)
        n_val_ids = (ids / "val.bin").stat().st_size // 2
        given["--block_size"] = str(min(int(given["--block_size"]), n_val_ids // 2))
        words = [PEERS, NANOGPT, ids, self.run_folder, seed, *map("=".join, given.items())]
        done = run_python(words, cwd=self.scratch / NANOGPT, **variables)
        return done, [float(ms) / 1000 for ms in re.findall(r"time ([\d.]+)ms", done.output)]


def measure(contest: Contest, args: argparse.Namespace) -> Iterator[Ran]:
    words = shlex.split(args.settings)
    now = f"{OURS} {_git('describe', '--always', '--dirty')}"
    ours = {now: Arm(ROOT / "src", words)}
    if args.base:
        ours[f"{now} --from {args.base}"] = Arm(ROOT / "src", [*words, "--from", args.base])
    if args.old:
        old = _git("rev-parse", "--short", args.old)
        ours[f"{OURS} {old}"] = Arm(contest.source_of(old), words)
    if args.blind:
        ours |= {f"{who}, blind": arm._replace(is_blind=True) for who, arm in ours.items()}
    with_nanogpt = args.peers and (args.peers / NANOGPT).is_dir()
    if with_nanogpt:
        without = shutil.ignore_patterns(".git")
        shutil.copytree(args.peers / NANOGPT, contest.scratch / NANOGPT, ignore=without)
        # bfloat16 where ours has it in a run of minutes. In a process of its own, as PPMd.
        autocast = run_python(["-c", ASK_AUTOCAST], cwd=PEERS.parent).output
    for path in args.texts:
        for size in args.sizes:
            if path.stat().st_size < (bytes_of(size) or 0):
                print(f"{path} is smaller than {size}: left out", file=sys.stderr)
                continue
            text = Text(path, size, contest.out)
            yield contest.ppmd(text)
            for minutes in args.minutes:
                tries = SETTINGS[: args.tries] if with_nanogpt else ()
                settings = tuple(autocast + each for each in tries)
                for seed in range(1, args.seeds + 1):
                    how = {"minutes": minutes, "seed": seed}
                    for who, arm in ours.items():
                        yield contest.ours(text, who, arm, **how)
                    tried = [contest.nanogpt(text, setting, **how) for setting in settings]
                    yield from tried
                    best = sorted(tried, key=lambda ran: ran.bits_per_byte)[:1]
                    settings = tuple(ran.setting for ran in best)


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="plain text in UTF-8")
    parser.add_argument("--sizes", nargs="+", default=["5kB", "50kB", "500kB", "all"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.5, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--old", metavar="REV", help="a commit of ours to compare with")
    parser.add_argument("--peers", type=Path, help="a folder with a checkout of nanoGPT")
    parser.add_argument("--tries", type=int, default=6, choices=range(1, 7), help="of nanoGPT")
    parser.add_argument("--from", dest="base", help="ours standing on this text too")
    parser.add_argument("--blind", action="store_true", help="ours without the last tenth too")
    parser.add_argument("--settings", default="", help="added to each `pretrain train` of ours")
    parser.add_argument("--out", type=Path, default=Path("own_text"), help="a folder for results")
    args = parser.parse_args(words)
    contest = Contest(args.out.resolve())
    cells = cells_of(measure(contest, args))
    shutil.rmtree(contest.scratch)
    print("\n".join([*table(cells), "", *more_minutes(cells)]))


if __name__ == "__main__":
    main()
