"""Train with two checkouts of this repository and show that their numbers are bit for bit the same.

python benchmarks/same_numbers.py OLD_CHECKOUT NEW_CHECKOUT [--only NAME ...] [--keep DIR]

In come two checkouts; the Python environment is the one that runs this script. Each case runs
`python -m pretrain ...` once with each checkout, side by side, on a small text that this script
writes. Out comes a table with a row for each comparison (case, what was compared, equal or the
first difference with both values). The exit code is 0 if all are equal, else 1.

The script imports neither checkout: it reads only files and `--json` outputs. Names that differ
between the two go into the tables below, from the old name to the new one. A setting's new name is
used with a checkout whose `pretrain train --help` lists it, so any pair of checkouts can be
compared, in both directions. `--list` prints the names of all cases; `--only kill` runs those whose
name begins with `kill`; `--keep DIR` keeps all runs and logs, which otherwise are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from same_numbers_reading import (
    exported_tensors,
    first_difference,
    flat,
    read_json,
    read_lines,
    read_safetensors,
    same_bytes,
)
from same_numbers_settings import (
    GPT2,
    INHERITED,
    PROCESSES,
    SPIKES,
    TINY,
    TRAININGS,
    settings_of,
    write_text,
)

RENAMED: dict[str, str] = {
    "optimizer.tuned_width": "optimizer.base_width",
    "optimizer.tuned_batch_tokens": "optimizer.base_batch_tokens",
    "optimizer.embedding_rate": "optimizer.embedding_lr_mult",
    "optimizer.head_rate": "optimizer.head_lr_mult",
    "parallel.recompute": "parallel.activation_checkpointing",
    "model.recall": "model.induction",
    "schedule.past": "schedule.history",
}
"""Settings: {"section.old": "section.new"}; of entries of data.source: {"data.source.old": ...}."""
METRIC_RENAMED: dict[str, str] = {"likeliest": "most_probable"}
"""Keys, and texts such as a `kind`, of metrics.jsonl, other JSON files of a run and `--json`."""
MANIFEST_RENAMED: dict[str, str] = {}
"""Keys and texts of the JSON files of a prepared folder, settings among them."""
FILE_RENAMED: dict[str, str] = {}
"""Files of a prepared folder, as paths below it."""
TENSOR_RENAMED: list[tuple[str, str]] = []
"""Tensors of a checkpoint: a pattern of the whole name and its replacement, as of re.sub."""
ADDED = re.compile(
    r"config\.json/(pad_token_id|n_ctx)|generation_config\.json/max_length"
    r"|summary\.json/(reading/.*|val_bits_per_byte_stderr)"
    r"|(report\.json)?/(document_separator|text_field|facts|field_details|omitted)(/.*)?"
)
"""What only new exports, summaries and reports of preparations have."""
EXPORT_RENAMED: list[tuple[str, str]] = [(r"transformer\.(.*)", r"\1")]
"""Tensors of an export, as TENSOR_RENAMED: GPT-2 is written as it was published."""

MOST_SECONDS = 600

# --- the two checkouts, and commands that both run ---------------------------------------------


class CaseFailedError(Exception):
    """A command that should have succeeded did not."""


class Checkout:
    """One checkout and its scratch folder, where its commands run and its cache lies."""

    def __init__(self, name: str, folder: Path, scratch: Path, threads: int) -> None:
        self.name, self.folder, self.scratch = name, folder.resolve(), scratch
        scratch.mkdir(parents=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRETRAIN_", "PYTHON"))}
        self.environment = {
            **kept,
            "PYTHONPATH": str(self.folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PRETRAIN_CACHE": str(scratch / "cache"),
            "OMP_NUM_THREADS": str(threads),
        }
        imported = self.output("-c", "import pretrain; print(pretrain.__file__)").strip()
        if not Path(imported).resolve().is_relative_to(self.folder / "src"):
            raise SystemExit(f"{self.folder} has no package src/pretrain; {imported} was imported")
        listed = re.findall(r"--(\w+\.\w+)", self.output("-m", "pretrain", "train", "--help"))
        sources = (self.folder / "src" / "pretrain").rglob("config.py")
        fields = re.findall(r"(?m)^    (\w+): ", "\n".join(p.read_text("utf-8") for p in sources))
        self.known = {*listed, *(f"data.source.{name}" for name in fields)}
        trace_help = self.output("-m", "pretrain", "trace", "--help")
        self.first_step = int("count from 1" in trace_help)

    def output(self, *words: str) -> str:
        how = {"env": self.environment, "cwd": self.scratch, "check": True}
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, **how).stdout

    def spelled(self, key: str) -> str:
        """The name of a setting as this checkout knows it."""
        new = RENAMED.get(key, key)
        return new if new in self.known else key

    def write_config(self, settings: Mapping[str, Any], path: Path) -> None:
        """Write dotted settings as a config file: JSON, which is YAML too."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            section, _, name = self.spelled(key).partition(".")
            if key == "data.source" and isinstance(value, list):
                value = [
                    {self.spelled(f"data.source.{k}").split(".")[-1]: v for k, v in entry.items()}
                    for entry in value
                ]
            sections.setdefault(section, {})[name] = value
        path.write_text(json.dumps(sections, indent=1), encoding="utf-8")

    def start(self, arguments: Sequence[str], folder: Path, log: str) -> subprocess.Popen[bytes]:
        """Start `pretrain` in a folder; its outputs go to `log`.out and .err."""
        words = [sys.executable, "-m", "pretrain"]
        for each in arguments:
            is_setting = re.fullmatch(r"--\w+\.\w+", each)
            if words[-1] == "--step":
                each = str(int(each) + self.first_step)
            words.append(f"--{self.spelled(each[2:])}" if is_setting else each)
        with open(folder / f"{log}.out", "wb") as out, open(folder / f"{log}.err", "wb") as err:
            return subprocess.Popen(
                words,
                env=self.environment,
                cwd=folder,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    case: str
    what: str
    values: int
    difference: str | None


class Judge:
    """Runs commands with both checkouts and collects a row for each comparison."""

    def __init__(self, checkouts: tuple[Checkout, Checkout], text: Path, threads: int) -> None:
        self.checkouts, self.text, self.threads = checkouts, text, threads
        self.rows: list[Row] = []
        self.case, self.commands = "", 0

    def begin(self, case: str) -> None:
        self.case = case
        for folder in self.folders():
            folder.mkdir()

    def folders(self, name: str = "") -> list[Path]:
        """This case's folder of each checkout, or what is called `name` in it."""
        return [checkout.scratch / self.case / name for checkout in self.checkouts]

    def start(self, command: str) -> list[tuple[subprocess.Popen[bytes], Path]]:
        """Start a command with both; returns each process, and where its outputs go."""
        self.commands += 1
        log = f"log-{self.commands}-{command.split()[0]}"
        pairs = zip(self.checkouts, self.folders(), strict=True)
        return [(c.start(command.split(), folder, log), folder / log) for c, folder in pairs]

    def run(self, command: str) -> list[dict[str, Any]]:
        """Run one command with both, which must exit with 0; returns their --json outputs."""
        begun = self.start(f"{command} --json")
        codes = [wait(process) for process, _ in begun]
        for checkout, code, (_, log) in zip(self.checkouts, codes, begun, strict=True):
            if code != 0:
                lines = Path(f"{log}.err").read_text("utf-8", "replace").strip().splitlines()
                raise CaseFailedError(
                    f"{checkout.name}: pretrain {command[:80]} exits with {code}: "
                    + " | ".join(lines[-3:])
                )
        return [read_json(Path(f"{log}.out")) for _, log in begun]

    def write_config(self, words: str, run: str) -> None:
        given = settings_of(f"data.source {{text}} {TINY}", text=self.text)
        given |= {"train.threads": self.threads, **settings_of(words, text=self.text)}
        given = {name: value for name, value in given.items() if value is not None}
        for checkout, path in zip(self.checkouts, self.folders(f"{run}.yaml"), strict=True):
            checkout.write_config(given, path)

    def train(self, words: str, run: str = "run") -> None:
        """Train with both and compare everything that the runs recorded."""
        self.write_config(words, run)
        self.run(f"train {run}.yaml --run {run}")
        self.compare_runs(run)

    def compare_runs(self, run: str) -> None:
        self.compare(f"{run}: all recorded numbers", *map(recorded, self.folders(run)))
        self.compare(f"{run}: final tensors", *map(final_tensors, self.folders(run)))

    def compare(self, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        new = {n: value for n, value in new.items() if n in old or not ADDED.fullmatch(n)}
        difference = first_difference(old, new) if old else "nothing was found to compare"
        self.add(Row(case=self.case, what=what, values=len(old), difference=difference))

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise CaseFailedError(f"not so, the case shows nothing: {what}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        result = "equal" if row.difference is None else f"DIFFERS  {row.difference}"
        print(f"{row.case:<17} {row.what:<45} {row.values:>6,}  {result}", flush=True)


def wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(MOST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


# --- reading what they wrote -------------------------------------------------------------------


def recorded(run: Path) -> dict[str, Any]:
    """All that a run recorded, times and memory aside: metrics and samples whole, numbers of
    summary, baselines and predictions."""
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        leaves = flat(read_lines(run / name), METRIC_RENAMED)
        found |= {f"{name}{path}": leaf for path, leaf in leaves.items()}
    for name in ("summary.json", "baselines.json", "predictions.json"):
        leaves = flat(read_json(run / name), METRIC_RENAMED, numbers_only=True)
        found |= {f"{name}{path}": leaf for path, leaf in leaves.items()}
    return found


def final_tensors(run: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint, the optimizer's too, each process's slice by itself."""
    folders = sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())
    found = {"last step": np.array(int(folders[-1].name.removeprefix("step-")))}
    for file in sorted(folders[-1].glob("*.safetensors")):
        for name, values in read_safetensors(file).items():
            for pattern, new in TENSOR_RENAMED:
                name = re.sub(pattern, new, name)
            found[f"{file.stem}:{name}"] = values
    return found


def renamed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, values in tensors.items():
        for pattern, new in EXPORT_RENAMED:
            name = re.sub(pattern, new, name)
        found[name] = values
    return found


def prepared_files(folder: Path) -> dict[str, Any]:
    """The bytes of each file of a prepared folder, JSON objects (manifest, report) by content."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        name = FILE_RENAMED.get(name, name)
        if path.suffix == ".json":
            leaves = flat(read_json(path), MANIFEST_RENAMED)
            found |= {f"{name}{place}": leaf for place, leaf in leaves.items()}
        else:
            found[name] = np.frombuffer(path.read_bytes(), "u1")
    return found


# --- cases --------------------------------------------------------------------------------------


def train(words: str, judge: Judge) -> None:
    judge.train(words)


def spike(words: str, judge: Judge) -> None:
    """A training that says nothing unless a step of it was skipped or rolled back."""
    judge.train(words)
    word = "rollback" if "rollback" in words else "spike"
    for folder in judge.folders():
        leaves = flat(read_lines(folder / "run" / "metrics.jsonl"), METRIC_RENAMED).values()
        judge.expect(METRIC_RENAMED.get(word, word) in leaves, f"metrics.jsonl has a {word}")


def prepare(judge: Judge) -> None:
    text, near = judge.text, "--deduplicate near --filters"
    requests = {
        "bpe": f"{text}/part-*.txt --vocab-size 300",
        "characters": f"{text}/records.jsonl --text-field body {near} gopher,c4",
        "bytes": f"{text}/table.csv {near} fineweb --val-fraction 0.3",
        # Training it twice gives two vocabularies (tokenizers' order of equal counts), so once.
        "gpt": f"{text} --evaluation-text {text}/part-1.txt",
    }
    gpt = judge.text.parent / "gpt"
    trained = f"tokenizer train {judge.text} --vocab-size 400 --tokenizer gpt --out {gpt}"
    judge.checkouts[0].output("-m", "pretrain", *trained.split())
    for tokenizer, words in requests.items():
        name = gpt if tokenizer == "gpt" else tokenizer
        outputs = judge.run(f"prepare {words} --tokenizer {name} --out {tokenizer}")
        judge.compare(f"{tokenizer}: --json", *(flat(o, MANIFEST_RENAMED) for o in outputs))
        folders = judge.folders(tokenizer)
        how = "every byte" if same_bytes(*folders) else "bytes of files, JSON by content"
        judge.compare(f"{tokenizer}: {how}", *map(prepared_files, folders))
    outputs = judge.run(f"tokenizer encode {text.parent}/held-out.txt --tokenizer bpe/tokenizer")
    judge.compare("tokenizer encode: ids", *(flat(o, METRIC_RENAMED) for o in outputs))


def elastic(judge: Judge) -> None:
    words = f"{GPT2} parallel.elastic true train.micro_batch_rows 2 parallel.processes "
    judge.train(f"{words} 1", "one")
    judge.train(f"{words} 2", "two")
    for checkout, folder in zip(judge.checkouts, judge.folders(), strict=True):
        both = (recorded(folder / run) for run in ("one", "two"))
        judge.compare(f"{checkout.name}: one process / two", *both)


def kill(judge: Judge) -> None:
    """SIGKILL after a save, resume, and compare with the other checkout and with a whole run."""
    words = f"{GPT2} train.steps 80 train.save_every 5 train.evaluate_every 20"
    judge.train(words, "whole")
    judge.write_config(words, "killed")
    begun = judge.start("train killed.yaml --run killed")
    running = dict(zip(judge.folders("killed"), begun, strict=True))
    until = time.monotonic() + MOST_SECONDS
    while running and time.monotonic() < until:
        for run, (process, _) in list(running.items()):
            saved = any((run / "checkpoints").glob("step-*/manifest.json"))
            if saved and (run / "metrics.jsonl").read_bytes().count(b"\n") >= 12:
                os.killpg(process.pid, signal.SIGKILL)
            if process.poll() is not None:
                del running[run]
        time.sleep(0.002)
    for process, _ in begun:
        judge.expect(wait(process) == -signal.SIGKILL, "the run was killed before its end")
    judge.run("train --resume --run killed")
    judge.compare_runs("killed")
    for checkout, folder in zip(judge.checkouts, judge.folders(), strict=True):
        for what, read in (("numbers", recorded), ("tensors", final_tensors)):
            both = (read(folder / run) for run in ("whole", "killed"))
            judge.compare(f"{checkout.name}: {what}, whole / resumed", *both)


def go_on(judge: Judge) -> None:
    """Extend a run, anneal it, and start another from its weights."""
    judge.train("schedule.name constant")
    judge.run("extend run --train.steps 16")
    judge.compare_runs("run")
    judge.run("anneal run --train.steps 22 --schedule.final_fraction 0.1")
    judge.compare_runs("run")
    judge.train(f"train.init_from run train.steps 6 {INHERITED}", "from-run")


def recipes(judge: Judge) -> None:
    small = """--train.steps 6 --train.evaluate_tokens 512 --train.batch_tokens 128
        --model.d_model 32 --model.n_layers 2 --model.n_heads 2 --model.context_length 16"""
    for recipe in ("english", "characters", "transformer"):
        words = f"--train.threads {judge.threads} --train.device cpu --data.source {judge.text}"
        words += " --model.ngram_rows 512" if recipe != "transformer" else ""
        words += " --tokenizer.vocab_size 320" if recipe != "characters" else ""
        judge.run(f"train {recipe} {small} {words} --run {recipe}")
        judge.compare_runs(recipe)


def from_zero(value: Any, first_step: int) -> Any:
    """Return the JSON of `trace` with steps counted from 0, of a checkout that counts otherwise."""
    if isinstance(value, list):
        return [from_zero(each, first_step) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: each - first_step
        if key == "step" and isinstance(each, int)
        else from_zero(each, first_step)
        for key, each in value.items()
    }


def commands(judge: Judge) -> None:
    """Every command that reads a trained model."""
    judge.train("train.steps 30 model.tied_head true")
    text = judge.text.parent
    requests = [
        f"evaluate run --text {text}/held-out.txt --stride 8 --device cpu",
        f"evaluate run --task-file {text}/choice.jsonl {text}/cloze.jsonl --shots 1",
        f"compare run run/checkpoints/step-00000025 --text {judge.text}/table.csv",
        "generate run --prompt The --max-tokens 24 --temperature 0",
        "generate run --prompt The --max-tokens 24 --seed 7 --n 2 --top-k 20 --top-p 0.9",
        "next run --prompt The --top 20",
        "trace run --step 4",  # from 0; a checkout that counts from 1 is given 5
        "trace run --document doc-50",
    ]
    for words in requests:
        numbers_only = words.startswith(("evaluate", "compare"))
        outputs = judge.run(words)
        if words.startswith("trace"):
            outputs = [
                from_zero(output, checkout.first_step)
                for output, checkout in zip(outputs, judge.checkouts, strict=True)
            ]
        read = (flat(o, METRIC_RENAMED, numbers_only=numbers_only) for o in outputs)
        judge.compare(words.replace(f"{text}/", "")[:44], *read)
    for form in ("hf", "gguf"):
        judge.run(f"export run --format {form} --out {form} --unverified")
        tensors = [renamed(exported_tensors(folder)) for folder in judge.folders(form)]
        judge.compare(f"export {form}", *tensors)
        files = [f"{form}/{path.name}" for path in judge.folders(form)[0].glob("*.gguf")]
        judge.run(f"import {(files or [form])[0]} --out from-{form}")
        judge.compare(f"import {form}", *map(final_tensors, judge.folders(f"from-{form}")))


CASES: dict[str, Callable[[Judge], None]] = {
    "prepare": prepare,
    **{name: partial(train, words) for name, words in TRAININGS.items()},
    **{name: partial(spike, words) for name, words in SPIKES.items()},
    **{name: partial(train, f"{w} parallel.processes 2") for name, w in PROCESSES.items()},
    "elastic": elastic,
    "kill": kill,
    "go-on": go_on,
    "recipes": recipes,
    "commands": commands,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path, nargs="?", help="checkout whose numbers are right")
    parser.add_argument("new", type=Path, nargs="?", help="checkout to judge")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="beginnings of names"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for runs and logs")
    parser.add_argument("--threads", type=int, default=1, help="of each process [1]")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return 0
    chosen = [name for name in CASES if name.startswith(tuple(args.only))]
    if args.old is None or args.new is None or not chosen:
        parser.error("two checkouts are needed, and at least one case (see --list)")
    scratch = args.keep.resolve() if args.keep else Path(tempfile.mkdtemp(prefix="same-numbers-"))
    began = time.perf_counter()
    try:
        old = Checkout("old", args.old, scratch / "old", args.threads)
        new = Checkout("new", args.new, scratch / "new", args.threads)
        write_text(scratch / "text")
        judge = Judge((old, new), scratch / "text" / "corpus", args.threads)
        for name in chosen:
            judge.begin(name)
            try:
                CASES[name](judge)
            except (CaseFailedError, OSError, ValueError, KeyError, IndexError) as error:
                judge.add(Row(case=name, what="FAILED", values=0, difference=repr(error)))
    finally:
        if args.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
    red = [row for row in judge.rows if row.difference is not None]
    values = sum(row.values for row in judge.rows)
    print(
        f"{len(judge.rows)} comparisons of {values:,} values in {len(chosen)} cases: "
        f"{len(red)} differ; {time.perf_counter() - began:.0f} s"
    )
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
