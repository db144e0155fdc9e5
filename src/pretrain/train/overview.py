"""The first lines and the last lines of a run, for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.data import Order, PreparedData
from pretrain.data.order import MixtureOrder
from pretrain.distributed import World
from pretrain.evaluate import EvalTask
from pretrain.model import ModelConfig, n_parameters
from pretrain.train.config import TrainConfig
from pretrain.train.decide import most_steps
from pretrain.train.screen import Screen, duration, with_error

# Beyond about four passes repeated text teaches less and less: "Scaling Data-Constrained Language
# Models" (Muennighoff et al., 2023).
MANY_EPOCHS = 4


def show_plan(
    screen: Screen, *, data: PreparedData, model: ModelConfig, settings: TrainConfig, world: World
) -> None:
    """What is about to happen, in five lines, and a warning where the text will be read many
    times."""
    text, held_out = data.split("train"), data.split("val")
    context, vocab_size = model.window_tokens, data.manifest.vocab_size
    steps, micro_rows, batch = settings.steps, settings.micro_batch_rows, settings.batch_tokens
    assert steps is not None
    assert micro_rows is not None
    assert batch is not None
    tokens = steps * batch
    epochs = tokens / text.n_tokens
    micro = micro_rows * context
    accumulation = -(-batch // (micro * world.size))
    # Most parameters of `fast` are rows that a step looks up; they take memory but no products.
    tables = model.table_rows(vocab_size) * model.d_model
    in_tables = f", {tables:,} of them in lookup tables" if tables else ""
    ends_early = steps == most_steps(data, model, settings)
    about = "at most" if ends_early else "about"
    minutes = "" if settings.minutes is None else f", {about} {settings.minutes:g} min"
    start = [] if settings.init_from is None else [("start", f"weights of {settings.init_from}")]
    rows = batch // context
    order = data.order(context_length=context, seed=settings.seed, steps=steps, batch_size=rows)
    mixture = [] if isinstance(order, Order) else [("mixed", _mixed(order, steps * rows))]
    screen.facts(
        [
            (
                "text",
                f"{text.n_documents:,} documents, {text.n_tokens:,} tokens to train on; "
                f"{held_out.n_documents:,} documents, {held_out.n_tokens:,} tokens held out",
            ),
            *mixture,
            (
                "model",
                f"{model.family}, {n_parameters(model, vocab_size=vocab_size):,} parameters"
                f"{in_tables} ({model.n_layers} layers, width {model.d_model}, context {context}, "
                f"vocabulary {vocab_size:,})",
            ),
            *start,
            (
                "batch",
                f"{batch:,} tokens = micro-batch {micro:,} x accumulation {accumulation} x "
                f"processes {world.size}",
            ),
            ("run", f"{steps:,} steps, {tokens:,} tokens, {epochs:.2f} epochs{minutes}"),
            (
                "on",
                f"{world.device.type}, {world.threads} threads, {settings.precision}, "
                f"compile {settings.compile}",
            ),
        ]
    )
    _show_notes(screen, epochs=epochs, ends_early=ends_early)


def show_eval_tasks(
    screen: Screen, eval_tasks: Sequence[EvalTask], *, every: int | None, steps: int | None
) -> None:
    """Which tasks are asked, and how often."""
    if not eval_tasks:
        return
    assert every is not None
    assert steps is not None
    names = ", ".join(f"{each.task.name} ({len(each.examples):,})" for each in eval_tasks)
    often = "after the last step" if every >= steps else f"every {every:,} steps"
    screen.facts([("asked", f"{names}, {often}")])


def _show_notes(screen: Screen, *, epochs: float, ends_early: bool) -> None:
    if ends_early:
        screen.line(
            "note: n-gram tables learn a text by heart when it is read again, so this run may end "
            "before its minutes do. --train.steps makes it longer; more text or a larger "
            "--model.size uses the time better."
        )
    if epochs > MANY_EPOCHS:
        screen.line(
            f"note: the text will be read {epochs:.0f} times; past {MANY_EPOCHS} times a model "
            "learns it by heart rather than from it. The best checkpoint by held-out text is kept; "
            "--train.patience 3 stops early.",
            style="yellow",
        )


def _mixed(order: MixtureOrder, n_samples: int) -> str:
    """What the run will read of each source."""
    tokens, epochs = order.tokens(n_samples), order.epochs(n_samples)
    whole = max(1, sum(tokens.values()))
    return "; ".join(
        f"{Path(name).name} {100 * count / whole:.1f} %, {epochs[name]:.2f} epochs"
        for name, count in tokens.items()
    )


def show_summary(screen: Screen, summary: Mapping[str, Any], *, folder: Path, report: Path) -> None:
    """How good it became, what it cost, where it lies."""
    beside = ", ".join(
        f"{row['name']} {row['bits_per_byte']:.3f}" for row in summary.get("baselines", [])
    )
    seconds = summary["total_seconds"]
    summary_tasks = summary.get("tasks", {}).items()
    screen.line()
    screen.line("done", style="bold green")
    screen.facts(
        [
            (
                "held-out text",
                f"{summary['val_bits_per_byte']:.3f} bits/byte, perplexity "
                f"{summary['val_perplexity']:,.1f} over {summary['val_tokens']:,} tokens",
            ),
            ("beside it", f"{beside} bits/byte"),
            *((name, f"{r['metric']} {with_error(r)}") for name, r in summary_tasks),
            (
                "cost",
                f"{duration(seconds)}, {summary['tokens_per_second']:,.0f} tokens/s in training, "
                f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB of memory at most",
            ),
            ("checkpoint", str(folder / summary["checkpoint"])),
            ("report", str(report)),
            ("try it", f"pretrain generate {shlex.quote(str(folder))} --n 3"),
        ]
    )
