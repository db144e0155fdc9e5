"""Several processes compute, save and report what one does, for every family and layout."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parallel_jobs as jobs
from pretrain.cli import main
from pretrain.config import read_file
from pretrain.distributed import open_world
from pretrain.model.config import ModelConfig, model_defaults, n_parameters
from pretrain.parallel.config import ParallelConfig
from pretrain.parallel.deterministic import ReductionTree
from pretrain.runner import start as start_module
from pretrain.runner.checks import check_axes, read_run_config, requested_config
from pretrain.runner.launch import ProcessFailed
from pretrain.runner.start import MAX_RESTARTS, Request, n_processes_of_run
from pretrain.selftest import verify
from pretrain.train import resolve as resolve_page
from pretrain.train.monitor import STRAGGLER_STEPS, StragglerDetector
from processes import Pool

LAYOUTS: dict[str, dict[str, int]] = {
    "ddp 2": {"data": 2},
    "ddp 4": {"data": 4},
    "fsdp 2": {"shard": 2},
    "fsdp 4": {"shard": 4},
    "hsdp": {"data": 2, "shard": 2},
    "tp 2": {"tensor": 2},
    "tp x fsdp": {"shard": 2, "tensor": 2},
    "tp x ddp": {"data": 2, "tensor": 2},
    "cp 2": {"context": 2},
    "cp x tp": {"context": 2, "tensor": 2},
    "pp 2": {"pipeline": 2},
    "pp x fsdp": {"pipeline": 2, "shard": 2},
    "pp x tp": {"pipeline": 2, "tensor": 2},
}
SHORT = [
    ("gpt2", "adamw", layout)
    for layout in ("ddp 2", "fsdp 2", "hsdp", "tp x fsdp", "cp 2", "pp x tp")
]
SHORT += [("fast", "muon", layout) for layout in ("ddp 2", "tp x fsdp", "pp x fsdp")]
SHORT += [("llama", "muon", layout) for layout in ("hsdp", "cp x tp")]
REST = [
    (family, optimizer, layout)
    for family in jobs.FAMILIES
    for optimizer in ("adamw", "muon")
    for layout in LAYOUTS
    if (family, optimizer, layout) not in SHORT
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def assembled(answers: list[dict[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """Full tensors from the slices (bounds, values) of all processes."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for answer in answers for name in answer):
        slices = [answer[name] for answer in answers if name in answer]
        bounds, values = slices[0]
        if not bounds:
            result[name] = values
            continue
        shape = [max(bounds[d][1] for bounds, _ in slices) for d in range(len(bounds))]
        full = np.full(shape, np.nan, values.dtype)
        for bounds, values in slices:
            full[tuple(slice(*pair) for pair in bounds)] = values
        assert not np.isnan(full).any(), f"{name}: {np.isnan(full).sum()} elements in no slice"
        result[name] = full
    return result


def test_muon_with_a_rank_that_has_no_row_of_a_matrix(pool: Pool) -> None:
    check(pool, "thin llama", "muon", "fsdp 4", rows=8, steps=3)


@pytest.mark.parametrize("absent", [0, 2])
def test_all_others_report_the_rank_that_does_not_answer(pool: Pool, absent: int) -> None:
    reports = pool.run(3, jobs.unresponsive_ranks, absent)
    assert reports == ["" if rank == absent else str(absent) for rank in range(3)]


# All together take minutes: these are tested each time.
SHORT_FLOAT32 = [("gpt2", "tp x fsdp")]
REST_FLOAT32 = [
    (family, layout)
    for family in jobs.FAMILIES
    for layout in LAYOUTS
    if (family, layout) not in SHORT_FLOAT32
]


def check_float32(pool: Pool, family: str, layout: str) -> None:
    """Compare the losses of 20 steps of AdamW, and of the evaluations in between."""
    axes = LAYOUTS[layout]
    words: dict[str, Any] = {"steps": 20, "rows": 8}
    single = jobs.train(family, "adamw", **words)
    for answer in pool.run(math.prod(axes.values()), jobs.train, family, "adamw", **words, **axes):
        for name in ("losses", "evaluations"):
            np.testing.assert_allclose(answer[name], single[name], rtol=1e-5)


