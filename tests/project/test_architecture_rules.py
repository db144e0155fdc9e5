"""What each source file keeps by itself: size, names, safety, no work at import, no local traces.

Each rule is held against the source of the package, and against a few lines that break it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import architecture
import architecture_rules as rules
from architecture import Module

MODULES = architecture.read_modules()
RECORDS = rules.record_classes(MODULES)

Rule = Callable[[Module], list[str]]
TextRule = Callable[[str, str], list[str]]

RULES: list[Rule] = [
    rules.sizes,
    rules.banned_names,
    rules.torch_distributed,
    rules.cuda_calls,
    rules.environment_reads,
    rules.unsafe_code,
    rules.posix_imports,
    rules.work_at_import,
]
TEXT_RULES: list[TextRule] = [rules.open_tasks, rules.machine_paths, rules.registries]

TEXT_SUFFIXES = frozenset({".py", ".md", ".yaml", ".yml", ".toml", ".css", ".js", ".html", ".txt"})


def published_texts() -> Iterator[Path]:
    """Yield what a stranger reads: the source, docs/ and the pages at the top."""
    for folder in ("src", "docs"):
        for path in sorted((architecture.ROOT / folder).rglob("*")):
            if path.suffix in TEXT_SUFFIXES:
                yield path
    yield from sorted(architecture.ROOT.glob("*.md"))
    yield from (architecture.ROOT / name for name in ("Makefile", "constraints.txt"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps(rule: Rule) -> None:
    if rule is rules.work_at_import:
        breaches = [b for module in MODULES for b in rules.work_at_import(module, RECORDS)]
    else:
        breaches = [breach for module in MODULES for breach in rule(module)]
    assert breaches == []


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_published_files_keep(rule: TextRule) -> None:
    paths = list(published_texts())
    names = [str(path.relative_to(architecture.ROOT)) for path in paths]
    assert "README.md" in names
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert [b for name, text in zip(names, texts, strict=True) for b in rule(name, text)] == []


def test_the_source_is_small() -> None:
    n_lines = sum(len(module.text.splitlines()) for module in MODULES)
    assert n_lines <= rules.MOST_LINES


def long_function(lines: int) -> str:
    """Write a function of that many lines."""
    return "def f():\n" + "    x = 1\n" * (lines - 1)


BREACHES: list[tuple[Rule, str]] = [
    (rules.sizes, "x = 1\n" * 600),
    (rules.sizes, long_function(80)),
    (rules.sizes, "async " + long_function(80)),
    (rules.sizes, "class A:\n" + "".join(f"    {x}\n" for x in long_function(80).splitlines())),
    (rules.banned_names, "class CheckpointManager: ..."),
    (rules.banned_names, "class BaseModel: ..."),
    (rules.banned_names, "def process_batch(): ..."),
    (rules.banned_names, "async def handle(): ..."),
    (rules.banned_names, "class A:\n    def _misc(self): ..."),
    (rules.torch_distributed, "import torch.distributed as dist"),
    (rules.torch_distributed, "from torch import distributed"),
    (rules.torch_distributed, "def f():\n    from torch.distributed.tensor import DTensor"),
    (rules.torch_distributed, "def f():\n    return torch.distributed.get_rank()"),
    (rules.cuda_calls, "def f(x):\n    return x.cuda()"),
    (rules.environment_reads, "import os\ndef f():\n    return os.environ['HOME']"),
    (rules.environment_reads, "import os\ndef f():\n    return os.getenv('HOME')"),
    (rules.environment_reads, "from os import environ"),
    (rules.unsafe_code, "import pickle"),
    (rules.unsafe_code, "def f():\n    from marshal import loads"),
    (rules.unsafe_code, "def f(x):\n    return eval(x)"),
    (rules.unsafe_code, "def f(x):\n    exec(x)"),
    (rules.unsafe_code, "def f(x):\n    return torch.load(x, weights_only=True)"),
    (rules.unsafe_code, "def f(x):\n    return yaml.load(x, Loader=yaml.SafeLoader)"),
    (rules.unsafe_code, "def f(x):\n    subprocess.run(x, shell=True)"),
    (rules.unsafe_code, "def f(x, y):\n    subprocess.run(x, shell=y)"),
    (rules.unsafe_code, "def f(x):\n    return np.load(x, allow_pickle=True)"),
    (rules.posix_imports, "import resource"),
    (rules.work_at_import, "print('hello')"),
    (rules.work_at_import, "torch.set_num_threads(2)"),
    (rules.work_at_import, "DEVICE = torch.device('cpu')"),
    (rules.work_at_import, "TEXT = Path('a').read_text()"),
    (rules.work_at_import, "class A:\n    now = time.time()"),
    (rules.work_at_import, "def f(seed=random.random()): ..."),
    (rules.work_at_import, "@register('a')\ndef f(): ..."),
    (rules.work_at_import, "try:\n    setup()\nexcept OSError:\n    pass"),
    (rules.work_at_import, "if sys.platform == 'linux':\n    X = setup()"),
    (rules.work_at_import, "X = [load(name) for name in NAMES]"),
    (rules.work_at_import, "X: int = load()"),
    (rules.work_at_import, "for name in NAMES:\n    X = name"),
    (rules.work_at_import, "with LOCK:\n    X = 1"),
    (rules.work_at_import, "torch.backends.cudnn.benchmark = True"),
    (rules.work_at_import, "TABLE['a'] = 1"),
    (rules.work_at_import, "A = Unknown(1)"),
    (rules.work_at_import, "def f():\n    return open('x')\nA = f()"),
    (rules.work_at_import, "def f():\n    for x in y: z = x\nA = f()"),
]


@pytest.mark.parametrize(("rule", "text"), BREACHES)
def test_a_breach_is_found(rule: Rule, text: str) -> None:
    assert len(rule(Module("pretrain.model.decoder", text))) >= 1


HARMLESS = '''
"""A page."""
from __future__ import annotations
import re
from dataclasses import dataclass, field
if TYPE_CHECKING:
    from x import y
__all__ = ["A"]
PATTERN = re.compile("a")
NAMES = frozenset("a b".split())
LOGGER = logging.getLogger(__name__)
T = TypeVar("T")
@dataclass(frozen=True, slots=True)
class A:
    x: list[int] = field(default_factory=list)
    def handle_data(self, data: str) -> None:
        os.path.join("a", model.eval())
SMALL = A()
def _row(n: int) -> dict[str, int]:
    return {"n": n}
TABLE = {"a": _row(1)}
def f(x: int = 3) -> None:
    import fcntl
    print(x)
def base64_of_processes() -> None: ...
if __name__ == "__main__":
    f()
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_an_ordinary_page_passes(rule: Rule) -> None:
    module = Module("pretrain.model.decoder", HARMLESS.strip())
    if rule is rules.work_at_import:
        assert rules.work_at_import(module, rules.record_classes([module])) == []
    else:
        assert rule(module) == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (rules.torch_distributed, "pretrain.distributed", "import torch.distributed"),
        (rules.torch_distributed, "pretrain.checkpoint.save", "import torch.distributed"),
        (rules.environment_reads, "pretrain.distributed", "def f():\n    return os.environ"),
        (rules.environment_reads, "pretrain.cli.commands.train", "def f():\n    return os.environ"),
    ],
)
def test_packages_with_permission_pass(rule: Rule, name: str, text: str) -> None:
    assert rule(Module(name, text)) == []


@pytest.mark.parametrize("name", ["pretrain.utils", "pretrain.data.common", "pretrain.base.shards"])
def test_a_banned_file_or_folder_is_found(name: str) -> None:
    assert len(rules.banned_names(Module(name, ""))) == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (rules.open_tasks, "x = 1  # TO" + "DO: later"),
        (rules.open_tasks, "# FIX" + "ME(ann)"),
        (rules.machine_paths, "cd /" + "root/x"),
        (rules.machine_paths, "open('/" + "tmp')"),
        (rules.machine_paths, "`/" + "home/ann/run`"),
        (rules.registries, "pip install --index-url https://download.pytorch" + ".org/whl/cpu"),
        (rules.registries, "https://py" + "pi.org/simple"),
    ],
)
def test_a_breach_in_a_text_is_found(rule: TextRule, text: str) -> None:
    assert len(rule("README.md", "fine\n" + text)) == 1


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_an_ordinary_text_passes(rule: TextRule) -> None:
    assert rule("README.md", "TODO (#12): runs/work/x, and/or tmp/y, pip install pretrain") == []
