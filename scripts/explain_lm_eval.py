"""Why lm-evaluation-harness gives other results on the same examples.

python scripts/explain_lm_eval.py MODEL SAMPLES --task-file FILE     or --tasks NAME --task-data DIR

Input are our results, and the samples that the harness logged (`--log_samples`, a samples_*.jsonl).
The model is scored again in every way in which programs are known to differ, one after the other;
the first way that reproduces the logged numbers is the cause. A difference that no way reproduces
is "not explained". Generated answers have no likelihoods and are rejected.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cli import scoring
from pretrain.cli.output import Output
from pretrain.evaluate.examples import Example
from pretrain.evaluate.loglikelihood import Pair, encode_pair, rolling_pairs, score_pairs
from pretrain.evaluate.loss import Model
from pretrain.evaluate.run_tasks import TaskResults, evaluate_task
from pretrain.evaluate.task_files import read_task_file
from pretrain.evaluate.tasks import Task
from pretrain.tokenizer.tokenizer import Tokenizer

# Two programs in float32 differ by less, and options nearer than this are a tie; a log p of many
# tokens may differ by a millionth of itself.
TOLERANCE_NATS = 1e-3
_RELATIVE_TOLERANCE = 1e-6
_NOT_EXPLAINED = "not explained"
_HARNESS_METRICS = {
    "accuracy": "acc",
    "accuracy_per_character": "acc_norm",
    "accuracy_per_byte": "acc_bytes",
    "accuracy_unconditional": "acc_mutual_info",
}


# The harness' samples -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One example as the harness scored it."""

    options: tuple[tuple[str, str], ...]
    """Context and continuation of each; the context of a full text is empty."""
    log_p: tuple[float, ...]
    """Of each option, in nats."""
    target: str
    """The right option: its number, or its text."""
    accuracies: Mapping[str, float]
    """By the harness' metric, whether the answer was right."""


class _GeneratedAnswer(Exception):
    """The request was to generate text."""


def read_samples(text: str, *, file: str = "the text") -> dict[int, Sample]:
    """The samples in a samples_*.jsonl, by the number of their example. ValueError with file and
    line for another form."""
    samples: dict[int, Sample] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example, sample = _parse_sample(json.loads(line))
        except _GeneratedAnswer:
            raise ValueError(
                f"{file}, line {number} is a generated answer; it must be a sample of likelihoods"
            ) from None
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            raise ValueError(
                f"{file}, line {number} must be a line that lm-evaluation-harness writes with "
                f"--log_samples (got {line:.60})"
            ) from None
        # An example has one line for each filter of its task, all with the same log p.
        samples.setdefault(example, sample)
    if not samples:
        raise ValueError(f"{file} contains no sample")
    return samples


def _parse_sample(record: Mapping[str, Any]) -> tuple[int, Sample]:
    arguments = record["arguments"]  # {"gen_args_0": {"arg_0": ...}}, or lists before 0.4.3
    requests = arguments.values() if isinstance(arguments, Mapping) else arguments
    texts = [list(r.values()) if isinstance(r, Mapping) else r for r in requests]
    if any(isinstance(each, Mapping) for request in texts for each in request):
        raise _GeneratedAnswer
    options = tuple(("", *request) if len(request) == 1 else tuple(request) for request in texts)
    responses = [responses[0] for responses in record["resps"]]
    log_p = tuple(float(r[0] if isinstance(r, list) else r) for r in responses)
    if len(log_p) != len(options) or not all(isinstance(t, str) for o in options for t in o):
        raise ValueError
    accuracies = {
        name: float(value)
        for name, value in record.items()
        if name.startswith("acc") and isinstance(value, int | float)
    }
    target = str(record.get("target", ""))
    return int(record["doc_id"]), Sample(options, log_p, target, accuracies)


# The comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """An example with different results."""

    example: int
    cause: str
    detail: str
    log_p: tuple[float, ...]
    """Of each option, in nats."""
    harness_log_p: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class HarnessComparison:
    """The result of comparing the examples that both programs scored."""

    n_examples: int
    largest_difference: float
    """Of a log p, in nats."""
    n_ties: int
    """Examples whose two best options are equally likely, within TOLERANCE_NATS."""
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "examples": self.n_examples,
            "furthest_nats": self.largest_difference,
            "ties": self.n_ties,
            "differences": [
                {
                    "example": each.example,
                    "cause": each.cause,
                    "detail": each.detail,
                    "ours": each.log_p,
                    "theirs": each.harness_log_p,
                }
                for each in self.differences
            ],
            "causes": Counter(each.cause for each in self.differences),
        }

    def lines(self) -> Iterator[str]:
        """The result for people; after the first line, one line a difference."""
        counts = Counter(each.cause for each in self.differences).most_common()
        causes = ", ".join(f"{n:,} by {cause}" for cause, n in counts)
        yield (
            f"{self.n_examples:,} examples in both: {len(self.differences):,} differ"
            f"{f' ({causes})' if causes else ''}, log p differs by at most "
            f"{self.largest_difference:.1e} nats, {self.n_ties:,} ties"
        )
        for each in self.differences:
            yield f"  example {each.example}: {each.cause}: {each.detail}"


