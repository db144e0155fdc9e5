"""Private words: the list of scripts/banned_words.toml finds them in names, prose and docs, and
nothing that is published has one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_words.py"


@pytest.fixture(scope="module")
def check_words() -> ModuleType:
    specification = importlib.util.spec_from_file_location("check_words", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_published_files_have_no_private_word() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("src/a.py", "def slope(x): pass\n", "slope"),
        ("src/a.py", "class FollowedTask: pass\n", "FollowedTask"),
        ("src/a.py", "def f(asked): pass\n", "asked"),
        ("src/a.py", "x.leads = 1\n", "x.leads"),
        ("src/a.py", '"""What this hangs on."""\n', "hangs on"),
        ("src/a.py", "x = 1  # learned by heart\n", "by heart"),
        ("src/a.py", 'raise ValueError(f"{x}; legal: 1 to 3")\n', "legal: "),
        ("docs/a.md", "The run goes on.\n", "goes on"),
        ("src/a.yaml", "a: 1  # laid over processes\n", "laid over"),
    ],
)
def test_a_private_word_is_found(check_words: ModuleType, name: str, text: str, word: str) -> None:
    found = [match for _, match, _ in check_words.findings(name, text)]
    assert found == [word.removeprefix("x.")], found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("src/a.py", "def grad(x): pass\n"),
        ("src/a.py", "x = slope_of_mountain()\n"),  # used, not defined here
        ("src/a.py", '"""There is no file; `slope` is quoted."""\n'),
        ("docs/a.md", "```python\nslope = 1\n```\nIt depends on the seed.\n"),
    ],
)
def test_a_plain_text_passes(check_words: ModuleType, name: str, text: str) -> None:
    assert check_words.findings(name, text) == []
