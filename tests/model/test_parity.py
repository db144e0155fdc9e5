"""Oracles: the same weights in somebody else's implementation give the same logits, losses,
gradients, text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from oracles import CASES, Oracle, T, V, config_of, random_decoder
from pretrain.data import MicroBatch
from pretrain.generate import Sampling, generate_ids
from pretrain.model import LMLoss, build
from pretrain.model.dropout import DropoutRng
from pretrain.model.families import FAMILIES, PRESETS

transformers = pytest.importorskip("transformers")


def some_ids(seed: int, time: int = T) -> torch.Tensor:
    return torch.randint(0, V, (3, time), generator=torch.Generator().manual_seed(seed))


def test_every_family_but_our_own_has_an_oracle() -> None:
    assert {case["family"] for case in CASES.values()} == FAMILIES.keys() - {"fast"}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_agree(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case])).double()
    theirs = Oracle(decoder)
    ids = some_ids(0)
    logits = theirs.logits(ids)
    # Rotary angles are float32 on both sides, so float64 cannot agree further than that.
    torch.testing.assert_close(decoder.logits(decoder(ids)), logits, rtol=1e-5, atol=5e-6)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.arange(3))
    nats, count = LMLoss(decoder)(batch)
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float((nats / count).detach()) == pytest.approx(float(their_loss.detach()), rel=1e-6)
    (nats / count).backward()
    their_loss.backward()  # type: ignore[no-untyped-call]
    own = dict(decoder.named_parameters())

    def gradient(name: str) -> torch.Tensor:
        found = own[name].grad
        assert found is not None
        return found

    for name, expected, found in theirs.gradients(gradient):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_within_1e_5(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case]))
    theirs = Oracle(decoder)
    ids = some_ids(1)
    logits = theirs.logits(ids)
    difference = (decoder.logits(decoder(ids)) - logits).abs().max()
    assert float(difference.detach()) < 1e-5 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_agrees_with_and_without_a_cache(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case])).double()
    theirs = Oracle(decoder)
    prompt, expected = [3, 1, 4, 1, 5], [3, 1, 4, 1, 5]
    while len(expected) < T:
        expected.append(int(theirs.logits(torch.tensor([expected]))[0, -1].argmax()))
    n = T - len(prompt)
    found = generate_ids(decoder, prompt, max_tokens=n, sampling=Sampling(temperature=0.0))
    assert found[0] == expected[len(prompt) :]
    plainly = list(prompt)
    while len(plainly) < T:
        hidden = decoder(torch.tensor([plainly]))
        plainly.append(int(decoder.logits(hidden[0, -1]).argmax()))
    assert plainly == expected
    if hasattr(theirs.model, "generate"):
        ids = torch.tensor([prompt])
        text = theirs.model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0)
        assert text[0].tolist() == expected


@pytest.mark.parametrize("family", ["gpt", "gpt2", "llama"])
def test_first_weights_are_spread_as_theirs(family: str) -> None:
    """But for GPT-2's residual branches, all is N(0, 0.02) in both, biases 0 and norms 1."""
    config = config_of(family, n_layers=6, d_model=64)
    decoder = build(config, vocab_size=1000, seed=1)
    theirs = Oracle(decoder)
    theirs.model.init_weights()
    own = dict(decoder.named_parameters())
    for name, _, ours in theirs.gradients(own.__getitem__):
        expected = theirs.model.get_parameter(name).detach()
        assert float(ours.detach().mean()) == pytest.approx(float(expected.mean()), abs=2e-3)
        assert float(ours.detach().std()) == pytest.approx(float(expected.std()), rel=0.06), name


@pytest.mark.parametrize("family", ["transformer", "gpt", "gpt2"])
def test_dropout_changes_the_loss_by_as_much_as_theirs(family: str) -> None:
    """Masks differ, so it is the mean over many masks that agrees: the same places are dropped."""
    rate, n = 0.3, 4000
    decoder = random_decoder(config_of(family, dropout=rate, n_layers=1))
    theirs = Oracle(decoder)
    for module in theirs.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
    for module in theirs.model.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            # torch drops inside the feed-forward layer too, which the paper does not.
            module.dropout.p = 0.0
            module.register_forward_pre_hook(_drops_embedding(rate))
    theirs.model.train()
    ids = some_ids(2)[:1].expand(n, -1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    dropout_rng = DropoutRng(3, torch.arange(n))
    with torch.no_grad():
        torch.manual_seed(0)
        quiet, ours, expected = (
            F.cross_entropy(logits.transpose(1, 2), targets[: len(logits)], reduction="none").sum(1)
            for logits in (
                decoder.logits(decoder(inputs[:1])),
                decoder.logits(decoder(inputs, dropout_rng=dropout_rng)),
                theirs.logits(inputs),
            )
        )
    added = float((expected.mean() - quiet).mean())
    error = float((ours.var() / n + expected.var() / n).sqrt())
    assert abs(added) > 8 * error
    assert abs(float(ours.mean() - expected.mean())) < 4 * error


def _drops_embedding(rate: float) -> Any:
    """Section 5.4 of the paper: dropout on the sums of embeddings and positions."""
    return lambda _, given: (F.dropout(given[0], rate), *given[1:])


def test_presets_of_transformers_are_ours() -> None:
    """Sizes that transformers' own configurations have as defaults."""
    gpt = transformers.OpenAIGPTConfig()
    assert PRESETS["gpt"]["n_layers"] == gpt.n_layer
    assert PRESETS["gpt"]["context_length"] == gpt.n_positions
    gpt2 = transformers.GPT2Config()
    assert PRESETS["gpt2-124m"]["d_model"] == gpt2.n_embd
    assert PRESETS["gpt2-124m"]["context_length"] == gpt2.n_positions
    llama = transformers.LlamaConfig()
    assert PRESETS["llama-7b"]["d_ff"] == llama.intermediate_size
