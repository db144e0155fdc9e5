"""Why another program says other things of the same examples.

Our answers and lm-evaluation-harness' samples come in. Our model is then asked in every way in
which programs are known to ask, one after the other, and the first way in which it says what was
said there is the cause: nothing is named that does not explain. Open answers are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.distributed import World
from pretrain.evaluate.examples import Example
from pretrain.evaluate.loglikelihood import Pair, encode_pair, rolled, score_pairs
from pretrain.evaluate.run_tasks import TaskResults
from pretrain.evaluate.samples import Sample
from pretrain.evaluate.tasks import Task
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

# Two programs in float32 differ by less, and two options nearer than this are equally likely to
# both; a log p of many tokens may differ by a millionth of itself.
TOLERANCE_NATS = 1e-3
_RELATIVE = 1e-6
_NOT_EXPLAINED = "not explained"
# Our metrics that have a name there.
_THEIR_NAMES = {
    "accuracy": "acc",
    "accuracy_per_character": "acc_norm",
    "accuracy_per_byte": "acc_bytes",
    "accuracy_unconditional": "acc_mutual_info",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """An example on which the two differ."""

    example: int
    cause: str
    detail: str
    ours: tuple[float, ...]
    """log p of each option, in nats."""
    theirs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of the examples that both were asked."""

    examples: int
    furthest_nats: float
    """The largest difference of a log p."""
    ties: int
    """Examples whose two best options are equally likely, within TOLERANCE_NATS."""
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    number: int
    example: Example
    sample: Sample
    options: list[tuple[str, str]]
    ours: tuple[float, ...]
    tokens: list[int]
    scores: list[tuple[float, int]]
    """By what the metric judges each option, and the size that log p was divided by."""

    @property
    def theirs(self) -> tuple[float, ...]:
        """Without what acc_mutual_info asks behind the options: them again, without question."""
        return self.sample.log_p[: len(self.ours)]

    @property
    def n_options_differ(self) -> bool:
        return len(self.sample.log_p) not in (len(self.ours), 2 * len(self.ours))

    @property
    def is_tie(self) -> bool:
        (best, size), *rest = sorted(self.scores, reverse=True)
        return any(best - score <= TOLERANCE_NATS / min(size, n) for score, n in rest[:1])

    def difference(self, cause: str, detail: str) -> Difference:
        return Difference(self.number, cause, detail, self.ours, self.theirs)


@dataclass(frozen=True, slots=True)
class _Way:
    """How a program may ask for a continuation: pairs whose nats are summed."""

    cause: str
    detail: str
    pairs: Callable[[str, str], list[Pair]]


def explain(
    decoder: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    results: TaskResults,
    samples: Mapping[int, Sample],
    *,
    world: World,
    precision: str = "fp32",
) -> Explanation:
    """Compare our results with their samples, example by example, and find causes. ValueError for
    open answers, and where there is no example that both were asked."""
    if task.kind == "answer":
        raise ValueError(f"{task.name} is of the kind answer; what was written is not explained")
    cases = [
        _case(task, number, example, results.lines[number], samples[number])
        for number, example in enumerate(examples)
        if number in samples
    ]
    if not cases:
        raise ValueError(f"none of the {len(examples)} examples of {task.name} is in the samples")
    found: dict[int, Difference] = {}
    waiting: list[_Case] = []
    for case in cases:
        difference = _by_numbers(task, results, case)
        if difference is not None:
            found[case.number] = difference
        elif not _agree(case.ours, case.theirs):
            waiting.append(case)
    for way in _ways(task, tokenizer, decoder.config.window_tokens):
        asked = [(case, _pairs_of(way, case)) for case in waiting]
        pairs = [pair for _, options in asked for option in options for pair in option]
        answers = iter(score_pairs(decoder, pairs, world=world, precision=precision))
        for case, options in asked:
            said = [-sum(next(answers).nats for _ in option) for option in options]
            if said and _agree(said, case.theirs):
                found[case.number] = _by_way(tokenizer, way, case)
        waiting = [case for case in waiting if case.number not in found]
    for case in waiting:
        found[case.number] = case.difference(_NOT_EXPLAINED, _how_far(case))
    comparable = [case for case in cases if not case.n_options_differ]
    return Explanation(
        len(cases),
        max((_furthest(case) for case in comparable), default=0.0),
        sum(case.is_tie for case in cases),
        tuple(found[number] for number in sorted(found)),
    )


