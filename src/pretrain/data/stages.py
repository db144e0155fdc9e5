"""The stages of a preparation, in order: from files of text to ids.

    list -> read -> filter -> compare -> join -> split -> encode -> (preparation.finish)

Each takes what earlier stages left in the job's folder and leaves its own results there; `jobs`
explains stages and tasks. What a task counted goes into its report.json, and `finish` adds them up.
ValueError for sources without text, and for settings that contradict the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.duplicates import (
    DUPLICATE_PAIR,
    HASH_RECORD,
    RECORDS_AT_ONCE,
    band_hashes,
    component_roots,
    duplicate_pairs,
    text_hash,
    write_records,
)
from pretrain.corpus.files import SourceFile, list_files
from pretrain.corpus.filters import filter_documents, write_removed_document
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.corpus.reading import read_documents, read_files
from pretrain.corpus.records import EVERY_FIELD
from pretrain.data.format import SPLITS, SplitName
from pretrain.data.jobs import (
    KEY,
    DocumentShard,
    Job,
    Settings,
    Stage,
    read_document_shard,
    write_document_shards,
)
from pretrain.data.order import ceil_div
from pretrain.data.writer import Compression, TaskWriter, compression_of, extremes, file_chunks
from pretrain.fileio import check_free_space, read_json, write_json
from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.train import train_tokenizer

GROUP_BYTES = 1 << 23
"""Files are read in groups of about this number of bytes on disk,"""
GROUP_FILES = 1 << 12
"""and of at most this number of files."""

# What a copy of its texts, and their ids, take at least of the bytes of a file, packed or not.
_LEAST_SHARE = {"txt": 1.0, "md": 1.0, "jsonl": 0.5}
_TEXT_FILE = re.compile(r"\.(txt|md|jsonl)(\.(gz|bz2|xz|zst))?$")

EQUAL, NEARLY_EQUAL = 1, 2
"""Marks of documents that are duplicates of an earlier one; others have 0."""
DUPLICATE_REASONS = {
    EQUAL: "duplicate: equal to an earlier document",
    NEARLY_EQUAL: "duplicate: nearly equal to an earlier document",
}
UNENCODABLE = "vocabulary: it lacks a character"
"""Why a document is removed that the tokenizer cannot encode."""


# list ---------------------------------------------------------------------------------------------


def _list_files(job: Job, task: int, out: Path) -> None:
    """List the files of all sources in groups, each group of one source."""
    settings = job.settings
    report = ReadingReport(strict=settings.strict)
    groups: list[list[SourceFile]] = []
    n_bytes = 0
    with _recording_problems(out, report):
        for file in list_files(settings.sources, report=report):
            is_full = n_bytes >= GROUP_BYTES or (groups and len(groups[-1]) >= GROUP_FILES)
            if not groups or is_full or groups[-1][0].source_argument != file.source_argument:
                groups.append([])
                n_bytes = 0
            groups[-1].append(file)
            n_bytes += file.n_bytes
    named = [(_TEXT_FILE.search(file.name), file) for group in groups for file in group]
    least = int(sum(_LEAST_SHARE[match[1]] * file.n_bytes for match, file in named if match))
    check_free_space(out, least, len(groups), "preparing this text (--out or PRETRAIN_CACHE)")
    for number, group in enumerate(groups):
        files = [asdict(file) | {"path": str(file.path)} for file in group]
        write_json(out / f"{number}.json", {"files": files}, ascii_only=True)
    if settings.corpus.evaluation_texts:
        EvaluationNgrams.from_texts(_evaluation_strings(settings)).save(out / "overlaps.npz")
    write_json(out / "report.json", {"n_groups": len(groups), "reading": report.as_dict()})


def _evaluation_strings(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield name and strings of each evaluation text. ValueError if some of it cannot be read: its
    overlap would be missed."""
    for name in settings.corpus.evaluation_texts:
        report = ReadingReport(strict=settings.strict)
        for document in read_documents(name, text_field=EVERY_FIELD, report=report):
            yield from ((name, text) for text in document.text.split(EVERY_FIELD))
        if report.n_problems > report.n_repaired:
            raise ValueError(
                f"corpus.evaluation_texts: {name!r} must be readable without skipping anything: "
                f"skipped: {report.facts().get('skipped')}"
            )


