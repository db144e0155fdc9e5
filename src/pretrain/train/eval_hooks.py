"""Evaluations during training and after it: held-out loss, a sample, in-loop tasks, token losses.

None of them changes the run: the model is read without dropout, and no random state is used. A
signal interrupts them without a record, so the resume begins with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from pretrain.data.batches import Stream, evaluation_batches
from pretrain.data.format import StandingData
from pretrain.evaluate.loss import EVALUATION_TOKENS, Ids, Model, Score, ScoredModel, score_batches
from pretrain.evaluate.run_tasks import evaluate_in_loop
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.token_stats import bits_per_byte_error, sample_text_predictions
from pretrain.generate.sampling import Sampling, generate
from pretrain.model.counts import kneser_ney
from pretrain.train.build import uncompiled
from pretrain.train.resolve import MOST_COUNTED_TOKENS
from pretrain.train.signals import StopSignals
from pretrain.train.state import Run

SAMPLE_TOKENS = 60
# The text whose token losses are kept: the longest document among the first held-out tokens.
TOKEN_LOSS_TOKENS = 400
SEARCHED_TOKENS = 20_000
_IN_SUMMARY = ("metric", "value", "stderr", "examples", "chance", "step")


# --- what is due ----------------------------------------------------------------------------------


def evaluate_if_due(run: Run, stop: StopSignals) -> bool:
    """Evaluate what is due after this step and has no result yet; True for a new best score."""
    if is_evaluated(run):
        return False
    with uncompiled(), run.timed("evaluation"), run.averaged():
        is_best = held_out_is_due(run) and evaluate(run, stop)
        if tasks := due_tasks(run):
            evaluate_tasks(run, tasks, stop)
    return is_best


def is_evaluated(run: Run) -> bool:
    """Whether all that is due after this step has a result; a signal may have interrupted it."""
    return not held_out_is_due(run) and not due_tasks(run)


def held_out_is_due(run: Run) -> bool:
    is_due = run.step > 0 and run.due(run.config.train.evaluate_every)
    return is_due and run.best.last_step != run.step


def due_tasks(run: Run) -> list[EvalTask]:
    """The in-loop tasks that are due after this step and have no result."""
    if not run.tasks or not run.step or not run.due(run.config.evaluate.every):
        return []
    rows = [r for r in run.log.metrics() if r["kind"] == "task" and r["step"] == run.step]
    evaluated = {row["task"] for row in rows}
    return [each for each in run.tasks if each.task.name not in evaluated]


# --- held-out loss and a sample -------------------------------------------------------------------


def evaluate(run: Run, stop: StopSignals) -> bool:
    """Score the fixed part of the held-out split, and write a sample; True for a new best score."""
    train = run.config.train
    is_interrupted = partial(stop.interrupts_evaluation, run.world)
    limit = train.evaluate_tokens
    evaluated = partial(evaluate_split, run, limit_tokens=limit, is_interrupted=is_interrupted)
    halves = evaluated(half=0), evaluated(half=1)
    score = halves[0] + halves[1]
    if is_interrupted():
        return False
    is_best = run.best.update(run.step, score.nats_per_token)
    record = {
        "kind": "evaluate",
        "step": run.step,
        "tokens": run.tokens,
        "val_nats_per_token": score.nats_per_token,
        "val_perplexity": score.perplexity,
        "val_bits_per_byte": score.bits_per_byte,
        "val_tokens": score.tokens,
        "nats_of_halves": [half.nats for half in halves],
        "seconds": run.seconds["training"],
    }
    if isinstance(run.data, StandingData):
        base = evaluate_split(run, run.data.base.split("val"), limit_tokens=train.evaluate_tokens)
        record["base_bits_per_byte"] = base.bits_per_byte
    run.log.append_metrics(record)
    run.console.evaluation(record, steps=run.n_steps, is_best=is_best)

    sampling = Sampling(temperature=0.8, seed=train.seed)
    run.model.unshard()
    with run.world.autocast(run.model.compute_dtype):
        (text,) = generate(
            run.model.lm_loss.decoder,
            run.data.tokenizer(),
            "",
            max_tokens=SAMPLE_TOKENS,
            sampling=sampling,
        )
    if not run.console.is_brief:
        run.console.line("  " + " ".join(text.split()), style="italic")
    run.log.append_sample(
        {
            "step": run.step,
            "prompt": "",
            "text": text,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
    )
    return is_best


def show_first_score(run: Run) -> None:
    """Say how well the weights that a run starts from know the beginning of its held-out text."""
    val, train = run.data.split("val"), run.data.split("train")
    ids = val.read(0, min(run.config.train.evaluate_tokens, val.n_tokens))
    with uncompiled(), run.timed("evaluation"):
        bits = evaluate_split(run, Ids(ids)).bits_per_byte
    if not run.world.is_main or run.console.is_brief:
        return
    counted = train.read(0, min(train.n_tokens, MOST_COUNTED_TOKENS))
    single, *_ = kneser_ney(counted, ids, vocab_size=run.data.manifest.vocab_size, order=1)
    n_bytes = run.data.tokenizer().byte_lengths[ids[1:]].sum()
    of_single = -np.log2(single[1:]).sum() / max(1, n_bytes)
    text = f"before the first step the weights have {bits:.3f} bits/byte of the held-out text"
    if bits > of_single:
        text += (
            f", and single tokens of the text {of_single:.3f}: the model knows nothing of it (its "
            "language?), so a run without it may end better"
        )
    run.console.line(text, style="yellow" if bits > of_single else "")


def evaluate_split(
    run: Run,
    stream: Stream | None = None,
    *,
    limit_tokens: int | None = None,
    half: int | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Score:
    """Score a stream, by default the held-out split: all of it, `limit_tokens` of it, or a `half`
    of these. Each process scores some batches, and all return the sum. It ends early once it
    `is_interrupted`."""
    rank, size = run.model.axes.batch_part(run.world.rank, evaluation=True)
    context = run.model.lm_loss.decoder.config.window_tokens
    batches = evaluation_batches(
        stream or run.data.split("val"),
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        limit_tokens=limit_tokens,
        half=half,
        rank=rank,
        size=size,
    )
    return score_batches(
        run.model.lm_loss,
        takewhile(lambda _: not is_interrupted(), batches),
        byte_lengths_V=torch.from_numpy(run.data.tokenizer().byte_lengths),
        world=run.world,
        precision=run.config.train.precision,
        counts=run.model.axes.reports_loss(run.world.rank),
    )


def held_out_error(run: Run) -> float | None:
    """The standard error of the bits per byte of the held-out split."""
    return bits_per_byte_error(scored_model(run), run.data.split("val"))


# --- in-loop tasks --------------------------------------------------------------------------------


def evaluate_tasks(run: Run, tasks: Sequence[EvalTask], stop: StopSignals) -> None:
    """Evaluate in-loop tasks until a signal comes."""
    rows = []
    model = scored_model(run)
    for task in tasks:
        if stop.interrupts_evaluation(run.world):
            break
        row = evaluate_in_loop(model, task)
        run.log.append_metrics({"kind": "task", "step": run.step, **row})
        rows.append(row)
    if rows:
        run.console.tasks(run.step, rows)


def last_task_results(run: Run) -> dict[str, dict[str, Any]]:
    """The last result of each in-loop task, by name, for the summary."""
    last = {row["task"]: row for row in run.log.metrics() if row["kind"] == "task"}
    names = [each.task.name for each in run.tasks]
    return {name: {key: last[name][key] for key in _IN_SUMMARY} for name in names if name in last}


# --- losses of single tokens ----------------------------------------------------------------------


def token_losses(model: Model, stream: Stream) -> dict[str, Any]:
    """The model's predictions, token by token, of the start of a document of a held-out stream."""
    tokenizer = model.tokenizer
    ids = stream.read(0, min(stream.n_tokens, SEARCHED_TOKENS))
    borders = np.flatnonzero(np.isin(ids, [tokenizer.start_of_text, tokenizer.end_of_text]))
    documents = [ids[: borders[0]] if len(borders) else ids]
    documents += [part[1:] for part in np.split(ids, borders)[1:]]
    longest = max(documents, key=len)[:TOKEN_LOSS_TOKENS].tolist()
    if not longest:
        return {"passage": [], "cards": []}
    return sample_text_predictions(model, longest)


def scored_model(run: Run) -> ScoredModel:
    """Gather the weights, and return the model with which single texts are scored."""
    run.model.unshard()
    decoder, precision = run.model.lm_loss.decoder, run.config.train.precision
    return ScoredModel(decoder, run.data.tokenizer(), run.world, precision)
