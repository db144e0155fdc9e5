"""lm-evaluation-harness scores our model and its own class with the same weights: equal results,
example by example. Its half is skipped where it is not installed (extra `harness`)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import explain_lm_eval
from pretrain.cli import harness
from pretrain.cli.harness import HarnessModel
from pretrain.corpus.reading import read_documents
from pretrain.evaluate.loglikelihood import rolling_pairs, score_pairs
from pretrain.machine import install_command
from tiny import write_llama

CONTEXT = 64
TEXTS = [document.text for document in list(read_documents("bundled"))[:20]]
# Empty texts, blanks at both sides, line breaks, letters of several bytes, and texts longer than
# the model's context.
PAIRS = [
    ("The people of the", " United States"),
    ("The people of the ", "United States"),
    ("The people of the\n", "States\n"),
    ("", "The people"),
    ("It was été", " in the 中文 sea"),
    (TEXTS[0][:900], " people"),
    (TEXTS[1][:900], TEXTS[2][:60]),
]
ROLLING_TEXTS = ["", "Yes.", TEXTS[3][:100], TEXTS[4][:1000]]
GENERATION_REQUESTS = [
    ("The people of the", {"until": ["\n\n", "e"], "max_gen_toks": 20}),
    ("The people of the", {"until": "\n", "max_gen_toks": 30, "do_sample": False}),
    (TEXTS[0][:900], {"until": [], "max_new_tokens": 20, "temperature": 0.0}),
]


def requests(arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module", params=[True, False], ids=["begins", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose texts begin with a start-of-text, or do not."""
    path = tmp_path_factory.mktemp("llama")
    return write_llama(path, context_length=CONTEXT, add_bos=request.param)


