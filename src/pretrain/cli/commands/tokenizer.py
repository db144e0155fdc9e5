"""Train a tokenizer, encode and decode with one, inspect it.

pretrain tokenizer train books/ letters.jsonl --vocab-size 4096 --out my-tokenizer
pretrain tokenizer encode FILE --tokenizer my-tokenizer
pretrain tokenizer decode FILE --tokenizer my-tokenizer
pretrain tokenizer inspect books/ letters.jsonl --tokenizer my-tokenizer

The ids to decode are separated by spaces, commas or lines.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from pretrain.cli.options import SPECIAL, TEXT_FIELD, option
from pretrain.cli.output import Output
from pretrain.fileio import require_empty
from pretrain.tokenizer.config import TRAINED_NAMES
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import RARE, inspect
from pretrain.tokenizer.train import MAX_SAMPLE_BYTES, train_tokenizer

# Longer ids belong to no vocabulary, and Python refuses to read numbers of thousands of digits.
_ID = re.compile(r"\d{1,10}")

OPTIONS = (
    option("ACTION", None, choices=("train", "encode", "decode", "inspect")),
    option(
        "SOURCE",
        "text: files or folders to train on; one file, or - for stdin, for the rest",
        nargs="*",
    ),
    option("--tokenizer NAME|DIR", "a folder with tokenizer.json, or a run's"),
    option("--kind", "what to train", "bpe", choices=TRAINED_NAMES),
    option("--vocab-size N", "vocabulary size, bpe only", type=int),
    option(
        "--split",
        "how text is split into words before BPE merges",
        "gpt2",
        choices=("gpt2", "cl100k", "o200k", "llama3", "smollm"),
    ),
    option("--fast", "train by gigatoken (extra fast): six times as fast, split gpt2 only"),
    TEXT_FIELD,
    SPECIAL,
    option("--out DIR", "folder for the new tokenizer.json"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    if args.action == "train":
        _train(args, output)
        return
    if args.tokenizer is None:
        raise ValueError(f"tokenizer {args.action} needs --tokenizer DIR")
    tokenizer = load_tokenizer(args.tokenizer)
    if args.action in ("encode", "decode"):
        given = _read(args)
        content: dict[str, Any]
        if args.action == "encode":
            ids = tokenizer.encode(given, special=args.special).tolist()
            text, content = " ".join(map(str, ids)), {"ids": ids}
        else:
            numbers = [number for number in re.split(r"[\s,\[\]]+", given) if number]
            wrong = next((number for number in numbers if not _ID.fullmatch(number)), None)
            if wrong is not None:
                raise ValueError(f"{wrong[:40]!r} is not a token id; an id must be 1 to 10 digits")
            text = tokenizer.decode([int(number) for number in numbers])
            content = {"text": text}
        if not args.json:
            output.log(text)
        output.result(content)
        return
    texts = (
        (source, document.text)
        for source in args.source
        for document in output.documents(source, text_field=args.text_field)
    )
    report = inspect(tokenizer, texts)
    output.log(f"{tokenizer.vocab_size:,} tokens; end of text is {tokenizer.end_of_text}")
    output.log("longest: " + _shown(report["longest"]))
    output.log(
        f"unusual, because not valid text by themselves or one character repeated: "
        f"{report['n_strange']:,}; {_shown(report['strangest'])}"
    )
    for source, row in report.get("sources", {}).items():
        output.log(
            f"{source}: {row['bytes_per_token']:.2f} bytes a token, {row['tokens']:,} tokens"
        )
    if "n_unused" in report:
        output.log(f"never used: {report['n_unused']:,}; {_shown(report['unused'])}")
        output.log(f"used fewer than {RARE} times: {report['n_rare']:,}; {_shown(report['rare'])}")
    output.result(report)


def _train(args: argparse.Namespace, output: Output) -> None:
    if not args.source or args.out is None:
        raise ValueError("tokenizer train needs a SOURCE of text and --out DIR")
    out = Path(args.out)
    require_empty(out)
    documents = output.documents(args.source, text_field=args.text_field)
    texts = (document.text for document in documents)
    tokenizer = train_tokenizer(
        texts,
        name=args.kind,
        vocab_size=args.vocab_size,
        split=args.split,
        sample_bytes=MAX_SAMPLE_BYTES,
        fast=args.fast,
        log=output.log,
    )
    tokenizer.save(out)
    output.log(f"{tokenizer.vocab_size:,} tokens, written to {out}/tokenizer.json")
    output.result({"out": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256})


def _read(args: argparse.Namespace) -> str:
    if len(args.source) != 1:
        raise ValueError(f"tokenizer {args.action} needs one FILE, or - for standard input")
    (source,) = args.source
    if source == "-":
        data = sys.stdin.buffer.read()
    else:
        data = Path(source).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start:,} is {data[error.start]:#04x}"
        raise ValueError(f"{source} must be UTF-8 text, but {where}") from None


def _shown(tokens: list[dict[str, Any]]) -> str:
    return " ".join(repr(token["text"]) for token in tokens)