@contextmanager
def _recording_problems(folder: Path, report: ReadingReport) -> Iterator[None]:
    """While the context is open, write all problems of a report to problems.jsonl."""
    with open(folder / "problems.jsonl", "x", encoding="utf-8") as file:
        report.on_problem = lambda problem: print(json.dumps(asdict(problem)), file=file)
        yield


# read ---------------------------------------------------------------------------------------------


def _read(job: Job, task: int, out: Path) -> None:
    """Read the documents of a group of files into shards."""
    content = read_json(job.task_folder("list") / f"{task}.json")
    files = [SourceFile(**file | {"path": Path(file["path"])}) for file in content["files"]]
    settings = job.settings
    separator = settings.document_separator
    report = ReadingReport(strict=settings.strict, document_separator=separator)
    n_bytes = max(1, sum(file.n_bytes for file in files))

    def with_progress(documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            job.on_fraction(report.n_read_bytes / n_bytes)
            yield document

    with _recording_problems(out, report):
        documents = read_files(files, text_field=settings.text_field, report=report)
        counts = write_document_shards(with_progress(documents), out)
    source = files[0].source_argument
    write_json(
        out / "report.json", {"source": source, "shards": counts, "reading": report.as_dict()}
    )


def reading_folders(job: Job) -> list[Path]:
    """The results of all tasks that read files, in the order of the corpus."""
    return [job.task_folder("list"), *(job.task_folder("read", n) for n in range(job.n_groups))]


def reading_report(job: Job) -> ReadingReport:
    """The reports of reading added up."""
    total = ReadingReport()
    for folder in reading_folders(job):
        total.merge(ReadingReport.from_dict(read_json(folder / "report.json")["reading"]))
    return total


# filter -------------------------------------------------------------------------------------------


def _n_filter(job: Job) -> int:
    if not job.read_shards:
        sources = ", ".join(repr(source) for source in job.settings.sources)
        skipped = reading_report(job).facts().get("skipped")
        raise ValueError(f"source {sources} gave no document; skipped: {skipped}")
    is_needed = job.settings.corpus.inspects_text or job.deduplicates
    return len(job.read_shards) if is_needed else 0


def _filter(job: Job, task: int, out: Path) -> None:
    """Keep the documents of a shard that pass the filters, and compute their duplicate hashes."""
    shard = job.read_shards[task]
    corpus = job.settings.corpus
    report: dict[str, Any] = {"source": shard.source}
    files = [(shard.documents, shard.keys)]
    if corpus.inspects_text:
        overlaps = None
        if corpus.evaluation_texts:
            overlaps = EvaluationNgrams.open(job.task_folder("list") / "overlaps.npz")
        report["removed"] = reasons = Counter[str]()
        shared: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        with open(out / "removed.jsonl", "x", encoding="utf-8") as removed:
            documents = filter_documents(
                read_document_shard(shard.documents),
                corpus,
                overlaps,
                removed=removed,
                reasons=reasons,
                shared=shared,
            )
            report["shards"] = write_document_shards(documents, out)
        np.save(out / "shared.npy", np.unique(np.concatenate(shared)))
        files = [(out / f"{n}.part", out / f"{n}.keys.npy") for n in range(len(report["shards"]))]
    if job.deduplicates:
        # HASH_RECORDs of full texts and of MinHash bands, of documents numbered from 0.
        keys = np.concatenate([np.empty(0, KEY), *(np.load(path) for _, path in files)])
        exact = np.zeros(len(keys), HASH_RECORD)
        exact["hash"], exact["check"] = keys["hash"], keys["check"]
        exact["document"] = np.arange(len(keys), dtype=np.uint64)
        bands: list[NDArray[np.uint64]] = []
        if corpus.deduplicate == "near":
            bands = [band_hashes(d.text) for path, _ in files for d in read_document_shard(path)]
        n_bands = [len(each) for each in bands]
        near = np.zeros(sum(n_bands), HASH_RECORD)
        near["hash"] = np.concatenate([np.empty(0, np.uint64), *bands])
        near["document"] = np.repeat(np.arange(len(bands), dtype=np.uint64), n_bands)
        write_records(out / "exact.npy", exact)
        write_records(out / "near.npy", near)
        report |= {"n_documents": len(exact), "n_records": len(exact) + len(near)}
    write_json(out / "report.json", report)


# compare and join ---------------------------------------------------------------------------------


def _n_compare(job: Job) -> int:
    if not job.deduplicates:
        return 0
    n_records = sum(report["n_records"] for report in job.filter_reports)
    return max(1, ceil_div(n_records, RECORDS_AT_ONCE))


def _compare(job: Job, task: int, out: Path) -> None:
    """Find the pairs of like documents in one range of the hashes."""
    n_tasks = _n_compare(job)
    n_documents = [report["n_documents"] for report in job.filter_reports]
    first_documents = list(accumulate(n_documents, initial=0))[:-1]
    for name in ("exact", "near"):
        # Each file with the number of its first document in the order of the corpus.
        files = [
            (job.task_folder("filter", number) / f"{name}.npy", first)
            for number, first in enumerate(first_documents)
        ]
        with open(out / name, "xb") as file:
            for pairs in duplicate_pairs(files, index=task, n_ranges=n_tasks):
                file.write(pairs.tobytes())


def _join(job: Job, task: int, out: Path) -> None:
    """Mark each document of which an earlier one is equal or nearly equal."""
    n_documents = sum(shard.n_documents for shard in job.shards)
    marks = np.lib.format.open_memmap(
        out / "duplicates.npy", mode="w+", dtype=np.uint8, shape=(n_documents,)
    )
    # Exact duplicates come last: a document that is both is marked equal.
    for name, mark in (("near", NEARLY_EQUAL), ("exact", EQUAL)):
        files = [job.task_folder("compare", number) / name for number in range(_n_compare(job))]
        n_bytes = DUPLICATE_PAIR.itemsize << 20
        chunks = (chunk for file in files for chunk in file_chunks(file, n_bytes))
        pairs = (np.frombuffer(chunk, DUPLICATE_PAIR) for chunk in chunks)
        scratch = out / "roots.npy"
        roots = component_roots(pairs, n_documents=n_documents, scratch=scratch)
        for start in range(0, n_documents, 1 << 20):
            chunk = roots[start : start + (1 << 20)]
            numbers = np.arange(start, start + len(chunk), dtype=np.uint64)
            marks[start : start + len(chunk)][chunk != numbers] = mark
        scratch.unlink()
    n_marks = np.zeros(3, np.int64)
    for start in range(0, n_documents, 1 << 20):
        n_marks += np.bincount(marks[start : start + (1 << 20)], minlength=3)
    marks.flush()
    counts = {DUPLICATE_REASONS[mark]: int(n_marks[mark]) for mark in (EQUAL, NEARLY_EQUAL)}
    write_json(out / "report.json", {"removed": counts})


def removed_documents(job: Job) -> Counter[str]:
    """Number of documents removed for each reason, before encoding."""
    removed = Counter[str]()
    if job.settings.corpus.inspects_text:
        for report in job.filter_reports:
            removed.update(report["removed"])
    if job.deduplicates:
        removed.update({r: n for r, n in job.task_report("join")["removed"].items() if n})
    return removed


def _unique_documents(
    job: Job, shard: DocumentShard, removed: TextIO | None = None
) -> Iterator[Document]:
    """Yield the documents of a shard without duplicates; those are recorded in the file
    `removed`."""
    marks = job.duplicate_marks(shard).tolist()
    for mark, document in zip(marks, read_document_shard(shard.documents), strict=True):
        if not mark:
            yield document
        elif removed is not None:
            write_removed_document(removed, document, DUPLICATE_REASONS[mark])


# split: held-out text and tokenizer ---------------------------------------------------------------

VAL_BYTES = 400_000
"""Default size of the validation text: the standard error of its loss is well below 1 %."""
SMALL_VAL_BYTES = 6_000
"""Of a small text a tenth, but so much, for an error of about 3 %, where it is at most a fifth."""
MAX_VAL_BYTES = 2_000_000
"""Of more text a five hundredth, up to this: it is scored at the end of every run, even a short
one."""
MIN_DOCUMENTS = 20
"""With fewer different documents, a split by documents is too coarse: the end of each document is
validation instead."""
MIN_TAIL_BYTES = 32
"""A shorter end would hardly be scored; such a document stays in training as a whole."""
_CUT_SEARCH_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Split:
    """How documents are divided into training and validation text."""

    val_fraction: float
    policy: str
    """"documents" or "tails"."""
    bound: int
    """Under "documents": documents whose hash is below this are validation in fold 0."""
    fold: int = 0
    """The part that is validation, of parts of the same size: the text of no two overlaps."""

    @property
    def hashes(self) -> tuple[int, int]:
        """The hashes, from the first to before the second, of validation documents."""
        if not self.fold:
            return 0, self.bound
        width = int(self.val_fraction * 2**64)
        return max(self.bound, self.fold * width), min((self.fold + 1) * width, 2**64 - 1)

    def parts(self, text: str) -> Iterator[tuple[SplitName, str]]:
        """Yield the parts of one document in order; their texts joined are the document's."""
        if self.policy == "documents":
            start, stop = self.hashes
            yield ("val" if start <= text_hash(text.encode())[0] < stop else "train"), text
            return
        start = self._cut(text, self.fold + 1)
        stop = self._cut(text, self.fold) if self.fold else len(text)
        rest, part = text[:start] + text[stop:], text[start:stop]
        if len(part.encode()) < MIN_TAIL_BYTES or not rest.strip():
            yield "train", text
            return
        parts: list[tuple[SplitName, str]] = [("train", text[:start]), ("val", part)]
        yield from (each for each in (*parts, ("train", text[stop:])) if each[1])

    def _cut(self, text: str, n_parts: int) -> int:
        """The place in a document at which its last `n_parts` parts begin."""
        target = max(0, round(len(text) * (1 - n_parts * self.val_fraction)))
        for place in range(target, max(0, target - _CUT_SEARCH_CHARACTERS), -1):
            # The whitespace goes to the tail, so that the head ends like a text and the tail's
            # tokens are usual ones.
            if place < len(text) and text[place].isspace():
                return place
        return target


def choose_split(
    keys: Callable[[], Iterable[NDArray[np.void]]], *, val_fraction: float | None, fold: int = 0
) -> Split:
    """Divide by documents if there are at least MIN_DOCUMENTS different ones, else by the end of
    each: a pure function of the texts and the fraction.

    A document is validation if the 64-bit BLAKE2b of its text, as a fraction of 2^64, is below
    `val_fraction`, or if it has the smallest hash. So equal documents are never on both sides, and,
    if `val_fraction` is given, a document added later moves no other one. If that made most of the
    text validation (one document is nearly everything), the ends are used too. All folds have the
    policy of fold 0. `keys` yields the documents' `jobs.KEY`s, in arrays, each time it is called.
    """
    n_bytes = 0
    smallest: set[int] = set()
    for chunk in keys():
        n_bytes += int(chunk["n_bytes"].sum())
        smallest.update(np.unique(chunk["hash"])[:MIN_DOCUMENTS].tolist())
        smallest = set(sorted(smallest)[:MIN_DOCUMENTS])
    fraction = val_fraction
    if fraction is None:
        n_val_bytes = min(max(VAL_BYTES, 0.002 * n_bytes), MAX_VAL_BYTES)
        most = min(max(0.1, SMALL_VAL_BYTES / max(n_bytes, 1)), 0.2)
        fraction = min(n_val_bytes / max(n_bytes, 1), most)
    n = n_folds(fraction)
    if fold >= n:
        raise ValueError(
            f"data.fold is {fold}; it must be in [0, {n - 1}]: {fraction:.3g} of the text is held "
            f"out, so there are {n} such parts; a smaller data.val_fraction gives more"
        )
    if len(smallest) == MIN_DOCUMENTS:
        bound = max(int(fraction * 2**64), min(smallest) + 1)
        split, largest = Split(fraction, "documents", bound), max(0.5, 1.5 * fraction) * n_bytes
        if _validation_bytes(keys, split) <= largest:
            split = replace(split, fold=fold)
            if fold and not 0 < (own := _validation_bytes(keys, split)) <= largest:
                raise ValueError(
                    f"data.fold is {fold}, whose documents have {own:,} of {n_bytes:,} bytes; it "
                    "must be one that has some, and not most of the text"
                )
            return split
    return Split(fraction, "tails", 0, fold)


def n_folds(val_fraction: float) -> int:
    """Return the number of disjoint parts of a text that may be held out."""
    return int(1 / val_fraction + 1e-9)


def _validation_bytes(keys: Callable[[], Iterable[NDArray[np.void]]], split: Split) -> int:
    start, stop = split.hashes
    return sum(
        int(chunk["n_bytes"][(chunk["hash"] >= start) & (chunk["hash"] < stop)].sum())
        for chunk in keys()
    )


def _split(job: Job, task: int, out: Path) -> None:
    """Choose the held-out text, and train or load the tokenizer."""

    def keys() -> Iterator[NDArray[np.void]]:
        for shard in job.shards:
            yield np.load(shard.keys)[job.duplicate_marks(shard) == 0]

    source_hash = hashlib.sha256()
    n_documents = 0
    for chunk in keys():
        source_hash.update(chunk["hash"].astype(">u8").tobytes())
        n_documents += len(chunk)
    if n_documents == 0:
        counts = removed_documents(job).most_common(5)
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in counts)
        raise ValueError(f"every document was removed; use fewer filters: {reasons}")
    settings = job.settings
    split = choose_split(keys, val_fraction=settings.val_fraction, fold=settings.fold)
    name = job.settings.tokenizer
    shards = job.shards if name != "bytes" else []

    def training_texts() -> Iterator[str]:
        for number, shard in enumerate(shards):
            for document in _unique_documents(job, shard):
                for side, text in split.parts(document.text):
                    # `characters` must be able to encode the validation split.
                    if side == "train" or name == "characters":
                        yield text
            job.on_fraction((number + 1) / len(shards))

    if name in TRAINED_NAMES:
        tokenizer = train_tokenizer(
            training_texts(),
            name=name,
            vocab_size=job.settings.vocab_size,
            log=lambda line: job.on_fraction(1.0, line),
        )
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.save(out / "tokenizer")
    report = {"split": asdict(split), "source_sha256": source_hash.hexdigest()}
    write_json(out / "report.json", report)


