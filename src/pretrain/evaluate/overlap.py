"""The overlap of evaluation texts, and of what a model generates, with its training text.

Two tables of plain values for JSON: the n-gram overlap of "Language Models are Unsupervised
Multitask Learners" (Radford et al., 2019, section 4), and, as in its appendix, continuations of
held-out text compared with the text that really follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.corpus.documents import Document
from pretrain.corpus.overlap import (
    BloomFilter,
    Match,
    TextOverlap,
    corpus_ngram_filter,
    longest_matches,
    measure_overlap,
    ngram_share,
)
from pretrain.corpus.words import split_words
from pretrain.data.format import PreparedData, TokenStream
from pretrain.evaluate.loss import Model
from pretrain.evaluate.metrics import Array, value
from pretrain.evaluate.run_tasks import TaskResults, continue_ids
from pretrain.evaluate.task_files import EvalTask
from pretrain.generate.packing import pack_weights
from pretrain.generate.sampling import Sampling
from pretrain.tokenizer.tokenizer import Tokenizer

CONTINUATIONS = 32
PROMPT_TOKENS = 40
GENERATED_TOKENS = 120
TOP_K = 40  # of the sampling, as in the paper
# Part of a cached filter's file name: changed whenever words are split or hashed in another way.
_FILTER_VERSION = 1
_SHOWN_CHARACTERS = 80


def training_overlap(
    model: Model,
    data: PreparedData,
    *,
    documents: Mapping[str, Sequence[Document]],
    results: Iterable[tuple[EvalTask, TaskResults]],
    samples: Sequence[str],
    seed: int,
    cache: Path,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The content of overlap.json: a row for each evaluation set (`sets`), and for each set of
    generated text (`writing`). The held-out split comes from the same source as the training text,
    so the other evaluation sets are to be compared with it. The n-grams of a training text are kept
    in the folder `cache`."""
    corpus = _training_filter(data, cache, log)
    train, held_out = data.split("train"), data.split("val")
    ids = (origin.id for origin in held_out.origins())
    texts = document_texts(held_out, data.tokenizer(), chunk_tokens=held_out.n_tokens)
    named = zip(ids, (text for _, text in texts), strict=True)
    rows = {"held-out split": overlap_row(measure_overlap(named, corpus))}
    for file, of_file in documents.items():
        rows[file] = overlap_row(measure_overlap(((d.id, d.text) for d in of_file), corpus))
    for eval_task, task_results in results:
        metric = eval_task.task.metric
        overlaps = measure_overlap(_numbered(eval_task.solved_texts), corpus)
        rows[eval_task.task.name] = {
            **overlap_row(overlaps),
            "score": score_without_overlap(metric, task_results.statistics[metric], overlaps),
        }
    log("continuing held-out text ...")
    return {
        "training_text": {"documents": train.n_documents, "bytes": train.n_bytes},
        "filter": {"bytes": corpus.n_bytes, "false_positives": corpus.false_positives},
        "sets": rows,
        "writing": _generated_text_rows(model, data, corpus, samples, seed),
    }


def _training_filter(data: PreparedData, folder: Path, log: Callable[[str], None]) -> BloomFilter:
    """The n-grams of a training text: computed once, then read from a file in `folder`."""
    stream = data.split("train")
    tokenizer_sha256 = data.manifest.tokenizer_sha256
    path = folder / f"{stream.sha256[:32]}-{tokenizer_sha256[:16]}-{_FILTER_VERSION}.npy"
    try:
        return BloomFilter.open(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        log(f"{error}; it is computed again")
    log(f"reading {stream.n_bytes:,} bytes of training text, once ...")
    tokenizer = data.tokenizer()
    corpus_ngram_filter(lambda: document_texts(stream, tokenizer)).save(path)
    return BloomFilter.open(path)


def _generated_text_rows(
    model: Model, data: PreparedData, corpus: BloomFilter, samples: Sequence[str], seed: int
) -> dict[str, Any]:
    """A row for the `samples` that a run generated while it trained, for continuations of held-out
    text, and for the held-out text that follows there, each with the longest run of words that one
    of its texts shares with a document of the training text."""
    pack_weights(model.decoder)
    tokenizer, held_out = model.tokenizer, data.split("val")
    generated, following = [], []
    for number, (start, middle, stop) in enumerate(_held_out_spans(held_out)):
        ids = held_out.read(start, stop).tolist()
        new_ids = continue_ids(
            model,
            [tokenizer.start_of_text, *ids[: middle - start]],
            max_tokens=stop - middle,
            sampling=Sampling(temperature=1.0, top_k=TOP_K, seed=seed + number),
        )
        generated.append(tokenizer.decode(new_ids))
        following.append(tokenizer.decode(ids[middle - start :]))
    sets = {
        "samples.jsonl": samples,
        "continuations of held-out text": generated,
        "the held-out text there": following,
    }
    sets = {name: texts for name, texts in sets.items() if texts}
    rows = {name: overlap_row(measure_overlap(_numbered(t), corpus)) for name, t in sets.items()}

    train = data.split("train")
    all_texts = [text for texts in sets.values() for text in texts]
    # One pass over the training text serves all sets.
    matches = iter(longest_matches(all_texts, document_texts(train, data.tokenizer())))
    longest: list[tuple[dict[str, Any], str, Match]] = []
    for name, texts in sets.items():
        rows[name]["longest"] = None
        found = [(text, match) for text in texts if (match := next(matches)) is not None]
        if found:
            longest.append((rows[name], *max(found, key=lambda pair: pair[1].n_words)))
    documents = {match.document for _, _, match in longest}
    origins = {n: origin for n, origin in enumerate(train.origins()) if n in documents}
    for row, text, match in longest:
        words = split_words(text)[match.first_word : match.first_word + match.n_words]
        row["longest"] = {
            "words": match.n_words,
            "text": " ".join(words),
            "document": asdict(origins[match.document]),
        }
    return rows


def _numbered(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    return ((f"example {number}", text) for number, text in enumerate(texts))


def overlap_row(overlaps: Sequence[TextOverlap]) -> dict[str, Any]:
    """The row of one set of texts: the share of its distinct n-grams that are in the training text,
    and the distribution over its examples."""
    grams, first_places = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(each.grams for each in overlaps)]),
        return_index=True,
    )
    in_corpus = np.concatenate([np.empty(0, bool), *(each.in_corpus for each in overlaps)])
    n_in_corpus = int(in_corpus[first_places].sum())
    long_enough = [each for each in overlaps if len(each.grams)]
    percents = [each.percent for each in long_enough]
    row: dict[str, Any] = {
        "examples": len(overlaps),
        "too_short": len(overlaps) - len(long_enough),
        "without": sum(not each.in_corpus.any() for each in long_enough),
        **ngram_share(len(grams), n_in_corpus),
        "median_percent": round(float(np.median(percents)), 3) if long_enough else None,
        "most": None,
    }
    if not long_enough:
        row["percent"] = None
    elif any(percents):
        most = max(long_enough, key=lambda each: (each.percent, len(each.grams)))
        row["most"] = {
            "example": most.name,
            **ngram_share(len(most.grams), int(most.in_corpus.sum())),
            "begins": " ".join(most.text[: 2 * _SHOWN_CHARACTERS].split())[:_SHOWN_CHARACTERS],
        }
    return row