@pytest.mark.parametrize(("family", "layout"), SHORT_FLOAT32)
def test_20_float32_steps_equal_those_of_one_process(pool: Pool, family: str, layout: str) -> None:
    check_float32(pool, family, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), REST_FLOAT32)
def test_20_float32_steps_in_all_layouts(pool: Pool, family: str, layout: str) -> None:
    check_float32(pool, family, layout)


def test_resolved_sizes_must_be_divisible_by_the_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(**model_defaults({"family": "llama"}))
    model = replace(model, context_length=128)
    axes = ParallelConfig(context=3, processes=3).resolve(3)
    with pytest.raises(
        ValueError, match=r"context_length is 128; it must be a multiple of .*context, 3"
    ):
        resolve_page.check_model_fits(model, axes, vocab_size=100)


def test_memory_check_counts_the_shards_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(**model_defaults({"family": "llama"}))
    full = 8 * n_parameters(model, vocab_size=1000)
    monkeypatch.setattr(resolve_page, "memory_bytes", lambda: full // 2)
    for n_local, fits in ((1, True), (2, True), (3, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_local))
        axes = ParallelConfig(shard=4, processes=4).resolve(4)
        with nullcontext() if fits else pytest.raises(ValueError, match="this machine has"):
            resolve_page.check_model_fits(model, axes, vocab_size=1000)


def written(folder: Path, **parallel: int) -> Path:
    """A run's folder that says no more than how it is laid."""
    model = {"n_heads": 3, "d_model": 48, "d_ff": 96}
    config = {"train": {"steps": 10}, "model": model, "parallel": parallel}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text("{}")
    return folder


def test_resume_combines_stored_and_requested_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written(tmp_path, processes=3, tensor=3)
    stored = read_run_config(run)
    assert n_processes_of_run(stored, {}) == 3
    assert n_processes_of_run(stored, {"parallel": {"tensor": 1}}) == 3
    assert n_processes_of_run(stored, {"parallel": {"processes": 6}}) == 6
    monkeypatch.setenv("WORLD_SIZE", "6")
    requested = requested_config(stored, (), {"parallel": {"processes": 6, "data": 2}})
    assert (requested.parallel.processes, requested.parallel.data) == (6, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"parallel.tensor 3 is 3, and there are 1 processes"):
        check_axes(requested_config(stored, (), {}))


def test_extend_with_impossible_axes_changes_no_file(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = read_file(run / "config.yaml")
    parallel = {**config["parallel"], "processes": 2, "shard": 2}
    (run / "config.yaml").write_text(json.dumps({**config, "parallel": parallel}))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    words = ["extend", str(run), "--train.steps", "24", "--parallel.processes", "1"]
    assert main([*words, "--accept", "parallel.processes"]) == 2
    assert "and there are 1 processes" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert before == after


def test_a_failed_worker_of_verify_is_not_taken_for_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: Any, **options: Any) -> int:
        raise ProcessFailed("the disk is full", 75)

    monkeypatch.setattr(verify, "launch", fails)
    run = written(tmp_path, processes=2)
    assert verify.main([str(run), "--kill-after", "3"]) == 75
    assert "the disk is full" in capsys.readouterr().err


SHORT_BFLOAT16 = [("gpt2", "fsdp 2")]
REST_BFLOAT16 = [
    (family, layout)
    for family in jobs.FAMILIES
    for layout in LAYOUTS
    if (family, layout) not in SHORT_BFLOAT16
]


def check_bfloat16(pool: Pool, family: str, layout: str) -> None:
    """Compare the losses of 6 steps of AdamW to half of bfloat16's last digit. A single process
    differs by 4e-4 from float32, and no layout by more than 5e-4: partial sums, keys and values are
    rounded before they are sent."""
    axes, words = LAYOUTS[layout], {"steps": 6, "rows": 8}
    single = jobs.train(family, "adamw", precision="bf16", **words)  # type: ignore[arg-type]
    options: dict[str, Any] = {"precision": "bf16", **words, **axes}
    answers = pool.run(math.prod(axes.values()), jobs.train, family, "adamw", **options)
    for answer in answers:
        assert answer["sample"] == answers[0]["sample"]
        is_gathered = bool({"shard", "context"} & set(axes)) or {"data", "tensor"} <= set(axes)
        assert answer["read"] == ["torch.bfloat16" if is_gathered else "torch.float32"]
        for name in ("losses", "evaluations"):
            np.testing.assert_allclose(answer[name], single[name], rtol=2**-10)
        for _, values in answer["last"].values():
            assert values.dtype == np.float32


@pytest.mark.parametrize(("family", "layout"), SHORT_BFLOAT16)
def test_bfloat16_losses_equal_those_of_one_process(pool: Pool, family: str, layout: str) -> None:
    check_bfloat16(pool, family, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), REST_BFLOAT16)
