"""Score a model on text, every token counted once, and on tasks.

pretrain evaluate RUN                      the run's own held-out text, whole
pretrain evaluate RUN --text a.txt b.txt   your own files, each by itself
pretrain evaluate RUN --stride 64          windows that overlap: more context for each token
pretrain evaluate RUN --text a.txt --heat-map a.html         which words surprise the model
pretrain evaluate RUN --tasks lambada,piqa --task-data DIR   tasks of the papers
pretrain evaluate RUN --task-file mine.jsonl --shots 2       your own: docs/how-to/tasks.md
pretrain evaluate RUN --overlap            and what it has seen before, also in its report
pretrain evaluate RUN --tasks piqa --explain samples_piqa.jsonl   why lm-evaluation-harness differs
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli import scoring
from pretrain.cli.heat_maps import draw_texts
from pretrain.cli.output import Output, plain
from pretrain.cli.overlap import measure, training_text
from pretrain.runner.open import MODEL_HELP
from pretrain.runner.text import text_of_run

if TYPE_CHECKING:
    from pretrain.evaluate import EvalTask, Score, Task, TaskResults
    from pretrain.evaluate.samples import Sample
    from pretrain.runner.open import LoadedModel

# Of a task that is asked in several ways, answers to read.
EXAMPLES_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    scoring.add_arguments(parser)
    parser.add_argument(
        "--answers", metavar="FILE", help="write what was said to each example, a JSON line each"
    )
    parser.add_argument(
        "--heat-map", metavar="FILE", help="draw the texts as HTML, each token by its nats"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="also which share of all this, and of what the model writes, is in its training text",
    )
    parser.add_argument(
        "--explain",
        metavar="FILE",
        help="say where and why lm-evaluation-harness says otherwise: its samples_*.jsonl of the "
        "task (--log_samples)",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    asked = scoring.read_eval_tasks(arguments)
    if arguments.heat_map and arguments.text is None:
        raise ValueError("--heat-map is for texts; give --text with it")
    answers = Path(arguments.answers) if arguments.answers else None
    read = set(map(os.path.realpath, [*(arguments.text or ()), *(arguments.task_file or ())]))
    for name in filter(None, (arguments.answers, arguments.heat_map)):
        if os.path.realpath(name) in read:
            raise ValueError(f"{name} is read here, and would be written over; name another file")
        open(name, "a").close()  # what cannot be written is said at once
    samples = _read_samples(arguments.explain, asked) if arguments.explain else None
    model = scoring.open_scored(arguments.model, arguments)
    data = training_text(model) if arguments.overlap else None

    protocol: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    if arguments.text is not None or not asked:
        of = "all of it, one document after the other," if arguments.text is None else "each text"
        protocol["text"] = scoring.text_protocol(model, arguments.stride, of=of)
        output.say(f"{model.path}: {protocol['text']}")
        texts = _score_texts(model, arguments)
    for name, row in texts.items():
        output.say(
            f"{name}: {row['bits_per_byte']:.4f} bits/byte, perplexity {row['perplexity']:,.2f} a "
            f"token and {row['word_perplexity']:,.1f} a word, {row['tokens']:,} tokens, "
            f"{row['bytes']:,} bytes" + ("; " + row["passed_over"] if "passed_over" in row else "")
        )
    tasks: dict[str, Any] = {}
    lines: list[str] = []
    answered = []
    for each in asked:
        results = scoring.task_results(model, each, arguments.stride)
        name = each.task.name
        protocol[name] = scoring.task_protocol(model, each, results)
        tasks[name] = _task_row(each, results.statistics)
        output.say(f"{name}: {protocol[name]}")
        for metric, found in tasks[name]["metrics"].items():
            output.say(_line(metric, found, is_main=metric == each.task.metric))
        if each.task.wrong:
            tasks[name] |= (conditions := scoring.conditions_of(model, each, arguments.stride))
            _say_conditions(each, results, conditions, output)
        answered.append((each, results))
        if samples is not None:
            tasks[name]["explained"] = _explained(model, each, results, samples, output)
        lines += [json.dumps(plain({"task": name, **line})) + "\n" for line in results.lines]
    if answers is not None:
        answers.write_text("".join(lines), encoding="utf-8")
    if arguments.heat_map:
        draw_texts(model, arguments, output)
    content: dict[str, Any] = {"text": texts, "tasks": tasks, "protocol": protocol}
    if data is not None:
        content["overlap"] = measure(model, data, answered, arguments=arguments, output=output)
    output.result(content)
    return 0


def _read_samples(name: str, asked: list[EvalTask]) -> dict[int, Sample]:
    from pretrain.evaluate.samples import read_samples
    from pretrain.evaluate.task_files import read_task_file

    if len(asked) != 1 or asked[0].task.kind == "answer":
        what = ", ".join(f"{each.task.name} ({each.task.kind})" for each in asked)
        raise ValueError(f"--explain is for one task, and none of open answers; asked: {what}")
    return read_samples(read_task_file(Path(name)), file=name)


def _explained(
    model: LoadedModel,
    asked: EvalTask,
    results: TaskResults,
    samples: dict[int, Sample],
    output: Output,
) -> dict[str, Any]:
    """Say how far two programs agree, and then a line for each example on which they do not."""
    from pretrain.evaluate.explain import explain

    found = explain(
        model.decoder,
        model.tokenizer,
        asked.task,
        asked.examples,
        results,
        samples,
        world=model.world,
        precision=model.precision,
    )
    causes = Counter(each.cause for each in found.differences)
    said = ", ".join(f"{n:,} by {cause}" for cause, n in causes.most_common())
    output.say(
        f"{found.examples:,} examples that both were asked, of {len(asked.examples):,} here and "
        f"{len(samples):,} there: {len(found.differences):,} differ{f' ({said})' if said else ''}, "
        f"log p at most {found.furthest_nats:.1e} nats apart, {found.ties:,} ties"
    )
    for each in found.differences:
        output.say(f"  example {each.example}: {each.cause}: {each.detail}")
    return asdict(found) | {"causes": causes}


def _task_row(asked: EvalTask, statistics: Any) -> dict[str, Any]:
    metrics = scoring.estimates(statistics, seed=asked.seed)
    main = metrics[asked.task.metric]
    return {
        "metric": asked.task.metric,
        **main,
        "examples": len(asked.examples),
        "metrics": metrics,
    }


def _say_conditions(
    each: EvalTask, results: TaskResults, conditions: dict[str, Any], output: Output
) -> None:
    output.say(_conditions_line(each.task, conditions))
    for line in results.lines[:EXAMPLES_SHOWN]:
        text, reference = each.examples[line["example"]].input, line["references"][0]
        output.say(f"    {text}\n    -> {line['answer']}\n    ({reference})")


def _conditions_line(task: Task, found: dict[str, Any]) -> str:
    nats, p, words = found["nats_per_byte"], found["p"], found["baselines"]
    return (
        f"    nats/byte of the reference: {nats['task']:.4f} with the task; {nats['wrong']:.4f} "
        f"with {task.wrong} instead (p = {p['wrong']:.4f}); {nats['none']:.4f} with none "
        f"(p = {p['none']:.4f})\n    {task.metric} of the input itself {words['copy']:.4f}, of its "
        f"first sentence {words['lead']:.4f}"
    )


def _line(metric: str, found: dict[str, Any], *, is_main: bool) -> str:
    error = "" if found["stderr"] is None else f" +- {found['stderr']:.4f}"
    seen = ""
    if is_main and found["detectable"] is not None:
        seen = f"   another model is told apart from {found['detectable']:.4f} on"
    return f"  {'*' if is_main else ' '} {metric:<24}{found['value']:.4f}{error}{seen}"


def _score_texts(model: LoadedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    from pretrain.evaluate import Score

    if arguments.text is None:
        return {"held-out split": _score_split(model, arguments.stride)}
    rows = {}
    for name in arguments.text:
        texts, scores, passed_over = scoring.score_documents(model, name, arguments)
        n_words = sum(len(text.split()) for text in texts)
        rows[name] = _row(sum(scores, Score(0.0, 0, 0)), n_words)
        rows[name] |= {"passed_over": passed_over} if passed_over else {}
    return rows


def _row(score: Score, words: int) -> dict[str, Any]:
    return {
        **asdict(score),
        "words": words,
        "perplexity": score.perplexity,
        "word_perplexity": score.per_word(words),
        "bits_per_byte": score.bits_per_byte,
    }


def _score_split(model: LoadedModel, stride: int | None) -> dict[str, Any]:
    from pretrain.data import evaluation_batches
    from pretrain.evaluate import byte_lengths, score
    from pretrain.evaluate.documents import document_texts
    from pretrain.evaluate.loss import EVALUATION_TOKENS
    from pretrain.model import LMLoss

    seen = None if model.checkpoint is None else model.checkpoint.state.get("fingerprint")
    if seen is None:
        raise ValueError(
            f"{model.path} was not trained here and has no held-out text; score files with --text"
        )
    stream = text_of_run(model.config, seen).split("val")
    context = model.decoder.config.window_tokens
    batches = evaluation_batches(
        stream,
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        stride=stride,
    )
    result = score(
        LMLoss(model.decoder),
        batches,
        byte_lengths_V=byte_lengths(model.tokenizer),
        world=model.world,
        precision=model.precision,
    )
    documents = document_texts(stream, model.tokenizer, piece_tokens=stream.n_tokens)
    words = sum(len(text.split()) for _, text in documents)
    return _row(result, words)
