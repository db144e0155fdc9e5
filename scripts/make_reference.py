"""Write docs/reference/{settings,commands,api,metrics,resume-checks}.md from the package itself.

python scripts/make_reference.py [--check]

Settings come from the fields of the config classes and their docstrings, commands from their
`--help`, the API from the docstrings of the public names. With --check nothing is written, and the
exit code is 1 if a page on disk differs.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pretrain
from pretrain.cli import COMMANDS
from pretrain.cli.options import field_docstrings
from pretrain.config import SECTIONS
from pretrain.evaluate.loss import Score
from pretrain.run.log import METRICS_KEYS, SAMPLES_KEYS
from pretrain.runner.checks import RESUME_CHECKS
from pretrain.runner.open import LoadedModel
from pretrain.runner.start import RunResult

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by scripts/make_reference.py; edit the source, then run `make docs`. -->"
OTHER_ERRORS = (
    "Other functions of a resume can find an error too: before requested_config, "
    "`n_processes_of_run` (the number of processes is not valid) and `launch` (there is no memory "
    "for this number); before only_writer, or after open_text in one process, `open_world` (the "
    "device is not available here); before check_text_settings, `load_previous` (changes.jsonl "
    "cannot be read); and before check_same_on_all_ranks, `_with_task_interval` (several processes "
    "resume with their first in-loop tasks, without evaluate.every)."
)


def main(arguments: list[str]) -> int:
    """Write or check the pages; return the exit code."""
    stale = []
    pages = {
        "settings": settings(),
        "commands": commands(),
        "api": api(),
        "metrics": metrics(),
        "resume-checks": resume_checks(),
    }
    for name, text in pages.items():
        path = FOLDER / f"{name}.md"
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run: python scripts/make_reference.py")
    return 1 if stale else 0


def settings() -> str:
    """Return the page of all settings: name, type and range, default, meaning."""
    lines = [
        "# Settings",
        "",
        GENERATED,
        "",
        "Every setting can stand in a YAML file (a section with keys) or on the command line"
        " (`--SECTION.KEY VALUE`). An empty default is resolved at the start and written to the"
        " run's `config.yaml`.",
    ]
    for section, kind in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        meanings = field_docstrings(kind)
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            shown = "" if field.default in (None, ()) else f"`{field.default}`"
            meaning = meanings.get(field.name, "").replace("|", "\\|")
            lines.append(
                f"| `{field.name}` | {type_text(hints[field.name])} | {shown} | {meaning} |"
            )
    return "\n".join(lines) + "\n"


def type_text(hint: Any) -> str:
    """Return a type as a reader of a table wants it: `int`, a choice of values, with its range."""
    if typing.get_origin(hint) is typing.Annotated:
        base, *extras = typing.get_args(hint)
        return f"{type_text(base)}; {', '.join(each.expected for each in extras)}"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (tuple, list):
        return f"list of {type_text(options[0])}"
    if options:
        return " or ".join(type_text(option) for option in options)
    return getattr(hint, "__name__", str(hint))


def commands() -> str:
    """Return the page of all commands: what `--help` prints, the settings of `train` aside."""
    lines = ["# Commands", "", GENERATED, ""]
    lines.append(
        "Every command takes `--json`. Exit codes: [troubleshooting](../troubleshooting.md)."
    )
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    for name in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "pretrain", name, "--help"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        text = done.stdout.partition("\nsettings, in a config file")[0].strip()
        lines += ["", f"## {name}", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Return the page of the keys of metrics.jsonl and samples.jsonl."""
    lines = ["# Keys of metrics.jsonl and samples.jsonl", "", GENERATED, ""]
    lines.append(
        "A line of metrics.jsonl has a `kind`, and the keys of that kind. Steps count from 1: step"
        " N is the state after N updates."
    )
    for kind, keys in [*METRICS_KEYS.items(), ("samples.jsonl", SAMPLES_KEYS)]:
        lines += ["", f"## {kind}", "", "| key | meaning |", "|---|---|"]
        lines += [f"| `{key}` | {meaning} |" for key, meaning in keys.items()]
    return "\n".join(lines) + "\n"


