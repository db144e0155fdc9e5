"""What follows the first network of a run: further networks, the mean of all with the counts of the
text, and of a tiny text the cross-validation.

A network of `train.members` is a run of its own in members/N, from other random weights. If it has
minutes for many epochs it is of another kind: without n-gram tables, which would memorise the text,
and with dropout. The mean of all, in mix/, is what `load_model` opens. "Neural Network Ensembles"
(Hansen and Salamon, 1990); "Pre-training under infinite compute" (Kim et al., 2025).

The held-out part of a tiny text is too small for a number with a small error. So a run in folds/N,
like this one, holds out another part, as long as that is so and the minutes are not over.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import mul
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from pretrain.config import Layer, RunConfig, compose, read_file
from pretrain.data.stages import n_folds
from pretrain.machine import free_memory
from pretrain.run.directory import (
    CHECKPOINTS,
    CONFIG,
    CROSS_VALIDATION,
    FOLDS,
    MEMBERS,
    MIX_FOLDER,
    PREDICTIONS,
    SUMMARY,
    read_environment,
    read_summary,
    write_json,
)
from pretrain.runner.open import LoadedModel, load_model
from pretrain.runner.text import Log, prepared_text, text_of_run
from pretrain.train.config import filled
from pretrain.train.resolve import MAX_ERROR, MOST_EPOCHS, can_hold_out_others, least_epochs

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.format import TokenStream
    from pretrain.runner.mix import Parts

# Percent of the loss of the mean: a network that takes off less is the last one.
LEAST_GAIN = 0.1
# Trains a run in a folder, with settings and a name that is shown; returns the exit code.
Train = Callable[[Path, Layer, str], int]


def is_missing(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Return whether a run whose first network is finished lacks its mean or cross-validation."""
    return _lacks_mean(config, summary) or _lacks_folds(config, summary)


