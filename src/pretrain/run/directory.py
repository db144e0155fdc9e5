"""The files of a run directory, and environment.json: the only place that names them.

A JSON file is replaced as a whole, so a reader finds its old or its new content. A disk that is
full, read-only or broken raises CannotSave: everything that was saved before is intact.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain import __version__, fileio

# Written before the first step. REQUESTED has the settings of the command until CONFIG, with a
# value in every field, replaces it.
REQUESTED = "requested.yaml"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer"
LOCK = "run.lock"
# Written during training.
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CLOCK = "clock.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_MANIFEST = "manifest.json"
POST_MORTEMS = "post-mortem"
CHANGES = "changes.jsonl"
# Written after the last step; a run with SUMMARY is finished.
BASELINES = "baselines.json"
PREDICTIONS = "predictions.json"
SUMMARY = "summary.json"
REPORT = "report.html"
# Written by other commands.
OVERLAP = "overlap.json"
VERIFICATION = "verification.json"
# The parts of a mix: in a folder with CONFIG, TOKENIZER and CHECKPOINTS.
MIX = "mix.json"
# Runs of further networks, and the mix of all, which is the result if the summary names it.
MEMBERS = "members"
MIX_FOLDER = "mix"
# Runs that hold out other parts of a tiny text, and what the summary says of all of them.
FOLDS = "folds"
CROSS_VALIDATION = "cross_validation"


class CannotSave(Exception):
    """A file of the run could not be written; what was saved before can be resumed."""

    exit_code = 75


@contextmanager
def cannot_save_on_error(path: Path) -> Iterator[None]:
    """Raise CannotSave for an OSError in the block, which writes `path`."""
    try:
        yield
    except OSError as error:
        raise CannotSave(
            f"{path} could not be written: {error.strerror}; fix that, then: --resume"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write or replace a JSON file of a run, with null for numbers that are not finite."""
    plain = {key: fileio.nan_to_null(value) for key, value in content.items()}
    with cannot_save_on_error(path):
        fileio.write_json(path, plain, replace=True, indent=2, ascii_only=True)


# --- environment.json -----------------------------------------------------------------------------


def write_environment(
    folder: Path, config_yaml: str, fingerprint: Mapping[str, Any], machine: Mapping[str, Any]
) -> None:
    """Write environment.json: the run's name, its fingerprint, and the machine it started on."""
    # Runs with the same name are the same run: equal settings and surroundings give equal numbers.
    named = config_yaml + json.dumps(fingerprint, sort_keys=True)
    content = {
        "run": hashlib.sha256(named.encode()).hexdigest()[:16],
        "pretrain": __version__,
        **machine,
        "device": fingerprint["device"],
        "threads": fingerprint["threads"],
        "git": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["pretrain", *sys.argv[1:]]),
        "fingerprint": fingerprint,
    }
    write_json(folder / ENVIRONMENT, content)


def _git_revision() -> str | None:
    """The revision of the running code, if it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def check_fields(content: Mapping[str, Any], place: str, **types: type) -> None:
    """ValueError if a field of a file is missing or has another type."""
    if any(key not in content or type(content[key]) is not types[key] for key in types):
        raise ValueError(f"{place} is damaged: it must have {', '.join(types)}; restore it")


def read_environment(folder: Path) -> dict[str, Any]:
    """The content of environment.json; ValueError if it is damaged."""
    content = fileio.read_json(folder / ENVIRONMENT)
    check_fields(content, str(folder / ENVIRONMENT), run=str, fingerprint=dict)
    fingerprint = {"settings": {}, **content["fingerprint"]}
    types = {"training text": str, "settings": dict}
    check_fields(fingerprint, str(folder / ENVIRONMENT), **types)
    return content


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of summary.json; ValueError if it is damaged."""
    content = fileio.read_json(folder / SUMMARY)
    check_fields(content, str(folder / SUMMARY), steps=int, checkpoint=str)
    if not re.fullmatch(rf"{CHECKPOINTS}/[\w-]+", content["checkpoint"]):
        place = f"the checkpoint in {folder / SUMMARY} is {content['checkpoint']!r}"
        raise ValueError(f"{place}; it must be a folder in {CHECKPOINTS}/; restore the file")
    return content


# --- a finished run that continues ----------------------------------------------------------------


def archive_results(folder: Path) -> None:
    """Rename the results of a finished run that continues to summary.json.1, .2, ...; the summary
    last, since it marks that there is something to rename."""
    if not (folder / SUMMARY).is_file():
        return
    for name in (BASELINES, SUMMARY):
        path = folder / name
        if path.exists():
            path.rename(unused_name(path, suffix="."))
            fileio.sync_folder(folder)


def unused_name(path: Path, *, suffix: str) -> Path:
    """`path` with `suffix` and the first number, from 1, that no file has."""
    number = 1
    while (candidate := path.with_name(f"{path.name}{suffix}{number}")).exists():
        number += 1
    return candidate
