"""Lookup tables: row-wise Adagrad equals its formula, sparse gradients equal dense ones."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config import compose
from pretrain.data.batches import MicroBatch
from pretrain.distributed import open_world
from pretrain.model.decoder import build
from pretrain.model.loss import LMLoss
from pretrain.optim.config import OptimizerConfig
from pretrain.optim.param_groups import (
    LOOKUP_LR_MULT,
    adagrad_update,
    build_optimizer,
    clip_gradients,
    role_of,
    set_learning_rate,
)
from pretrain.train.step import training_steps


def test_adagrad_update_equals_its_formula() -> None:
    table, squares = torch.zeros(3, 2), torch.zeros(3)
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    for gradient in (first, second):
        adagrad_update(
            table, squares, torch.stack([torch.zeros(2), gradient, torch.zeros(2)]), lr=0.1
        )
    # Mean squares of the two gradients: 12.5 and 0.5.
    expected = -0.1 * (first / math.sqrt(12.5) + second / math.sqrt(13.0))
    torch.testing.assert_close(table[1], expected)
    assert squares.tolist() == [0.0, 13.0, 0.0]
    assert not table[[0, 2]].any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sparse_gradients_train_as_dense_ones(name: str) -> None:
    """With clipping."""
    section = {"family": "fast", "d_model": 32, "context_length": 8, "n_layers": 1}
    model = compose([{"model": {**section, "ngram_rows": 61}}]).model
    config = OptimizerConfig(name=name, embedding_lr_mult=2.0)  # type: ignore[arg-type]
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    micro_batches = [
        MicroBatch(ids[i : i + 2, :-1], ids[i : i + 2, 1:], torch.arange(i, i + 2)) for i in (0, 2)
    ]
    histories, tables = [], []
    for sparse in (True, False):
        decoder = build(model, vocab_size=20, seed=1)
        assert decoder.ngrams is not None
        assert decoder.ngrams.sparse_gradients
        decoder.ngrams.sparse_gradients = sparse
        reports = training_steps(
            LMLoss(decoder),
            build_optimizer(decoder.named_parameters(), config=config),
            lambda step: micro_batches,
            lr_at=lambda step: 1e-2,
            steps=12,
            clip=0.5,
            world=open_world("cpu", threads=1),
        )
        histories.append([(r.nats, r.grad_norm) for r in reports])
        tables.append(decoder.get_parameter("ngrams.parts.2.weight").detach())
    # The norm is one sum over more or fewer zeros, so the last bit of clipping may differ.
    assert torch.tensor(histories[0]) == pytest.approx(torch.tensor(histories[1]), rel=1e-5)
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-4, atol=1e-6)
    assert 0 < int((tables[0].abs().sum(1) > 0).sum()) < 61
    assert histories[0][-1][0] < histories[0][0][0] / 2


@pytest.mark.parametrize("batch_tokens", [256, 4096])
def test_the_first_update_of_a_row_depends_on_its_gradient(batch_tokens: int) -> None:
    """Twice a small gradient is nearly twice the update, with any batch size."""
    config = OptimizerConfig(name="muon", embedding_lr_mult=1.0)
    updates = []
    for gradient in (0.1, 0.2, 50.0):
        table = torch.nn.Parameter(torch.zeros(3, 4))
        optimizer = build_optimizer(
            [("ngrams.parts.2.weight", table)], config=config, batch_tokens=batch_tokens
        )
        set_learning_rate(optimizer, 1.0)
        table.grad = torch.zeros(3, 4)
        table.grad[1] = gradient / batch_tokens
        optimizer.step()
        updates.append(float(-table.detach()[1, 0]))
        assert not table[[0, 2]].any()
    assert updates == pytest.approx(
        [LOOKUP_LR_MULT * s / (2 + s * s) ** 0.5 for s in (0.1, 0.2, 50.0)]
    )


def test_lookup_tables_have_their_own_rule_and_lr() -> None:
    model = compose([{"model": {"family": "fast", "d_model": 32, "context_length": 8}}]).model
    decoder = build(model, vocab_size=20, seed=1)
    parameters = list(decoder.named_parameters())
    assert {n for n, p in parameters if role_of(n, p) == "lookup"} == {
        *("ngrams.parts.2.weight", "ngrams.parts.3.weight"),
        *("ngrams.recalled.1.weight", "ngrams.recalled.2.weight"),
    }
    config = OptimizerConfig(name="muon", embedding_lr_mult=3.0, head_lr_mult=0.5)
    optimizer = build_optimizer(parameters, config=config)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: group_of[id(p)] for name, p in parameters}
    assert groups["ngrams.parts.2.weight"]["lr_mult"] == 3.0 * LOOKUP_LR_MULT
    assert groups["ngrams.parts.2.weight"]["weight_decay"] == 0.0
    assert groups["token_embedding.weight"]["lr_mult"] == 3.0
    assert groups["head.weight"]["lr_mult"] == 0.5
    assert groups["blocks.0.attention.query.weight"]["rule"] == "muon"


def test_clipping_coalesces_repeated_rows_of_a_sparse_gradient() -> None:
    table = torch.nn.Parameter(torch.zeros(4, 2))
    rows, values = torch.tensor([[1, 3, 1]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    table.grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    assert clip_gradients([table], max_norm=1.0) == pytest.approx(5.0)
    dense = table.grad.to_dense()
    torch.testing.assert_close(dense[1], torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(dense[3], torch.tensor([0.0, 0.6]))
