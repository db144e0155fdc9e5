"""Average the probabilities, or the weights, of several models into a MODEL like any other.

pretrain mix runs/a runs/b runs/c --out runs/mix              each with the same weight
pretrain mix runs/a runs/b --out runs/mix --weights 3 1
pretrain mix runs/a --counts 5 --fit notes.txt --out runs/mix      with the counts of its text
pretrain mix runs/a/checkpoints/step-* --average weights --out runs/mean      an ordinary model

The models may differ in family and size; they must have the same tokenizer. What they have learned
is copied: the mix does not need their runs. It is neither trained nor exported. Of a run that is
itself a mean of networks, the first network is a part. An average of weights is one model, as fast
as each part, and is trained and exported too; its parts are checkpoints of one run, or models that
were trained further from the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.cli.options import OUT, option
from pretrain.cli.out_folder import resolve_out, work_folder
from pretrain.cli.output import Output
from pretrain.run.identity import differences
from pretrain.runner.mix import counts_of, parts_of, probabilities_of, write_mix
from pretrain.runner.open import MODEL_HELP, load_model, settings_of_model
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
    option(
        "--average",
        "what is averaged: probabilities, or weights (of one architecture)",
        "probabilities",
        choices=("probabilities", "weights"),
    ),
    option("--fit TEXT", "a file that none of them was trained on, for the best weights"),
)


def run(args: argparse.Namespace, output: Output) -> None:
    out, n = resolve_out(args.out), len(args.model) + bool(args.counts)
    weights = args.weights or [1.0] * n
    if args.weights and args.fit:
        raise ValueError("--weights must come without --fit, which chooses them")
    of_weights = args.average == "weights"
    if of_weights and (args.counts or args.fit):
        raise ValueError(
            "--average weights must come without --counts, which have none, and without --fit, "
            "which is for probabilities; give --weights"
        )
    if n < 2:
        raise ValueError(f"{args.model[0]} is one model; mix needs two or more, or --counts")
    if len(weights) != n or not all(0 < each < float("inf") for each in weights):
        raise ValueError(f"--weights must be {n} numbers above 0, one for each part")
    for name in args.model:
        check_is_one_model(Path(name), "a part of another mix")
    models = [load_model(name, device="cpu", alone=True) for name in args.model]
    tokenizer, settings = models[0].tokenizer, settings_of_model(models[0].config)
    for name, model in zip(args.model, models, strict=True):
        if model.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(
                f"models of a mix must have the same tokenizer: that of {args.model[0]} has "
                f"{tokenizer.vocab_size:,} tokens and SHA-256 {tokenizer.sha256[:12]}, that of "
                f"{name} {model.tokenizer.vocab_size:,} and {model.tokenizer.sha256[:12]}"
            )
        changes = differences(settings, settings_of_model(model.config))
        if of_weights and (wrong := [str(change) for change in changes if change.impossible]):
            raise ValueError(
                "models whose weights are averaged must have the same architecture: that of "
                f"{args.model[0]} and {name} differs in {'; '.join(wrong)}"
            )

    import numpy as np

    from pretrain.evaluate.loss import Ids
    from pretrain.evaluate.task_files import read_whole
    from pretrain.model.counts import check_counts
    from pretrain.model.mixture import fit_weights

    parts = parts_of(models)
    if args.counts:
        check_counts("--counts", args.counts, tokenizer.vocab_size)
        train = text_of_run(models[0], output.log).split("train")
        parts += counts_of(models[0], train, order=args.counts, sha256=train.sha256)
    if args.fit:
        documents, _ = read_whole(args.fit, None)
        pieces = [[tokenizer.start_of_text, *tokenizer.encode(each.text)] for each in documents]
        text = Ids(np.concatenate(pieces).astype(np.int64))
        weights = fit_weights(probabilities_of(parts, text))
    with work_folder(out) as work:
        lines = write_mix(work, models, parts, weights, average=args.average)
    for line in lines:
        output.log(f"{line['weight']:.4f}  {line['path']}")
    output.log(f"{args.out}: the weighted mean of their {args.average}")
    output.result({"model": args.out, "parts": lines})
