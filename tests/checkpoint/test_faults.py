"""The fault suite in its short form: each part once, small, with its table in what a failure says.

Parts that fork run in one fresh interpreter, as a process that forks must have no threads. The long
forms are `make faults-ci` and `make faults`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.__main__ import PARTS, SIZES, memory_folder, run_part
from faults.broken_savers import BROKEN
from faults.table import render

SEED = 1
WITHOUT_FORKS = ("crash-states", "broken-savers", "errors", "corruption")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", WITHOUT_FORKS)
def test_every_fault_is_survived(part: str) -> None:
    rows = list(run_part(part, SIZES["short"], seed=SEED, on=memory_folder()))
    assert rows
    assert all(row.passed for row in rows), "\n" + render(rows)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_every_fault_in_a_child_is_survived() -> None:
    parts = [name for name in PARTS if name not in WITHOUT_FORKS]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])
    done = subprocess.run(
        [sys.executable, "-m", "faults", "short", *parts, "--seed", str(SEED)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_twelve_wrong_savers() -> None:
    assert len({edit.__name__ for edit in BROKEN}) == 12
