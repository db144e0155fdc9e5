"""N-gram and induction embeddings of the family `fast`."""

from __future__ import annotations

import itertools

import pytest
import torch

from model_variants import V, compiler_works, small_config
from pretrain.model.dropout import DropoutRng
from pretrain.model.ngrams import NgramEmbedding, induction_ids, ngram_hashes
from pretrain.rng import normal


@pytest.mark.parametrize("longest", [2, 3, 6])
def test_ngram_embeddings_depend_on_the_last_ids_alone(longest: int) -> None:
    config = small_config("fast", d_model=8, ngram_rows=1009, longest_ngram=longest, induction=0)
    embedding = NgramEmbedding(config, V)
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            p.copy_(normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    ids = torch.randint(0, V, (1, 30), generator=torch.Generator().manual_seed(6))
    no_ids = ids[:, :0]
    expected = embedding(ids, no_ids)
    for t in range(longest, 30):
        torch.testing.assert_close(embedding(ids[:, t : t + 1], ids[:, :t])[0, 0], expected[0, t])
        for back in range(1, longest + 1):
            changed = ids.clone()
            changed[0, t - back] = (changed[0, t - back] + 1) % V
            is_equal = torch.equal(embedding(changed, no_ids)[0, t], expected[0, t])
            assert is_equal is (back == longest)


def test_table_dropout_drops_whole_embeddings_by_sample_in_training_alone() -> None:
    config = small_config("fast", d_model=8, ngram_rows=1009, longest_ngram=4, table_dropout=0.4)
    embedding = NgramEmbedding(config, V)
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            p.copy_(normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    ids = torch.randint(0, V, (3, 30), generator=torch.Generator().manual_seed(6))
    no_ids = ids[:, :0]
    rng = DropoutRng(1, torch.tensor([5, 6, 7]))
    dropped = embedding(ids, no_ids, rng)
    alone = embedding(ids[1:2], no_ids[1:2], DropoutRng(1, torch.tensor([6])))
    torch.testing.assert_close(dropped[1:2], alone)
    # Each of the three tables is there, 1 / 0.6 times as large, or not; induction always is.
    without = NgramEmbedding(small_config("fast", d_model=8, ngram_rows=0), V)
    without.recalled.load_state_dict(embedding.recalled.state_dict())
    mask = rng.mask((3, 30, 3), 0.4, layer=0, dropout_id=4)
    assert float((mask == 0).float().mean()) == pytest.approx(0.4, abs=0.1)
    is_bare = (mask == 0).all(-1)
    assert is_bare.any()
    bare = without(ids, no_ids)[is_bare]
    torch.testing.assert_close(dropped[is_bare], bare)
    assert not torch.isclose(dropped, without(ids, no_ids))[~is_bare].all(-1).any()
    assert torch.equal(embedding(ids, no_ids), embedding(ids, no_ids, None))


def test_ngrams_that_share_one_part_share_no_other() -> None:
    embedding = NgramEmbedding(small_config("fast", n_heads=4, ngram_rows=1009), V)
    grams = torch.randint(0, 4096, (5000, 3), generator=torch.Generator().manual_seed(8))
    rows = embedding._table_rows(ngram_hashes(torch.unique(grams, dim=0), 3)[:, -1])
    assert torch.equal(rows // 1009, torch.arange(4).expand(len(rows), 4))
    pairs = torch.combinations(torch.arange(len(rows)))
    is_shared = rows[pairs[:, 0]] == rows[pairs[:, 1]]
    n_shared = len(pairs) / 1009
    for part in range(4):
        assert len(torch.unique(rows[:, part])) > 980  # nearly all rows are used
        assert int(is_shared[:, part].sum()) == pytest.approx(n_shared, rel=0.1)
    assert int((is_shared.sum(1) > 1).sum()) < 2 * 6 * n_shared / 1009  # six pairs of parts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_ngram_embeddings_are_the_same(device: str) -> None:
    """Compiled integers must be as wide: training is compiled, evaluation is not."""
    if not compiler_works():
        pytest.skip("torch compiles nothing here")
    embedding = NgramEmbedding(small_config("fast", n_heads=8, d_model=16, ngram_rows=1009), V)
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            p.copy_(normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    ids = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(6))
    expected = embedding(ids, ids[:, :0])
    compiled = torch.compile(embedding.to(device), dynamic=False)
    result = compiled(ids.to(device), ids[:, :0].to(device)).cpu()
    torch.testing.assert_close(result, expected)


def test_induction_ids_follow_the_previous_occurrence() -> None:
    ids = torch.randint(0, 4, (3, 40), generator=torch.Generator().manual_seed(7))
    for n in (1, 2, 3):
        result = induction_ids(ids, n)
        for row, t in itertools.product(range(3), range(40)):
            text = ids[row].tolist()
            earlier = [
                j for j in range(n - 1, t) if text[j + 1 - n : j + 1] == text[t + 1 - n : t + 1]
            ]
            expected = text[earlier[-1] + 1] + 1 if earlier and t >= n - 1 else 0
            assert int(result[row, t]) == expected
    assert 0 < int((induction_ids(ids, 3) > 0).sum()) < int((induction_ids(ids, 1) > 0).sum())
