"""What makes two processes the same run: fingerprint and settings, their differences, --accept.

Values by name come in, of the run as it was and as it would continue; differences come out, each
with the name that accepts it or the reason why it cannot be accepted. Accepted ones become lines of
changes.jsonl, on the disk before training continues.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.fileio import replace_file
from pretrain.run.directory import CHANGES, CONFIG, check_fields
from pretrain.run.log import parse_line

# The code that determines what a step computes: packages, and modules of the root.
COMPUTING_CODE = ("data", "model", "optim", "parallel", "train", "rng.py", "compat.py")

_BY_EXTENSION = (
    "the learning rates depend on the number of steps. Finish the run first. Then use pretrain "
    "extend RUN --train.steps N, or pretrain anneal; they print the old and the new learning rates"
)
_WRITTEN = "it is written by pretrain extend and anneal"
_NEVER_ACCEPTED = {
    "train.steps": _BY_EXTENSION,
    "train.minutes": f"the steps were planned by it at the start, and {_BY_EXTENSION}",
    "train.seed": "the order of the data depends on it, and so which samples are still to come",
    "train.batch_tokens": "the position in the data is counted in batches of this size",
    "train.init_from": "it names the weights that the run started from; start another run instead",
    "optimizer.name": "the state of one optimizer does not fit another",
    "tokenizer.vocab_size": "the model has a row for each token",
    "schedule.origin_step": _WRITTEN,
    "schedule.start_fraction": _WRITTEN,
    "schedule.anneal": _WRITTEN,
    "schedule.history": _WRITTEN,
}
# Settings of the section `model` that do not change a shape.
_SAME_SHAPE = ("model.dropout", "model.attention_dropout")
TEXT_SECTIONS = ("data", "corpus", "tokenizer")
# Parts of the fingerprint that change with a setting of the text.
TEXTS = ("training text", "held-out text")


@cache
def code_hash() -> str:
    """One hash over the source of COMPUTING_CODE."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for name in COMPUTING_CODE:
        path = package / name
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        assert files, f"{path} does not exist"
        for file in files:
            label = file.relative_to(package).as_posix()
            digest.update(f"{label}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# --- differences ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs: a setting by its full name, or a part of the fingerprint."""

    name: str
    old: Any
    new: Any
    impossible: str = ""
    """why the run cannot continue with it; empty if it only changes the numbers"""

    @property
    def word(self) -> str:
        """The argument of --accept for it."""
        return word_of(self.name)

    @property
    def is_text(self) -> bool:
        """Whether it is a setting of the text or of its tokens."""
        section, dot, _ = self.name.partition(".")
        return bool(dot) and section in TEXT_SECTIONS

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.old)} -> {_short(self.new)}"


def word_of(name: str) -> str:
    """The argument of --accept for a name."""
    return name.replace(" ", "-")


def changes_lr(name: str) -> bool:
    """Whether learning rates depend on a setting."""
    return name.startswith("schedule.") or name == "optimizer.learning_rate"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The values that differ, by name, without settings that only one of the two versions has."""
    changes = []
    for name in sorted({*old, *new}):
        is_setting = "." in name
        is_in_both = name in old and name in new
        if old.get(name) == new.get(name) or (is_setting and not is_in_both):
            continue
        reason = _NEVER_ACCEPTED.get(name, "")
        if name.startswith("model.") and name not in _SAME_SHAPE:
            reason = "it defines the model; another model is another run"
        changes.append(Change(name, old.get(name), new.get(name), reason))
    return changes


def check_accepted(
    changes: Sequence[Change],
    accepted: Collection[str],
    *,
    now: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """ValueError unless all `changes` are in `accepted`.

    With all values `now`, every name in `accepted` must be of a change: of `changes`, or of one in
    `records` (changes.jsonl) whose value is still that of `now`, since a command may be repeated.
    """
    words = {change.word for change in changes}
    current = {word_of(name): value for name, value in (now or {}).items()}
    earlier = {r["what"] for r in records if (r["what"], r["new"]) in current.items()}
    unknown = [word for word in accepted if word not in words | earlier]
    if unknown and now is not None:
        changed = f"changed: {', '.join(sorted(words))}" if words else "nothing has changed"
        raise ValueError(f"--accept {unknown[0]}: that has not changed; {changed}")

    # Who accepts another source of the text also accepts that the text differs.
    if any(change.is_text and change.word in accepted for change in changes):
        accepted = {*accepted, *map(word_of, TEXTS)}
    if all(change.word in accepted and not change.impossible for change in changes):
        return

    lines = []
    for change in changes:
        if change.impossible:
            how = f"cannot be accepted: {change.impossible}"
        elif change.word in accepted:
            how = "accepted"
        else:
            how = f"--accept {change.word}"
        lines.append(f"  {change}   ({how})")
    text = "\n".join(lines)
    raise ValueError(
        f"the run would not continue as it started, because these have changed:\n{text}\nAn "
        f"accepted change changes the numbers from here on, and is recorded in {CHANGES}"
    )


# --- changes.jsonl --------------------------------------------------------------------------------


def record(step: int, what: str, old: Any, new: Any, *, by: str) -> dict[str, Any]:
    """A line of changes.jsonl: from `step` on the value is `new`, by --accept or a command."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"step": step, "what": what, "old": old, "new": new, "by": by, "time": now}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of changes.jsonl; ValueError for a damaged one."""
    path = folder / CHANGES
    records = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        record = parse_line(line) or {}
        check_fields(record, f"{path}, line {number},", step=int, what=str, by=str)
        records.append({"old": None, "new": None} | record)
    return records


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace all of changes.jsonl at once, so that changes of one command are recorded
    together."""
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
    replace_file(folder / CHANGES, "".join(lines).encode())


def check_config(
    folder: Path, now: Mapping[str, Any], values: Mapping[str, Any], *, step: int
) -> None:
    """ValueError if settings of config.yaml, `now`, are not those that the run had at `step`, with
    what was accepted since."""
    records = read_records(folder)
    had = with_records({**now, **values}, records, step=step)
    # A process may have died after it recorded a change, and before it wrote config.yaml.
    before = {each["what"]: each["old"] for each in records if each["step"] >= step}
    changes = differences({name: had[name] for name in now}, now)
    if changes := [each for each in changes if (each.word, each.new) not in before.items()]:
        raise ValueError(
            f"{folder / CONFIG} is not that of the run: it was changed or damaged "
            f"({'; '.join(map(str, changes))}); restore it"
        )


def with_records(
    values: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, step: int
) -> dict[str, Any]:
    """The values of a checkpoint at `step`, updated with what was accepted since."""
    names = {word_of(name): name for name in values}
    updated = dict(values)
    for each in records:
        is_value = each["what"] in names or "." in each["what"]
        if each["step"] >= step and is_value:
            updated[names.get(each["what"], each["what"])] = each["new"]
    return updated
