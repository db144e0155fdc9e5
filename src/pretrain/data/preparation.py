"""Text -> a prepared folder: run a job's stages, then join the results to two streams of ids.

`prepare` does all of it in this process or in several; `begin`, `cluster_tasks` and `finish` are
its parts for those who run the tasks elsewhere. The job is in a folder next to the requested one,
so a killed preparation resumes there, and the requested folder appears under its name only when it
is complete. ValueError for impossible settings, FileExistsError for an output that is not empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.files import Source, list_files
from pretrain.corpus.filters import language_of
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.data.config import check_val_fraction
from pretrain.data.format import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    PreparedData,
    SplitName,
    StreamInfo,
    id_bytes,
    is_prepared,
    open_prepared,
    write_manifest,
)
from pretrain.data.jobs import Job, Progress, Settings, discard, run_stages
from pretrain.data.stages import (
    STAGES,
    UNENCODABLE,
    problem_files,
    reading_report,
    removed_documents,
    split_of,
)
from pretrain.data.writer import CompressionOutliers, StreamWriter
from pretrain.fileio import file_lock, move_into_place, require_empty, write_json
from pretrain.tokenizer.config import TRAINED_NAMES, check_vocab_size
from pretrain.tokenizer.load import load_tokenizer, tokenizer_files
from pretrain.tokenizer.tokenizer import Tokenizer


def prepare(
    source: Source,
    out: str | Path,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_field: str | None = None,
    val_fraction: float | None = None,
    strict: bool = False,
    corpus: CorpusConfig | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> PreparedData:
    """Turn a file, a folder, "bundled" or several of them into a prepared folder, and open it.

    `tokenizer` is bpe, gpt, characters or bytes, trained here on the training split (characters: on
    all text), gpt2, or the path of one. `corpus` configures filters and deduplication. The bytes
    depend neither on `workers`, the number of processes, nor on whether one was killed and the call
    repeated. `stages.choose_split` chooses the validation text. Raises ValueError for text that
    cannot be read and for impossible settings, FileExistsError if `out` is in use.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1 (got {workers})")
    settings = _settings(
        source,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_field=text_field,
        val_fraction=val_fraction,
        strict=strict,
        corpus=corpus or CorpusConfig(),
    )
    _check(settings)
    work = work_folder(out)
    # Others that prepare the same folder wait, and then find it complete.
    with file_lock(work.with_name(f"{work.name}.lock"), wait=True):
        job = _begin(settings, Path(out))
        job.remove_unfinished()
        try:
            if not is_prepared(out):
                run_stages(job, STAGES, workers=workers, progress=progress)
            return finish(job, out, progress=progress)
        except ValueError:
            # Text that cannot be prepared leaves nothing behind; a job that was stopped stays.
            job.remove()
            raise


def begin(source: Source, out: str | Path, **options: Any) -> Job:
    """Create or find the job of `prepare` with the same options. Run its `cluster_tasks` where its
    folder can be seen, then call `finish`."""
    settings = _settings(source, **options)
    _check(settings)
    return _begin(settings, Path(out))


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


def finish(job: Job, out: str | Path, *, progress: Progress | None = None) -> PreparedData:
    """Write the prepared folder of a job whose stages are all complete, open it, and remove the
    job."""
    out = Path(out)
    if not is_prepared(out):  # else a kill came between the rename and the removal of the job
        folder = _write_folder(job, progress)
        move_into_place(folder, out)
    if progress is not None:
        progress("writing", 1.0)
    job.remove()
    return open_prepared(out)


def _write_folder(job: Job, progress: Progress | None) -> Path:
    """Write all files of the prepared folder inside the job's folder; returns their folder."""
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
    tokenizer = load_tokenizer(job.task_folder("split") / "tokenizer")
    tokenizer.save(folder / "tokenizer")
    report = _total_report(job)
    streams = _write_streams(job, folder, tokenizer, report, progress)
    for name, files in (("problems.jsonl", problem_files(job)), ("removed.jsonl", _removed(job))):
        with open(folder / name, "xb") as file:
            for path in files:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, file)
    report["n_tokens"] = {name: info.n_tokens for name, info in streams.items()}
    write_json(folder / "report.json", report)
    write_manifest(folder, _manifest(job, tokenizer, streams))
    return folder


def _write_streams(
    job: Job,
    folder: Path,
    tokenizer: Tokenizer,
    report: dict[str, Any],
    progress: Progress | None,
) -> dict[str, StreamInfo]:
    """Join the encoded shards. ValueError if a split would be empty."""
    with ExitStack() as opened:
        writers: dict[SplitName, StreamWriter] = {}
        for name in SPLITS:
            writers[name] = StreamWriter(
                folder,
                name=name,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
            )
            opened.callback(writers[name].abandon)
        for task, shard in enumerate(job.shards):
            if progress is not None:
                progress("writing", task / len(job.shards))
            for writer in writers.values():
                writer.append(job.task_folder("encode", task), source=shard.source)
        for name, writer in writers.items():
            if writer.n_documents == 0:
                raise ValueError(
                    f"corpus too small: {report['n_kept_text_bytes']:,} bytes in "
                    f"{report['n_kept_documents']:,} documents leave nothing for the split "
                    f"{name!r}; use more text, or longer documents; removed were "
                    f"{report['removed'] or 'none'}"
                )
        return {name: writer.close() for name, writer in writers.items()}


