"""What a user sees of a run: the plan, a progress bar, evaluations, samples, a summary.

On a terminal a bar redraws itself; in a file the same facts are plain lines, a few a minute.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich import console as rich_console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from pretrain.config import RunConfig
from pretrain.data.format import PreparedData
from pretrain.data.order import ceil_div
from pretrain.distributed import World
from pretrain.evaluate.task_files import EvalTask
from pretrain.machine import this_command
from pretrain.model.config import n_parameters
from pretrain.report.units import duration
from pretrain.run.directory import CROSS_VALIDATION, MIX_FOLDER
from pretrain.train.build import TrainingBatches
from pretrain.train.config import filled
from pretrain.train.resolve import (
    MAX_ERROR,
    checkpoint_bytes,
    expected_memory,
    fit_table_rows,
    is_tiny,
    max_steps,
)

# Seconds between two lines of steps where the output is not a terminal.
LINE_SECONDS = 10.0
# Beyond about four epochs repeated text teaches less and less: "Scaling Data-Constrained Language
# Models" (Muennighoff et al., 2023).
MANY_EPOCHS = 4
# Parameters for each token of the text beyond which a smaller model is suggested.
MANY_PARAMETERS = 100


def with_error(row: Mapping[str, Any]) -> str:
    """`0.412 +- 0.035`: a value, and its standard error where there is one."""
    value, error = row["value"], row["stderr"]
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


class Console:
    """Writes human-readable lines to `file`; of a further network of a run only its progress, as a
    `brief` one."""

    def __init__(self, file: TextIO, *, brief: bool = False) -> None:
        self.is_brief = brief
        self._rich = rich_console.Console(file=file, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._began = (0.0, 0)

    def line(self, text: str = "", *, style: str = "") -> None:
        """Show a line, which is never read as markup."""
        self._rich.print(Text(text, style=style))

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Print labels and values, of one or more lines, in two columns."""
        width = max(len(label) for label, _ in facts)
        for label, value in facts:
            value = value.replace("\n", "\n" + " " * (width + 4))
            style = "bold red" if label == "warning" else "dim"
            self._rich.print(Text.assemble((f"  {label:<{width}}  ", style), value))

    @contextmanager
    def progress(self, *, steps: int, step: int) -> Iterator[None]:
        """Show steps as they are made: a bar on a terminal, lines elsewhere."""
        self._last_line = time.monotonic()
        self._began = (self._last_line, step)
        if not self._rich.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self._rich, transient=True) as self._bar:
            self._bar.add_task("", total=steps, completed=step, facts="")
            yield
        self._bar = None

    def step(self, record: Mapping[str, Any], *, steps: int) -> None:
        """Show a step's line of metrics.jsonl, of `steps` in all."""
        step = record["step"]
        facts = (
            f"loss {record['loss']:.3f} | {record['bits_per_byte']:.3f} bits/byte | "
            f"{record['tokens_per_second']:>7,.0f} tok/s"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, total=steps, facts=facts)
            return
        now = time.monotonic()
        if step not in (1, steps) and now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        line = f"step {step:>6,}/{steps:,} | {facts} | lr {record['learning_rate']:.1e}"
        self.line(line + self._left(step, steps))

    def _left(self, step: int, steps: int) -> str:
        """` | 3 min 20 s left`, by the pace of this process, evaluations and checkpoints included;
        nothing before its first step and after the last."""
        start_time, first = self._began
        if step <= first or step == steps:
            return ""
        pace = (time.monotonic() - start_time) / (step - first)
        return f" | {duration(pace * (steps - step))} left"

    def evaluation(self, record: Mapping[str, Any], *, steps: int, is_best: bool) -> None:
        """Show an evaluation's line of metrics.jsonl, of `steps` in all."""
        mark = ", the best so far" if is_best else ""
        self.line(
            f"step {record['step']:>6,} | held-out text: {record['val_nats_per_token']:.3f} "
            f"nats/token, {record['val_bits_per_byte']:.3f} bits/byte{mark}"
            f"{self._left(record['step'], steps)}",
            style="bold",
        )

    def tasks(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the results of in-loop tasks, all on one line."""
        results = "; ".join(f"{row['task']} {row['metric']} {with_error(row)}" for row in rows)
        seconds = sum(row["seconds"] for row in rows)
        self.line(f"step {step:>6,} | {results} | evaluated in {seconds:.1f} s")


# --- before the first step ------------------------------------------------------------------------


def show_plan(
    console: Console,
    config: RunConfig,
    data: PreparedData,
    world: World,
    batches: TrainingBatches,
    tasks: Sequence[EvalTask],
) -> None:
    """Show what is about to happen, and a warning where the text will be read many times."""
    if console.is_brief:
        return
    model, train = config.model, config.train
    text, held_out = data.split("train"), data.split("val")
    context, vocab_size = model.window_tokens, data.manifest.vocab_size
    steps, batch_tokens = filled(train.steps), filled(train.batch_tokens)
    tokens = steps * batch_tokens
    epochs = tokens / text.n_tokens
    facts = {
        "text": f"{text.n_documents:,} documents, {text.n_tokens:,} tokens to train on; "
        f"{held_out.n_documents:,} documents, {held_out.n_tokens:,} tokens held out"
    }
    if sources := batches.sources(steps):
        facts["mixed"] = "; ".join(
            f"{Path(name).name} {100 * source['share']:.1f} %, {source['epochs']:.2f} epochs"
            for name, source in sources.items()
        )

    # Most parameters of the family `fast` are table rows: they take memory but no matmul.
    in_tables = model.table_rows(vocab_size) * model.d_model
    tables = f", {in_tables:,} of them in lookup tables" if in_tables else ""
    n_all = n_parameters(model, vocab_size=vocab_size)
    requested = config.tokenizer.vocab_size or vocab_size
    of = f" of {requested:,}: the text has no more pairs" if vocab_size < requested else ""
    facts["model"] = (
        f"{model.family}, {n_all:,} parameters{tables} "
        f"({model.n_layers} layers, width {model.d_model}, context {context}, vocabulary "
        f"{vocab_size:,}{of})"
    )
    if train.init_from is not None:
        facts["start"] = f"weights of {train.init_from}"
    if train.teacher is not None:
        facts["teacher"] = f"{train.teacher}, {train.teacher_weight:.0%} of the target"

    micro_batch = filled(train.micro_batch_rows) * context
    # Processes of one context, tensor or pipeline axis read the same rows.
    _, n_parts = config.parallel.resolve(world.size).batch_part(world.rank)
    accumulation = ceil_div(batch_tokens, micro_batch * n_parts)
    facts["batch"] = (
        f"{batch_tokens:,} tokens = micro-batch {micro_batch:,} x accumulation "
        f"{accumulation} x data-parallel processes {n_parts}"
    )
    facts["run"] = f"{steps:,} steps, {tokens:,} tokens, {epochs:.2f} epochs"
    # Whether the steps are limited by the text rather than by train.minutes.
    ends_early = steps == max_steps(config, data)
    n, counts = train.members or 1, train.counts
    if train.minutes is not None:
        facts["run"] += f", {'at most' if ends_early else 'about'} {train.minutes / n:.3g} min"
    if n > 1 or counts:
        facts["result"] = _mean_of(n, counts)
    facts |= _costs(config, vocab_size, text.n_tokens)
    facts["on"] = (
        f"{world.device.type}, {world.threads} threads, {train.precision}, compile {train.compile}"
    )
    if tasks:
        names = ", ".join(f"{each.task.name} ({len(each.examples):,})" for each in tasks)
        every = filled(config.evaluate.every)
        often = "after the last step" if every >= steps else f"every {every:,} steps"
        facts["tasks"] = f"{names}, {often}"
    first, *others = facts.items()
    console.facts([first, *(fact for r in data.readings for fact in r["facts"].items()), *others])
    # Tables that were fitted to the text are as small as they should be.
    is_fitted = model.rows_of_a_table <= fit_table_rows(text.n_tokens)
    n_many = n_all - in_tables * is_fitted
    ends_early &= n == 1 and not is_tiny(config, data)
    _show_notes(console, n_many, text.n_tokens, epochs, ends_early=ends_early, tables=not is_fitted)


def _costs(config: RunConfig, vocab_size: int, n_train_tokens: int) -> dict[str, str]:
    n_bytes = checkpoint_bytes(config, vocab_size)
    kept = f"the newest {config.train.keep_checkpoints} and the best are kept"
    facts = {"disk": f"up to {n_bytes / 1e6:,.0f} MB a checkpoint; {kept}"}
    if config.train.device == "cpu" and config.parallel.processes == 1:
        n_bytes = expected_memory(config, vocab_size, n_train_tokens)
        facts["memory"] = f"about {n_bytes / 1e6:,.0f} MB"
    return facts


def _mean_of(n_networks: int, counts: int | None) -> str:
    networks = f"{n_networks} networks, one after the other" if n_networks > 1 else "the network"
    counted = f" and the counts of up to {counts} tokens in the text" if counts else ""
    return f"the mean of {networks}{counted}"


def _show_notes(
    console: Console, n_all: int, n_tokens: int, epochs: float, *, ends_early: bool, tables: bool
) -> None:
    remedy = "--model.ngram_rows 0" if tables else "a smaller --model.d_model"
    if ends_early:
        console.line(
            "note: n-gram tables memorise what is read twice, so this run may end before its "
            "minutes do. A second network needs 2.4 times the time of an epoch; more text or a "
            "larger --model.size uses it better."
        )
    if n_all > MANY_PARAMETERS * n_tokens:
        console.line(
            f"note: {n_all:,} parameters are many for {n_tokens:,} tokens of text; {remedy} "
            "saves disk and time.",
            style="yellow",
        )
    if epochs > MANY_EPOCHS:
        console.line(
            f"note: the text will be read {epochs:.0f} times; beyond {MANY_EPOCHS} epochs a model "
            "memorises it rather than learning from it. The checkpoint with the best held-out loss "
            "is kept; --train.patience 3 stops early. If the text is English, --from bundled lets "
            "it stand on the bundled corpus.",
            style="yellow",
        )


# --- after the last step --------------------------------------------------------------------------


def show_summary(
    console: Console,
    summary: Mapping[str, Any],
    *,
    folder: Path,
    report: Path,
) -> None:
    """Show the results, the cost in all and by what took the time, and where the files are."""
    seconds = summary["seconds"]
    spent = {**seconds, "the rest": summary["total_seconds"] - sum(seconds.values())}
    parts = ", ".join(f"{name} {duration(each)}" for name, each in spent.items())
    crossed = summary.get(CROSS_VALIDATION)
    baselines = ", ".join(
        f"{row['name']} {row['bits_per_byte']:.3f}" for row in (crossed or summary)["baselines"]
    )
    console.line()
    console.line("done", style="bold green")
    bits, stderr = summary["val_bits_per_byte"], summary["val_bits_per_byte_stderr"]
    results = {
        "held-out text": f"{with_error({'value': bits, 'stderr': stderr})} bits/byte, perplexity "
        f"{summary['val_perplexity']:,.1f} over {summary['val_tokens']:,} tokens"
    }
    remedy = "--data.val_fraction holds out more text"
    if crossed:
        bits, stderr, held_out = (crossed[key] for key in ("bits_per_byte", "stderr", "parts"))
        results["cross-validated"] = (
            f"{with_error({'value': bits, 'stderr': stderr})} bits/byte over {len(held_out)} parts "
            f"of the text, {sum(part['bytes'] for part in held_out):,} bytes, each held out from a "
            "training of its own"
        )
        remedy = "more text lowers it, and more --train.minutes where parts are left"
    if stderr is None or stderr > MAX_ERROR * bits:
        error = "unknown" if stderr is None else f"{100 * stderr / bits:.1f} %"
        results[list(results)[-1]] += f"\nits error is {error}; {remedy}"
    notes = [*summary.get("held_out", {}).get("notes", ())]
    notes += [summary["choice"]["note"]] if "choice" in summary else []
    results["held-out text"] += "".join(f"\n{note}" for note in notes)
    results["baselines"] = f"{baselines} bits/byte" + " of the same parts" * bool(crossed)
    if MIX_FOLDER in summary:
        results["mean of"] = ", ".join(
            f"{row['name']} {row['bits_per_byte']:.3f} ({100 * row['weight']:.0f} %)"
            for row in summary[MIX_FOLDER]
        )
    if base := summary.get("base"):
        results["larger text"] = (
            f"{base['bits_per_byte']:.3f} bits/byte of its held-out text, "
            f"{base['best_bits_per_byte']:.3f} at best"
        )
    tasks = {  # of any name, also one of the other labels
        name: f"{row['metric']} {with_error(row)}" for name, row in summary.get("tasks", {}).items()
    }
    if "minutes" in summary:
        kept = f"{duration(60 * summary['minutes'])} from the first step to the last"
        results["minutes"] = "; ".join(filter(None, [kept, summary["clock"]]))
    rest = {
        "cost": f"{duration(summary['total_seconds'])} ({parts}), "
        f"{summary['tokens_per_second']:,.0f} tokens/s in training, "
        f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB of memory at most",
        "checkpoint": str(folder / summary["checkpoint"]),
        "report": str(report),
        "try it": f"{this_command()} generate {shlex.quote(str(folder))} --n 3",
    }
    console.facts([*results.items(), *tasks.items(), *rest.items()])
