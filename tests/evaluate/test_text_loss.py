"""The scorer counts every token once; the baselines equal textbook implementations."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.cli import main
from pretrain.corpus.reading import read_documents
from pretrain.data.batches import evaluation_batches
from pretrain.evaluate.baselines import count_model_nats, measure_baselines
from pretrain.evaluate.loss import Ids, Score, score_each, score_texts
from pretrain.runner.open import load_model
from pretrain.tokenizer.train import train_tokenizer
from tiny import TINY


@pytest.mark.parametrize("n_tokens", [2, 9, 10, 33, 100])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_id_but_the_first_is_a_target_once(n_tokens: int, rows: int) -> None:
    ids = Ids(np.arange(n_tokens, dtype=np.int64))
    targets: list[int] = []
    for batch in evaluation_batches(ids, context_length=8, rows=rows):
        counted = batch.targets >= 0
        assert bool((batch.targets[counted] == batch.inputs[counted] + 1).all())
        targets += batch.targets[counted].tolist()
    assert targets == list(range(1, n_tokens))


def test_a_limit_takes_the_same_evenly_spread_windows() -> None:
    ids = Ids(np.arange(1001, dtype=np.int64))
    taken = [
        torch.cat(
            [b.samples for b in evaluation_batches(ids, context_length=10, rows=7, limit_tokens=n)]
        )
        for n in (250, 250, 10_000)
    ]
    assert taken[0].tolist() == taken[1].tolist() == list(range(0, 100, 4))
    assert len(taken[2]) == 100


def test_scores_are_derived_from_the_sums() -> None:
    score = Score(nats=20.0, tokens=10, bytes=40)
    assert score.nats_per_token == 2.0
    assert score.perplexity == pytest.approx(math.e**2)
    assert score.bits_per_byte == pytest.approx(20 / math.log(2) / 40)
    assert score.word_perplexity(5) == pytest.approx(math.e**4)
    assert math.isnan(Score(0.0, 0, 0).bits_per_byte)


def test_the_scorer_equals_a_brute_force_sum(finished_run: Path) -> None:
    model = load_model(str(finished_run), device="cpu")
    model.decoder.double()
    text = "The people of the United States, in order to form a more perfect Union, é ordain: " * 3
    result = score_texts(model, [text, "Yes."])
    nats, tokens = 0.0, 0
    for one in (text, "Yes."):
        ids = [model.tokenizer.end_of_text, *model.tokenizer.encode(one).tolist()]
        for i in range(1, len(ids)):
            start = (i - 1) // 32 * 32
            with torch.no_grad():
                logits = model.decoder.logits(model.decoder(torch.tensor([ids[start:i]]))[0, -1])
            nats -= float(logits.log_softmax(-1)[ids[i]])
            tokens += 1
    assert result.tokens == tokens
    assert result.bytes == len((text + "Yes.").encode())
    assert result.nats == pytest.approx(nats, rel=1e-9)


def test_evaluate_equals_the_summary(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]["held-out split"]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert found["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-9)
    assert found["tokens"] == summary["val_tokens"]


def test_words_end_with_their_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last word of a document is not joined to the first of the next."""
    texts = [f"{n} words end here{n}" for n in range(900)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    run = str(tmp_path / "run")
    words = ["train", str(tmp_path / "short.jsonl"), "--run", run, *TINY, "--train.steps", "2"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]["held-out split"]
    held_out = found["words"] / 4
    assert found["bytes"] == pytest.approx(19.5 * held_out, rel=0.1)


def test_bytes_are_those_of_the_text_and_not_of_its_tokens(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may put a space before a text, and fold what it reads."""
    model = load_model(str(finished_run), device="cpu")
    texts = ["Ein Übermaß", ""]
    plain = score_each(model, texts)
    lengths = model.tokenizer.byte_lengths + 1
    monkeypatch.setattr(model.tokenizer, "byte_lengths", lengths)
    assert score_each(model, texts) == plain
    assert [each.bytes for each in plain] == [13, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "contains no text"),
        (
            "a.txt.gz",
            gzip.compress(b"a long text " * 500, mtime=0)[:40],
            "only a part of the text would be scored",
        ),
    ],
    ids=["empty", "cut off"],
)
def test_an_incomplete_text_is_not_scored(
    name: str,
    content: bytes,
    message: str,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["evaluate", str(finished_run), "--text", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_skipped_documents_and_the_field_are_reported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one text"}\n{"text": 3}\n')
    words = ["evaluate", str(finished_run), "--text", str(file)]
    assert main(words) == 0
    *_, score, skipped, field = capsys.readouterr().out.splitlines()
    assert score.endswith(" tokens, 8 bytes")
    assert skipped.startswith(
        "  skipped   1 record, 36.4 % of the bytes: field 'text' is a number, not a string"
    )
    assert field.startswith("  field     guessed: 'text'")
    assert main([*words, "--text-field", "text", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["text"][str(file)]
    assert row["reading"].keys() == {"skipped", "field"}
    assert row["reading"]["field"].startswith("named as 'text'")
    # A text file that is read as a whole has nothing to report.
    (tmp_path / "a.txt").write_text("one text")
    assert main([*words[:2], "--text", str(tmp_path / "a.txt")]) == 0
    assert capsys.readouterr().out.endswith(" tokens, 8 bytes\n")


def reference_kneser_ney(train: list[int], val: list[int], v: int, order: int) -> float:
    """The textbook recursion on dictionaries, one probability at a time."""

    def table(n: int, highest: bool) -> Counter[tuple[int, ...]]:
        grams = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        if highest:
            return grams
        above = {tuple(train[i : i + n + 1]) for i in range(len(train) - n)}
        return Counter(gram[1:] for gram in above)

    tables = {n: table(n, n == order) for n in range(1, order + 1)}
    discounts = {}
    for n, counts in tables.items():
        ones = sum(c == 1 for c in counts.values())
        twos = sum(c == 2 for c in counts.values())
        discounts[n] = ones / (ones + 2 * twos) if ones and twos else 0.5

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / v
        n, lower = len(gram), probability(gram[1:])
        followers = [c for g, c in tables[n].items() if g[:-1] == gram[:-1]]
        if not followers:
            return lower
        total, d = sum(followers), discounts[n]
        kept = max(tables[n][gram] - d, 0) / total
        return kept + d * len(followers) / total * lower

    places = range(2, len(val))
    return -sum(math.log(probability(tuple(val[i - order + 1 : i + 1]))) for i in places)


def test_count_models_equal_textbook_kneser_ney() -> None:
    rng = np.random.default_rng(0)
    chain = [0, 0]
    for _ in range(2500):  # a chain with memory, so that longer contexts help
        chain.append(int((chain[-1] * 3 + chain[-2] + rng.integers(0, 3)) % 11))
    train, val = chain[:2300], chain[2300:]
    val[50] = 11  # a word that training never saw
    found = count_model_nats(np.array(train), np.array(val), vocab_size=12)
    seen = Counter(train)
    unigram = -sum(math.log((seen[w] + 1) / (2300 + 12)) for w in val[2:])
    assert found[0] == pytest.approx(unigram)
    assert found[1] == pytest.approx(reference_kneser_ney(train, val, 12, 2))
    assert found[2] == pytest.approx(reference_kneser_ney(train, val, 12, 3))
    assert found[2] < min(found[:2])


def test_xz_is_given_the_training_text() -> None:
    val = next(iter(read_documents("bundled"))).text[:3000].encode()
    other = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    alone = 8 * len(lzma.compress(val)) / len(val)
    tokenizer = train_tokenizer([], name="bytes")
    ids = {id_: tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)}
    id_of = {value: id_ for id_, value in ids.items()}

    def xz_bits_per_byte(train: bytes) -> float:
        train_ids, val_ids = (Ids(np.array([id_of[bytes([b])] for b in t])) for t in (train, val))
        baselines: Any = measure_baselines(train_ids, val_ids, tokenizer=tokenizer)["baselines"]
        return float(baselines[-1]["bits_per_byte"])

    assert xz_bits_per_byte(val) < 0.3  # it has seen it before
    assert xz_bits_per_byte(other) == pytest.approx(alone, rel=0.1)


def test_a_changed_text_of_a_run_is_rejected(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = tmp_path / "t.jsonl", str(tmp_path / "run")
    text.write_bytes(corpus.read_bytes())
    # Raw bytes: the tokenizer is the same whatever the text.
    words = [*TINY[: TINY.index("--tokenizer.vocab_size")], "--tokenizer.name", "bytes"]
    assert main(["train", str(text), "--run", run, *words, "--train.steps", "1"]) == 0
    assert main(["evaluate", run]) == 0
    text.write_bytes(corpus.read_bytes().replace(b"the", b"then"))
    assert main(["evaluate", run]) == 2
    assert "has changed since the run" in capsys.readouterr().err
