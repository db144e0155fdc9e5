"""Demonstrations of tasks: made from articles and aligned sentences, evaluated with the right
task, a wrong one and none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.corpus.demonstrations import (
    article_demonstrations,
    is_held_out,
    split_sentences,
    translation_demonstrations,
)
from pretrain.evaluate.examples import Example, prompt, promptable_tasks, with_shots
from pretrain.evaluate.run_tasks import condition_metrics
from pretrain.evaluate.task_files import EvalTask
from pretrain.evaluate.tasks import task_named, tasks
from pretrain.runner.open import load_model
from tasks import log_p, write_task
from tiny import TINY

DEFINITION = "A kestrel is a small falcon that hovers over open fields while it looks for voles."
PASSAGE = (
    "It nests in holes of trees and in old towers. The female lays up to six eggs in April. "
    "Dr. St. John saw one take a sparrow in 1906. Its call is a shrill series of short notes."
)
ARTICLE = f"Kestrel\n\n{DEFINITION} {PASSAGE}\n\nAnd more words that are cut off"
TRIPLES = [
    ("A dog runs.", "Un chien court.", "Ein Hund läuft."),
    ("Two men sit.", "Deux hommes sont assis.", "Zwei Männer sitzen."),
    ("A cat sleeps.", "Un chat dort.", "Eine Katze schläft."),
    ("A boy reads.", "Un garçon lit.", "Ein Junge liest."),
    ("It rains.", "Il pleut.", "Es regnet."),
    ("A man sings.", "Un homme chante.", "Ein Mann singt."),
]


def test_an_article_makes_a_question_a_title_and_a_summary() -> None:
    assert dict(article_demonstrations("Kestrel", ARTICLE)) == {
        "answer": {"input": "What is Kestrel?", "answer": DEFINITION},
        "title": {"input": PASSAGE, "answer": "Kestrel"},
        "summarize": {"input": PASSAGE, "answer": DEFINITION},
    }


def test_a_title_is_removed_only_from_the_first_line() -> None:
    below = ARTICLE.removeprefix("Kestrel\n\n")
    for title, text in (("Kestrel", ARTICLE), ("Kestrel", below), ("A kestrel", below)):
        assert next(article_demonstrations(title, text))[1]["answer"] == DEFINITION


@pytest.mark.parametrize(
    "text",
    ["", "Kestrel", DEFINITION, f"Kestrels everywhere! {PASSAGE} End.", "is " * 400],
    ids=["empty", "title alone", "no passage", "no definition", "no sentence"],
)
def test_an_article_that_does_not_define_its_title_makes_no_demonstration(text: str) -> None:
    assert list(article_demonstrations("Kestrel", text)) == []


def test_a_passage_has_complete_sentences_and_a_maximum_length() -> None:
    long = " ".join(f"Sentence number {n} tells one more thing about it." for n in range(100))
    passage = dict(article_demonstrations("K", f"{DEFINITION} {long}"))["title"]["input"]
    assert passage.endswith("about it.")
    assert 500 < len(passage) <= 600


def test_abbreviations_do_not_end_a_sentence() -> None:
    assert split_sentences("Mr. A. B. Smith of the U.S. Navy came. He saw it!  Was it so? Yes") == [
        "Mr. A. B. Smith of the U.S. Navy came.",
        "He saw it!",
        "Was it so?",
        "Yes",
    ]


def test_a_sentence_is_translated_from_every_language_into_every_other() -> None:
    demonstrations = [
        (task, example["input"], example["answer"])
        for task, example in translation_demonstrations({"en": "a", "fr": "b", "de": "c"})
    ]
    assert sorted(demonstrations) == [
        ("translate-de-en", "c", "a"),
        ("translate-de-fr", "c", "b"),
        ("translate-en-de", "a", "c"),
        ("translate-en-fr", "a", "b"),
        ("translate-fr-de", "b", "c"),
        ("translate-fr-en", "b", "a"),
    ]


def sources(folder: Path, *, test: list[int], train: list[int], articles: int = 300) -> list[str]:
    """The words of `pretrain demonstrate` over small sources."""
    pages = [
        {"id": str(n), "title": f"Bird {n}", "text": ARTICLE.replace("kestrel", f"bird {n}")}
        for n in range(articles)
    ]
    aligned = folder / "aligned"
    aligned.mkdir()
    for split, numbers in (("train", train), ("test_2016", test)):
        for place, language in enumerate(("en", "fr", "de")):
            lines = [TRIPLES[n][place] for n in numbers]
            (aligned / f"small.{split}.{language}").write_text("\n".join(lines) + "\n")
    path = write_task(folder, pages, "birds.jsonl")
    return ["demonstrate", str(path), "--translations", str(aligned), "--out", str(folder / "out")]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_of_test_are_not_in_train(tmp_path: Path) -> None:
    assert main(sources(tmp_path, test=[1], train=[0, 1, 2, 3, 4, 5, 5])) == 0
    train, test = tmp_path / "out/train", tmp_path / "out/test"
    training_texts = [r["text"] for path in sorted(train.iterdir()) for r in records(path)]
    held_out = [n for n in range(300) if is_held_out(f"Bird {n}", 0.04)]
    assert [r["title"] for r in records(test / "articles.jsonl")] == [f"Bird {n}" for n in held_out]
    assert 0 < len(held_out) < 30
    assert len(records(train / "articles.jsonl")) == 300 - len(held_out)
    for name in ("answer", "title", "summarize"):
        questions = records(test / f"{name}.jsonl")
        assert len(questions) == len(held_out)
        for question, n in zip(questions, held_out, strict=True):
            title = re.compile(rf"bird {n}\b", re.IGNORECASE)
            assert title.search(json.dumps(question))
            assert not any(title.search(text) for text in training_texts)
    assert [r["input"] for r in records(test / "translate-en-fr.jsonl")] == ["Two men sit."]
    assert not any(sentence in text for text in training_texts for sentence in TRIPLES[1])
    # Four in a document, under the first line of the prompt of `ask`; the second has the rest.
    french = [r["text"] for r in records(train / "translate.jsonl") if "English = F" in r["text"]]
    assert french == [
        "English = French\nA dog runs. = Un chien court.\nA cat sleeps. = Un chat dort.\n"
        "A boy reads. = Un garçon lit.\nIt rains. = Il pleut.",
        "English = French\nA man sings. = Un homme chante.\nA man sings. = Un homme chante.",
    ]
    assert prompt(task_named("translate-en-fr"), "A dog runs.") == french[0].split(" Un chien")[0]


def test_the_folder_is_complete_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sources(tmp_path, test=[1], train=[0], articles=3)
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "test"}
    assert not list(tmp_path.glob(".pretrain-work-*"))
    assert main(words) == 2
    out = tmp_path / "out"
    assert capsys.readouterr().err == (
        f"pretrain: exists and has 2 files; name another folder, or empty this one: {out}\n"
    )


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("small.train.fr", "one\ntwo\nthree\n", "'fr': 3"),
        ("other.train.de", "one\n", "other.train has lines"),
        ("other.test.en", "one\n", "other.test has lines"),
    ],
)
def test_sentences_that_are_not_aligned_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, lines: str, message: str
) -> None:
    words = sources(tmp_path, test=[1], train=[0, 2], articles=3)
    (tmp_path / "aligned" / name).write_text(lines)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_line_ends_end_a_sentence_s_line(tmp_path: Path) -> None:
    words = sources(tmp_path, test=[1], train=[], articles=3)
    (tmp_path / "aligned/small.train.en").write_text("A dog\u2028runs.\nA cat.\n")
    (tmp_path / "aligned/small.train.fr").write_text("Un chien.\nUn\x85chat.\n")
    for path in (tmp_path / "aligned").glob("*.train.de"):
        path.unlink()
    assert main(words) == 0
    demonstrations = (tmp_path / "out/train/translate.jsonl").read_text()
    assert "A cat. = Un\\u0085chat." in demonstrations or "A cat. = Un\x85chat." in demonstrations


def test_texts_without_titles_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_task(tmp_path, [{"text": ARTICLE}, {"title": "", "text": ARTICLE}])
    assert main(["demonstrate", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "there is no record with a title" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_sentences_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sources(tmp_path, test=[1], train=[0], articles=3)
    assert main([*words, "--translations", str(tmp_path)]) == 2
    assert "has no files such as NAME.train.en" in capsys.readouterr().err


def test_prompts_of_the_wrong_task_are_different() -> None:
    with_wrong = [task for task in tasks().values() if task.wrong]
    assert len(with_wrong) == 9
    for task in with_wrong:
        assert {task.name, task.wrong} <= set(promptable_tasks())
        assert prompt(task, "x") != prompt(task_named(task.wrong), "x")


def test_nats_of_each_condition_are_those_of_its_prompt(finished_run: Path) -> None:
    model = load_model(str(finished_run), device="cpu")
    model.decoder.double()
    task = task_named("translate-en-fr")
    inputs, answers = ["the people", "a sea"], [("Les gens.", "Du monde."), ("mer é",)]
    examples = [
        Example((prompt(task, text),), references, input=text)
        for text, references in zip(inputs, answers, strict=True)
    ]
    examples = with_shots(task, examples, shots=1, seed=1)  # which none of the conditions has
    found = condition_metrics(model, EvalTask(task, tuple(examples)))["nats_per_byte"]
    words = {
        "task": "English = French\n{} =",
        "wrong": "English = German\n{} =",
        "none": "{}",
    }
    assert found.keys() == words.keys()
    references = [first for first, *_ in answers]
    n_bytes = sum(len(text.encode()) for text in references)
    for name, template in words.items():
        nats = [
            -sum(log_p(model, template.format(text), " " + reference))
            for text, reference in zip(inputs, references, strict=True)
        ]
        assert found[name] == pytest.approx(sum(nats) / n_bytes, abs=1e-9)


def test_baselines_are_the_input_and_its_first_sentence(finished_run: Path) -> None:
    model, task = load_model(finished_run, device="cpu"), task_named("summarize")
    example = Example(("x",), ("Red birds sing.",), input="Red birds fly. They eat seeds.")
    found = condition_metrics(model, EvalTask(replace(task, metric="f1"), (example,)))
    # Two of three and six words are in the reference; two of three and three.
    expected = {"copy": 2 * 2 / (6 + 3), "lead": 2 * 2 / (3 + 3)}
    assert found["baselines"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def multitask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the recipe multitask, on demonstrations in its default folder."""
    folder = tmp_path_factory.mktemp("multitask")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = sources(folder, test=[1, 3], train=[0, 2, 4, 5] * 20)
        assert main(words[:-2]) == 0
        sizes = [*TINY, "--model.d_model", "64", "--model.ngram_rows", "64"]
        assert main(["train", "multitask", "--run", "run", *sizes, "--train.steps", "12"]) == 0
    return folder


