"""What follows the first network of a run: further networks, and the mean of all with the counts
of the text.

A network of `train.members` is a run of its own in members/N, from other random weights. If it has
minutes for many epochs it is of another kind: without n-gram tables, which would memorise the text,
and with dropout. The mean of all, in mix/, is what `load_model` opens. "Neural Network Ensembles"
(Hansen and Salamon, 1990); "Pre-training under infinite compute" (Kim et al., 2025).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig
from pretrain.machine import free_memory
from pretrain.run.directory import (
    CHECKPOINTS,
    MEMBERS,
    MIX_FOLDER,
    PREDICTIONS,
    SUMMARY,
    read_summary,
    write_json,
)
from pretrain.runner.open import LoadedModel, load_model
from pretrain.runner.text import text_of_run
from pretrain.train.config import filled
from pretrain.train.resolve import MOST_EPOCHS, least_epochs

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.format import TokenStream
    from pretrain.runner.mix import Parts


def is_missing(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Return whether a run whose first network is finished lacks its mean."""
    has_parts = (config.train.members or 1) > 1 or bool(config.train.counts)
    return has_parts and MIX_FOLDER not in summary


def train_members(folder: Path, config: RunConfig, train: Callable[[Path, Layer, str], int]) -> int:
    """Train the networks after the first that are not finished yet: `train` gets the folder of
    each, its settings and its name, and returns an exit code; so does this, at the first not 0."""
    n = config.train.members or 1
    for number in range(2, n + 1):
        member = folder / MEMBERS / str(number)
        if not (member / SUMMARY).is_file():
            done = [folder, *(folder / MEMBERS / str(each) for each in range(2, number))]
            settings = member_settings(config, [read_summary(each) for each in done])
            kind = "without tables, with dropout" if "model" in settings else "other random weights"
            if code := train(member, settings, f"network {number} of {n}: {kind}"):
                return code
    return 0


def member_settings(config: RunConfig, done: list[dict[str, Any]]) -> Layer:
    """Return the settings of a network that differ from those of the first, by the summaries of
    those before it, the first ahead: an equal part of the minutes that they have left."""
    train, first = config.train, done[0]
    own: dict[str, Any] = {"seed": train.seed + len(done), "members": 1, "counts": 0}
    if train.minutes is None or "minutes" not in first:
        return {"train": own}
    left = train.minutes - sum(summary["minutes"] for summary in done)
    minutes = max(0.01, left / ((train.members or 1) - len(done)))
    own |= {"steps": None, "minutes": minutes}
    epoch, n_tokens = first["minutes"] / first["epochs"], round(first["tokens"] / first["epochs"])
    if minutes < least_epochs(n_tokens) * epoch or not config.model.ngram_rows:
        return {"train": own}
    own["minutes"] = min(minutes, MOST_EPOCHS * epoch)
    # More tokens than for tables, which need many updates in their one epoch.
    own["batch_tokens"] = max(filled(train.batch_tokens), min(4 * filled(train.batch_tokens), 4096))
    own |= {"micro_batch_rows": None, "evaluate_every": None, "save_every": None}
    dropout = 0.1 if minutes < 6 * epoch else 0.2
    model = {"ngram_rows": 0, "dropout": max(config.model.dropout, dropout)}
    return {"train": own, "model": model, "schedule": {"warmup_steps": None}}


