"""Score a model on text: nats, perplexity and bits per byte, every token counted once.

pretrain evaluate RUN                      the run's own held-out text, whole
pretrain evaluate RUN --text a.txt b.txt   your own files, each by itself
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pretrain.cli.models import HELP
from pretrain.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts to score, in any format that prepare reads"
    )
    parser.add_argument(
        "--text-field", metavar="F", help="field of a jsonl record that holds the text"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.cli.models import open_model
    from pretrain.corpus import list_files

    for name in arguments.text or []:
        list_files(name)  # a wrong path is said before a model is loaded
    model = open_model(arguments.model, device=arguments.device)

    from pretrain.model import Objective

    objective = Objective(model.decoder)
    context = model.decoder.config.window_tokens
    output.say(
        f"{model.path}: windows of {context} tokens that do not overlap, "
        "each text from an end-of-text on"
    )
    if arguments.text is None:
        scores = {"held-out split": _score_split(model, objective)}
    else:
        scores = {
            name: _score_file(model, objective, name, arguments.text_field)
            for name in arguments.text
        }
    for name, row in scores.items():
        output.say(
            f"{name}: {row['bits_per_byte']:.4f} bits/byte, perplexity {row['perplexity']:,.2f} a "
            f"token and {row['word_perplexity']:,.1f} a word, {row['tokens']:,} tokens, "
            f"{row['bytes']:,} bytes"
        )
    output.result({"text": scores})
    return 0


def _row(score: Any, words: int) -> dict[str, Any]:
    return {
        **asdict(score),
        "words": words,
        "perplexity": score.perplexity,
        "word_perplexity": score.per_word(words),
        "bits_per_byte": score.bits_per_byte,
    }


def _score_file(model: Any, objective: Any, name: str, text_field: str | None) -> dict[str, Any]:
    from pretrain.corpus import read_documents
    from pretrain.evaluate import score_texts

    texts = [document.text for document in read_documents(name, text_field=text_field)]
    score = score_texts(
        objective, model.tokenizer, texts, world=model.world, precision=model.precision
    )
    return _row(score, sum(len(text.split()) for text in texts))


def _score_split(model: Any, objective: Any) -> dict[str, Any]:
    from pretrain.cli.places import prepared
    from pretrain.data import evaluation_batches
    from pretrain.evaluate import byte_lengths, score
    from pretrain.evaluate.scorer import EVALUATION_TOKENS

    seen = None if model.checkpoint is None else model.checkpoint.state.get("fingerprint")
    if seen is None:
        raise ValueError(
            f"{model.path} was not trained here and has no held-out text; score files with --text"
        )
    data = prepared(model.config)
    same_ids = data.manifest.tokenizer_sha256 == model.tokenizer.sha256
    if not same_ids or data.split("val").sha256 != seen["held-out text"]:
        raise ValueError(
            f"the text at {', '.join(model.config.data.paths)} has changed since the run; "
            "score files with --text instead"
        )
    context = model.decoder.config.window_tokens
    stream = data.split("val")
    batches = evaluation_batches(
        stream, context_length=context, rows=max(1, EVALUATION_TOKENS // context)
    )
    result = score(
        objective,
        batches,
        byte_lengths_V=byte_lengths(model.tokenizer),
        world=model.world,
        precision=model.precision,
    )
    words = len(model.tokenizer.decode(stream.read(0, stream.n_tokens).tolist()).split())
    return _row(result, words)
