"""log p(continuation | context) does not depend on the other pairs of a batch: compared with a sum
that is computed one token at a time, and with transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.cli import main
from pretrain.data.batches import evaluation_batches
from pretrain.evaluate.loglikelihood import Pair, encode_pair, score_pairs, windows_of
from pretrain.evaluate.loss import Ids, Score, score_each, score_texts
from pretrain.runner.open import LoadedModel, load_model
from pretrain.tokenizer.tokenizer import Tokenizer

CONTEXT = 32  # of the tiny run
TEXT = "The people of the United States, in order to form a more perfect Union, é ordain: "


@pytest.fixture(scope="module")
def model(finished_run: Path) -> LoadedModel:
    found = load_model(str(finished_run), device="cpu")
    found.decoder.double()
    return found


def random_pairs(n: int, *, longest: int, seed: int = 1) -> list[Pair]:
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        n_ids = rng.randint(2, longest)
        ids = tuple(rng.randrange(400) for _ in range(n_ids))
        pairs.append(Pair(ids, rng.randint(max(1, n_ids - 20), n_ids - 1)))
    return pairs


@torch.no_grad()
def by_hand(model: LoadedModel, ids: list[int], first: int, contexts: list[int]) -> float:
    """Nats of ids[first:], each from as many ids before it as `contexts` says."""
    nats = 0.0
    for i, n in zip(range(first, len(ids)), contexts, strict=True):
        logits = model.decoder.logits(model.decoder(torch.tensor([ids[i - n : i]]))[0, -1])
        nats -= float(logits.log_softmax(-1)[ids[i]])
    return nats


@pytest.mark.parametrize("stride", [1, 5, 31, 32])
@pytest.mark.parametrize("n_tokens", [2, 32, 33, 34, 100])
def test_windows_count_every_id_once_and_overlap_by_the_stride(n_tokens: int, stride: int) -> None:
    ids = Ids(np.arange(n_tokens, dtype=np.int64))
    counted, starts = [], []
    for batch in evaluation_batches(ids, context_length=CONTEXT, rows=3, stride=stride):
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            starts.append(int(inputs[0]))
            places = targets >= 0
            assert bool((targets[places] == inputs[places] + 1).all())
            counted += targets[places].tolist()
    assert counted == list(range(1, n_tokens))
    assert starts == list(range(0, len(starts) * stride, stride))
    pair = Pair(tuple(range(n_tokens)), 1)
    windows = list(windows_of(pair, context_length=CONTEXT, stride=stride))
    assert [start for start, _, _ in windows] == starts
    assert sum(n for _, _, n in windows) == n_tokens - 1


def test_the_score_with_a_stride_is_the_sum_over_windows(model: LoadedModel) -> None:
    text = TEXT * 3
    ids = [model.tokenizer.start_of_text, *model.tokenizer.encode(text).tolist()]
    stride = 8
    n = len(ids) - 1
    # The first window sees its own beginning; later ones have CONTEXT - stride ids and more.
    contexts = [
        i if i <= CONTEXT else CONTEXT - stride + 1 + (i - 1 - CONTEXT) % stride
        for i in range(1, n + 1)
    ]
    found = score_texts(model, [text], stride=stride)
    assert found.tokens == n
    assert found.nats == pytest.approx(by_hand(model, ids, 1, contexts), rel=1e-9)
    pair = score_pairs(model, [Pair(tuple(ids), 1)], stride=stride)[0]
    assert pair.nats == pytest.approx(found.nats, rel=1e-12)
    assert pair.tokens == found.tokens
    default = score_texts(model, [text])
    assert default.nats != pytest.approx(found.nats, rel=1e-3)
    # The primitive and the sum that the training loop takes are one number.
    whole = score_pairs(model, [Pair(tuple(ids), 1)])[0]
    assert whole.nats == pytest.approx(default.nats, rel=1e-12)


def test_the_score_of_a_pair_is_the_sum_over_its_continuation(model: LoadedModel) -> None:
    pairs = random_pairs(40, longest=60)
    answers = score_pairs(model, pairs)
    assert any(a.is_truncated for a in answers)
    assert not all(a.is_truncated for a in answers)
    for pair, answer in zip(pairs, answers, strict=True):
        ids = list(pair.ids[-(CONTEXT + 1) :])
        first = pair.n_context - (len(pair.ids) - len(ids))
        contexts = list(range(first, len(ids)))
        assert answer.nats == pytest.approx(by_hand(model, ids, first, contexts), rel=1e-9)
        assert answer.tokens == len(pair.ids) - pair.n_context


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_other_pairs_of_a_batch_do_not_change_a_score(
    finished_run: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = load_model(str(finished_run), device="cpu")
    model.decoder.to(dtype)
    pairs = random_pairs(50, longest=80)
    alone = [score_pairs(model, [pair])[0] for pair in pairs]
    order = random.Random(2).sample(range(len(pairs)), len(pairs))
    for batch_tokens in (1, 100, 4096):
        shuffled = [pairs[i] for i in order]
        found = score_pairs(model, shuffled, batch_tokens=batch_tokens)
        for i, answer in zip(order, found, strict=True):
            assert answer.nats == pytest.approx(alone[i].nats, abs=tolerance, rel=0)
            assert answer.is_greedy == alone[i].is_greedy


def test_is_greedy_agrees_with_greedy_decoding(model: LoadedModel) -> None:
    from pretrain.generate.sampling import Sampling, generate_ids

    prompt = model.tokenizer.encode_prompt("The people of")
    generated = generate_ids(
        model.decoder, prompt, max_tokens=5, sampling=Sampling(temperature=0.0)
    )[0]
    wrong = [*generated[:4], (generated[4] + 1) % 400]
    pairs = [Pair((*prompt, *ids), len(prompt)) for ids in (generated, wrong, generated[:1])]
    answers = score_pairs(model, pairs)
    assert [a.is_greedy for a in answers] == [True, False, True]


def test_a_continuation_longer_than_the_context_is_counted_whole(model: LoadedModel) -> None:
    ids = tuple(int(i) for i in np.random.default_rng(0).integers(0, 400, 90))
    answer = score_pairs(model, [Pair(ids, 10)])[0]
    # From the context's last id on, in windows that do not overlap.
    contexts = [(i - 10) % CONTEXT + 1 for i in range(10, 90)]
    assert answer.tokens == 80
    assert answer.nats == pytest.approx(by_hand(model, list(ids), 10, contexts), rel=1e-9)


def test_is_greedy_considers_every_window(model: LoadedModel) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 400, CONTEXT + 1)]
    with torch.no_grad():  # the second window reads the last of these alone
        logits = model.decoder.logits(model.decoder(torch.tensor([ids[-1:]])))[0, -1]
    pair = Pair((*ids, int(logits.argmax())), 1)
    assert list(windows_of(pair, context_length=CONTEXT, stride=CONTEXT))[1][2] == 1
    alone, whole = score_pairs(model, [Pair(pair.ids[-2:], 1), pair])
    assert (alone.is_greedy, whole.is_greedy) == (True, False)


def test_texts_are_cut_as_lm_evaluation_harness_cuts_them(model: LoadedModel) -> None:
    tokenizer = model.tokenizer
    start = tokenizer.start_of_text
    spaced, plain = (encode_pair(tokenizer, *p) for p in (("of the ", "sea"), ("of the", " sea")))
    assert spaced == plain
    assert spaced.ids[0] == start
    assert spaced.ids[1 : spaced.n_context] == tuple(tokenizer.encode("of the").tolist())
    assert tokenizer.decode(spaced.ids[spaced.n_context :]) == " sea"
    empty = encode_pair(tokenizer, "", " sea")
    assert (empty.n_context, empty.ids[0]) == (1, start)
    assert encode_pair(tokenizer, " ", "sea") == empty


def test_start_of_text_follows_the_tokenizer(model: LoadedModel) -> None:
    tokenizer = model.tokenizer
    before = encode_pair(tokenizer, "of the", " sea"), encode_pair(tokenizer, "", " sea")
    tokenizer.add_bos = False
    try:
        pair = encode_pair(tokenizer, "of the", " sea")
        assert (pair.ids, pair.n_context) == (before[0].ids[1:], before[0].n_context - 1)
        assert encode_pair(tokenizer, "", " sea") == before[1]  # a pair needs one id of context
        assert not tokenizer.padded(tokenizer.vocab_size + 1).add_bos
    finally:
        tokenizer.add_bos = True


def test_pairs_that_cannot_be_scored_are_rejected(model: LoadedModel) -> None:
    for n_context in (0, 2):
        with pytest.raises(ValueError, match=rf"\(got {n_context} of 2 ids as context\)"):
            Pair((1, 2), n_context)
    expected = r"a continuation must add at least 1 token to its context \(got '' after 'of the'\)"
    with pytest.raises(ValueError, match=expected):
        encode_pair(model.tokenizer, "of the", "")
    for stride in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=f"stride must be 1 to {CONTEXT}, the context length"):
            score_pairs(model, [], stride=stride)
        with pytest.raises(ValueError, match=f"stride must be 1 to {CONTEXT}, the context length"):
            score_texts(model, ["a"], stride=stride)


def test_each_document_has_its_own_score(model: LoadedModel) -> None:
    texts = ["Yes.", TEXT * 2, "No, no."]
    each = score_each(model, texts)
    together = score_texts(model, texts)
    assert len(each) == 3
    assert together == Score(
        *(sum(getattr(s, n) for s in each) for n in ("nats", "tokens", "bytes"))
    )


def test_the_command_prints_how_windows_are_cut(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT * 4)
    words = ["evaluate", str(finished_run), "--text", str(file)]
    found = {}
    for stride in ("", "32", "8"):
        assert main([*words, *(["--stride", stride] if stride else [])]) == 0
        found[stride] = capsys.readouterr().out.splitlines()
    assert found[""] == found["32"]
    assert "windows of 32 tokens that do not overlap, every token counted once" in found[""][1]
    assert "each text from <|endoftext|> on, in fp32" in found[""][1]
    assert "windows of 32 tokens that overlap by 24" in found["8"][1]
    assert found["8"][2] != found[""][2]
    for wrong in ("0", "33"):
        assert main([*words, "--stride", wrong]) == 2
    assert "stride must be 1 to 32, the context length (got 33)" in capsys.readouterr().err


def test_add_bos_is_read_from_imported_files(model: LoadedModel, tmp_path: Path) -> None:
    """From a folder of transformers and from an import of it."""
    from pretrain.export.hf import write_hugging_face

    decoder, tokenizer = model.decoder.float(), model.tokenizer
    for begins in (True, False):
        folder, imported = tmp_path / f"hf-{begins}", tmp_path / f"imported-{begins}"
        folder.mkdir()
        tokenizer.add_bos = begins
        try:
            write_hugging_face(folder, decoder=decoder, tokenizer=tokenizer)
        finally:
            tokenizer.add_bos = True
        assert main(["import", str(folder), "--out", str(imported)]) == 0
        for path in (folder, imported):
            loaded: Tokenizer = load_model(str(path), device="cpu").tokenizer
            assert loaded.add_bos is begins
            assert loaded.sha256 == tokenizer.sha256
    decoder.double()


def test_the_template_of_a_tokenizer_has_priority_over_add_bos_token(
    model: LoadedModel, tmp_path: Path
) -> None:
    from pretrain.export.hf import _adds_bos

    settings = tmp_path / "tokenizer_config.json"
    for in_tokenizer in (True, False):
        model.tokenizer.save(tmp_path, bos_template=in_tokenizer)
        for setting in (True, False, None):
            settings.write_text(json.dumps({"add_bos_token": setting}))
            assert _adds_bos(tmp_path) is in_tokenizer
        settings.unlink()
        assert _adds_bos(tmp_path) is in_tokenizer
