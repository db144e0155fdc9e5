"""What all units of a job found, added up: for report.json, problems.jsonl and removed.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.corpus.documents import ReadingReport
from pretrain.corpus.overlap import EvaluationNgrams
from pretrain.data.job import Job
from pretrain.data.origins import Strangest

LACKING = "vocabulary: it lacks a character"
"""Why a document is removed that the tokenizer cannot write."""


def reading_of(job: Job) -> tuple[ReadingReport, list[Path]]:
    """What reading found in all, and the files with all the problems."""
    units = [("list", 0), *(("read", n) for n in range(job.n_groups))]
    whole = ReadingReport()
    for unit in units:
        whole.merge(ReadingReport.from_dict(job.report_of(*unit)["reading"]))
    return whole, [job.place(*unit) / "problems.jsonl" for unit in units]


def whole_report(job: Job) -> dict[str, Any]:
    """What all units found, added up: report.json but for the streams."""
    reading, _ = reading_of(job)
    asked, strangest, counts = job.settings.corpus, Strangest(), Counter[str]()
    content = reading.as_dict()
    for source in content["sources"].values():
        source["n_tokens"] = 0
    for number, part in enumerate(job.parts):
        found = job.report_of("encode", number)
        content["sources"][part.source]["n_tokens"] += found["counts"].get("n_tokens", 0)
        counts.update(found["counts"])
        strangest.merge(found["strangest"])
    removed = removed_of(job) + Counter({LACKING: counts["n_lacking"]})
    content["removed"] = dict(removed.most_common())
    if asked.evaluation_texts:
        shared = np.empty(0, np.uint64)
        for number in range(len(job.read_parts)):
            found_here = np.load(job.place("select", number) / "shared.npy")
            shared = np.unique(np.concatenate([shared, found_here]))
        overlaps = EvaluationNgrams.open(job.place("list") / "overlaps.npz")
        content["overlap"] = overlaps.shares(shared)
    content |= {name: counts[name] for name in ("n_kept_documents", "n_kept_text_bytes")}
    return {**content, "strangest": strangest.found()}


def removed_of(job: Job) -> Counter[str]:
    """How many documents were removed for which reason."""
    removed: Counter[str] = Counter()
    if job.settings.corpus.looks_at_text:
        for number in range(len(job.read_parts)):
            removed.update(job.report_of("select", number)["removed"])
    if job.settings.corpus.deduplicate != "none":
        doubles = job.report_of("join").items()
        removed.update({f"duplicate: {how} to an earlier document": n for how, n in doubles if n})
    return removed


def all_lines(job: Job, name: str) -> Iterator[bytes]:
    """The lines of all "problems.jsonl" or "removed.jsonl", in the order of the corpus."""
    if name == "problems.jsonl":
        places = reading_of(job)[1]
    else:
        n_select = len(job.read_parts) if job.settings.corpus.looks_at_text else 0
        places = [job.place("select", n) / name for n in range(n_select)]
        places += [job.place("encode", n) / name for n in range(len(job.parts))]
    for place in places:
        with open(place, "rb") as file:
            yield from file
