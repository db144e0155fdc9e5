"""The files for clusters, as far as they can be tested without one: shells and YAML parse them, and
`pretrain train` accepts their commands."""

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
def test_scripts_have_valid_syntax(name: str) -> None:
    shell = "bash" if name == "slurm" else "sh"
    subprocess.run([shell, "-n"], input=scripts()[name], text=True, check=True)


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot"])
def test_commands_of_scripts_are_valid(name: str) -> None:
    """The command of a first start, and that of a job that has started before."""
    text = scripts()[name].replace('"$run"', "runs/on-slurm")
    first, again = re.findall(r"words=[(\"](train [^\")]*)[\")]", text)
    rest: list[str] = []
    settings = parse_overrides(shlex.split(first), others=rest)
    command, recipe, flag, folder = rest
    assert (command, flag) == ("train", "--run")
    config = compose([*read_target(recipe)[1], settings])
    assert config.train.steps == 10_000
    # Two machines of eight: a copy of the model on each.
    assert config.parallel.resolve(16).data == 2
    assert again == f"train --resume --run {folder}"
    assert f"{folder}/config.yaml" in text.replace("$run", folder)


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "skypilot.yaml"])
def test_restarts_do_not_use_the_address_of_a_dead_process(name: str) -> None:
    """Without the variable, 3 of 4 restarts fail (`test_launch`'s two torchruns)."""
    found = re.search(
        r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE\W+(?:value\W+)?1", (FOLDER / name).read_text()
    )
    assert found is not None


def test_the_operator_starts_the_expected_number_of_processes() -> None:
    spec = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    gpus = worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert worker["replicas"] == spec["elasticPolicy"]["minReplicas"] == 2
    assert int(spec["nprocPerNode"]) == gpus == 8
