"""`train(run)`: a run in the order of time, from its first step or a checkpoint to its summary."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pretrain.checkpoint.load import Checkpoint, checkpoint_name
from pretrain.data.order import Tracer
from pretrain.evaluate.baselines import measure_baselines
from pretrain.machine import free_memory, keep_freed_memory
from pretrain.model.config import n_parameters
from pretrain.optim.param_groups import set_learning_rate, update_averages
from pretrain.parallel.model import StepReport
from pretrain.run.directory import BASELINES, FOLDS, POST_MORTEMS, PREDICTIONS, SUMMARY, write_json
from pretrain.run.log import choice, nats_of_choice
from pretrain.train.build import load_weights, uncompiled
from pretrain.train.clock import describe
from pretrain.train.eval_hooks import (
    evaluate_if_due,
    evaluate_split,
    held_out_error,
    is_evaluated,
    last_task_results,
    scored_model,
    show_first_score,
    token_losses,
)
from pretrain.train.monitor import MOST_IN_A_ROW, NOT_FINITE, SPIKE, Anomaly
from pretrain.train.signals import StopSignals
from pretrain.train.state import Run, roll_back

MOST_POST_MORTEMS = 20
# Steps before an anomaly that its post-mortem has the losses of.
LAST_STEPS = 200

Action = Literal["update", "skip", "roll back"]


def train(run: Run) -> int:
    """Train until the last step, a signal or early stopping; returns the exit code."""
    config = run.config.train
    keep_freed_memory()
    progress = run.console.progress(steps=run.n_steps, step=run.step)
    with StopSignals(immediate=True) as stop, progress:
        if config.init_from is not None and run.step == 0:
            show_first_score(run)
        evaluate_if_due(run, stop)  # what a signal interrupted before a resume
        run.model.lm_loss.train()
        while run.step < run.n_steps and not run.patience_exhausted:
            follow_clock(run)
            start = time.perf_counter()
            report = run.model.compute_gradients(
                run.batches.at(run.step),
                clip=run.config.optimizer.clip,
                precision=config.precision,
            )
            stop.immediate = False  # from now on there is a step to save

            anomaly = run.spike_detector.check(report.nats_per_token, report.grad_norm)
            action = "update" if anomaly is None else on_anomaly(run, anomaly, report)
            if action == "roll back":
                roll_back(run)  # run.step is an earlier one now
                continue
            if action == "update" and report.is_usable:
                set_learning_rate(run.optimizer, run.lr_at(run.step))
                run.optimizer.step()
                if config.ema_decay:
                    longest = (1 + run.step) / (10 + run.step)
                    update_averages(run.optimizer, min(config.ema_decay, longest))
            run.world.synchronize()
            log_step(run, report, anomaly, seconds=time.perf_counter() - start)
            if run.clock is not None:
                run.clock.end_step(run.step)
            if run.planned_stop == ("kill", run.step):
                run.saver.wait()
                os.kill(os.getpid(), signal.SIGKILL)

            improved = evaluate_if_due(run, stop)
            stopping = stop.requested(run.world) or run.planned_stop == ("stop", run.step)
            is_kept = run.due(config.save_every) or run.due(config.keep_every)
            if improved or stopping or is_kept:
                run.save(wait=stopping or run.step == run.n_steps)
            run.saver.poll()
            if stopping and (run.step < run.n_steps or not is_evaluated(run)):
                return stop.exit_code
            if run.patience_exhausted:
                n_worse = run.best.n_evaluations_since
                run.console.line(f"no better evaluation in the last {n_worse}: stopping here")
                run.save(wait=True)
        stop.immediate = True
        finish(run)
    return 0


def follow_clock(run: Run) -> None:
    """Write down what rank 0's clock decides about the steps from here on, and follow it."""
    if run.clock is None:
        return
    decision = run.clock.decide(run.step, run.schedule)
    if run.step + 1 in run.repeated_ids:
        decision = None  # a step that was made before a resume is made again as it was
    decision = json.loads(run.world.broadcast_str(json.dumps(decision)))
    if decision is None:
        return
    run.log.append_decision(decision)
    run.clock.decisions.append(decision)
    run.schedule = run.plan.decided(run.clock.decisions)
    said = [describe(run.plan, run.clock.decisions[:n]) for n in range(len(run.clock.decisions))]
    # Later corrections are in summary.json.
    if not any(said) and (text := describe(run.plan, run.clock.decisions)):
        run.console.line(text)