def test_evaluate_reports_all_three_conditions(
    multitask: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = str(multitask / "run"), str(multitask / "demonstrations/test")
    words = ["evaluate", model, "--tasks", "translate-fr-en,title", "--task-data", data, "--json"]
    assert main([*words, "--answers", str(multitask / "answers.jsonl")]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["tasks"]
    for name in ("translate-fr-en", "title"):
        assert rows[name]["nats_per_byte"].keys() == {"task", "wrong", "none"}
        assert rows[name]["p"].keys() == {"wrong", "none"}
        assert all(0 < p <= 1 for p in rows[name]["p"].values())
        assert rows[name]["baselines"].keys() == {"copy", "lead"}
        assert f"{rows[name]['nats_per_byte']['wrong']:.4f} with {task_named(name).wrong}" in err
    # The answer of `ask` equals the evaluated one.
    answers = [r for r in records(multitask / "answers.jsonl") if r["task"] == "translate-fr-en"]
    question = "Deux hommes sont assis."
    words = ["ask", model, "--task", "translate-fr-en", "--input", question, "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "task": "translate-fr-en",
        "prompt": f"French = English\n{question} =",
        "answer": answers[0]["answer"],
    }


def test_ask_reports_a_truncated_input(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ask", str(finished_run), "--task", "summarize", "--input", "the sea was wide " * 20]
    assert main(words) == 0
    assert "longer than its context" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "message"),
    [("piqa", "piqa does not take one text"), ("translate-en-xx", "did you mean 'translate-en-")],
)
def test_ask_rejects_other_tasks(
    capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    assert main(["ask", "no-model", "--task", task, "--input", "x"]) == 2
    assert message in capsys.readouterr().err
