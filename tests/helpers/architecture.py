"""The import graph of a package, read from its source without running it.

Source files come in, and sentences come out, one for each place that breaks a rule of who may
import whom; an empty list means that all is well. Imports inside functions and under TYPE_CHECKING
count as much as those at the top. A file that is no Python is refused with its SyntaxError.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "pretrain"
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / PACKAGE

EVERYTHING = frozenset({"*"})
FOR_ALL = frozenset({"validation"})  # checks of config fields, which every room may import
CONFIGS = frozenset({"*.config"})  # each room's config module, and nothing else of the room

# Who may import whom, in the order of the data. "" is the package itself. `plan` and `serve` come
# later and have their row already.
TABLE: Mapping[str, frozenset[str]] = {
    "": EVERYTHING,
    "fileio": frozenset(),
    "rng": frozenset(),
    "distributed": frozenset({"compat"}),
    "compat": frozenset(),
    "validation": frozenset(),
    "corpus": frozenset({"fileio", "rng"}),
    "tokenizer": frozenset({"fileio"}),
    "data": frozenset({"fileio", "rng", "corpus", "tokenizer"}),
    "model": frozenset({"rng", "compat"}),
    "optim": frozenset({"distributed", "compat"}),
    "parallel": frozenset({"distributed", "compat", "model", "optim"}),
    "checkpoint": frozenset({"fileio", "distributed"}),
    "generate": frozenset({"rng", "compat", "tokenizer", "model"}),
    "evaluate": frozenset(
        {"fileio", "rng", "distributed", "corpus", "tokenizer", "data", "model", "generate"}
    ),
    "run": frozenset({"fileio"}),
    "train": frozenset(
        {
            "fileio",
            "rng",
            "distributed",
            "compat",
            "config",
            "data",
            "model",
            "optim",
            "parallel",
            "checkpoint",
            "generate",
            "evaluate",
            "run",
        }
    ),
    "export": frozenset({"fileio", "rng", "tokenizer", "model", "generate", "evaluate"}),
    "plan": frozenset({"data", "model", "optim", "parallel", "train", "run"}),
    "report": frozenset({"fileio", "run"}),
    "serve": frozenset({"tokenizer", "model", "generate", "evaluate", "run", "report"}),
    "config": CONFIGS,
    "runner": frozenset(
        {
            "fileio",
            "distributed",
            "compat",
            "config",
            "corpus",
            "tokenizer",
            "data",
            "model",
            "optim",
            "parallel",
            "checkpoint",
            "generate",
            "evaluate",
            "run",
            "train",
            "export",
            "report",
        }
    ),
    "selftest": frozenset(
        {
            "fileio",
            "rng",
            "distributed",
            "compat",
            "config",
            "corpus",
            "tokenizer",
            "data",
            "model",
            "optim",
            "parallel",
            "checkpoint",
            "generate",
            "evaluate",
            "run",
            "train",
            "export",
            "report",
            "runner",
        }
    ),
    "cli": EVERYTHING,
    "__main__": frozenset({"cli"}),
}

# Rooms where torch is not even imported lazily, and single files that come up without it.
WITHOUT_TORCH = frozenset({"fileio", "corpus", "tokenizer", "run", "report", "config"})
TORCH_FREE_FILES = frozenset(
    {f"{PACKAGE}.rng", f"{PACKAGE}.data.format", f"{PACKAGE}.data.preparation"}
)


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted name, whether it is an `__init__.py`, and its text."""

    name: str
    text: str
    is_package: bool = False

    @property
    def room(self) -> str:
        """The second part of the dotted name; "" for the package itself."""
        return room_of(self.name)

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text, filename=self.name)


@dataclass(frozen=True, slots=True)
class Import:
    """One import: the module, the line, and whether it waits for a call or a type checker."""

    target: str
    line: int
    lazy: bool