# encode -------------------------------------------------------------------------------------------


def _encode(job: Job, task: int, out: Path) -> None:
    """Encode the documents of a shard, into one set of files for each side of the split."""
    shard = job.shards[task]
    split = Split(**job.task_report("split")["split"])
    tokenizer = job.tokenizer
    starts = [np.array([tokenizer.start_of_text], np.int64)]
    if tokenizer.start_of_text == tokenizer.end_of_text:
        starts = []
    ids = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    writers = {name: TaskWriter(out, name=name, **ids) for name in SPLITS}
    compressions: list[Compression] = []
    counts = Counter[str]()
    with open(out / "removed.jsonl", "x", encoding="utf-8") as removed:
        for document in _unique_documents(job, shard, removed):
            unencodable = tokenizer.first_unencodable(document.text)
            if unencodable is not None:
                reason = f"{UNENCODABLE}: {unencodable!r}"
                if job.settings.strict:
                    place = f"{document.source}, {document.id}"
                    raise ValueError(f"{place}: {reason} (--strict removes nothing)")
                write_removed_document(removed, document, reason)
                counts["n_unencodable"] += 1
                continue
            counts["n_kept_documents"] += 1
            for name, text in split.parts(document.text):
                n_bytes = len(text.encode())
                chunks = chain(starts, tokenizer.encode_chunks(text))
                n_tokens = writers[name].add(document, chunks, n_bytes=n_bytes)
                compressions += compression_of(document, n_tokens=n_tokens, n_bytes=n_bytes)
                counts.update(n_tokens=n_tokens, n_kept_text_bytes=n_bytes)
            if len(compressions) > 1000:
                compressions = extremes(compressions)
    for writer in writers.values():
        writer.close()
    write_json(out / "report.json", {"counts": counts, "compressions": extremes(compressions)})


STAGES = (
    Stage("list", "looking for files", lambda job: 1, _list_files),
    Stage("read", "reading", lambda job: job.n_groups, _read),
    Stage("filter", "filtering", _n_filter, _filter),
    Stage("compare", "comparing", _n_compare, _compare),
    Stage("join", "comparing", lambda job: int(job.deduplicates), _join),
    Stage("split", "choosing held-out text and tokenizer", lambda job: 1, _split),
    Stage("encode", "encoding", lambda job: len(job.shards), _encode),
)
"""All stages but the last, which writes the prepared folder: `preparation.finish`."""
