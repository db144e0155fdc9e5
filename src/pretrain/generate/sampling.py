"""Weights -> text: one token after another, from a distribution that temperature, top-k and top-p
have shaped.

A decoder and ids go in, ids or a distribution come out. What is drawn depends on the seed, the
number of the completion and the position alone, so completion 3 of 5 is completion 3 of 50.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from pretrain.model import Decoder, KeyValueCache
from pretrain.rng import float64_device, uniform
from pretrain.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

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


def shape_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) that is drawn from, in float64; each row sums to 1.

    top-k keeps the k likeliest ids, of equals at the end some ("Hierarchical Neural Story
    Generation", Fan et al., 2018); top-p the smallest set whose probabilities reach p ("The Curious
    Case of Neural Text Degeneration", Holtzman et al., 2020).
    """
    logits = logits_BV.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    # The largest first, so that what is divided by next to nothing stays finite there.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        best = logits_BV.topk(sampling.top_k).indices
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, best, False)
        logits = logits.masked_fill(outside, -math.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # An id stays when those before it have not yet reached p: the first always does.
        surplus = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities = probabilities.scatter(1, ids, ranked.masked_fill(surplus, 0.0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _draw(probabilities_BV: Tensor, u_B: Tensor) -> Tensor:
    """The places at which the summed probabilities pass u, (B)."""
    total_BV = probabilities_BV.cumsum(-1)
    # u ends 2^-33 below 1, so rounding never puts it beyond the last step; NaN is beyond all.
    places_B1 = torch.searchsorted(total_BV, u_B[:, None] * total_BV[:, -1:], right=True)
    return places_B1[:, 0].clamp(max=total_BV.shape[-1] - 1)


def sample(logits_BV: Tensor, sampling: Sampling, u_B: Tensor) -> Tensor:
    """An id for each row (B), drawn by a uniform number from what `shape_probabilities` makes of
    its logits.

    What top-k takes away needs no float64: on a CPU the k likeliest alone are shaped. Their sum is
    then made in another order, so an id may differ where u is within 1e-15 of a step.
    """
    k = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if k < logits_BV.shape[-1] and logits_BV.device.type == "cpu":
        ids_BK = logits_BV.topk(k).indices.sort().values
        kept = shape_probabilities(logits_BV.gather(1, ids_BK), sampling)
        return ids_BK.gather(1, _draw(kept, u_B)[:, None])[:, 0]
    return _draw(shape_probabilities(logits_BV, sampling), u_B)


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
    """`n` continuations of a prompt of ids, each up to `max_tokens` long, cut before the first id
    of `stop_ids`.

    A prompt is read from its end, as much of it as the context holds; a text that outgrows the
    context goes on from its last half context, read anew. Raises
    ValueError for an empty prompt and for counts below 1.
    """
    if not prompt:
        raise ValueError("generation needs at least one id to start from")
    if max_tokens < 1 or n < 1:
        raise ValueError(f"max-tokens is {max_tokens} and n is {n}; both must be at least 1")
    device = decoder.device
    context = decoder.config.window_tokens
    new_BT = torch.tensor([list(prompt)[-context:]] * n, device=device)
    cache, seen = KeyValueCache(), [new_BT]
    numbers, positions = torch.arange(n, device=device), torch.arange(max_tokens, device=device)
    # Drawn for all positions at once; each depends on seed, row and position alone.
    u_PB = uniform(sampling.seed, "generate", (numbers << 32) + positions[:, None])
    ended_B = torch.zeros(n, dtype=torch.bool, device=device)
    for u_B in u_PB:
        if cache.length + new_BT.shape[1] > context:
            new_BT, cache = torch.cat(seen, dim=1)[:, -max(1, context // 2) :], KeyValueCache()
        # .forward, not a call: a decoder compiled for training must not be compiled again for every
        # length.
        hidden_BTD = decoder.forward(new_BT, cache=cache)
        logits_BV = decoder.logits(hidden_BTD[:, -1]).to(u_B.device)
        new_BT = sample(logits_BV, sampling, u_B)[:, None].to(device)
        seen.append(new_BT)
        for end in stop_ids:
            ended_B |= new_BT[:, 0] == end
        if stop_ids and bool(ended_B.all()):
            break
    rows: list[list[int]] = torch.cat(seen[1:], dim=1).tolist()
    return [list(takewhile(lambda id_: id_ not in stop_ids, row)) for row in rows]


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
    """`n` texts that continue `prompt` (which is not repeated in them); they end where the model
    ends them. With `special` the names of special tokens in the prompt stand for them."""
    ids = tokenizer.encode_prompt(prompt, special=special)
    completions = generate_ids(
        decoder,
        ids,
        max_tokens=max_tokens,
        n=n,
        sampling=sampling or Sampling(),
        stop_ids={tokenizer.start_of_text, *tokenizer.stop_ids},
    )
    return [tokenizer.decode_after(ids, each) for each in completions]


@torch.no_grad()
def next_distribution(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, *, special: bool = False
) -> Tensor:
    """Probabilities (V) of the token after `prompt`, in float64, on the CPU."""
    ids = tokenizer.encode_prompt(prompt, special=special)[-decoder.config.window_tokens :]
    hidden_D = decoder.forward(torch.tensor([ids], device=decoder.device))[0, -1]
    return decoder.logits(hidden_D).to(float64_device(decoder.device)).double().softmax(-1).cpu()