def _lacks_mean(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    has_parts = (config.train.members or 1) > 1 or bool(config.train.counts)
    return has_parts and MIX_FOLDER not in summary


def _lacks_folds(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    # Only the clock knows what is left of the minutes, and an extended run has none.
    may_have = can_hold_out_others(config) and config.train.members == 1 and "minutes" in summary
    return may_have and CROSS_VALIDATION not in summary and is_rough(pooled([summary]))


def train_rest(folder: Path, config: RunConfig, train: Train, log: Log) -> int:
    """Train and score what is missing of a run, and return the first exit code that is not 0."""
    if _lacks_mean(config, read_summary(folder)):
        if code := train_members(folder, config, train, log):
            return code
        log("scoring the mean of all parts ...")
        average(folder, config)
    if _lacks_folds(config, read_summary(folder)):
        return cross_validate(folder, config, train, log)
    return 0


def train_members(folder: Path, config: RunConfig, train: Train, log: Log) -> int:
    """Train the networks after the first that are not finished yet, in a run of minutes until
    another one does not pay; return the first exit code that is not 0."""
    n = config.train.members or 1
    for number in range(2, n + 1):
        member, runs = folder / MEMBERS / str(number), _networks(folder)[: number - 1]
        if number > 2 and config.train.minutes is not None and not member.exists():
            if not (runs[-1] / read_summary(runs[-1])["checkpoint"]).is_dir():
                break  # an extended run: the mean that it had ended here
            gain = 100 * _gain_of_last(runs, config)
            log(f"network {number - 1} has taken {gain:.2f} % off the loss of the mean")
            if gain < LEAST_GAIN:
                log("another network does not pay, so the run ends before its minutes do")
                break
        if not (member / SUMMARY).is_file():
            settings = member_settings(config, [read_summary(each) for each in runs])
            kind = "without tables, with dropout" if "model" in settings else "other random weights"
            if code := train(member, settings, f"network {number} of {n}: {kind}"):
                return code
    return 0


def _networks(folder: Path) -> list[Path]:
    """Return the run of each network, the first ahead."""
    members = (folder / MEMBERS).glob("*/")
    return [folder, *sorted(members, key=lambda path: int(path.name))]


def _gain_of_last(runs: list[Path], config: RunConfig) -> float:
    """Return what the last network takes off the held-out nats of the mean, as a share of them."""
    from pretrain.model.mixture import held_out_probabilities

    models, _, _, _, p_NP = _open_parts(runs, config)
    free_memory()
    others = [column for column in range(p_NP.shape[1]) if column != len(models) - 1]
    before, after = (held_out_probabilities(p).log().sum() for p in (p_NP[:, others], p_NP))
    return 1 - float(after / before)


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
    # 245,000 tokens want 0.2; of 3.2 million 0.05 gave 1.61 bits per byte in 4 epochs, 0.2 gave
    # 1.65 in 6.
    dropout = min(0.2, 0.1 * math.sqrt(1e6 / n_tokens))
    model = {"ngram_rows": 0, "dropout": max(config.model.dropout, round(dropout, 3))}
    return {"train": own, "model": model, "schedule": {"warmup_steps": None}}


def average(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Write the mean of a run's networks and counts, and return its summary, in which it replaces
    the first network. Checkpoints of further networks, which it contains, are deleted.

    Weights are fitted to the held-out text. What is reported is not: each half of the held-out text
    is scored with the weights of the other.
    """
    from pretrain.model.mixture import fit_weights
    from pretrain.runner.mix import write_mix

    free_memory()
    start = time.perf_counter()
    runs = _networks(folder)
    summaries = [read_summary(run) for run in runs]
    biases = [summary.pop("choice", {"nats": 0.0})["nats"] for summary in summaries]
    models, parts, names, val, p_NP = _open_parts(runs, config)
    first = models[0]
    weights = fit_weights(p_NP)
    shutil.rmtree(folder / MIX_FOLDER, ignore_errors=True)
    (folder / MIX_FOLDER).mkdir()
    write_mix(folder / MIX_FOLDER, models, parts, weights)

    lengths = first.tokenizer.byte_lengths[val.read(1, val.n_tokens)]
    # To first order, since a part's weight is its mean share of what the mean predicts.
    bias = sum(map(mul, weights, biases[: len(models)]))
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
    for member in runs[1:]:
        shutil.rmtree(member / CHECKPOINTS, ignore_errors=True)
    return summary


def _open_parts(
    runs: list[Path], config: RunConfig
) -> tuple[list[LoadedModel], Parts, list[str], TokenStream, Tensor]:
    """Open the networks whose checkpoints are there, and count the text: models, all parts, their
    names, the held-out text, and the probability (N, P) of each of its targets by each part."""
    from pretrain.runner.mix import counts_of, parts_of, probabilities_of

    paths = [run / read_summary(run)["checkpoint"] for run in runs]
    models = [load_model(path, device=config.train.device) for path in paths if path.is_dir()]
    names = [f"network {number}" for number in range(1, len(models) + 1)]
    first, parts = models[0], parts_of(models)
    data = text_of_run(first, lambda line: None)
    if config.train.counts:
        train = data.split("train")
        parts += counts_of(first, train, order=config.train.counts, sha256=train.sha256)
        names.append("counts")
    val = data.split("val")
    with first.world.autocast(first.precision):
        return models, parts, names, val, probabilities_of(parts, val)


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
    from pretrain.evaluate.loss import Score, ScoredModel
    from pretrain.evaluate.token_stats import bits_per_byte_error
    from pretrain.model.mixture import Mixture, held_out_probabilities
    from pretrain.run.log import choice
    from pretrain.train.eval_hooks import token_losses

    def score(p_N: Tensor) -> Score:
        return Score(-float(p_N.log().sum()), len(p_N), n_bytes)

    own = score(held_out_probabilities(p_NP))
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


# --- cross-validation --------------------------------------------------------------------------


def cross_validate(folder: Path, config: RunConfig, train: Train, log: Log) -> int:
    """Hold out further parts of the text, each in a run with the steps of the first, until the
    error is small enough or no time is left for another; write the numbers of all parts into
    summary.json. Return the first exit code that is not 0."""
    first = read_summary(folder)
    done, left = [first], 60 * (filled(config.train.minutes) - first["minutes"])
    expected = sum(first["seconds"].values())  # without what a run measures at its start
    for fold in range(1, _n_folds(folder, config, log)):
        if not is_rough(pooled(done)) or expected > left:
            break
        own = folder / FOLDS / str(fold)
        try:
            prepared_text(replace(config, data=replace(config.data, fold=fold)), run=folder)
        except ValueError as error:
            log(f"part {fold + 1} is not held out: {error}")
            continue
        settings: Layer = {"data": {"fold": fold}, "train": {"steps": first["steps"]}}
        name = f"part {fold + 1}: a run like the first, with another part of the text held out"
        if not (own / SUMMARY).is_file() and (code := train(own, settings, name)):
            return code
        own_config = compose([read_file(own / CONFIG)])
        if _lacks_mean(own_config, read_summary(own)):
            average(own, own_config)
        for each in (CHECKPOINTS, MIX_FOLDER):
            shutil.rmtree(own / each, ignore_errors=True)
        done.append(read_summary(own))
        expected = max(summary["total_seconds"] for summary in done[1:])
        left -= done[-1]["total_seconds"]
    result: dict[str, Any] = {CROSS_VALIDATION: None}
    if done[1:]:
        seconds = sum(summary["total_seconds"] for summary in done[1:])
        result = {
            CROSS_VALIDATION: pooled(done),
            "minutes": first["minutes"] + seconds / 60,
            "seconds": {**first["seconds"], "other parts": seconds},
            "total_seconds": first["total_seconds"] + seconds,
        }
    write_json(folder / SUMMARY, first | result)
    return 0


def _n_folds(folder: Path, config: RunConfig, log: Log) -> int:
    """Return the number of parts of the text that may be held out: 1 if it is not the text any more
    that the run was trained on."""
    try:
        data = prepared_text(config, run=folder)
    except ValueError as error:
        log(f"no other part of the text is held out: {error}")
        return 1
    if data.split("train").sha256 != read_environment(folder)["fingerprint"]["training text"]:
        log("no other part of the text is held out: it has changed since the run was trained")
        return 1
    return n_folds(data.manifest.settings["val_fraction"])


def pooled(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what summary.json says of a cross-validation, by the summaries of its runs. The error
    is by how blocks within the parts differ, or by how the parts do, if that is more."""
    keys = ("val_bits_per_byte", "val_bits_per_byte_stderr", "val_bytes", "total_seconds")
    bits, errors, n_bytes, seconds = ([each[key] for each in done] for key in keys)

    def mean(values: list[float]) -> float:
        return float(sum(map(mul, values, n_bytes)) / sum(n_bytes))

    stderr = None
    if None not in errors:
        within = math.hypot(*map(mul, errors, n_bytes)) / sum(n_bytes)
        stderr = max(within, stdev(bits) / math.sqrt(len(bits)) if bits[1:] else 0.0)
    tables = [{row["name"]: row["bits_per_byte"] for row in each["baselines"]} for each in done]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {
        "bits_per_byte": mean(bits),
        "stderr": stderr,
        "parts": [
            {"fold": fold, "bits_per_byte": bits[fold], "bytes": n_bytes[fold], "seconds": taken}
            for fold, taken in enumerate(seconds)
        ],
        "baselines": [
            {"name": name, "bits_per_byte": mean([t[name] for t in tables])} for name in names
        ],
    }


def is_rough(crossed: Mapping[str, Any]) -> bool:
    """Return whether the error of what `pooled` gives is too large, or unknown."""
    stderr = crossed["stderr"]
    return stderr is None or stderr > MAX_ERROR * crossed["bits_per_byte"]
