"""What differs between a run as it was and as it would go on, and the record of what was accepted.

Values by name come in, of then and of now; out come the differences, each with the word that
accepts it or the reason why it cannot be. Accepted ones are lines of the run's changes.jsonl, on
the disk before training goes on. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.fileio import replace_file

CHANGES = "changes.jsonl"
_BY_EXTENSION = (
    "the schedule hangs on it; let the run end, then make more steps, with both curves printed, by "
    "pretrain extend RUN --train.steps N, or pretrain anneal"
)
_WRITTEN = "it is written by pretrain extend and anneal"
_IMPOSSIBLE = {
    "train.steps": _BY_EXTENSION,
    "train.minutes": f"it was turned into train.steps at the start; {_BY_EXTENSION}",
    "train.seed": "the order of the data hangs on it, and so which samples are still to come",
    "train.batch_tokens": "the place in the data is counted in batches of this size",
    "train.init_from": "it says where the run began; begin another run from there",
    "optimizer.name": "the state of one rule does not fit another",
    "tokenizer.vocab_size": "the model has a row for each token",
    "schedule.origin_step": _WRITTEN,
    "schedule.start_fraction": _WRITTEN,
    "schedule.anneal": _WRITTEN,
    "schedule.history": _WRITTEN,
}
_SAME_SHAPE = ("model.dropout", "model.attention_dropout")
TEXT_SECTIONS = ("data", "corpus", "tokenizer")
# What another source or selection of text brings with it.
TEXTS = ("training text", "held-out text")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it was."""

    name: str
    old: Any
    new: Any
    impossible: str = ""
    """why a run cannot go on with it; empty where it only changes the numbers"""

    @property
    def word(self) -> str:
        """What --accept calls it."""
        return word_of(self.name)

    @property
    def is_setting(self) -> bool:
        return "." in self.name

    @property
    def is_text(self) -> bool:
        """A setting that says which text is read, and how it becomes ids."""
        return self.name.partition(".")[0] in TEXT_SECTIONS and self.is_setting

    @property
    def bends_rates(self) -> bool:
        return bends_rates(self.name)

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.old)} -> {_short(self.new)}"


def bends_rates(name: str) -> bool:
    return name.startswith("schedule.") or name == "optimizer.learning_rate"


def word_of(name: str) -> str:
    return name.replace(" ", "-")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs, by name; a setting that only one version of this package has is none."""
    found = []
    for name in sorted({*old, *new}):
        known_to_both = name in old and name in new
        if old.get(name) == new.get(name) or ("." in name and not known_to_both):
            continue
        reason = _IMPOSSIBLE.get(name, "")
        if name.startswith("model.") and name not in _SAME_SHAPE:
            reason = "it is what the model is made of; another model is another run"
        found.append(Change(name, old.get(name), new.get(name), reason))
    return found


def check_accepted(
    changes: Sequence[Change],
    accepted: Collection[str],
    *,
    now: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """ValueError unless all `changes` are in `accepted`, and these all name a change: one of now,
    or one that `records` have with the value it still has (a command may be repeated)."""
    words = {change.word for change in changes}
    current = {word_of(name): value for name, value in (now or {}).items()}
    before = {r["what"] for r in records if r["what"] in current and r["new"] == current[r["what"]]}
    strange = [word for word in accepted if word not in words | before]
    if strange:
        found = f"what did: {', '.join(sorted(words))}" if words else "nothing did"
        raise ValueError(f"--accept {strange[0]}: that has not changed; {found}")
    # One word is enough for one deed: whoever takes other text has other text.
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
    what = "\n".join(lines)
    raise ValueError(
        f"the run would not go on as it began, because these have changed:\n{what}\nWhat is "
        f"accepted changes the numbers from here on, and is recorded in {CHANGES}"
    )


def record(step: int, what: str, old: Any, new: Any, *, by: str) -> dict[str, Any]:
    """A line of changes.jsonl: from `step` on it is `new`."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"step": step, "what": what, "old": old, "new": new, "by": by, "time": now}


def read_records(folder: Path) -> list[dict[str, Any]]:
    path = folder / CHANGES
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put all of changes.jsonl on the disk at once, so that half a deed is never recorded."""
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
    replace_file(folder / CHANGES, "".join(lines).encode())


def with_records(
    values: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, step: int
) -> dict[str, Any]:
    """Values of a checkpoint at `step`, with what was accepted since."""
    names = {word_of(name): name for name in values}
    later = [each for each in records if each["step"] >= step]
    since = {names.get(r["what"], r["what"]): r["new"] for r in later if _is_value(r, names)}
    return {**values, **since}


def _is_value(each: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return each["what"] in names or "." in each["what"]
