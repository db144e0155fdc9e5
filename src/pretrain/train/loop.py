"""`train(run)`: a run in the order of time, from its first step or a checkpoint to its summary."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from pretrain.checkpoint.load import checkpoint_name, open_checkpoint
from pretrain.data.trace import Tracer
from pretrain.evaluate.baselines import measure_baselines
from pretrain.model.sizes import n_parameters
from pretrain.optim.param_groups import set_learning_rate
from pretrain.run.directory import BASELINES, PREDICTIONS, SUMMARY, write_json
from pretrain.train.eval_hooks import (
    evaluate,
    evaluate_split,
    evaluate_tasks,
    evaluation_is_missing,
    finish_interrupted_evaluation,
    last_task_results,
    missing_tasks,
    token_losses,
)
from pretrain.train.monitor import (
    MOST_IN_A_ROW,
    NOT_FINITE,
    SPIKE,
    Anomaly,
    unclipped,
    write_post_mortem,
)
from pretrain.train.signals import StopSignals
from pretrain.train.state import Run, load_weights, roll_back
from pretrain.train.step import Gradients, compute_gradients

Action = Literal["update", "skip", "roll back"]


def train(run: Run) -> int:
    """Train until the last step, a signal or early stopping; returns the exit code."""
    config = run.config.train
    progress = run.console.progress(steps=run.n_steps, step=run.step)
    with StopSignals(immediate=True) as stop, progress:
        finish_interrupted_evaluation(run, stop)
        run.lm_loss.train()
        while run.step < run.n_steps and not run.patience_exhausted:
            start = time.perf_counter()
            lr = run.lr_at(run.step)
            set_learning_rate(run.optimizer, lr)
            run.optimizer.zero_grad(set_to_none=True)
            gradients = compute_gradients(
                run.model,
                run.batches.at(run.step),
                clip=run.config.optimizer.clip,
                world=run.world,
                precision=config.precision,
            )
            stop.immediate = False  # from now on there is a step to save

            anomaly = run.spike_detector.check(gradients.nats_per_token, gradients.grad_norm)
            action = "update" if anomaly is None else on_anomaly(run, anomaly, gradients)
            if action == "roll back":
                roll_back(run)  # run.step is an earlier one now
                continue
            if action == "update" and gradients.are_usable:
                run.optimizer.step()
            run.world.synchronize()
            log_step(run, gradients, anomaly, lr=lr, seconds=time.perf_counter() - start)

            improved = run.due(config.evaluate_every) and evaluate(run, stop)
            if run.tasks and run.due(run.config.evaluate.every):
                evaluate_tasks(run, stop)

            stopping = stop.requested(run.world) or run.step == run.planned_stop.stop_after
            if improved or stopping or run.due(config.save_every) or run.is_milestone:
                run.save(wait=stopping or run.step == run.n_steps)
            run.saver.poll()
            if run.step == run.planned_stop.kill_after:
                run.kill()
            if stopping and (run.step < run.n_steps or final_evaluation_is_missing(run)):
                return stop.exit_code
            if run.patience_exhausted:
                run.console.line(
                    f"no better evaluation in the last {run.best.since}: stopping here"
                )
                run.save(wait=True)
        stop.immediate = True
        finish(run)
    return 0


def on_anomaly(run: Run, anomaly: Anomaly, gradients: Gradients) -> Action:
    """Report the anomaly of the step at hand, and return what to do about it."""
    action: Action = "skip"
    if run.config.train.spike_action == "rollback":
        action = "roll back"
    elif run.config.train.spike_action == "warn" and anomaly.kind == SPIKE:
        action = "update"

    step, clip = run.step + 1, run.config.optimizer.clip
    norms = run.model.gradient_norms()
    path = None
    if run.world.is_main:
        path = write_post_mortem(
            run.folder,
            step=step,
            anomaly=anomaly,
            loss=gradients.nats_per_token,
            grad_norm=gradients.grad_norm,
            gradient_norms=unclipped(norms, clip=clip, grad_norm=gradients.grad_norm),
            documents=documents_of_batch(run),
            log=run.log.metrics(),
        )
    message = (
        f"step {step:,}: the loss is {gradients.nats_per_token:.3f}, the gradient norm "
        f"{gradients.grad_norm:.3g}"
    )
    if anomaly.kind == SPIKE:
        message += f", {anomaly.z_score:.1f} standard deviations above the steps before"
    message += "; the update is made" if action == "update" else "; no update is made"
    if path is not None:
        message += f"; see {path}"
    run.console.line(message, style="yellow")
    return action


def documents_of_batch(run: Run) -> list[dict[str, Any]]:
    """The documents of the batch at hand: id and file of each, and which of its tokens."""
    stream = run.data.split("train")
    batches = run.batches
    tracer = Tracer(batches.order, stream.document_offsets, batches.batch_size, batches.rollbacks)
    parts = tracer.occurrences_in(run.step + 1)
    numbers = {part.document for part in parts}
    origins = {n: origin for n, origin in enumerate(stream.origins()) if n in numbers}
    return [
        {
            "sample": part.sample,
            "id": origins[part.document].id,
            "file": origins[part.document].file,
            "first_token": part.first_token,
            "stop_token": part.stop_token,
        }
        for part in parts
    ]


def log_step(
    run: Run, gradients: Gradients, anomaly: Anomaly | None, *, lr: float, seconds: float
) -> None:
    """Count a step that took `seconds`, and add its line to metrics.jsonl and to the console.

    A new metric is one line here, and one in `run.log.METRICS_KEYS`. ValueError after too many
    losses in a row that are not finite.
    """
    run.step += 1
    run.train_seconds += seconds
    run.spike_detector.record(gradients.nats_per_token, anomaly)
    n_bytes, checksum = run.sum_over_readers()
    bits_per_byte = gradients.nats / math.log(2) / n_bytes if n_bytes else math.nan
    record = {
        "kind": "train",
        "step": run.step,
        "tokens": run.tokens,
        "loss": gradients.nats_per_token,
        "bits_per_byte": bits_per_byte,
        "learning_rate": lr,
        "grad_norm": gradients.grad_norm,
        "ids": checksum,
        "tokens_per_second": gradients.count / seconds,
        "seconds": run.train_seconds,
        "epoch": run.epochs,
        **run.batches.source_tokens(run.step),
    }
    if anomaly is not None:
        record |= {"finding": anomaly.kind, "z_score": anomaly.z_score}
    run.log.append_metrics(record)

    is_not_finite = anomaly is not None and anomaly.kind == NOT_FINITE
    if is_not_finite and run.spike_detector.in_a_row >= MOST_IN_A_ROW:
        raise ValueError(
            f"step {run.step:,}: the loss is {gradients.nats_per_token}, the gradient norm "
            f"{gradients.grad_norm}, for the {MOST_IN_A_ROW}th step in a row, none of which made "
            f"an update; a lower optimizer.learning_rate (now {lr:.1e}) or a longer "
            "schedule.warmup_steps may help. The last checkpoint is intact."
        )
    run.console.step(record, steps=run.n_steps)


def final_evaluation_is_missing(run: Run) -> bool:
    """Whether a signal interrupted the evaluations after the last step; several processes finish
    them."""
    if run.world.size > 1:
        return False
    return evaluation_is_missing(run) or bool(missing_tasks(run))


def finish(run: Run) -> None:
    """Score the best checkpoint on the full held-out split and write summary.json, the end of a
    run."""
    checkpoint = run.checkpoints / checkpoint_name(run.step)
    best = run.checkpoints / checkpoint_name(run.best.step or run.step)
    if best != checkpoint and best.exists():
        checkpoint = best
        load_weights(run.model, open_checkpoint(best))
    score = evaluate_split(run, full=True)
    assert score is not None
    predictions = token_losses(run)
    peak_memory = run.world.all_gather([run.world.peak_memory_bytes()])
    if not run.world.is_main:
        return

    run.console.line("scoring count tables and xz on the same held-out tokens ...")
    train_split, val_split = run.data.split("train"), run.data.split("val")
    baselines = measure_baselines(train_split, val_split, tokenizer=run.data.tokenizer())
    write_json(run.folder / BASELINES, baselines)
    write_json(run.folder / PREDICTIONS, predictions)

    decoder = run.lm_loss.decoder
    summary = {
        "parameters": n_parameters(decoder.config, vocab_size=decoder.vocab_size),
        "steps": run.step,
        "tokens": run.tokens,
        "epochs": run.epochs,
        "val_nats_per_token": score.nats_per_token,
        "val_perplexity": score.perplexity,
        "val_bits_per_byte": score.bits_per_byte,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "tokens_per_second": run.tokens / run.train_seconds,
        "train_seconds": run.train_seconds,
        "stalled_seconds": run.stalled_seconds,
        "total_seconds": time.perf_counter() - run.start_time,
        "peak_memory_bytes": int(max(peak for (peak,) in peak_memory)),
        "checkpoint": checkpoint.relative_to(run.folder).as_posix(),
        "baselines": baselines["baselines"],
    }
    if run.tasks:
        summary["tasks"] = last_task_results(run)
    summary |= run.batches.source_tokens(run.step, epochs=True)
    write_json(run.folder / SUMMARY, summary)