@dataclass(frozen=True, slots=True)
class _Case:
    """One example in both programs."""

    number: int
    example: Example
    sample: Sample
    options: list[tuple[str, str]]
    log_p: tuple[float, ...]
    tokens: list[int]
    values: list[tuple[float, int]]
    """By which the metric ranks the options, and the size that divided log p."""

    @property
    def harness_log_p(self) -> tuple[float, ...]:
        """Without the options of acc_mutual_info, which follow: the same without their question."""
        return self.sample.log_p[: len(self.log_p)]

    @property
    def has_other_options(self) -> bool:
        return len(self.sample.log_p) not in (len(self.log_p), 2 * len(self.log_p))

    @property
    def is_tie(self) -> bool:
        ranked = sorted(self.values, reverse=True)
        if len(ranked) < 2:
            return False
        (best, best_size), (second, second_size) = ranked[:2]
        return best - second <= TOLERANCE_NATS / min(best_size, second_size)

    @property
    def largest_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.log_p, self.harness_log_p, strict=True))

    def difference(self, cause: str, detail: str) -> Difference:
        return Difference(self.number, cause, detail, self.log_p, self.harness_log_p)


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to score a continuation: the nats of its pairs are added."""

    cause: str
    detail: str
    pairs: Callable[[str, str], list[Pair]]


def compare_with_harness(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    results: TaskResults,
    samples: Mapping[int, Sample],
) -> HarnessComparison:
    """Compare results with samples, example by example, and find the causes of differences.
    ValueError for open answers, and if no example is in both."""
    if task.kind == "answer":
        raise ValueError(f"{task.name} has generated answers, which have no likelihoods to compare")
    cases = [
        _case(task, number, example, results.records[number], samples[number])
        for number, example in enumerate(examples)
        if number in samples
    ]
    if not cases:
        raise ValueError(f"none of the {len(examples)} examples of {task.name} is in the samples")

    differences: dict[int, Difference] = {}
    unexplained: list[_Case] = []
    for case in cases:
        difference = _difference_in_numbers(task, results, case)
        if difference is not None:
            differences[case.number] = difference
        elif not _agree(case.log_p, case.harness_log_p):
            unexplained.append(case)

    tokenizer = model.tokenizer
    for way in _ways(task, tokenizer, model.decoder.config.window_tokens):
        pairs_of_cases = [(case, _pairs_of(way, case)) for case in unexplained]
        pairs = [p for _, options in pairs_of_cases for option in options for p in option]
        scores = iter(score_pairs(model, pairs))
        for case, options in pairs_of_cases:
            log_p = [-sum(next(scores).nats for _ in option) for option in options]
            if log_p and _agree(log_p, case.harness_log_p):
                differences[case.number] = _explained_by(way, case, tokenizer)
        unexplained = [case for case in unexplained if case.number not in differences]

    for case in unexplained:
        detail = f"{_text_difference(case)[1]}{case.largest_difference:.3g} nats apart"
        differences[case.number] = case.difference(_NOT_EXPLAINED, detail)
    comparable = [case.largest_difference for case in cases if not case.has_other_options]
    return HarnessComparison(
        n_examples=len(cases),
        largest_difference=max(comparable, default=0.0),
        n_ties=sum(case.is_tie for case in cases),
        differences=tuple(differences[number] for number in sorted(differences)),
    )


def _case(
    task: Task, number: int, example: Example, record: Mapping[str, Any], sample: Sample
) -> _Case:
    options = record["options"]
    log_p = tuple(option["log_p"] for option in options)
    tokens = [option["tokens"] for option in options]
    unit = task.metric.removeprefix("accuracy_per_")
    sizes = _sizes(example, tokens).get(unit, [1] * len(log_p))
    values = [(each / size, size) for each, size in zip(log_p, sizes, strict=True)]
    if task.metric == "accuracy_unconditional":
        values = [(option["log_p"] - option["unconditional_log_p"], 1) for option in options]
    return _Case(number, example, sample, example.options(task.delimiter), log_p, tokens, values)


def _sizes(example: Example, tokens: list[int]) -> dict[str, list[int]]:
    texts = [text for _ in example.contexts for text in example.continuations]
    return {
        "token": tokens,
        "character": [len(text) for text in texts],
        "byte": [len(text.encode("utf-8", "replace")) for text in texts],
    }


def _agree(log_p: Sequence[float], harness_log_p: Sequence[float]) -> bool:
    return all(
        abs(a - b) <= max(TOLERANCE_NATS, _RELATIVE_TOLERANCE * abs(a))
        for a, b in zip(log_p, harness_log_p, strict=True)
    )


def _difference_in_numbers(task: Task, results: TaskResults, case: _Case) -> Difference | None:
    """A difference that needs no further scoring, else None: another number of options, another
    answer from the same log p, or a log p divided by a length."""
    if case.has_other_options:
        n = len(case.sample.log_p)
        return case.difference("text", f"{n} options there, {len(case.log_p)} here")
    if _agree(case.log_p, case.harness_log_p):
        return _difference_in_answer(task, results, case)
    for unit, sizes in _sizes(case.example, case.tokens).items():
        divided = [log_p / size for log_p, size in zip(case.log_p, sizes, strict=True)]
        if _agree(divided, case.harness_log_p):
            return case.difference("normalisation", f"log p a {unit} there, their sum here")
    return None


def _difference_in_answer(task: Task, results: TaskResults, case: _Case) -> Difference | None:
    is_right = {
        metric: bool(statistics[case.number][0])
        for metric, statistics in results.statistics.items()
        if metric.startswith("accuracy")
    }
    accuracies = case.sample.accuracies
    name = _HARNESS_METRICS.get(task.metric, "")
    if name not in accuracies:
        name = next(iter(accuracies), "")
    if task.metric not in is_right or not name:
        return None
    harness_is_right = bool(accuracies[name])
    if is_right[task.metric] == harness_is_right:
        return None

    gold = _gold_number(case.sample.target, case.example)
    if task.kind in ("choice", "pair") and gold is not None and gold != case.example.gold:
        return case.difference("gold", f"option {gold} there, {case.example.gold} here")
    if case.is_tie:
        return case.difference("tie", f"two options within {TOLERANCE_NATS} nats")
    equal = [metric for metric, right in is_right.items() if right == harness_is_right]
    if equal:
        detail = f"{task.metric} here, {name} there, which is equal to our {', '.join(equal)}"
        return case.difference("normalisation", detail)
    return case.difference(_NOT_EXPLAINED, f"log p is the same, and {name} is not {task.metric}")


def _gold_number(target: str, example: Example) -> int | None:
    if target in example.continuations:
        return example.continuations.index(target)
    return int(target) if target.isdecimal() else None


def _ways(task: Task, tokenizer: Tokenizer, context_length: int) -> Iterator[_Way]:
    """Yield our own way first, for their texts; then the others, the most frequent ones first."""
    start = tokenizer.id_to_token(tokenizer.start_of_text)

    yield _Way("", "", lambda context, text: [encode_pair(tokenizer, context, text)])
    if task.kind == "text":

        def rolled(before: list[int]) -> Callable[[str, str], list[Pair]]:
            return lambda _, text: rolling_pairs(
                before + tokenizer.encode(text).tolist(),
                start=tokenizer.start_of_text,
                context_length=context_length,
            )

        yield _Way("windows", "the last window is a full one there", rolled([]))
        with_start = rolled([tokenizer.start_of_text])
        yield _Way("start-of-text", f"{start} is itself counted there", with_start)
        return

    other = copy.copy(tokenizer)
    other.add_bos = not tokenizer.add_bos
    bos = f"{start} before a context there" if other.add_bos else f"no {start} there"
    separate = "context and continuation are encoded separately there"
    yield _Way("start-of-text", bos, lambda context, text: [encode_pair(other, context, text)])
    yield _Way("tokens", separate, lambda context, text: [_separate(tokenizer, context, text)])
    yield _Way(
        "tokens, start-of-text",
        f"{separate}, and {bos}",
        lambda context, text: [_separate(other, context, text)],
    )
    for shorter in (context_length // 2, context_length // 4, context_length // 8):
        detail = f"{shorter} tokens fit there, {context_length} here"
        yield _Way("left cut", detail, _with_context(shorter, tokenizer))


def _separate(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    context_ids = tokenizer.encode_prompt(context)
    return Pair((*context_ids, *tokenizer.encode(continuation).tolist()), len(context_ids))


def _with_context(length: int, tokenizer: Tokenizer) -> Callable[[str, str], list[Pair]]:
    """Pairs as a model with a context of this length reads them. They raise a ValueError if the
    continuation does not fit."""

    def pairs(context: str, text: str) -> list[Pair]:
        pair = encode_pair(tokenizer, context, text)
        n_lost = max(0, len(pair.ids) - 1 - length)
        return [Pair(pair.ids[n_lost:], pair.n_context - n_lost)]

    return pairs


def _pairs_of(way: _Way, case: _Case) -> list[list[Pair]]:
    """The pairs of each of the harness' options; empty if they cannot be scored in this way."""
    if not way.cause and _text_difference(case) == ("", ""):
        return []  # our results are already of these texts
    try:
        return [
            way.pairs(context, text) for context, text in case.sample.options[: len(case.log_p)]
        ]
    except ValueError:  # a text outside the vocabulary, or without a token of its own
        return []


