"""How fast a corpus is prepared, a line for each kind of work, side by side with other ways.

    pip install "xxhash<4" orjson  # for datatrove
    python benchmarks/preparing.py CORPUS.jsonl[.zst] [--megabytes 60] [--workers 2]

The corpus has a document a line in the field `text`. Each line of the table is one run over the
same documents; times are wall clock, texts are counted in UTF-8. What others do is run as they do
it: nanoGPT's prepare.py calls tiktoken's encode_ordinary on each document and writes a memmap of
uint16; datatrove runs its MinHash signatures, its filters (with a plain word splitter, without
which they are seven times slower) and its DocumentTokenizer by its local executor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.corpus.duplicates import band_hashes
from pretrain.corpus.filters import apply_filters, language_of
from pretrain.corpus.reading import read_documents
from pretrain.tokenizer.byte_level import symbol_bytes
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.train import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), arguments.corpus, arguments.megabytes, arguments.workers)
        for measure in (bench.ours, bench.parts_of_ours, bench.nanogpt, bench.datatrove):
            measure()


class Bench:
    """The documents that everybody gets, and the table."""

    def __init__(self, folder: Path, corpus: Path, megabytes: float, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.source = folder / "corpus.jsonl"
        self.texts: list[str] = []
        self.n_bytes = 0

        def keep_document(_: object) -> bool:
            return self.n_bytes < megabytes * 1e6

        with open(self.source, "w", encoding="utf-8") as file:
            for document in takewhile(keep_document, read_documents(corpus)):
                self.texts.append(document.text)
                self.n_bytes += len(document.text.encode())
                line = {"id": document.id, "text": document.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        load_tokenizer("gpt2").save(folder / "gpt2")
        train_tokenizer(iter(self.texts), vocab_size=32_768).save(folder / "32k")
        print(f"{len(self.texts):,} documents, {self.n_bytes / 1e6:.1f} MB of text")

    def time(self, name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        print(f"{name:<58} {seconds:7.1f} s {self.n_bytes / 1e6 / seconds:8.1f} MB/s", flush=True)

    def prepare(self, *options: str) -> None:
        out = self.folder / "out"
        command = [sys.executable, "-m", "pretrain", "prepare", str(self.source), "--out", str(out)]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(out)

    def ours(self) -> None:
        """Whole commands, start of Python included."""
        for workers in dict.fromkeys((1, self.workers)):
            given = ["--tokenizer", str(self.folder / "32k"), "--workers", str(workers)]
            for name, options in (
                ("exact duplicates", []),
                ("near duplicates", ["--deduplicate", "near"]),
                ("and all filters", ["--deduplicate", "near", "--filters", "gopher,fineweb"]),
            ):
                title = f"pretrain prepare, 32,768 entries, {name}, {workers} workers"
                self.time(title, lambda o=[*given, *options]: self.prepare(*o))

    def parts_of_ours(self) -> None:
        """Single kinds of work in one process."""
        tokenizer = load_tokenizer("gpt2")
        self.time("  encode, gpt2", lambda: [tokenizer.encode(text) for text in self.texts])
        self.time("  MinHash signatures", lambda: [band_hashes(text) for text in self.texts])
        for name in ("gopher", "c4", "fineweb"):
            self.time(
                f"  filter {name}", lambda n=name: [apply_filters(t, [n]) for t in self.texts]
            )
        self.time("  language", lambda: [language_of(text) for text in self.texts])
        self.time(
            "  train a tokenizer of 32,768 entries",
            lambda: train_tokenizer(iter(self.texts), vocab_size=32_768),
        )

    def nanogpt(self) -> None:
        """tiktoken a document at a time, in one process."""
        import tiktoken

        vocabulary = json.loads((self.folder / "gpt2/tokenizer.json").read_text("utf-8"))["model"]
        symbols = symbol_bytes()
        ranks = {
            bytes(symbols[c] for c in t): i for t, i in vocabulary["vocab"].items() if i < 50256
        }
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
        )

        def work() -> None:
            ids: list[np.ndarray[Any, Any]] = []
            with open(self.source, encoding="utf-8") as file:
                for line in file:
                    found = encoding.encode_ordinary(json.loads(line)["text"])
                    ids.append(np.array([*found, 50256], np.uint16))
            np.concatenate(ids).tofile(self.folder / "nanogpt.bin")

        self.time("nanoGPT's way: tiktoken, one process, nothing checked", work)

    def datatrove(self) -> None:
        """Its own steps by its local executor, a task a worker."""
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline import filters
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer
        from datatrove.utils.word_tokenizers import WordTokenizer

        class Spaces(WordTokenizer):  # type: ignore[misc]
            def word_tokenize(self, text: str) -> list[str]:
                return text.split()

            def sent_tokenize(self, text: str) -> list[str]:
                return text.split(". ")

            def span_tokenize(self, text: str) -> list[tuple[int, int]]:
                return [(0, 1)]

        # It reads a file a task, so the corpus is dealt out.
        shards = self.folder / "shards"
        shards.mkdir()
        lines = self.source.read_text(encoding="utf-8").splitlines(keepends=True)
        for worker in range(self.workers):
            part = "".join(lines[worker :: self.workers])
            (shards / f"{worker}.jsonl").write_text(part, encoding="utf-8")

        def run(*steps: Any) -> None:
            LocalPipelineExecutor(
                pipeline=[JsonlReader(str(shards)), *steps],
                tasks=self.workers,
                workers=self.workers,
                logging_dir=str(Path(tempfile.mkdtemp(dir=self.folder))),
            ).run()

        n, words = self.workers, Spaces()
        config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
        out = str(self.folder / "datatrove")
        self.time(
            f"datatrove: MinHash signatures, {n} workers",
            lambda: run(MinhashDedupSignature(out + "/sig", config=config, language=words)),
        )
        self.time(
            f"datatrove: Gopher's two and FineWeb's filters, {n} workers",
            lambda: run(
                filters.GopherQualityFilter(language=words),
                filters.GopherRepetitionFilter(language=words),
                filters.FineWebQualityFilter(language=words),
            ),
        )
        tokenizer = str(self.folder / "32k/tokenizer.json")
        self.time(
            f"datatrove: DocumentTokenizer, 32,768 entries, {n} workers",
            lambda: run(DocumentTokenizer(out + "/ids", tokenizer_name_or_path=tokenizer)),
        )


if __name__ == "__main__":
    main()
