"""The decoder and its objective: causality, the formula itself, the fast loss against the plain
one, randomness."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles import config_of, random_decoder
from pretrain.data.batches import MicroBatch
from pretrain.model import (
    Decoder,
    KeyValueCache,
    LMLoss,
    ModelConfig,
    build,
    fused,
    n_parameters,
)
from pretrain.model.config import model_defaults
from pretrain.model.decoder import initial_value
from pretrain.model.dropout import DropoutRng
from pretrain.model.families import FAMILIES, PRESETS
from pretrain.model.loss import (
    IGNORE_INDEX,
    chunked_cross_entropy,
    reference_cross_entropy,
)
from pretrain.model.ngrams import NgramEmbedding, induction_ids, ngram_hashes
from pretrain.model.rope import rope_cos_sin
from pretrain.rng import float64_device, normal, philox, uniform

V, T = 61, 12


def config(family: str, **changes: Any) -> ModelConfig:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": T}
    return ModelConfig(**{**model_defaults({"family": family}), **sizes, **changes})


def batch_of(ids: torch.Tensor, first_sample: int = 0) -> MicroBatch:
    samples = torch.arange(first_sample, first_sample + len(ids))
    return MicroBatch(ids[:, :-1], ids[:, 1:], samples)


VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {"family": "transformer", "dropout": 0.0},
    "gpt": {"family": "gpt", "dropout": 0.0},
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama"},
    "llama-grouped": {"family": "llama", "n_kv_heads": 2},
    "llama-stretched": {"family": "llama", "rope_factor": 4.0, "rope_original_context": 6},
    "llama-with-biases": {"family": "llama", "bias": "query_key_value", "tied_head": True},
    "fast": {"family": "fast", "ngram_rows": 97},
}


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A small decoder whose every parameter matters: those that start at zero are moved."""
    decoder = build(config(**VARIANTS[request.param]), vocab_size=V, seed=3)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if p.ndim == 2 and not p.any():
                p.copy_(normal(1, name, 0, p.numel(), device=p.device).view_as(p) * 0.05)
    return decoder


def test_no_logit_before_a_token_hangs_on_it(decoder: Decoder) -> None:
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
    before = decoder.logits(decoder(ids))
    for j in range(T):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % V
        after = decoder.logits(decoder(changed))
        assert torch.equal(before[:, :j], after[:, :j])
        assert not torch.allclose(before[:, j:], after[:, j:])


def test_the_loss_is_the_sum_of_log_probabilities_of_the_formula(decoder: Decoder) -> None:
    """L(X) = sum_i log p(x_{i+1} | x_{i-k}, ..., x_i), by brute force over explicit contexts.

    k + 1 is the number of ids that a prediction looks back on: all ids of the window up to x_i, so
    1 for the first target of a window and T, the context length, for its last. k is thus at most T
    - 1.
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


def test_targets_that_are_not_counted_add_nothing(decoder: Decoder) -> None:
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(2))
    batch = batch_of(ids)
    targets = batch.targets.clone()
    targets[:, T // 2 :] = IGNORE_INDEX
    nats, count = LMLoss(decoder)(batch._replace(targets=targets))
    shorter, shorter_count = LMLoss(decoder)(batch_of(ids[:, : T // 2 + 1]))
    assert count == shorter_count == 2 * (T // 2)
    assert float(nats) == pytest.approx(float(shorter), rel=1e-6)


WAYS = ["a CPU's", "a GPU's", "a GPU's, compiled"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How the loss walks over the rows, whatever the device here; compiled once, for one shape."""
    monkeypatch.setattr("pretrain.model.loss.CPU_BLOCK_LOGITS", 3 * V)
    if request.param != WAYS[0]:
        monkeypatch.setattr("pretrain.model.loss.uses_cpu_path", lambda device: False)
    if request.param == WAYS[2] and not compiler_works():
        pytest.skip("torch compiles nothing here")
    return {"compiled": request.param == WAYS[2]}


