"""Books of Project Gutenberg without the notices around them.

A notice ends at `*** START OF THE PROJECT GUTENBERG EBOOK ... ***`, before 2003 at the small print,
and begins at `*** END OF ...` or `End of Project Gutenberg's ...`
(https://www.gutenberg.org/help/file_formats.html).
"""

from __future__ import annotations

import re

# A notice has 20 kB: a longer text is not one.
_ANY = r"[\s\S]{0,65536}?"
_START = (
    r"(?:^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^*]{0,300}\*\*\*.*$"
    r"|^\*END[* ]+THE SMALL PRINT!.*$)"
)
_END = (
    r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:[Tt]h(?:e|is) )?Project Gutenberg)"
)
_NOTICE = re.compile(rf"\A{_ANY}{_START}|{_END}{_ANY}(?:{_START}|\Z)", re.M)


def without_notices(text: str) -> str:
    """The books in a text, of which there may be several; another text as it is."""
    if "PROJECT GUTENBERG" not in text and "Project Gutenberg" not in text:
        return text
    books, n_notices = _NOTICE.subn("\n", text)
    return books.strip() + "\n" if n_notices and books.strip() else text
