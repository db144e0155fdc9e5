"""Write a model as other programs read it, with a certificate that they read the same model.

pretrain export runs/english-1 --format hf --out english      for transformers, vLLM, ...
pretrain export runs/english-1 --format gguf --out english    for llama.cpp: gpt2 and llama only
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.out_folder import keep_aside, resolve_out, work_folder
from pretrain.cli.output import Output, plain
from pretrain.fileio import move_into_place
from pretrain.runner.open import MODEL_HELP, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.export import Exported

# Of each text that is scored on both sides.
_TEXT_CHARACTERS = 16_384
_NUMBERS = {"hf": ("f32", "f16", "bf16"), "gguf": ("f32", "f16", "q8_0")}
_PACKAGES = {
    "hf": "python -m pip install 'pretrain[hf]'",
    "gguf": "python -m pip install 'pretrain[llamacpp]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--format", required=True, choices=("hf", "gguf"), help="hf or gguf")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--type",
        default="f32",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="how numbers are stored; bf16 for hf only, q8_0 for gguf only [f32]",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text whose perplexity is compared [of the bundled corpus]"
    )
    parser.add_argument(
        "--unverified", action="store_true", help="exit 0 where no other library can check"
    )


def run(args: argparse.Namespace, output: Output) -> int:
    out = resolve_out(args.out)
    if args.type not in _NUMBERS[args.format]:
        legal = ", ".join(_NUMBERS[args.format])
        raise ValueError(f"--type {args.type} is not for {args.format}; legal: {legal}")
    text = _text(args.text)

    from pretrain.export.verification import DISAGREES, FILE_NAME, NOT_VERIFIED, table
    from pretrain.runner.open import load_model

    # On the CPU in float32: the reference that every other library is held to.
    model = load_model(args.model, device="cpu")
    text = _encodable(model, text)
    with work_folder(out) as work:
        exported = _write(model, work, args.format, args.type)
        certificate = _certify(model, exported, text, output)
        content = json.dumps(plain(certificate), indent=2, allow_nan=False)
        (work / FILE_NAME).write_text(content + "\n", encoding="utf-8")
        verdict, where = certificate["verdict"], args.out
        if verdict == DISAGREES:  # kept, for somebody to look at
            where = str(keep_aside(work, out, "disagrees"))
        else:
            move_into_place(work, out)
    for what, found, says in table(certificate):
        output.log(f"{what:<10}  {says:<12}  {found}")
    library = f" with {certificate['library']}" if "library" in certificate else ""
    output.log(f"{where}: {verdict}{library}")
    output.result({"out": where, **certificate})
    if verdict == NOT_VERIFIED and not args.unverified:
        wanted = "mend that" if "unable" in certificate else _PACKAGES[args.format]
        output.log(f"nothing here could read it back: {wanted}, and export again; or --unverified")
        return 2
    return 1 if verdict == DISAGREES else 0


def _text(file: str | None) -> str:
    """What is scored on both sides. ValueError where there is nothing to score."""
    from pretrain.corpus import read_documents

    text = ""
    for document in read_documents(file or "bundled"):
        text += document.text + "\n"
        if len(text) >= _TEXT_CHARACTERS:
            break
    if not text.strip():
        raise ValueError(f"--text {file} holds no text to score; name one that does")
    return text[:_TEXT_CHARACTERS]


def _write(model: LoadedModel, folder: Path, format: str, numbers: str) -> Exported:
    """Write the files; the model's weights then become the numbers in them, rounded as they are."""
    from pretrain.export import Exported, write_gguf, write_hugging_face
    from pretrain.export.families import is_native

    decoder = model.decoder
    own = {name: p.detach() for name, p in decoder.named_parameters()}

    def rounded(name: str, values: Tensor) -> None:
        own[name].copy_(values)

    path = folder / "model.gguf" if format == "gguf" else folder
    write = write_gguf if format == "gguf" else write_hugging_face
    write(
        path,
        config=decoder.config,
        tokenizer=model.tokenizer,
        read=own.__getitem__,
        numbers=numbers,
        rounded=rounded,
    )
    own_code = format == "hf" and not is_native(decoder.config)
    return Exported(path, format, numbers, own_code, decoder, model.tokenizer)


def _certify(model: LoadedModel, exported: Exported, text: str, output: Output) -> dict[str, Any]:
    from pretrain.evaluate import score_texts
    from pretrain.export.verification import verification_library, verify_export
    from pretrain.model import LMLoss

    output.log(f"written; asking {verification_library(exported.format) or 'nobody'} ...")
    score = score_texts(LMLoss(model.decoder), model.tokenizer, [text], world=model.world)
    return verify_export(exported, text, score, threads=model.world.threads)


def _encodable(model: LoadedModel, text: str) -> str:
    """The text without the characters that a vocabulary of characters lacks. ValueError where
    nothing is left."""
    tokenizer = model.tokenizer
    if tokenizer.kind == "characters":
        known = {tokenizer.id_to_token(id_) for id_ in range(tokenizer.vocab_size)}
        text = "".join(character for character in text if character in known)
    if not len(tokenizer.encode(text)):
        raise ValueError(
            "this model's vocabulary has nothing of the text that is scored; name one with --text"
        )
    return text
