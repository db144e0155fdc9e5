"""Where a training step's time goes, and how much of what the machine can do it uses.

The sections of a config go in; a few steps of a model that is thrown away are timed, a few more
run under torch's profiler; a `Profile` comes out, as numbers and as lines for people. Nothing is
written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.data import MicroBatch, PreparedData
from pretrain.distributed import World
from pretrain.model import ModelConfig
from pretrain.model.config import n_matrix_parameters, training_flops
from pretrain.model.fused import linear
from pretrain.optim import OptimizerConfig, ScheduleConfig
from pretrain.train.config import TrainConfig
from pretrain.train.decide import decide, decided_precision, trial_steps

WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 3, 8, 3
ALL_STEPS = WARM_STEPS + TIMED_STEPS + PROFILED_STEPS
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "_mkl_linear")
_DATA, _OPTIMIZER = "data", "Optimizer."
# bfloat16 with float32 sums, dense: NVIDIA's data sheets.
GPU_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    shares: dict[str, float]
    """of a step's time, by what it is spent on; they sum to 1"""
    step_seconds: float
    """median, without the profiler"""
    tokens_per_second: float
    matrix_parameters: int
    flops_per_token: int
    ceiling_flops: float
    """FLOP/s of the best matrix product here, at the model's shapes and precision"""
    ceiling_share: float
    mfu: float | None
    """share of the data sheet's FLOP/s, where the device has one that we know"""
    model: str
    """what is behind flops_per_token, for people"""
    machine: str
    """what all this holds for, for people"""


def profile_steps(
    *,
    data: PreparedData,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    train: TrainConfig,
    world: World,
) -> Profile:
    # That its steps are given makes a calibration unnecessary; the precision is the real run's.
    precision = decided_precision(train, world)
    train = replace(train, steps=train.steps or ALL_STEPS, precision=precision)
    decided = decide(
        data=data, model=model, optimizer=optimizer, schedule=schedule, train=train, world=world
    )
    model, train = decided.model, decided.train
    steps = trial_steps(
        data, model, optimizer, train, decided.parallel, world, steps=ALL_STEPS, read=_as_data
    )
    seconds = [_next_seconds(steps, world) for _ in range(WARM_STEPS + TIMED_STEPS)][WARM_STEPS:]
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if world.device.type == "cuda" else []
    with profile(activities=activities) as recorded:
        whole = sum(_next_seconds(steps, world) for _ in range(PROFILED_STEPS))
    vocab_size, step_seconds = data.manifest.vocab_size, statistics.median(seconds)
    assert train.batch_tokens is not None
    per_token = training_flops(model, vocab_size=vocab_size)
    multiplied = n_matrix_parameters(model, vocab_size=vocab_size)
    speed = train.batch_tokens / step_seconds
    ceiling = ceiling_flops(model, train, world)
    peaks = (f for name, f in GPU_FLOPS.items() if name in _device_name(world))
    peak = next(peaks, None) if train.precision == "bf16" else None
    return Profile(
        shares=_shares(recorded.events(), whole, on_device=world.device.type == "cuda"),
        step_seconds=step_seconds,
        tokens_per_second=speed,
        matrix_parameters=multiplied,
        flops_per_token=per_token,
        ceiling_flops=ceiling,
        ceiling_share=speed * per_token / ceiling,
        mfu=None if peak is None else speed * per_token / peak,
        model=f"6 x ({multiplied:,} weights that are multiplied + {model.n_layers} layers x "
        f"{model.d_model} x {model.window_tokens} of attention)",
        machine=f"{_device_name(world)}, {world.threads} threads, {train.precision}, "
        f"compile {train.compile}",
    )


def _as_data(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches, with a name in the profile for the time that reading them takes."""
    source = iter(batches)
    while True:
        with record_function(_DATA):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _next_seconds(steps: Iterator[Any], world: World) -> float:
    began = time.perf_counter()
    next(steps)
    world.synchronize()
    return time.perf_counter() - began


def _shares(events: Iterable[Any], whole: float, *, on_device: bool) -> dict[str, float]:
    """Each event's own time goes to what it is part of; what no event has is Python's, or on a GPU
    the time in which it waits."""
    parts = dict.fromkeys(("matrix products", "attention", "optimizer", "data", "the rest"), 0.0)
    for event in events:
        if event.device_type.name == "CPU":  # not a kernel of a GPU, which is its event's too
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            parts[_part_of(event)] += own * 1e-6
    between = "waiting" if on_device else "Python"
    parts[between] = max(0.0, whole - sum(parts.values()))
    total = sum(parts.values())
    return {name: seconds / total for name, seconds in parts.items()}


def _part_of(event: Any) -> str:
    own, above = event.name, event
    while above is not None:
        if above.name == _DATA:
            return "data"
        if above.name.startswith(_OPTIMIZER):
            return "optimizer"
        above = above.cpu_parent
    if "scaled_dot_product" in own or "_attention_" in own:
        return "attention"
    return "matrix products" if own.rpartition("::")[2] in _PRODUCTS else "the rest"


def ceiling_flops(model: ModelConfig, train: TrainConfig, world: World) -> float:
    """FLOP/s of the fastest of X W^T, Y W and Y^T X, by whichever library the model may use, at the
    shapes of its attention and its feed-forward layer."""
    assert train.micro_batch_rows is not None
    rows = train.micro_batch_rows * model.window_tokens
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    best = 0.0
    for wide in {model.d_model, model.feed_forward_width}:
        x = torch.randn(rows, model.d_model, device=world.device, dtype=dtype)
        y = torch.randn(rows, wide, device=world.device, dtype=dtype)
        w = torch.randn(wide, model.d_model, device=world.device, dtype=dtype)
        flops = 2 * rows * model.d_model * wide
        for product in (
            lambda x=x, w=w: x @ w.T,
            lambda x=x, w=w: linear(x, w, None),
            lambda y=y, w=w: y @ w,
            lambda y=y, x=x: y.T @ x,
        ):
            product()
            seconds = []
            for _ in range(10):
                began = time.perf_counter()
                product()
                world.synchronize()
                seconds.append(time.perf_counter() - began)
            best = max(best, flops / min(seconds))
    return best


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def lines(found: Profile) -> list[str]:
    """The profile for people."""
    ranked = sorted(found.shares.items(), key=lambda item: -item[1])
    text = [f"where a step goes, {PROFILED_STEPS} steps under torch's profiler:"]
    text += [
        f"  {name:16}{share:6.1%}  {'#' * round(50 * share)}".rstrip() for name, share in ranked
    ]
    text += [
        f"speed    {found.tokens_per_second:,.0f} tokens/s, {found.step_seconds:.3f} s a step",
        f"model    {found.flops_per_token / 1e6:,.1f} MFLOP a token, {found.model}",
        f"machine  {found.machine}",
        f"ceiling  {found.ceiling_flops / 1e9:,.0f} GFLOP/s, its best matrix product at the "
        f"model's shapes; the model uses {found.ceiling_share:.0%} of it",
    ]
    if found.mfu is not None:
        text.append(f"MFU      {found.mfu:.1%} of the data sheet's FLOP/s")
    return text
