"""Tasks: files become examples, models answer them, and every number is held to one that is written
out by hand or made by somebody else's library."""

from __future__ import annotations

import bz2
import copy
import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.evaluate import PairScore
from pretrain.evaluate.examples import (
    Example,
    compared_part,
    kind_of,
    read_examples,
    solved_text,
    with_shots,
)
from pretrain.evaluate.metrics import (
    exact_match,
    f1,
    final_answer,
    normalized,
    statistics_of_answer,
    value,
)
from pretrain.evaluate.run_tasks import TaskResults, evaluate_task, example_statistics
from pretrain.evaluate.task_files import find_task_file, read_task_file
from pretrain.evaluate.tasks import METRICS, Task, task_named, task_of_kind, tasks
from pretrain.runner.open import LoadedModel, load_model

DATA = Path(__file__).parents[3] / "shared/data/eval"
RECORDS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"query": "The sea was", "choices": ["calm", "of the United States", "é"], "gold": 1},
        {"query": "We, the people of\n", "choices": ["the", "the people", "a"], "gold": 0},
        {"query": "", "choices": ["Yes", "The people"], "gold": 1},
    ],
    "cloze": [{"context": "the people of the United", "continuation": "States"}] * 2,
    "schema": [
        {"context_options": ["He said the", "She said"], "continuation": "sea.", "gold": 0},
        {"context_options": ["It", "The people of it"], "continuation": "was", "gold": 1},
    ],
    "answer": [
        {"context": "Q: Which is it?\nA:", "answers": ["the sea", "Sea"]},
        {"question": "who", "answer": "Ahab", "aliases": ["Captain Ahab"]},
    ],
    "pair": [{"good": "The people are.", "bad": "The people is."}] * 2,
    "text": [{"text": "The sea was calm, and the sea was wide. " * 5}, {"text": "Yes."}],
}


@pytest.fixture(scope="module")
def model(finished_run: Path) -> LoadedModel:
    found = load_model(str(finished_run), device="cpu")
    found.decoder.double()
    return found


