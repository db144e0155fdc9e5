"""Text -> a prepared folder: run a job's stages, then join the results to two streams of ids.

`prepare` does all of it in this process or in several; `begin`, `cluster_tasks` and `finish` are
its parts for those who run the tasks elsewhere. The job is in a folder next to the requested one,
so a killed preparation resumes there, and the requested folder appears under its name only when it
is complete. ValueError for impossible settings, FileExistsError for an output that is not empty.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.files import Source, SourceFile, list_files
from pretrain.corpus.filters import language_of
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.data.format import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    REPORT_NAME,
    SPLITS,
    Manifest,
    PreparedData,
    StreamInfo,
    Streams,
    id_bytes,
    is_prepared,
    open_prepared,
)
from pretrain.data.jobs import JOB_VERSION, Job, Settings, Stage, discard
from pretrain.data.stages import (
    STAGES,
    UNENCODABLE,
    reading_folders,
    reading_report,
    removed_documents,
)
from pretrain.data.writer import Compression, compression_outliers, extremes, join_stream
from pretrain.fileio import (
    WORK,
    file_lock,
    is_fixed,
    move_into_place,
    read_json,
    require_empty,
    write_json,
)
from pretrain.tokenizer.config import TRAINED_NAMES, TokenizerConfig
from pretrain.tokenizer.load import NAMING_FILES, load_tokenizer, tokenizer_files

Progress = Callable[[str, float], object]
"""Called with the title of a stage and the fraction of it that is done, 0 to 1."""
MAX_OPENED_FILES = 1000
"""Files that are opened to see whether a text has changed since it was prepared."""
_END_BYTES = 4096


def prepare(
    source: Source,
    out: str | Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_field: str | None = None,
    document_separator: str | None = None,
    val_fraction: float | None = None,
    fold: int = 0,
    strict: bool = False,
    corpus: CorpusConfig | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> PreparedData:
    """Turn a file, a folder, "bundled" or several of them into a prepared folder, and open it.

    `tokenizer` is bpe, gpt, characters or bytes, trained here on the training split (characters: on
    all text), gpt2, or the path of one. `corpus` configures filters and deduplication. The bytes
    depend neither on `workers`, the number of processes, nor on whether one was killed and the call
    repeated. `stages.choose_split` chooses the validation text, part `fold`. Raises ValueError for
    text that cannot be read and for impossible settings, FileExistsError if `out` is in use.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1 (got {workers})")
    progress = progress or (lambda *_: None)
    settings = _settings(
        source,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_field=text_field,
        document_separator=document_separator,
        val_fraction=val_fraction,
        fold=fold,
        strict=strict,
        corpus=corpus or CorpusConfig(),
    )
    _check(settings)
    work = work_folder(out)
    # Others that prepare the same folder wait, and then find it complete.
    with file_lock(work.with_name(f"{work.name}.lock"), wait=True):
        job = _begin(settings, Path(out))
        for path in job.folder.glob("*/*.*-*"):  # what killed processes left of tasks
            shutil.rmtree(path, ignore_errors=True)
        try:
            if not is_prepared(out):
                _run_stages(job, workers=workers, progress=progress)
            return finish(job, out, progress=progress)
        except ValueError:
            # Text that cannot be prepared leaves nothing behind; a job that was stopped stays.
            discard(job.folder)
            raise


def begin(source: Source, out: str | Path, **options: Any) -> Job:
    """Create or find the job of `prepare` with the same options. Run its `cluster_tasks` where its
    folder can be seen, then call `finish`."""
    settings = _settings(source, **options)
    _check(settings)
    return _begin(settings, Path(out))


