"""Llama 3 on 64 and 512 devices that are not there: what a traced step holds and moves is what the
published counts say ("PyTorch FSDP", Zhao et al., 2023; "Megatron-LM", Shoeybi et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import scale_jobs as jobs
from processes import Pool

REAL = 4  # bytes of a float32


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool()
    yield found
    found.close()


def gathered(found: dict[str, Any]) -> int:
    """Weights are gathered forward and again on the way back, but for embedding and head, which
    stay gathered between."""
    return int(REAL * (2 * found["parameters"] - found["in the ends"]))


# Numbers that a block keeps for the way back, for each token and each of the D numbers of a hidden
# state, in float32: after both norms what was normed and what came of it (4); queries, keys and
# values, the latter two of a quarter of the heads (1.5); what attention mixed (1); gate,
# silu(gate), up and their product (4 x 3.5 D). With recompute there is its input alone.
KEPT = 4 + 1.5 + 1 + 4 * 3.5
KEPT_RECOMPUTED = 1.0


def kept(found: dict[str, Any], tokens: int, each: float) -> float:
    return float(REAL * each * tokens * found["width"] * found["layers"])


def test_8b_on_64_devices(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-8b", size=64, tokens=8192, shard=64)
    assert found["kept"] == pytest.approx(kept(found, 8192, KEPT), rel=0.15)
    assert found["parameters"] == 8_030_261_248  # the published model's
    assert found["held"] == pytest.approx(found["parameters"] / 64, rel=0.01)
    assert found["gradients"] == found["held"]
    assert found["bytes"]["gather"] == pytest.approx(gathered(found), rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"], rel=0.01)
    assert set(found["calls"]) == {"gather", "scatter"}
    assert found["calls"] == {"gather": 2 * found["layers"] + 1, "scatter": found["layers"] + 1}


@pytest.mark.slow
def test_8b_with_its_heads_and_columns_on_8_of_64_devices(pool: Pool) -> None:
    """ "Megatron-LM", section 3: hidden states are summed twice in a block on the way forward, and
    twice on the way back; once more after the embedding, and before the head's slopes go back."""
    axes: dict[str, Any] = {"size": 64, "tokens": 4096, "shard": 8, "tensor": 8}
    (found,) = pool.run(1, jobs.trace, "llama3-8b", **axes)
    assert found["held"] == pytest.approx(found["parameters"] / 64, rel=0.01)
    assert found["bytes"]["gather"] == pytest.approx(gathered(found) / 8, rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"] / 8, rel=0.01)
    hidden = REAL * 4096 * found["width"]
    assert found["bytes"]["reduce"] == pytest.approx((4 * found["layers"] + 2) * hidden, rel=0.01)
    # All that heads and columns have is an eighth; what norms make is whole everywhere.
    assert found["kept"] == pytest.approx(kept(found, 4096, 4 + (KEPT - 4) / 8), rel=0.15)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_processes_that_are_there_move_as_much(pool: Pool, size: int) -> None:
    for found in pool.run(size, jobs.count, 2, shard=size):
        assert found["calls"] == {
            "gather": 2 * found["layers"] + 1,
            "scatter": found["layers"] + 1,
        }
        # Rows that do not divide are filled up: the vocabulary has 67.
        assert found["bytes"]["gather"] == pytest.approx(gathered(found), rel=0.01)
        assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"], rel=0.01)
    for found in pool.run(size, jobs.count, 2, shard=size, precision="bf16"):
        # Blocks are gathered in two bytes a number; slopes are summed in four.
        in_blocks = found["parameters"] - found["in the ends"]
        assert found["bytes"]["gather"] == pytest.approx(
            2 * 2 * in_blocks + REAL * found["in the ends"], rel=0.01
        )
        assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"], rel=0.01)
    for found in pool.run(size, jobs.count, 2, tensor=2):
        hidden = REAL * found["tokens"] * found["width"]
        # Of each row its largest logit, the sum, and the target's.
        loss = 3 * REAL * found["tokens"]
        among_heads = (4 * found["layers"] + 2) * hidden + loss
        between_copies = found["bytes"]["reduce"] - among_heads
        assert between_copies == pytest.approx(
            0 if size == 2 else REAL * found["parameters"] / 2, rel=0.05
        )


@pytest.mark.slow
def test_recomputed_blocks_keep_their_input(pool: Pool) -> None:
    axes: dict[str, Any] = {
        "size": 64,
        "tokens": 8192,
        "shard": 64,
        "activation_checkpointing": "full",
    }
    (found,) = pool.run(1, jobs.trace, "llama3-8b", **axes)
    assert found["kept"] == pytest.approx(kept(found, 8192, KEPT_RECOMPUTED), rel=0.15)


@pytest.mark.slow
def test_a_gather_too_many_is_seen(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-8b", size=64, tokens=1024, shard=64, plant=True)
    assert found["calls"]["gather"] == 2 * found["layers"] + 2
    assert found["bytes"]["gather"] > gathered(found)


@pytest.mark.slow
def test_70b_on_512_devices(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-70b", size=512, tokens=8192, data=2, shard=256)
    assert found["parameters"] == 70_553_706_496
    assert found["held"] == pytest.approx(found["parameters"] / 256, rel=0.01)
    assert found["gradients"] == found["held"]
    assert found["bytes"]["gather"] == pytest.approx(gathered(found), rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"], rel=0.01)
    # Between the two copies go what each process holds of the gradient.
    assert found["bytes"]["reduce"] == pytest.approx(REAL * found["held"], rel=0.01)
