"""Files -> documents -> filtered documents, without torch.

`files` lists the files of a source and detects their formats; `streams` decompresses them. `rows`
reads JSON lines, JSON, CSV and Parquet, whose rows `records` turns into documents; `web` reads HTML
and WARC; `reading` chooses the reader. `filters`, `duplicates` and `overlap` find the documents to
remove, by the hashes of `words`. `documents` has the classes that all of them share. The corpus
that is installed with the package is in `bundled/`.
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
