"""Why another program says otherwise: samples as lm-evaluation-harness logs them, each of them
asked in a way that is written out here by hand, and the cause that has to be found."""

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
def log_p(model: LoadedModel, given: Sequence[int], asked: Sequence[int]) -> float:
    """Of ids after ids that fit the context together, from one row of logits."""
    ids = torch.tensor([*given, *asked])
    rows = model.decoder.logits(model.decoder(ids[None, :-1]))[0].log_softmax(-1)
    return float(rows[len(given) - 1 :].gather(1, ids[len(given) :, None]).sum())


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
    said = [[[str(a), "False"]] if len(options[0]) > 1 else [str(a)] for a in answers]
    return json.dumps({"doc_id": number, "arguments": arguments, "resps": said, **more})


def explained(model: LoadedModel, task: Task, example: Example, *lines: str) -> HarnessComparison:
    """What is said of samples of an example and, in the first place, of one that is the same."""
    examples = [example] * len(lines)
    results = evaluate_task(model, task, examples)
    samples = read_samples("\n".join(lines))
    return compare_with_harness(model, task, examples, results, samples)


def cause(model: LoadedModel, example: Example, sample: str, **task: Any) -> tuple[str, str]:
    """The only difference, and where the two are."""
    kind = task.pop("kind", "choice")
    found = explained(model, replace(task_of_kind(kind, "mine"), **task), example, sample)
    (difference,) = found.differences
    return difference.cause, difference.detail


def plainly(model: LoadedModel, context: str, continuations: Sequence[str]) -> list[float]:
    given = [model.tokenizer.start_of_text, *ids_of(model, context)]
    return [log_p(model, given, ids_of(model, text)) for text in continuations]


EXAMPLE = Example((CONTEXT,), CHOICES, 1)
ASKED = [(CONTEXT, " " + choice) for choice in CHOICES]


def test_what_is_the_same_is_counted_and_not_explained(model: LoadedModel) -> None:
    said = plainly(model, CONTEXT, [text for _, text in ASKED])
    acc: dict[str, Any] = {"acc": float(max(said) == said[1]), "target": "1"}
    near = [said[0] + 5e-4, *said[1:]]
    found = explained(
        model, task_of_kind("choice", "mine"), EXAMPLE, line(ASKED, near, **acc),
        line(ASKED, said, number=1, **acc), line(ASKED, said, number=7),
    )  # fmt: skip
    assert (found.n_examples, found.differences, found.n_ties) == (2, (), 0)
    assert found.largest_difference == pytest.approx(5e-4, abs=1e-9)


def test_other_texts_are_shown_where_they_differ(model: LoadedModel) -> None:
    other = "The people of the old"
    texts = [(other, " " + choice) for choice in CHOICES]
    said = plainly(model, other, [text for _, text in texts])
    name, detail = cause(model, EXAMPLE, line(texts, said))
    assert name == "text"
    assert detail == (
        "context differs from character 17 on: 'e people of the old' there, 'e people of the' here"
    )
    two = [*ASKED[:2], (CONTEXT, " but")]
    said = plainly(model, CONTEXT, [text for _, text in two])
    detail = cause(model, EXAMPLE, line(two, said))[1]
    assert detail == "continuation differs from character 1 on: ' but' there, ' x' here"
    assert cause(model, EXAMPLE, line(ASKED[:2], said[:2])) == (
        "text", "2 options there, 3 here",
    )  # fmt: skip


def test_texts_that_explain_only_half_are_named_with_the_other_half(model: LoadedModel) -> None:
    texts = [("The people", " " + choice) for choice in CHOICES]
    given = ids_of(model, "The people")
    said = [log_p(model, given, ids_of(model, text)) for _, text in texts]
    assert cause(model, EXAMPLE, line(texts, said))[0] == "text, start-of-text"


def test_white_space_before_a_continuation(model: LoadedModel) -> None:
    texts = [(CONTEXT + "\n", choice) for choice in CHOICES]
    said = plainly(model, CONTEXT, ["\n" + choice for choice in CHOICES])
    found = cause(model, EXAMPLE, line(texts, said))
    assert found == ("white space", "'\\n' before the continuation there, ' ' here")


def test_a_start_of_text_that_is_not_there(model: LoadedModel) -> None:
    given = ids_of(model, CONTEXT)
    said = [log_p(model, given, ids_of(model, text)) for _, text in ASKED]
    assert cause(model, EXAMPLE, line(ASKED, said)) == ("start-of-text", "no <|endoftext|> there")


def test_tokens_made_apart_are_shown(model: LoadedModel) -> None:
    """A context that ends in a space: ours counts the space, which is the continuation's."""
    example = Example((CONTEXT + " ",), CHOICES, 1)
    texts = [(CONTEXT + " ", " " + choice) for choice in CHOICES]
    space = ids_of(model, CONTEXT + " ")
    given = [model.tokenizer.start_of_text, *space]
    said = [log_p(model, given, ids_of(model, text)) for _, text in texts]
    name, detail = cause(model, example, line(texts, said))
    theirs, ours = (
        " ".join(map(model.tokenizer.id_to_token, ids_of(model, text)))
        for text in (" " + CHOICES[0], "  " + CHOICES[0])
    )
    assert (name, detail) == (
        "tokens",
        f"context and continuation are encoded separately there: {theirs} there, {ours} here",
    )
    said = [log_p(model, space, ids_of(model, text)) for _, text in texts]
    assert cause(model, example, line(texts, said))[0] == "tokens, start-of-text"


