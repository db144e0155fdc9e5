"""Texts -> ids in the order of the texts, by this process or by several others.

The result does not depend on how many there are: each batch is encoded by itself, and batches come
out in the order in which they went in. At most two batches a worker wait, so memory is bounded.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pretrain.tokenizer.loading import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer

Batch = TypeVar("Batch")
_worker_tokenizer: Tokenizer | None = None


def encode_batches(
    batches: Iterable[Batch],
    texts_of: Callable[[Batch], list[str]],
    *,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int,
) -> Iterator[tuple[Batch, list[NDArray[np.int64]]]]:
    """Each batch with the ids of its texts. `folder` is where the tokenizer is saved; with more
    than one worker a script must have the usual `if __name__ == "__main__"`."""
    if workers == 1:
        for batch in batches:
            yield batch, tokenizer.encode_batch(texts_of(batch))
        return
    # Not fork: a forked process inherits locks of threads that it does not have.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(folder, os.getpid())
    ) as pool:
        waiting: deque[tuple[Batch, Future[list[NDArray[np.uint32]]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, texts_of(batch))))
            if len(waiting) > 2 * workers:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)


def _taken(
    waiting: deque[tuple[Batch, Future[list[NDArray[np.uint32]]]]],
) -> tuple[Batch, list[NDArray[np.int64]]]:
    batch, future = waiting.popleft()
    return batch, [ids.astype(np.int64) for ids in future.result()]


def _begin(folder: Path, parent: int) -> None:
    """Make this process a worker, which ends with its parent however that ends."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker_tokenizer = load_tokenizer(folder)


def _encode(texts: list[str]) -> list[NDArray[np.uint32]]:
    assert _worker_tokenizer is not None
    # Half the bytes to send.
    return [ids.astype(np.uint32) for ids in _worker_tokenizer.encode_batch(texts)]
