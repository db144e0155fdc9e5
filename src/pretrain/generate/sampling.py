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
from pretrain.model.random import uniform
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

    top-k keeps the k likeliest ids ("Hierarchical Neural Story Generation", Fan et al., 2018);
    top-p the smallest set whose probabilities reach p ("The Curious Case of Neural Text
    Degeneration", Holtzman et al., 2020).
    """
    logits = logits_BV.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # An id stays when those before it have not yet reached p: the first always does.
        surplus = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities = probabilities.scatter(1, ids, ranked.masked_fill(surplus, 0.0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _draw(probabilities_BV: Tensor, u_B: Tensor) -> Tensor:
    """The ids at which the summed probabilities pass u."""
    total_BV = probabilities_BV.cumsum(-1)
    ids = torch.searchsorted(total_BV, (u_B * total_BV[:, -1])[:, None], right=True)[:, 0]
    # Rounding may put u beyond the last step of the sum: the last possible id is meant.
    last = probabilities_BV.shape[-1] - 1 - (probabilities_BV > 0).flip(-1).int().argmax(-1)
    return torch.minimum(ids, last)


@torch.no_grad()
def generate_ids(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    n: int = 1,
    sampling: Sampling,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """`n` continuations of a prompt of ids, each up to `max_tokens` long, cut before the first id
    of `ends`.

    A text that outgrows the context goes on from its last half context, read anew. Raises
    ValueError for an empty prompt and for counts below 1.
    """
    if not prompt:
        raise ValueError("generation needs at least one id to start from")
    if max_tokens < 1 or n < 1:
        raise ValueError(f"max-tokens is {max_tokens} and n is {n}; both must be at least 1")
    device = decoder.head_weight.device
    context = decoder.config.window_tokens
    kept = list(prompt) if len(prompt) < context else list(prompt)[-max(1, context // 2) :]
    seen_BT = torch.tensor([kept] * n, device=device)
    new_BT, cache, drawn = seen_BT, KeyValueCache(), []
    numbers, positions = torch.arange(n, device=device), torch.arange(max_tokens, device=device)
    # Drawn for all positions at once; each depends on seed, row and position alone.
    u_BP = uniform(sampling.seed, "generate", (numbers[:, None] << 32) + positions)
    ended_B = torch.zeros(n, dtype=torch.bool, device=device)
    for position in range(max_tokens):
        if cache.length + new_BT.shape[1] > context:
            new_BT, cache = seen_BT[:, -max(1, context // 2) :], KeyValueCache()
        # .forward, not a call: a decoder compiled for training must not be compiled again for every
        # length.
        hidden_BTD = decoder.forward(new_BT, cache=cache)
        probabilities = shape_probabilities(decoder.logits(hidden_BTD[:, -1]), sampling)
        new_BT = _draw(probabilities, u_BP[:, position])[:, None]
        seen_BT = torch.cat([seen_BT, new_BT], dim=1)
        drawn.append(new_BT)
        for end in ends:
            ended_B |= new_BT[:, 0] == end
        if ends and bool(ended_B.all()):
            break
    rows: list[list[int]] = torch.cat(drawn, dim=1).tolist()
    return [list(takewhile(lambda id_: id_ not in ends, row)) for row in rows]


def lay_out_for_generation(decoder: Decoder) -> None:
    """Lay tall matrices of a decoder that is only read from now on by columns, on a CPU.

    A token at a time, a product with a matrix takes as long as to read it, and MKL reads twice as
    fast along the longer side. Values stay, and so do tables that rows are only looked up in.
    """
    # The head is a layer, unless it is the embedding.
    layers = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    for weight in {*layers, decoder.head_weight}:
        if weight.device.type == "cpu" and weight.shape[0] > weight.shape[1]:
            weight.data = weight.data.T.contiguous().T


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, special: bool = False) -> list[int]:
    """The ids of a prompt behind a start-of-text, as every document stood in training."""
    return [tokenizer.start_of_text, *(int(i) for i in tokenizer.encode(prompt, special=special))]


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
    completions = generate_ids(
        decoder,
        prompt_ids(tokenizer, prompt, special=special),
        max_tokens=max_tokens,
        n=n,
        sampling=sampling or Sampling(),
        ends={tokenizer.start_of_text, tokenizer.end_of_text},
    )
    return [tokenizer.decode(ids) for ids in completions]


@torch.no_grad()
def next_distribution(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, *, special: bool = False
) -> Tensor:
    """Probabilities (V) of the token after `prompt`, in float64, on the CPU."""
    ids = prompt_ids(tokenizer, prompt, special=special)[-decoder.config.window_tokens :]
    hidden_BTD = decoder.forward(torch.tensor([ids], device=decoder.head_weight.device))
    return decoder.logits(hidden_BTD[0, -1]).double().softmax(-1).cpu()