def test_a_smaller_window_cuts_more_from_the_left(model: LoadedModel) -> None:
    texts = [(LONG.rstrip(), " " + choice) for choice in CHOICES]
    said = []
    for context, text in texts:
        asked = ids_of(model, text)
        ids = [*ids_of(model, context), *asked][-17:]
        said.append(log_p(model, ids[: -len(asked)], asked))
    example = Example((LONG.rstrip(),), CHOICES, 1)
    assert cause(model, example, line(texts, said)) == ("left cut", "16 tokens fit there, 32 here")


def test_likelihoods_that_were_divided(model: LoadedModel) -> None:
    said = plainly(model, CONTEXT, [text for _, text in ASKED])
    in_tokens = [len(ids_of(model, text)) for _, text in ASKED]
    for unit, sizes in {"token": in_tokens, "character": [34, 3, 1]}.items():
        mean = [log_p / n for log_p, n in zip(said, sizes, strict=True)]
        found = cause(model, EXAMPLE, line(ASKED, mean))
        assert found == ("normalisation", f"log p a {unit} there, their sum here")


def test_answers_that_differ_where_likelihoods_do_not(model: LoadedModel) -> None:
    said = plainly(model, CONTEXT, [text for _, text in ASKED])
    best = said.index(max(said))
    per_character = [log_p / len(c) for log_p, c in zip(said, CHOICES, strict=True)]
    other = per_character.index(max(per_character))
    assert best != other  # else nothing is asked here
    example = replace(EXAMPLE, gold=best)
    sample = line(ASKED, said, target=str(best), acc=1.0)
    name, detail = cause(model, example, sample, metric="accuracy_per_character")
    assert name == "normalisation"
    assert detail.startswith(
        "accuracy_per_character here, acc there, which is equal to our accuracy"
    )
    # Held against the number of the same name there, it is the same.
    task = replace(task_of_kind("choice", "mine"), metric="accuracy_per_character")
    sample = line(ASKED, said, target=str(best), acc=1.0, acc_norm=0.0)
    assert explained(model, task, example, sample).differences == ()
    found = cause(model, example, line(ASKED, said, target=CHOICES[other], acc=0.0))
    assert found == ("gold", f"option {other} there, {best} here")
    found = cause(model, example, line(ASKED, said, target=str(best), acc=0.0))
    assert found[0] == "normalisation"  # another of ours says so, and nothing else does


def test_of_equal_options_either_may_be_taken(model: LoadedModel) -> None:
    twice = [ASKED[0], ASKED[0]]
    said = plainly(model, CONTEXT, [text for _, text in twice])
    example = Example((CONTEXT,), (CHOICES[0],) * 2, 1)
    sample = line(twice, said, target="1", acc=1.0)
    found = explained(model, task_of_kind("choice", "mine"), example, sample)
    assert found.n_ties == 1
    assert [d.cause for d in found.differences] == ["tie"]


def test_windows_of_a_text(model: LoadedModel) -> None:
    """32 ids are read at once: the last window of ours is what is left, of theirs a whole one."""
    start, text = model.tokenizer.start_of_text, LONG[:95]
    ids = ids_of(model, text)
    assert 32 < len(ids) < 62
    example, texts = Example(("",), (text,)), [(text,)]
    for cause_there, whole in (("windows", [start, *ids]), ("start-of-text", [start, start, *ids])):
        said = log_p(model, whole[:1], whole[1:33]) + log_p(model, whole[-33:33], whole[33:])
        assert cause(model, example, line(texts, [said]), kind="text")[0] == cause_there


def test_other_spellings_of_samples_are_read(model: LoadedModel) -> None:
    """Lists, as before 0.4.3; a line for each filter; options again without their question."""
    said = plainly(model, CONTEXT, [text for _, text in ASKED])
    record = {"doc_id": 0, "arguments": ASKED, "resps": [[[log_p, False]] for log_p in said]}
    again = [*ASKED, *(("", text) for _, text in ASKED)]
    lines = [json.dumps(record), line([("", "x")], [0.0]), line(again, [*said, -1, -2, -3], 1)]
    found = explained(model, task_of_kind("choice", "mine"), EXAMPLE, *lines)
    assert (found.n_examples, found.differences) == (2, ())


def test_nothing_is_made_up(model: LoadedModel) -> None:
    said = plainly(model, CONTEXT, [text for _, text in ASKED])
    found = cause(model, EXAMPLE, line(ASKED, [said[0] - 0.25, *said[1:]]))
    assert found == ("not explained", "0.25 nats apart")


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_files_that_are_no_samples_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="mine") as error:
        read_samples(text, file="mine")
    assert said in str(error.value)


def test_the_command_line_explains_what_our_model_said_elsewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First as the model begins texts, which is the same, and then without a start-of-text."""
    task = tmp_path / "mine.jsonl"
    record = {"query": CONTEXT, "choices": CHOICES, "gold": 1}
    task.write_text((json.dumps(record) + "\n") * 2, encoding="utf-8")
    words = ["--device", "cpu", "--task-file", str(task)]
    for start, differ in (("model", 0), ("never", 2)):
        there = HarnessModel(str(folder), device="cpu", start_of_text=start)
        said = there.loglikelihood([SimpleNamespace(args=texts) for texts in ASKED])
        samples = tmp_path / f"samples_{start}.jsonl"
        samples.write_text("\n".join(line(ASKED, [a for a, _ in said], n) for n in range(2)))
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
