"""The loss and its gradients: the formula, the reference, ignored targets, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from model_variants import VARIANTS, T, V, batch_of, compiler_works, random_variant
from pretrain.model.decoder import Decoder
from pretrain.model.loss import IGNORE_INDEX, LMLoss, Teacher, chunked_cross_entropy
from pretrain.model.mixture import Mixture
from reference import reference_cross_entropy


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A small decoder of each variant in which every parameter has an effect."""
    return random_variant(request.param)


def test_the_loss_is_the_sum_of_log_probabilities(decoder: Decoder) -> None:
    """L(X) = sum_i log p(x_{i+1} | x_{i-k}, ..., x_i), by brute force over explicit contexts.

    k + 1 is the number of ids of the context of a prediction: all ids of the window up to x_i, so 1
    for the first target of a window and T, the context length, for the last.
    """
    decoder.double()
    ids = torch.randint(0, V, (3, T + 1), generator=torch.Generator().manual_seed(1))
    total = 0.0
    for row in ids.tolist():
        for i in range(T):
            context = torch.tensor([row[: i + 1]])
            logits = decoder.logits(decoder(context))[0, -1]
            total += float(logits.log_softmax(-1)[row[i + 1]].detach())
    nats, count = LMLoss(decoder)(batch_of(ids))
    assert count == 3 * T
    assert float(nats) == pytest.approx(-total, rel=1e-10)