@pytest.fixture(scope="module")
def harness_model(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder), device="cpu")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    pytest.importorskip("transformers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def harness_instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    instances = pytest.importorskip("lm_eval.api.instance")
    return [
        instances.Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments
    ]


def test_log_likelihoods_equal_the_reference(harness_model: HarnessModel, reference: Any) -> None:
    found = harness_model.loglikelihood(requests(PAIRS))
    expected = reference.loglikelihood(harness_instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (log_p, is_greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert log_p == pytest.approx(other, abs=1e-3)
        assert is_greedy == other_greedy


def test_rolling_log_likelihoods_equal_the_reference_without_its_second_start(
    harness_model: HarnessModel, reference: Any
) -> None:
    """Where the tokenizer adds a start-of-text token, the reference puts another one before it and
    counts the first as a token of the text."""
    tokenizer = harness_model._model.tokenizer
    texts = [(text,) for text in ROLLING_TEXTS]
    found = harness_model.loglikelihood_rolling(requests(texts))
    expected = reference.loglikelihood_rolling(
        harness_instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    if tokenizer.add_bos:
        assert abs(found[1] - expected[1]) > 1
        start = tokenizer.start_of_text
        ids = [[start, *tokenizer.encode(text).tolist()] for text in ROLLING_TEXTS]
        pairs = [rolling_pairs(each, start=start, context_length=CONTEXT) for each in ids]
        found = [
            -sum(answer.nats for answer in score_pairs(harness_model._model, each))
            for each in pairs
        ]
    assert found == pytest.approx(expected, abs=1e-3)


def test_generated_texts_equal_the_reference(harness_model: HarnessModel, reference: Any) -> None:
    found = harness_model.generate_until(requests(GENERATION_REQUESTS))
    assert found == reference.generate_until(
        harness_instances("generate_until", GENERATION_REQUESTS), disable_tqdm=True
    )


def test_rolling_windows_equal_the_documented_example() -> None:
    """The example of LM.loglikelihood_rolling: ten tokens, a context of four."""
    pairs = rolling_pairs(range(10), start=-1, context_length=4)
    assert [(p.ids[:-1], p.ids[p.n_context :]) for p in pairs] == [
        ((-1, 0, 1, 2), (0, 1, 2, 3)),
        ((3, 4, 5, 6), (4, 5, 6, 7)),
        ((5, 6, 7, 8), (8, 9)),
    ]


def test_generation_ends_before_the_first_stop(harness_model: HarnessModel) -> None:
    plain, cut, short = harness_model.generate_until(
        requests(
            [
                ("The people", {"max_gen_toks": 30}),
                ("The people", {"max_gen_toks": 30, "until": ["no such", "e"], "do_sample": None}),
                ("The people", {"max_tokens": 3, "until": None, "temperature": 1, "top_k": 1}),
            ]
        )
    )
    assert "e" in plain
    assert cut == plain[: plain.index("e")]
    assert short
    assert plain.startswith(short)
    with pytest.raises(ValueError, match="settings of a generation must be until"):
        harness_model.generate_until(requests([("The people", {"num_beams": 4})]))


def test_a_repeated_request_gets_another_sample(harness_model: HarnessModel) -> None:
    repeated = requests(
        [("The people", {"max_gen_toks": 20, "do_sample": True, "temperature": 1})] * 3
    )
    found = harness_model.generate_until(repeated)
    assert len(set(found)) == 3
    assert harness_model.generate_until(repeated) == found


def test_settings_of_the_tasks_of_lm_eval_are_accepted(harness_model: HarnessModel) -> None:
    """lm_eval 0.4.13: nine of its tasks have `num_beams: 1`; do_sample without a temperature is
    sampled at 1, as transformers samples."""
    greedy, neutral, sampled, at_one = harness_model.generate_until(
        [
            requests([("The people", {"max_gen_toks": 20, **settings})])[0]
            for settings in (
                {"do_sample": False, "temperature": 0.7},
                {"num_beams": 1, "repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0},
                {"do_sample": True},
                {"do_sample": True, "temperature": 1.0},
            )
        ]
    )
    assert neutral == greedy
    (again,) = harness_model.generate_until(
        requests([("The people", {"max_gen_toks": 20, "temperature": 1.0})])
    )
    assert again != greedy
    assert sampled != greedy
    assert at_one != greedy
    with pytest.raises(ValueError, match=r"settings of a generation must be .*\(got num_beams\)"):
        harness_model.generate_until(requests([("The people", {"num_beams": 10})]))


def test_the_start_of_text_argument_is_used(folder: Path) -> None:
    log_p_of = {
        start: HarnessModel(str(folder), device="cpu", start_of_text=start).loglikelihood(
            requests([("The people", " of")])
        )[0][0]
        for start in ("model", "always", "never")
    }
    assert abs(log_p_of["always"] - log_p_of["never"]) > 0.01
    assert log_p_of["model"] in (log_p_of["always"], log_p_of["never"])
    with pytest.raises(ValueError, match="start_of_text must be one of model, always, never"):
        HarnessModel(str(folder), start_of_text="no")


def test_a_missing_lm_eval_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    harness.register.cache_clear()
    assert harness.main() == 2
    install = install_command("lm_eval", extra="harness")
    assert f"needs the package lm_eval: {install}\n" in capsys.readouterr().err


def test_the_lm_eval_command_agrees_with_evaluate_on_a_local_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The task is a file and a definition in the format of lm_eval; the command evaluates each
    model, and the logged samples are compared with `pretrain evaluate` of the file."""
    for package in ("lm_eval", "datasets", "transformers"):
        pytest.importorskip(package)
    (tmp_path / "llama").mkdir()
    folder = write_llama(tmp_path / "llama", context_length=CONTEXT)
    records = [
        {
            "query": TEXTS[n][: 20 + 10 * n].rstrip(),
            "choices": [text[:12] for text in TEXTS[5:8]],
            "gold": n % 3,
        }
        for n in range(6)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    definition = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(definition), encoding="utf-8")
    # The index of lm_eval has 14,000 files, which take 15 seconds to read.
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    task = ["--device", "cpu", "--task-file", str(file)]
    for model, more, differ in (
        ("hf", ",dtype=float32", 0),
        ("pretrain", "", 0),
        ("pretrain", ",start_of_text=never", 6),
    ):
        out = tmp_path / f"{model}{differ}"
        words = [
            *f"lm_eval --model {model} --model_args pretrained={folder}{more} --tasks mine".split(),
            *f"--device cpu --include_path {tmp_path} --output_path {out} --log_samples".split(),
        ]
        monkeypatch.setattr(sys, "argv", words)
        assert harness.main() == 0
        (samples,) = out.rglob("samples_mine_*.jsonl")
        capsys.readouterr()
        assert explain_lm_eval.main([str(folder), str(samples), *task, "--json"]) == 0
        explained = json.loads(capsys.readouterr().out)
        assert explained["examples"] == 6
        assert explained["causes"] == ({"start-of-text": differ} if differ else {})
        assert differ or explained["furthest_nats"] < 1e-3
