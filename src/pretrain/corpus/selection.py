"""Which documents stay for what they say: quality rules, languages, overlap with evaluation texts.

Documents come in, those that pass go out, and a line goes to a file for each that does not. Equal
and nearly equal documents are the matter of `duplicates`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TextIO

import numpy as np

from pretrain.corpus.config import CorpusConfig
from pretrain.corpus.documents import Document
from pretrain.corpus.filters import judge
from pretrain.corpus.language import language_of
from pretrain.corpus.overlap import Overlaps
from pretrain.corpus.words import Hashes, word_hashes


class Selection:
    """Removes documents for what they say, and remembers why."""

    def __init__(self, asked: CorpusConfig, overlaps: Overlaps | None, removed: TextIO) -> None:
        """With `overlaps` of the evaluation texts, if there are any; lines go to `removed`."""
        self._asked, self._overlaps, self._removed = asked, overlaps, removed
        self._shared: list[Hashes] = []
        self.reasons: Counter[str] = Counter()
        """How many documents were removed for which reason."""

    def kept(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that stay, some of them without some of their lines."""
        for document in documents:
            text, reason = judge(document.text, self._asked.filters)
            if not reason and self._asked.languages:
                language = language_of(text)
                if language not in self._asked.languages:
                    reason = f"language: {language or 'none'}"
            if not reason and self._overlaps is not None:
                words = word_hashes(text)
                if self._asked.remove_overlap and self._overlaps.shares_long_phrase(words):
                    reason = "overlap: 13 words in a row of an evaluation text"
                else:
                    self._shared.append(self._overlaps.shared(words))
            if reason:
                self.reasons[reason] += 1
                write_removed(self._removed, document, reason)
            else:
                yield replace(document, text=text) if text is not document.text else document

    def shared(self) -> Hashes:
        """What the documents that stayed share with evaluation texts, see `Overlaps.shared`."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self._shared]))


def write_removed(file: TextIO, document: Document, reason: str) -> None:
    """A line about a document that did not stay."""
    about = {"id": document.id, "file": document.source, "offset": document.offset}
    print(json.dumps(about | {"reason": reason}, ensure_ascii=False), file=file)