def test_ignored_targets_add_nothing(decoder: Decoder) -> None:
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(2))
    batch = batch_of(ids)
    targets = batch.targets.clone()
    targets[:, T // 2 :] = IGNORE_INDEX
    nats, count = LMLoss(decoder)(batch._replace(targets=targets))
    shorter, shorter_count = LMLoss(decoder)(batch_of(ids[:, : T // 2 + 1]))
    assert count == shorter_count == 2 * (T // 2)
    assert float(nats) == pytest.approx(float(shorter), rel=1e-6)


PATHS = ["cpu path", "device path", "device path compiled"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the loss; every path runs on the CPU here."""
    monkeypatch.setattr("pretrain.model.loss.CPU_BLOCK_LOGITS", 3 * V)
    if request.param != "cpu path":
        monkeypatch.setattr("pretrain.model.loss.uses_cpu_path", lambda device: False)
    if request.param == "device path compiled" and not compiler_works():
        pytest.skip("torch compiles nothing here")
    return {"compiled": request.param == "device path compiled"}


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_chunked_loss_and_its_gradients_equal_the_reference(
    rows: int, path: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if path["compiled"] and rows != 64:
        pytest.skip("each number of rows is compiled again, which takes seconds")
    monkeypatch.setattr("pretrain.model.loss.CPU_CHUNK_BYTES", rows * V * 8)
    monkeypatch.setattr("pretrain.model.loss.GPU_CHUNK_LOGITS_EAGER", rows * V)
    monkeypatch.setattr("pretrain.model.loss.MIN_CHUNK_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (40,), generator=generator)
    targets[5], targets[39] = IGNORE_INDEX, IGNORE_INDEX
    results = []
    functions: list[Any] = [partial(chunked_cross_entropy, **path), reference_cross_entropy]
    for function in functions:
        nats = function(hidden, weight, targets)
        results.append((nats, *torch.autograd.grad(3 * nats, (hidden, weight))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [{"smoothing": 0.1}, {"z_loss": 0.01}])
def test_smoothing_and_z_loss_change_gradients_and_never_the_value(
    extra: dict[str, Any], path: dict[str, Any]
) -> None:
    if path["compiled"]:
        pytest.skip("one compilation, without them, is enough")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (40,), generator=generator)
    targets[5] = IGNORE_INDEX
    nats = chunked_cross_entropy(hidden, weight, targets, **extra, **path)
    without_extra = reference_cross_entropy(hidden, weight, targets)
    with_extra = reference_cross_entropy(hidden, weight, targets, **extra)
    torch.testing.assert_close(nats, without_extra, rtol=1e-12, atol=0)
    assert float(with_extra.detach()) != pytest.approx(float(without_extra.detach()))
    for actual, expected in zip(
        torch.autograd.grad(nats, (hidden, weight)),
        torch.autograd.grad(with_extra, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [{"label_smoothing": 0.1}, {"z_loss": 0.01}])
def test_smoothing_and_z_loss_are_for_training_only(
    decoder: Decoder, extra: dict[str, float]
) -> None:
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(8))
    weight = decoder.token_embedding.weight

    def gradient(lm_loss: LMLoss) -> torch.Tensor:
        lm_loss.decoder.zero_grad()
        lm_loss(batch_of(ids))[0].backward()
        assert weight.grad is not None
        return weight.grad.clone()

    with_extra = LMLoss(decoder, **extra)  # type: ignore[arg-type]
    without_extra = gradient(LMLoss(decoder).eval())
    assert torch.equal(gradient(with_extra.eval()), without_extra)
    assert not torch.allclose(gradient(with_extra.train()), without_extra)


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
def test_the_gradient_with_a_teacher_is_that_of_the_plain_formula(
    extra: dict[str, float], path: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1 - W) x cross-entropy of the text + W x cross-entropy to the teacher's distribution; the
    value is that of the text."""
    if path["compiled"] and extra:
        pytest.skip("one compilation is enough")
    for name, rows in (("CPU_CHUNK_BYTES", 7 * V * 8), ("GPU_CHUNK_LOGITS_EAGER", 7 * V)):
        monkeypatch.setattr(f"pretrain.model.loss.{name}", rows)  # 24 targets in 4 chunks
    monkeypatch.setattr("pretrain.model.loss.MIN_CHUNK_ROWS", 1)
    student = random_variant("gpt2").double()
    parts = [random_variant("llama").double(), random_variant("fast").double()]
    teacher = Teacher(Mixture([part.eval() for part in parts], [2.0, 1.0]), 0.3)
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(9))
    batch = batch_of(ids)
    targets = batch.targets.clone()
    targets[1, 9:] = IGNORE_INDEX

    lm_loss = LMLoss(student, **extra)  # type: ignore[arg-type]
    lm_loss.teacher = teacher
    lm_loss.cross_entropy = partial(chunked_cross_entropy, **path)
    nats, count = lm_loss(batch._replace(targets=targets))
    actual = torch.autograd.grad(nats, list(student.parameters()))

    hidden = student(batch.inputs).flatten(0, 1)
    log_p = student.logits(hidden).log_softmax(-1)
    with torch.no_grad():
        q = teacher.decoder.logits(teacher.decoder(batch.inputs)).flatten(0, 1).exp()
    is_valid = targets.flatten() >= 0
    options = {"smoothing": extra.get("label_smoothing", 0.0)}
    of_text, with_z_loss = (
        reference_cross_entropy(hidden, student.head_weight, targets.flatten(), **options, **z)
        for z in ({}, {"z_loss": extra.get("z_loss", 0.0)})
    )
    of_teacher = -((q * log_p).sum(-1) * is_valid).sum()
    plain = 0.7 * of_text + 0.3 * of_teacher + (with_z_loss - of_text)
    expected = torch.autograd.grad(plain, list(student.parameters()))

    assert count == is_valid.sum() == T + 9
    value = reference_cross_entropy(hidden, student.head_weight, targets.flatten())
    torch.testing.assert_close(nats, value, rtol=1e-12, atol=0)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for part in parts for p in part.parameters())

    lm_loss.eval()
    without = torch.autograd.grad(lm_loss(batch)[0], list(student.parameters()))
    lm_loss.teacher = None
    for a, b in zip(
        without, torch.autograd.grad(lm_loss(batch)[0], list(student.parameters())), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("vocab_size", [67, 500])
def test_the_loss_in_bfloat16_is_near_that_in_float32(vocab_size: int) -> None:
    """With uninitialised memory filled with NaN."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 32, generator=generator)
    weight = torch.randn(vocab_size, 32, generator=generator)
    targets = torch.randint(0, vocab_size, (48,), generator=generator)
    results = []
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        for is_bf16 in (False, True):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
                nats = chunked_cross_entropy(leaves[0], leaves[1], targets)
            results.append((nats, *torch.autograd.grad(nats, leaves)))
    finally:
        torch.use_deterministic_algorithms(False)
    fp32, bf16 = results
    torch.testing.assert_close(bf16[0], fp32[0], rtol=2e-3, atol=0)
    for one, other in zip(bf16[1:], fp32[1:], strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


def test_a_probability_that_underflows_has_a_finite_loss(path: dict[str, Any]) -> None:
    """e^-300 is 0 in float32, its logarithm is -300."""
    hidden = torch.tensor([[1.0], [2.0], [0.1]], requires_grad=True)
    weight = torch.linspace(-300, 0, V)[:, None].requires_grad_()
    targets = torch.tensor([0, 1, IGNORE_INDEX])
    nats = chunked_cross_entropy(hidden, weight, targets, **path)
    expected = reference_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nats, expected.double(), rtol=1e-6, atol=0)
    assert 800 < float(nats.detach()) < 1000


def test_the_chunked_loss_never_stores_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits would be 256 MB here, in 1,024 rows."""
    buffer_rows = []

    def recorded(n: int, width: int, *, like: torch.Tensor) -> torch.Tensor:
        buffer_rows.append(n)
        return like.new_empty(n, width)

    monkeypatch.setattr("pretrain.model.loss._padded_rows", recorded)
    hidden = torch.randn(1024, 8, requires_grad=True)
    weight = torch.randn(65_536, 8, requires_grad=True)
    nats = chunked_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64))
    node: Any = nats.grad_fn
    assert max(t.numel() for t in node.saved_tensors) <= weight.numel()
    assert buffer_rows == [512]


def test_no_gradients_are_computed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head's weight requires a gradient."""
    allocated, real = [], torch.zeros_like

    def recorded(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        allocated.append(tuple(tensor.shape))
        return real(tensor, **options)

    monkeypatch.setattr(torch, "zeros_like", recorded)
    hidden, weight = torch.randn(6, 4), nn.Parameter(torch.randn(9, 4))
    with torch.no_grad():
        without_gradients = chunked_cross_entropy(hidden, weight, torch.arange(6))
    assert allocated == []
    with_gradients = chunked_cross_entropy(hidden, weight, torch.arange(6))
    assert allocated == [(9, 4)]
    assert float(without_gradients) == float(with_gradients.detach())
