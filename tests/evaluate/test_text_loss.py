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
import pyppmd
import pytest
import torch

from pretrain.cli import main
from pretrain.corpus.reading import read_documents
from pretrain.data.batches import evaluation_batches
from pretrain.evaluate.baselines import measure_baselines
from pretrain.evaluate.loss import Ids, Score, score_each, score_texts
from pretrain.model.counts import kneser_ney
from pretrain.runner.open import load_model
from pretrain.tokenizer.tokenizer import Tokenizer
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


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("n_windows", [1, 2, 9])
def test_halves_are_the_same_windows_for_any_number_of_processes(size: int, n_windows: int) -> None:
    ids = Ids(np.arange(10 * n_windows + 1, dtype=np.int64))
    halves = [
        [
            window
            for rank in range(size)
            for batch in evaluation_batches(
                ids, context_length=10, rows=2, half=half, rank=rank, size=size
            )
            for window, targets in zip(batch.samples.tolist(), batch.targets, strict=True)
            if bool((targets >= 0).any())
        ]
        for half in (0, 1)
    ]
    middle = (n_windows + 1) // 2
    assert [sorted(half) for half in halves] == [
        list(range(middle)),
        list(range(middle, n_windows)),
    ]


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


def reference_kneser_ney(train: list[int], val: list[int], v: int, order: int) -> list[float]:
    """p of val[1:], from the formulas of Chen and Goodman (1999) over dictionaries."""

    def table(n: int, *, highest: bool) -> Counter[tuple[int, ...]]:
        grams = Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        if highest:
            return grams
        above = {tuple(train[i : i + n + 1]) for i in range(len(train) - n)}
        return Counter(gram[1:] for gram in above)

    tables = {n: table(n, highest=n == order) for n in range(1, order + 1)}
    discounts = {}
    for n, counts in tables.items():
        n1, n2, n3, n4 = (sum(c == times for c in counts.values()) for times in (1, 2, 3, 4))
        discounts[n] = [0.0, 0.5, 1.0, 1.5]
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimated = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            if min(estimated) > 0:
                discounts[n] = [0.0, *estimated]

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / v
        n, lower = len(gram), probability(gram[1:])
        followers = [c for g, c in tables[n].items() if g[:-1] == gram[:-1]]
        if not followers:
            return lower
        freed = sum(discounts[n][min(c, 3)] for c in followers)
        count = tables[n][gram]
        kept = count - discounts[n][min(count, 3)]
        return (kept + freed * lower) / sum(followers)

    return [probability(tuple(val[max(0, i - order + 1) : i + 1])) for i in range(1, len(val))]


def chain_with_memory(n: int) -> list[int]:
    """Ids below 11 of which the two before say much, so that longer contexts help."""
    rng = np.random.default_rng(0)
    chain = [0, 0]
    while len(chain) < n:
        chain.append(int((chain[-1] * 3 + chain[-2] + rng.integers(0, 3)) % 11))
    return chain


def test_count_models_equal_textbook_kneser_ney() -> None:
    chain = chain_with_memory(2500)
    train, val = chain[:2300], chain[2300:]
    val[50] = 11  # a word that training never saw
    found = kneser_ney(np.array(train), np.array(val), vocab_size=12, order=5)
    nats = [-np.log(p).sum() for p in found]
    for order, p in enumerate(found, start=1):
        assert p[1:].tolist() == pytest.approx(reference_kneser_ney(train, val, 12, order))
    assert nats[2] < min(nats[:2])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 20])
def test_count_models_of_a_tiny_text_equal_the_textbook(n: int) -> None:
    train, val = chain_with_memory(n)[:n], [3, 0, 0, 0, 2, 7]
    *_, found = kneser_ney(np.array(train), np.array(val), vocab_size=12, order=5)
    expected = reference_kneser_ney(train, val, 12, min(n, 5))
    assert found[1:].tolist() == pytest.approx(expected)


def test_the_last_ids_of_the_largest_vocabulary_are_distinct() -> None:
    v = 6207  # five ids of 6,208, one of which is the end of the text, fit 63 bits
    chain = [v - 1 - id_ for id_ in chain_with_memory(300)]
    *_, found = kneser_ney(np.array(chain[:250]), np.array(chain[250:]), vocab_size=v, order=5)
    expected = reference_kneser_ney(chain[:250], chain[250:], v, 5)
    assert found[1:].tolist() == pytest.approx(expected)


