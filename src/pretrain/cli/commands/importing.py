"""Turn a model of another library into a MODEL: to generate, evaluate, export, or train on.

pretrain import path/to/folder --out runs/theirs      config.json, safetensors and tokenizer
pretrain import model.gguf --out runs/theirs          GGUF of llama or gpt2: F32, F16, Q8_0, Q4_0/1
pretrain import stories260K.bin --out runs/stories    llama2.c, its tok*.bin in the same folder
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from pretrain.cli.options import OUT, option
from pretrain.cli.out_folder import resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.config import compose
from pretrain.fileio import file_sha256
from pretrain.runner.open import write_model

OPTIONS = (
    option("SOURCE", "a folder, a .gguf or a llama2.c .bin"),
    OUT,
    option("--tokenizer FILE", "for llama2.c: the model's tokenizer, if it is in another folder"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    out = resolve_out(args.out)

    from pretrain.export.importing import import_model

    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    model = import_model(Path(args.source), tokenizer=tokenizer)
    origin = {
        "format": model.format,
        "files": {file.name: file_sha256(file) for file in model.files},
    }

    from pretrain.model.config import n_parameters

    n = n_parameters(model.config, vocab_size=model.tokenizer.vocab_size)
    config = compose([{"model": asdict(model.config)}])
    with work_folder(out) as work:
        write_model(work, config, model.tokenizer, model.parameters(), imported=origin)
    output.log(
        f"{args.out}: {model.config.family} of {n:,} parameters, {model.config.n_layers} "
        f"layers of {model.config.d_model}, context {model.config.window_tokens:,}, vocabulary "
        f"{model.tokenizer.vocab_size:,}, from {model.format}"
    )
    output.result({"model": args.out, "parameters": n, **origin})