def _case(
    task: Task, number: int, example: Example, line: Mapping[str, Any], sample: Sample
) -> _Case:
    options = line["options"]
    ours = tuple(option["log_p"] for option in options)
    tokens = [option["tokens"] for option in options]
    texts = example.options(task.delimiter)
    sizes = _sizes(example, tokens).get(task.metric.removeprefix("accuracy_per_"), [1] * len(ours))
    scores = [(log_p / n, n) for log_p, n in zip(ours, sizes, strict=True)]
    if task.metric == "accuracy_unconditional":
        scores = [(option["log_p"] - option["unconditional_log_p"], 1) for option in options]
    return _Case(number, example, sample, texts, ours, tokens, scores)


def _sizes(example: Example, tokens: list[int]) -> dict[str, list[int]]:
    texts = [text for _ in example.contexts for text in example.continuations]
    in_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
    return {"token": tokens, "character": [len(text) for text in texts], "byte": in_bytes}


def _agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(abs(a - b) <= max(TOLERANCE_NATS, _RELATIVE * abs(a)) for a, b in pairs)


def _by_numbers(task: Task, results: TaskResults, case: _Case) -> Difference | None:
    """What can be said without asking again: of examples that agree in every log p, why the answer
    is another; None where that is the same, and where log p differs for another reason."""
    if case.n_options_differ:
        n = len(case.sample.log_p)
        return case.difference("text", f"{n} options there, {len(case.ours)} here")
    if _agree(case.ours, case.theirs):
        return _by_answer(task, results, case)
    for unit, sizes in _sizes(case.example, case.tokens).items():
        if _agree([log_p / n for log_p, n in zip(case.ours, sizes, strict=True)], case.theirs):
            return case.difference("normalisation", f"log p a {unit} there, their sum here")
    return None


def _by_answer(task: Task, results: TaskResults, case: _Case) -> Difference | None:
    ours = {
        metric: bool(rows[case.number][0])
        for metric, rows in results.statistics.items()
        if metric.startswith("accuracy")
    }
    there = case.sample.right
    name = _THEIR_NAMES.get(task.metric, "")
    name = name if name in there else next(iter(there), "")
    if task.metric not in ours or not name or ours[task.metric] == bool(there[name]):
        return None
    gold = _number_of(case.sample.target, case.example)
    if task.kind in ("choice", "pair") and gold is not None and gold != case.example.gold:
        return case.difference("gold", f"option {gold} there, {case.example.gold} here")
    if case.is_tie:
        return case.difference("tie", f"two options within {TOLERANCE_NATS} nats")
    same = [metric for metric, right in ours.items() if right == bool(there[name])]
    if same:
        verb = "says" if len(same) == 1 else "say"
        detail = f"{task.metric} here, {name} there, and our {', '.join(same)} {verb} the same"
        return case.difference("normalisation", detail)
    return case.difference(_NOT_EXPLAINED, f"log p is the same, and {name} is not {task.metric}")


def _number_of(target: str, example: Example) -> int | None:
    if target in example.continuations:
        return example.continuations.index(target)
    return int(target) if target.isdecimal() else None


