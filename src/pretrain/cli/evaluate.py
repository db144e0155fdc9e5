"""Score a model on text: nats, perplexity and bits per byte, every token counted once.

pretrain evaluate RUN                      the run's own held-out text, whole
pretrain evaluate RUN --text a.txt b.txt   your own files, each by itself
pretrain evaluate RUN --stride 64          windows that overlap: more context for each token
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pretrain.cli.models import HELP
from pretrain.cli.output import Output

if TYPE_CHECKING:
    from pretrain.cli.models import OpenModel
    from pretrain.evaluate import Score
    from pretrain.model import Objective


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts to score, in any format that prepare reads"
    )
    parser.add_argument(
        "--text-field", metavar="F", help="field of a jsonl record that holds the text"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window to the next [the context: windows do not overlap]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


def run(arguments: argparse.Namespace, output: Output) -> int:
    from pretrain.cli.models import open_model
    from pretrain.corpus import list_files

    for name in arguments.text or []:
        list_files(name)  # a wrong path is said before a model is loaded
    if arguments.stride is not None and arguments.stride < 1:
        raise ValueError(f"--stride is {arguments.stride}; it must be at least 1")
    model = open_model(arguments.model, device=arguments.device)

    from pretrain.model import Objective

    objective, stride = Objective(model.decoder), arguments.stride
    protocol = text_protocol(model, stride)
    output.say(f"{model.path}: {protocol}")
    if arguments.text is None:
        scores = {"held-out split": _score_split(model, objective, stride)}
    else:
        scores = {
            name: _score_file(model, objective, name, arguments.text_field, stride)
            for name in arguments.text
        }
    for name, row in scores.items():
        output.say(
            f"{name}: {row['bits_per_byte']:.4f} bits/byte, perplexity {row['perplexity']:,.2f} a "
            f"token and {row['word_perplexity']:,.1f} a word, {row['tokens']:,} tokens, "
            f"{row['bytes']:,} bytes"
        )
    output.result({"text": scores, "protocol": {"text": protocol}})
    return 0


def text_protocol(model: OpenModel, stride: int | None) -> str:
    """How texts are scored, in a line. ValueError for a stride that does not fit the context."""
    from pretrain.data.batches import checked_stride

    context = model.decoder.config.window_tokens
    step = checked_stride(stride, context)
    overlap = f"overlap by {context - step}" if step < context else "do not overlap"
    start = model.tokenizer.entry(model.tokenizer.start_of_text)
    return (
        f"windows of {context} tokens that {overlap}, every token counted once, each text from "
        f"{start} on, in {model.precision}"
    )


def _row(score: Score, words: int) -> dict[str, Any]:
    return {
        **asdict(score),
        "words": words,
        "perplexity": score.perplexity,
        "word_perplexity": score.per_word(words),
        "bits_per_byte": score.bits_per_byte,
    }


def _score_file(
    model: OpenModel, objective: Objective, name: str, text_field: str | None, stride: int | None
) -> dict[str, Any]:
    from pretrain.corpus import read_documents
    from pretrain.evaluate import score_texts

    texts = [document.text for document in read_documents(name, text_field=text_field)]
    score = score_texts(
        objective,
        model.tokenizer,
        texts,
        world=model.world,
        precision=model.precision,
        stride=stride,
    )
    return _row(score, sum(len(text.split()) for text in texts))


def _score_split(model: OpenModel, objective: Objective, stride: int | None) -> dict[str, Any]:
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
        stream,
        context_length=context,
        rows=max(1, EVALUATION_TOKENS // context),
        stride=stride,
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