def _run_stages(job: Job, *, workers: int, progress: Progress) -> None:
    """Run all unfinished tasks of all stages, with `workers` processes.

    With more than one a script must have the usual `if __name__ == "__main__"`. A worker that dies
    is an OSError; finished tasks stay.
    """
    with ExitStack() as opened:
        pool: ProcessPoolExecutor | None = None
        for number, stage in enumerate(STAGES):
            tasks = job.unfinished_tasks(stage)
            if workers == 1 or len(tasks) < 2:
                _run_here(job, stage, tasks, progress)
                continue
            if pool is None:
                # Not fork: a forked process inherits locks of threads that it does not have.
                spawn = get_context("spawn")
                pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
                opened.callback(pool.shutdown, cancel_futures=True)
            progress(stage.title, 0.0)
            try:
                try:
                    # Python starts workers in submit; if one dies in the meantime, submit finds a
                    # closed pipe.
                    futures = {pool.submit(_run_in_worker, job.folder, number, n): n for n in tasks}
                except (ValueError, OSError) as cause:
                    raise BrokenProcessPool from cause
                for n_done, future in enumerate(as_completed(futures), 1):
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    if error is not None:
                        # Repeat it here: it fails in the same way, with a traceback of this
                        # process.
                        job.run_task(stage, futures[future])
                    progress(stage.title, n_done / len(tasks))
            except BrokenProcessPool:
                raise OSError(
                    errno.ENOMEM,
                    f"a worker was killed while {stage.title}, possibly out of memory; the same "
                    "command resumes where it stopped, and needs less memory with fewer --workers",
                ) from None


def _run_here(job: Job, stage: Stage, tasks: list[int], progress: Progress) -> None:
    n_done = 0

    def show(fraction: float, title: str = stage.title) -> None:
        progress(title, (n_done + min(fraction, 1.0)) / len(tasks))

    job.on_fraction = show
    for n_done, task in enumerate(tasks):  # noqa: B007 - `show` reads it
        show(0.0)
        job.run_task(stage, task)
        show(1.0)


