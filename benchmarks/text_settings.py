"""What each contestant of `text.py` tries, and the words that it is told.

Everybody has six settings, the most promising first, each with its learning rate. A word before the
flags is an environment variable.
"""

from __future__ import annotations

from functools import cache
from itertools import dropwhile

from rows import OURS

from pretrain.distributed import open_world

_TWICE = "--matrix-lr=0.04 --embedding-lr=0.6 --unembedding-lr=0.016"
_SMALL_BATCH = "--device-batch-size=8 --total-batch-size=2048"


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16; where it emulates that, nobody is given it."""
    return open_world("cpu", threads=None).has_native_bf16()


def autocast(*, bf16: bool) -> str:
    """A word for nanoGPT by `peers.py`. Its train.py has no autocast on a CPU, whatever its
    --dtype is; without this word it trains in float32."""
    return "AUTOCAST=bfloat16 " if bf16 else ""


def settings_of(who: str, *, bf16: bool) -> tuple[str, ...]:
    if who == OURS:
        return (
            "--model.size 2 --optimizer.learning_rate 7e-3",
            "--model.size 3 --optimizer.learning_rate 7e-3",
            "--model.size 3 --optimizer.learning_rate 1e-2",
            "--model.size 4 --optimizer.learning_rate 7e-3",
            "--model.size 2 --optimizer.learning_rate 1e-2",
            "--model.size 3 --optimizer.learning_rate 5e-3",
        )
    if who == "nanoGPT":
        # Its README turns the compiler off on a CPU; a step is the quickest with it, and with
        # bfloat16. The last is for a clock too short for compiling.
        eager = autocast(bf16=bf16)
        fast = f"{eager}--compile=True"
        return (
            f"{fast} --n_embd=192 --n_head=3 --learning_rate=3e-3 --min_lr=3e-4",
            f"{fast} --n_embd=256 --n_head=4 --learning_rate=3e-3 --min_lr=3e-4",
            f"{fast} --n_embd=192 --n_head=3 --learning_rate=6e-3 --min_lr=6e-4",
            f"{fast} --n_embd=256 --n_head=4 --n_layer=2 --learning_rate=6e-3 --min_lr=6e-4",
            f"{fast} --n_embd=256 --n_head=4 --learning_rate=6e-3 --min_lr=6e-4",
            f"{eager}--n_embd=192 --n_head=3 --learning_rate=3e-3 --min_lr=3e-4",
        )
    # Without the variable nanochat computes in float32, but in bfloat16 where torch finds a GPU
    # that has it, though it trains on the CPU. scripts/base_train.py scales its rates for the batch
    # and the width; 0.02 is its own, and twice that comes with twice the others.
    chat = f"NANOCHAT_DTYPE={'bfloat16' if bf16 else 'float32'}"
    return (
        f"{chat} --depth=3 {_TWICE}",
        f"{chat} --depth=3 --matrix-lr=0.02 {_SMALL_BATCH}",
        f"{chat} --depth=3 --matrix-lr=0.02",
        f"{chat} --depth=4 --matrix-lr=0.02",
        f"{chat} --depth=2 --aspect-ratio=96 --matrix-lr=0.02",
        f"{chat} --depth=3 {_TWICE} {_SMALL_BATCH}",
    )


# Steps of a short run that tells how long the others may be.
PROBE = {OURS: 100, "nanoGPT": 20, "nanochat": 20}


def compiles(who: str, setting: str) -> bool:
    """Whether the first run of a setting takes minutes longer than those after it."""
    return who == "nanochat" or "--compile=True" in setting


def words_of(who: str, setting: str, steps: int) -> tuple[dict[str, str], list[str]]:
    """Environment variables, and the words that a contestant is told."""
    words = setting.split()
    flags = list(dropwhile(lambda word: not word.startswith("--"), words))
    variables = dict(word.split("=") for word in words[: len(words) - len(flags)])
    if who == OURS:
        # As a run that is given minutes has it; but all are given steps, which other programs that
        # run during a calibration do not change.
        precision = "bf16" if has_bf16() else "fp32"
        fixed = f"train english --train.device cpu --train.precision {precision} "
        fixed += f"--train.steps {steps} --train.counts 5"
    elif who == "nanoGPT":
        # Its checkpoint is written at an evaluation: at the last step, which is the only one.
        fixed = (
            "--device=cpu --dtype=float32 --compile=False --block_size=256 --batch_size=8 "
            "--gradient_accumulation_steps=1 --n_layer=4 --dropout=0.0 --weight_decay=0.1 "
            f"--eval_iters=1 --eval_interval={steps} --max_iters={steps} --lr_decay_iters={steps} "
            f"--warmup_iters={max(5, steps // 30)}"
        )
    else:
        # As runs/runcpu.sh, but for its window of 512 and batch of 16,384, chosen for a laptop's
        # half hour.
        fixed = (
            "--device-type=cpu --head-dim=64 --window-pattern=L --max-seq-len=256 "
            "--device-batch-size=16 --total-batch-size=4096 --eval-every=-1 "
            f"--core-metric-every=-1 --sample-every=-1 --num-iterations={steps}"
        )
    return variables, [*fixed.split(), *flags]
