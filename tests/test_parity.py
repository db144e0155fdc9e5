"""Oracles: the same weights in transformers' own GPT-2 and Llama give the same logits, losses,
gradients, text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pretrain.data import MicroBatch
from pretrain.generate import Sampling, generate_ids
from pretrain.model import Decoder, ModelConfig, Objective, build
from pretrain.model.config import model_defaults
from pretrain.model.random import normal

transformers = pytest.importorskip("transformers")

V, T, D, L, H = 67, 24, 32, 2, 4

# Our name -> theirs. GPT-2 keeps its matrices transposed, and query, key and value in one.
GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def ours(family: str, **changes: Any) -> Decoder:
    """A small decoder with every parameter random: norms and biases too."""
    sizes = {"n_layers": L, "n_heads": H, "d_model": D, "context_length": T}
    config = ModelConfig(**{**model_defaults({"family": family}), **sizes, **changes})
    decoder = build(config, vocab_size=V, seed=1).double()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            noise = normal(2, name, 0, p.numel(), device=p.device).view_as(p)
            p.add_(0.2 * noise)
    return decoder


def parts_of(name: str, theirs: nn.Module, family: str, *, gradient: bool) -> torch.Tensor:
    """Their parameter (or its gradient) that our parameter `name` stands for, in our layout."""

    def take(path: str) -> torch.Tensor:
        p = theirs.get_parameter(path)
        found = p.grad if gradient else p.detach()
        assert found is not None
        return found

    if family == "gpt2":
        fixed = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
        stem, _, kind = name.rpartition(".")
        if stem in fixed:
            return take(f"transformer.{fixed[stem]}.{kind}")
        _, layer, inner = stem.split(".", 2)
        prefix = f"transformer.h.{layer}"
        if inner in ("attention.query", "attention.key", "attention.value"):
            place = ("query", "key", "value").index(inner.split(".")[1])
            fused = take(f"{prefix}.attn.c_attn.{kind}")
            return fused.chunk(3, dim=-1)[place].mT if kind == "weight" else fused.chunk(3)[place]
        value = take(f"{prefix}.{GPT2_BLOCK[inner]}.{kind}")
        return value.mT if value.ndim == 2 else value
    fixed = {"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    stem, _, kind = name.rpartition(".")
    if stem in fixed:
        return take(f"{fixed[stem]}.{kind}")
    _, layer, inner = stem.split(".", 2)
    return take(f"model.layers.{layer}.{LLAMA_BLOCK[inner]}.{kind}")


def oracle(family: str, decoder: Decoder) -> nn.Module:
    """Their model with our weights."""
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=H, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=V, max_position_embeddings=T, hidden_size=D, num_hidden_layers=L,
            num_attention_heads=H, num_key_value_heads=decoder.config.kv_heads,
            intermediate_size=decoder.config.feed_forward_width, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.config.rope_theta},
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            parts_of(name, model, family, gradient=False).copy_(p)
    return model


CASES = [("gpt2", {}), ("llama", {}), ("llama", {"n_kv_heads": 2}), ("llama", {"rope_theta": 5e5})]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_loss_and_every_gradient_agree(family: str, changes: dict[str, Any]) -> None:
    decoder = ours(family, **changes)
    theirs = oracle(family, decoder)
    ids = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    found = theirs(input_ids=ids)
    # Rotary angles are float32 on both sides, so float64 cannot agree further than that.
    torch.testing.assert_close(decoder.logits(decoder(ids)), found.logits, rtol=1e-5, atol=5e-6)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.arange(3))
    nats, count = Objective(decoder)(batch)
    their_loss = theirs(input_ids=ids, labels=ids).loss
    assert float((nats / count).detach()) == pytest.approx(float(their_loss.detach()), rel=1e-6)
    (nats / count).backward()
    their_loss.backward()
    for name, p in decoder.named_parameters():
        expected = parts_of(name, theirs, family, gradient=True)
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("family", "changes"), CASES[:3])
def test_float32_agrees_within_1e_5(family: str, changes: dict[str, Any]) -> None:
    decoder = ours(family, **changes)
    theirs = oracle(family, decoder).float()
    decoder.float()
    ids = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(1))
    logits = theirs(input_ids=ids).logits
    largest = float(logits.abs().max())
    difference = (decoder.logits(decoder(ids)) - logits).abs().max()
    assert float(difference.detach()) < 1e-5 * largest


@pytest.mark.parametrize(("family", "changes"), CASES[:3])
def test_greedy_text_agrees(family: str, changes: dict[str, Any]) -> None:
    decoder = ours(family, **changes)
    theirs: Any = oracle(family, decoder)
    prompt = [3, 1, 4, 1, 5]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    found = generate_ids(decoder, prompt, max_tokens=12, sampling=Sampling(temperature=0.0))
    assert found[0] == expected[0, 5:].tolist()
