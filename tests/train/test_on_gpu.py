"""A GPU computes, repeats and resumes what a CPU does, and needs no more memory than it should."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import CASES, T, V, config_of, random_decoder
from pretrain.cli import main
from pretrain.data.batches import MicroBatch
from pretrain.distributed import open_world
from pretrain.generate.sampling import Sampling, generate
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss, chunked_cross_entropy
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.param_groups import build_optimizer
from pretrain.runner.open import load_model
from pretrain.selftest.doctor import losses
from pretrain.train.step import training_steps
from reference import reference_cross_entropy
from runs import assert_same_run
from tiny import TINY

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
FAMILIES = {**CASES, "fast": {"family": "fast", "n_heads": 4}}


def batch(rows: int = 4, *, seed: int = 3) -> MicroBatch:
    ids = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(rows))


def test_initial_weights_equal_those_of_a_cpu() -> None:
    config = config_of("gpt2")
    here, there = (build(config, vocab_size=V, seed=7, device=d) for d in ("cpu", GPU))
    for on_cpu, on_gpu in zip(here.parameters(), there.parameters(), strict=True):
        # Box-Muller in float64, rounded once: the last bit may depend on the device's log.
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_those_of_a_cpu(name: str) -> None:
    decoder = random_decoder(config_of(**FAMILIES[name]))
    answers = []
    for device in (torch.device("cpu"), GPU):
        lm_loss = LMLoss(decoder.to(device)).eval()
        lm_loss.zero_grad()
        if decoder.ngrams is not None:
            decoder.ngrams.sparse_gradients = False
        nats, count = lm_loss(batch().to(device))
        nats.backward()
        gradients = {
            n: p.grad.cpu().clone() for n, p in lm_loss.named_parameters() if p.grad is not None
        }
        answers.append((float(nats), int(count), gradients))
    (nats, count, gradients), (nats_there, count_there, gradients_there) = answers
    assert count == count_there == 4 * T
    assert nats_there == pytest.approx(nats, rel=1e-6)
    # A key's bias has no effect: its gradient is what rounding makes of zero.
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradients_there[parameter], gradient, rtol=1e-4, atol=1e-6 * largest
        )


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-9)])
def test_losses_with_dropout_equal_those_of_a_cpu(dtype: str, bound: float) -> None:
    here, there = (losses(open_world(name), dtype, 16) for name in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=bound)
    assert len(set(here)) == len(here)


@pytest.mark.parametrize("name", ["gpt2", "llama 2 70b", "fast"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_steps_are_close_to_fp32_steps(name: str, optimizer: str) -> None:
    world, found = open_world("cuda"), []
    for precision in ("fp32", "bf16"):
        decoder = build(config_of(**FAMILIES[name]), vocab_size=V, seed=1, device=GPU)
        config = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
        updates = build_optimizer(decoder.named_parameters(), config=config, precision=precision)
        reports = training_steps(
            LMLoss(decoder),
            updates,
            lambda step: [batch()],
            lr_at=lambda step: 3e-3,
            steps=20,
            clip=1.0,
            world=world,
            precision=precision,
        )
        found.append([report.nats_per_token for report in reports])
    fp32, bf16 = found
    assert fp32[-1] < fp32[0] - 0.5
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_chunked_loss_equals_reference(dtype: torch.dtype, bound: float, compiled: bool) -> None:
    """An odd vocabulary, more than a chunk of rows, targets that do not count."""
    generator = torch.Generator().manual_seed(0)
    rows, odd, width = 11_000, 50_257, 64
    hidden = torch.randn(rows, width, generator=generator).to(GPU, torch.float64)
    weight = (0.1 * torch.randn(odd, width, generator=generator)).to(GPU, torch.float64)
    targets = torch.randint(0, odd, (rows,), generator=generator).to(GPU)
    targets[::7] = -100

    def answer(function: Any, as_type: torch.dtype) -> list[Tensor]:
        hidden_ND = hidden.to(as_type).requires_grad_()
        weight_VD = weight.to(torch.promote_types(as_type, torch.float32)).requires_grad_()
        nats = function(hidden_ND, weight_VD, targets)
        return [nats.detach(), *torch.autograd.grad(nats, (hidden_ND, weight_VD))]

    expected = answer(reference_cross_entropy, torch.float64)
    found = answer(partial(chunked_cross_entropy, compiled=compiled), dtype)
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < bound


def test_full_logits_are_never_in_memory() -> None:
    """They would take 3.3 GB in bfloat16, and as much for their gradients; a chunk's take 0.8."""
    vocabulary, width = 50_257, 64
    hidden = torch.randn(32_768, width, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=GPU, requires_grad=True)
    targets = torch.randint(0, vocabulary, (len(hidden),), device=GPU)
    for rows in (4096, len(hidden)):
        torch.cuda.reset_peak_memory_stats()
        nats = chunked_cross_entropy(hidden[:rows], weight, targets[:rows], compiled=True)
        torch.autograd.grad(nats, (hidden, weight))
    assert torch.cuda.max_memory_allocated() < 2e9


def test_greedy_texts_equal_those_of_a_cpu(finished_run: Path) -> None:
    texts = []
    for device in ("cpu", "cuda"):
        model = load_model(str(finished_run), device=device)
        sampling = Sampling(temperature=0.0)
        texts.append(
            generate(model.decoder, model.tokenizer, "The", max_tokens=20, sampling=sampling)
        )
    assert texts[0] == texts[1]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_run(
    corpus: Path, tmp_path: Path, precision: str, compiled: str
) -> None:
    args = [str(corpus), *TINY, "--train.device", "cuda", "--train.deterministic", "true"]
    args += ["--train.precision", precision, "--train.compile", compiled, "--train.steps", "8"]
    args += ["--train.evaluate_every", "4", "--model.dropout", "0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *args, "--run", str(whole)]) == 0
    shutil.copytree(whole, parts)
    for name in ("summary.json", "baselines.json"):
        (parts / name).unlink()
    shutil.rmtree(parts / "checkpoints" / "step-00000008")
    assert main(["train", "--resume", "--run", str(parts)]) == 0
    assert_same_run(whole, parts)
    ends = [json.loads((run / "summary.json").read_text()) for run in (whole, parts)]
    assert ends[0]["val_nats_per_token"] == ends[1]["val_nats_per_token"]
    assert math.isfinite(ends[0]["val_nats_per_token"])


def test_more_processes_than_gpus_are_rejected(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    n = torch.cuda.device_count() + 1
    args = [str(corpus), *TINY, "--parallel.processes", str(n), "--run", str(tmp_path / "run")]
    assert main(["train", *args, "--train.device", "cuda"]) == 2
    assert f"{n} processes" in capsys.readouterr().err
