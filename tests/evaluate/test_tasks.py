"""Definitions and files of tasks, their examples, shots and errors, and the command line."""

from __future__ import annotations

import bz2
import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.cli.output import require_writable, write_output
from pretrain.evaluate.examples import (
    Example,
    compared_part,
    kind_of,
    solved_text,
    with_shots,
)
from pretrain.evaluate.metrics import final_answer
from pretrain.evaluate.task_files import find_task_file, read_task_file
from pretrain.evaluate.tasks import METRICS, task_named, task_of_kind, tasks
from tasks import RECORDS, examples_of, write_task

TWO_TEXTS = "must be a list of two texts or more, none of them empty"
DATA = Path(__file__).parents[3] / "shared/data/eval"


@pytest.mark.parametrize("kind", RECORDS)
def test_the_kind_of_a_task_file_is_detected(kind: str, tmp_path: Path) -> None:
    path = write_task(tmp_path, RECORDS[kind])
    assert kind_of(read_task_file(path)) == kind
    task = task_of_kind(kind_of(read_task_file(path)), str(path))
    assert len(examples_of(task, path)) == len(RECORDS[kind])
    assert len(examples_of(task, path, limit=1)) == 1
    packed = tmp_path / "mine.jsonl.bz2"
    packed.write_bytes(bz2.compress(path.read_bytes()))
    assert examples_of(task, packed) == examples_of(task, path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("choice", {"gold": 3}, "gold must be one of 0 to 2 \\(got 3\\)"),
        ("choice", {"gold": -1}, "gold must be one of 0 to 2 \\(got -1"),
        ("choice", {"gold": True}, "gold must be one of 0 to 2 \\(got True"),
        ("choice", {"choices": ["a"]}, TWO_TEXTS),
        ("choice", {"choices": ["a", ""]}, TWO_TEXTS),
        ("choice", {"query": 3}, "query must be a text"),
        ("cloze", {"continuation": ""}, "not empty"),
        ("schema", {"context_options": "a"}, TWO_TEXTS),
        ("answer", {"answers": [3]}, "the answers must be a text or a list of texts"),
        ("answer", {"answers": []}, "the answers must be a text or a list of texts"),
        ("pair", {"bad": None}, "bad must be a text"),
    ],
)
def test_a_malformed_record_is_rejected_with_its_line(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    records = [RECORDS[kind][0], RECORDS[kind][0] | change]
    path = write_task(tmp_path, records)
    with pytest.raises(ValueError, match="line 2: .*" + message):
        examples_of(task_of_kind(kind_of(read_task_file(path)), str(path)), path)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("mbpp", {"text": "t", "code": "c", "test_list": None}, "which the prompt needs"),
        (
            "mbpp",
            {"text": "t", "code": "c", "test_list": "assert"},
            "an element of a list of texts",
        ),
        (
            "snli",
            {"premise": None, "hypothesis": "h", "label": 0},
            "premise must be a text",
        ),
        (
            "snli",
            {"premise": "p", "hypothesis": ["a"], "label": 0},
            "hypothesis must be a text",
        ),
        (
            "siqa",
            {"context": "c", "question": "q", "answerA": "", "answerB": "b", "answerC": "c"},
            "a choice must not be empty",
        ),
    ],
)
def test_records_that_do_not_fit_a_template_are_rejected(
    name: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    labelled = {"label": "1", "label_ab": "A", "gold": 0, **record}
    with pytest.raises(ValueError, match="line 1: .*" + message):
        examples_of(task_named(name), write_task(tmp_path, [labelled]))


def test_line_ends_of_another_system_are_not_part_of_a_text(tmp_path: Path) -> None:
    task = task_named("lm1b")
    plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
    plain.write_bytes(b"one line\nanother\n")
    other.write_bytes(b"one line\r\nanother\r\n")
    assert examples_of(task, plain) == examples_of(task, other)


def test_invalid_task_files_are_rejected(tmp_path: Path) -> None:
    for content, message in (
        ("", "contains no example"),
        ("nonsense\n", "line 1 is not JSON"),
        ("[1]\n", "must be a JSON object"),
        ('{"x": 1}\n', "a record must have one of the fields"),
    ):
        path = tmp_path / "mine.jsonl"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            kind_of(read_task_file(path))


def test_every_definition_is_complete() -> None:
    for name, task in tasks().items():
        assert task.source, name
        assert task.metric in METRICS[task.kind]
        assert set(task.papers) <= {"gpt", "gpt2", "llama"}
        if task.labels:
            assert len(task.labels) == len(task.choices)
    papers = {paper for task in tasks().values() for paper in task.papers}
    assert papers == {"gpt", "gpt2", "llama"}


def test_the_page_of_tasks_has_a_row_for_each_definition() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/tasks.md").read_text(encoding="utf-8")
    papers = {"gpt": "GPT", "gpt2": "GPT-2", "llama": "LLaMA"}
    rows = [
        f"| {task.name} | {', '.join(papers[p] for p in task.papers) or '-'} | {task.kind} | "
        f"{task.metric} | `{task.file}` | {(task.sha256 or '-')[:12]} | {task.source} |"
        for task in tasks().values()
    ]
    header = "| task | papers | kind | metric | file | sha256 | source |\n"
    assert (
        page.split(header + "|---|---|---|---|---|---|---|\n")[1].split("\n\n")[0].split("\n")
        == rows
    )


def test_definitions_read_the_files_they_name() -> None:
    if not DATA.is_dir():
        pytest.skip("needs shared/data/eval")
    there = {name: t for name, t in tasks().items() if (DATA / t.file).is_file()}
    assert {"lambada", "hellaswag", "piqa", "arc_easy", "winograd"} <= set(there)
    counts = {}
    for name, task in there.items():
        assert task.sha256 is not None
        counts[name] = len(examples_of(task, find_task_file(task, DATA)))
    expected = {
        "lambada": 5153,
        "hellaswag": 10042,
        "piqa": 1838,
        "winograd": 273,
        "xquad_en": 1190,
    }
    assert expected.items() <= counts.items()


def test_prompts_are_made_of_a_record_s_fields(tmp_path: Path) -> None:
    record = {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "fog"}
    path = write_task(tmp_path, [record | {"answerC": "rain", "label": "2"}])
    (example,) = examples_of(task_named("siqa"), path)
    assert example == Example(("Q: Ann fell. Why?\nA:",), ("ice", "fog", "rain"), gold=1)
    path = write_task(tmp_path, [record | {"label": "2"}])
    with pytest.raises(ValueError, match="no field 'answerC', which the prompt needs"):
        examples_of(task_named("siqa"), path)
    path = write_task(tmp_path, [record | {"answerC": "rain", "label": "4"}])
    with pytest.raises(ValueError, match="label must be one of 1, 2, 3"):
        examples_of(task_named("siqa"), path)
    path = write_task(tmp_path, [{"question": "who was it", "answer": ["Ahab"]}])
    (example,) = examples_of(task_named("nq_open"), path)
    assert example.contexts == ("Q: who was it?\nA:",)


def test_shots_are_fixed_by_the_seed_and_never_the_example_itself(tmp_path: Path) -> None:
    records = [{"query": f"Q{n}", "choices": [f"a{n}", f"b{n}"], "gold": n % 2} for n in range(9)]
    path = write_task(tmp_path, records)
    task = task_of_kind("choice", str(path))
    examples = examples_of(task, path)
    shown = with_shots(task, examples, shots=3, seed=1)
    assert shown == with_shots(task, examples, shots=3, seed=1)
    assert shown != with_shots(task, examples, shots=3, seed=2)
    assert with_shots(task, examples, shots=0, seed=1) == examples
    fronts = set()
    for number, (before, after) in enumerate(zip(examples, shown, strict=True)):
        *shots, question = after.contexts[0].split("\n\n")
        assert question == before.contexts[0]
        assert len(set(shots)) == 3
        assert f"Q{number} " not in after.contexts[0]
        assert all(shot in {f"Q{n} {'ab'[n % 2]}{n}" for n in range(9)} for shot in shots)
        fronts.add(tuple(shots))
    assert len(fronts) <= 4  # the same for all but the examples among them
    with pytest.raises(ValueError, match="--shots must be less than the 9 examples"):
        with_shots(task, examples, shots=9, seed=1)
    # Nor one with the same question, of which there may be several.
    path = write_task(tmp_path, [*records, records[2], records[2]], "twice.jsonl")
    examples = examples_of(task, path)
    for seed in range(20):
        for example in with_shots(task, examples, shots=3, seed=seed):
            *shots, question = example.contexts[0].split("\n\n")
            assert len(shots) == 3
            assert not any(shot.startswith(f"{question} ") for shot in shots)
    with pytest.raises(ValueError, match="--shots must be at most the 8 examples"):
        with_shots(task, examples, shots=9, seed=1)
    with pytest.raises(ValueError, match=r"--shots must be 0 for .*, a task of the kind pair"):
        with_shots(task_of_kind("pair", str(path)), examples, shots=1, seed=1)


def test_the_last_number_of_a_solution_is_compared(tmp_path: Path) -> None:
    solved = {"question": "2 + 2", "answer": "One and one is two.\nTwice that.\n#### 1,004"}
    path = write_task(tmp_path, [solved])
    (example,) = examples_of(task_named("gsm8k"), path)
    assert solved_text(task_named("gsm8k"), example).endswith("Twice that.\n#### 1,004")
    for answer, is_right in (
        ("I think\n#### 1004\nSo it is 1004.", 1.0),
        ("#### 7, no:\n#### $1004.", 1.0),
        ("#### -1004", 0.0),
        ("#### 10.04", 0.0),
        ("1004", 0.0),
        ("#### 10,04", 0.0),
    ):
        parts = [compared_part(task_named("gsm8k"), t) for t in (answer, *example.continuations)]
        assert final_answer(parts[0], parts[1:]) == is_right, answer
    math = "so it is.\nFinal Answer: The final answer is $\\frac12$. I hope it is correct."
    assert compared_part(task_named("math"), math) == "$\\frac12$."
    assert final_answer("$\\frac12$.", ["\\frac{1}{2}", "\\frac12"]) == 1.0
    path = write_task(tmp_path, [{"question": "2 + 2", "answer": "4"}])
    with pytest.raises(ValueError, match="must have text after '####'"):
        examples_of(task_named("gsm8k"), path)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize("kind", RECORDS)
def test_evaluate_accepts_own_task_files(
    kind: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = str(write_task(tmp_path, RECORDS[kind])), tmp_path / "answers.jsonl"
    words = ["evaluate", str(finished_run), "--task-file", file, "--device", "cpu"]
    found = run_json(capsys, *words, "--answers", str(answers))
    assert found["text"] == {}
    row = found["tasks"][file]
    assert {"metric", "value", "stderr", "examples"} <= set(row)
    assert row["examples"] == len(RECORDS[kind])
    assert row["metrics"][row["metric"]]["value"] == row["value"]
    assert kind in found["protocol"][file]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(len(RECORDS[kind])))
    one = run_json(capsys, *words, "--limit", "1")["tasks"][file]
    assert (one["examples"], one["stderr"]) == (1, None)


def test_the_start_of_text_option_is_used_for_tasks(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_task(tmp_path, RECORDS["cloze"]))
    words = ["evaluate", str(finished_run), "--task-file", file, "--metric", "perplexity"]
    found = {
        how: run_json(capsys, *words, "--start-of-text", how)
        for how in ("model", "always", "never")
    }
    assert found["model"] == found["always"]
    assert found["never"]["tasks"][file]["value"] != found["model"]["tasks"][file]["value"]
    assert "nothing before a context" in found["never"]["protocol"][file]
    assert "<|endoftext|> before a context" in found["model"]["protocol"][file]


def test_a_defined_task_needs_the_file_with_its_hash(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PRETRAIN_TASKS", raising=False)
    words = ["evaluate", str(finished_run), "--tasks"]

    def rejection(*rest: str) -> str:
        assert main([*words, *rest]) == 2
        return capsys.readouterr().err

    assert "did you mean 'lambada'" in rejection("lambad")
    assert "needs the file piqa.jsonl" in rejection("piqa")
    assert f"which is not in {tmp_path}" in rejection("piqa", "--task-data", str(tmp_path))
    write_task(tmp_path, RECORDS["choice"], "piqa.jsonl")
    assert "is not the file of task piqa" in rejection("piqa", "--task-data", str(tmp_path))
    write_task(tmp_path, RECORDS["choice"], "mmlu.jsonl")
    assert "the metric of mmlu" in rejection(
        "mmlu", "--task-data", str(tmp_path), "--metric", "perplexity"
    )
    for option, wrong in (("--limit", "0"), ("--shots", "-1"), ("--shots", "3")):
        assert "must be" in (
            message := rejection("mmlu", "--task-data", str(tmp_path), option, wrong)
        ) or ("at least" in message)
    monkeypatch.setenv("PRETRAIN_TASKS", str(tmp_path))
    found = run_json(capsys, *words, "mmlu", "--shots", "1")
    assert found["tasks"]["mmlu"]["examples"] == 3
    assert "1 shots of seed 1" in found["protocol"]["mmlu"]


def test_a_missing_library_is_reported_before_the_evaluation(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    file = str(write_task(tmp_path, RECORDS["answer"]))
    for metric in ("bleu", "rougeL"):
        words = ["evaluate", str(finished_run), "--task-file", file, "--metric", metric]
        assert main(words) == 2
        assert "[tasks]'" in capsys.readouterr().err


def test_the_hash_of_a_definition_is_of_the_whole_file(tmp_path: Path) -> None:
    path = write_task(tmp_path, RECORDS["choice"], "piqa.jsonl")
    task = replace(task_named("piqa"), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert find_task_file(task, tmp_path) == path


def test_an_option_without_effect_is_rejected(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, answers = tmp_path / "a.txt", tmp_path / "answers.jsonl"
    text.write_text("the people of the union")
    answers.write_text("kept")
    words = ["evaluate", str(finished_run), "--text", str(text)]
    for more in (["--limit", "2"], ["--start-of-text", "never"], ["--answers", str(answers)]):
        assert main([*words, *more]) == 2
        message = f"pretrain: only tasks use {more[0]}; add --tasks or --task-file\n"
        assert capsys.readouterr().err == message
    assert answers.read_text() == "kept"


def test_a_record_with_two_prompts_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"context": "A passage.", "question": "Who?", "answers": ["I"]}))
    with pytest.raises(ValueError, match="line 1: context and question mean the same"):
        examples_of(task_of_kind("answer", str(path)), path)


def test_old_answers_are_kept_if_the_model_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = write_task(tmp_path, RECORDS["choice"]), tmp_path / "answers.jsonl"
    answers.write_text("kept")
    words = ["--task-file", str(file), "--answers", str(answers)]
    assert main(["evaluate", str(tmp_path / "none"), *words]) == 2
    assert "none" in capsys.readouterr().err
    assert answers.read_text() == "kept"


def test_output_files_are_written_as_a_whole_or_not_at_all(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    task, answers, page = (tmp_path / name for name in ("mine.jsonl", "answers.jsonl", "map.html"))
    write_task(tmp_path, RECORDS["choice"])
    text = tmp_path / "a.txt"
    text.write_text("The people of the sea.")
    words = ["evaluate", str(finished_run), "--text", str(text), "--task-file", str(task)]
    outputs = ["--answers", str(answers), "--heat-map", str(page)]
    before = sorted(tmp_path.iterdir())
    # A rejected command leaves no empty files.
    assert main(["evaluate", str(tmp_path / "none"), *words[2:], *outputs]) == 2
    assert main([*words, *outputs, "--stride", "999"]) == 2
    assert sorted(tmp_path.iterdir()) == before
    # An error while a file is written leaves the older one.
    answers.write_text("older answers")
    page.write_text("older page")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, old in ((answers, "older answers"), (page, "older page")):
        with monkeypatch.context() as patched:
            patched.setattr("pretrain.fileio.NewFile.write", fail)
            option = "--answers" if name == answers else "--heat-map"
            assert main([*words, option, str(name)]) == 75
        assert name.read_text() == old
    assert sorted(tmp_path.iterdir()) == sorted([*before, answers, page])
    assert main([*words, *outputs]) == 0
    assert len(answers.read_text().splitlines()) == len(RECORDS["choice"])
    assert page.read_text().endswith("</html>")
    capsys.readouterr()
    for wrong, message in (
        (tmp_path, f"{tmp_path} cannot be written; it must be a file in a folder"),
        (tmp_path / "none/answers.jsonl", "answers.jsonl cannot be written; it must be a file in"),
        (page, "is also an input or another output, and would be overwritten"),
    ):
        assert main([*words, "--heat-map", str(page), "--answers", str(wrong)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_gets_the_output_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    require_writable(str(pipe))
    write_output(str(pipe), "answers")
    assert os.read(reader, 100) == b"answers"
    os.close(reader)
    assert pipe.is_fifo()
    # Of a symbolic link the file that it names is replaced.
    file.write_text("older")
    link.symlink_to(file)
    write_output(str(link), "newer")
    assert link.is_symlink()
    assert file.read_text() == "newer"


def test_a_task_that_does_not_exist_gets_the_tasks_of_ask(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ask", str(finished_run), "--input", "x", "--task"]
    assert main([*words, "foo"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("pretrain: unknown task 'foo'; there are nq_open, triviaqa, ")
    assert "piqa" not in message
    assert main([*words, "translate-en-fx"]) == 2
    assert "did you mean 'translate-en-fr'?" in capsys.readouterr().err


def test_a_task_is_one_file(tmp_path: Path) -> None:
    write_task(tmp_path, RECORDS["choice"], "a.jsonl")
    write_task(tmp_path, RECORDS["choice"], "b.jsonl")
    with pytest.raises(ValueError, match="is 2 files; it must be one file"):
        read_task_file(tmp_path)
