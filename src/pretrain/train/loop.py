"""`train()`: the whole run in time's order, from first weights (or a checkpoint) to a summary.

A run directory, prepared data and the filled sections of a config go in; checkpoints, metrics,
samples and summary.json come out. A signal ends it after the running step with everything saved.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pretrain.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from pretrain.data import PreparedData
from pretrain.distributed import World
from pretrain.evaluate import EvalTask, measure_baselines
from pretrain.generate import Sampling, generate
from pretrain.model import ModelConfig, n_parameters
from pretrain.optim import OptimizerConfig, ScheduleConfig, lr_at
from pretrain.parallel import ParallelConfig
from pretrain.train.build import uncompiled
from pretrain.train.config import TrainConfig
from pretrain.train.evaluation import evaluate_split
from pretrain.train.following import ask_tasks, last_rows, missing_tasks
from pretrain.train.passage import PREDICTIONS, look_at_passage
from pretrain.train.post_mortem import write_post_mortem
from pretrain.train.records import SUMMARY, write_json
from pretrain.train.rollback import roll_back
from pretrain.train.run import Run, begin, load_weights
from pretrain.train.screen import Screen
from pretrain.train.signals import TO_THE_END, Ends, StopSignals
from pretrain.train.steps import Accept, StepReport, training_steps
from pretrain.train.watch import MOST_IN_A_ROW, NOT_FINITE, SPIKE

SAMPLE_TOKENS = 60
Outcome = Literal["done", "stopped", "no better", "spike"]


def train(
    folder: Path,
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    settings: TrainConfig,
    parallel: ParallelConfig,
    world: World,
    screen: Screen,
    identity: Mapping[str, Any],
    began: float,
    first_weights: Checkpoint | None = None,
    resume_from: Checkpoint | None = None,
    eval_tasks: Sequence[EvalTask] = (),
    eval_tasks_every: int | None = None,
    ends: Ends = TO_THE_END,
) -> int:
    """Train to the end, or to a signal; returns an exit code. The command `began` on perf_counter.
    `first_weights` are another run's; `eval_tasks` are evaluated every `eval_tasks_every` steps."""
    run = begin(
        folder,
        data=data,
        model=model,
        optimizer=optimizer,
        settings=settings,
        parallel=parallel,
        world=world,
        screen=screen,
        identity=identity,
        eval_tasks=eval_tasks,
        eval_tasks_every=eval_tasks_every,
    )
    run.began = began
    _take_up(run, resume_from, first_weights)
    peak = optimizer.learning_rate
    rate = partial(lr_at, config=schedule, learning_rate=peak, steps=run.steps)

    def accept(step: int, loss: float, grad_norm: float) -> bool:
        stop.nothing_to_lose = False
        run.finding = run.watch.judge(loss, grad_norm)
        return run.finding is None or _look_into(run, step, loss, grad_norm, clip=optimizer.clip)

    with StopSignals() as stop, screen.progress(steps=run.steps, done=run.done):
        # Until a step is made, which may take a compiler minutes, there is nothing to be saved.
        stop.nothing_to_lose = True
        _catch_up(run, stop)
        while run.done < run.steps and not run.has_lost_patience:
            outcome = _make_steps(run, stop, rate, accept, clip=optimizer.clip, ends=ends)
            if outcome == "stopped":
                return stop.exit_code
            if outcome == "no better":
                break
            if outcome == "spike":
                roll_back(run, first_weights)
        stop.nothing_to_lose = True
        _finish(run)
    return 0


def _take_up(run: Run, resume_from: Checkpoint | None, first_weights: Checkpoint | None) -> None:
    """What the run begins with: its own state, another run's weights, or neither."""
    if resume_from is not None:
        run.restore(resume_from)
        run.began -= resume_from.state.get("total_seconds", run.train_seconds)
    elif first_weights is not None:
        load_weights(run.model, first_weights)
    run.take_up_records()


def _catch_up(run: Run, stop: StopSignals) -> None:
    """Measure what a signal kept from being measured after the last step."""
    if _evaluation_is_missing(run):
        _evaluate(run, stop)
    if run.done and run.eval_tasks and due(run.done, run.eval_tasks_every, run.steps):
        ask_tasks(run, stop)


def due(done: int, every: int | None, steps: int) -> bool:
    """Whether something that happens every so many steps happens now; it always does after the
    last."""
    assert every is not None
    return done % every == 0 or done == steps


