"""Average the probabilities of several models: the result is a MODEL like any other.

pretrain mix runs/a runs/b runs/c --out runs/mix              each with the same weight
pretrain mix runs/a runs/b --out runs/mix --weights 3 1
pretrain mix runs/a --counts 5 --fit notes.txt --out runs/mix      with the counts of its text

The models may differ in family and size; they must have the same tokenizer. What they have learned
is copied: the mix does not need their runs. It is neither trained nor exported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pretrain.cli.options import OUT, option
from pretrain.cli.out_folder import resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.config import to_dict
from pretrain.fileio import write_json
from pretrain.run.directory import MIX
from pretrain.run.identity import TEXTS
from pretrain.runner.open import MODEL_HELP, load_model, write_model
from pretrain.runner.request import check_is_one_model
from pretrain.runner.text import text_of_run

OPTIONS = (
    option("MODEL", f"two or more; {MODEL_HELP}", nargs="+"),
    OUT,
    option("--weights W", "a number above 0 for each part [equal]", nargs="+", type=float),
    option(
        "--counts N",
        "one more part: how often each sequence of up to N tokens is in the text that the first "
        "model was trained on (Kneser-Ney)",
        type=int,
        least=1,
    ),
    option("--fit TEXT", "a file that none of them was trained on, for the best weights"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    out, n = resolve_out(args.out), len(args.model) + bool(args.counts)
    weights = args.weights or [1.0] * n
    if args.weights and args.fit:
        raise ValueError("--weights must come without --fit, which chooses them")
    if n < 2:
        raise ValueError(f"{args.model[0]} is one model; mix needs two or more, or --counts")
    if len(weights) != n or not all(0 < each < float("inf") for each in weights):
        raise ValueError(f"--weights must be {n} numbers above 0, one for each part")
    for name in args.model:
        check_is_one_model(Path(name), "a part of another mix")
    models = [load_model(name, device="cpu") for name in args.model]
    tokenizer = models[0].tokenizer
    for name, model in zip(args.model, models, strict=True):
        if model.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"models of a mix must have the same tokenizer: that of {args.model[0]} has "
                f"{tokenizer.vocab_size:,} tokens and SHA-256 {tokenizer.sha256[:12]}, that of "
                f"{name} {model.tokenizer.vocab_size:,} and {model.tokenizer.sha256[:12]}"
            )

    import numpy as np

    from pretrain.data.batches import evaluation_batches
    from pretrain.evaluate.baselines import MAX_COUNTED_TOKENS
    from pretrain.evaluate.loss import EVALUATION_TOKENS, Ids
    from pretrain.evaluate.task_files import read_whole
    from pretrain.model.counts import count_decoder
    from pretrain.model.mixture import Mixture

    parts: list[dict[str, Any]] = [
        {
            "path": str(model.path.resolve()),
            "sha256": model.checkpoint and model.checkpoint.sha256,
            "model": to_dict(model.config)["model"],
        }
        for model in models
    ]
    decoders = [model.decoder for model in models]
    if args.counts:
        stream = text_of_run(models[0], output.log).split("train")
        ids = stream.read(0, min(stream.n_tokens, MAX_COUNTED_TOKENS))
        window, size = models[0].config.model, tokenizer.vocab_size
        counts = count_decoder(ids, window, vocab_size=size, order=args.counts)
        decoders.append(counts)
        sizes = [len(keys) for keys in counts.keys]
        parts.append({"path": f"counts of {parts[0]['path']}", "sha256": stream.sha256})
        parts[-1] |= {"model": parts[0]["model"], "sizes": sizes}
    mixture = Mixture(decoders, weights)
    if args.fit:
        context = mixture.config.window_tokens
        documents, _ = read_whole(args.fit, None)
        pieces = [[tokenizer.start_of_text, *tokenizer.encode(each.text)] for each in documents]
        text = Ids(np.concatenate(pieces).astype(np.int64))
        rows = max(1, EVALUATION_TOKENS // context)
        weights = mixture.fit_weights(evaluation_batches(text, context_length=context, rows=rows))
    for part, weight in zip(parts, weights, strict=True):
        part["weight"] = weight / sum(weights)
    # The settings of a part that reads the window of the mix, and the text if all have the same.
    config = next(model.config for model in models if model.decoder.config is mixture.config)
    prints = [m.checkpoint.state.get("fingerprint", {}) if m.checkpoint else {} for m in models]
    texts = {name: prints[0].get(name) for name in TEXTS}
    shared = texts if all(texts.items() <= each.items() for each in prints) else {}
    with work_folder(out) as work:
        write_json(work / MIX, {"parts": parts}, indent=2)
        parameters = mixture.named_parameters()
        write_model(work, config, tokenizer, parameters, texts=shared, parts=parts)
    for part in parts:
        output.log(f"{part['weight']:.4f}  {part['path']}")
    output.log(f"{args.out}: the weighted mean of their probabilities")
    output.result({"model": args.out, "parts": parts})