def _ways(task: Task, tokenizer: Tokenizer, window: int) -> Iterator[_Way]:
    """Ours on their texts first; then what differs most often."""
    other = copy.copy(tokenizer)
    other.add_bos = not tokenizer.add_bos
    start = tokenizer.id_to_token(tokenizer.start_of_text)
    begins = f"{start} before a context there" if other.add_bos else f"no {start} there"
    apart = "context and continuation are made tokens apart there"

    yield _Way("", "", lambda *texts: [encode_pair(tokenizer, *texts)])
    if task.kind == "text":
        last = "the last window is a full one there"
        yield _Way("windows", last, lambda _, text: _rolled(tokenizer, text, window))
        counted = f"{start} is itself counted there"
        ids = [tokenizer.start_of_text]
        yield _Way("start-of-text", counted, lambda _, text: _rolled(tokenizer, text, window, ids))
        return
    yield _Way("start-of-text", begins, lambda *texts: [encode_pair(other, *texts)])
    yield _Way("tokens", apart, lambda *texts: [_apart(tokenizer, *texts)])
    both = f"{apart}, and {begins}"
    yield _Way("tokens, start-of-text", both, lambda *texts: [_apart(other, *texts)])
    for kept in (window // 2, window // 4, window // 8):
        cut = f"{kept} tokens fit there, {window} here"
        yield _Way(
            "left cut", cut, lambda *texts, n=kept: [_cut(encode_pair(tokenizer, *texts), n)]
        )


def _rolled(tokenizer: Tokenizer, text: str, window: int, before: Sequence[int] = ()) -> list[Pair]:
    ids = [*before, *tokenizer.encode(text).tolist()]
    return rolled(ids, start=tokenizer.start_of_text, context_length=window)


def _apart(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    given = tokenizer.encode_prompt(context)
    return Pair((*given, *tokenizer.encode(continuation).tolist()), len(given))


def _cut(pair: Pair, kept: int) -> Pair:
    """What is left where `kept` ids are read. ValueError where the continuation does not fit."""
    lost = max(0, len(pair.ids) - 1 - kept)
    if lost >= pair.n_context:
        raise ValueError(f"a continuation longer than {kept} tokens has no context")
    return Pair(pair.ids[lost:], pair.n_context - lost)


def _pairs_of(way: _Way, case: _Case) -> list[list[Pair]]:
    """The pairs of each option of theirs; none where they cannot be asked so."""
    if not way.cause and _by_text(case) == ("", ""):
        return []  # that is how ours were asked
    try:
        found = [way.pairs(*texts) for texts in case.sample.options[: len(case.ours)]]
    except ValueError:  # a text that is not in the vocabulary, or no token of its own
        return []
    legal = all(1 <= pair.n_context < len(pair.ids) for option in found for pair in option)
    return found if legal else []


def _by_way(tokenizer: Tokenizer, way: _Way, case: _Case) -> Difference:
    """Their texts, where they are others, and then the way."""
    cause, detail = _by_text(case)
    if "tokens" in way.cause:
        detail += f"{way.detail}: {_tokens(tokenizer, way, case)}"
    else:
        detail += way.detail
    return case.difference(", ".join(filter(None, [cause, way.cause])), detail.removesuffix("; "))


def _by_text(case: _Case) -> tuple[str, str]:
    """How the texts of the first option that differs do: a cause, and where."""
    for ours, theirs in zip(case.options, case.sample.options, strict=False):
        (kept, rest), (their_kept, their_rest) = _parted(*ours), _parted(*theirs)
        if kept != their_kept:
            return "text", f"context {_first_difference(kept, their_kept)}; "
        if rest.lstrip() != their_rest.lstrip():
            return "text", f"continuation {_first_difference(rest, their_rest)}; "
        if rest != their_rest:
            here, there = (text[: len(text) - len(text.lstrip())] for text in (rest, their_rest))
            return "white space", f"{there!r} before the continuation there, {here!r} here; "
    return "", ""


def _parted(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context is the continuation's, there and here."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _first_difference(ours: str, theirs: str) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    here, there = (text[max(0, at - 15) : at + 25] for text in (ours, theirs))
    return f"differs from character {at} on: {there!r} there, {here!r} here"


def _tokens(tokenizer: Tokenizer, way: _Way, case: _Case) -> str:
    """The tokens of the first continuation that are others."""
    for texts in case.sample.options:
        (theirs,), ours = way.pairs(*texts), encode_pair(tokenizer, *texts)
        found = [[tokenizer.id_to_token(i) for i in p.ids[p.n_context :]] for p in (theirs, ours)]
        if found[0] != found[1]:
            return f"{' '.join(found[0])} there, {' '.join(found[1])} here"
    return "those of the context differ"


def _how_far(case: _Case) -> str:
    _, text = _by_text(case)
    return f"{text}{_furthest(case):.3g} nats apart"


def _furthest(case: _Case) -> float:
    return max(abs(a - b) for a, b in zip(case.ours, case.theirs, strict=True))