def on_anomaly(run: Run, anomaly: Anomaly, report: StepReport) -> Action:
    """Report the anomaly of the step at hand, and return what to do about it."""
    action: Action = "skip"
    if run.config.train.spike_action == "rollback":
        action = "roll back"
    elif run.config.train.spike_action == "warn" and anomaly.kind == SPIKE:
        action = "update"

    message = (
        f"step {run.step + 1:,}: the loss is {report.nats_per_token:.3f}, the gradient norm "
        f"{report.grad_norm:.3g}"
    )
    if anomaly.kind == SPIKE:
        message += f", {anomaly.z_score:.1f} standard deviations above the steps before"
    message += "; the update is made" if action == "update" else "; no update is made"
    path = write_post_mortem(run, anomaly, report)
    if path is not None:
        message += f"; see {path}"
    run.console.line(message, style="yellow")
    return action


def write_post_mortem(run: Run, anomaly: Anomaly, report: StepReport) -> Path | None:
    """Describe the step at hand in a file: its documents, each parameter's gradient norm before
    clipping, and the steps before. None on other ranks, and if the run has enough such files."""
    norms = run.model.gradient_norms()  # all processes must call this
    if not run.world.is_main:
        return None
    path = run.folder / POST_MORTEMS / f"step-{run.step + 1:08d}.json"
    path.parent.mkdir(exist_ok=True)
    if path.exists() or len(list(path.parent.iterdir())) >= MOST_POST_MORTEMS:
        return None

    clip, scale = run.config.optimizer.clip, 1.0
    if clip and math.isfinite(report.grad_norm):  # gradients that are not finite are not clipped
        scale = max(1.0, report.grad_norm / clip)
    stream, batches = run.data.split("train"), run.batches
    tracer = Tracer(batches.order, stream.document_offsets, batches.batch_size, batches.rollbacks)
    parts = tracer.occurrences_in(run.step + 1)
    numbers = {part.document for part in parts}
    origins = {n: origin for n, origin in enumerate(stream.origins()) if n in numbers}
    steps = [record for record in run.log.metrics() if record["kind"] == "train"]
    keys = ("step", "loss", "grad_norm", "learning_rate")
    content = {
        "step": run.step + 1,
        "finding": anomaly.kind,
        "z_score": anomaly.z_score,
        "loss": report.nats_per_token,
        "grad_norm": report.grad_norm,
        "gradient_norms": {
            name: norm * scale if math.isfinite(norm) else None for name, norm in norms.items()
        },
        "documents": [
            {
                "sample": part.sample,
                "id": origins[part.document].id,
                "file": origins[part.document].file,
                "first_token": part.first_token,
                "stop_token": part.stop_token,
            }
            for part in parts
        ],
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "last_steps": [{key: step.get(key) for key in keys} for step in steps[-LAST_STEPS:]],
    }
    write_json(path, content)
    return path


def log_step(run: Run, report: StepReport, anomaly: Anomaly | None, *, seconds: float) -> None:
    """Count a step that took `seconds`, and add its line to metrics.jsonl and to the console.

    A new metric is one line here and one in `run.log.METRICS_KEYS`; what is counted over the batch
    is a field of `TrainingBatches`, what needs all weights a method of `ParallelModel`. ValueError
    after too many losses in a row that are not finite.
    """
    lr = run.lr_at(run.step)
    run.step += 1
    run.seconds["training"] += seconds
    run.spike_detector.record(report.nats_per_token, anomaly)

    own = (run.batches.n_bytes, run.batches.checksum, run.model.forward_seconds)
    all_bytes, checksums, all_seconds = zip(*run.world.all_gather(own), strict=True)
    for message in run.stragglers.record(all_seconds):
        run.console.line(message, style="yellow")
    # Processes that read the same rows count once.
    size = run.world.size
    _, n_readers = run.config.parallel.resolve(size).batch_part(run.world.rank)
    n_bytes = int(sum(all_bytes)) * n_readers // size
    record = {
        "kind": "train",
        "step": run.step,
        "tokens": run.tokens,
        "loss": report.nats_per_token,
        "bits_per_byte": report.nats / math.log(2) / n_bytes if n_bytes else math.nan,
        "learning_rate": lr,
        "grad_norm": report.grad_norm,
        "ids": int(sum(checksums)) * n_readers // size,
        "tokens_per_second": report.count / seconds,
        "seconds": run.seconds["training"],
        "epoch": run.epochs,
    }
    if sources := run.batches.sources(run.step):
        record["sources"] = {name: each["tokens"] for name, each in sources.items()}
    before = run.repeated_ids.pop(run.step, record["ids"])
    if record["ids"] != before:
        raise ValueError(
            f"step {run.step:,} has read other ids than before the resume: their checksum is "
            f"{record['ids']}, it was {before}. The prepared text has changed: delete its folder, "
            "and resume again"
        )
    if anomaly is not None:
        record |= {"finding": anomaly.kind, "z_score": anomaly.z_score}
    run.log.append_metrics(record)

    is_not_finite = anomaly is not None and anomaly.kind == NOT_FINITE
    if is_not_finite and run.spike_detector.in_a_row >= MOST_IN_A_ROW:
        raise ValueError(
            f"step {run.step:,}: the loss is {report.nats_per_token}, the gradient norm "
            f"{report.grad_norm}, for the {MOST_IN_A_ROW}th step in a row, none of which made "
            f"an update; a lower optimizer.learning_rate (now {lr:.1e}) or a longer "
            "schedule.warmup_steps may help. The last checkpoint is intact."
        )
    run.console.step(record, steps=run.n_steps)


