"""The documentation runs: its Python is executed, its commands are typed, its links lead
somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import VERBS, main
from tiny import TINY

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_in_the_docs_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page in order, in one namespace, in an empty folder; their asserts must
    hold."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{name_of(page)}, block {number}", "exec"), names)


def test_the_commands_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `pretrain ...` line, in order, in one folder; training is cut down to 20 steps of a
    tiny model."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    Path("books").mkdir()
    Path("books/one.txt").write_text("Call me Ishmael. " * 300)
    Path("mine.yaml").write_text("train: {steps: 20}\n")
    typed = [
        shlex.split(line, comments=True)
        for body in blocks(ROOT / "README.md", "sh")
        for line in body.splitlines()
        if line.startswith("pretrain ")
    ]
    assert {words[1] for words in typed} == set(VERBS)
    for words in typed:
        if words[1] == "train" and "--resume" not in words:
            own = [w for w in TINY if w not in ("--tokenizer.vocab_size", "400")]
            words = [*words, *own, "--train.steps", "20"]
        assert main(words[1:]) == 0, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" not in target, f"{target}: the docs are read offline"
        assert (page.parent / target).exists(), target


def test_every_room_has_its_page() -> None:
    rooms = {p.name for p in (ROOT / "src" / "pretrain").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= {p.stem for p in (ROOT / "docs" / "rooms").glob("*.md")}
