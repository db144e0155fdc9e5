"""Where a training step's time goes, and how much of the machine's speed it uses.

A config goes in; some steps of a model that is thrown away are timed, a few more run under torch's
profiler; a `Profile` comes out, as numbers and as human-readable lines. Nothing is written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.config import RunConfig
from pretrain.data.batches import MicroBatch
from pretrain.data.format import PreparedData
from pretrain.distributed import World
from pretrain.model.config import ModelConfig, n_matmul_parameters, training_flops
from pretrain.model.fused import linear
from pretrain.parallel.config import ParallelConfig
from pretrain.train.build import trial_steps
from pretrain.train.config import TrainConfig, filled
from pretrain.train.resolve import resolve, resolve_precision

WARM_UP_STEPS = 3
TIMED_STEPS = 8
PROFILED_STEPS = 3
ALL_STEPS = WARM_UP_STEPS + TIMED_STEPS + PROFILED_STEPS
_MATMULS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "_mkl_linear")
_DATA = "data"
_OPTIMIZER = "Optimizer."
# bfloat16 with float32 sums, dense: NVIDIA's data sheets.
GPU_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    shares: dict[str, float]
    """shares of a step's time, by what it is spent on; they sum to 1"""
    step_seconds: float
    """median, without the profiler"""
    tokens_per_second: float
    matrix_parameters: int
    flops_per_token: int
    ceiling_flops: float
    """FLOP/s of the fastest matrix product here, at the model's shapes and precision"""
    ceiling_share: float
    mfu: float | None
    """share of the data sheet's FLOP/s; None for a device that is not in GPU_FLOPS"""
    model: str
    """how flops_per_token is computed, human-readable"""
    machine: str
    """device, threads and precision, human-readable"""


def profile_steps(config: RunConfig, data: PreparedData, world: World) -> Profile:
    # Given a number of steps nothing is timed to resolve the config; the precision is the run's.
    precision = resolve_precision(config.train, world)
    train = replace(config.train, steps=config.train.steps or ALL_STEPS, precision=precision)
    config = replace(config, train=train, parallel=ParallelConfig())
    config = resolve(config, data, world)
    model, train = config.model, config.train

    steps = trial_steps(config, data, world, steps=ALL_STEPS, read=_as_data)
    seconds = [next(steps) for _ in range(WARM_UP_STEPS + TIMED_STEPS)]
    step_seconds = statistics.median(seconds[WARM_UP_STEPS:])
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        profiled_seconds = sum(next(steps) for _ in range(PROFILED_STEPS))

    # Each event's own time counts for what it is part of; time outside of events is Python's, or on
    # a GPU waiting.
    is_cuda = world.device.type == "cuda"
    spent = dict.fromkeys(("matrix products", "attention", "optimizer", "data", "the rest"), 0.0)
    for event in recorded.events():
        if event.device_type.name == "CPU":  # not a GPU kernel, whose time its event has too
            own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            spent[_category(event)] += own * 1e-6
    spent["waiting" if is_cuda else "Python"] = max(0.0, profiled_seconds - sum(spent.values()))
    all_seconds = sum(spent.values())

    vocab_size = data.manifest.vocab_size
    per_token = training_flops(model, vocab_size=vocab_size)
    n_matrix = n_matmul_parameters(model, vocab_size=vocab_size)
    speed = filled(train.batch_tokens) / step_seconds
    ceiling = ceiling_flops(model, train, world)
    device_name = torch.cuda.get_device_name(world.device) if is_cuda else "cpu"
    peaks = [flops for name, flops in GPU_FLOPS.items() if name in device_name]
    mfu = speed * per_token / peaks[0] if peaks and train.precision == "bf16" else None
    return Profile(
        shares={name: each / all_seconds for name, each in spent.items()},
        step_seconds=step_seconds,
        tokens_per_second=speed,
        matrix_parameters=n_matrix,
        flops_per_token=per_token,
        ceiling_flops=ceiling,
        ceiling_share=speed * per_token / ceiling,
        mfu=mfu,
        model=f"6 x ({n_matrix:,} weights in matrix products + {model.n_layers} layers x "
        f"{model.d_model} x {model.window_tokens} of attention)",
        machine=f"{device_name}, {world.threads} threads, {train.precision}, "
        f"compile {train.compile}",
    )


def _as_data(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the same batches, with a name in the profile for the time that reading them takes."""
    source = iter(batches)
    while True:
        with record_function(_DATA):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _category(event: Any) -> str:
    ancestor = event
    while ancestor is not None:
        if ancestor.name == _DATA:
            return "data"
        if ancestor.name.startswith(_OPTIMIZER):
            return "optimizer"
        if "CausalAttention" in ancestor.name:
            return "attention"
        ancestor = ancestor.cpu_parent
    if "scaled_dot_product" in event.name or "_attention_" in event.name:
        return "attention"
    return "matrix products" if event.name.rpartition("::")[2] in _MATMULS else "the rest"


def ceiling_flops(model: ModelConfig, train: TrainConfig, world: World) -> float:
    """FLOP/s of the fastest of X W^T, Y W and Y^T X, by any library that the model may use, at the
    shapes of its attention and its feed-forward layer."""
    rows = filled(train.micro_batch_rows) * model.window_tokens
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    best = 0.0
    for wide in {model.d_model, model.feed_forward_width}:
        x = torch.randn(rows, model.d_model, device=world.device, dtype=dtype)
        y = torch.randn(rows, wide, device=world.device, dtype=dtype)
        w = torch.randn(wide, model.d_model, device=world.device, dtype=dtype)
        flops = 2 * rows * model.d_model * wide
        products: list[Callable[[], Any]] = [
            lambda x=x, w=w: x @ w.T,  # type: ignore[misc]
            lambda x=x, w=w: linear(x, w, None),  # type: ignore[misc]
            lambda y=y, w=w: y @ w,  # type: ignore[misc]
            lambda y=y, x=x: y.T @ x,  # type: ignore[misc]
        ]
        for product in products:
            product()  # warm-up
            seconds = []
            for _ in range(10):
                start = time.perf_counter()
                product()
                world.synchronize()
                seconds.append(time.perf_counter() - start)
            best = max(best, flops / min(seconds))
    return best


def lines(result: Profile) -> list[str]:
    """The profile as human-readable lines."""
    text = [f"where a step's time goes, {PROFILED_STEPS} steps under torch's profiler:"]
    for name, share in sorted(result.shares.items(), key=lambda item: -item[1]):
        text.append(f"  {name:16}{share:6.1%}  {'#' * round(50 * share)}".rstrip())
    text += [
        f"speed    {result.tokens_per_second:,.0f} tokens/s, {result.step_seconds:.3f} s a step",
        f"model    {result.flops_per_token / 1e6:,.1f} MFLOP a token, {result.model}",
        f"machine  {result.machine}",
        f"ceiling  {result.ceiling_flops / 1e9:,.0f} GFLOP/s, the fastest matrix product here at "
        f"the model's shapes; the model uses {result.ceiling_share:.0%} of it",
    ]
    if result.mfu is not None:
        text.append(f"MFU      {result.mfu:.1%} of the data sheet's FLOP/s")
    return text
