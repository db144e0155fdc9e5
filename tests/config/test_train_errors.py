"""The sections `train`, `optimizer`, `schedule`, `parallel`: every range and rule."""

from __future__ import annotations

import pytest

from config_errors import errors_of

RANGES = {
    "train": [
        "steps: 0 -> in [1, 10^10]",
        "steps: 10000000001 -> in [1, 10^10]",
        "minutes: 0.0 -> in (0, 10^7]",
        "minutes: 100000000.0 -> in (0, 10^7]",
        "batch_tokens: -1 -> in [1, 10^10]",
        "micro_batch_rows: 0 -> in [1, 10^10]",
        "evaluate_every: 0 -> in [1, 10^10]",
        "evaluate_tokens: 0 -> in [1, 10^10]",
        "save_every: 0 -> in [1, 10^10]",
        "keep_checkpoints: 1 -> in [2, 10^10]",
        "keep_every: 0 -> in [1, 10^10]",
        "patience: -2 -> in [1, 10^10]",
        "seed: -1 -> in [0, 2^63)",
        "seed: 9223372036854775808 -> in [0, 2^63)",
        "label_smoothing: 1.0 -> in [0, 1)",
        "z_loss: -1.0 -> at least 0",
        "spike_threshold: 0.0 -> above 0",
        "threads: 0 -> in [1, 4096]",
        "threads: 4097 -> in [1, 4096]",
        "device: tpu -> one of auto, cpu, cuda, mps",
        "precision: fp8 -> one of auto, fp32, bf16",
        "compile: maybe -> one of auto, on, off",
        "spike_action: stop -> one of off, warn, skip, rollback",
    ],
    "optimizer": [
        "name: sgd -> one of adamw, muon",
        "learning_rate: 0.0 -> above 0",
        "embedding_lr_mult: -2.0 -> at least 0",
        "head_lr_mult: -3.0 -> at least 0",
        "base_width: 0 -> in [1, 2^20]",
        "base_batch_tokens: 0 -> in [1, 2^30]",
        "momentum: 1.0 -> in [0, 1)",
        "weight_decay: -0.1 -> at least 0",
        "beta1: 1.0 -> in [0, 1)",
        "beta2: 2.0 -> in [0, 1)",
        "epsilon: 0.0 -> above 0",
        "clip: -1.0 -> at least 0",
    ],
    "schedule": [
        "name: steep -> one of cosine, linear, wsd, constant, inverse_sqrt",
        "warmup_steps: -1 -> in [0, 10^10]",
        "warmup_steps: 1000000000000 -> in [0, 10^10]",
        "decay_fraction: 1.5 -> in [0, 1]",
        "final_fraction: -1.0 -> in [0, 1]",
        "start_fraction: -1.0 -> at least 0",
        "origin_step: -1 -> in [0, 10^10]",
    ],
    "parallel": [
        "processes: 0 -> in [1, 2^20]",
        "data: 0 -> in [1, 2^20]",
        "shard: 0 -> in [1, 2^20]",
        "tensor: 0 -> in [1, 2^20]",
        "context: 0 -> in [1, 2^20]",
        "pipeline: 2000000 -> in [1, 2^20]",
        "activation_checkpointing: some -> one of none, selective, full",
        "timeout_seconds: 0.0 -> in (0, 2^20]",
    ],
}


@pytest.mark.parametrize(
    ("section", "row"), [(s, row) for s, rows in RANGES.items() for row in rows]
)
def test_values_out_of_range_are_rejected(section: str, row: str) -> None:
    setting, expected = row.split(" -> ")
    key, value = setting.split(": ")
    shown = repr(value) if value.isalpha() or value == "fp8" else value
    message = f"{section}.{key} is {shown}; it must be {expected}"
    assert errors_of(f"{section}: {{{setting}}}") == [message]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "model: {context_length: 128}\ntrain: {batch_tokens: 1000}",
            [
                "train.batch_tokens 1,000 is not a multiple of model.context_length 128; the "
                "nearest multiples are: 896 or 1,024"
            ],
        ),
        (
            "model: {context_length: 128}\ntrain: {batch_tokens: 1024, micro_batch_rows: 9}",
            ["train.micro_batch_rows is 9; it must be in [1, 8], the number of windows of a batch"],
        ),
        (
            "schedule: {origin_step: 3}",
            [
                "schedule.origin_step, schedule.start_fraction and schedule.anneal are written by "
                "pretrain extend and anneal, with schedule.history; leave them out"
            ],
        ),
        (
            "schedule: {history: [{until_step: 3}]}",
            [
                f"schedule.history[0] needs a value for {name!r}"
                for name in "steps learning_rate name warmup_steps decay_fraction".split()
            ]
            + ["schedule.history[0] needs a value for 'final_fraction'"],
        ),
        (
            "parallel: {processes: 4, tensor: 3}",
            [
                "parallel.data 1 x parallel.shard 1 x parallel.tensor 3 is 3, and there are 4 "
                "processes; the product of the axes must be that number"
            ],
        ),
        (
            "parallel: {processes: 4, elastic: true, shard: 2}",
            ["parallel.shard is 2; it must be 1 with parallel.elastic"],
        ),
        (
            "parallel: {processes: 4, context: 2, pipeline: 2}",
            ["parallel.pipeline is 2; it must be 1 with parallel.context 2"],
        ),
        (
            "parallel: {processes: 8, pipeline: 8}",
            ["parallel.pipeline is 8; it must be at most model.n_layers, 4"],
        ),
        (
            "model: {n_kv_heads: 2, d_ff: 128, context_length: 66}\n"
            "parallel: {processes: 16, tensor: 4, context: 4}",
            [
                "model.n_kv_heads is 2; it must be a multiple of parallel.tensor, 4",
                "model.context_length is 66; it must be a multiple of parallel.context, 4",
            ],
        ),
    ],
)
def test_contradicting_values_are_rejected(text: str, messages: list[str]) -> None:
    assert errors_of(text) == messages


SEGMENT = (
    "{until_step: 5, steps: 9, learning_rate: 1, name: wsd, warmup_steps: 0, decay_fraction: 1, "
    "final_fraction: 0"
)


@pytest.mark.parametrize(
    ("history", "messages"),
    [
        (
            f"[{SEGMENT}, origin_step: 5}}]",
            [
                "schedule.history has a segment from step 5 to step 5 of 9; these must increase",
            ],
        ),
        (
            f"[{SEGMENT}}}, {SEGMENT}}}]",
            ["schedule.history has segments to the steps [5, 5]; these must increase"],
        ),
        (
            f"[{SEGMENT}, anneal: 1}}]",
            ["schedule.history[0].anneal is 1; it must be true or false"],
        ),
    ],
)
def test_an_edited_history_is_rejected(history: str, messages: list[str]) -> None:
    assert errors_of(f"schedule: {{history: {history}}}") == messages
