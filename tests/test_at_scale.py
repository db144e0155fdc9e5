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


def test_8b_on_64_devices(pool: Pool) -> None:
    (found,) = pool.run(1, jobs.trace, "llama3-8b", size=64, tokens=8192, shard=64)
    assert found["parameters"] == 8_030_261_248  # the published model's
    assert found["held"] == pytest.approx(found["parameters"] / 64, rel=0.01)
    assert found["gradients"] == found["held"]
    assert found["bytes"]["gather"] == pytest.approx(gathered(found), rel=0.01)
    assert found["bytes"]["scatter"] == pytest.approx(REAL * found["parameters"], rel=0.01)
    assert set(found["calls"]) == {"gather", "scatter"}
    assert found["calls"] == {"gather": 2 * found["layers"] + 1, "scatter": found["layers"] + 1}


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
