"""benchmarks/variants.py: each variant of `fast` trains, and trains something else than `fast`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# A variant changes the classes of its process, so each has a process of its own.
TRAIN = """
import json, os, sys
import torch
from pretrain.config import compose, parse_overrides
from pretrain.data.batches import MicroBatch
from pretrain.distributed import open_world
from pretrain.model import decoder
from pretrain.model.loss import LMLoss
from pretrain.optim import param_groups, schedule
from pretrain.runner.request import read_target
from pretrain.train.step import training_steps
import variants

STEPS, V = 8, 50
WORDS = "--model.n_layers 2 --model.n_heads 2 --model.d_model 128 --model.context_length 16 "
WORDS += "--model.ngram_rows 64 --schedule.warmup_steps 1 --optimizer.weight_decay 0.1"

def trained():
    config = compose([*read_target("english")[1], parse_overrides(WORDS.split())])
    variants.PREFIXES.update(of=(torch.arange(V) + 1) % V, calls=STEPS)
    model = LMLoss(decoder.build(config.model, vocab_size=V, seed=1))
    optimizer = param_groups.build_optimizer(
        model.decoder.named_parameters(), config=config.optimizer, width=128, batch_tokens=64
    )
    ids = torch.randint(V, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(inputs=ids[:, :-1], targets=ids[:, 1:], samples=torch.arange(4))
    rates = schedule.LRSchedule(config.schedule, config.optimizer.learning_rate, STEPS)
    world = open_world("cpu", threads=1)
    reports = training_steps(
        model, optimizer, lambda _: [batch], lr_at=rates.at, steps=STEPS, world=world
    )
    losses = [report.nats_per_token for report in reports]
    names = "head.weight", "blocks.0.attention.query.weight"
    sizes = [model.decoder.get_parameter(name).double().abs().sum() for name in names]
    return losses[0], losses[-1], float(sum(sizes))

found = {}
for name in ["", *variants.VARIANTS]:
    read, write = os.pipe()
    if os.fork() == 0:
        if name:
            variants.VARIANTS[name]()
        os.write(write, json.dumps(trained()).encode())
        os._exit(0)
    os.close(write)
    found[name] = os.read(read, 1000).decode()
    os.wait()
print(json.dumps(found))
"""


def test_each_variant_trains_something_else() -> None:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = {name: json.loads(text or "null") for name, text in json.loads(done.stdout).items()}
    assert all(found.values()), (found, done.stderr)
    for name, (first, last, _) in found.items():
        assert last < first, name
    same = [name for name in found if name and found[name][2] == found[""][2]]
    assert same == []
    assert len({size for _, _, size in found.values()}) == len(found)