def room_of(name: str) -> str:
    """Return the room of a dotted name inside the package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_ours(name: str) -> bool:
    """Say whether a dotted name lies inside the package."""
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def read_modules(source: Path = SOURCE) -> list[Module]:
    """Read every Python file below the package's folder, sorted by name."""
    modules = []
    for path in sorted(source.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(source).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return modules


def imports_of(module: Module, known: Iterable[str] = ()) -> list[Import]:
    """List what a module imports; `known` names tell a submodule from a name inside a module."""
    names = {*known, *(f"{PACKAGE}.{room}" for room in TABLE if room)}
    found: list[Import] = []
    has_computed = False
    for node, lazy in _walk(module.tree, lazy=False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(module, node.module or "", level=node.level)
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                target = full if full in names or not is_ours(origin) else origin
                found.append(Import(target, node.lineno, lazy))
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                dots = len(argument.value) - len(argument.value.lstrip("."))
                target = _absolute(module, argument.value[dots:], level=dots)
                found.append(Import(target, node.lineno, lazy))
            else:
                has_computed = True
    if has_computed:  # a lazy map: its values are dotted names, so they count as imports
        for constant in ast.walk(module.tree):
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                if re.fullmatch(rf"{PACKAGE}(\.\w+)+", constant.value):
                    found.append(Import(constant.value, constant.lineno, True))
    return found


def computed_imports(module: Module) -> list[str]:
    """Name the imports of a computed name outside room `__init__`s and cli: they hide from us."""
    if module.is_package or module.room == "cli":
        return []
    return [
        f"{module.name}:{node.lineno} imports a computed name; write the import out"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and _is_import_call(node.func)
        and not (node.args and isinstance(node.args[0], ast.Constant))
    ]


def forbidden_imports(modules: Sequence[Module]) -> list[str]:
    """Name every import that the table does not allow, and every room outside the table."""
    known = [module.name for module in modules]
    wrong = []
    for module in modules:
        if module.room not in TABLE:
            wrong.append(f"{module.name} lies in no room of the table")
            continue
        allowed = TABLE[module.room]
        for found in imports_of(module, known):
            is_for_all = room_of(found.target) in FOR_ALL
            if (
                not is_ours(found.target)
                or is_for_all
                or _allows(allowed, module.room, found.target)
            ):
                continue
            wrong.append(f"{module.name}:{found.line} may not import {found.target}")
    return wrong


def cycles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Find the groups of two or more nodes that reach each other (strongly connected, sorted)."""
    reached = {node: _reachable(edges, node) for node in edges}
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached.get(other, ())))
        for node in edges
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


def module_edges(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Return, for each module, the modules of the package that it imports."""
    known = {module.name for module in modules}
    return {
        module.name: {found.target for found in imports_of(module, known) if found.target in known}
        for module in modules
    }


def room_edges(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Return, for each room, the other rooms that its modules import.

    What `config` imports of a room is its config module alone, which imports no other room, so
    that is not counted: train may import `config`, and `config` the config of train.
    """
    edges: dict[str, set[str]] = {}
    known = [module.name for module in modules]
    for module in modules:
        targets = {
            room_of(found.target)
            for found in imports_of(module, known)
            if is_ours(found.target)
            and not (module.room == "config" and found.target.endswith(".config"))
        }
        edges.setdefault(module.room, set()).update(targets - {module.room})
    return edges


def is_torch_free(module: Module) -> bool:
    """Say whether a module must come up without torch: named ones, configs, room `__init__`s."""
    return (
        module.room in WITHOUT_TORCH
        or module.is_package
        or module.name in TORCH_FREE_FILES
        or module.name.endswith(".config")
    )


def torch_imports(modules: Sequence[Module]) -> list[str]:
    """Name the torch-free modules that import torch, directly or through what they import first."""
    by_name = {module.name: module for module in modules}
    imports = {name: imports_of(module, by_name) for name, module in by_name.items()}
    eager = {
        name: {package for f in found if not f.lazy for package in _with_packages(f.target)}
        for name, found in imports.items()
    }
    wrong = []
    for module in filter(is_torch_free, modules):
        for found in imports[module.name]:
            is_lazy_and_may_be = found.lazy and module.room not in WITHOUT_TORCH
            if _is_torch(found.target) and not is_lazy_and_may_be:
                wrong.append(f"{module.name}:{found.line} imports {found.target}")
        for other in sorted(_reachable(eager, module.name) - {module.name}):
            if other in imports and any(_is_torch(target) for target in eager[other]):
                wrong.append(f"{module.name} loads torch through {other}")
    return wrong


def undeclared_imports(
    modules: Sequence[Module],
    *,
    always: Iterable[str],
    optional: Iterable[str],
    stdlib: Iterable[str],
) -> list[str]:
    """Name imports of other people's packages that pyproject.toml does not declare.

    What is an extra may be imported lazily only: without it the rest has to work.
    """
    first = {PACKAGE, "__future__", *always, *stdlib}
    wrong = []
    for module in modules:
        for found in imports_of(module):
            top = found.target.split(".")[0]
            if top not in first and not (found.lazy and top in {*optional}):
                wrong.append(f"{module.name}:{found.line} imports {top}, which is not declared")
    return wrong


def _allows(allowed: frozenset[str], room: str, target: str) -> bool:
    if room_of(target) == room or target == PACKAGE or allowed == EVERYTHING:
        return True
    if allowed == CONFIGS:
        return target.endswith(".config") and target.count(".") == 2
    return room_of(target) in allowed


def _is_torch(target: str) -> bool:
    return target.split(".")[0] in {"torch", "torchvision"} or target == "safetensors.torch"


def _is_import_call(function: ast.expr) -> bool:
    return ast.unparse(function) in {"importlib.import_module", "import_module", "__import__"}


def _with_packages(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _absolute(module: Module, name: str, *, level: int) -> str:
    if level == 0:
        return name
    parts = module.name.split(".")
    up = level - 1 if module.is_package else level
    return ".".join(filter(None, [*parts[: len(parts) - up], name]))


def _reachable(edges: Mapping[str, Iterable[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(edges.get(node, ()))
    return seen


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node, with whether it waits for a call or for a type checker."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, lazy
        yield from _walk(child, lazy=lazy or is_function or is_typing)
