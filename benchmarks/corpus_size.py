"""Training tokens a second on 25 MB, 250 MB and 2.5 GB of text: are they the same?

python benchmarks/corpus_size.py [--rounds 9] [--threads 1] [--folder F]

The texts are copies of the bundled corpus, of which each document begins with the number of its
copy, so that none is a duplicate; all have one tokenizer. In a round a new process for each size
opens its corpus and makes steps of the recipe `english`, batch and all, one by turns; a ratio is
one of a round. New processes, because two on the same corpus differ by up to 4 % as long as they
live. 2.5 GB take minutes to prepare, and 8 GB of disk meanwhile; F keeps them for the next time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from line_process import LineProcess
from quiet import quiet_rounds
from rows import OURS, Row, spread, table

from pretrain.config import compose
from pretrain.corpus.reading import read_documents
from pretrain.data.batches import MicroBatch
from pretrain.data.format import is_prepared, open_prepared
from pretrain.data.preparation import prepare
from pretrain.distributed import open_world
from pretrain.machine import usable_cores
from pretrain.runner.request import read_target
from pretrain.train.build import training_batches, trial_steps
from pretrain.train.config import filled
from pretrain.train.resolve import resolve, resolve_precision

MEGABYTES = (25, 250, 2500)
WARM_TURNS, TURNS = 2, 10
ENDLESS = 1_000_000  # steps, of which as many are made as are asked for


def write_copies(folder: Path, *, n_bytes: float) -> None:
    """Copies of the bundled corpus, a file each, until there is so much text."""
    texts = [document.text for document in read_documents("bundled")]
    written = 0
    for copy in count(1):
        with open(folder / f"{copy:05}.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                text = f"Copy {copy}.\n{text}"
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= n_bytes:
                    return


def corpora(folder: Path) -> dict[int, Path]:
    """A prepared folder for each size; those that are not there are made."""
    if not is_prepared(folder / "first"):
        prepare("bundled", folder / "first")
    tokenizer = folder / "first" / "tokenizer"
    found = {size: folder / f"{size}-MB" for size in MEGABYTES}
    for size, out in found.items():
        if not is_prepared(out):
            with tempfile.TemporaryDirectory(dir=folder) as texts:
                write_copies(Path(texts), n_bytes=size * 1e6)
                prepare(texts, out, tokenizer=tokenizer, workers=usable_cores())
    return found


def serve(folder: str, threads: int) -> None:
    """For each line: open the corpus again, make a step, and say what took how long."""
    config = compose([*read_target("english")[1], {"data": {"source": folder}}])
    world, data = open_world("cpu", threads=threads), open_prepared(folder)
    # That its steps are given makes a calibration unnecessary; the precision is the real run's.
    train = replace(config.train, steps=ENDLESS, precision=resolve_precision(config.train, world))
    config = resolve(replace(config, train=train), data, world)
    reading = 0.0

    def read(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        nonlocal reading
        began = time.perf_counter()
        for batch in batches:
            reading += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    tokens = filled(config.train.batch_tokens)
    updates = trial_steps(config, data, world, steps=ENDLESS, read=read)
    for _ in sys.stdin:
        began = time.perf_counter()
        next(training_batches(config, open_prepared(folder)).at(0))
        opened, reading = time.perf_counter(), 0.0
        seconds = next(updates)
        found = [tokens / seconds, reading / seconds, opened - began]
        print(json.dumps([*found, world.peak_memory_bytes()]), flush=True)


def one_round(folders: dict[int, Path], threads: int) -> dict[int, list[float]]:
    """The medians of what a new process for each size answers."""
    words = [__file__, "--serve"]
    everybody = {size: LineProcess([*words, str(at), str(threads)]) for size, at in folders.items()}
    turns = []
    for turn in range(WARM_TURNS + TURNS):
        turns.append({n: everybody[n].ask() for n in sorted(everybody, reverse=turn % 2 == 1)})
    for each in everybody.values():
        each.stop()
    answers = {size: [turn[size] for turn in turns[WARM_TURNS:]] for size in everybody}
    return {size: np.median(found, axis=0).tolist() for size, found in answers.items()}


def measure(
    *, rounds: int, threads: int | None = None, folder: Path | None = None
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folders = corpora(folder or Path(temporary))
        each_has = threads or usable_cores()
        found, others = quiet_rounds(lambda _: one_round(folders, each_has), rounds=rounds)
    least = MEGABYTES[0]
    for size in MEGABYTES:
        speeds, *shares, peaks = zip(*(each[size] for each in found), strict=True)
        reading, opening = map(statistics.median, shares)
        ratios = [each[size][0] / each[least][0] for each in found]
        over = "" if size == least else f"{spread(ratios)} times that on {least:,} MB; "
        yield Row(
            what=f"training on {size:,} MB of text",
            who=OURS,
            unit="tokens/s",
            values=speeds,
            others=others,
            memory=max(peaks),
            note=f"{over}reading is {reading:.2%} of a step; opened in {1000 * opening:.0f} ms",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="all cores if it is left out")
    parser.add_argument("--folder", type=Path, help="where prepared texts are kept")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if serving := args.pop("serve"):
        serve(serving[0], int(serving[1]))
    else:
        print("\n".join(table(measure(**args))))


if __name__ == "__main__":
    main()
