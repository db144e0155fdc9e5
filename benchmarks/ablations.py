"""What pays in the family `fast`: arms compared with the recipe `english`, at equal wall clock.

python benchmarks/ablations.py --out ablations [--seconds 60 180] [--together 2]
python benchmarks/ablations.py --out ablations --steps 600 --only "squared ReLU" XSA --source TEXT

Successive halving: what adds something to `fast` gets a short run of one thread at d 128; the best
fifth of it, and all that takes something away, get a longer one at d 192 with three seeds, of which
each has the same order of data and first weights as the recipe's own run.
Killed or run again it continues: a result is a line of OUT/results.jsonl, and is made once.

With --steps all arms, or those of --only, make as many at size 2, on another text if one is given:
what a step costs is not timed then, so that a busy machine changes nothing.

Equal wall clock means: an arm makes fewer steps by as much as its step takes longer than the
recipe's, both timed by turns. Bits a byte are of the whole held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from line_process import LineProcess

SEEDS = (1, 2, 3)
SIZES = (1, 2)
# What is taken away from `fast`, or changed back to what is usual.
WITHOUT = {
    "no n-gram tables": "--model.ngram_rows 0",
    "no recall": "--model.induction 0",
    "no norm of queries and keys": "--model.query_key_norm false",
    "no norm of the embedding": "--model.embedding_norm false",
    "branches start scaled, not at 0": "--model.initialization scaled",
    "GELU": "--model.feed_forward gelu",
    "SwiGLU": "--model.feed_forward swiglu",
    "squared ReLU": "--model.feed_forward relu2",
    "rows of any length": "--optimizer.row_norm false",
    "head tied to the embedding": "--model.tied_head true",
    "AdamW for all": "--optimizer.name adamw --optimizer.learning_rate 6e-3",
}
# What is added to it, or set otherwise.
WITH = {
    "4-grams too": "--model.longest_ngram 4",
    "recall of three ids too": "--model.induction 3",
    "context 512": "--model.context_length 512",
    "batch of 2,048": "--train.batch_tokens 2048",
    "batch of 8,192": "--train.batch_tokens 8192",
    "rate 1e-2": "--optimizer.learning_rate 1e-2",
    "rate 5e-3": "--optimizer.learning_rate 5e-3",
    "momentum 0.95": "--optimizer.momentum 0.95",
    "decay from the start": "--schedule.name linear",
    "average of the last weights": "average",
    "batch grows": "batch_grows",  # half, whole, and half as much again
    "x0 skips": "x0_skips",
    "smear": "smear",
    "value embeddings": "value_embeddings",
    "softcap 15": "softcap",
    "two tokens": "two_tokens",
    "NorMuon": "normuon",
    "cautious decay": "cautious_decay",
    "SOAP": "soap",
    "signs": "signs",
    "query gain 1.5": "query_gain_1.5",
    "query gain 2.5": "query_gain_2.5",
    "XSA": "xsa",
    "head gates": "head_gates",
    "heads apart": "heads_apart",
    "power fall 1.3": "power_fall_1.3",
    "power fall 1.7": "power_fall_1.7",
    "prefix tokens 0.1": "prefix_0.1",
    "prefix tokens 0.2": "prefix_0.2",
    "tables in values": "value_tables",
    "fall over 80 %": "--schedule.decay_fraction 0.8",
    "fall over 40 %": "--schedule.decay_fraction 0.4",
}
# Their steps are the recipe's, or would be: a softcap makes whole logits here, and need not.
SAME_STEP = {
    *("rate 1e-2", "rate 5e-3", "momentum 0.95", "decay from the start", "softcap 15"),
    *("average of the last weights", "batch grows", "cautious decay"),
    "branches start scaled, not at 0",
}
RECIPE = "english"
ARMS = {RECIPE: "", **WITHOUT, **WITH}


class Arm:
    """A run of one arm in this process, a step at a time."""

    def __init__(self, arm: str, *, size: int, seed: int, steps: int, source: str) -> None:
        from variants import PREFIXES, VARIANTS, prefixes

        from pretrain.config import compose, parse_overrides
        from pretrain.distributed import open_world
        from pretrain.model.decoder import build
        from pretrain.model.loss import LMLoss
        from pretrain.optim.param_groups import build_optimizer
        from pretrain.runner.request import read_target
        from pretrain.runner.text import prepared_text
        from pretrain.train.build import training_batches
        from pretrain.train.resolve import resolve

        how = ARMS[arm]
        for name in how.split("+"):
            if name in VARIANTS:
                VARIANTS[name]()
        self.how, self.steps, self.averages = how, steps, list[Any]()
        self.world = open_world("cpu", threads=1)
        self.precision = "bf16" if self.world.has_native_bf16() else "fp32"
        fixed = f"--model.size {size} --train.seed {seed} --train.steps {steps}"
        words = [*fixed.split(), *(how.split() if how.startswith("--") else [])]
        words += ["--data.source", source]
        self.config = compose([*read_target(RECIPE)[1], parse_overrides(words)])
        self.data = prepared_text(self.config)
        self.config = resolve(self.config, self.data, self.world)
        self.context = self.config.model.window_tokens
        tokens = self.config.train.batch_tokens
        assert tokens is not None
        decoder = build(self.config.model, vocab_size=self.data.manifest.vocab_size, seed=seed)
        self.lm_loss = LMLoss(decoder).train()
        self.optimizer = build_optimizer(
            decoder.named_parameters(),
            config=self.config.optimizer,
            width=self.config.model.d_model,
            batch_tokens=tokens,
            precision=self.precision,
        )
        self.batches = training_batches(self.config, self.data)
        n_parts = len(list(self.batches.at(0)))
        PREFIXES.update(of=prefixes(self.data.tokenizer()), calls=steps * n_parts)

    def step(self, step: int) -> None:
        from pretrain.optim.schedule import LRSchedule
        from pretrain.train.step import training_steps

        peak = self.config.optimizer.learning_rate
        batch = self._growing(step) if self.how == "batch_grows" else self.batches.at(step)
        lr = LRSchedule(self.config.schedule, peak, self.steps).at(step)
        updates = training_steps(
            self.lm_loss,
            self.optimizer,
            lambda _: batch,
            lr_at=lambda _: lr,
            steps=1,
            clip=self.config.optimizer.clip,
            world=self.world,
            precision=self.precision,
        )
        next(updates)
        if self.how == "average" and step >= 0.8 * self.steps:
            self._average(1 + step - 0.8 * self.steps)

    def _growing(self, step: int) -> Iterable[Any]:
        """Half as many rows at first and half as many again at the end, as many in all."""
        from pretrain.data.batches import micro_batch_at

        rows = self.batches.batch_size
        third = self.steps // 3
        sizes = [rows // 2] * third + [rows] * (self.steps - 2 * third) + [rows * 3 // 2] * third
        yield micro_batch_at(
            self.batches.stream,
            self.batches.order,
            sample=sum(sizes[:step]),
            rows=sizes[step],
        )

    def _average(self, n: float) -> None:
        """Of the last fifth of the run, the last ten steps weighing most."""
        import torch

        weights = [p.detach() for p in self.lm_loss.parameters()]
        if not self.averages:
            self.averages = [w.clone() for w in weights]
        torch._foreach_lerp_(self.averages, weights, max(0.1, 1 / n))

    def finish(self, first: int) -> dict[str, Any]:
        """Make all steps from `first` on, and score the whole held-out text."""
        import torch

        from pretrain.evaluate.loss import ScoredModel, score_stream

        for step in range(first, self.steps):
            self.step(step)
        with torch.no_grad():
            for parameter, kept in zip(self.lm_loss.parameters(), self.averages, strict=False):
                parameter.copy_(kept)
        model = ScoredModel(self.lm_loss.decoder, self.data.tokenizer(), self.world, self.precision)
        result = score_stream(model, self.data.split("val"), context_length=self.context)
        return {"bits_per_byte": result.bits_per_byte, "precision": self.precision}


def serve(arm: str, source: str, size: int, seed: int, steps: int) -> None:
    """Answer each line of standard input: `step` with its CPU seconds, `finish` with the score."""
    run = Arm(arm, size=size, seed=seed, steps=steps, source=source)
    for made, line in enumerate(sys.stdin):
        if line.strip() == "finish":
            print(json.dumps(run.finish(made)), flush=True)
            return
        began = time.process_time()
        run.step(made)
        print(time.process_time() - began, flush=True)


def served(arm: str, *, size: int, seed: int, steps: int, source: str = "bundled") -> LineProcess:
    return LineProcess([__file__, "--serve", arm, source, str(size), str(seed), str(steps)])


class Results:
    """Lines of a file, each made once."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {self._key(row): row for row in map(json.loads, lines)}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("kind", "arm", "size", "seed", "seconds"))

    def made(self, make: Any, **what: Any) -> dict[str, Any]:
        """The result of `what`, by `make` if it is not there yet."""
        key = self._key(what)
        if key not in self.rows:
            row = {**what, **make()}
            with self._lock, self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[key] = row
            print(json.dumps(row), flush=True)
        return self.rows[key]