def test_bfloat16_losses_in_all_layouts(pool: Pool, family: str, layout: str) -> None:
    check_bfloat16(pool, family, layout)


def check(pool: Pool, family: str, optimizer: str, layout: str, *, rows: int, steps: int) -> None:
    """Compare everything in float64, where only rounding errors remain."""
    axes = LAYOUTS[layout]
    words: dict[str, Any] = {"steps": steps, "rows": rows, "dtype": "float64"}
    single = jobs.train(family, optimizer, **words)
    assert single["counts"] == [rows * jobs.CONTEXT] * steps
    answers = pool.run(math.prod(axes.values()), jobs.train, family, optimizer, **words, **axes)
    for answer in answers:
        for name in ("losses", "norms", "evaluations"):
            assert answer[name] == answers[0][name]
            np.testing.assert_allclose(answer[name], single[name], rtol=1e-9)
        assert answer["counts"] == single["counts"]
        assert answer["checksums"] == single["checksums"]
        assert answer["sample"] == single["sample"]
        # Gradients that an update rule has consumed are missing in both.
        for name, norm in single["norm of each"].items():
            assert answer["norm of each"][name] == pytest.approx(norm, rel=1e-7)
    for name, values in assembled([answer["first"] for answer in answers]).items():
        np.testing.assert_array_equal(values, single["first"][name][1])
    for name, values in assembled([answer["last"] for answer in answers]).items():
        np.testing.assert_allclose(values, single["last"][name][1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("family", "optimizer", "layout"), SHORT)
def test_several_processes_compute_what_one_does(
    pool: Pool, family: str, optimizer: str, layout: str
) -> None:
    check(pool, family, optimizer, layout, rows=8, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "optimizer", "layout"), REST)
def test_several_processes_compute_what_one_does_for_50_steps(
    pool: Pool, family: str, optimizer: str, layout: str
) -> None:
    check(pool, family, optimizer, layout, rows=8, steps=50)


@pytest.mark.parametrize("family", ["transformer", "gpt"])
def test_other_families_train_in_each_mode(pool: Pool, family: str) -> None:
    single = jobs.train(family, "adamw", steps=2, rows=4)
    for layout in ("fsdp 2", "tp 2", "cp 2", "pp 2"):
        for answer in pool.run(2, jobs.train, family, "adamw", steps=2, rows=4, **LAYOUTS[layout]):
            np.testing.assert_allclose(answer["losses"], single["losses"], rtol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "full"), ("fast", "selective")])
def test_activation_checkpointing_has_equal_bits_and_saves_memory(family: str, kind: str) -> None:
    words: dict[str, Any] = {"steps": 3, "rows": 4}
    stored_activations, recomputed = (
        jobs.train(family, "adamw", **words, activation_checkpointing=how) for how in ("none", kind)
    )
    assert recomputed["losses"] == stored_activations["losses"]
    assert recomputed["norms"] == stored_activations["norms"]
    assert recomputed["saved bytes"] < 0.9 * stored_activations["saved bytes"]


@pytest.mark.parametrize("layout", ["tp 2", "pp 2"])
def test_activation_checkpointing_in_several_processes(pool: Pool, layout: str) -> None:
    axes, words = LAYOUTS[layout], {"steps": 3, "rows": 4, "activation_checkpointing": "full"}
    single = jobs.train("gpt2", "adamw", steps=3, rows=4, dtype="float64")
    for answer in pool.run(2, jobs.train, "gpt2", "adamw", dtype="float64", **words, **axes):
        np.testing.assert_allclose(answer["losses"], single["losses"], rtol=1e-9)
        np.testing.assert_allclose(answer["norms"], single["norms"], rtol=1e-9)