def _make_steps(
    run: Run,
    stop: StopSignals,
    rate: Callable[[int], float],
    accept: Accept,
    *,
    clip: float,
    ends: Ends,
) -> Outcome:
    """Steps until something ends them, with all that happens between them."""
    settings = run.settings
    updates = training_steps(
        run.model,
        run.optimizer,
        run.batches.at,
        lr_at=rate,
        steps=run.steps,
        first_step=run.done,
        clip=clip,
        world=run.world,
        precision=settings.precision,
        accept=accept,
    )
    clock = time.perf_counter()
    for report in updates:
        run.world.synchronize()
        if run.finding is not None and settings.spike_action == "rollback":
            return "spike"
        _note_step(run, report, seconds=time.perf_counter() - clock)
        is_best = due(run.done, settings.evaluate_every, run.steps) and _evaluate(run, stop)
        if run.eval_tasks and due(run.done, run.eval_tasks_every, run.steps):
            ask_tasks(run, stop)
        stops = stop.ends_run(run.world) or run.done == ends.stop_after
        is_kept = settings.keep_every is not None and run.done % settings.keep_every == 0
        if is_best or stops or is_kept or due(run.done, settings.save_every, run.steps):
            run.save(wait=stops or run.done == run.steps)
        run.poll_saver()
        if run.done == ends.die_after:
            run.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if stops and (run.done < run.steps or _is_unmeasured(run)):
            return "stopped"
        if run.has_lost_patience:
            run.screen.line(f"no better evaluation in the last {run.best.since}: stopping here")
            run.save(wait=True)
            return "no better"
        clock = time.perf_counter()
    return "done"


def _look_into(run: Run, step: int, loss: float, grad_norm: float, *, clip: float) -> bool:
    """Say what is wrong with a step and write it down; whether to make its update all the same."""
    finding, action = run.finding, run.settings.spike_action
    assert finding is not None
    makes_it = finding.kind == SPIKE and action == "warn"
    norms = run.model.gradient_norms()
    written = None
    if run.world.is_main:
        written = write_post_mortem(
            run.folder,
            step=step,
            finding=finding,
            loss=loss,
            grad_norm=grad_norm,
            clip=clip,
            gradient_norms=norms,
            data=run.data,
            batches=run.batches,
            records=run.records.metrics(),
        )
    what = f"the loss is {loss:.3f}, the gradient's norm {grad_norm:.3g}"
    if finding.kind == SPIKE:
        what += f", {finding.z_score:.1f} standard deviations above the steps before"
    then = "the update is made" if makes_it else "no update is made"
    at = "" if written is None else f"; see {written}"
    run.screen.line(f"step {step + 1:,}: {what}; {then}{at}", style="yellow")
    return makes_it


def _note_step(run: Run, report: StepReport, *, seconds: float) -> None:
    run.done = report.step + 1
    run.train_seconds += seconds
    loss, finding, batches = report.nats_per_token, run.finding, run.batches
    run.watch.note(loss, finding)
    n_bytes, checksum = run.read_by_all()
    bits_per_byte = report.nats / math.log(2) / n_bytes if n_bytes else math.nan
    tokens = run.done * (run.settings.batch_tokens or 0)
    wrong = {} if finding is None else {"finding": finding.kind, "z_score": finding.z_score}
    run.records.add_metrics(
        {
            "kind": "train",
            "step": run.done,
            "tokens": tokens,
            "loss": loss,
            "bits_per_byte": bits_per_byte,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "ids": int(checksum),
            "tokens_per_second": report.count / seconds,
            "seconds": run.train_seconds,
            "epoch": tokens / run.data.split("train").n_tokens,
            **batches.source_tokens(run.done),
            **wrong,
        }
    )
    if finding is not None and finding.kind == NOT_FINITE and run.watch.in_a_row >= MOST_IN_A_ROW:
        raise ValueError(
            f"step {report.step}: the loss is {loss}, the gradient's norm {report.grad_norm}, and "
            f"so it was for {MOST_IN_A_ROW} steps, none of which made an update; a lower "
            f"optimizer.learning_rate (now {report.learning_rate:.1e}) or a longer "
            f"schedule.warmup_steps may help. The last checkpoint is whole."
        )
    run.screen.step(
        run.done,
        run.steps,
        loss=loss,
        bits_per_byte=bits_per_byte,
        rate=report.learning_rate,
        speed=report.count / seconds,
    )


