"""Why another program has different results: samples as lm-evaluation-harness logs them, each
scored in a way that is written out here, and the cause that must be reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from explain_lm_eval import HarnessComparison, compare_with_harness, main, read_samples
from pretrain.cli.harness import HarnessModel
from pretrain.evaluate.examples import Example
from pretrain.evaluate.run_tasks import evaluate_task
from pretrain.evaluate.tasks import Task, task_of_kind
from pretrain.runner.open import LoadedModel, load_model
from tiny import write_llama

CONTEXT, CHOICES = "The people of the", ("of the people of the United States", "sea", "x")
LONG = "We the people of the United States, in order to form a more perfect Union, establish " * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), context_length=32)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    found = load_model(str(folder), device="cpu")
    found.decoder.double()
    return found


@torch.no_grad()
def log_p(model: LoadedModel, context_ids: Sequence[int], continuation: Sequence[int]) -> float:
    """Return log p(continuation | context) from one forward pass; both fit the window together."""
    ids = torch.tensor([*context_ids, *continuation])
    rows = model.decoder.logits(model.decoder(ids[None, :-1]))[0].log_softmax(-1)
    return float(rows[len(context_ids) - 1 :].gather(1, ids[len(context_ids) :, None]).sum())


def ids_of(model: LoadedModel, text: str) -> list[int]:
    return list(map(int, model.tokenizer.encode(text)))


def line(
    options: Sequence[tuple[str, ...]], answers: Sequence[float], number: int = 0, **more: Any
) -> str:
    """A line of samples_*.jsonl as 0.4.13 writes it."""
    arguments = {
        f"gen_args_{n}": {f"arg_{m}": text for m, text in enumerate(texts)}
        for n, texts in enumerate(options)
    }
    responses = [[[str(a), "False"]] if len(options[0]) > 1 else [str(a)] for a in answers]
    return json.dumps({"doc_id": number, "arguments": arguments, "resps": responses, **more})


def comparison(model: LoadedModel, task: Task, example: Example, *lines: str) -> HarnessComparison:
    """Compare samples of one example with our results."""
    examples = [example] * len(lines)
    results = evaluate_task(model, task, examples)
    samples = read_samples("\n".join(lines))
    return compare_with_harness(model, task, examples, results, samples)


def cause(model: LoadedModel, example: Example, sample: str, **task: Any) -> tuple[str, str]:
    """Return the cause and the detail of the only difference."""
    kind = task.pop("kind", "choice")
    found = comparison(model, replace(task_of_kind(kind, "mine"), **task), example, sample)
    (difference,) = found.differences
    return difference.cause, difference.detail


def log_probabilities(
    model: LoadedModel, context: str, continuations: Sequence[str]
) -> list[float]:
    context_ids = [model.tokenizer.start_of_text, *ids_of(model, context)]
    return [log_p(model, context_ids, ids_of(model, text)) for text in continuations]


EXAMPLE = Example((CONTEXT,), CHOICES, 1)
OPTIONS = [(CONTEXT, " " + choice) for choice in CHOICES]


def test_equal_samples_are_counted_and_not_explained(model: LoadedModel) -> None:
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in OPTIONS])
    acc: dict[str, Any] = {"acc": float(max(log_ps) == log_ps[1]), "target": "1"}
    near = [log_ps[0] + 5e-4, *log_ps[1:]]
    found = comparison(
        model, task_of_kind("choice", "mine"), EXAMPLE, line(OPTIONS, near, **acc),
        line(OPTIONS, log_ps, number=1, **acc), line(OPTIONS, log_ps, number=7),
    )  # fmt: skip
    assert (found.n_examples, found.differences, found.n_ties) == (2, (), 0)
    assert found.largest_difference == pytest.approx(5e-4, abs=1e-9)


def test_different_texts_are_shown_where_they_differ(model: LoadedModel) -> None:
    other = "The people of the old"
    texts = [(other, " " + choice) for choice in CHOICES]
    log_ps = log_probabilities(model, other, [text for _, text in texts])
    name, detail = cause(model, EXAMPLE, line(texts, log_ps))
    assert name == "text"
    assert detail == (
        "context differs from character 17 on: 'e people of the old' there, 'e people of the' here"
    )
    two = [*OPTIONS[:2], (CONTEXT, " but")]
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in two])
    detail = cause(model, EXAMPLE, line(two, log_ps))[1]
    assert detail == "continuation differs from character 1 on: ' but' there, ' x' here"
    assert cause(model, EXAMPLE, line(OPTIONS[:2], log_ps[:2])) == (
        "text", "2 options there, 3 here",
    )  # fmt: skip


def test_two_causes_of_one_difference_are_both_named(model: LoadedModel) -> None:
    texts = [("The people", " " + choice) for choice in CHOICES]
    context_ids = ids_of(model, "The people")
    log_ps = [log_p(model, context_ids, ids_of(model, text)) for _, text in texts]
    assert cause(model, EXAMPLE, line(texts, log_ps))[0] == "text, start-of-text"


def test_white_space_before_a_continuation(model: LoadedModel) -> None:
    texts = [(CONTEXT + "\n", choice) for choice in CHOICES]
    log_ps = log_probabilities(model, CONTEXT, ["\n" + choice for choice in CHOICES])
    found = cause(model, EXAMPLE, line(texts, log_ps))
    assert found == ("white space", "'\\n' before the continuation there, ' ' here")


def test_a_missing_start_of_text_is_named(model: LoadedModel) -> None:
    context_ids = ids_of(model, CONTEXT)
    log_ps = [log_p(model, context_ids, ids_of(model, text)) for _, text in OPTIONS]
    assert cause(model, EXAMPLE, line(OPTIONS, log_ps)) == (
        "start-of-text",
        "no <|endoftext|> there",
    )


def test_separately_encoded_tokens_are_shown(model: LoadedModel) -> None:
    """A context that ends in a space, which we encode as a part of the continuation."""
    example = Example((CONTEXT + " ",), CHOICES, 1)
    texts = [(CONTEXT + " ", " " + choice) for choice in CHOICES]
    space = ids_of(model, CONTEXT + " ")
    context_ids = [model.tokenizer.start_of_text, *space]
    log_ps = [log_p(model, context_ids, ids_of(model, text)) for _, text in texts]
    name, detail = cause(model, example, line(texts, log_ps))
    separate, joint = (
        " ".join(map(model.tokenizer.id_to_token, ids_of(model, text)))
        for text in (" " + CHOICES[0], "  " + CHOICES[0])
    )
    assert (name, detail) == (
        "tokens",
        f"context and continuation are encoded separately there: {separate} there, {joint} here",
    )
    log_ps = [log_p(model, space, ids_of(model, text)) for _, text in texts]
    assert cause(model, example, line(texts, log_ps))[0] == "tokens, start-of-text"


def test_a_smaller_window_cuts_more_from_the_left(model: LoadedModel) -> None:
    texts = [(LONG.rstrip(), " " + choice) for choice in CHOICES]
    log_ps = []
    for context, text in texts:
        continuation = ids_of(model, text)
        ids = [*ids_of(model, context), *continuation][-17:]
        log_ps.append(log_p(model, ids[: -len(continuation)], continuation))
    example = Example((LONG.rstrip(),), CHOICES, 1)
    assert cause(model, example, line(texts, log_ps)) == (
        "left cut",
        "16 tokens fit there, 32 here",
    )


def test_normalised_likelihoods_are_recognised(model: LoadedModel) -> None:
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in OPTIONS])
    in_tokens = [len(ids_of(model, text)) for _, text in OPTIONS]
    for unit, sizes in {"token": in_tokens, "character": [34, 3, 1]}.items():
        mean = [log_p / n for log_p, n in zip(log_ps, sizes, strict=True)]
        found = cause(model, EXAMPLE, line(OPTIONS, mean))
        assert found == ("normalisation", f"log p a {unit} there, their sum here")


def test_different_answers_with_equal_likelihoods(model: LoadedModel) -> None:
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in OPTIONS])
    best = log_ps.index(max(log_ps))
    per_character = [log_p / len(c) for log_p, c in zip(log_ps, CHOICES, strict=True)]
    other = per_character.index(max(per_character))
    assert best != other  # else this tests nothing
    example = replace(EXAMPLE, gold=best)
    sample = line(OPTIONS, log_ps, target=str(best), acc=1.0)
    name, detail = cause(model, example, sample, metric="accuracy_per_character")
    assert name == "normalisation"
    assert detail.startswith(
        "accuracy_per_character here, acc there, which is equal to our accuracy"
    )
    # It equals the metric of the same name there.
    task = replace(task_of_kind("choice", "mine"), metric="accuracy_per_character")
    sample = line(OPTIONS, log_ps, target=str(best), acc=1.0, acc_norm=0.0)
    assert comparison(model, task, example, sample).differences == ()
    found = cause(model, example, line(OPTIONS, log_ps, target=CHOICES[other], acc=0.0))
    assert found == ("gold", f"option {other} there, {best} here")
    found = cause(model, example, line(OPTIONS, log_ps, target=str(best), acc=0.0))
    assert found[0] == "normalisation"  # only another metric of ours agrees


def test_either_of_two_equal_options_may_be_chosen(model: LoadedModel) -> None:
    equal_options = [OPTIONS[0], OPTIONS[0]]
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in equal_options])
    example = Example((CONTEXT,), (CHOICES[0],) * 2, 1)
    sample = line(equal_options, log_ps, target="1", acc=1.0)
    found = comparison(model, task_of_kind("choice", "mine"), example, sample)
    assert found.n_ties == 1
    assert [d.cause for d in found.differences] == ["tie"]


def test_different_windows_of_a_text_are_recognised(model: LoadedModel) -> None:
    """32 ids per window: our last window has the rest of the ids; that of the harness is full."""
    start, text = model.tokenizer.start_of_text, LONG[:95]
    ids = ids_of(model, text)
    assert 32 < len(ids) < 62
    example, texts = Example(("",), (text,)), [(text,)]
    for cause_there, whole in (("windows", [start, *ids]), ("start-of-text", [start, start, *ids])):
        total = log_p(model, whole[:1], whole[1:33]) + log_p(model, whole[-33:33], whole[33:])
        assert cause(model, example, line(texts, [total]), kind="text")[0] == cause_there


def test_samples_of_other_versions_are_read(model: LoadedModel) -> None:
    """Lists, as before 0.4.3; a line for each filter; options repeated without their context."""
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in OPTIONS])
    record = {"doc_id": 0, "arguments": OPTIONS, "resps": [[[log_p, False]] for log_p in log_ps]}
    again = [*OPTIONS, *(("", text) for _, text in OPTIONS)]
    lines = [json.dumps(record), line([("", "x")], [0.0]), line(again, [*log_ps, -1, -2, -3], 1)]
    found = comparison(model, task_of_kind("choice", "mine"), EXAMPLE, *lines)
    assert (found.n_examples, found.differences) == (2, ())


def test_an_unknown_cause_is_not_explained(model: LoadedModel) -> None:
    log_ps = log_probabilities(model, CONTEXT, [text for _, text in OPTIONS])
    found = cause(model, EXAMPLE, line(OPTIONS, [log_ps[0] - 0.25, *log_ps[1:]]))
    assert found == ("not explained", "0.25 nats apart")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine contains no sample"),
        ("[]", "(got [])"),
        ('{"doc_id": 0}', "must be a line that lm-evaluation-harness writes with --log_samples"),
        (line([("a", "b")], [0.0, 1.0]), "must be a line"),
        (
            '{"doc_id": 0, "arguments": [["a", {"until": []}]], "resps": [["b"]]}',
            "mine, line 1 is a generated answer; it must be a sample of likelihoods",
        ),
    ],
)
def test_invalid_sample_files_are_rejected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="mine") as error:
        read_samples(text, file="mine")
    assert message in str(error.value)


def test_the_command_explains_samples_of_our_model_in_the_harness(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First with the start-of-text token of the model (no difference), then without one."""
    task = tmp_path / "mine.jsonl"
    record = {"query": CONTEXT, "choices": CHOICES, "gold": 1}
    task.write_text((json.dumps(record) + "\n") * 2, encoding="utf-8")
    words = ["--device", "cpu", "--task-file", str(task)]
    for start, differ in (("model", 0), ("never", 2)):
        there = HarnessModel(str(folder), device="cpu", start_of_text=start)
        results = there.loglikelihood([SimpleNamespace(args=texts) for texts in OPTIONS])
        samples = tmp_path / f"samples_{start}.jsonl"
        samples.write_text("\n".join(line(OPTIONS, [a for a, _ in results], n) for n in range(2)))
        assert main([str(folder), str(samples), *words, "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["examples"] == 2
        assert found["causes"] == ({"start-of-text": 2} if differ else {})
        assert f"2 examples in both: {differ} differ" in err
        assert err.count(": start-of-text: no <|endoftext|> there\n") == differ
    written = tmp_path / "open.jsonl"
    written.write_text('{"context": "Q", "answers": ["A"]}\n', encoding="utf-8")
    assert main([str(folder), str(samples), *words[:-1], str(written)]) == 2
    expected = f"give one task without open answers (got {written} (answer))"
    assert expected in capsys.readouterr().err
    assert main([str(folder), str(samples), *words[:2]]) == 2
    assert "give one task without open answers (got none)" in capsys.readouterr().err
    assert main([str(folder), str(task), *words]) == 2
    assert "must be a line that lm-evaluation-harness writes" in capsys.readouterr().err