@pytest.mark.parametrize("layout", ["ddp 4", "fsdp 2"])
def test_batch_that_is_not_divisible_by_the_processes(pool: Pool, layout: str) -> None:
    """Of 7 rows the last of four processes has one; its other rows have no valid targets."""
    check(pool, "gpt2", "adamw", layout, rows=7, steps=3)


@pytest.mark.parametrize(
    ("family", "optimizer", "rows"), [("gpt2", "adamw", 13), ("fast", "muon", 8)]
)
def test_deterministic_reduction_has_equal_bits_for_any_number_of_processes(
    pool: Pool, family: str, optimizer: str, rows: int
) -> None:
    """13 rows are 6 micro-batches of two and one of one: some branches are not full."""
    words: dict[str, Any] = {"steps": 5, "rows": rows, "elastic": True}
    single = jobs.train(family, optimizer, **words)
    for size in (2, 3):
        for answer in pool.run(size, jobs.train, family, optimizer, **words):
            for name in ("losses", "norms", "counts", "evaluations", "checksums"):
                assert answer[name] == single[name], (size, name)
            for name, (_, values) in single["last"].items():
                np.testing.assert_array_equal(answer["last"][name][1], values)


def test_each_leaf_of_the_reduction_tree_has_one_owner() -> None:
    for size, n_leaves in itertools.product(range(1, 10), range(1, 20)):
        tree = ReductionTree(size, n_leaves)
        leaves = [leaf for rank in range(size) for leaf in tree.leaves(rank)]
        assert leaves == list(range(n_leaves))
        for branch in range(tree.n_branches):
            rank = tree.owner(branch)
            assert tree.first_branch(rank) <= branch < tree.first_branch(rank + 1)


def check_checkpoint(pool: Pool, folder: Path, saved_by: str, read_by: Sequence[str]) -> None:
    axes = LAYOUTS.get(saved_by, {})
    size, within = math.prod(axes.values()), math.prod(n for a, n in axes.items() if a != "data")
    pool.run(size, jobs.save, str(folder), axes)
    files = {p.name for p in (folder / "checkpoints/step-00000001").iterdir()}
    assert len(files) == 1 + 2 * within
    full = assembled(pool.run(1, jobs.load, str(folder), {}))
    assert {"model/head.weight", "optimizer/ngrams.parts.2.weight/squares"} <= full.keys()
    for name in read_by:
        axes = LAYOUTS[name]
        found = assembled(pool.run(math.prod(axes.values()), jobs.load, str(folder), axes))
        assert found.keys() == full.keys()
        for tensor, values in full.items():
            np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("saved_by", ["fsdp 4", "pp x tp"])
