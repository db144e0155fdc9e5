"""Write a model for other programs, and verify with them that they read the same model.

pretrain export runs/english-1 --format hf --out english      for transformers, vLLM, ...
pretrain export runs/mine --format gguf --out english         for llama.cpp: gpt2 and llama only

The family `fast` runs here and in transformers; for vLLM, llama.cpp, ONNX, OpenVINO or MLX train
--model.family llama.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.cli.options import MODEL, OUT, option
from pretrain.cli.out_folder import keep_aside, resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.fileio import nan_to_null, write_json
from pretrain.machine import install_command
from pretrain.run.directory import MIX_FOLDER
from pretrain.runner.open import load_model
from pretrain.runner.request import check_is_one_model

# Of each text that is scored on both sides.
_TEXT_CHARACTERS = 16_384
_NUMBERS = {"hf": ("f32", "f16", "bf16"), "gguf": ("f32", "f16", "q8_0")}
_VERIFIERS = {"hf": ("transformers", "hf"), "gguf": ("llama-cpp-python", "llamacpp")}

OPTIONS = (
    MODEL,
    option("--format", "hf or gguf", choices=tuple(_NUMBERS), required=True),
    OUT,
    option(
        "--type",
        "number format; bf16 for hf only, q8_0 for gguf only",
        "f32",
        choices=("f32", "f16", "bf16", "q8_0"),
    ),
    option("--text FILE", "text to compare perplexity on [bundled corpus]"),
    option("--unverified", "exit with 0 if the library that verifies is missing"),
)


def run(args: argparse.Namespace, output: Output) -> int:
    out = resolve_out(args.out)
    check_is_one_model(Path(args.model), "exported")
    if args.type not in _NUMBERS[args.format]:
        types = ", ".join(_NUMBERS[args.format])
        raise ValueError(f"--type {args.type} is not for {args.format}; it must be one of {types}")
    text = _text(args.text, output)

    from pretrain.evaluate.loss import ScoredModel, score_texts
    from pretrain.export.gguf import write_gguf
    from pretrain.export.hf import write_hugging_face
    from pretrain.export.verification import (
        DISAGREES,
        FILE_NAME,
        NOT_VERIFIED,
        Exported,
        table,
        verification_library,
        verify_export,
    )

    # On the CPU in float32: the reference that the other library is compared with.
    model = load_model(args.model, device="cpu", alone=True)
    if (Path(args.model) / MIX_FOLDER).is_dir():
        output.log(
            f"{args.model} is a mean of several parts, which no other library reads: its first "
            "network alone is exported"
        )
    while (character := model.tokenizer.first_unencodable(text)) is not None:
        text = text.replace(character, "")
    if not len(model.tokenizer.encode(text)):
        raise ValueError(
            "the vocabulary of this model has no token of the text; name another text with --text"
        )
    with work_folder(out) as work:
        path = work / "model.gguf" if args.format == "gguf" else work
        write = write_gguf if args.format == "gguf" else write_hugging_face
        # This also rounds the model's weights to the numbers in the files.
        write(path, decoder=model.decoder, tokenizer=model.tokenizer, numbers=args.type)
        exported = Exported(path, args.format, args.type, model.decoder, model.tokenizer)
        output.log(
            f"written; comparing with {verification_library(args.format) or 'no library'} ..."
        )
        score = score_texts(ScoredModel(model.decoder, model.tokenizer, model.world), [text])
        report = verify_export(exported, text, score, threads=model.world.threads)
        write_json(work / FILE_NAME, nan_to_null(report), indent=2)
        verdict, where = report["verdict"], args.out
        if verdict == DISAGREES:  # kept for inspection
            where = str(keep_aside(work, out, "disagrees"))
    for what, value, result in table(report):
        output.log(f"{what:<10}  {result:<12}  {value}")
    library = f" with {report['library']}" if "library" in report else ""
    output.log(f"{where}: {verdict}{library}")
    output.result({"out": where, **report})
    if verdict == NOT_VERIFIED and not args.unverified:
        package, extra = _VERIFIERS[args.format]
        install = install_command(package, extra=extra)
        remedy = "correct that" if "unable" in report else install
        output.log(f"no other library could read it: {remedy}, and export again; or --unverified")
        return 2
    return 1 if verdict == DISAGREES else 0


def _text(file: str | None, output: Output) -> str:
    """Return the text that both programs score. ValueError if it is empty."""
    text = ""
    for document in output.documents(file or "bundled"):
        text += document.text + "\n"
        if len(text) >= _TEXT_CHARACTERS:
            break
    if not text.strip():
        raise ValueError(f"--text {file} has no text to score")
    return text[:_TEXT_CHARACTERS]
