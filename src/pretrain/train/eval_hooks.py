"""Evaluations during training and after it: held-out loss, a sample, in-loop tasks, token losses.

None of them changes the run: the model is read without dropout, and no random state is used. A
signal interrupts them without a record, so the resume begins with what is missing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pretrain.data.batches import evaluation_batches
from pretrain.evaluate.loss import EVALUATION_TOKENS, Score, byte_lengths, score_batches
from pretrain.evaluate.run_tasks import evaluate_in_loop
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.token_stats import sample_text_predictions
from pretrain.generate.sampling import Sampling, generate
from pretrain.train.build import uncompiled
from pretrain.train.signals import StopSignals
from pretrain.train.state import Run

SAMPLE_TOKENS = 60
# The text whose token losses are kept: the longest document among the first held-out tokens.
TOKEN_LOSS_TOKENS = 400
SEARCHED_TOKENS = 20_000
_IN_SUMMARY = ("metric", "value", "stderr", "examples", "chance", "step")


# --- what is missing ------------------------------------------------------------------------------


def finish_interrupted_evaluation(run: Run, stop: StopSignals) -> None:
    """Evaluate what a signal interrupted after the last step of a resumed run."""
    if evaluation_is_missing(run):
        evaluate(run, stop)
    if run.step and run.tasks and run.due(run.config.evaluate.every):
        evaluate_tasks(run, stop)


def evaluation_is_missing(run: Run) -> bool:
    """Whether the last step should have been evaluated, and was not."""
    if not run.step or not run.due(run.config.train.evaluate_every):
        return False
    records = run.log.metrics()
    return not any(r["kind"] == "evaluate" and r["step"] == run.step for r in records)


def missing_tasks(run: Run) -> list[EvalTask]:
    """The in-loop tasks without a result at this step."""
    rows = [r for r in run.log.metrics() if r["kind"] == "task" and r["step"] == run.step]
    evaluated = {row["task"] for row in rows}
    return [each for each in run.tasks if each.task.name not in evaluated]


# --- held-out loss and a sample -------------------------------------------------------------------


def evaluate(run: Run, stop: StopSignals) -> bool:
    """Score the fixed part of the held-out split, and write a sample; True for a new best score."""
    score = evaluate_split(run, full=False, stop=stop)
    if score is None:
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
        "seconds": run.train_seconds,
    }
    run.log.append_metrics(record)
    left_seconds = (run.n_steps - run.step) * run.train_seconds / run.step
    run.console.evaluation(record, left_seconds=left_seconds, is_best=is_best)
    _write_sample(run)
    return is_best


@uncompiled
def evaluate_split(run: Run, *, full: bool, stop: StopSignals | None = None) -> Score | None:
    """Score the held-out split, all of it or its fixed part; each process scores some batches, and
    all return the sum. None if a signal interrupted it."""
    rank, size = run.model.eval_shard
    context = run.lm_loss.decoder.config.window_tokens
    batches = evaluation_batches(
        run.data.split("val"),
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        limit_tokens=None if full else run.config.train.evaluate_tokens,
        rank=rank,
        size=size,
    )
    scores = score_batches(
        run.lm_loss,
        (b for b in batches if stop is None or not stop.interrupts_evaluation(run.world)),
        byte_lengths_V=byte_lengths(run.data.tokenizer()),
        world=run.world,
        precision=run.config.train.precision,
    )
    if stop is not None and stop.interrupts_evaluation(run.world):
        return None
    if not run.model.owns_loss:
        scores = []
    # fsum over all batches: the result does not depend on which process scored which.
    nats = math.fsum(run.world.all_gather_uneven([score.nats for score in scores]))
    n_tokens = sum(score.tokens for score in scores)
    n_bytes = sum(score.bytes for score in scores)
    all_tokens, all_bytes = run.world.all_sum(n_tokens, n_bytes)
    return Score(nats, int(all_tokens), int(all_bytes))


def _write_sample(run: Run) -> None:
    sampling = Sampling(temperature=0.8, seed=run.config.train.seed)
    run.model.unshard()
    with run.world.autocast(run.model.compute_dtype):
        text = uncompiled(generate)(
            run.lm_loss.decoder,
            run.data.tokenizer(),
            "",
            max_tokens=SAMPLE_TOKENS,
            sampling=sampling,
        )[0]
    run.console.sample(text)
    run.log.append_sample(
        {
            "step": run.step,
            "prompt": "",
            "text": text,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
    )


# --- in-loop tasks --------------------------------------------------------------------------------


@uncompiled
def evaluate_tasks(run: Run, stop: StopSignals) -> None:
    """Evaluate the in-loop tasks that have no result at this step, until a signal comes."""
    tokenizer = run.data.tokenizer()
    rows = []
    run.model.unshard()
    for task in missing_tasks(run):
        if stop.interrupts_evaluation(run.world):
            break
        row = evaluate_in_loop(
            run.lm_loss.decoder,
            tokenizer,
            task,
            world=run.world,
            precision=run.config.train.precision,
        )
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


@uncompiled
def token_losses(run: Run) -> dict[str, Any]:
    """The model's predictions, token by token, of the start of a held-out document."""
    tokenizer, stream = run.data.tokenizer(), run.data.split("val")
    ids = stream.read(0, min(stream.n_tokens, SEARCHED_TOKENS))
    borders = np.flatnonzero(np.isin(ids, [tokenizer.start_of_text, tokenizer.end_of_text]))
    documents = [ids[: borders[0]] if len(borders) else ids]
    documents += [part[1:] for part in np.split(ids, borders)[1:]]
    longest = max(documents, key=len)[:TOKEN_LOSS_TOKENS].tolist()
    if not longest:
        return {"passage": [], "cards": []}
    run.model.unshard()
    return sample_text_predictions(
        run.lm_loss.decoder,
        tokenizer,
        longest,
        world=run.world,
        precision=run.config.train.precision,
    )
