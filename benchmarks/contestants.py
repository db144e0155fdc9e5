"""The same training step by ours and by others, each in a process of its own that steps when told.

python benchmarks/contestants.py NAME SHAPE       # then, on standard input: a number of steps

SHAPE is JSON of a `Shape`. Each line read from standard input is answered with the seconds that so
many steps took; an empty line ends the process with its peak memory. So a caller can let many
contestants step by turns, of which only one works at a time.

Everybody gets the same architecture (that of GPT-2; litgpt, which has no learned positions, turns
queries and keys instead), the same precision (float32; on a GPU bfloat16 by autocast), batch,
micro-batches, gradient clipping and AdamW. Others use their own model and loss, and the step of
their own training script; what is torch's own and faster (AdamW's fused kernel, denormal numbers
flushed to zero, pinned batches on a GPU, no wait for the loss) is theirs too, even where their
script does not use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pretrain.model.config import ModelConfig, model_defaults

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    d_model: int = 384
    n_layers: int = 6
    n_heads: int = 6
    context: int = 256
    vocab_size: int = 4096
    batch_tokens: int = 4096
    compiled: bool = False
    threads: int = 2
    device: str = "cpu"
    micro_batch_tokens: int = 1 << 30
    """that others take at once; a step sums over its micro-batches"""

    @property
    def rows(self) -> int:
        return self.batch_tokens // self.context

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"

    def model(self) -> ModelConfig:
        """Ours."""
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "d_model": self.d_model}
        given = {**model_defaults({"family": "gpt2"}), **sizes, "context_length": self.context}
        return ModelConfig(**given)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def batches_of(shape: Shape) -> Callable[[int], list[tuple[Any, Any]]]:
    """Return a function of the step that makes a batch of random ids and targets of this shape."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (shape.rows, shape.context + 1)

    def draw(rows: int) -> list[tuple[Any, Any]]:
        parts = torch.randint(0, shape.vocab_size, size, generator=generator).split(rows)
        return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in parts]

    return draw


def pretrain(shape: Shape) -> Step:
    import torch

    from pretrain.data.batches import MicroBatch
    from pretrain.distributed import open_world
    from pretrain.model.decoder import build
    from pretrain.model.loss import LMLoss
    from pretrain.optim.config import OptimizerConfig
    from pretrain.optim.param_groups import build_optimizer
    from pretrain.train.resolve import fit_micro_batch
    from pretrain.train.step import training_steps

    model, world = shape.model(), open_world(shape.device, threads=shape.threads)
    decoder = build(model, vocab_size=shape.vocab_size, seed=1, device=world.device)
    lm_loss = LMLoss(decoder).train()
    if shape.compiled:
        lm_loss.compile_parts()
    optimizer = build_optimizer(
        decoder.named_parameters(), config=OptimizerConfig(), batch_tokens=shape.batch_tokens
    )
    rows, draw = fit_micro_batch(shape.rows, model, shape.device), batches_of(shape)

    def batch(step: int) -> list[MicroBatch]:
        samples = torch.arange(shape.rows).split(rows)
        return [MicroBatch(*ids, numbers) for ids, numbers in zip(draw(rows), samples, strict=True)]

    how = {"clip": 1.0, "world": world, "precision": shape.precision}
    steps = training_steps(lm_loss, optimizer, batch, lr_at=lambda step: 1e-3, steps=10**9, **how)
    return partial(next, steps)


def plain_step(
    shape: Shape, model: Any, optimizer: Any, loss_of: Callable[[Any, Any], Any]
) -> Step:
    """The step that their training scripts make: loss, gradients, clipping, update."""
    import torch

    draw, parameters = batches_of(shape), list(model.parameters())
    rows = max(1, min(shape.rows, shape.micro_batch_tokens // shape.context))
    on_gpu = shape.device == "cuda"
    model.train()

    def step() -> object:
        parts = draw(rows)
        for ids, targets in parts:
            if on_gpu:
                ids = ids.pin_memory().to(shape.device, non_blocking=True)
                targets = targets.pin_memory().to(shape.device, non_blocking=True)
            with torch.autocast(shape.device, dtype=torch.bfloat16, enabled=on_gpu):
                loss = loss_of(ids, targets) / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def nanogpt(shape: Shape) -> Step:
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_embd": shape.d_model}
    window = {"block_size": shape.context, "vocab_size": shape.vocab_size}
    if shape.device == "cuda":
        window["vocab_size"] = -(-shape.vocab_size // 64) * 64  # as its train.py has it
    model = GPT(GPTConfig(**sizes, **window, dropout=0.0, bias=True)).to(shape.device)
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), shape.device).param_groups
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    run = torch.compile(model) if shape.compiled else model
    return plain_step(shape, model, optimizer, lambda ids, targets: run(ids, targets)[1])


def transformers(shape: Shape) -> Step:
    import torch
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_embd": shape.d_model}
    config = GPT2Config(
        **sizes,
        n_positions=shape.context,
        vocab_size=shape.vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(shape.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = torch.compile(model) if shape.compiled else model

    def loss_of(ids: Any, targets: Any) -> Any:
        return F.cross_entropy(run(ids).logits.flatten(0, 1), targets.flatten())

    return plain_step(shape, model, optimizer, loss_of)


def litgpt(shape: Shape) -> Step:
    import torch
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    sizes = {"n_layer": shape.n_layers, "n_head": shape.n_heads, "n_embd": shape.d_model}
    config = Config(
        **sizes,
        block_size=shape.context,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=True,
        lm_head_bias=False,
    )
    model = GPT(config).to(shape.device)
    model.lm_head.weight = model.transformer.wte.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = torch.compile(model) if shape.compiled else model

    def loss_of(ids: Any, targets: Any) -> Any:
        return chunked_cross_entropy(run(ids), targets)

    return plain_step(shape, model, optimizer, loss_of)


CONTESTANTS = {
    "pretrain": pretrain,
    "nanoGPT": nanogpt,
    "transformers": transformers,
    "litgpt": litgpt,
}


def main() -> None:
    name, shape = sys.argv[1], Shape(**json.loads(sys.argv[2]))
    import torch

    torch.set_num_threads(shape.threads)
    # As ours does: without it a step of litgpt's can take ten times as long.
    torch.set_flush_denormal(True)
    if shape.device == "cuda" and name != "pretrain":
        torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT's train.py does
    # What they print while they are built is not an answer.
    with contextlib.redirect_stdout(sys.stderr):
        step = CONTESTANTS[name](shape)
    for line in sys.stdin:
        if not line.strip():
            break
        with contextlib.redirect_stdout(sys.stderr):
            began = time.perf_counter()
            for _ in range(int(line)):
                step()
            if shape.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        print(seconds, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(torch.cuda.max_memory_allocated() if shape.device == "cuda" else peak, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