def cost_of(arm: str, size: int) -> dict[str, Any]:
    """How long the recipe's step takes, and how many times as long the arm's."""
    if arm in SAME_STEP:
        return {"over_recipe": 1.0}
    pair = [served(name, size=size, seed=1, steps=20) for name in (RECIPE, arm)]
    times = [[each.ask("step") for each in pair] for _ in range(17)][2:]
    for each in pair:
        each.stop()
    over = statistics.median(own / recipe for recipe, own in times)
    return {"step_seconds": statistics.median(row[0] for row in times), "over_recipe": over}


def stage(
    results: Results,
    arms: Iterable[str],
    *,
    size: int,
    seeds: Iterable[int],
    seconds: float,
    n: int,
) -> None:
    # One after the other, before anything else runs: they are the only times that are taken.
    costs = {}
    for arm in arms:
        what = {"kind": "cost", "arm": arm, "size": size, "seed": 0, "seconds": 0}
        costs[arm] = results.made(lambda arm=arm: cost_of(arm, size), **what)

    def one(job: tuple[int, str]) -> None:
        seed, arm = job
        what = {"arm": arm, "size": size, "seed": seed, "seconds": seconds}
        base = seconds / costs[RECIPE]["step_seconds"]
        slower = 1.0 if arm == RECIPE else costs[arm]["over_recipe"]
        steps = max(20, round(base / slower))

        def make() -> dict[str, Any]:
            return {
                "steps": steps,
                **served(arm, size=size, seed=seed, steps=steps).ask("finish"),
            }

        results.made(make, kind="score", **what)

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(one, [(seed, arm) for seed in seeds for arm in arms]))


