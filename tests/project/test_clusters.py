"""The ready files for clusters, as far as they can be tried without one: their shells and YAML are
read, and the commands in them are ones that `pretrain train` takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import compose, parse_overrides
from pretrain.runner.request import read_target

FOLDER = Path(__file__).parents[2] / "docs/how-to/clusters"


def scripts() -> dict[str, str]:
    job: dict[str, Any] = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    sky = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    return {
        "slurm": (FOLDER / "slurm.sbatch").read_text(),
        "kubernetes": pod["args"][0],
        "skypilot": sky["run"],
        "the set-up of skypilot": sky["setup"],
    }


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot", "the set-up of skypilot"])
def test_a_shell_can_read_it(name: str) -> None:
    shell = "bash" if name == "slurm" else "sh"
    subprocess.run([shell, "-n"], input=scripts()[name], text=True, check=True)


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot"])
def test_its_commands_are_legal(name: str) -> None:
    """What a first start says, and what a job says that was begun before."""
    text = scripts()[name].replace('"$run"', "runs/on-slurm")
    first, again = re.findall(r"words=[(\"](train [^\")]*)[\")]", text)
    rest: list[str] = []
    settings = parse_overrides(shlex.split(first), others=rest)
    verb, recipe, flag, folder = rest
    assert (verb, flag) == ("train", "--run")
    config = compose([*read_target(recipe)[1], settings])
    assert config.train.steps == 10_000
    # Two machines of eight: a copy of the model on each.
    assert config.parallel.resolve(16).data == 2
    assert again == f"train --resume --run {folder}"
    assert f"{folder}/config.yaml" in text.replace("$run", folder)


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "skypilot.yaml"])
def test_restarts_do_not_meet_at_addresses_of_the_dead(name: str) -> None:
    """Without it they do, three times of four (`test_launch`'s two torchruns)."""
    found = re.search(
        r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE\W+(?:value\W+)?1", (FOLDER / name).read_text()
    )
    assert found is not None


def test_the_operator_starts_as_many_as_the_command_expects() -> None:
    spec = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    gpus = worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert worker["replicas"] == spec["elasticPolicy"]["minReplicas"] == 2
    assert int(spec["nprocPerNode"]) == gpus == 8