def finish(run: Run) -> None:
    """Score the best checkpoint on the full held-out split and write summary.json, the end of a
    run."""
    keep_freed_memory(False)  # counting would leave much of it
    free_memory()
    checkpoint = run.checkpoints / checkpoint_name(run.step)
    best = run.checkpoints / checkpoint_name(run.best.step or run.step)
    with uncompiled(), run.timed("evaluation"), run.averaged():
        if best != checkpoint and best.exists():
            checkpoint = best
            load_weights(run.model, Checkpoint(best))
        score, stderr = evaluate_split(run), held_out_error(run)
        own, bias = score.bits_per_byte, nats_of_choice(run.log.metrics())
        score = replace(score, nats=score.nats + bias)
        predictions = token_losses(scored_model(run), run.data.split("val"))
    peak_memory = run.world.all_gather([run.world.peak_memory_bytes()])
    if not run.world.is_main:
        return

    baselines: dict[str, Any] = {"baselines": []}
    # Those of the first network are the same, but not those of another part of the text.
    if not run.console.is_brief or run.folder.parent.name == FOLDS:
        run.console.line("scoring count tables and compressors on the same held-out text ...")
        train_split, val_split = run.data.split("train"), run.data.split("val")
        with run.timed("count tables"):
            baselines = measure_baselines(train_split, val_split, tokenizer=run.data.tokenizer())
        write_json(run.folder / BASELINES, baselines)
    write_json(run.folder / PREDICTIONS, predictions)

    decoder = run.model.lm_loss.decoder
    summary = {
        "parameters": n_parameters(decoder.config, vocab_size=decoder.vocab_size),
        "steps": run.step,
        "tokens": run.tokens,
        "epochs": run.epochs,
        "val_nats_per_token": score.nats_per_token,
        "val_perplexity": score.perplexity,
        "val_bits_per_byte": score.bits_per_byte,
        "val_bits_per_byte_stderr": stderr,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "tokens_per_second": run.tokens / run.seconds["training"],
        "train_seconds": run.seconds["training"],
        "stalled_seconds": run.seconds["checkpoints"],
        "seconds": dict(run.seconds),
        "total_seconds": time.perf_counter() - run.start_time,
        "peak_memory_bytes": int(max(peak for (peak,) in peak_memory)),
        "checkpoint": checkpoint.relative_to(run.folder).as_posix(),
        "baselines": baselines["baselines"],
        "reading": run.data.readings,
        "held_out": run.held_out,
    }
    if bias:
        summary["choice"] = choice(bias, own)
    if run.clock is not None:
        summary["minutes"] = run.clock.used / 60
        summary["clock"] = describe(run.plan, run.clock.decisions)
    if run.tasks:
        summary["tasks"] = last_task_results(run)
    if sources := run.batches.sources(run.step):
        summary["sources"] = sources
    of_base = [r["base_bits_per_byte"] for r in run.log.metrics() if "base_bits_per_byte" in r]
    if of_base:
        summary["base"] = {"bits_per_byte": of_base[-1], "best_bits_per_byte": min(of_base)}
    write_json(run.folder / SUMMARY, summary)