def equal_steps(
    results: Results, arms: Iterable[str], *, size: int, steps: int, source: str, n: int
) -> None:
    """Score arms after as many steps: each seed's recipe first."""

    def one(job: tuple[int, str]) -> None:
        seed, arm = job

        def make() -> Any:
            return served(arm, size=size, seed=seed, steps=steps, source=source).ask("finish")

        what = {"arm": arm, "size": size, "seed": seed, "seconds": f"{steps} steps of {source}"}
        results.made(make, kind="score", **what)

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(one, [(seed, arm) for seed in SEEDS for arm in arms]))


def table(results: Results, *, size: int, seconds: float | str) -> Iterator[str]:
    """Each arm's bits a byte minus the recipe's of the same seed: mean, and its standard error."""
    scores = {
        (row["arm"], row["seed"]): row["bits_per_byte"]
        for row in results.rows.values()
        if (row["kind"], row["size"], row["seconds"]) == ("score", size, seconds)
    }
    costs = {
        row["arm"]: row["over_recipe"]
        for row in results.rows.values()
        if (row["kind"], row["size"]) == ("cost", size)
    }
    own = {seed: value for (arm, seed), value in scores.items() if arm == RECIPE}
    recipe = statistics.mean(own.values())
    budget = seconds if isinstance(seconds, str) else f"{seconds:g} s"
    yield f"| {budget} at size {size} | seeds | bits/byte minus the recipe's | step |"
    yield "|---|---|---|---|"
    yield f"| the recipe | {len(own)} | {recipe:.4f} itself | 1.00 |"
    for arm in ARMS:
        differences = [v - own[s] for (a, s), v in scores.items() if a == arm and s in own]
        if arm == RECIPE or not differences:
            continue
        text = f"{statistics.mean(differences):+.4f}"
        if len(differences) > 1:
            text += f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.4f}"
        cost = f"{costs[arm]:.2f}" if arm in costs else ""
        yield f"| {arm} | {len(differences)} | {text} | {cost} |"


def survivors(results: Results, *, size: int, seconds: float) -> list[str]:
    """The recipe, all that takes something away, and the best fifth of what adds something."""
    scores = {
        row["arm"]: row["bits_per_byte"]
        for row in results.rows.values()
        if (row["kind"], row["size"], row["seconds"], row["seed"]) == ("score", size, seconds, 1)
    }
    added = sorted(WITH, key=lambda arm: scores[arm])
    better = [arm for arm in added[: len(added) // 5] if scores[arm] < scores[RECIPE]]
    return [RECIPE, *WITHOUT, *better]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    parser.add_argument("--seconds", type=float, nargs=2, default=[60, 180], metavar="S")
    parser.add_argument("--together", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--steps", type=int, help="of all arms, in place of --seconds")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--source", default="bundled", help="text of runs of --steps")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        arm, source, *numbers = args.serve
        serve(arm, source, *map(int, numbers))
        return
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    results = Results(args.out / "results.jsonl")
    (small, large), (short, long), n = SIZES, args.seconds, args.together
    if args.steps:
        arms = list(dict.fromkeys([RECIPE, *args.only]))
        equal_steps(results, arms, size=large, steps=args.steps, source=args.source, n=n)
        what = f"{args.steps} steps of {args.source}"
        print("\n".join(["", *table(results, size=large, seconds=what)]))
        return
    stage(results, [RECIPE, *WITH], size=small, seeds=SEEDS[:1], seconds=short, n=n)
    kept = survivors(results, size=small, seconds=short)
    stage(results, kept, size=large, seeds=SEEDS, seconds=long, n=n)
    for size, seconds in ((small, short), (large, long)):
        print("\n".join(["", *table(results, size=size, seconds=seconds)]))


if __name__ == "__main__":
    main()