def average(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Write the mean of a run's networks and counts, and return its summary, in which it replaces
    the first network. Checkpoints of further networks, which it contains, are deleted.

    Weights are fitted to the held-out text. What is reported is not: each half of the held-out text
    is scored with the weights of the other.
    """
    from pretrain.model.mixture import fit_weights
    from pretrain.runner.mix import counts_of, parts_of, probabilities_of, write_mix

    free_memory()
    start = time.perf_counter()
    members = sorted((folder / MEMBERS).glob("*/"), key=lambda path: int(path.name))
    summaries = [read_summary(each) for each in (folder, *members)]
    paths = [
        run / summary["checkpoint"]
        for run, summary in zip([folder, *members], summaries, strict=True)
    ]
    models = [load_model(path, device=config.train.device) for path in paths if path.is_dir()]
    biases = [
        summary.pop("choice", {"nats": 0.0})["nats"]
        for summary, path in zip(summaries, paths, strict=True)
        if path.is_dir()
    ]
    names = [f"network {number}" for number in range(1, len(models) + 1)]
    first, parts = models[0], parts_of(models)
    data = text_of_run(first, lambda line: None)
    if config.train.counts:
        train = data.split("train")
        parts += counts_of(first, train, order=config.train.counts, sha256=train.sha256)
        names.append("counts")

    val = data.split("val")
    with first.world.autocast(first.precision):
        p_NP = probabilities_of(parts, val)
    weights = fit_weights(p_NP)
    shutil.rmtree(folder / MIX_FOLDER, ignore_errors=True)
    (folder / MIX_FOLDER).mkdir()
    write_mix(folder / MIX_FOLDER, models, parts, weights)

    lengths = first.tokenizer.byte_lengths[val.read(1, val.n_tokens)]
    # To first order, since a part's weight is its mean share of what the mean predicts.
    bias = sum(weight * nats for weight, nats in zip(weights, biases, strict=False))
    n_bytes = int(lengths.sum())
    summary = summaries[0] | _scores(folder, first, parts, weights, p_NP, val, n_bytes, bias)
    for row, name in zip(summary[MIX_FOLDER], names, strict=True):
        row["name"] = name
    times = {
        name: sum(each["seconds"].get(name, 0) for each in summaries) for name in summary["seconds"]
    }
    peaks = [first.world.peak_memory_bytes(), *(each["peak_memory_bytes"] for each in summaries)]
    seconds = time.perf_counter() - start
    summary |= {
        "seconds": {**times, "the mean": seconds},
        "total_seconds": seconds + sum(each["total_seconds"] for each in summaries),
        "peak_memory_bytes": max(peaks),
    }
    if "minutes" in summary:
        summary["minutes"] = sum(each.get("minutes", 0.0) for each in summaries)
    write_json(folder / SUMMARY, summary)
    for member in members:
        shutil.rmtree(member / CHECKPOINTS, ignore_errors=True)
    return summary


def _scores(
    folder: Path,
    first: LoadedModel,
    parts: Parts,
    weights: list[float],
    p_NP: Tensor,
    val: TokenStream,
    n_bytes: int,
    bias: float,
) -> dict[str, Any]:
    """Return what summary.json says of the held-out text, which is N targets and `n_bytes`, and
    write the predictions of a passage of it. The networks look better by `bias` nats than they are,
    since their checkpoints were chosen by it (`nats_of_choice`)."""
    import torch

    from pretrain.evaluate.loss import Score, ScoredModel
    from pretrain.evaluate.token_stats import bits_per_byte_error
    from pretrain.model.mixture import Mixture, fit_weights
    from pretrain.run.log import choice
    from pretrain.train.eval_hooks import token_losses

    def score(p_N: Tensor) -> Score:
        return Score(-float(p_N.log().sum()), len(p_N), n_bytes)

    halves = (p_NP[: len(p_NP) // 2], p_NP[len(p_NP) // 2 :])
    pairs = zip(halves, reversed(halves), strict=True)
    fitted = [own @ torch.tensor(fit_weights(other), dtype=own.dtype) for own, other in pairs]
    own = score(torch.cat(fitted))
    whole = replace(own, nats=own.nats + bias)
    mixture = Mixture([decoder for decoder, _ in parts], weights)
    mean = ScoredModel(mixture, first.tokenizer, first.world, first.precision)
    write_json(folder / PREDICTIONS, token_losses(mean, val))
    return ({"choice": choice(bias, own.bits_per_byte)} if bias else {}) | {
        "val_nats_per_token": whole.nats_per_token,
        "val_perplexity": whole.perplexity,
        "val_bits_per_byte": whole.bits_per_byte,
        "val_bits_per_byte_stderr": bits_per_byte_error(mean, val),
        MIX_FOLDER: [
            {"weight": weight, "bits_per_byte": score(column).bits_per_byte}
            for weight, column in zip(weights, p_NP.unbind(1), strict=True)
        ],
    }
