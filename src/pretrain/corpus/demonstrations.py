"""Articles and aligned sentences -> demonstrations of tasks: an input and its answer.

A title and a text come in, or one sentence in several languages; a `Demonstration` goes out for
each task that they can show. Nothing is generated: questions, passages and answers are the words of
the article. The caller chooses the prompt format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import permutations

from pretrain.corpus.duplicates import text_hash

_PASSAGE_CHARACTERS = (150, 600)
_DEFINITION_CHARACTERS = (30, 250)
# A full stop after one letter, or after a capital and a second letter, is usually that of an
# initial or of "St.", and not the end of a sentence.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Za-z]\.)(?<!\b[A-Z][A-Za-z]\.)\s+(?=[\"“(]?[A-Z0-9])"
)
_DEFINES = re.compile(r"\b(?:is|are|was|were)\b")


Demonstration = tuple[str, dict[str, str]]
"""The name of a task, and one solved example of it: an "input" and its "answer"."""


def article_demonstrations(title: str, text: str) -> Iterator[Demonstration]:
    """Yield up to three demonstrations from an article that begins with a definition.

    "answer" asks for the title's definition; "title" and "summarize" give the passage after the
    definition. Nothing is yielded without a definition, or without a long enough passage.
    """
    # Many texts repeat the title as their first line; others begin with its words.
    beginning = text.removeprefix(f"{title}\n").split()
    shortest, longest = _PASSAGE_CHARACTERS
    # Of a long article only the beginning is read.
    definition, *others = split_sentences(" ".join(beginning[: longest // 2]))
    passage = ""
    for sentence in others[:-1]:  # the last one may be incomplete
        if len(passage) + len(sentence) >= longest:
            break
        passage = f"{passage} {sentence}".lstrip()

    low, high = _DEFINITION_CHARACTERS
    is_definition = low <= len(definition) <= high and _DEFINES.search(definition)
    if is_definition and len(passage) >= shortest:
        yield "answer", {"input": f"What is {title}?", "answer": definition}
        yield "title", {"input": passage, "answer": title}
        yield "summarize", {"input": passage, "answer": definition}


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences by full stops and capitals; at least one sentence."""
    return _SENTENCE_END.split(text)


def translation_demonstrations(sentences: Mapping[str, str]) -> Iterator[Demonstration]:
    """Yield translations of one sentence between all pairs of languages.

    `sentences` has the sentence by language. Only the task's name says which translation it is.
    """
    for source, target in permutations(sentences, 2):
        example = {"input": sentences[source], "answer": sentences[target]}
        yield f"translate-{source}-{target}", example


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the item with this key, such as an article's title, belongs to the test set.

    The choice is pseudo-random but always the same for a key.
    """
    return text_hash(key.encode())[0] < fraction * 2**64
