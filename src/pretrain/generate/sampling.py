"""Weights -> text: one token after another, sampled with temperature, top-k and top-p.

A decoder and a prompt come in; ids, texts or a distribution go out. A sampled token depends on the
seed, the number of the completion and the position alone, so completion 3 of 5 is completion 3 of
50.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from pretrain.model.decoder import Decoder
from pretrain.model.layers import KeyValueCache
from pretrain.rng import float64_device, uniform
from pretrain.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the most probable one."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; it must be in (0, 1]")


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 200,
    n: int = 1,
    sampling: Sampling | None = None,
    special: bool = False,
) -> list[str]:
    """Generate `n` texts that continue `prompt`, which they do not repeat.

    A text ends before the model's stop token, or after `max_tokens` tokens. `sampling`: default
    `Sampling()`. `special`: names of special tokens in the prompt are encoded as those tokens.
    Raises ValueError for counts below 1 and for a prompt that the tokenizer cannot encode.
    """
    prompt_ids = tokenizer.encode_prompt(prompt, special=special)
    completions = generate_ids(
        decoder,
        prompt_ids,
        max_tokens=max_tokens,
        n=n,
        sampling=sampling or Sampling(),
        stop_ids={tokenizer.start_of_text, *tokenizer.stop_ids},
    )
    return [tokenizer.decode_after(prompt_ids, ids) for ids in completions]


@torch.inference_mode()
def generate_ids(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    n: int = 1,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Generate `n` completions of a prompt of ids, each up to `max_tokens` long.

    A completion ends before the first of the `stop_ids`. Of a prompt longer than the context the
    end is read; when the context is full, its last half is read again with an empty cache. Raises
    ValueError for an empty prompt and for counts below 1.
    """
    if not prompt:
        raise ValueError("the prompt must have at least 1 token (got 0)")
    if max_tokens < 1 or n < 1:
        raise ValueError(f"max-tokens is {max_tokens} and n is {n}; both must be at least 1")
    device, context_length = decoder.device, decoder.config.window_tokens

    # The uniform numbers of all positions at once: each depends on seed, row and position alone.
    rows, positions = torch.arange(n, device=device), torch.arange(max_tokens, device=device)
    u_PB = uniform(sampling.seed, "generate", (rows << 32) + positions[:, None])

    new_ids_BT = torch.tensor([list(prompt)[-context_length:]] * n, device=device)
    chunks = [new_ids_BT]
    cache = KeyValueCache()
    has_ended_B = torch.zeros(n, dtype=torch.bool, device=device)
    for u_B in u_PB:
        if cache.length + new_ids_BT.shape[1] > context_length:
            new_ids_BT = torch.cat(chunks, dim=1)[:, -max(1, context_length // 2) :]
            cache = KeyValueCache()
        # .forward: calling a decoder that training has compiled would compile it for each length.
        hidden_BTD = decoder.forward(new_ids_BT, cache=cache)
        logits_BV = decoder.logits(hidden_BTD[:, -1]).to(u_B.device)
        new_ids_BT = sample(logits_BV, sampling, u_B)[:, None].to(device)
        chunks.append(new_ids_BT)
        for stop_id in stop_ids:
            has_ended_B |= new_ids_BT[:, 0] == stop_id
        if stop_ids and bool(has_ended_B.all()):
            break
    completions: list[list[int]] = torch.cat(chunks[1:], dim=1).tolist()
    return [list(takewhile(lambda id_: id_ not in stop_ids, ids)) for ids in completions]


@torch.no_grad()
def next_distribution(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, *, special: bool = False
) -> Tensor:
    """Return the probabilities (V) of the token after `prompt`, in float64 on the CPU."""
    ids = tokenizer.encode_prompt(prompt, special=special)[-decoder.config.window_tokens :]
    hidden_D = decoder.forward(torch.tensor([ids], device=decoder.device))[0, -1]
    return decoder.logits(hidden_D).to(float64_device(decoder.device)).double().softmax(-1).cpu()


def sample(logits_BV: Tensor, sampling: Sampling, u_B: Tensor) -> Tensor:
    """Sample an id for each row (B) with a uniform random number, from `sampling_probabilities`.

    On a CPU only the top-k logits are converted to float64. Their probabilities are then summed in
    another order, so an id can differ if u is within 1e-15 of a boundary.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    V = logits_BV.shape[-1]
    k = min(sampling.top_k or V, V)
    if k < V and logits_BV.device.type == "cpu":
        ids_BK = logits_BV.topk(k).indices.sort().values
        probabilities_BK = sampling_probabilities(logits_BV.gather(1, ids_BK), sampling)
        return ids_BK.gather(1, _invert_cdf(probabilities_BK, u_B)[:, None])[:, 0]
    return _invert_cdf(sampling_probabilities(logits_BV, sampling), u_B)


def sampling_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution (B, V) that is sampled from, in float64; each row sums to 1.

    top-k keeps the k most probable ids, of ties at the end some ("Hierarchical Neural Story
    Generation", Fan et al., 2018); top-p the smallest set whose probabilities reach p ("The Curious
    Case of Neural Text Degeneration", Holtzman et al., 2020).
    """
    logits = logits_BV.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    # With the maximum at 0 it stays finite for any temperature.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits_BV.topk(sampling.top_k).indices
        is_removed = torch.ones_like(logits, dtype=torch.bool).scatter(1, kept, False)
        logits = logits.masked_fill(is_removed, -math.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # An id is kept if the sum of those before it is below p; the first always is.
        is_removed = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities = probabilities.scatter(1, ids, ranked.masked_fill(is_removed, 0.0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _invert_cdf(probabilities_BV: Tensor, u_B: Tensor) -> Tensor:
    """Return the index (B) at which the cumulative probabilities exceed u."""
    cdf_BV = probabilities_BV.cumsum(-1)
    # u is at most 1 - 2^-33, so rounding cannot put it beyond the last step; NaN is beyond all.
    index_B1 = torch.searchsorted(cdf_BV, u_B[:, None] * cdf_BV[:, -1:], right=True)
    return index_B1[:, 0].clamp(max=cdf_BV.shape[-1] - 1)
