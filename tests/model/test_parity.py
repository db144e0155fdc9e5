"""Parity: oracles with the same weights give the same logits, losses, gradients and text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from oracles import CASES, Oracle, T, V, config_of, random_decoder
from pretrain.data.batches import MicroBatch
from pretrain.export.families import FORMATS
from pretrain.generate.sampling import Sampling, generate_ids
from pretrain.model.decoder import build
from pretrain.model.dropout import DropoutRng
from pretrain.model.families import FAMILIES, PRESETS
from pretrain.model.loss import LMLoss

transformers = pytest.importorskip("transformers")


def some_ids(seed: int, time: int = T) -> torch.Tensor:
    return torch.randint(0, V, (3, time), generator=torch.Generator().manual_seed(seed))


def test_every_published_family_has_an_oracle() -> None:
    assert {case["family"] for case in CASES.values()} == FAMILIES.keys() - {"fast"}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_agree(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case])).double()
    oracle = Oracle(decoder)
    ids = some_ids(0)
    logits = oracle.logits(ids)
    # Rotary angles are float32 on both sides, so float64 cannot agree further than that.
    torch.testing.assert_close(decoder.logits(decoder(ids)), logits, rtol=1e-5, atol=5e-6)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.arange(3))
    loss, n_targets = LMLoss(decoder)(batch)
    expected_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float((loss / n_targets).detach()) == pytest.approx(
        float(expected_loss.detach()), rel=1e-6
    )
    (loss / n_targets).backward()
    expected_loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    for name, expected, actual in oracle.gradients(gradients):
        add_name = f"{name}: {{}}".format
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, msg=add_name)


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_within_1e_5(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case]))
    oracle = Oracle(decoder)
    ids = some_ids(1)
    logits = oracle.logits(ids)
    difference = (decoder.logits(decoder(ids)) - logits).abs().max()
    assert float(difference.detach()) < 1e-5 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_agrees_with_and_without_a_cache(case: str) -> None:
    decoder = random_decoder(config_of(**CASES[case])).double()
    oracle = Oracle(decoder)
    prompt, expected = [3, 1, 4, 1, 5], [3, 1, 4, 1, 5]
    while len(expected) < T:
        expected.append(int(oracle.logits(torch.tensor([expected]))[0, -1].argmax()))
    n = T - len(prompt)
    completions = generate_ids(decoder, prompt, max_tokens=n, sampling=Sampling(temperature=0.0))
    assert completions[0] == expected[len(prompt) :]
    without_cache = list(prompt)
    while len(without_cache) < T:
        hidden = decoder(torch.tensor([without_cache]))
        without_cache.append(int(decoder.logits(hidden[0, -1]).argmax()))
    assert without_cache == expected
    if hasattr(oracle.model, "generate"):
        ids = torch.tensor([prompt])
        text = oracle.model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0)
        assert text[0].tolist() == expected


@pytest.mark.parametrize("family", FORMATS)
def test_initial_weights_have_the_std_of_transformers(family: str) -> None:
    """N(0, 0.02) in both, with GPT-2's scaled residual branches, biases 0 and norms 1."""
    config = config_of(family, n_layers=6, d_model=64)
    decoder = build(config, vocab_size=1000, seed=1)
    oracle = Oracle(decoder)
    oracle.model.init_weights()
    for name, _, actual in oracle.gradients(dict(decoder.named_parameters())):
        expected = oracle.parameter(name).detach()
        assert float(actual.detach().mean()) == pytest.approx(float(expected.mean()), abs=2e-3)
        assert float(actual.detach().std()) == pytest.approx(float(expected.std()), rel=0.06), name


@pytest.mark.parametrize("family", ["transformer", "gpt", "gpt2"])
def test_dropout_changes_the_mean_loss_by_as_much_as_the_oracles(family: str) -> None:
    """Masks differ, so the mean over many masks is compared: dropout is at the same places."""
    p, n = 0.3, 4000
    decoder = random_decoder(config_of(family, dropout=p, n_layers=1))
    oracle = Oracle(decoder)
    for module in oracle.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    for module in oracle.model.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            # torch has one more dropout, inside the feed-forward layer.
            module.dropout.p = 0.0
            module.register_forward_pre_hook(_drop_embedding(p))
    oracle.model.train()
    ids = some_ids(2)[:1].expand(n, -1)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    dropout_rng = DropoutRng(3, torch.arange(n))
    with torch.no_grad():
        torch.manual_seed(0)
        without_dropout, actual, expected = (
            F.cross_entropy(logits.transpose(1, 2), targets[: len(logits)], reduction="none").sum(1)
            for logits in (
                decoder.logits(decoder(inputs[:1])),
                decoder.logits(decoder(inputs, dropout_rng=dropout_rng)),
                oracle.logits(inputs),
            )
        )
    added = float((expected.mean() - without_dropout).mean())
    error = float((actual.var() / n + expected.var() / n).sqrt())
    assert abs(added) > 8 * error
    assert abs(float(actual.mean() - expected.mean())) < 4 * error


def _drop_embedding(p: float) -> Any:
    """Dropout on the sum of embeddings and positions: section 5.4 of the paper."""
    return lambda _, args: (F.dropout(args[0], p), *args[1:])


def test_presets_equal_the_defaults_of_transformers() -> None:
    gpt = transformers.OpenAIGPTConfig()
    assert PRESETS["gpt"]["n_layers"] == gpt.n_layer
    assert PRESETS["gpt"]["context_length"] == gpt.n_positions
    gpt2 = transformers.GPT2Config()
    assert PRESETS["gpt2-124m"]["d_model"] == gpt2.n_embd
    assert PRESETS["gpt2-124m"]["context_length"] == gpt2.n_positions
    llama = transformers.LlamaConfig()
    assert PRESETS["llama-7b"]["d_ff"] == llama.intermediate_size
