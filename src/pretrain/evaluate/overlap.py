"""What of a text is in the training text, and what a model writes that it has read.

Evaluation sets and what a model wrote come in, and become rows of two tables, as plain values for
JSON: the n-gram overlap of "Language Models are Unsupervised Multitask Learners" (Radford et al.,
2019, section 4), and as in its appendix continuations of held-out text beside what stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pretrain.corpus.overlap import TextOverlap, longest_matches, ngram_share
from pretrain.corpus.words import split_words
from pretrain.data import TokenStream
from pretrain.distributed import World
from pretrain.evaluate.documents import document_texts
from pretrain.evaluate.metrics import Array, value
from pretrain.generate import Sampling, generate_ids
from pretrain.model import Decoder
from pretrain.tokenizer import Tokenizer

CONTINUATIONS = 32
PROMPT_TOKENS = 40
WRITTEN_TOKENS = 120
# Of the likeliest tokens so many, as the paper draws them.
TOP_K = 40
_SHOWN_CHARACTERS = 80


def row_of(found: Sequence[TextOverlap]) -> dict[str, Any]:
    """The row of a set of texts that were held against the training text: its different n-grams,
    how many of them are there, and how that is spread over its examples."""
    grams, places = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(each.grams for each in found)]),
        return_index=True,
    )
    is_found = np.concatenate([np.empty(0, bool), *(each.in_corpus for each in found)])[places]
    compared = [each for each in found if len(each.grams)]
    row: dict[str, Any] = {
        "examples": len(found),
        "too_short": len(found) - len(compared),
        "without": sum(not each.in_corpus.any() for each in compared),
        **ngram_share(len(grams), int(is_found.sum())),
        "median_percent": None,
        "most": None,
    }
    if not compared:
        return row | {"percent": None}
    row["median_percent"] = round(float(np.median([each.percent for each in compared])), 3)
    most = max(compared, key=lambda each: (each.percent, len(each.grams)))
    if not most.in_corpus.any():
        return row
    return row | {
        "most": {
            "example": most.name,
            **ngram_share(len(most.grams), int(most.in_corpus.sum())),
            "begins": " ".join(most.text[: 2 * _SHOWN_CHARACTERS].split())[:_SHOWN_CHARACTERS],
        },
    }


def score_without(metric: str, statistics: Array, found: Sequence[TextOverlap]) -> dict[str, Any]:
    """A metric over all examples, and over those without any overlap; None where all have some."""
    is_clean = np.array([not each.in_corpus.any() for each in found])
    clean = statistics[is_clean]
    return {
        "metric": metric,
        "value": float(value(metric, statistics.sum(0))),
        "value_without": float(value(metric, clean.sum(0))) if len(clean) else None,
        "examples_without": len(clean),
    }


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after some held-out text, and what stands there."""

    written: str
    held_out: str


def continue_held_out(
    decoder: Decoder,
    tokenizer: Tokenizer,
    stream: TokenStream,
    *,
    world: World,
    precision: str,
    seed: int,
) -> list[Continuation]:
    """Continuations at places spread evenly over a held-out stream, CONTINUATIONS of them where its
    documents are not too few: of WRITTEN_TOKENS at most after PROMPT_TOKENS at most, fewer in
    shorter documents."""
    found = []
    for number, (begin, middle, end) in enumerate(_held_out_places(stream)):
        ids = stream.read(begin, end).tolist()
        with world.autocast(precision):
            (written,) = generate_ids(
                decoder,
                [tokenizer.start_of_text, *ids[: middle - begin]],
                max_tokens=end - middle,
                sampling=Sampling(temperature=1.0, top_k=TOP_K, seed=seed + number),
                stop_ids={tokenizer.start_of_text, *tokenizer.stop_ids},
            )
        held_out = tokenizer.decode(ids[middle - begin :])
        found.append(Continuation(tokenizer.decode(written), held_out))
    return found


def _held_out_places(stream: TokenStream) -> list[tuple[int, int, int]]:
    """Where prompts begin and end, and where what follows them ends, each in one document."""
    offsets, places = stream.document_offsets, []
    for number in range(CONTINUATIONS):
        position = round((number + 0.5) * stream.n_tokens / CONTINUATIONS)
        document = max(0, int(np.searchsorted(offsets[:-1], position, side="right")) - 1)
        first, end = int(offsets[document]), int(offsets[document + 1]) - 1  # no end-of-text
        begin = max(first, min(position, end - PROMPT_TOKENS - WRITTEN_TOKENS))
        middle = begin + min(PROMPT_TOKENS, (end - begin) // 4)
        if middle < end:
            places.append((begin, middle, min(end, middle + WRITTEN_TOKENS)))
    return list(dict.fromkeys(places))


def longest_of(
    sets: Sequence[Sequence[str]], stream: TokenStream, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """For each set of texts the longest stretch that any of them has in common with a document of
    the training text, and which document that is; all in one walk through it."""
    texts = [text for each in sets for text in each]
    stretches = longest_matches(texts, document_texts(stream, tokenizer))
    pairs, longest = list(zip(texts, stretches, strict=True)), []
    for each in sets:
        mine, pairs = pairs[: len(each)], pairs[len(each) :]
        found = [(text, stretch) for text, stretch in mine if stretch is not None]
        longest.append(max(found, key=lambda pair: pair[1].n_words, default=None))
    wanted = {best[1].document for best in longest if best is not None}
    origins = dict(stream.origins(lambda number, _: number in wanted)) if wanted else {}
    rows: list[dict[str, Any] | None] = []
    for best in longest:
        if best is None:
            rows.append(None)
            continue
        text, stretch = best
        words = split_words(text)[stretch.first_word : stretch.first_word + stretch.n_words]
        origin = asdict(origins[stretch.document])
        rows.append({"words": stretch.n_words, "text": " ".join(words), "document": origin})
    return rows