def test_checkpoint_loads_bitwise_in_other_layouts(
    pool: Pool, tmp_path: Path, saved_by: str
) -> None:
    check_checkpoint(pool, tmp_path, saved_by, ("hsdp", "pp x fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["one", *LAYOUTS])
def test_checkpoint_loads_bitwise_in_all_layouts(pool: Pool, tmp_path: Path, saved_by: str) -> None:
    check_checkpoint(pool, tmp_path, saved_by, list(LAYOUTS))


def test_all_layouts_save_equal_numbers(pool: Pool, tmp_path: Path) -> None:
    """The step before the save is one of every update rule, also of the sharded Muon."""
    for name in ("one", "fsdp 2", "hsdp", "tp x fsdp"):
        axes, folder = LAYOUTS.get(name, {}), tmp_path / name
        folder.mkdir()
        pool.run(math.prod(axes.values()), jobs.save, str(folder), axes)
    one = assembled(pool.run(1, jobs.load, str(tmp_path / "one"), {}))
    for name in ("fsdp 2", "hsdp", "tp x fsdp"):
        other = assembled(pool.run(1, jobs.load, str(tmp_path / name), {}))
        for tensor, values in one.items():
            np.testing.assert_allclose(other[tensor], values, rtol=1e-5, atol=1e-7, err_msg=tensor)


@pytest.mark.parametrize("failing", [0, 1])
def test_save_that_fails_on_one_rank_fails_on_all(pool: Pool, tmp_path: Path, failing: int) -> None:
    messages = pool.run(2, jobs.fail_to_save, str(tmp_path), failing)
    assert all("No space left" in text for text in messages)
    assert f"rank {failing}: " in messages[1 - failing]
    assert not list(tmp_path.iterdir())


def test_process_without_its_own_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    launched = {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, **launched}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="this machine has 2 processes and 1 GPUs"):
        open_world("cuda", threads=1)


def test_collectives_of_texts_and_numbers(pool: Pool) -> None:
    for rank, results in enumerate(pool.run(3, jobs.talk)):
        assert (results["rank"], results["is_main"]) == (rank, rank == 0)
        assert results["texts"] == ["", "é", "éé"]
        assert results["broadcast"] == "from 0"
        assert results["all_gather"] == [[0, 0.5], [1, 0.5], [2, 0.5]]
        assert results["fsum"] == 1.0  # a sum that is rounded at each addition is 0
        assert results["all_sum"] == [6, 3e15 + 3]
        assert results["all_reduce"] == [3.0, 3.0]
        assert results["single"] == rank


def test_ranks_that_differ_are_rejected(pool: Pool) -> None:
    messages = pool.run(2, jobs.differ)
    assert messages == ["rank 0 and rank 1 must not differ: code: abc and xyz"] * 2


def test_sockets_listen_on_localhost_only(pool: Pool) -> None:
    for found in pool.run(2, jobs.listeners):
        assert found
        assert set(found) == {"0100007F"}  # 127.0.0.1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"processes": 0}, "parallel.processes is 0; it must be in"),
        (
            {"processes": 4, "shard": 3},
            "parallel.data 1 x parallel.shard 3 is 3, and there are 4 processes",
        ),
        ({"processes": 4, "data": 4, "shard": 2}, "is 8, and there are 4 processes"),
    ],
)
def test_invalid_axes_are_rejected(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ParallelConfig(**settings)


def test_axes_are_resolved_from_the_number_of_processes() -> None:
    assert ParallelConfig(shard=2).resolve(8) == ParallelConfig(processes=8, data=4, shard=2)
    with pytest.raises(ValueError, match="there are 3 processes"):
        ParallelConfig(shard=2).resolve(3)


def test_slow_rank_is_reported_once_and_so_is_its_recovery() -> None:
    detector = StragglerDetector()
    warnings = [detector.record([1.0, 1.1, 1.7, 0.9]) for _ in range(STRAGGLER_STEPS)]
    assert warnings[:-1] == [[]] * (STRAGGLER_STEPS - 1)
    assert warnings[-1] == [
        "process 2 is slow: in 20 steps its forward passes ran at 59% of the others' speed, and "
        "all wait for it"
    ]
    assert not any(detector.record([1.0, 1.1, 1.7, 0.9]) for _ in range(STRAGGLER_STEPS))
    again = [detector.record([1.0, 1.1, 1.2, 0.9]) for _ in range(STRAGGLER_STEPS)][-1]
    assert again == ["process 2 is as fast as the others again"]


def test_a_single_process_is_never_slow() -> None:
    detector = StragglerDetector()
    assert not any(detector.record([5.0]) for _ in range(2 * STRAGGLER_STEPS))


def test_ranks_without_times_are_not_slow() -> None:
    detector = StragglerDetector()
    assert not any(detector.record([0.0, 0.0]) for _ in range(2 * STRAGGLER_STEPS))


@pytest.mark.parametrize(("moves", "starts"), [(False, 1 + MAX_RESTARTS), (True, 10)])
def test_restarts_without_progress_are_limited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moves: bool, starts: int
) -> None:
    launches: list[list[str]] = []

    def fail(args: list[str], n: int) -> int:
        (tmp_path / "requested.yaml").touch()
        if moves:
            (tmp_path / f"checkpoints/step-{len(launches)}").mkdir(parents=True)
        launches.append(args)
        raise ProcessFailed("rank 1 was killed by SIGKILL", 2 if len(launches) == 10 else 1)

    monkeypatch.setattr(start_module, "launch", fail)
    with pytest.raises(ProcessFailed):
        start_module._launch(Request(targets=["a.txt"]), tmp_path, 2)
    args = ["train", "--run", str(tmp_path)]
    assert launches == [[*args, "a.txt"], *[[*args, "--resume"]] * (starts - 1)]
