"""Llama 3 on 64 and 512 simulated devices: memory and traffic of a traced step are those of the
published formulas ("PyTorch FSDP", Zhao et al., 2023; "Megatron-LM", Shoeybi et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import scale_jobs as jobs
from processes import Pool

FP32_BYTES = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def gathered_bytes(found: dict[str, Any]) -> int:
    """Weights are gathered in forward and again in backward, except for embedding and head, which
    stay gathered in between."""
    return int(FP32_BYTES * (2 * found["parameters"] - found["embedding and head"]))


# Activations of a block that backward needs, in multiples of a hidden state: input and output of
# both norms (4); queries, keys and values, the latter two of a quarter of the heads (1.5); output
# of attention (1); gate, silu(gate), up and their product (4 x 3.5). With activation checkpointing
# only the input of the block is saved.
SAVED = 4 + 1.5 + 1 + 4 * 3.5
SAVED_CHECKPOINTED = 1.0


def saved_bytes(found: dict[str, Any], tokens: int, states: float) -> float:
    return float(FP32_BYTES * states * tokens * found["width"] * found["layers"])


def test_8b_with_fsdp_on_64_devices(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-8b", size=64, tokens=8192, shard=64)
    assert found["saved"] == pytest.approx(saved_bytes(found, 8192, SAVED), rel=0.15)
    assert found["parameters"] == 8_030_261_248  # the published model's
    assert found["stored"] == pytest.approx(found["parameters"] / 64, rel=0.01)
    assert found["gradients"] == found["stored"]
    assert found["bytes"]["gather"] == pytest.approx(gathered_bytes(found), rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(FP32_BYTES * found["parameters"], rel=0.01)
    assert set(found["calls"]) == {"gather", "scatter"}
    assert found["calls"] == {"gather": 2 * found["layers"] + 1, "scatter": found["layers"] + 1}


@pytest.mark.slow
def test_8b_with_fsdp_and_tensor_parallelism_on_64_devices(pool: Pool) -> None:
    """ "Megatron-LM", section 3: in each block, hidden states are all-reduced twice in forward and
    twice in backward; once more after the embedding, and before the head's gradients."""
    axes: dict[str, Any] = {"size": 64, "tokens": 4096, "shard": 8, "tensor": 8}
    (found,) = pool.run(1, jobs.trace, "llama3-8b", **axes)
    assert found["stored"] == pytest.approx(found["parameters"] / 64, rel=0.01)
    assert found["bytes"]["gather"] == pytest.approx(gathered_bytes(found) / 8, rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(
        FP32_BYTES * found["parameters"] / 8, rel=0.01
    )
    hidden = FP32_BYTES * 4096 * found["width"]
    assert found["bytes"]["reduce"] == pytest.approx((4 * found["layers"] + 2) * hidden, rel=0.01)
    # Heads and columns have an eighth; the output of norms is replicated.
    assert found["saved"] == pytest.approx(saved_bytes(found, 4096, 4 + (SAVED - 4) / 8), rel=0.15)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_real_processes_have_the_same_traffic(pool: Pool, size: int) -> None:
    for found in pool.run(size, jobs.count, 2, shard=size):
        assert found["calls"] == {
            "gather": 2 * found["layers"] + 1,
            "scatter": found["layers"] + 1,
        }
        # The vocabulary of 67 is padded to a multiple of the processes.
        assert found["bytes"]["gather"] == pytest.approx(gathered_bytes(found), rel=0.01)
        assert found["bytes"]["scatter"] == pytest.approx(
            FP32_BYTES * found["parameters"], rel=0.01
        )
    for found in pool.run(size, jobs.count, 2, shard=size, precision="bf16"):
        # Blocks are gathered in bfloat16; gradients are reduced in float32.
        in_blocks = found["parameters"] - found["embedding and head"]
        assert found["bytes"]["gather"] == pytest.approx(
            2 * 2 * in_blocks + FP32_BYTES * found["embedding and head"], rel=0.01
        )
        assert found["bytes"]["scatter"] == pytest.approx(
            FP32_BYTES * found["parameters"], rel=0.01
        )
    for found in pool.run(size, jobs.count, 2, tensor=2):
        hidden = FP32_BYTES * found["tokens"] * found["width"]
        # The largest logit of each row, the sum, and the target's logit.
        loss = 3 * FP32_BYTES * found["tokens"]
        over_tp = (4 * found["layers"] + 2) * hidden + loss
        over_replicas = found["bytes"]["reduce"] - over_tp
        assert over_replicas == pytest.approx(
            0 if size == 2 else FP32_BYTES * found["parameters"] / 2, rel=0.05
        )


@pytest.mark.slow
def test_activation_checkpointing_saves_the_input_of_each_block(pool: Pool) -> None:
    axes: dict[str, Any] = {
        "size": 64,
        "tokens": 8192,
        "shard": 64,
        "activation_checkpointing": "full",
    }
    (found,) = pool.run(1, jobs.trace, "llama3-8b", **axes)
    assert found["saved"] == pytest.approx(saved_bytes(found, 8192, SAVED_CHECKPOINTED), rel=0.15)


@pytest.mark.slow
def test_an_unnecessary_gather_is_noticed(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-8b", size=64, tokens=1024, shard=64, plant=True)
    assert found["calls"]["gather"] == 2 * found["layers"] + 2
    assert found["bytes"]["gather"] > gathered_bytes(found)


@pytest.mark.slow
def test_70b_with_hsdp_on_512_devices(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-70b", size=512, tokens=8192, data=2, shard=256)
    assert found["parameters"] == 70_553_706_496
    assert found["stored"] == pytest.approx(found["parameters"] / 256, rel=0.01)
    assert found["gradients"] == found["stored"]
    assert found["bytes"]["gather"] == pytest.approx(gathered_bytes(found), rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(FP32_BYTES * found["parameters"], rel=0.01)
    # Each process sends its shard of the gradient to the other replica.
    assert found["bytes"]["reduce"] == pytest.approx(FP32_BYTES * found["stored"], rel=0.01)