@lru_cache
def compiler_works() -> bool:
    """Whether torch finds a C++ compiler, and can link what that makes: not in a folder whose name
    has a space."""
    from torch._dynamo.exc import BackendCompilerFailed  # also of what its cache has

    try:
        torch.compile(torch.sin)(torch.ones(2))
    except BackendCompilerFailed:
        return False
    return True


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_chunked_loss_equals_the_plain_one(
    rows: int, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way["compiled"] and rows != 64:
        pytest.skip("each number of rows is compiled anew, which takes seconds")
    monkeypatch.setattr("pretrain.model.loss.CPU_CHUNK_BYTES", rows * V * 8)
    monkeypatch.setattr("pretrain.model.loss.GPU_CHUNK_LOGITS_EAGER", rows * V)
    monkeypatch.setattr("pretrain.model.loss.MIN_CHUNK_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (40,), generator=generator)
    targets[5], targets[39] = IGNORE_INDEX, IGNORE_INDEX
    results = []
    functions: list[Any] = [partial(chunked_cross_entropy, **way), reference_cross_entropy]
    for function in functions:
        nats = function(hidden, weight, targets)
        results.append((nats, *torch.autograd.grad(3 * nats, (hidden, weight))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "fast"])
def test_layers_that_read_the_same_are_one_product_on_a_gpu(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family, n_kv_heads=2) if family == "llama" else config_of(family)
    decoder = random_decoder(config, vocab_size=V).double()
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(4))
    answers = []
    for joins in (False, True):
        monkeypatch.setattr(
            "pretrain.model.layers._prefers_one_matmul", lambda x, joins=joins: joins
        )
        nats, _ = LMLoss(decoder)(batch_of(ids))
        parameters = [p for n, p in decoder.named_parameters() if "ngrams" not in n]
        answers.append([nats, *torch.autograd.grad(nats, parameters)])
    for separate, joint in zip(*answers, strict=True):
        torch.testing.assert_close(joint, separate, rtol=1e-10, atol=1e-10)
    products = []

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        products.append(weight.shape)
        return fused.linear(x, weight, bias)

    monkeypatch.setattr("pretrain.model.layers.linear", counting)
    LMLoss(decoder)(batch_of(ids))
    assert len(products) == 4 * config.n_layers


@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_fused_functions_and_their_gradients_equal_the_plain_ones(epsilon: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(3, 4, 5, 8, generator=generator, dtype=torch.float64)
    angles = rope_cos_sin(torch.arange(5), config_of("llama"))

    def pairs() -> list[list[tuple[Any, ...]]]:
        turned = x.transpose(1, 2)  # as queries and keys come
        norms = [f(turned, weight, epsilon) for f in (fused.rms_norm, fused.reference_rms_norm)]
        bare = [f(turned, None, epsilon) for f in (fused.rms_norm, fused.reference_rms_norm)]
        squares = [f(turned) for f in (fused.squared_relu, fused.reference_squared_relu)]
        rotated = [f(turned, *angles) for f in (fused.apply_rope, fused.reference_apply_rope)]
        return [
            [(y, *torch.autograd.grad(y, leaves, slope, allow_unused=True)) for y in both]
            for both, leaves in (
                (norms, (x, weight)),
                (bare, (x,)),
                (squares, (x,)),
                (rotated, (x,)),
            )
        ]

    for ours, plain in pairs():
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with_gradients = fused.rms_norm(x, weight, epsilon)
    rotated = fused.apply_rope(x.transpose(1, 2), *angles)
    with torch.no_grad():  # other paths, of the same bits
        assert torch.equal(fused.rms_norm(x, weight, epsilon), with_gradients)
        assert torch.equal(fused.apply_rope(x.transpose(1, 2), *angles), rotated)


@pytest.mark.parametrize("extra", [{"smoothing": 0.1}, {"z_loss": 0.01}])
def test_what_is_added_to_the_objective_changes_gradients_and_never_nats(
    extra: dict[str, Any], way: dict[str, Any]
) -> None:
    if way["compiled"]:
        pytest.skip("one compilation, without them, is enough")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (40,), generator=generator)
    targets[5] = IGNORE_INDEX
    nats = chunked_cross_entropy(hidden, weight, targets, **extra, **way)
    plain = reference_cross_entropy(hidden, weight, targets)
    whole = reference_cross_entropy(hidden, weight, targets, **extra)
    torch.testing.assert_close(nats, plain, rtol=1e-12, atol=0)
    assert float(whole.detach()) != pytest.approx(float(plain.detach()))
    for ours, torchs in zip(
        torch.autograd.grad(nats, (hidden, weight)),
        torch.autograd.grad(whole, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [{"label_smoothing": 0.1}, {"z_loss": 0.01}])
def test_what_is_added_to_the_objective_ends_with_training(
    decoder: Decoder, extra: dict[str, float]
) -> None:
    ids = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(8))
    weight = decoder.token_embedding.weight

    def slope(lm_loss: LMLoss) -> torch.Tensor:
        lm_loss.decoder.zero_grad()
        lm_loss(batch_of(ids))[0].backward()
        assert weight.grad is not None
        return weight.grad.clone()

    whole = LMLoss(decoder, **extra)  # type: ignore[arg-type]
    plain = slope(LMLoss(decoder).eval())
    assert torch.equal(slope(whole.eval()), plain)
    assert not torch.allclose(slope(whole.train()), plain)


@pytest.mark.parametrize("vocab_size", [67, 500])
def test_in_bfloat16_the_loss_is_nearly_what_it_is(vocab_size: int) -> None:
    """Also where memory that nobody has written holds numbers that are none."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 32, generator=generator)
    weight = torch.randn(vocab_size, 32, generator=generator)
    targets = torch.randint(0, vocab_size, (48,), generator=generator)
    found = []
    torch.use_deterministic_algorithms(True)  # fills it so
    try:
        for is_narrow in (False, True):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow):
                nats = chunked_cross_entropy(leaves[0], leaves[1], targets)
            found.append((nats, *torch.autograd.grad(nats, leaves)))
    finally:
        torch.use_deterministic_algorithms(False)
    exact, narrow = found
    torch.testing.assert_close(narrow[0], exact[0], rtol=2e-3, atol=0)
    for one, other in zip(narrow[1:], exact[1:], strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


def test_a_target_too_unlikely_for_a_number_still_has_its_nats(way: dict[str, Any]) -> None:
    """e^-300 is no float32, and its logarithm is."""
    hidden = torch.tensor([[1.0], [2.0], [0.1]], requires_grad=True)
    weight = torch.linspace(-300, 0, V)[:, None].requires_grad_()
    targets = torch.tensor([0, 1, IGNORE_INDEX])
    nats = chunked_cross_entropy(hidden, weight, targets, **way)
    plain = reference_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nats, plain.double(), rtol=1e-6, atol=0)
    assert 800 < float(nats.detach()) < 1000


def test_the_chunked_loss_never_has_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole logits would be 256 MB here, in 1,024 rows."""
    rooms = []

    def room(n: int, width: int, *, like: torch.Tensor) -> torch.Tensor:
        rooms.append(n)
        return like.new_empty(n, width)

    monkeypatch.setattr("pretrain.model.loss._padded_rows", room)
    hidden = torch.randn(1024, 8, requires_grad=True)
    weight = torch.randn(65_536, 8, requires_grad=True)
    nats = chunked_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64))
    node: Any = nats.grad_fn
    assert max(t.numel() for t in node.saved_tensors) <= weight.numel()
    assert rooms == [512]


