"""Turn text into a prepared folder: token ids, the tokenizer, and a report of what was read and
skipped. What a file holds is told by its content; .gz, .bz2, .xz and .zst are unpacked.

  pretrain prepare books/ letters.jsonl --out prepared/books
  pretrain train prepared/books
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pretrain.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or patterns: text, HTML, JSON, CSV, Parquet, WARC",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="NAME|DIR",
        help="bpe, characters, bytes, or a folder with tokenizer.json [bpe]",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="entries of a new BPE vocabulary"
    )
    parser.add_argument(
        "--text-field", metavar="F", help="field of a jsonl record that holds the text"
    )
    parser.add_argument(
        "--val-fraction", type=float, metavar="F", help="share of the documents to hold out"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode [1]"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad record instead of skipping it"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.corpus import Problem
    from pretrain.data.preparation import prepare

    data = prepare(
        arguments.source,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        text_field=arguments.text_field,
        val_fraction=arguments.val_fraction,
        strict=arguments.strict,
        workers=arguments.workers,
        progress=output.stages(),
    )
    report = json.loads((Path(arguments.out) / "report.json").read_text(encoding="utf-8"))
    splits = {name: data.split(name) for name in ("train", "val")}
    for name, stream in splits.items():
        output.say(
            f"{name:<6} {stream.n_documents:,} documents, {stream.n_tokens:,} tokens, "
            f"{stream.n_bytes:,} bytes of text"
        )
    for name, counts in report["sources"].items():
        output.say(
            f"from {name}: {counts['n_files']:,} files, {counts['n_documents']:,} documents, "
            f"{counts['n_text_bytes']:,} bytes, {counts['n_tokens']:,} tokens"
        )
    if report["n_problems"]:
        output.say(f"{report['n_problems']:,} problems, all of them in problems.jsonl; the first:")
        for problem in report["problems"][:5]:
            output.say(f"  {Problem(**problem)}")
    if report["strangest"]:
        output.say("strangest, by bytes a token:")
    for document in report["strangest"][:3]:
        output.say(
            f"  {document['bytes_per_token']:6.2f}  {document['id']}: {document['begins'][:60]!r}"
        )
    output.say(
        f"vocabulary {data.manifest.vocab_size:,}; the report is {arguments.out}/report.json"
    )
    output.result({"out": str(arguments.out), "vocab_size": data.manifest.vocab_size, **report})
    return 0
