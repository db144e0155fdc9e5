"""Files -> documents, without torch.

`files` finds what there is to read under a path, `streams` turns one file into bytes
(decompressing, and noticing a cut-off end), `files` tells what they hold, and `reading` picks the
reader: `rows` gives rows that `records` makes into documents, `web` reads HTML and archives of it.
`documents` holds the plain classes that travel: `Document`, `Problem`,
`ReadingReport`. The corpus that ships with the package lies in `bundled/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.corpus.documents import Document, Problem, ReadingReport
    from pretrain.corpus.files import SourceFile, bundled_corpus, list_files
    from pretrain.corpus.reading import read_documents

__getattr__ = lazily(
    __name__,
    documents="Document Problem ReadingReport",
    files="SourceFile bundled_corpus list_files",
    reading="read_documents",
)
__all__ = [
    "Document",
    "Problem",
    "ReadingReport",
    "SourceFile",
    "bundled_corpus",
    "list_files",
    "read_documents",
]
