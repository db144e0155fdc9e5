"""The source of the package as text: modules, and what each imports.

Who may import whom is checked by import-linter (pyproject.toml); this serves the rules that it does
not have: undeclared packages, computed imports, and those of architecture_rules. Nothing is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "pretrain"
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / PACKAGE

# Packages that work without torch, and single modules that load without it.
WITHOUT_TORCH = frozenset({"fileio", "machine", "corpus", "tokenizer", "run", "report", "config"})
TORCH_FREE_FILES = frozenset(
    {f"{PACKAGE}.rng", f"{PACKAGE}.data.format", f"{PACKAGE}.data.preparation"}
)


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted name, its text, and whether it is an `__init__.py`."""

    name: str
    text: str
    is_package: bool = False

    @property
    def package(self) -> str:
        """The package below `pretrain`; "" for `pretrain` itself."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text, filename=self.name)

    @property
    def loads_without_torch(self) -> bool:
        """Whether importing it must not import torch: configs and `__init__`s are among these."""
        return (
            self.package in WITHOUT_TORCH
            or self.is_package
            or self.name in TORCH_FREE_FILES
            or self.name.endswith(".config")
        )


@dataclass(frozen=True, slots=True)
class Import:
    """One import: the module, the line, and whether it waits for a call or a type checker."""

    target: str
    line: int
    lazy: bool


def read_modules(source: Path = SOURCE) -> list[Module]:
    """Read every Python file below the package's folder, sorted by name."""
    modules = []
    for path in sorted(source.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(source).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return modules


def imports_of(module: Module) -> list[Import]:
    """List what a module imports from other packages, and of ours the modules it names."""
    found = []
    for node, lazy in _walk(module.tree, lazy=False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or PACKAGE
            is_ours = origin.split(".")[0] == PACKAGE
            for alias in node.names:  # of others, `from torch import distributed` too
                target = origin if is_ours else f"{origin}.{alias.name}"
                found.append(Import(target, node.lineno, lazy))
        elif isinstance(node, ast.Call) and _is_import_call(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.append(Import(name.value, node.lineno, lazy))
    return found


def computed_imports(module: Module) -> list[str]:
    """Name the imports of a computed name outside `__init__`s and cli: a linter cannot see them."""
    if module.is_package or module.package == "cli":
        return []
    return [
        f"{module.name}:{node.lineno} imports a computed name; write the import out"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and _is_import_call(node.func)
        and not (node.args and isinstance(node.args[0], ast.Constant))
    ]


def undeclared_imports(
    modules: Sequence[Module],
    *,
    always: Iterable[str],
    optional: Iterable[str],
    stdlib: Iterable[str],
) -> list[str]:
    """Name imports of other packages that pyproject.toml does not declare.

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


def _is_import_call(function: ast.expr) -> bool:
    return ast.unparse(function) in {"importlib.import_module", "import_module", "__import__"}


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node, with whether it waits for a call or for a type checker."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, lazy
        yield from _walk(child, lazy=lazy or is_function or is_typing)
