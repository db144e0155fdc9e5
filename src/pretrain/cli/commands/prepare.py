"""Turn text into a prepared folder: token ids, the tokenizer, and a report of what was read and
skipped. Formats are detected from the content; .gz, .bz2, .xz and .zst are decompressed.

pretrain prepare books/ letters.jsonl --out prepared/books
pretrain train prepared/books
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.cli.options import TEXT_FIELD, names, option
from pretrain.cli.output import Output
from pretrain.corpus.config import CorpusConfig
from pretrain.data.preparation import prepare
from pretrain.fileio import read_json
from pretrain.runner.text import stage_progress

OPTIONS = (
    option(
        "SOURCE",
        "files, folders or patterns: text, HTML, JSON, CSV, Parquet, WARC, PDF, EPUB, mail",
        nargs="+",
    ),
    option("--out DIR", "new folder", required=True),
    option(
        "--tokenizer NAME|DIR",
        "bpe, gpt, characters, bytes, gpt2, or a folder or file of a tokenizer",
        "bpe",
    ),
    option("--vocab-size N", "size of a new BPE vocabulary", type=int),
    TEXT_FIELD,
    option("--document-separator TEXT", "what divides the documents of a text file"),
    option("--val-fraction F", "fraction of the documents to hold out", type=float),
    option(
        "--deduplicate",
        "of equal documents, or of nearly equal ones too, keep only the first",
        "exact",
        choices=("none", "exact", "near"),
    ),
    option("--filters NAME,...", "rules that documents must pass: gopher,c4,fineweb"),
    option("--languages CODE,...", "remove documents in other languages, as in en,de"),
    option(
        "--evaluation-text FILE",
        "a text that the model will be evaluated on: its overlap with the corpus is reported; may "
        "be given several times",
        action="append",
    ),
    option(
        "--remove-overlap",
        "remove documents that share 13 consecutive words with an --evaluation-text",
    ),
    option("--workers N", "processes", 1),
    option("--strict", "stop at the first bad record instead of skipping it"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    corpus = CorpusConfig(
        deduplicate=args.deduplicate,
        filters=names(args.filters),
        languages=names(args.languages),
        evaluation_texts=tuple(args.evaluation_text or ()),
        remove_overlap=args.remove_overlap,
    )
    settings = "tokenizer vocab_size text_field document_separator val_fraction strict workers"
    options = {name: getattr(args, name) for name in settings.split()}
    progress = stage_progress(output.log)
    try:
        data = prepare(args.source, args.out, corpus=corpus, progress=progress, **options)
    except KeyboardInterrupt:
        output.log("stopped; the same command continues from here")
        raise
    report = read_json(Path(args.out) / "report.json")
    for name in ("train", "val"):
        stream = data.split(name)
        output.log(
            f"{name:<6} {stream.n_documents:,} documents, {stream.n_tokens:,} tokens, "
            f"{stream.n_bytes:,} bytes of text"
        )
    for name, counts in report["sources"].items():
        output.log(
            f"from {name}: {counts['n_files']:,} files, {counts['n_documents']:,} documents, "
            f"{counts['n_text_bytes']:,} bytes, {counts['n_tokens']:,} tokens"
        )
    n_removed = sum(report["removed"].values())
    if n_removed:
        output.log(f"removed {n_removed:,} documents, all of them in removed.jsonl:")
    for reason, count in report["removed"].items():
        output.log(f"  {count:>9,}  {reason}")
    for name, row in report.get("overlap", {}).items():
        output.log(
            f"{row['percent']:.2f} % of {name} is in this text: {row['in_corpus']:,} of its "
            f"{row['ngrams']:,} different 8 words in a row"
        )
    output.facts(report["facts"])
    if report["n_problems"]:
        output.log(f"{report['n_problems']:,} problems, all of them in problems.jsonl")
    if report["strangest"]:
        output.log("documents with the most unusual number of bytes per token:")
    for document in report["strangest"][:3]:
        output.log(
            f"  {document['bytes_per_token']:6.2f}  {document['id']}: {document['begins'][:60]!r}"
        )
    output.log(f"vocabulary {data.manifest.vocab_size:,}; the report is {args.out}/report.json")
    output.result({"out": str(args.out), "vocab_size": data.manifest.vocab_size, **report})
