"""The messages that `compose` reports for a config, as a list."""

from __future__ import annotations

from pretrain.config import Layer, compose, parse_overrides, read_yaml
from pretrain.validation import ConfigError


def errors_in(*layers: Layer) -> list[str]:
    """Return the messages about layers; an empty list if they are a valid config."""
    try:
        compose(layers)
    except ConfigError as error:
        return list(dict.fromkeys(message for _, message in error.errors))
    return []


def errors_of(text: str, args: str = "") -> list[str]:
    """Return the messages about a config file's text, and settings of a command line after it."""
    return errors_in(read_yaml(text, name="config.yaml") or {}, parse_overrides(args.split()))