def _explained_by(way: _Way, case: _Case, tokenizer: Tokenizer) -> Difference:
    cause, detail = _text_difference(case)
    detail += way.detail
    if "tokens" in way.cause:
        detail += f": {_token_difference(tokenizer, way, case)}"
    causes = [each for each in (cause, way.cause) if each]
    return case.difference(", ".join(causes), detail.removesuffix("; "))


def _text_difference(case: _Case) -> tuple[str, str]:
    """Cause and detail of the first option whose texts differ; both empty without a difference."""
    for option, harness_option in zip(case.options, case.sample.options, strict=False):
        context, text = _move_space(*option)
        harness_context, harness_text = _move_space(*harness_option)
        if context != harness_context:
            return "text", f"context {_first_difference(context, harness_context)}; "
        if text.lstrip() != harness_text.lstrip():
            return "text", f"continuation {_first_difference(text, harness_text)}; "
        if text != harness_text:
            here = text[: len(text) - len(text.lstrip())]
            there = harness_text[: len(harness_text) - len(harness_text.lstrip())]
            return "white space", f"{there!r} before the continuation there, {here!r} here; "
    return "", ""


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    """Move white space from the end of the context to the continuation, as both programs do."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _first_difference(text: str, harness_text: str) -> str:
    shorter = min(len(text), len(harness_text))
    at = next((i for i in range(shorter) if text[i] != harness_text[i]), shorter)
    here = text[max(0, at - 15) : at + 25]
    there = harness_text[max(0, at - 15) : at + 25]
    return f"differs from character {at} on: {there!r} there, {here!r} here"


def _token_difference(tokenizer: Tokenizer, way: _Way, case: _Case) -> str:
    """The tokens of the first continuation that is encoded in another way."""

    def tokens(pair: Pair) -> str:
        return " ".join(tokenizer.id_to_token(id_) for id_ in pair.ids[pair.n_context :])

    for context, text in case.sample.options:
        (pair,) = way.pairs(context, text)
        there, here = tokens(pair), tokens(encode_pair(tokenizer, context, text))
        if there != here:
            return f"{there} there, {here} here"
    return "those of the context differ"


# The command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the task with a model, and print where and why the harness' samples differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="as for pretrain evaluate")
    parser.add_argument("samples", metavar="SAMPLES", type=Path, help="samples_*.jsonl of the task")
    for flag, words in scoring.OPTIONS:
        parser.add_argument(flag, **words)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    output = Output(json=args.json)
    try:
        eval_tasks = scoring.read_eval_tasks(args)
        if len(eval_tasks) != 1 or eval_tasks[0].task.kind == "answer":
            kinds = ", ".join(f"{each.task.name} ({each.task.kind})" for each in eval_tasks)
            raise ValueError(f"give one task without open answers (got {kinds or 'none'})")
        samples = read_samples(read_task_file(args.samples), file=str(args.samples))
        model = scoring.open_scored(
            args.model, device=args.device, start_of_text=args.start_of_text
        )
    except ValueError as error:
        output.fail(str(error), 2)
        return 2
    ((task, examples),) = ((each.task, each.examples) for each in eval_tasks)
    results = evaluate_task(model, task, examples)
    comparison = compare_with_harness(model, task, examples, results, samples)
    for line in comparison.lines():
        output.log(line)
    output.result(comparison.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
