"""Flash cards and heat maps: their numbers equal the scorer's, and any text is shown as text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pages import Page, assert_harmless
from pretrain.cli import main
from pretrain.evaluate import token_stats
from pretrain.evaluate.loglikelihood import Pair
from pretrain.evaluate.loss import Ids, score_texts
from pretrain.evaluate.token_stats import (
    TokenLoss,
    annotated_text,
    bits_per_byte_error,
    token_losses,
)
from pretrain.generate.sampling import next_distribution
from pretrain.report.html import heat_map_page
from pretrain.report.page import write_report
from pretrain.runner.open import LoadedModel, load_model
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
HOSTILE = "<script>alert(1)</script> \" onmouseover='x' & 東京 👩‍👩‍👧\n\tعربى e\u0301 "


@pytest.fixture(scope="module")
def model(finished_run: Path) -> LoadedModel:
    found = load_model(str(finished_run), device="cpu")
    found.decoder.double()
    return found


@pytest.fixture(scope="module")
def tokenizer(finished_run: Path) -> Tokenizer:
    return load_tokenizer(finished_run / "tokenizer")


def losses_of(model: LoadedModel, text: str, **more: Any) -> list[TokenLoss]:
    ids = model.tokenizer.encode(text).tolist()
    return token_losses(model, Pair((model.tokenizer.start_of_text, *ids), 1), **more)


@pytest.mark.parametrize("stride", [None, 5])
def test_nats_of_all_tokens_add_up_to_the_score_of_the_text(
    model: LoadedModel, stride: int | None
) -> None:
    text = HOSTILE * 12  # many windows of 32 ids
    found = losses_of(model, text, stride=stride)
    whole = score_texts(model, [text], stride=stride)
    assert len(found) == whole.tokens
    assert math.fsum(each.nats for each in found) == pytest.approx(whole.nats, rel=1e-12)
    assert [each.id for each in found] == model.tokenizer.encode(text).tolist()


def test_the_error_of_a_stream_is_the_spread_of_its_blocks(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(2, model.tokenizer.vocab_size, 2049)
    found = bits_per_byte_error(model, Ids(ids))
    losses = [  # windows of 32 ids, blocks of two windows
        each
        for n in range(0, 2048, 32)
        for each in token_losses(model, Pair(tuple(ids[n : n + 33]), 1))
    ]
    bits = np.reshape([each.nats / math.log(2) for each in losses], (32, 64)).sum(1)
    n_bytes = model.tokenizer.byte_lengths[ids[1:]].reshape(32, 64).sum(1)
    # The error of a ratio, by linearisation.
    residuals = bits - bits.sum() / n_bytes.sum() * n_bytes
    expected = residuals.std(ddof=1) * math.sqrt(32) / n_bytes.sum()
    assert found == pytest.approx(expected, rel=0.1)

    monkeypatch.setattr("pretrain.evaluate.token_stats.ERROR_TOKENS", 1024)
    assert bits_per_byte_error(model, Ids(ids)) == pytest.approx(expected, rel=0.4)


@pytest.mark.parametrize("n_tokens", [1, 2, 30])
def test_too_short_a_stream_has_no_error(model: LoadedModel, n_tokens: int) -> None:
    assert bits_per_byte_error(model, Ids(np.arange(n_tokens) + 5)) is None


def test_ranks_and_most_probable_tokens_equal_the_distribution(model: LoadedModel) -> None:
    text = "The people of the United States"
    ids = model.tokenizer.encode(text).tolist()
    for place, each in enumerate(losses_of(model, text, top=3)):
        before = model.tokenizer.decode(ids[:place])
        p = next_distribution(model.decoder, model.tokenizer, before)
        assert each.probability == pytest.approx(float(p[ids[place]]), rel=1e-9)
        assert each.rank == 1 + int((p > p[ids[place]]).sum())
        best = p.topk(3)
        assert [id_ for id_, _ in each.most_probable] == best.indices.tolist()
        assert [q for _, q in each.most_probable] == pytest.approx(best.values.tolist())


def test_a_pair_without_context_is_rejected(model: LoadedModel) -> None:
    with pytest.raises(
        ValueError, match=r"at least 1 id of context and 1 of continuation \(got 0 of 2 ids"
    ):
        token_losses(model, Pair((1, 2), 0))


@given(st.text(max_size=60))
def test_pieces_joined_equal_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    made = annotated_text(tokenizer, [TokenLoss(id_, 0.5, 2, ()) for id_ in ids])
    assert "".join(piece["text"] for piece in made) == text
    assert all(piece["text"] for piece in made)
    assert sum(len(piece["nats"]) for piece in made) == len(ids)


def test_bytes_of_a_character_are_joined_and_invalid_ones_replaced(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("東").tolist()
    assert len(ids) == 3
    (piece,) = annotated_text(tokenizer, [TokenLoss(id_, 1.0, 3, ()) for id_ in ids])
    assert piece == {"text": "東", "nats": [1.0] * 3, "ranks": [3] * 3}
    (piece,) = annotated_text(tokenizer, [TokenLoss(id_, 1.0, 3, ()) for id_ in ids[:2]])
    assert piece["text"] == "\ufffd"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_next_shows_the_answer_s_probability_and_rank(
    finished_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(
        "pretrain.cli.commands.next.load_model",
        lambda path, device: replace(load_model(path, device=device), precision=precision),
    )
    words = ["next", str(finished_run), "--prompt", "The people of the", "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--answer", " United States", "--top", "3", "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert "the answer:" in output.err
    assert main([*words, "--top", "400", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert [t["id"] for t in found["tokens"]] == [t["id"] for t in tokens[:3]]
    first = found["answer"]["tokens"][0]
    rank = [t["id"] for t in tokens].index(first["id"]) + 1
    assert first["rank"] == rank
    assert first["probability"] == pytest.approx(tokens[rank - 1]["probability"], rel=1e-4)
    assert "".join(t["text"] for t in found["answer"]["tokens"]) == " United States"
    nats = math.fsum(t["nats"] for t in found["answer"]["tokens"])
    assert found["answer"]["nats"] == pytest.approx(nats)
    assert main([*words, "--answer", "x", "--special"]) == 2
    assert "leave out --special" in capsys.readouterr().err


def titles(page: Page) -> list[str]:
    return [value for name, value in page.attributes if name == "title"]


def test_a_heat_map_escapes_hostile_text(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": HOSTILE, "nats": [1.0, 1.5], "ranks": [2, 7]},
        {"text": "sure", "nats": [0.0], "ranks": [1]},
        {"text": "never", "nats": [25.0], "ranks": [4000]},
        {"text": "broken", "nats": "<b>", "ranks": None},
    ]
    path = tmp_path / "map.html"
    path.write_text(heat_map_page({"<i>a": rows}, model="'\"><b>", note="&"), encoding="utf-8")
    page = Page(path)
    assert_harmless(page)
    assert HOSTILE.replace("\n", "↵\n") + "sureneverbroken" in page.text
    assert titles(page) == [
        "1.00 nats, probability 0.368, rank 2; 1.50 nats, probability 0.223, rank 7",
        "0.00 nats, probability 1, rank 1",
        "25.00 nats, probability 1.4e-11, rank 4,000",
        "",
    ]
    shares = [value for name, value in page.attributes if name == "style"]
    assert shares == ["--n:0.25", "--n:0.00", "--n:1.00", "--n:0.00"]
    assert "4 tokens, 6.875 nats each" in page.text
    assert "1 in 22,000" in page.text
    assert 'class="heat-legend"' not in heat_map_page({"a": []}, model="m", note="")


def test_evaluate_writes_a_heat_map(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    file, drawn = tmp_path / "a.txt", tmp_path / "a.html"
    file.write_text(HOSTILE * 5, encoding="utf-8")
    words = ["evaluate", str(finished_run), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main([*words, "--text", str(file), "--heat-map", str(drawn)]) == 0
    row = json.loads(capsys.readouterr().out)["text"][str(file)]
    page = Page(drawn)
    assert_harmless(page)
    assert (HOSTILE * 5).strip().replace("\n", "↵\n") in page.text
    nats = [float(n) for title in titles(page) for n in re.findall(r"([\d.]+) nats", title)]
    assert len(nats) == row["tokens"]
    assert sum(nats) == pytest.approx(row["nats"], abs=0.005 * len(nats))
    assert main([*words, "--heat-map", str(drawn)]) == 2
    assert "--heat-map is for texts" in capsys.readouterr().err


def test_a_heat_map_reports_the_tokens_that_it_leaves_out(
    finished_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, drawn = tmp_path / "a.txt", tmp_path / "a.html"
    file.write_text("The people of the sea. " * 20, encoding="utf-8")
    words = ["evaluate", str(finished_run), "--text", str(file), "--heat-map", str(drawn), "--json"]
    assert main(words) == 0
    output = capsys.readouterr()
    n_tokens = json.loads(output.out)["text"][str(file)]["tokens"]
    assert f"{drawn}: all {n_tokens} tokens, coloured by their nats" in output.err
    monkeypatch.setattr(token_stats, "MAX_HEAT_MAP_TOKENS", 10)
    assert main(words) == 0
    shown = f"the first 10 of {n_tokens} tokens; the other ones are left out"
    assert f"{drawn}: {shown}, coloured by their nats" in capsys.readouterr().err
    assert f"Shown: {shown}." in Page(drawn).text


def test_the_report_shows_the_passage_and_cards_of_a_run(finished_run: Path) -> None:
    predictions = json.loads((finished_run / "predictions.json").read_text())
    nats = [n for piece in predictions["passage"] for n in piece["nats"]]
    assert len(nats) == 400
    text = "".join(piece["text"] for piece in predictions["passage"])
    model = load_model(str(finished_run), device="cpu")
    again = losses_of(model, text)
    assert [each.nats for each in again[:300]] == pytest.approx(nats[:300], rel=1e-4)
    assert len(predictions["cards"]) == 6
    for card in predictions["cards"]:
        probabilities = [row["probability"] for row in card["most_probable"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        answer = card["answer"]
        assert answer["probability"] == pytest.approx(math.exp(-answer["nats"]))
        if answer["rank"] <= 5:
            assert card["most_probable"][answer["rank"] - 1]["text"] == answer["text"]
        assert card["context"][-20:] in text
    page = Page(write_report(finished_run))
    assert_harmless(page)
    assert page.source.count('<div class="card">') == 6
    assert text.strip().replace("\n", "↵\n") in page.text
    first = predictions["cards"][0]["answer"]
    assert f"true token {first['text']!r}: probability {first['probability']:.4f}" in page.text


def test_hostile_cards_are_escaped(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    most_probable = [{"text": HOSTILE, "probability": 7}, {"text": 3}, None]
    cards = [
        {"context": HOSTILE, "most_probable": most_probable, "answer": {"text": HOSTILE}},
        5,
        {},
    ]
    (tmp_path / "predictions.json").write_text(json.dumps({"cards": cards, "passage": 3}))
    page = Page(write_report(tmp_path))
    assert_harmless(page)
    assert "<script>alert(1)</script>" in page.text
    assert "--share:100.0%" in page.source


def test_token_losses_do_not_use_the_random_state(model: LoadedModel) -> None:
    before = torch.get_rng_state()
    losses_of(model, "The people")
    assert torch.equal(before, torch.get_rng_state())
