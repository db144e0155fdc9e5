"""Hostile configs: every setting with absurd values, and files that are not configs.

Each is either accepted (some fields may be any text) or rejected with a ValueError that names the
setting; nothing else is ever raised, and no config has a number that is not finite. Values that are
valid but absurdly large are rejected by the real command before it creates anything.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from faults.table import Row, Unrecovered
from faults.tiny_runs import in_child, output_of, prepare, train
from pretrain.config import SECTIONS, compose, read_file

VALUES = {
    "minus one": "-1",
    "zero": "0",
    "not a number": ".nan",
    "infinity": ".inf",
    "minus infinity": "-.inf",
    "too large": "1e400",
    "a huge number": "1" + "0" * 30,
    "a number of 400 digits": "9" * 400,
    "a number of 5,000 digits": "9" * 5000,
    "a fraction": "0.5",
    "a word": "surprise",
    "an empty word": '""',
    "nothing": "null",
    "yes": "true",
    "a list": "[1, [2, [3]]]",
    "an object": "{a: {b: c}}",
    "a date": "2026-01-01",
    "a word that is a number": '"3"',
    "a long word": "x" * 50_000,
    "invisible characters": '"\\0\\e[2J"',
}
FILES = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a word": b"train",
    "no UTF-8": b"train: {steps: \xff\xfe}",
    "a NUL": b"train: {steps: 1\x00}",
    "an alias": b"train: &a {steps: 1}\nmodel: *a",
    "a bomb of aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 107)
    ),
    "a key twice": b"train: {steps: 1, steps: 2}",
    "a section twice": b"train: {steps: 1}\ntrain: {steps: 2}",
    "nested 5,000 deep": b"train: " + b"[" * 5000 + b"]" * 5000,
    "code": b"train: !!python/object/apply:os.system ['true']",
    "a tag": b"train: !!set {steps}",
    "two documents": b"train: {steps: 1}\n---\ntrain: {steps: 2}",
    "a section that is a number": b"train: 3",
    "a section that is a list": b"train: [steps, 1]",
    "a key that is a list": b"? [a, b]\n: 1",
    "a key that is a number": b"train: {1: 2}",
    "an unknown section": b"trains: {steps: 1}",
    "an unknown key": b"train: {step: 1}",
    "2 MB": b"train: {steps: 1} #" + b"x" * (2 << 20),
    "tabs": b"train:\n\tsteps: 1",
    "a merge key": b"a: {steps: 1}\ntrain: {<<: {steps: 1}}",
}


def reject_all(scratch: Path, *, every: int) -> Row:
    """Try every value for every setting, and every file; or one in `every`."""
    file = scratch / "hostile.yaml"
    tried = accepted = 0
    for case, content, key in islice(_cases(), 0, None, every):
        file.write_bytes(content)
        tried += 1
        try:
            config = compose([read_file(file)])
        except ValueError as error:
            if key is not None and key not in str(error):
                raise Unrecovered(f"{case}: the message does not name it: {error!s:.300}") from None
            continue
        except Exception as error:
            raise Unrecovered(f"{case}: {type(error).__name__}: {error!s:.300}") from None
        accepted += 1
        if key is None and case not in ("file: empty",):
            raise Unrecovered(f"{case}: it was accepted")
        for name, value in _numbers(asdict(config)):
            if not math.isfinite(value):
                raise Unrecovered(f"{case}: {name} is {value}")
    note = f"{len(VALUES)} values for each setting, {len(FILES)} files; {accepted} are valid"
    return Row("hostile configs", tried, tried, tried, note)


ABSURD = (
    "--model.d_model 1000000000000",
    "--model.d_model 40000000",
    "--model.n_layers 100000000",
    "--model.d_ff 1000000000000000000000",
    "--model.ngram_rows 100000000000",
    "--model.context_length 10000000000",
    "--tokenizer.vocab_size 10000000000000000",
    "--train.micro_batch_rows 10000000000000",
)


def reject_absurd_sizes(scratch: Path) -> Row:
    """Give the real command sizes that no machine has memory for: exit code 2, and no run is left
    behind. The child may use no more memory and time than a small run."""
    text = prepare(scratch)
    for args in ABSURD:
        run = scratch / "absurd"
        code = in_child(partial(_with_limits, text, run, args.split()))
        if code != 2 or run.exists():
            raise Unrecovered(f"{args}: exit code {code}: {output_of(run)[-1000:]}")
    n = len(ABSURD)
    return Row("absurd sizes", n, n, n, f"exit code 2, within {SECONDS} s and {MEMORY_BYTES:.0e} B")


MEMORY_BYTES, SECONDS = 6 * 10**9, 20


def _with_limits(text: Path, run: Path, args: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    return train(text, run, "--train.steps", "2", *args)


def _cases() -> Iterator[tuple[str, bytes, str | None]]:
    for section, kind in SECTIONS.items():
        for field in fields(kind):
            for what, value in VALUES.items():
                text = f"{section}: {{{field.name}: {value}}}"
                yield f"{section}.{field.name}: {what}", text.encode(), field.name
    for what, content in FILES.items():
        yield f"file: {what}", content, None


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        # An int may be longer than any float.
        yield name, 0.0 if isinstance(content, int) else content