def _total_report(job: Job) -> dict[str, Any]:
    """The reports of all tasks added up: report.json without the sizes of the streams."""
    outliers = CompressionOutliers()
    counts = Counter[str]()
    content = reading_report(job).as_dict()
    for source in content["sources"].values():
        source["n_tokens"] = 0
    for task, shard in enumerate(job.shards):
        encoded = job.task_report("encode", task)
        content["sources"][shard.source]["n_tokens"] += encoded["counts"].get("n_tokens", 0)
        counts.update(encoded["counts"])
        outliers.merge(encoded["outliers"])
    removed = removed_documents(job) + Counter({UNENCODABLE: counts["n_unencodable"]})
    content["removed"] = dict(removed.most_common())
    if job.settings.corpus.evaluation_texts:
        shared = np.empty(0, np.uint64)
        for task in range(len(job.read_shards)):
            of_task = np.load(job.task_folder("filter", task) / "shared.npy")
            shared = np.unique(np.concatenate([shared, of_task]))
        overlaps = EvaluationNgrams.open(job.task_folder("list") / "overlaps.npz")
        content["overlap"] = overlaps.shares(shared)
    content["n_kept_documents"] = counts["n_kept_documents"]
    content["n_kept_text_bytes"] = counts["n_kept_text_bytes"]
    content["strangest"] = outliers.records()
    return content


def _removed(job: Job) -> list[Path]:
    """The files with the removed documents, in the order of the corpus."""
    n_filter = len(job.read_shards) if job.settings.corpus.inspects_text else 0
    folders = [job.task_folder("filter", task) for task in range(n_filter)]
    folders += [job.task_folder("encode", task) for task in range(len(job.shards))]
    return [folder / "removed.jsonl" for folder in folders]


def _manifest(job: Job, tokenizer: Tokenizer, streams: dict[str, StreamInfo]) -> Manifest:
    settings = job.settings
    split = split_of(job)
    file = job.task_folder("split") / "tokenizer" / "tokenizer.json"
    recorded = asdict(settings) | {"val_fraction": split.val_fraction}
    # The manifest has what the ids depend on; names and paths of this machine are in the report.
    del recorded["sources"]
    del recorded["corpus"]["evaluation_texts"]
    recorded["tokenizer"] = settings.tokenizer if settings.tokenizer in TRAINED_NAMES else "given"
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        package_version=__version__,
        vocab_size=tokenizer.vocab_size,
        id_bytes=id_bytes(tokenizer.vocab_size),
        start_of_text=tokenizer.start_of_text,
        end_of_text=tokenizer.end_of_text,
        tokenizer_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        source_sha256=job.task_report("split")["source_sha256"],
        split_policy=split.policy,
        settings=recorded,
        streams=streams,
    )


def work_folder(out: str | Path) -> Path:
    """Where the job of a preparation is until it is finished: next to the requested folder."""
    path = Path(os.path.abspath(out))
    return path.with_name(f".{path.name}.work")


def prepared_key(source: Source, **options: Any) -> str:
    """A name (64 hex digits) for the result of `prepare` with these options, without reading any
    text.

    It changes with the settings, the format, the package, and the path, size and modification time
    of each file.
    """
    return _key(_settings(source, **options))


def _settings(source: Source, *, tokenizer: str | Path = "bpe", **options: Any) -> Settings:
    sources = [source] if isinstance(source, str | Path) else source
    return Settings(sources=tuple(map(str, sources)), tokenizer=str(tokenizer), **options)


def _check(settings: Settings) -> None:
    """ValueError for settings that are wrong for any text."""
    check_val_fraction(settings.val_fraction)
    if settings.corpus.languages:
        language_of("A missing package is found here, before anything is read.")
    for path in settings.sources:
        # Its files would be read as if they were texts.
        if is_prepared(path):
            raise ValueError(f"{path!r} is already prepared: train on it, or name its texts")
    size, name = settings.vocab_size, settings.tokenizer
    if name in TRAINED_NAMES:
        check_vocab_size(size, name=name)
    else:
        n_tokens = load_tokenizer(name).vocab_size
        if size is not None and size != n_tokens:
            raise ValueError(
                f"tokenizer.vocab_size is {size}, but {name!r} has {n_tokens} tokens; leave it out"
            )


def _begin(settings: Settings, out: Path) -> Job:
    folder = work_folder(out)
    key = _key(settings)
    if not folder.exists():
        discard(folder)
    if not (Job.is_begun(folder, key=key) and is_prepared(out)):
        require_empty(out)
    return Job.begin(folder, settings, key=key)


def _key(settings: Settings) -> str:
    content: dict[str, Any] = asdict(settings)
    if settings.tokenizer not in TRAINED_NAMES:
        parts = [file.read_bytes() for file in tokenizer_files(settings.tokenizer)]
        content["tokenizer"] = hashlib.sha256(b"".join(parts)).hexdigest()
    content["format"] = [FORMAT, FORMAT_VERSION, __version__]
    content["files"] = _file_states(settings.sources)
    content["evaluation"] = _file_states(settings.corpus.evaluation_texts)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_states(sources: tuple[str, ...]) -> list[list[Any]]:
    """Name, real path, size and modification time of each file."""
    return [
        [
            file.source_argument,
            os.path.realpath(file.path),
            file.n_bytes,
            os.stat(file.path).st_mtime_ns,
        ]
        for file in (list_files(sources) if sources else ())
    ]