def test_onednn_is_for_processors_that_are_not_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    for name, takes in (("Intel Xeon", False), ("AMD EPYC", is_there), (None, is_there)):
        known = {} if name is None else {"cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert fused._prefers_onednn.__wrapped__() == takes


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_by_onednn_is_torchs_own(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "MIN_ROWS", 1)
    is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: is_there)
    generator = torch.Generator().manual_seed(0)
    # Not contiguous, as what attention has mixed comes.
    x = torch.randn(2, 3, 5, 24, generator=generator).transpose(1, 2).requires_grad_()
    weight = torch.randn(40, 24, generator=generator, requires_grad=True)
    bias = torch.randn(40, generator=generator, requires_grad=True) if has_bias else None
    leaves = (x, weight) if bias is None else (x, weight, bias)
    slope = torch.randn(2, 40, 5, 3, generator=generator).permute(0, 2, 3, 1)
    product = fused.linear(x, weight, bias)
    if is_there:
        assert type(product.grad_fn).__name__ == "_LinearBackward"
    ours = [product, *torch.autograd.grad(product, leaves, slope)]
    monkeypatch.setattr(fused, "_prefers_onednn", lambda: False)
    plain = fused.linear(x, weight, bias)
    theirs = [plain, *torch.autograd.grad(plain, leaves, slope)]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_cache_changes_nothing(decoder: Decoder) -> None:
    decoder.double()
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(3))
    whole = decoder(ids)
    for cuts in ([5, 1, 1, 5], [1] * T, [3, 4, 5]):
        cache, parts, start = KeyValueCache(), [], 0
        for length in cuts:
            parts.append(decoder(ids[:, start : start + length], cache=cache))
            start += length
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("longest", [2, 3, 6])
def test_ngram_tables_hang_on_the_last_ids_alone(longest: int) -> None:
    chosen = config("fast", d_model=8, ngram_rows=1009, longest_ngram=longest, induction=0)
    embedding = NgramEmbedding(chosen, V)
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            p.copy_(normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    ids = torch.randint(0, V, (1, 30), generator=torch.Generator().manual_seed(6))
    nothing = ids[:, :0]
    whole = embedding(ids, nothing)
    for t in range(longest, 30):
        torch.testing.assert_close(embedding(ids[:, t : t + 1], ids[:, :t])[0, 0], whole[0, t])
        for back in range(1, longest + 1):
            changed = ids.clone()
            changed[0, t - back] = (changed[0, t - back] + 1) % V
            is_equal = torch.equal(embedding(changed, nothing)[0, t], whole[0, t])
            assert is_equal is (back == longest)


def test_ngrams_that_share_a_part_of_their_embedding_share_no_other() -> None:
    embedding = NgramEmbedding(config("fast", n_heads=4, ngram_rows=1009), V)
    grams = torch.randint(0, 4096, (5000, 3), generator=torch.Generator().manual_seed(8))
    rows = embedding._table_rows(ngram_hashes(torch.unique(grams, dim=0), 3)[:, -1])
    assert torch.equal(rows // 1009, torch.arange(4).expand(len(rows), 4))
    pairs = torch.combinations(torch.arange(len(rows)))
    is_shared = rows[pairs[:, 0]] == rows[pairs[:, 1]]
    once = len(pairs) / 1009
    for part in range(4):
        assert len(torch.unique(rows[:, part])) > 980  # nearly every row is used
        assert int(is_shared[:, part].sum()) == pytest.approx(once, rel=0.1)
    assert int((is_shared.sum(1) > 1).sum()) < 2 * 6 * once / 1009  # six pairs of parts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiler_finds_the_same_rows(device: str) -> None:
    """Its integers must be as wide as those of what it did not make, which held-out text meets."""
    if not compiler_works():
        pytest.skip("torch compiles nothing here")
    embedding = NgramEmbedding(config("fast", n_heads=8, d_model=16, ngram_rows=1009), V)
    with torch.no_grad():
        for name, p in embedding.named_parameters():
            p.copy_(normal(2, name, 0, p.numel(), device=p.device).view_as(p))
    ids = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(6))
    plain = embedding(ids, ids[:, :0])
    compiled = torch.compile(embedding.to(device), dynamic=False)
    found = compiled(ids.to(device), ids[:, :0].to(device)).cpu()
    torch.testing.assert_close(found, plain)


def test_what_followed_the_last_ids_is_found_where_they_last_stood() -> None:
    ids = torch.randint(0, 4, (3, 40), generator=torch.Generator().manual_seed(7))
    for n in (1, 2, 3):
        found = induction_ids(ids, n)
        for row, t in itertools.product(range(3), range(40)):
            text = ids[row].tolist()
            places = [
                j for j in range(n - 1, t) if text[j + 1 - n : j + 1] == text[t + 1 - n : t + 1]
            ]
            wanted = text[places[-1] + 1] + 1 if places and t >= n - 1 else 0
            assert int(found[row, t]) == wanted
    assert 0 < int((induction_ids(ids, 3) > 0).sum()) < int((induction_ids(ids, 1) > 0).sum())


def test_more_ids_than_the_context_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="13 ids do not fit the context: there must be at most 12"):
        decoder(torch.zeros(1, T + 1, dtype=torch.int64))


