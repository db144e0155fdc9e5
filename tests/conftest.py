"""Which tests run where: gpu tests need a CUDA device, slow ones need -m slow; shared fixtures."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import TINY

# Files that take minutes start first, so that no worker is left alone with one at the end.
LONG_FILES = ("test_docs.py", "test_verify.py", "test_parallel.py", "test_faults.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this command cannot run."""
    if not config.getoption("-m"):
        slow = pytest.mark.skip(reason="takes minutes; run it with -m slow or make test-long")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch  # only here: it takes seconds, and most test files do without

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """Let a closed terminal end what tests start: children of nohup ignore that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl of 60 short real documents, 120 kB: the beginnings of the bundled ones."""
    from pretrain.corpus.reading import read_documents

    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    documents = list(read_documents("bundled"))[::6]
    lines = [json.dumps({"title": d.title, "text": d.text[:2000]}) for d in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the prepared text of the tests apart from the user's own."""
    before = os.environ.get("PRETRAIN_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["PRETRAIN_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["PRETRAIN_CACHE"]
    else:
        os.environ["PRETRAIN_CACHE"] = before


@pytest.fixture(scope="session")
def finished_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on the small corpus."""
    from pretrain.cli import main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    args = ["train", str(corpus), "--run", str(folder), *TINY, "--train.steps", "12"]
    assert main(args) == 0
    return folder


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> None:
    """Shorten samples, which are most of the cost of evaluating a tiny model."""
    from pretrain.train import eval_hooks

    eval_hooks.SAMPLE_TOKENS = 8