def resume_checks() -> str:
    """Return the page of the checks of a resume, in their order."""
    lines = [
        "# What a resume checks",
        "",
        GENERATED,
        "",
        "`pretrain train --resume` makes these checks, in this order, before its first step. They"
        " are functions of the named files; a failed one is an error that says what differs"
        " and what to do ([resume after a crash](../how-to/resume.md)). After the last one, what"
        " changes is recorded, and a tokenizer folder that is damaged or of another text is written"
        " again.",
        "",
    ]
    checks = {}
    for check in RESUME_CHECKS:
        first_paragraph = (inspect.getdoc(check) or "").partition("\n\n")[0]
        file = check.__module__.removeprefix("pretrain.").replace(".", "/") + ".py"
        checks[f"{check.__name__}** (`{file}`)"] = " ".join(first_paragraph.split())
    checks |= {  # those of `Run.open`, while it loads the checkpoint
        "check_disk** (`train/state.py`)": "The disk has space for the next checkpoints.",
        "restore** (`train/state.py`)": "Every byte of weights and optimizer state is as it was"
        " saved.",
        "load_log** (`train/state.py`)": "metrics.jsonl has the rollbacks that the"
        " position of the checkpoint counts with.",
    }
    for number, (name, description) in enumerate(checks.items(), start=1):
        lines.append(f"{number}. **{name}: {description}")
    lines += ["", OTHER_ERRORS]
    return "\n".join(lines) + "\n"


def api() -> str:
    """Return the page of the public names, with signatures and docstrings."""
    lines = ["# Python API", "", GENERATED, ""]
    lines.append("`import pretrain` is instant: a name loads torch when it is first used.")
    names = [name for name in pretrain.__all__ if name != "__version__"]
    public = {name: pretrain.public_function(name) for name in names}
    results = {kind.__name__: kind for kind in (LoadedModel, RunResult, Score)}
    for name, value in {**public, **results}.items():
        lines += ["", f"## pretrain.{name}" if name in public else f"## {name}", ""]
        if inspect.isclass(value):
            lines += [paragraphs(value)]
            for method, function in vars(value).items():
                if isinstance(function, property) and inspect.getdoc(function):
                    lines += ["", f"### {name}.{method}", "", paragraphs(function)]
                elif callable(function) and not method.startswith("_"):
                    lines += ["", f"### {name}.{method}", "", signature(method, function), ""]
                    lines += [paragraphs(function)]
        else:
            lines += [signature(f"pretrain.{name}", value), "", paragraphs(value)]
    return "\n".join(lines) + "\n"


def signature(name: str, function: Any) -> str:
    """Return a function's signature as a block, an argument a line where it is long."""
    described = inspect.signature(function)
    parts = []
    for parameter in described.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        annotation = parameter.annotation
        if parameter.name == "model" and not name.startswith("pretrain."):  # of a method
            parameter, annotation = parameter.replace(name="self"), parameter.empty
        typed = "" if annotation is parameter.empty else f": {annotation}"
        parts.append(f"{stars}{parameter.name}{typed}{default}")
    text = f"{name}({', '.join(parts)}) -> {described.return_annotation}"
    if len(text) > 90:
        text = f"{name}(\n    " + ",\n    ".join(parts) + f",\n) -> {described.return_annotation}"
    return f"```text\n{text}\n```"


def paragraphs(value: Any) -> str:
    """Return a docstring, its `Args:` and like sections as fixed-width text."""
    text = inspect.getdoc(value) or ""
    head, separator, rest = text.partition("\n\nArgs:")
    if not separator:
        return text
    return f"{head}\n\n```text\nArgs:{rest}\n```"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
