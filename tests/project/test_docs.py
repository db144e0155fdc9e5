"""The documentation is correct: its Python prints what it shows, its commands work, its links,
commands, settings and file names exist.

A page is a program: its ```python blocks run in order, in one namespace, in an empty folder. A
```text block directly under one is what it prints. README's ```sh lines that begin with `pretrain`
are typed as they stand, only that a new run is given the tiny settings of tests/helpers/tiny.py,
20 steps, and a part of the bundled corpus for all of it. The proofs of `verify` and `doctor` are
left out.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import COMMANDS, main
from pretrain.config import SECTIONS
from pretrain.corpus.reading import read_documents
from pretrain.model.families import FAMILIES
from pretrain.selftest import EXACT, NOT_JUDGED, Check, doctor, verify
from tiny import TINY

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```)?", re.MULTILINE | re.DOTALL
)
# Two packages that have one page.
PAGE_OF_PACKAGE = {"cli": "config-and-cli", "config": "config-and-cli"}
# Weights after some steps differ in their last digits between machines.
TOLERANCE = 0.02


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its Python and without what it prints."""
    return PROGRAM.sub("", read(page))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def looks_like(found: str, shown: str) -> bool:
    """Whether two texts are the same word for word, numbers with a point nearly so."""
    pairs = list(zip(found.split(), shown.split(), strict=False))
    return len(found.split()) == len(shown.split()) and all(
        a == b
        or (_is_decimal(a) and _is_decimal(b) and math.isclose(_at(a), _at(b), rel_tol=TOLERANCE))
        for a, b in pairs
    )


def _is_decimal(word: str) -> bool:
    return re.fullmatch(r"-?\d+\.\d+[,;]?", word) is not None


def _at(word: str) -> float:
    return float(word.rstrip(",;"))


@pytest.fixture(autouse=True)
def _own_families() -> Iterator[None]:
    """A page adds a family; the tests that come after it are not to find it."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize("page", [p for p in PAGES if PROGRAM.search(read(p))], ids=name_of)
def test_python_in_the_docs_prints_the_shown_output(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(PROGRAM.finditer(read(page)), start=1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block["code"], f"{name_of(page)}, block {number}", "exec"), names)
        if block["printed"] is not None:
            shown = block["printed"]
            assert looks_like(printed.getvalue(), shown), f"block {number}: {printed.getvalue()}"


def test_a_wrong_figure_would_be_found() -> None:
    assert looks_like("3.36 nats, (8, 32)", "3.35 nats, (8, 32)")
    assert not looks_like("3.36 nats", "3.63 nats")
    assert not looks_like("(8, 32)", "(8, 33)")
    assert not looks_like("one two", "one")


@pytest.mark.timeout(900)  # all of README in one test, on a busy machine
def test_the_commands_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    Path("questions.jsonl").write_text(
        '{"query": "It was the", "choices": ["best", "sea"], "gold": 0}'
    )
    Path("articles.jsonl").write_text('{"title": "Whale", "text": "A whale is a mammal."}')
    Path("books").mkdir()
    Path("books/one.txt").write_text("Call me Ishmael. " * 300)
    Path("mine.yaml").write_text("data: {source: my.txt}\n")
    documents = list(read_documents("bundled"))[2::6]
    assert "moby-dick-chapter-2" in {document.id for document in documents}
    records = [{"id": d.id, "title": d.title, "text": d.text[:5000]} for d in documents]
    Path("part.jsonl").write_text("\n".join(map(json.dumps, records)))
    lines = [
        shlex.split(line, comments=True)
        for kind, body in BLOCK.findall(read(ROOT / "README.md"))
        if kind == "sh"
        for line in body.splitlines()
        if line.startswith("pretrain ")
    ]
    assert {words[1] for words in lines} == set(COMMANDS)
    unknown: dict[str, str] = defaultdict(str)
    proven = {"verdict": EXACT, "fingerprint": unknown, "machine": unknown}
    own = [word for word in TINY if word not in ("--tokenizer.vocab_size", "400")]
    for words in lines:
        if words[1] in ("doctor", "verify"):  # their proofs take a minute, and have tests
            monkeypatch.setattr(doctor, "check_compile", lambda _: Check(NOT_JUDGED, "not here"))
            monkeypatch.setattr(doctor, "_check_resume", lambda *_: proven)
            monkeypatch.setattr(verify, "compare_runs", lambda *_: proven)
        is_new = words[1] == "train" and "--resume" not in words
        typed = [*words, *own, "--train.steps", "20"] if is_new else words
        if is_new and (len(words) == 2 or words[2].startswith("--")):
            typed += ["--data.source", "part.jsonl"]
        assert main(typed[1:]) == 0, typed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_on_a_page_exist(page: Path) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" not in target, f"{target}: the docs are read offline"
        assert (page.parent / target).exists(), target
    for command in re.findall(r"(?:`|^)pretrain ([a-z]+)", text, re.MULTILINE):
        assert command in {*COMMANDS, "help"}, command
    for section, key in re.findall(r"--([a-z]+)\.([a-z_]+)", text):
        assert key in {field.name for field in fields(SECTIONS[section])}, f"--{section}.{key}"
    for name in re.findall(r"\b[a-z_]+(?:/[a-z_]+)*/[a-z_]+\.py\b", text):
        assert any((at / name).is_file() for at in (ROOT, ROOT / "src" / "pretrain")), name


def messages_of(file: Path) -> list[str]:
    """The string literals of a file, joined, with "\0" for each value; no docstrings."""
    nodes = list(ast.walk(ast.parse(read(file))))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", None) for part in node.values]
            texts.append("".join(part if isinstance(part, str) else "\0" for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts += [] if node in docstrings else [node.value]
    return texts


def test_the_code_prints_the_messages_of_troubleshooting() -> None:
    printed = [text for file in (ROOT / "src").rglob("*.py") for text in messages_of(file)]
    cells = re.findall(r"^\| (.*?) \|", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    quoted = [quote for cell in cells for quote in re.findall("`([^`]+)`", cell)]
    assert len(quoted) > 15
    for quote in quoted:
        for part in re.split(r"\b(?:N|DIR|NAME)\b|\.\.\.", quote):
            assert any(part in text for text in printed), f"{part!r} of {quote!r}"


def test_names_of_the_internals_pages_exist() -> None:
    classes: dict[str, set[str]] = defaultdict(set)
    names: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            if isinstance(node, ast.ClassDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        classes[node.name].add(inner.name)
                    elif isinstance(inner, ast.AnnAssign):
                        classes[node.name].add(ast.unparse(inner.target).removeprefix("self."))
    for page in (ROOT / "docs" / "internals").glob("*.md"):
        text = prose(page)
        for owner, name in re.findall(r"`([A-Z]\w*[a-z]\w*)\.([a-z_]\w*)", text):
            assert owner not in classes or name in classes[owner], f"{page.name}: {owner}.{name}"
        for line in re.findall(r"^\*\*Public names:\*\* .*$", text, re.MULTILINE):
            for name in re.findall(r"`([A-Za-z_]\w*)`", line):
                assert name in names, f"{page.name}: {name}"


def test_every_package_has_a_page_in_the_index() -> None:
    package = ROOT / "src" / "pretrain"
    packages = {p.name for p in package.iterdir() if (p / "__init__.py").exists()} | {
        "config",
        "distributed",
    }
    pages = {PAGE_OF_PACKAGE.get(name, name) for name in packages}
    assert pages == {p.stem for p in (ROOT / "docs" / "internals").glob("*.md")}
    index = read(ROOT / "docs" / "README.md")
    assert all(f"(internals/{page}.md)" in index for page in pages)
