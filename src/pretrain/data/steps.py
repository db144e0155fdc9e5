"""The steps of a preparation, in order: from files to a folder of ids.

    list -> read -> select -> compare -> join -> decide -> encode -> write

Each takes what earlier steps left in the job's folder, and leaves its own there; see `job`. What a
unit found goes into its report.json, and the last step adds them up. Refused are sources without
text, text that is too small to be divided, and settings that contradict it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.document_shards import read_document_shard, write_document_shards
from pretrain.corpus.documents import Document, ReadingReport
from pretrain.corpus.duplicates import (
    DUPLICATE_PAIR,
    HASH_RECORD,
    band_hashes,
    component_roots,
    duplicate_pairs,
    n_hash_ranges,
    write_records,
)
from pretrain.corpus.files import SourceFile, list_files
from pretrain.corpus.filters import DocumentFilter, write_removed_document
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.corpus.reading import read_documents, read_files
from pretrain.corpus.records import EVERY_FIELD
from pretrain.data.findings import LACKING, reading_of, removed_of
from pretrain.data.job import Job, Part, Step
from pretrain.data.manifest import SPLITS
from pretrain.data.origins import Strangest
from pretrain.data.splitting import Split, choose_split
from pretrain.data.writing import PartWriter
from pretrain.fileio import write_json
from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer

GROUP_BYTES = 1 << 23
GROUP_FILES = 1 << 12
"""Files are read in groups of about so many bytes on disk, and at most so many files."""
EQUAL, NEARLY_EQUAL = 1, 2


def _list(job: Job, unit: int, out: Path) -> None:
    """The files of all sources in groups, each group of one source."""
    settings, report = job.settings, ReadingReport()
    groups: list[list[SourceFile]] = []
    n_bytes = 0
    with _problems(out, report):
        for file in list_files(settings.sources, report=report, strict=settings.strict):
            is_full = n_bytes >= GROUP_BYTES or (groups and len(groups[-1]) >= GROUP_FILES)
            if not groups or is_full or groups[-1][0].source_argument != file.source_argument:
                groups.append([])
                n_bytes = 0
            groups[-1].append(file)
            n_bytes += file.n_bytes
    for number, group in enumerate(groups):
        files = [asdict(file) | {"path": str(file.path)} for file in group]
        write_json(out / f"{number}.json", {"files": files}, ascii_only=True)
    texts = settings.corpus.evaluation_texts
    if texts:
        found = ((name, t) for name in texts for t in _evaluation_strings(name, settings.strict))
        EvaluationNgrams.from_texts(found).save(out / "overlaps.npz")
    write_json(out / "report.json", {"n_groups": len(groups), "reading": report.as_dict()})


def _evaluation_strings(name: str, strict: bool) -> Iterator[str]:
    """All that an evaluation text says. ValueError if some of it cannot be read: nobody would look
    for that."""
    report = ReadingReport()
    for document in read_documents(name, text_field=EVERY_FIELD, report=report, strict=strict):
        yield from document.text.split(EVERY_FIELD)
    if report.n_problems > report.n_repaired:
        raise ValueError(
            f"corpus.evaluation_texts: {name!r} is not to be read whole: {report.summary()}; "
            "legal: texts of which nothing is skipped"
        )


def _read(job: Job, unit: int, out: Path) -> None:
    """The documents of a group of files, in parts."""
    content = json.loads((job.place("list") / f"{unit}.json").read_text(encoding="utf-8"))
    files = [SourceFile(**file | {"path": Path(file["path"])}) for file in content["files"]]
    report, settings = ReadingReport(), job.settings
    n_bytes = max(1, sum(file.n_bytes for file in files))

    def told(documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if job.on_fraction is not None:
                job.on_fraction(report.n_read_bytes / n_bytes)
            yield document

    with _problems(out, report):
        found = read_files(
            files, text_field=settings.text_field, report=report, strict=settings.strict
        )
        counts = write_document_shards(told(found), out)
    write_json(
        out / "report.json",
        {"source": files[0].source_argument, "parts": counts, "reading": report.as_dict()},
    )


@contextmanager
def _problems(folder: Path, report: ReadingReport) -> Iterator[None]:
    """While it is open, all problems of a report are written to problems.jsonl."""
    with open(folder / "problems.jsonl", "x", encoding="utf-8") as file:
        report.on_problem = lambda problem: print(json.dumps(asdict(problem)), file=file)
        yield


def _n_select(job: Job) -> int:
    asked = job.settings.corpus
    if not job.read_parts:
        report = reading_of(job)[0]
        named = ", ".join(repr(source) for source in job.settings.sources)
        raise ValueError(f"source {named} gave no document: {report.summary()}")
    return len(job.read_parts) if asked.looks_at_text or asked.deduplicate != "none" else 0


def _select(job: Job, unit: int, out: Path) -> None:
    """The documents of a part that pass the filters, and what duplicates among them are told by."""
    part, asked = job.read_parts[unit], job.settings.corpus
    report: dict[str, Any] = {"source": part.source}
    if asked.looks_at_text:
        with open(out / "removed.jsonl", "x", encoding="utf-8") as removed:
            path = job.place("list") / "overlaps.npz"
            overlaps = EvaluationNgrams.open(path) if asked.evaluation_texts else None
            selection = DocumentFilter(asked, overlaps, removed)
            report["parts"] = write_document_shards(
                selection.filter(read_document_shard(part.documents)), out
            )
        report["removed"] = selection.reasons
        np.save(out / "shared.npy", selection.shared_ngrams())
        files = [(out / f"{n}.part", out / f"{n}.keys.npy") for n in range(len(report["parts"]))]
    else:
        files = [(part.documents, part.keys)]
    if asked.deduplicate != "none":
        exact, near = _records(files, near=asked.deduplicate == "near")
        write_records(out / "exact.npy", exact)
        write_records(out / "near.npy", near)
        report |= {"n_documents": len(exact), "n_records": len(exact) + len(near)}
    write_json(out / "report.json", report)


def _records(
    files: list[tuple[Path, Path]], *, near: bool
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """HASH_RECORDs of whole texts and, if asked, of bands, of documents numbered from 0."""
    keys = (
        np.concatenate([np.load(path) for _, path in files]) if files else np.empty(0, HASH_RECORD)
    )
    exact = np.zeros(len(keys), HASH_RECORD)
    exact["hash"], exact["check"] = keys["hash"], keys["check"]
    exact["document"] = np.arange(len(keys), dtype=np.uint64)
    if not near:
        return exact, np.empty(0, HASH_RECORD)
    bands = [band_hashes(d.text) for path, _ in files for d in read_document_shard(path)]
    lengths = [len(each) for each in bands]
    records = np.zeros(sum(lengths), HASH_RECORD)
    records["hash"] = np.concatenate([np.empty(0, np.uint64), *bands])
    records["document"] = np.repeat(np.arange(len(bands), dtype=np.uint64), lengths)
    return exact, records


def _n_compare(job: Job) -> int:
    if job.settings.corpus.deduplicate == "none":
        return 0
    return n_hash_ranges(sum(selected.n_records for selected in job.selected))


def _compare(job: Job, unit: int, out: Path) -> None:
    """Pairs of like documents from one range of the hashes."""
    n_units = _n_compare(job)
    for name in ("exact", "near"):
        files = [
            (job.place("select", number) / f"{name}.npy", selected.first_document)
            for number, selected in enumerate(job.selected)
        ]
        with open(out / name, "xb") as file:
            for pairs in duplicate_pairs(files, index=unit, n_ranges=n_units):
                file.write(pairs.tobytes())


def _n_join(job: Job) -> int:
    return int(job.settings.corpus.deduplicate != "none")


def _join(job: Job, unit: int, out: Path) -> None:
    """For each document whether an earlier one is equal or nearly equal: `Job.doubles_of`."""
    n_documents = job.n_documents
    doubles = np.lib.format.open_memmap(
        out / "doubles.npy", mode="w+", dtype=np.uint8, shape=(n_documents,)
    )
    n_units, counts = _n_compare(job), Counter[int]()
    for name, mark in (("near", NEARLY_EQUAL), ("exact", EQUAL)):
        files = [job.place("compare", number) / name for number in range(n_units)]
        scratch = out / "roots.npy"
        roots = component_roots(_pairs(files), n_documents=n_documents, scratch=scratch)
        for start in range(0, n_documents, 1 << 20):
            part = roots[start : start + (1 << 20)]
            mine = np.arange(start, start + len(part), dtype=np.uint64)
            doubles[start : start + len(part)][part != mine] = mark
        scratch.unlink()
    for start in range(0, n_documents, 1 << 20):
        found = np.bincount(doubles[start : start + (1 << 20)], minlength=3)
        counts.update({n: int(found[n]) for n in (EQUAL, NEARLY_EQUAL)})
    doubles.flush()
    write_json(out / "report.json", {"equal": counts[EQUAL], "nearly equal": counts[NEARLY_EQUAL]})


def _pairs(files: Iterable[Path]) -> Iterator[NDArray[np.void]]:
    for path in files:
        with open(path, "rb") as file:
            while data := file.read(DUPLICATE_PAIR.itemsize << 20):
                yield np.frombuffer(data, DUPLICATE_PAIR)


def _decide(job: Job, unit: int, out: Path) -> None:
    """Which documents are held out, and the tokenizer."""
    settings = job.settings

    def keys() -> Iterator[NDArray[np.void]]:
        for part in job.parts:
            yield np.load(part.keys)[job.doubles_of(part) == 0]

    whole = hashlib.sha256()
    n_documents = 0
    for chunk in keys():
        whole.update(chunk["hash"].astype(">u8").tobytes())
        n_documents += len(chunk)
    if n_documents == 0:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in removed_of(job).most_common(5))
        raise ValueError(f"every document was removed, ask for fewer filters: {reasons}")
    split = choose_split(keys, val_fraction=settings.val_fraction)
    _tokenizer(job, split).save(out / "tokenizer")
    write_json(out / "report.json", {"split": asdict(split), "source_sha256": whole.hexdigest()})


def _tokenizer(job: Job, split: Split) -> Tokenizer:
    """The given tokenizer, or a new one that has not seen validation text, except `characters`,
    which must be able to write it."""
    name = job.settings.tokenizer
    if name not in TRAINED_NAMES:
        return load_tokenizer(name)
    parts = job.parts if name != "bytes" else []

    def texts() -> Iterator[str]:
        for number, part in enumerate(parts):
            for document in _kept(job, part):
                for side, text in split.parts(document.text):
                    if side == "train" or name == "characters":
                        yield text
            if job.on_fraction is not None:
                job.on_fraction((number + 1) / len(parts))

    return train_tokenizer(texts(), name=name, vocab_size=job.settings.vocab_size)


def _kept(job: Job, part: Part, removed: TextIO | None = None) -> Iterator[Document]:
    """The documents of a part that are no duplicates; those go to the file `removed`."""
    doubles = job.doubles_of(part)
    for double, document in zip(doubles.tolist(), read_document_shard(part.documents), strict=True):
        if not double:
            yield document
        elif removed is not None:
            how = "equal" if double == EQUAL else "nearly equal"
            write_removed_document(removed, document, f"duplicate: {how} to an earlier document")


def split_of(job: Job) -> Split:
    """How documents are divided."""
    return Split(**job.report_of("decide")["split"])


def _encode(job: Job, unit: int, out: Path) -> None:
    """The ids of a part, a file for each side of the split."""
    part, split = job.parts[unit], split_of(job)
    tokenizer = _opened_tokenizer(job)
    writers = {
        name: PartWriter(
            out, name=name, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text
        )
        for name in SPLITS
    }
    strangest, counts = Strangest(), Counter[str]()
    with open(out / "removed.jsonl", "x", encoding="utf-8") as removed:
        for document in _kept(job, part, removed):
            if (lacking := tokenizer.first_unencodable(document.text)) is not None:
                if job.settings.strict:
                    place = f"{document.source}, {document.id}"
                    raise ValueError(f"{place}: {LACKING}: {lacking!r} (--strict removes nothing)")
                write_removed_document(removed, document, f"{LACKING}: {lacking!r}")
                counts["n_lacking"] += 1
                continue
            counts["n_kept_documents"] += 1
            for name, text in split.parts(document.text):
                if tokenizer.start_of_text != tokenizer.end_of_text:
                    writers[name].add(np.array([tokenizer.start_of_text], np.int64))
                for ids in tokenizer.encode_chunks(text):
                    writers[name].add(ids)
                n_bytes = len(text.encode())
                n_tokens = writers[name].end_document(document, n_bytes=n_bytes)
                strangest.add(document, n_tokens=n_tokens, n_bytes=n_bytes)
                counts.update(n_tokens=n_tokens, n_kept_text_bytes=n_bytes)
    for writer in writers.values():
        writer.close()
    write_json(out / "report.json", {"counts": counts, "strangest": strangest.state()})


_tokenizers: dict[Path, Tokenizer] = {}


def _opened_tokenizer(job: Job) -> Tokenizer:
    """The job's tokenizer, opened once a process."""
    folder = job.place("decide") / "tokenizer"
    if folder not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[folder] = load_tokenizer(folder)
    return _tokenizers[folder]


STEPS = (
    Step("list", "looking for files", lambda job: 1, _list),
    Step("read", "reading", lambda job: job.n_groups, _read),
    Step("select", "selecting", _n_select, _select),
    Step("compare", "comparing", _n_compare, _compare),
    Step("join", "comparing", _n_join, _join),
    Step("decide", "choosing held-out text and tokenizer", lambda job: 1, _decide),
    Step("encode", "encoding", lambda job: len(job.parts), _encode),
)
"""All but the last, which writes the folder that was asked for: `preparation.finish`."""
