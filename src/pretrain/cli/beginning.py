"""A run that begins: a command's settings come in, and its folder says from then on what was asked
for, and soon what was decided.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.environment import only_writer, write_environment
from pretrain.cli.output import Output
from pretrain.cli.training import fingerprint_of, train_run
from pretrain.config import RunConfig, to_yaml
from pretrain.data.format import PreparedData
from pretrain.evaluate.task_files import read_in_loop_tasks
from pretrain.fileio import replace_file
from pretrain.runner.launch import check_same_on_all_ranks, open_world_of
from pretrain.runner.request import REQUESTED
from pretrain.runner.text import open_text
from pretrain.train.resolve import check_batch

if TYPE_CHECKING:
    from pretrain.distributed import World
    from pretrain.evaluate.task_files import EvalTask


def start(
    config: RunConfig, folder: Path, output: Output, began: float, world: World | None
) -> int:
    """Begin a run. From the first moment its folder says what was asked for, so that a run that is
    killed before anything could be decided can be resumed too."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    is_main = world is None or world.is_main
    with only_writer(folder, output) if is_main else nullcontext():
        if is_main:
            replace_file(folder / REQUESTED, to_yaml(config).encode())
        try:
            eval_tasks = read_in_loop_tasks(config.evaluate)
            data = open_text(config, output.say, world)
            check_batch(config.model, config.train, n_tokens=data.min_source_tokens)
            world = world or open_world_of(config)
            config = _decide(config, folder, data, eval_tasks, output, world)
        except (ValueError, KeyboardInterrupt):  # a full disk is to be resumed
            if is_main:
                _take_back(folder, new)
            raise
        return train_run(
            config, folder, data, world, output, began, eval_tasks=eval_tasks, resume_from=None
        )


def _take_back(folder: Path, new: list[Path]) -> None:
    """Leave nothing of a run that could not begin, and none of the `new` folders."""
    (folder / REQUESTED).unlink(missing_ok=True)
    (folder / "run.lock").unlink(missing_ok=True)
    with suppress(OSError):
        for each in new:
            each.rmdir()


def _decide(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    eval_tasks: list[EvalTask],
    output: Output,
    world: World,
) -> RunConfig:
    """Fill what the config left open, and write it down, never to be decided again."""
    from pretrain.train.resolve import resolve

    if config.train.steps is None and config.train.minutes is not None:
        output.say(f"measuring how many steps fit into {config.train.minutes:g} min ...")
    config = resolve(config, data, world, eval_tasks)
    check_same_on_all_ranks(world, fingerprint_of(config, data, world))
    if not world.is_main:
        world.wait_for_main()
        return config
    data.tokenizer().save(folder / "tokenizer")
    text = to_yaml(config)
    write_environment(folder, text, world, fingerprint_of(config, data, world))
    # Last: from now on a resume goes by it.
    replace_file(folder / "config.yaml", text.encode())
    (folder / REQUESTED).unlink()
    world.wait_for_main()
    return config
