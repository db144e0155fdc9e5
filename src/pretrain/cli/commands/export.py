"""Write a model for other programs, and verify with them that they read the same model.

pretrain export runs/english-1 --format hf --out english      for transformers, vLLM, ...
pretrain export runs/english-1 --format gguf --out english    for llama.cpp: gpt2 and llama only
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.options import MODEL, OUT, Option
from pretrain.cli.out_folder import keep_aside, resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.fileio import move_into_place, nan_to_null
from pretrain.runner.open import LoadedModel

if TYPE_CHECKING:
    from pretrain.export.verification import Exported

# Of each text that is scored on both sides.
_TEXT_CHARACTERS = 16_384
_NUMBERS = {"hf": ("f32", "f16", "bf16"), "gguf": ("f32", "f16", "q8_0")}
_PACKAGES = {
    "hf": "python -m pip install 'pretrain[hf]'",
    "gguf": "python -m pip install 'pretrain[llamacpp]'",
}

OPTIONS = (
    MODEL,
    Option("--format", "hf or gguf", choices=tuple(_NUMBERS), required=True),
    OUT,
    Option(
        "--type",
        "number format; bf16 for hf only, q8_0 for gguf only",
        "f32",
        choices=("f32", "f16", "bf16", "q8_0"),
    ),
    Option("--text FILE", "text to compare perplexity on [bundled corpus]"),
    Option("--unverified", "exit with 0 if the library that verifies is missing"),
)


def run(args: argparse.Namespace, output: Output) -> int:
    out = resolve_out(args.out)
    if args.type not in _NUMBERS[args.format]:
        types = ", ".join(_NUMBERS[args.format])
        raise ValueError(f"--type {args.type} is not for {args.format}; it must be one of {types}")
    text = _text(args.text)

    from pretrain.export.verification import DISAGREES, FILE_NAME, NOT_VERIFIED, table
    from pretrain.runner.open import load_model

    # On the CPU in float32: the reference that the other library is compared with.
    model = load_model(args.model, device="cpu")
    text = _encodable(model, text)
    with work_folder(out) as work:
        exported = _write(model, work, args.format, args.type)
        report = _verify(model, exported, text, output)
        content = json.dumps(nan_to_null(report), indent=2, allow_nan=False)
        (work / FILE_NAME).write_text(content + "\n", encoding="utf-8")
        verdict, where = report["verdict"], args.out
        if verdict == DISAGREES:  # kept for inspection
            where = str(keep_aside(work, out, "disagrees"))
        else:
            move_into_place(work, out)
    for what, value, result in table(report):
        output.log(f"{what:<10}  {result:<12}  {value}")
    library = f" with {report['library']}" if "library" in report else ""
    output.log(f"{where}: {verdict}{library}")
    output.result({"out": where, **report})
    if verdict == NOT_VERIFIED and not args.unverified:
        remedy = "correct that" if "unable" in report else _PACKAGES[args.format]
        output.log(f"no other library could read it: {remedy}, and export again; or --unverified")
        return 2
    return 1 if verdict == DISAGREES else 0


def _text(file: str | None) -> str:
    """Return the text that both programs score. ValueError if it is empty."""
    from pretrain.corpus.reading import read_documents

    text = ""
    for document in read_documents(file or "bundled"):
        text += document.text + "\n"
        if len(text) >= _TEXT_CHARACTERS:
            break
    if not text.strip():
        raise ValueError(f"--text {file} has no text to score")
    return text[:_TEXT_CHARACTERS]


def _write(model: LoadedModel, folder: Path, format: str, numbers: str) -> Exported:
    """Write the files, and round the model's weights to the numbers in them."""
    from pretrain.export.gguf import write_gguf
    from pretrain.export.hf import write_hugging_face
    from pretrain.export.verification import Exported

    path = folder / "model.gguf" if format == "gguf" else folder
    write = write_gguf if format == "gguf" else write_hugging_face
    write(path, decoder=model.decoder, tokenizer=model.tokenizer, numbers=numbers)
    return Exported(path, format, numbers, model.decoder, model.tokenizer)


def _verify(model: LoadedModel, exported: Exported, text: str, output: Output) -> dict[str, Any]:
    from pretrain.evaluate.loss import ScoredModel, score_texts
    from pretrain.export.verification import verification_library, verify_export

    output.log(
        f"written; comparing with {verification_library(exported.format) or 'no library'} ..."
    )
    score = score_texts(ScoredModel(model.decoder, model.tokenizer, model.world), [text])
    return verify_export(exported, text, score, threads=model.world.threads)


def _encodable(model: LoadedModel, text: str) -> str:
    """Return the text without characters that the vocabulary lacks. ValueError if none is left."""
    tokenizer = model.tokenizer
    if tokenizer.kind == "characters":
        known = {tokenizer.id_to_token(id_) for id_ in range(tokenizer.vocab_size)}
        text = "".join(character for character in text if character in known)
    if not len(tokenizer.encode(text)):
        raise ValueError(
            "the vocabulary of this model has no token of the text; name another text with --text"
        )
    return text
