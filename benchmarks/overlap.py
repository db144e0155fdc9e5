"""What it costs to make a filter of a corpus and to walk through it for the longest stretches.

    python benchmarks/overlap.py --times 22

The bundled corpus is prepared and read `--times` times, as if it were as many corpora: CPU time of
one core, the size of the filter, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from pretrain.corpus.overlap import corpus_ngram_filter, longest_matches
from pretrain.data.format import open_prepared
from pretrain.evaluate.overlap import document_texts

N_TEXTS, TEXT_CHARACTERS = 96, 600  # about what `evaluate --overlap` looks for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=22, help="how often the corpus is read [22]")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that its memory is not counted here.
        words = [sys.executable, "-m", "pretrain", "prepare", "bundled", "--out"]
        subprocess.run([*words, f"{folder}/prepared"], check=True, stdout=subprocess.DEVNULL)
        data = open_prepared(f"{folder}/prepared")
        stream, tokenizer = data.split("train"), data.tokenizer()

        def pieces() -> Iterator[tuple[int, str]]:
            for turn in range(times):
                for number, text in document_texts(stream, tokenizer):
                    yield turn * stream.n_documents + number, text

        begun = time.process_time()
        corpus = corpus_ngram_filter(pieces)
        filtered = time.process_time()
        held_out = "".join(text for _, text in document_texts(data.split("val"), tokenizer))
        gap = len(held_out) // N_TEXTS
        texts = [held_out[k * gap : k * gap + TEXT_CHARACTERS] for k in range(N_TEXTS)]
        longest_matches(texts, pieces())
        walked = time.process_time()
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{stream.n_bytes * times / 1e6:.0f} MB: a filter of {corpus.n_bytes / 1e6:.0f} MB in "
        f"{filtered - begun:.0f} s, a walk in {walked - filtered:.0f} s, at most "
        f"{memory / 1e6:.0f} MB of memory"
    )


if __name__ == "__main__":
    main()
