"""A run's text as token ids: prepared folders that the config names, or prepared once and cached.

The cache is keyed by sources and settings, so that a second run on the same text starts at once.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pretrain.config import RunConfig
from pretrain.data.format import MixedData, PreparedData, StandingData, is_prepared, open_prepared
from pretrain.data.preparation import prepare, prepared_key
from pretrain.run.directory import TOKENIZER
from pretrain.tokenizer.config import TRAINED_NAMES

if TYPE_CHECKING:
    from pretrain.distributed import World
    from pretrain.runner.open import LoadedModel

Log = Callable[[str], None]
# Seconds between two messages about one stage of a long preparation.
_STAGE_SECONDS = 10.0
_SET_CACHE = (
    "set the environment variable PRETRAIN_CACHE to a folder in which prepared text can be kept"
)


class LastingStream:
    """A text stream that writes to nowhere once its reader has left, such as `head`, or its
    terminal is closed: the run that it reports on continues."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 - open until the end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            n_characters = self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in {errno.EPIPE, errno.EIO}:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return len(text)
        return n_characters


def log_to(stream: TextIO) -> Log:
    """Return a function that prints a message to a stream at once."""
    return partial(print, file=stream, flush=True)


def cache_folder() -> Path:
    """Return the folder for prepared text: PRETRAIN_CACHE, or pretrain/ in the user's cache.
    ValueError for a user without a home, as a container may have."""
    if folder := os.environ.get("PRETRAIN_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise ValueError(f"this user has no home folder; {_SET_CACHE}")
    return Path(base, "pretrain")


def open_text(
    config: RunConfig, log: Log, world: World | None = None, *, run: Path | None = None
) -> PreparedData:
    """Open the run's text, prepared first if necessary; of several processes rank 0 prepares it
    while the others wait."""
    if world is not None and not world.is_main:
        world.wait_for_main()
    first, n_more = config.data.paths[:4], len(config.data.paths[4:])
    log(f"text: {', '.join(first)}" + (f" and {n_more:,} more" if n_more else ""))
    data = prepared_text(config, log=log, run=run)
    if world is not None and world.is_main:
        world.wait_for_main()
    return data


def prepared_text(
    config: RunConfig, *, log: Log = lambda message: None, run: Path | None = None
) -> PreparedData:
    """Open the prepared folders that data.source names, or the cached (else newly prepared) ids of
    its texts. If the path of the tokenizer is gone, the copy in the folder of `run` is used."""
    data = config.data
    prepared = [path for path in data.paths if is_prepared(path)]
    if prepared and len(prepared) < len(data.paths):
        raise ValueError(
            f"data.source must not mix prepared folders and texts ({prepared[0]!r} is prepared); "
            "prepare the texts too (pretrain prepare TEXT --out DIR, with the same tokenizer), or "
            "name texts only"
        )
    if prepared and data.base is not None:
        raise ValueError(
            f"data.base must come with texts, not with a prepared folder ({prepared[0]!r}), which "
            "has a tokenizer of its own; name the text that it was prepared from"
        )
    if prepared and data.fold:
        raise ValueError(
            f"data.fold must be 0 with a prepared folder ({prepared[0]!r}), whose held-out text is "
            "fixed; name the text that it was prepared from"
        )
    if prepared:
        return _mixed(config, [open_prepared(path) for path in prepared])

    tokenizer = config.tokenizer.name
    is_path = tokenizer not in (*TRAINED_NAMES, "gpt2")
    if is_path and run is not None and not Path(tokenizer).exists():
        tokenizer = str(run / TOKENIZER)
    cached = partial(_cached, config, log=log)
    vocab_size = config.tokenizer.vocab_size
    if data.base is None:
        return _mixed(config, [cached(data.paths, tokenizer, vocab_size)])
    is_ready = is_prepared(data.base)
    base = open_prepared(data.base) if is_ready else cached([data.base], tokenizer, vocab_size)
    return StandingData(data, base, cached(data.paths, str(base.folder / TOKENIZER), None))


def _cached(
    config: RunConfig, paths: Sequence[str], tokenizer: str, vocab_size: int | None, *, log: Log
) -> PreparedData:
    """Open the ids of texts in the cache, prepared first if they are not there."""
    data = config.data
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "text_field": data.text_field,
        "document_separator": data.document_separator,
        "val_fraction": data.val_fraction,
        "fold": data.fold if tuple(paths) == data.paths else 0,  # of a larger text always 0
        "corpus": config.corpus,
    }
    folder = cache_folder() / "prepared" / prepared_key(paths, **settings)
    if folder.exists():
        try:
            return open_prepared(folder)
        except ValueError as error:
            damaged = folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(2)}")
            with suppress(FileNotFoundError):  # another process was faster
                folder.rename(damaged)
            log(f"note: {error}: this is done now; the damaged folder is {damaged}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        message = f"{error.strerror}; {_SET_CACHE}"
        raise OSError(error.errno, message, str(folder.parent)) from None
    with suppress(FileExistsError):  # another run has prepared the same text meanwhile
        prepare(paths, folder, progress=stage_progress(log), **settings)
    return open_prepared(folder)


def _mixed(config: RunConfig, parts: list[PreparedData]) -> PreparedData:
    """Return the text of one source, or the mixture of a list of sources."""
    if config.data.mixture:
        return MixedData(config.data, parts)
    if len(parts) > 1:
        raise ValueError(
            "data.source has several prepared folders; each must have its weight or epochs: "
            "- {path: FOLDER, epochs: 1}"
        )
    return parts[0]


def text_of_run(model: LoadedModel, log: Log) -> PreparedData:
    """Open the text that a model was trained on here, verified by the hashes in its fingerprint;
    from the cache where its sources were moved or deleted. ValueError where only another text is
    there, and for a model of others."""
    config = model.config
    fingerprint = {} if model.checkpoint is None else model.checkpoint.state.get("fingerprint", {})
    if "training text" not in fingerprint:
        raise ValueError(
            f"{model.path} was not trained here, so there is no training text and no held-out "
            "text; score files with --text, without --overlap"
        )

    def has_same_hashes(data: PreparedData) -> bool:
        hashes = {
            "tokenizer": data.manifest.tokenizer_sha256,
            "training text": data.split("train").sha256,
            "held-out text": data.split("val").sha256,
        }
        return hashes.items() <= fingerprint.items()

    try:
        data = prepared_text(config, log=log, run=model.path.parent.parent)
    except ValueError:
        for folder in filter(is_prepared, (cache_folder() / "prepared").glob("*")):
            with suppress(ValueError):  # a damaged one
                data = _mixed(config, [open_prepared(folder)])
                if has_same_hashes(data):
                    return data
        raise
    if not has_same_hashes(data):
        raise ValueError(
            f"the text at {', '.join(config.data.paths)} has changed since the run; score your own "
            "files with --text"
        )
    return data


def stage_progress(log: Log) -> Callable[[str, float], None]:
    """Return a progress callback (stage, fraction) that logs when a stage starts, and then at most
    every ten seconds how far it is."""
    last_stage, last_time = "", 0.0

    def report(stage: str, fraction: float) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        if stage != last_stage:
            log(f"{stage} ...")
        elif now - last_time > _STAGE_SECONDS:
            log(f"{stage}: {fraction:.0%}")
        else:
            return
        last_stage, last_time = stage, now

    return report