# GPT-2's four sizes as counted in its released weights, GPT's in its own, Llama's as in its model
# cards and released weights. For `transformer` nobody published a decoder alone: the count is that
# of table 3 of the paper for one stack of six, without the attention to an encoder.
PARAMETERS = {
    "transformer-base": (37_000, 37_846_016),
    "transformer-big": (37_000, 113_440_768),
    "gpt": (40_478, 116_534_784),
    "gpt2-124m": (50_257, 124_439_808),
    "gpt2-355m": (50_257, 354_823_168),
    "gpt2-774m": (50_257, 774_030_080),
    "gpt2-1558m": (50_257, 1_557_611_200),
    "llama-7b": (32_000, 6_738_415_616),
    "llama-13b": (32_000, 13_015_864_320),
    "llama-33b": (32_000, 32_528_943_616),
    "llama-65b": (32_000, 65_285_660_672),
    "llama2-7b": (32_000, 6_738_415_616),
    "llama2-13b": (32_000, 13_015_864_320),
    "llama2-70b": (32_000, 68_976_648_192),
    "llama3-8b": (128_256, 8_030_261_248),
    "llama3-70b": (128_256, 70_553_706_496),
    "llama3.1-8b": (128_256, 8_030_261_248),
    "llama3.1-70b": (128_256, 70_553_706_496),
    "llama3.1-405b": (128_256, 405_853_388_800),
    "llama3.2-1b": (128_256, 1_235_814_400),
    "llama3.2-3b": (128_256, 3_212_749_824),
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    vocab_size, parameters = PARAMETERS[preset]
    chosen = ModelConfig(
        **{"context_length": 512, **model_defaults({"preset": preset}), "preset": preset}
    )
    with torch.device("meta"):
        decoder = Decoder(chosen, vocab_size=vocab_size)
    assert sum(p.numel() for p in decoder.parameters()) == parameters
    assert n_parameters(chosen, vocab_size=vocab_size) == parameters
    row = f"| {preset} | {parameters:,} | {vocab_size:,} |"
    page = Path(__file__).parents[2] / "docs/internals/model.md"
    assert row in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameters_are_counted_without_building(changes: dict[str, Any]) -> None:
    chosen = config(**changes)
    with torch.device("meta"):
        decoder = Decoder(chosen, vocab_size=V)
    assert n_parameters(chosen, vocab_size=V) == sum(p.numel() for p in decoder.parameters())


def test_every_preset_is_in_the_table_above() -> None:
    assert set(PRESETS) == set(PARAMETERS)


def test_a_preset_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gpt2-124m is of the family gpt2, but .* llama"):
        model_defaults({"preset": "gpt2-124m", "family": "llama"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "d_model 32 is not a multiple of model.n_heads 5"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of model.n_kv_heads 3"),
        ({"n_layers": 0}, r"n_layers is 0; it must be in \[1, 10000\]"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"d_model": 36}, "even head width"),
        ({"rope_low_factor": 4.0}, "rope_low_factor is 4.0; it must be below"),
        ({"rope_factor": 0.0}, "rope_factor is 0.0; it must be above 0"),
        ({"position": "sinusoidal", "d_model": 33, "n_heads": 3}, "even model.d_model, not 33"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("llama", **changes)


def test_philox_gives_the_published_answers() -> None:
    """The known answers that Random123 ships for philox4x32-10."""

    def words(counter: int, key: int) -> list[int]:
        c = torch.tensor([counter])
        return [int(w) for w in philox([c, c, c, c], (key, key))]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words(ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_any_slice_of_a_normal_sequence_is_the_same_slice() -> None:
    cpu = torch.device("cpu")
    whole = normal(5, "name", 0, 1003, device=cpu)
    for start, stop in ((0, 1003), (1, 2), (517, 530), (4, 8), (1000, 1003)):
        assert torch.equal(normal(5, "name", start, stop, device=cpu), whole[start:stop])
    long = normal(5, "name", 0, 200_000, device=cpu)
    assert abs(float(long.mean())) < 0.01
    assert float(long.std()) == pytest.approx(1.0, abs=0.01)
    assert float((long.abs() > 3).float().mean()) == pytest.approx(0.0027, abs=0.0006)


def test_random_numbers_are_made_where_there_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of MPS, which is not here, stands the CPU, and in place of the CPU a device without
    memory, from which nothing can be brought back."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_are_a_function_of_seed_and_name(family: str) -> None:
    chosen = config(family, n_layers=8)
    one, same, other = (build(chosen, vocab_size=V, seed=s) for s in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(
        *(d.named_parameters() for d in (one, same, other)), strict=True
    ):
        assert torch.equal(a, b)
        writes = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        if a.ndim == 1:
            assert bool((a == (0.0 if name.endswith("bias") else 1.0)).all())
            continue
        if name.startswith("ngrams.") or (writes and family == "fast"):
            assert not a.any()
            continue
        assert not torch.equal(a, c)
        expected = 0.02
        if family == "transformer":
            # A uniform number in [-b, b] has the variance b^2 / 3.
            expected = 32**-0.5 if "embedding" in name else math.sqrt(2 / sum(a.shape))
        elif family == "gpt2" and writes:
            expected /= math.sqrt(2 * 8)
        assert float(a.detach().std()) == pytest.approx(expected, rel=0.15)
        if family == "transformer" and "embedding" not in name:
            assert float(a.detach().abs().max()) <= math.sqrt(6 / sum(a.shape))
        part = initial_value(chosen, name, a.shape, 7, 19, seed=1, device=torch.device("cpu"))
        assert torch.equal(part, a.detach().flatten()[7:19])


def test_dropout_hangs_on_the_sample_and_not_on_its_neighbours() -> None:
    decoder = build(config("gpt2", dropout=0.3), vocab_size=V, seed=1)
    lm_loss = LMLoss(decoder, seed=9).train()
    ids = torch.randint(0, V, (4, T + 1), generator=torch.Generator().manual_seed(4))
    together = float(lm_loss(batch_of(ids, 10))[0])
    apart = sum(float(lm_loss(batch_of(ids[i : i + 1], 10 + i))[0]) for i in range(4))
    assert together == pytest.approx(apart, rel=1e-6)
    assert together == float(lm_loss(batch_of(ids, 10))[0])
    assert together != pytest.approx(float(lm_loss(batch_of(ids, 11))[0]), rel=1e-6)
    quiet = float(lm_loss.eval()(batch_of(ids, 10))[0])
    assert quiet == float(lm_loss(batch_of(ids, 11))[0])


def test_a_dropout_mask_keeps_its_share_and_its_scale() -> None:
    keep = DropoutRng(1, torch.arange(50)).mask((50, 8, 64), 0.25, layer=1, dropout_id=2)
    assert float((keep == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(keep.max()) == pytest.approx(1 / 0.75)
    other = DropoutRng(1, torch.arange(50)).mask((50, 8, 64), 0.25, layer=2, dropout_id=2)
    assert float((keep == other).float().mean()) == pytest.approx(0.625, abs=0.02)


def test_attention_with_and_without_noise_agrees_when_nothing_is_dropped(decoder: Decoder) -> None:
    decoder.double()
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        decoder(ids, dropout_rng=DropoutRng(1, torch.arange(2))), decoder(ids), rtol=1e-6, atol=1e-7
    )


def test_what_nobody_goes_back_through_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's weight asks for them also where an evaluation does not."""
    made, real = [], torch.zeros_like

    def counted(tensor: torch.Tensor, **named: Any) -> torch.Tensor:
        made.append(tuple(tensor.shape))
        return real(tensor, **named)

    monkeypatch.setattr(torch, "zeros_like", counted)
    hidden, weight = torch.randn(6, 4), nn.Parameter(torch.randn(9, 4))
    with torch.no_grad():
        without = chunked_cross_entropy(hidden, weight, torch.arange(6))
    assert made == []
    with_them = chunked_cross_entropy(hidden, weight, torch.arange(6))
    assert made == [(9, 4)]
    assert float(without) == float(with_them.detach())