def test_probabilities_of_a_count_model_add_up_to_1() -> None:
    train = np.array(chain_with_memory(300))
    for context in ([1, 2, 3], [0, 0, 0], [11, 1, 2]):  # 11 was never seen
        p = [
            kneser_ney(train, np.array([*context, last]), vocab_size=12, order=4)[-1][-1]
            for last in range(12)
        ]
        assert sum(p) == pytest.approx(1)


def byte_tokenizer_and_ids(*texts: bytes) -> tuple[Tokenizer, list[Ids]]:
    tokenizer = train_tokenizer([], name="bytes")
    id_of = {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
    return tokenizer, [Ids(np.array([id_of[bytes([b])] for b in text])) for text in texts]


def test_of_bytes_as_tokens_both_count_models_say_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = " ".join(d.text for d in list(read_documents("bundled"))[:9]).encode()[:9000]
    tokenizer, (train, val) = byte_tokenizer_and_ids(text[:8000], text[8000:])
    monkeypatch.setattr("pretrain.evaluate.baselines.BYTE_ORDER", 5)
    measured: Any = measure_baselines(train, val, tokenizer=tokenizer)
    rows = {row["name"]: row for row in measured["baselines"]}
    assert measured["val_tokens"] == measured["val_bytes"] == 999
    of_bytes, of_tokens = (rows[name]["bits_per_byte"] for name in ("byte six-gram", "five-gram"))
    assert of_bytes == pytest.approx(of_tokens, rel=1e-3)  # of 257 numbers, and of the vocabulary
    names = "unigram bigram trigram five-gram".split()
    bits = [rows[name]["bits_per_byte"] for name in names]
    assert bits == sorted(bits, reverse=True)
    assert 2 < bits[-1] < 3.2


@pytest.mark.parametrize(
    ("longest", "names"),
    [
        (9, ["unigram", "bigram", "trigram", "five-gram"]),
        (4, ["unigram", "bigram", "trigram", "four-gram"]),
        (2, ["unigram", "bigram"]),
    ],
)
def test_the_longest_counts_are_named_by_their_length(
    longest: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.evaluate.baselines.longest_counted", lambda size: longest)
    tokenizer, (train, val) = byte_tokenizer_and_ids(b"the cat and the dog " * 9, b"and the cat")
    rows: Any = measure_baselines(train, val, tokenizer=tokenizer)["baselines"]
    assert [row["name"] for row in rows][: len(names) + 1] == [*names, "byte six-gram"]


def test_without_its_package_ppmd_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, (train, val) = byte_tokenizer_and_ids(b"the cat and the dog " * 9, b"and the cat")
    found: Any = measure_baselines(train, val, tokenizer=tokenizer)["baselines"]
    assert [row["name"] for row in found][-2:] == ["PPMd", "xz"]
    assert "pyppmd" not in found[-1]["note"]
    monkeypatch.setattr("pretrain.evaluate.baselines.find_spec", lambda name: None)
    found = measure_baselines(train, val, tokenizer=tokenizer)["baselines"]
    assert [row["name"] for row in found][-2:] == ["byte six-gram", "xz"]
    assert "[ppmd]" in found[-1]["note"]


@pytest.mark.parametrize("name", ["PPMd", "xz"])
def test_a_compressor_is_given_the_training_text(name: str) -> None:
    val = next(iter(read_documents("bundled"))).text[:3000].encode()
    other = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))

    def bits_per_byte(train: bytes) -> float:
        tokenizer, (train_ids, val_ids) = byte_tokenizer_and_ids(train, val)
        rows: Any = measure_baselines(train_ids, val_ids, tokenizer=tokenizer)["baselines"]
        return next(float(row["bits_per_byte"]) for row in rows if row["name"] == name)

    assert bits_per_byte(val) < 0.5  # it has seen it before
    alone = len(lzma.compress(val)) if name == "xz" else len(pyppmd.compress(val, max_order=6))
    assert bits_per_byte(other) == pytest.approx(8 * alone / len(val), rel=0.15)


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