def row_message(row: Mapping[str, Any]) -> str:
    """A row of either table in one line."""
    if row["percent"] is None:
        return f"nothing to compare: {row['examples']:,} texts of fewer than 8 words"
    message = (
        f"{row['percent']:.2f} % of {row['ngrams']:,}; {row['without']:,} of "
        f"{row['examples'] - row['too_short']:,} texts have none"
    )
    if row["too_short"]:
        message += f", {row['too_short']:,} more are shorter"
    if row.get("score"):
        score = row["score"]
        message += f"; {score['metric']} {score['value']:.4f}"
        if score["value_without"] is not None:
            n = score["examples_without"]
            message += f", {score['value_without']:.4f} over the {n:,} without any"
    if row.get("longest"):
        longest = row["longest"]
        message += f"; {longest['words']} words in a row are in {longest['document']['id']}"
    return message


def score_without_overlap(
    metric: str, statistics: Array, overlaps: Sequence[TextOverlap]
) -> dict[str, Any]:
    """A metric over all examples, and over those without any overlap (None if all have some)."""
    without = statistics[np.array([not each.in_corpus.any() for each in overlaps])]
    return {
        "metric": metric,
        "value": float(value(metric, statistics.sum(0))),
        "value_without": float(value(metric, without.sum(0))) if len(without) else None,
        "examples_without": len(without),
    }


def _held_out_spans(stream: TokenStream) -> list[tuple[int, int, int]]:
    """(start of prompt, end of prompt, end of continuation), each within one document."""
    offsets = stream.document_offsets
    spans = []
    for number in range(CONTINUATIONS):
        position = round((number + 0.5) * stream.n_tokens / CONTINUATIONS)
        document = max(0, int(np.searchsorted(offsets[:-1], position, side="right")) - 1)
        first = int(offsets[document])
        end = int(offsets[document + 1]) - 1  # without the end-of-text token
        start = max(first, min(position, end - PROMPT_TOKENS - GENERATED_TOKENS))
        middle = start + min(PROMPT_TOKENS, (end - start) // 4)
        if middle < end:
            spans.append((start, middle, min(end, middle + GENERATED_TOKENS)))
    return list(dict.fromkeys(spans))


def document_texts(
    stream: TokenStream, tokenizer: Tokenizer, *, chunk_tokens: int = 1 << 19
) -> Iterator[tuple[int, str]]:
    """Yield number and text of each document of a token stream, in order, also where the source
    files are no longer there. The text is that of the document byte for byte, except for changes by
    the tokenizer itself (`gpt` lower-cases). A document of more than `chunk_tokens` comes in
    several chunks, cut after white space where possible, else after a complete character."""
    token_bytes = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
    for number, (first, end) in enumerate(pairwise(stream.document_offsets.tolist())):
        rest = b""
        for start in range(first, end, chunk_tokens):
            stop = min(start + chunk_tokens, end)
            text = rest + b"".join(token_bytes[id_] for id_ in stream.read(start, stop).tolist())
            cut = len(text)
            if stop < end:
                cut = max(text.rfind(b" "), text.rfind(b"\n"))
                if cut <= 0:
                    cut = max(len(text) - 1, 0)
                    while cut and text[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
                        cut -= 1
            yield number, text[:cut].decode("utf-8", "replace")
            rest = text[cut:]
