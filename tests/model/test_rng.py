"""Random numbers of `pretrain.rng` on torch: known answers, slices, distribution."""

from __future__ import annotations

import pytest
import torch

from pretrain.rng import float64_device, normal, philox, uniform


def test_philox_gives_the_published_answers() -> None:
    """The known answers that Random123 ships for philox4x32-10."""

    def words(counter: int, key: int) -> list[int]:
        c = torch.tensor([counter])
        return [int(w) for w in philox([c, c, c, c], (key, key))]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words(ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_any_slice_of_a_normal_sequence_is_the_same() -> None:
    cpu = torch.device("cpu")
    sequence = normal(5, "name", 0, 1003, device=cpu)
    for start, stop in ((0, 1003), (1, 2), (517, 530), (4, 8), (1000, 1003)):
        assert torch.equal(normal(5, "name", start, stop, device=cpu), sequence[start:stop])
    long = normal(5, "name", 0, 200_000, device=cpu)
    assert abs(float(long.mean())) < 0.01
    assert float(long.std()) == pytest.approx(1.0, abs=0.01)
    assert float((long.abs() > 3).float().mean()) == pytest.approx(0.0027, abs=0.0006)


def test_random_numbers_are_computed_on_a_device_with_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MPS has no float64, so the CPU is used. Here the meta device replaces the CPU."""
    assert float64_device(torch.device("mps")).type == "cpu"
    monkeypatch.setattr("pretrain.rng.float64_device", lambda _: torch.device("meta"))
    assert uniform(1, "test", torch.arange(3)).is_meta
    with pytest.raises(NotImplementedError, match="out of meta tensor"):
        normal(1, "test", 0, 3, device=torch.device("cpu"))


def test_uniform_numbers_are_uniform() -> None:
    u = uniform(1, "test", torch.arange(100_000))
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert torch.histc(u, 10, 0, 1).sub(10_000).abs().max() < 400
