"""Text -> a prepared folder: a job's steps are done, and what they left is joined to two streams.

`prepare` does all of it in this process or in several; `begin` and `finish` are its two ends for
those who have the steps done elsewhere (`cluster`). The job lies beside the folder that is asked
for, and what was killed goes on from there. The folder appears under its name only when it is
whole. Refused are settings that cannot be, and an output folder that is not empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.files import Source, list_files
from pretrain.corpus.filters import language_of
from pretrain.data.config import check_val_fraction
from pretrain.data.findings import all_lines, whole_report
from pretrain.data.job import Job, Settings, discard
from pretrain.data.manifest import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    SplitName,
    StreamInfo,
    is_prepared,
    write_manifest,
)
from pretrain.data.pool import Progress, do_steps
from pretrain.data.shards import PreparedData, open_prepared
from pretrain.data.steps import STEPS, split_of
from pretrain.data.writing import ShardWriter, id_bytes
from pretrain.fileio import FileLock, move_into_place, require_empty, write_json
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
    all text), gpt2, or the path of one. `corpus` says which documents stay. `workers` processes
    work; the bytes do not depend on them, nor on whether one was killed and the call repeated.
    `splitting.choose_split` says how validation is chosen.
    Raises ValueError for what cannot be read or asked for, FileExistsError for an `out` in use.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    settings = _checked(
        _settings(
            source,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            text_field=text_field,
            val_fraction=val_fraction,
            strict=strict,
            corpus=corpus or CorpusConfig(),
        )
    )
    with _lock(work_folder(out)):
        job = _begin(settings, Path(out))
        job.remove_unfinished()
        try:
            if not is_prepared(out):
                do_steps(job, workers=workers, progress=progress)
            return finish(job, out, progress=progress)
        except ValueError:
            # What cannot be prepared leaves nothing behind; what was stopped goes on from there.
            job.remove()
            raise


def begin(source: Source, out: str | Path, **options: Any) -> Job:
    """The job of `prepare` with the same options, begun or found: its steps are to be done by
    whoever can see its folder, and then `finish` is to be called."""
    return _begin(_checked(_settings(source, **options)), Path(out))


def finish(job: Job, out: str | Path, *, progress: Progress | None = None) -> PreparedData:
    """Write the folder of a job whose steps are all done, open it, and remove the job."""
    out, folder = Path(out), job.folder / "whole"
    if not is_prepared(out):  # or it was, and its job could not be removed any more
        _refuse_undone(job)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tokenizer = load_tokenizer(job.place("decide") / "tokenizer")
        tokenizer.save(folder / "tokenizer")
        with ExitStack() as opened:
            writers: dict[SplitName, ShardWriter] = {}
            for name in SPLITS:
                writers[name] = ShardWriter(
                    folder,
                    name=name,
                    vocab_size=tokenizer.vocab_size,
                    end_of_text=tokenizer.end_of_text,
                )
                opened.callback(writers[name].abandon)
            for number, part in enumerate(job.parts):
                if progress is not None:
                    progress("writing", number / len(job.parts))
                for name in SPLITS:
                    writers[name].append(job.place("encode", number), source=part.source)
            report = whole_report(job)
            for name in SPLITS:
                if writers[name].n_documents == 0:
                    raise ValueError(
                        f"corpus too small: {report['n_kept_text_bytes']:,} bytes in "
                        f"{report['n_kept_documents']:,} documents leave nothing for the split "
                        f"{name!r}; take more text, or longer documents; removed were "
                        f"{report['removed'] or 'none'}"
                    )
            streams: dict[str, StreamInfo] = {name: writers[name].close() for name in SPLITS}
        for file_name in ("problems.jsonl", "removed.jsonl"):
            with open(folder / file_name, "xb") as file:
                file.writelines(all_lines(job, file_name))
        report["n_tokens"] = {name: info.n_tokens for name, info in streams.items()}
        write_json(folder / "report.json", report)
        write_manifest(folder, _manifest(job, tokenizer, streams))
        move_into_place(folder, out)
    if progress is not None:
        progress("writing", 1.0)
    job.remove()
    return open_prepared(out)


def _refuse_undone(job: Job) -> None:
    for step in STEPS:
        n_units = step.n_units(job)
        n_undone = sum(not job.place(step.name, unit).is_dir() for unit in range(n_units))
        if n_undone:
            raise RuntimeError(
                f"{n_undone} of {n_units} units of the step {step.name!r} are not done; have the "
                "steps done again, what is there stays"
            )


def _manifest(job: Job, tokenizer: Tokenizer, streams: dict[str, StreamInfo]) -> Manifest:
    settings, split = job.settings, split_of(job)
    file = job.place("decide") / "tokenizer" / "tokenizer.json"
    kept = asdict(settings) | {"val_fraction": split.val_fraction}
    # Names and paths of this machine are in the report; the manifest is what the ids hang on.
    del kept["sources"]
    del kept["corpus"]["evaluation_texts"]
    kept["tokenizer"] = settings.tokenizer if settings.tokenizer in TRAINED_NAMES else "given"
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        package_version=_package_version(),
        vocab_size=tokenizer.vocab_size,
        id_bytes=id_bytes(tokenizer.vocab_size),
        start_of_text=tokenizer.start_of_text,
        end_of_text=tokenizer.end_of_text,
        tokenizer_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        source_sha256=job.report_of("decide")["source_sha256"],
        split_policy=split.policy,
        settings=kept,
        streams=streams,
    )


def work_folder(out: str | Path) -> Path:
    """Where the job of a preparation lies until it is done: beside the folder that is asked for."""
    whole = Path(os.path.abspath(out))
    return whole.with_name(f".{whole.name}.work")


def prepared_key(source: Source, **options: Any) -> str:
    """A name (64 hex digits) for what `prepare` with these options would make, without reading any
    text.

    It changes with the settings, the format, the package, and the path, size and time of change of
    each file.
    """
    return _key(_settings(source, **options))


def _settings(source: Source, *, tokenizer: str | Path = "bpe", **options: Any) -> Settings:
    given = [source] if isinstance(source, str | Path) else source
    return Settings(sources=tuple(map(str, given)), tokenizer=str(tokenizer), **options)


def _checked(settings: Settings) -> Settings:
    """ValueError for what is wrong whatever the texts hold."""
    check_val_fraction(settings.val_fraction)
    if settings.corpus.languages:
        language_of("Is the package there? Better to know before all is read.")
    for path in settings.sources:
        # Its files would be read as if they were texts.
        if is_prepared(path):
            raise ValueError(f"{path!r} is prepared already: train on it, or name its texts")
    size, name = settings.vocab_size, settings.tokenizer
    if name in TRAINED_NAMES:
        check_vocab_size(size, name=name)
    else:
        given = load_tokenizer(name)
        if size is not None and size != given.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size is {size}, but {name!r} has {given.vocab_size} entries; "
                "leave it out"
            )
    return settings


def _begin(settings: Settings, out: Path) -> Job:
    folder, key = work_folder(out), _key(settings)
    if not folder.exists():
        discard(folder)
    if not (Job.is_begun(folder, key=key) and is_prepared(out)):
        require_empty(out)
    return Job.begin(folder, settings, key=key)


def _lock(folder: Path) -> FileLock:
    """The lock of a preparation: others that prepare the same folder wait, then find it done."""
    return FileLock(folder.with_name(f"{folder.name}.lock"), wait=True)


def _key(settings: Settings) -> str:
    content: dict[str, Any] = asdict(settings)
    if settings.tokenizer not in TRAINED_NAMES:
        parts = [file.read_bytes() for file in tokenizer_files(settings.tokenizer)]
        content["tokenizer"] = hashlib.sha256(b"".join(parts)).hexdigest()
    content["format"] = [FORMAT, FORMAT_VERSION, _package_version()]
    for name, sources in (
        ("files", settings.sources),
        ("evaluation", settings.corpus.evaluation_texts),
    ):
        content[name] = [
            [
                file.source_argument,
                os.path.realpath(file.path),
                file.n_bytes,
                os.stat(file.path).st_mtime_ns,
            ]
            for file in (list_files(sources) if sources else ())
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _package_version() -> str:
    from pretrain import __version__

    return __version__
