"""What text a run reads: the fields of the section `data` of a config, and their ranges.

Plain values come in from a file or the command line; a value out of range is a ValueError before
anything is read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The section `data`."""

    source: str = "bundled"
    """A file, folder or pattern of text, HTML, JSON, CSV, Parquet or WARC, plain or compressed; a
    prepared folder; or "bundled"."""
    text_field: str | None = None
    """The field of records that holds the text; by default it is found in the first
    records."""
    val_fraction: float | None = None
    """Share of the documents kept for validation, above 0 and at most 0.5; by default about 400 kB
    of text."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(
                f"data.source is {self.source!r}; legal: a path of a file or folder, or 'bundled'"
            )
        if self.text_field is not None and not self.text_field:
            raise ValueError(
                "data.text_field is empty; legal: the name of a field, or leave it out"
            )
        check_val_fraction(self.val_fraction, name="data.val_fraction")


def check_val_fraction(value: float | None, *, name: str = "val_fraction") -> None:
    """ValueError unless `value` is None or in (0, 0.5]."""
    # Written so that NaN fails too.
    if value is not None and not 0 < value <= 0.5:
        raise ValueError(f"{name} is {value!r}; legal: above 0 and at most 0.5")
