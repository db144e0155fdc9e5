"""A model's results on tasks of every kind, compared with log-probabilities computed by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.evaluate.examples import (
    Example,
)
from pretrain.evaluate.loglikelihood import PairScore
from pretrain.evaluate.metrics import (
    exact_match,
    value,
)
from pretrain.evaluate.run_tasks import evaluate_task, example_statistics
from pretrain.evaluate.tasks import METRICS, task_of_kind
from pretrain.runner.open import LoadedModel, load_model
from tasks import RECORDS, examples_of, log_p, write_task


@pytest.fixture(scope="module")
def model(finished_run: Path) -> LoadedModel:
    found = load_model(str(finished_run), device="cpu")
    found.decoder.double()
    return found


def test_choices_are_scored_with_every_normalisation(model: LoadedModel, tmp_path: Path) -> None:
    path = write_task(tmp_path, RECORDS["choice"])
    task = task_of_kind("choice", str(path))
    results = evaluate_task(model, task, examples_of(task, path))
    right: dict[str, list[float]] = {metric: [] for metric in METRICS["choice"]}
    for record, line in zip(RECORDS["choice"], results.records, strict=True):
        tokens = [log_p(model, record["query"], " " + c) for c in record["choices"]]
        sums = [sum(each) for each in tokens]
        assert [o["log_p"] for o in line["options"]] == pytest.approx(sums, rel=1e-9)
        alone = [sum(log_p(model, "", " " + c)) for c in record["choices"]]
        pairs = zip(sums, record["choices"], strict=True)
        scores = {
            "accuracy": sums,
            "accuracy_per_token": [sum(each) / len(each) for each in tokens],
            "accuracy_per_character": [
                s / len(c) for s, c in zip(sums, record["choices"], strict=True)
            ],
            "accuracy_per_byte": [s / len(c.encode()) for s, c in pairs],
            "accuracy_unconditional": [a - b for a, b in zip(sums, alone, strict=True)],
        }
        for metric, each in scores.items():
            assert line["taken"][metric] == each.index(max(each)), metric
            right[metric].append(float(each.index(max(each)) == record["gold"]))
    for metric, each in right.items():
        assert results.statistics[metric][:, 0].tolist() == each
        assert float(value(metric, results.statistics[metric].sum(0))) == sum(each) / 3
    # The normalisations do not all agree.
    assert len({json.dumps(results.records[0]["taken"][m]) for m in right}) > 1


def test_each_normalisation_divides_by_its_own_length() -> None:
    """Log-probabilities under which each takes another choice."""
    texts = ("a", "ab", "a" * 9, "é" * 8, "ab")
    nats_tokens = ((2.0, 1), (5.0, 5), (9.0, 2), (9.6, 2), (8.0, 1))
    options = [PairScore(nats, tokens, False, False) for nats, tokens in nats_tokens]
    alone = [{"unconditional_log_p": p} for p in (-2.0, -5.0, -9.0, -9.0, -20.0)]
    line: dict[str, Any] = {"options": alone}
    example_statistics("choice", Example(("",), texts), options, line)
    assert line["taken"] == {
        "accuracy": 0,  # -2, -5, -9, -9.6, -8
        "accuracy_per_token": 1,  # -2, -1, -4.5, -4.8, -8
        "accuracy_per_character": 2,  # -2, -2.5, -1, -1.2, -4
        "accuracy_per_byte": 3,  # -2, -2.5, -1, -0.6, -4
        "accuracy_unconditional": 4,  # 0, 0, 0, -0.6, 12
    }


def test_a_cloze_is_right_if_greedy_decoding_generates_it(
    model: LoadedModel, tmp_path: Path
) -> None:
    from pretrain.generate.sampling import Sampling, generate_ids

    prompt = model.tokenizer.encode_prompt("the people of the")
    (ids,) = generate_ids(model.decoder, prompt, max_tokens=1, sampling=Sampling(temperature=0.0))
    word = model.tokenizer.decode(ids)
    # Whatever the tiny run generates, white space too, is the whole continuation.
    task = replace(task_of_kind("cloze", "mine"), delimiter="")
    words = [word, " Zanzibar"]
    results = evaluate_task(
        model, task, [Example(("the people of the",), (each,)) for each in words]
    )
    assert results.statistics["accuracy"][:, 0].tolist() == [1.0, 0.0]
    nats = [-sum(log_p(model, "the people of the", each)) for each in words]
    found = float(value("perplexity", results.statistics["perplexity"].sum(0)))
    assert found == pytest.approx(math.exp(sum(nats) / 2), rel=1e-9)
    found = float(value("bits_per_byte", results.statistics["bits_per_byte"].sum(0)))
    n_bytes = sum(len(each.encode()) for each in words)
    assert found == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-9)


def test_schemas_compare_one_continuation_under_each_context(
    model: LoadedModel, tmp_path: Path
) -> None:
    path = write_task(tmp_path, RECORDS["schema"])
    task = task_of_kind("schema", str(path))
    results = evaluate_task(model, task, examples_of(task, path))
    for record, line in zip(RECORDS["schema"], results.records, strict=True):
        sums = [
            sum(log_p(model, c, " " + record["continuation"])) for c in record["context_options"]
        ]
        assert [o["log_p"] for o in line["options"]] == pytest.approx(sums, rel=1e-9)
        assert line["taken"]["accuracy"] == sums.index(max(sums))


def test_pairs_and_texts_are_scored_without_a_context(model: LoadedModel, tmp_path: Path) -> None:
    task = task_of_kind("pair", str(write_task(tmp_path, RECORDS["pair"])))
    results = evaluate_task(model, task, examples_of(task, Path(task.file)))
    good, bad = (sum(log_p(model, "", RECORDS["pair"][0][name])) for name in ("good", "bad"))
    assert [o["log_p"] for o in results.records[0]["options"]] == pytest.approx([good, bad])
    assert results.statistics["accuracy"][0, 0] == float(good > bad)
    equal_choices = [Example(("",), ("the same", "the same"))]
    assert evaluate_task(model, task, equal_choices).statistics["accuracy"].tolist() == [[0.5, 1]]
    broken = copy.deepcopy(model.decoder)
    with torch.no_grad():
        broken.token_embedding.weight.fill_(math.nan)
    statistics = evaluate_task(replace(model, decoder=broken), task, equal_choices).statistics
    assert statistics["accuracy"].tolist() == [[pytest.approx(math.nan, nan_ok=True), 1]]

    from pretrain.evaluate.loss import score_texts

    task = task_of_kind("text", str(write_task(tmp_path, RECORDS["text"])))
    results = evaluate_task(model, task, examples_of(task, Path(task.file)))
    texts = [record["text"] for record in RECORDS["text"]]
    score = score_texts(model, texts)
    sums = {metric: rows.sum(0) for metric, rows in results.statistics.items()}
    assert value("bits_per_byte", sums["bits_per_byte"]) == pytest.approx(score.bits_per_byte)
    assert value("perplexity", sums["perplexity"]) == pytest.approx(score.perplexity)
    words = sum(len(text.split()) for text in texts)
    assert value("word_perplexity", sums["word_perplexity"]) == pytest.approx(
        score.word_perplexity(words)
    )


def test_an_open_answer_is_generated_greedily_up_to_a_stop(
    model: LoadedModel, tmp_path: Path
) -> None:
    from pretrain.generate.sampling import Sampling, generate

    path = write_task(tmp_path, [{"context": "The people of", "answers": ["x"]}])
    text = generate(
        model.decoder, model.tokenizer, "The people of", max_tokens=12,
        sampling=Sampling(temperature=0.0),
    )[0]  # fmt: skip
    stop = text.strip()[len(text.strip()) // 2]
    task = replace(task_of_kind("answer", str(path)), max_tokens=12)
    (example,) = examples_of(task, path)
    expected = min(text.split(stop)[0], text.split("\n")[0], key=len).strip()
    for stops in ((stop, "\n"), ("\n", stop)):
        task = replace(task, stops=stops)
        assert evaluate_task(model, task, [example]).records[0]["answer"] == expected
    if expected:
        right = Example(example.contexts, (f"The {expected}!",))
        results = evaluate_task(model, task, [right])
        assert results.statistics["exact_match"][0, 0] == exact_match(
            expected, [f"The {expected}!"]
        )


def test_text_before_the_answer_mark_does_not_count(model: LoadedModel) -> None:
    task = replace(task_of_kind("answer", "mine"), answer_after=" ", metric="final_answer")
    first = Example(("The people of",), ("x y",))
    (line,) = evaluate_task(model, task, [first]).records
    last = line["answer"].rpartition(" ")[2] if " " in line["answer"] else ""
    right = Example(first.contexts, (f"some other {last}.",))
    for example, is_right in ((right, float(bool(last))), (first, 0.0)):
        found = evaluate_task(model, task, [example]).statistics["final_answer"][0, 0]
        assert found == is_right


def test_a_truncated_example_is_counted_once(model: LoadedModel, tmp_path: Path) -> None:
    context = model.decoder.config.window_tokens
    long = "the people of the union " * context
    task = task_of_kind("choice", "mine")
    results = evaluate_task(
        model, task, [Example((long,), ("a", "b", "c")), Example(("the",), ("a", "b"))]
    )
    assert results.n_truncated == 1
    # A text is read to its end in windows: nothing of it is lost.
    results = evaluate_task(model, task_of_kind("text", "mine"), [Example(("",), (long,))])
    assert results.n_truncated == 0


def test_a_prompt_has_half_of_the_window(model: LoadedModel) -> None:
    window = model.decoder.config.window_tokens
    task = replace(task_of_kind("answer", "mine"), max_tokens=window)
    prompts = ["The people", "the people of the union " * window]
    results = evaluate_task(model, task, [Example((prompt,), ("x",)) for prompt in prompts])
    assert 1 < len(model.tokenizer.encode_prompt(prompts[0])) <= window // 2
    assert results.n_truncated == 1