def written(folder: Path, records: list[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def examples_of(task: Task, path: Path, limit: int | None = None) -> list[Example]:
    return read_examples(task, read_task_file(path), file=str(path), limit=limit)


def asked(model: LoadedModel, task: Task, examples: list[Example]) -> TaskResults:
    return evaluate_task(model.decoder, model.tokenizer, task, examples, world=model.world)


@torch.no_grad()
def log_p(model: LoadedModel, context: str, continuation: str) -> list[float]:
    """The log-probability of each token of a continuation, from one row of logits."""
    kept = context.rstrip()
    moved = context[len(kept) :] + continuation
    tokenizer = model.tokenizer
    before = [tokenizer.start_of_text, *tokenizer.encode(kept).tolist()]
    whole = [tokenizer.start_of_text, *tokenizer.encode(kept + moved).tolist()]
    ids = [*before, *whole[len(before) :]][-(model.decoder.config.window_tokens + 1) :]
    n = len(whole) - len(before)
    rows = model.decoder.logits(model.decoder(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    return [float(rows[i, ids[i + 1]]) for i in range(len(ids) - 1 - n, len(ids) - 1)]


@pytest.mark.parametrize("kind", RECORDS)
def test_a_file_says_what_it_asks(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, RECORDS[kind])
    assert kind_of(read_task_file(path)) == kind
    task = task_of_kind(kind_of(read_task_file(path)), str(path))
    assert len(examples_of(task, path)) == len(RECORDS[kind])
    assert len(examples_of(task, path, limit=1)) == 1
    packed = tmp_path / "mine.jsonl.bz2"
    packed.write_bytes(bz2.compress(path.read_bytes()))
    assert examples_of(task, packed) == examples_of(task, path)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("choice", {"gold": 3}, "gold must be one of 0 to 2 \\(got 3\\)"),
        ("choice", {"gold": -1}, "gold must be one of 0 to 2 \\(got -1"),
        ("choice", {"gold": True}, "gold must be one of 0 to 2 \\(got True"),
        ("choice", {"choices": ["a"]}, "two texts or more"),
        ("choice", {"choices": ["a", ""]}, "empty text"),
        ("choice", {"query": 3}, "query must be a text"),
        ("cloze", {"continuation": ""}, "not empty"),
        ("schema", {"context_options": "a"}, "two texts or more"),
        ("answer", {"answers": [3]}, "the answers must be a text or a list of texts"),
        ("answer", {"answers": []}, "the answers must be a text or a list of texts"),
        ("pair", {"bad": None}, "bad must be a text"),
    ],
)
def test_a_malformed_record_is_rejected_with_its_line(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    records = [RECORDS[kind][0], RECORDS[kind][0] | change]
    path = written(tmp_path, records)
    with pytest.raises(ValueError, match="line 2: .*" + said):
        examples_of(task_of_kind(kind_of(read_task_file(path)), str(path)), path)


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("mbpp", {"text": "t", "code": "c", "test_list": None}, "which the prompt needs"),
        (
            "mbpp",
            {"text": "t", "code": "c", "test_list": "assert"},
            "an entry of a list of texts",
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
def test_what_does_not_fill_a_template_is_refused(
    name: str, record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    labelled = {"label": "1", "label_ab": "A", "gold": 0, **record}
    with pytest.raises(ValueError, match="line 1: .*" + said):
        examples_of(task_named(name), written(tmp_path, [labelled]))


def test_line_ends_of_another_system_are_no_text(tmp_path: Path) -> None:
    task = task_named("lm1b")
    plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
    plain.write_bytes(b"one line\nanother\n")
    other.write_bytes(b"one line\r\nanother\r\n")
    assert examples_of(task, plain) == examples_of(task, other)


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    for content, said in (
        ("", "contains no example"),
        ("nonsense\n", "line 1 is not JSON"),
        ("[1]\n", "must be a JSON object"),
        ('{"x": 1}\n', "a record must have one of the fields"),
    ):
        path = tmp_path / "mine.jsonl"
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            kind_of(read_task_file(path))


def test_every_definition_is_whole() -> None:
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
    wanted = {"lambada": 5153, "hellaswag": 10042, "piqa": 1838, "winograd": 273, "xquad_en": 1190}
    assert wanted.items() <= counts.items()


def test_prompts_are_made_of_a_record_s_fields(tmp_path: Path) -> None:
    record = {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "fog"}
    path = written(tmp_path, [record | {"answerC": "rain", "label": "2"}])
    (example,) = examples_of(task_named("siqa"), path)
    assert example == Example(("Q: Ann fell. Why?\nA:",), ("ice", "fog", "rain"), gold=1)
    path = written(tmp_path, [record | {"label": "2"}])
    with pytest.raises(ValueError, match="no field 'answerC', which the prompt needs"):
        examples_of(task_named("siqa"), path)
    path = written(tmp_path, [record | {"answerC": "rain", "label": "4"}])
    with pytest.raises(ValueError, match="label must be one of 1, 2, 3"):
        examples_of(task_named("siqa"), path)
    path = written(tmp_path, [{"question": "who was it", "answer": ["Ahab"]}])
    (example,) = examples_of(task_named("nq_open"), path)
    assert example.contexts == ("Q: who was it?\nA:",)


def test_shots_are_fixed_by_the_seed_and_never_the_example_itself(tmp_path: Path) -> None:
    records = [{"query": f"Q{n}", "choices": [f"a{n}", f"b{n}"], "gold": n % 2} for n in range(9)]
    path = written(tmp_path, records)
    task = task_of_kind("choice", str(path))
    examples = examples_of(task, path)
    shown = with_shots(task, examples, shots=3, seed=1)
    assert shown == with_shots(task, examples, shots=3, seed=1)
    assert shown != with_shots(task, examples, shots=3, seed=2)
    assert with_shots(task, examples, shots=0, seed=1) == examples
    fronts = set()
    for number, (before, after) in enumerate(zip(examples, shown, strict=True)):
        *shots, asked_last = after.contexts[0].split("\n\n")
        assert asked_last == before.contexts[0]
        assert len(set(shots)) == 3
        assert f"Q{number} " not in after.contexts[0]
        assert all(shot in {f"Q{n} {'ab'[n % 2]}{n}" for n in range(9)} for shot in shots)
        fronts.add(tuple(shots))
    assert len(fronts) <= 4  # the same for all but those who are in them
    with pytest.raises(ValueError, match="--shots must be less than the 9 examples"):
        with_shots(task, examples, shots=9, seed=1)
    # Nor one that asks the same, of which there may be several.
    path = written(tmp_path, [*records, records[2], records[2]], "twice.jsonl")
    examples = examples_of(task, path)
    for seed in range(20):
        for example in with_shots(task, examples, shots=3, seed=seed):
            *shots, asked_last = example.contexts[0].split("\n\n")
            assert len(shots) == 3
            assert not any(shot.startswith(f"{asked_last} ") for shot in shots)
    with pytest.raises(ValueError, match="--shots must be at most the 8 examples"):
        with_shots(task, examples, shots=9, seed=1)
    with pytest.raises(ValueError, match="takes no shots"):
        with_shots(task_of_kind("pair", str(path)), examples, shots=1, seed=1)


def test_choices_are_judged_by_every_normalisation(model: LoadedModel, tmp_path: Path) -> None:
    path = written(tmp_path, RECORDS["choice"])
    task = task_of_kind("choice", str(path))
    results = asked(model, task, examples_of(task, path))
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
    # The normalisations are not one and the same.
    assert len({json.dumps(results.records[0]["taken"][m]) for m in right}) > 1


def test_a_normalisation_divides_by_what_it_is_called_after() -> None:
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


def test_a_cloze_is_right_where_greedy_decoding_writes_it(
    model: LoadedModel, tmp_path: Path
) -> None:
    from pretrain.generate import Sampling, generate_ids

    prompt = model.tokenizer.encode_prompt("the people of the")
    (ids,) = generate_ids(model.decoder, prompt, max_tokens=1, sampling=Sampling(temperature=0.0))
    word = model.tokenizer.decode(ids)
    # Whatever the tiny run writes, white space too, is the whole continuation.
    task = replace(task_of_kind("cloze", "mine"), delimiter="")
    words = [word, " Zanzibar"]
    results = asked(model, task, [Example(("the people of the",), (each,)) for each in words])
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
    path = written(tmp_path, RECORDS["schema"])
    task = task_of_kind("schema", str(path))
    results = asked(model, task, examples_of(task, path))
    for record, line in zip(RECORDS["schema"], results.records, strict=True):
        sums = [
            sum(log_p(model, c, " " + record["continuation"])) for c in record["context_options"]
        ]
        assert [o["log_p"] for o in line["options"]] == pytest.approx(sums, rel=1e-9)
        assert line["taken"]["accuracy"] == sums.index(max(sums))


def test_pairs_and_texts_stand_for_themselves(model: LoadedModel, tmp_path: Path) -> None:
    task = task_of_kind("pair", str(written(tmp_path, RECORDS["pair"])))
    results = asked(model, task, examples_of(task, Path(task.file)))
    good, bad = (sum(log_p(model, "", RECORDS["pair"][0][name])) for name in ("good", "bad"))
    assert [o["log_p"] for o in results.records[0]["options"]] == pytest.approx([good, bad])
    assert results.statistics["accuracy"][0, 0] == float(good > bad)
    alike = [Example(("",), ("the same", "the same"))]
    assert asked(model, task, alike).statistics["accuracy"].tolist() == [[0.5, 1]]
    broken = copy.deepcopy(model.decoder)
    with torch.no_grad():
        broken.token_embedding.weight.fill_(math.nan)
    said = evaluate_task(broken, model.tokenizer, task, alike, world=model.world).statistics[
        "accuracy"
    ]
    assert said.tolist() == [[pytest.approx(math.nan, nan_ok=True), 1]]

    from pretrain.evaluate import score_texts
    from pretrain.model import LMLoss

    task = task_of_kind("text", str(written(tmp_path, RECORDS["text"])))
    results = asked(model, task, examples_of(task, Path(task.file)))
    texts = [record["text"] for record in RECORDS["text"]]
    score = score_texts(LMLoss(model.decoder), model.tokenizer, texts, world=model.world)
    sums = {metric: rows.sum(0) for metric, rows in results.statistics.items()}
    assert value("bits_per_byte", sums["bits_per_byte"]) == pytest.approx(score.bits_per_byte)
    assert value("perplexity", sums["perplexity"]) == pytest.approx(score.perplexity)
    words = sum(len(text.split()) for text in texts)
    assert value("word_perplexity", sums["word_perplexity"]) == pytest.approx(
        score.word_perplexity(words)
    )


def test_an_open_answer_is_written_greedily_and_cut_at_a_stop(
    model: LoadedModel, tmp_path: Path
) -> None:
    from pretrain.generate import Sampling, generate

    path = written(tmp_path, [{"context": "The people of", "answers": ["x"]}])
    text = generate(
        model.decoder, model.tokenizer, "The people of", max_tokens=12,
        sampling=Sampling(temperature=0.0),
    )[0]  # fmt: skip
    stop = text.strip()[len(text.strip()) // 2]
    task = replace(task_of_kind("answer", str(path)), max_tokens=12)
    (example,) = examples_of(task, path)
    wanted = min(text.split(stop)[0], text.split("\n")[0], key=len).strip()
    for stops in ((stop, "\n"), ("\n", stop)):
        task = replace(task, stops=stops)
        assert asked(model, task, [example]).records[0]["answer"] == wanted
    if wanted:
        right = Example(example.contexts, (f"The {wanted}!",))
        results = asked(model, task, [right])
        assert results.statistics["exact_match"][0, 0] == exact_match(wanted, [f"The {wanted}!"])


def test_of_a_solution_its_last_number_is_compared(tmp_path: Path) -> None:
    solved = {"question": "2 + 2", "answer": "One and one is two.\nTwice that.\n#### 1,004"}
    path = written(tmp_path, [solved])
    (example,) = examples_of(task_named("gsm8k"), path)
    assert solved_text(task_named("gsm8k"), example).endswith("Twice that.\n#### 1,004")
    for said, is_right in (
        ("I think\n#### 1004\nSo it is 1004.", 1.0),
        ("#### 7, no:\n#### $1004.", 1.0),
        ("#### -1004", 0.0),
        ("#### 10.04", 0.0),
        ("1004", 0.0),
        ("#### 10,04", 0.0),
    ):
        parts = [compared_part(task_named("gsm8k"), t) for t in (said, *example.continuations)]
        assert final_answer(parts[0], parts[1:]) == is_right, said
    math = "so it is.\nFinal Answer: The final answer is $\\frac12$. I hope it is correct."
    assert compared_part(task_named("math"), math) == "$\\frac12$."
    assert final_answer("$\\frac12$.", ["\\frac{1}{2}", "\\frac12"]) == 1.0
    path = written(tmp_path, [{"question": "2 + 2", "answer": "4"}])
    with pytest.raises(ValueError, match="must have text after '####'"):
        examples_of(task_named("gsm8k"), path)


def test_what_a_model_writes_before_the_mark_does_not_count(model: LoadedModel) -> None:
    task = replace(task_of_kind("answer", "mine"), answer_after=" ", metric="final_answer")
    ask_of = Example(("The people of",), ("x y",))
    (line,) = asked(model, task, [ask_of]).records
    last = line["answer"].rpartition(" ")[2] if " " in line["answer"] else ""
    right = Example(ask_of.contexts, (f"some other {last}.",))
    for example, is_right in ((right, float(bool(last))), (ask_of, 0.0)):
        found = asked(model, task, [example]).statistics["final_answer"][0, 0]
        assert found == is_right


def test_answers_are_compared_as_squad_compares_them() -> None:
    assert normalized("  The  Cat's, an   apple. ") == "cats apple"
    assert exact_match("the U.S.", ["a US", "x"]) == 1
    assert exact_match("US of A", ["US"]) == 0
    assert f1("the black cat", ["cat", "a black dog"]) == pytest.approx(2 / 3)
    assert f1("dog", ["cat"]) == 0
    assert f1("the", ["a"]) == 1  # nothing on both sides
    assert f1(" ", ["A"]) == exact_match("", ["A"]) == 0  # no answer at all
    assert f1("", ["cat", ""]) == exact_match("", ["cat", ""]) == 1
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3)


def test_bleu_of_sums_is_sacrebleu_s_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog barked loudly at the moon", "yes"]
    references = [
        ["the cat sat on a mat today", "one cat sat on the mat"],
        ["a dog barked at the moon", "the dog barked loudly at a moon"],
        ["yes", "no"],
    ]
    rows = [statistics_of_answer("bleu", a, r) for a, r in zip(answers, references, strict=True)]
    import numpy as np

    streams = [list(each) for each in zip(*references, strict=True)]
    wanted = sacrebleu.corpus_bleu(answers, streams).score
    assert float(value("bleu", np.array(rows).sum(0))) == pytest.approx(wanted, abs=1e-9)
    assert wanted > 10
    chrf = statistics_of_answer("chrf", answers[0], references[0])[0]
    assert chrf == pytest.approx(sacrebleu.sentence_chrf(answers[0], references[0]).score)


def test_rouge_is_of_the_best_reference() -> None:
    pytest.importorskip("rouge_score")
    found = statistics_of_answer("rouge1", "the black cat", ["a dog", "the cat"])
    assert found == pytest.approx((0.8, 1.0))
    assert statistics_of_answer("rougeL", "cats", ["cat"])[0] == 1  # stems are compared
    for text in ("Москва — столица России", "東京は日本の首都です", "un été"):
        assert statistics_of_answer("rouge1", text, [text])[0] == 1
    assert statistics_of_answer("rouge1", "un éte", ["un été"])[0] == 0.5


def test_words_of_rouge_are_the_library_s() -> None:
    scorers = pytest.importorskip("rouge_score.rouge_scorer")
    draw = random.Random(1)
    theirs = scorers.RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(200):
        one, other = ("".join(draw.choices("abS ing_-'9.\n", k=40)) for _ in range(2))
        wanted = theirs.score(other, one)["rougeL"].fmeasure
        assert statistics_of_answer("rougeL", one, [other])[0] == pytest.approx(wanted)


def ask_cli(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize("kind", RECORDS)
def test_evaluate_takes_your_own_file(
    kind: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, answers = str(written(tmp_path, RECORDS[kind])), tmp_path / "answers.jsonl"
    words = ["evaluate", str(finished_run), "--task-file", file, "--device", "cpu"]
    found = ask_cli(capsys, *words, "--answers", str(answers))
    assert found["text"] == {}
    row = found["tasks"][file]
    assert {"metric", "value", "stderr", "examples"} <= set(row)
    assert row["examples"] == len(RECORDS[kind])
    assert row["metrics"][row["metric"]]["value"] == row["value"]
    assert kind in found["protocol"][file]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(len(RECORDS[kind])))
    one = ask_cli(capsys, *words, "--limit", "1")["tasks"][file]
    assert (one["examples"], one["stderr"]) == (1, None)


def test_the_context_of_a_task_begins_as_asked(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(written(tmp_path, RECORDS["cloze"]))
    words = ["evaluate", str(finished_run), "--task-file", file, "--metric", "perplexity"]
    found = {
        how: ask_cli(capsys, *words, "--start-of-text", how) for how in ("model", "always", "never")
    }
    assert found["model"] == found["always"]
    assert found["never"]["tasks"][file]["value"] != found["model"]["tasks"][file]["value"]
    assert "nothing before a context" in found["never"]["protocol"][file]
    assert "<|endoftext|> before a context" in found["model"]["protocol"][file]


def test_a_task_of_the_table_needs_its_very_file(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PRETRAIN_TASKS", raising=False)
    words = ["evaluate", str(finished_run), "--tasks"]

    def refusal(*rest: str) -> str:
        assert main([*words, *rest]) == 2
        return capsys.readouterr().err

    assert "did you mean lambada" in refusal("lambad")
    assert "needs the file piqa.jsonl" in refusal("piqa")
    assert f"which is not in {tmp_path}" in refusal("piqa", "--task-data", str(tmp_path))
    written(tmp_path, RECORDS["choice"], "piqa.jsonl")
    assert "is not the file of task piqa" in refusal("piqa", "--task-data", str(tmp_path))
    written(tmp_path, RECORDS["choice"], "mmlu.jsonl")
    assert "the metric of mmlu" in refusal(
        "mmlu", "--task-data", str(tmp_path), "--metric", "perplexity"
    )
    for option, wrong in (("--limit", "0"), ("--shots", "-1"), ("--shots", "3")):
        assert "must be" in (
            said := refusal("mmlu", "--task-data", str(tmp_path), option, wrong)
        ) or ("at least" in said)
    monkeypatch.setenv("PRETRAIN_TASKS", str(tmp_path))
    found = ask_cli(capsys, *words, "mmlu", "--shots", "1")
    assert found["tasks"]["mmlu"]["examples"] == 3
    assert "1 shots of seed 1" in found["protocol"]["mmlu"]


def test_a_library_that_is_missing_is_said_before_anything_is_asked(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    file = str(written(tmp_path, RECORDS["answer"]))
    for metric in ("bleu", "rougeL"):
        words = ["evaluate", str(finished_run), "--task-file", file, "--metric", metric]
        assert main(words) == 2
        assert "python -m pip install 'pretrain[tasks]'" in capsys.readouterr().err


def test_the_hash_of_a_definition_is_of_the_whole_file(tmp_path: Path) -> None:
    path = written(tmp_path, RECORDS["choice"], "piqa.jsonl")
    task = replace(task_named("piqa"), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert find_task_file(task, tmp_path) == path


def test_an_option_without_effect_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = tmp_path / "a.txt", tmp_path / "said.jsonl"
    text.write_text("the people of the union")
    said.write_text("kept")
    words = ["evaluate", str(finished_run), "--text", str(text)]
    for more in (["--limit", "2"], ["--start-of-text", "never"], ["--answers", str(said)]):
        assert main([*words, *more]) == 2
        assert f"{more[0]} is for tasks" in capsys.readouterr().err
    assert said.read_text() == "kept"


def test_what_was_cut_is_said_once_an_example(model: LoadedModel, tmp_path: Path) -> None:
    context = model.decoder.config.window_tokens
    long = "the people of the union " * context
    task = task_of_kind("choice", "mine")
    results = asked(model, task, [Example((long,), ("a", "b", "c")), Example(("the",), ("a", "b"))])
    assert results.n_truncated == 1
    # A text is read to its end in windows: nothing of it is lost.
    assert asked(model, task_of_kind("text", "mine"), [Example(("",), (long,))]).n_truncated == 0


def test_half_of_the_window_is_left_to_a_prompt(model: LoadedModel) -> None:
    window = model.decoder.config.window_tokens
    task = replace(task_of_kind("answer", "mine"), max_tokens=window)
    prompts = ["The people", "the people of the union " * window]
    results = asked(model, task, [Example((prompt,), ("x",)) for prompt in prompts])
    assert 1 < len(model.tokenizer.encode_prompt(prompts[0])) <= window // 2
    assert results.n_truncated == 1


def test_a_record_with_two_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"context": "A passage.", "question": "Who?", "answers": ["I"]}))
    with pytest.raises(ValueError, match="line 1: context and question mean the same"):
        examples_of(task_of_kind("answer", str(path)), path)


def test_old_answers_outlive_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, said = written(tmp_path, RECORDS["choice"]), tmp_path / "said.jsonl"
    said.write_text("kept")
    words = ["--task-file", str(file), "--answers", str(said)]
    assert main(["evaluate", str(tmp_path / "none"), *words]) == 2
    assert "none" in capsys.readouterr().err
    assert said.read_text() == "kept"


def test_a_task_is_one_file(tmp_path: Path) -> None:
    written(tmp_path, RECORDS["choice"], "a.jsonl")
    written(tmp_path, RECORDS["choice"], "b.jsonl")
    with pytest.raises(ValueError, match="is 2 files; it must be one file"):
        read_task_file(tmp_path)