def _start_worker() -> None:
    """Make a new worker ignore Ctrl-C, and exit when its parent dies, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


_job_of_worker = lru_cache(maxsize=1)(Job)


def _run_in_worker(folder: Path, number: int, task: int) -> None:
    _job_of_worker(folder).run_task(STAGES[number], task)


ClusterTask = Callable[[Any, int, int], None]
"""A pipeline step of datatrove, which calls it with (data, rank, world_size)."""


def cluster_tasks(job: Job) -> list[ClusterTask]:
    """One callable for each stage of a job, for datatrove's executors (local, Slurm, Ray).

    They are to be run in this order by any number of tasks, each stage after all tasks of the one
    before; then `finish` is to be called. All machines must see the job's folder; nothing else is
    sent between them. A task that dies may be run again by anybody.
    """
    return [partial(_run_cluster_task, job.folder, number) for number in range(len(STAGES))]


def _run_cluster_task(folder: Path, number: int, _: Any, rank: int, world_size: int) -> None:
    job = Job(folder)
    stage = STAGES[number]
    for task in range(rank, stage.n_tasks(job), world_size):
        job.run_task(stage, task)


def finish(job: Job, out: str | Path, *, progress: Progress = lambda *_: None) -> PreparedData:
    """Write the prepared folder of a job whose stages are all complete, open it, and remove the
    job."""
    out = Path(out)
    if not is_prepared(out):  # else a kill came between the rename and the removal of the job
        folder = _write_folder(job, progress)
        move_into_place(folder, out)
    progress("writing", 1.0)
    discard(job.folder)
    return open_prepared(out)


def _write_folder(job: Job, progress: Progress) -> Path:
    """Write all files of the prepared folder inside the job's folder; returns their folder.

    ValueError if a split would be empty.
    """
    for stage in STAGES:
        unfinished = job.unfinished_tasks(stage)
        if unfinished:
            raise RuntimeError(
                f"{len(unfinished)} of {stage.n_tasks(job)} tasks of the stage {stage.name!r} are "
                "not finished; run the stages again, what is finished stays"
            )
    folder = job.folder / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = job.tokenizer
    tokenizer.save(folder / "tokenizer")
    report = _total_report(job)
    encoded = [job.task_folder("encode", task) for task in range(len(job.shards))]

    def parts(done: float) -> Iterator[tuple[Path, str]]:
        for number, shard in enumerate(job.shards):
            progress("writing", done + number / len(encoded) / len(SPLITS))
            yield encoded[number], shard.source

    streams: dict[str, StreamInfo] = {}
    ids = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    for name in SPLITS:
        streams[name] = join_stream(folder, parts(len(streams) / len(SPLITS)), name=name, **ids)
        if streams[name].n_documents == 0:
            documents = f"{(n := report['n_kept_documents']):,} document{'s' * (n != 1)}"
            raise ValueError(
                f"the text is too small: {report['n_kept_text_bytes']:,} bytes in {documents}, "
                f"and nothing is left for the {'training' if name == 'train' else 'held-out'} "
                "text; use more text, or longer documents"
                + (f"; removed were {report['removed']}" if report["removed"] else "")
            )
    filtered = []
    if job.settings.corpus.inspects_text:
        filtered = [job.task_folder("filter", task) for task in range(len(job.read_shards))]
    listed = {"problems.jsonl": reading_folders(job), "removed.jsonl": [*filtered, *encoded]}
    for file_name, folders in listed.items():
        with open(folder / file_name, "xb") as file:
            for each in folders:
                with open(each / file_name, "rb") as part:
                    shutil.copyfileobj(part, file)
    report["n_tokens"] = {name: info.n_tokens for name, info in streams.items()}
    write_json(folder / REPORT_NAME, report)

    split = job.task_report("split")
    # The manifest has what the ids depend on; names and paths of this machine are in the report.
    settings = asdict(job.settings) | {"val_fraction": split["split"]["val_fraction"]}
    del settings["sources"]
    if settings["document_separator"] is None:  # as before there was this setting
        del settings["document_separator"]
    if not settings["fold"]:
        del settings["fold"]
    del settings["corpus"]["evaluation_texts"]
    if job.settings.tokenizer not in TRAINED_NAMES:
        settings["tokenizer"] = "given"
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        package_version=__version__,
        vocab_size=tokenizer.vocab_size,
        id_bytes=id_bytes(tokenizer.vocab_size),
        start_of_text=tokenizer.start_of_text,
        end_of_text=tokenizer.end_of_text,
        tokenizer_sha256=tokenizer.sha256,
        source_sha256=split["source_sha256"],
        split_policy=split["split"]["policy"],
        settings=settings,
        streams=Streams(**streams),
    )
    write_json(folder / MANIFEST_NAME, asdict(manifest))
    return folder


_SOURCE_COUNTS = ("n_files", "n_documents", "n_text_bytes")


def _total_report(job: Job) -> dict[str, Any]:
    """The reports of all tasks added up: report.json without the sizes of the streams."""
    compressions: list[Compression] = []
    counts = Counter[str]()
    reading = reading_report(job)
    content = reading.as_dict() | {"facts": reading.facts()}
    sources: dict[str, Counter[str]] = {}
    for task in range(job.n_groups):
        group = job.task_report("read", task)
        of_group = {key: group["reading"][key] for key in _SOURCE_COUNTS}
        sources.setdefault(group["source"], Counter(n_tokens=0)).update(of_group)
    for task, shard in enumerate(job.shards):
        encoded = job.task_report("encode", task)
        sources[shard.source]["n_tokens"] += encoded["counts"].get("n_tokens", 0)
        counts.update(encoded["counts"])
        compressions = extremes(compressions + [(r, d) for r, d in encoded["compressions"]])
    content["sources"] = sources
    removed = removed_documents(job) + Counter({UNENCODABLE: counts["n_unencodable"]})
    content["removed"] = dict(removed.most_common())
    if job.settings.corpus.evaluation_texts:
        shared = np.empty(0, np.uint64)
        for task in range(len(job.read_shards)):
            of_task = np.load(job.task_folder("filter", task) / "shared.npy")
            shared = np.unique(np.concatenate([shared, of_task]))
        overlaps = EvaluationNgrams.open(job.task_folder("list") / "overlaps.npz")
        content["overlap"] = overlaps.shares(shared)
    n_bytes = counts["n_kept_text_bytes"]
    content |= {"n_kept_documents": counts["n_kept_documents"], "n_kept_text_bytes": n_bytes}
    content["strangest"] = compression_outliers(
        compressions, n_tokens=counts["n_tokens"], n_bytes=n_bytes
    )
    return content


def work_folder(out: str | Path) -> Path:
    """Where the job of a preparation is until it is finished: next to the requested folder, or in
    it if it `is_fixed`."""
    path = Path(os.path.realpath(out))
    return path / WORK if is_fixed(path) else path.with_name(f".{path.name}.work")


def prepared_key(source: Source, **options: Any) -> str:
    """A name (64 hex digits) for the result of `prepare` with these options, without reading any
    text.

    It changes with the settings, the format, the package, and the path, size and modification time
    of each file; of the first MAX_OPENED_FILES also with their first and last bytes.
    """
    return _key(_settings(source, **options))


def _settings(source: Source, *, tokenizer: str | Path = "bpe", **options: Any) -> Settings:
    """The arguments of a preparation."""
    sources = [source] if isinstance(source, str | Path) else source
    return Settings(sources=tuple(map(str, sources)), tokenizer=str(tokenizer), **options)


def _check(settings: Settings) -> None:
    """ValueError for settings that are wrong for any text."""
    if settings.corpus.languages:
        language_of("A missing package is found here, before anything is read.")
    for path in settings.sources:
        # Its files would be read as if they were texts.
        if is_prepared(path):
            raise ValueError(f"{path!r} is already prepared: train on it, or name its texts")
    size, name = settings.vocab_size, settings.tokenizer
    if name in TRAINED_NAMES:
        TokenizerConfig(name=name, vocab_size=size)  # raises an error for a wrong size
    else:
        n_tokens = load_tokenizer(name).vocab_size
        if size is not None and size != n_tokens:
            raise ValueError(
                f"tokenizer.vocab_size is {size}, but must be {n_tokens}, the tokens of {name!r}; "
                "leave it out"
            )


def _begin(settings: Settings, out: Path) -> Job:
    """Open the job of these settings, or start it from scratch."""
    folder = work_folder(out)
    key = _key(settings)
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        content = read_json(folder / "job.json")
    is_begun = (content.get("version"), content.get("key")) == (JOB_VERSION, key)
    if not folder.exists():
        discard(folder)  # what a killed removal left
    if not (is_begun and is_prepared(out)):
        require_empty(out)  # before the job of other settings, perhaps hours of work, is discarded
    if not is_begun:
        discard(folder)
        os.makedirs(folder)
        content = {"version": JOB_VERSION, "key": key, "settings": asdict(settings)}
        write_json(folder / "job.json", content, ascii_only=True, replace=True)
    return Job(folder)


def _key(settings: Settings) -> str:
    content: dict[str, Any] = asdict(settings)
    if not settings.fold:  # the key of before there was this setting
        del content["fold"]
    if settings.tokenizer not in TRAINED_NAMES:
        own = tokenizer_files(settings.tokenizer)
        naming = [own[0].parent / name for name in NAMING_FILES]
        parts = [file.read_bytes() for file in (*own, *naming) if file.is_file()]
        content["tokenizer"] = hashlib.sha256(b"".join(parts)).hexdigest()
    content["format"] = [FORMAT, FORMAT_VERSION, __version__]
    texts = {"files": settings.sources, "evaluation": settings.corpus.evaluation_texts}
    for name, sources in texts.items():
        files = list_files(sources) if sources else ()
        content[name] = [
            (f.source_argument, os.path.realpath(f.path), f.n_bytes, os.stat(f.path).st_mtime_ns)
            for f in files
        ]
        content[f"ends of {name}"] = [_ends(f) for f in files[:MAX_OPENED_FILES]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _ends(source: SourceFile) -> str:
    """A checksum of the first and the last bytes of a file; empty if it cannot be read."""
    with suppress(OSError), open(source.path, "rb") as file:
        first = file.read(_END_BYTES)
        file.seek(max(0, source.n_bytes - _END_BYTES))
        return hashlib.sha256(first + file.read(_END_BYTES)).hexdigest()
    return ""
