"""Checks of config values: ranges are declared with the fields, and all errors come at once.

A field says what it may be, `threads: Annotated[int | None, Range(1, 4096)] = None`. `build` makes
a config class from values as YAML gave them, and reports every wrong one; the class itself raises a
ConfigError when it is constructed with a value out of range. Standard library only.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

FieldError = tuple[str, str]
"""The fields that an error is about, separated by spaces, and its message."""

MAX_DIGITS = 100
"""A longer number is not a setting; converting it would take quadratic time."""
_MAX_SUGGESTIONS = 100  # each takes half a millisecond
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
    list: "a list",
}


class ConfigError(ValueError):
    """Everything that is wrong with a config: one message, or a list of them."""

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = list(errors)
        messages = list(dict.fromkeys(message for _, message in self.errors))
        if len(messages) == 1:
            super().__init__(messages[0])
            return
        lines = [message.replace("\n", "\n    ") for message in messages]
        super().__init__("\n  ".join([f"{len(messages)} errors:", *lines]))


def raise_errors(errors: Iterable[FieldError]) -> None:
    """Raise a ConfigError if there are any."""
    errors = list(errors)
    if errors:
        raise ConfigError(errors)


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number: `Range(1, 4096)` includes both ends, `Range(gt=0, lt=1)` neither."""

    ge: float = -math.inf
    le: float = math.inf
    gt: float = -math.inf
    lt: float = math.inf

    def accepts(self, value: float) -> bool:
        """Return whether the number is finite and within the bounds."""
        return self.ge <= value <= self.le and self.gt < value < self.lt

    @property
    def expected(self) -> str:
        low = f"({_short(self.gt)}" if self.gt > -math.inf else f"[{_short(self.ge)}"
        if self.le < math.inf:
            return f"in {low}, {_short(self.le)}]"
        if self.lt < math.inf:
            return f"in {low}, {_short(self.lt)})"
        return f"above {_short(self.gt)}" if self.gt > -math.inf else f"at least {_short(self.ge)}"


@dataclass(frozen=True, slots=True)
class Matching:
    """A text that matches a regular expression completely; `expected` describes it to users."""

    pattern: str
    expected: str

    def accepts(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None


NON_EMPTY = ".+"


def _short(number: float) -> str:
    """Write a bound: 2^63 and 10^10 rather than their digits."""
    for power in (2, 10):
        exponent = round(math.log(number, power)) if number > 1 << 16 else 0
        if exponent and number == power**exponent:
            return f"{power}^{exponent}"
    return str(number)


class Checked:
    """Parent of the config dataclasses, whose constructors raise a ConfigError."""

    __slots__ = ()
    section: ClassVar[str]
    """What messages put before the name of a field."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        values = {name: getattr(self, name) for name in type_hints(kind)}
        _, errors = _convert_fields(kind, values, self.section)
        raise_errors(errors or self.conflicts())

    def conflicts(self) -> Iterable[FieldError]:
        """Yield what is wrong with fields that are right each by itself: the fields, a message."""
        return ()


@functools.cache
def type_hints(kind: Any) -> Mapping[str, Any]:
    """Return the declared type of each field of a dataclass, ranges included."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def build(
    kind: Any, values: Mapping[str, Any], name: str, *, unknown: Iterable[str] = ()
) -> tuple[Any, list[FieldError]]:
    """Construct a config from values as YAML gave them, and list everything that is wrong.

    An invalid value is replaced by the field's default, and nothing is reported that follows from
    such a default. Without a config (None), the fields contradict each other or one is missing.

    Args:
        kind: The config's class.
        values: A key that is not a field of `kind` is an error; the nearest field counts as
            invalid.
        name: What messages put before the names of fields.
        unknown: Fields whose default is not known, because what it depends on is wrong.
    """
    known = {f"{name}.{key}": key for key in type_hints(kind)}
    errors: list[FieldError] = []
    for key in [f"{name}.{key}" for key in values if f"{name}.{key}" not in known]:
        close = hint = ""
        if len(errors) < _MAX_SUGGESTIONS:
            close, hint = nearest(key, known) or "", f"; {suggestion(key, known)}"
        # Its repr, because it may have line feeds.
        errors.append((known.get(close, ""), f"there is no {repr(key)[1:-1][:80]}{hint}"))
    fields_given = {key: value for key, value in values.items() if f"{name}.{key}" in known}
    valid, wrong = _convert_fields(kind, fields_given, name)
    errors += wrong
    required = [f.name for f in fields(kind) if f.default is MISSING]
    missing = [key for key in required if key not in values]
    errors += [(key, f"{name} needs a value for {key!r}") for key in missing]
    if not valid.keys() >= set(required):
        return None, errors
    invalid = invalid_fields(errors) | set(unknown)
    try:
        return kind(**valid), errors
    except ConfigError as error:
        return None, errors + [each for each in error.errors if invalid.isdisjoint(each[0].split())]


