"""Articles and aligned sentences -> demonstrations of tasks: what is asked, and the answer.

A title and a text come in, or one sentence in several languages; a `Demonstration` for each task
that they can show goes out, as plain texts. Nothing is made up: questions, passages and answers are
the article's own words. What becomes of them, and how a task is put into words, is the caller's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

_PASSAGE_CHARACTERS = (150, 600)
_DEFINITION_CHARACTERS = (30, 250)
# A full stop behind one letter, or behind two of which the first is a capital, is more often of an
# initial or of "St." than the end of a sentence.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Za-z]\.)(?<!\b[A-Z][A-Za-z]\.)\s+(?=[\"“(]?[A-Z0-9])"
)
_DEFINES = re.compile(r"\b(?:is|are|was|were)\b")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One task, solved once."""

    task: str
    input: str
    answer: str


def article_demonstrations(title: str, text: str) -> Iterator[Demonstration]:
    """A question about the title and the sentence that defines it; and for the passage behind that
    sentence, its title and, as a summary, the sentence. Nothing where the article does not begin
    with a definition, or has no passage."""
    # A title stands above many a text, and where it does not, the text may begin with its words.
    lead = text.removeprefix(f"{title}\n").split()
    shortest, longest = _PASSAGE_CHARACTERS
    # Of a long article only the beginning is looked at.
    definition, *others = split_sentences(" ".join(lead[: longest // 2]))
    passage = ""
    for sentence in others[:-1]:  # the last may be cut
        if len(passage) + len(sentence) >= longest:
            break
        passage = f"{passage} {sentence}".lstrip()
    low, high = _DEFINITION_CHARACTERS
    if not (low <= len(definition) <= high and _DEFINES.search(definition)):
        return
    if len(passage) >= shortest:
        yield Demonstration("answer", f"What is {title}?", definition)
        yield Demonstration("title", passage, title)
        yield Demonstration("summarize", passage, definition)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, as far as full stops and capitals tell; at least one."""
    return _SENTENCE_END.split(text)


def translation_demonstrations(languages: Mapping[str, str]) -> Iterator[Demonstration]:
    """Translations of one sentence from each of its languages into each other: only the name of the
    task tells which one is asked."""
    for source, target in permutations(languages, 2):
        yield Demonstration(f"translate-{source}-{target}", languages[source], languages[target])


def is_held_out(key: str, fraction: float) -> bool:
    """Whether what has this key, such as an article with this title, is kept from training: as good
    as chance, and always the same."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
