"""Books of Project Gutenberg without the notices around them.

A notice ends at `*** START OF THE PROJECT GUTENBERG EBOOK ... ***`, before 2003 at the small print,
and begins at `*** END OF ...` or `End of Project Gutenberg's ...`
(https://www.gutenberg.org/help/file_formats.html).
"""

from __future__ import annotations

import re

MAX_NOTICE = 1 << 16
"""Characters; a notice has 20,000."""
_START = (
    r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^*]{0,300}\*\*\*.*$"
    r"|^\*END[* ]+THE SMALL PRINT!.*$"
)
_END = r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|^End of (?:[Tt]h(?:e|is) )?Project Gutenberg"
_MARK = re.compile(f"(?P<start>{_START})|{_END}", re.M)


def without_notices(text: str) -> str:
    """The books in a text, of which there may be several; another text as it is."""
    if "PROJECT GUTENBERG" not in text and "Project Gutenberg" not in text:
        return text
    books = []
    book, notice = 0, 0  # where they begin; the text may begin with a notice
    for mark in _MARK.finditer(text):
        is_near = notice >= 0 and mark.start() - notice <= MAX_NOTICE
        if mark["start"]:
            if is_near:
                books.append(text[book:notice].strip())
                book = mark.end()
            notice = -1
        elif notice <= 0 or not is_near:
            notice = mark.start()
    end = notice if notice > 0 and len(text) - notice <= MAX_NOTICE else len(text)
    whole = "\n\n".join(filter(None, [*books, text[book:end].strip()]))
    return whole + "\n" if whole and (book or end < len(text)) else text