def _convert_fields(
    kind: Any, values: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the valid values as the types of their fields, and an error for each other one."""
    valid, errors = {}, []
    for key, value in values.items():
        try:
            valid[key] = convert(value, type_hints(kind)[key], f"{name}.{key}")
        except ConfigError as error:
            errors += [(key, message) for _, message in error.errors]
    return valid, errors


def invalid_fields(errors: Iterable[FieldError]) -> set[str]:
    """Return the names of all fields that the errors are about."""
    return {name for names, _ in errors for name in names.split()}


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return a value as the type that a field declares.

    Whole numbers may be written as 1e6, numbers as whole ones, a list as one text with commas.
    Raises ConfigError, which says what the field `name` must be.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = convert(value, options[0], name)
        for constraint in options[1:]:
            if value is not None and not constraint.accepts(value):
                raise _invalid(value, name, constraint.expected)
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        options = tuple(option for option in options if option is not type(None))
        is_list = isinstance(value, list | tuple)
        matching = [option for option in options if (get_origin(option) is tuple) == is_list]
        if is_list and len(matching) > 1:  # of texts, or of mappings
            is_text = bool(value) and all(isinstance(each, str) for each in value)
            matching = [each for each in matching if is_dataclass(get_args(each)[0]) != is_text]
        return convert(value, (matching or options)[0], name)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        message = f"{name} has more than {MAX_DIGITS} digits; it must be a smaller number"
        raise ConfigError([(name, message)])
    if is_dataclass(hint):
        if type(value) is hint:
            return value
        if not isinstance(value, Mapping):
            keys = ", ".join(field.name for field in fields(hint))
            raise _invalid(value, name, f"a mapping with keys of {keys}")
        entry, errors = build(hint, value, name)
        raise_errors(errors)
        return entry
    if origin is Literal:
        if value in options:
            return value
        raise _invalid(value, name, f"one of {', '.join(options)}")
    if origin is tuple:
        return _convert_list(value, options[0], name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        if not math.isfinite(value):
            raise _invalid(value, name, "a finite number")
        return float(value)
    if hint is str and is_number:
        return str(value)
    kind = origin or hint  # the content of a dict or list is not checked
    if type(value) is not kind:
        expected = _TYPE_NAMES[kind]
        if kind in (int, float) and isinstance(value, str) and value.replace(".", "").isdecimal():
            expected += ", without quotes"
        raise _invalid(value, name, expected)
    return value


def _convert_list(value: Any, hint: Any, name: str) -> tuple[Any, ...]:
    """Convert each item of a list, or of a text with commas."""
    if isinstance(value, str):
        value = value.split(",")
    entries = value if isinstance(value, list | tuple) else [value]
    converted, errors = [], []
    for index, entry in enumerate(entries):
        is_plain = isinstance(entry, str | int | float)
        try:
            converted.append(convert(entry, hint, name if is_plain else f"{name}[{index}]"))
        except ConfigError as error:
            errors += error.errors
    raise_errors(errors)
    return tuple(converted)


def _invalid(value: Any, name: str, expected: str) -> ConfigError:
    return ConfigError([(name, f"{name} is {shown(value)}; it must be {expected}")])


def shown(value: Any) -> str:
    """Return a value as it was given, in one line and cut to a readable length."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that a misspelt one is most similar to, if it is similar to any."""
    close = difflib.get_close_matches(str(word), list(known), 1, 0.5)
    return close[0] if close else None


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return a question with the known word nearest to a misspelt one, or all known words."""
    known = list(known)
    close = nearest(word, known)
    return did_you_mean(close) if close else f"there are {', '.join(known)}"


def did_you_mean(word: str) -> str:
    """Return a question with the word that was perhaps meant."""
    return f"did you mean {word!r}?"