def _evaluation_is_missing(run: Run) -> bool:
    """Whether the step that weights are from was due to be evaluated, and a signal came between."""
    if not run.done or not due(run.done, run.settings.evaluate_every, run.steps):
        return False
    records = run.records.metrics()
    return not any(r["kind"] == "evaluate" and r["step"] == run.done for r in records)


def _is_unmeasured(run: Run) -> bool:
    """Whether a signal broke off what is measured after the last step."""
    if run.world.size > 1:
        return False
    return _evaluation_is_missing(run) or bool(missing_tasks(run))


def _evaluate(run: Run, stop: StopSignals) -> bool:
    """Score the fixed part of the held-out split and write a sample; True for a new best score.

    A signal breaks it off without a record: it is then the first thing that a resume does.
    """
    result = evaluate_split(run, whole=False, stop=stop)
    if result is None:
        return False
    is_best = run.best.note(run.done, result.nats_per_token)
    run.records.add_metrics(
        {
            "kind": "evaluate",
            "step": run.done,
            "tokens": run.done * (run.settings.batch_tokens or 0),
            "val_nats_per_token": result.nats_per_token,
            "val_perplexity": result.perplexity,
            "val_bits_per_byte": result.bits_per_byte,
            "val_tokens": result.tokens,
            "seconds": run.train_seconds,
        }
    )
    left = (run.steps - run.done) * run.train_seconds / run.done
    run.screen.evaluation(
        run.done,
        nats_per_token=result.nats_per_token,
        bits_per_byte=result.bits_per_byte,
        left_seconds=left,
        best=is_best,
    )
    sampling = Sampling(temperature=0.8, seed=run.settings.seed)
    run.model.unshard()
    with run.world.autocast(run.model.compute_dtype):
        text = uncompiled(generate)(
            run.lm_loss.decoder,
            run.data.tokenizer(),
            "",
            max_tokens=SAMPLE_TOKENS,
            sampling=sampling,
        )[0]
    run.screen.sample(text)
    run.records.add_sample(
        {
            "step": run.done,
            "prompt": "",
            "text": text,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
    )
    return is_best


def _finish(run: Run) -> None:
    """Score the best checkpoint on the whole held-out split and write summary.json, the end of the
    run."""
    chosen = run.folder / "checkpoints" / checkpoint_name(run.done)
    best = run.folder / "checkpoints" / checkpoint_name(run.best.step or run.done)
    if best != chosen and best.exists():
        chosen = best
        load_weights(run.model, open_checkpoint(chosen))
    result = evaluate_split(run, whole=True)
    assert result is not None
    tokens = run.done * (run.settings.batch_tokens or 0)
    predictions, peaks = look_at_passage(run), run.world.all_gather([run.world.peak_memory_bytes()])
    if not run.world.is_main:
        return
    decoder = run.lm_loss.decoder
    run.screen.line("scoring count tables and xz on the same held-out tokens ...")
    baselines = measure_baselines(
        run.data.split("train"), run.data.split("val"), tokenizer=run.data.tokenizer()
    )
    write_json(run.folder / "baselines.json", baselines)
    write_json(run.folder / PREDICTIONS, predictions)
    summary = {
        "parameters": n_parameters(decoder.config, vocab_size=decoder.vocab_size),
        "steps": run.done,
        "tokens": tokens,
        "epochs": tokens / run.data.split("train").n_tokens,
        "val_nats_per_token": result.nats_per_token,
        "val_perplexity": result.perplexity,
        "val_bits_per_byte": result.bits_per_byte,
        "val_tokens": result.tokens,
        "val_bytes": result.bytes,
        "tokens_per_second": tokens / run.train_seconds,
        "train_seconds": run.train_seconds,
        "stalled_seconds": run.stalled_seconds,
        "total_seconds": time.perf_counter() - run.began,
        "peak_memory_bytes": int(max(peak for (peak,) in peaks)),
        "checkpoint": chosen.relative_to(run.folder).as_posix(),
        "baselines": baselines["baselines"],
        **({"tasks": last_rows(run)} if run.eval_tasks else {}),
        **run.batches.source_tokens(run.done, epochs=True),
    }
    write_json(run.folder / SUMMARY, summary)
