"""Where a step's time goes: counts of FLOP against torch's own counter, and shares that add up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.cli import main
from pretrain.data.batches import MicroBatch
from pretrain.model.config import ModelConfig, model_defaults, n_matmul_parameters, training_flops
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.train.profile import Profile, _category, lines
from reference import reference_cross_entropy
from tiny import TINY

V, T = 50, 16


@pytest.mark.parametrize("family", ["gpt2", "llama", "fast"])
def test_flops_equal_torch_flop_counter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch's counter does not know oneDNN's product, nor addmm_ in place.
    monkeypatch.setattr("pretrain.compat._prefers_onednn", lambda: False)
    monkeypatch.setattr(
        "pretrain.model.loss.chunked_cross_entropy",
        lambda *given, **named: reference_cross_entropy(*given),
    )
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "context_length": T}
    grouped = {"n_kv_heads": 2} if family == "llama" else {}
    config = ModelConfig(**{**model_defaults({"family": family}), **sizes, **grouped})
    lm_loss = LMLoss(build(config, vocab_size=V, seed=1))
    ids = torch.randint(0, V, (3, T + 1))
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.arange(3))
    with FlopCounterMode(display=False) as counter:
        lm_loss(batch)[0].backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    assert products == 6 * n_matmul_parameters(config, vocab_size=V) * 3 * T
    attention = 6 * config.n_layers * config.d_model * T
    assert training_flops(config, vocab_size=V) * 3 * T == products + attention * 3 * T


def test_category_of_an_operation() -> None:
    def event(name: str, above: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, cpu_parent=above)

    step = event("Optimizer.step#GroupedOptimizer.step")
    assert _category(event("aten::addmm")) == "matrix products"
    assert _category(event("mkldnn::_linear_pointwise", event("_Linear"))) == "matrix products"
    assert _category(event("aten::bmm", event("aten::matmul", step))) == "optimizer"
    assert _category(step) == "optimizer"
    assert _category(event("aten::_scaled_dot_product_flash_attention_for_cpu")) == "attention"
    assert _category(event("aten::bmm", event("_CausalAttentionBackward"))) == "attention"
    assert _category(event("aten::copy_", event("data"))) == "data"
    assert _category(event("aten::gelu")) == "the rest"


def test_profile_reports_shares_and_writes_no_file(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [str(corpus), *TINY, "--train.threads", "1", "--train.minutes", "5"]
    assert main(["train", *args, "--train.precision", "fp32", "--profile", "--json"]) == 0
    out, people = capsys.readouterr()
    found = json.loads(out)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert set(found["shares"]) == {
        *("matrix products", "attention", "optimizer", "data", "the rest", "Python")
    }
    assert all(share > 0 for name, share in found["shares"].items() if name != "Python")
    speed = found["tokens_per_second"] * found["flops_per_token"]
    assert found["ceiling_share"] == pytest.approx(speed / found["ceiling_flops"])
    assert 0 < found["ceiling_share"] < 1
    assert found["mfu"] is None
    assert "matrix products" in people
    assert "of it" in people
    assert list(tmp_path.iterdir()) == []
    assert main(["train", *args, "--profile", "--run", "here"]) == 2
    assert "--profile must come without" in capsys.readouterr().err


def test_lines_report_mfu() -> None:
    found = Profile(
        shares={"matrix products": 0.75, "waiting": 0.25},
        step_seconds=0.1,
        tokens_per_second=1e5,
        matrix_parameters=10,
        flops_per_token=60,
        ceiling_flops=1e9,
        ceiling_share=0.5,
        mfu=0.25,
        model="",
        machine="",
    )
    text = "\n".join(lines(found))
    assert text.index("75.0%") < text.index("25.0%")
    assert "MFU      25.0%" in text
