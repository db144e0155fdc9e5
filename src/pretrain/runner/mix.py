"""Several models, and the counts of a text, as one: a folder that `load_model` opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import to_dict
from pretrain.fileio import write_json
from pretrain.run.directory import MIX
from pretrain.run.identity import TEXTS
from pretrain.runner.open import LoadedModel, write_model

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.batches import Stream
    from pretrain.model.decoder import Decoder

Parts = list[tuple["Decoder", dict[str, Any]]]


def parts_of(models: Sequence[LoadedModel]) -> Parts:
    """Return the decoder of each model, and what mix.json says of it besides its weight."""
    return [
        (
            model.decoder,
            {
                "path": str(model.path.resolve()),
                "sha256": model.checkpoint and model.checkpoint.sha256,
                "model": to_dict(model.config)["model"],
            },
        )
        for model in models
    ]


def counts_of(model: LoadedModel, train: Stream, *, order: int, sha256: str) -> Parts:
    """Return a part with the counts of a model's training text, of up to `order` tokens."""
    from pretrain.model.counts import count_decoder, n_counted

    ids = train.read(0, n_counted(train.n_tokens))
    size = model.tokenizer.vocab_size
    decoder = count_decoder(ids, model.config.model, vocab_size=size, order=order)
    origin = {
        "path": f"counts of {model.path.resolve()}",
        "sha256": sha256,
        "model": to_dict(model.config)["model"],
        "sizes": [len(keys) for keys in decoder.keys],
    }
    return [(decoder.to(model.world.device), origin)]


def probabilities_of(parts: Parts, text: Stream) -> Tensor:
    """Return the probability (N, P) that each of P parts gives each of N targets of a text, which
    all read in the shortest window of them."""
    import torch

    from pretrain.data.batches import evaluation_batches
    from pretrain.evaluate.loss import EVALUATION_TOKENS
    from pretrain.model.mixture import target_probabilities

    context = min(decoder.config.window_tokens for decoder, _ in parts)
    rows = max(1, EVALUATION_TOKENS // context)
    columns = []
    for decoder, _ in parts:
        batches = evaluation_batches(text, context_length=context, rows=rows)
        columns.append(target_probabilities(decoder, batches))
    return torch.stack(columns, dim=1)


def mean_weights(parts: Parts, lines: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the mean of each parameter of parts of one architecture, by the weights of `lines`."""
    pairs = [(line["weight"], decoder) for line, (decoder, _) in zip(lines, parts, strict=True)]
    for name, first in parts[0][0].named_parameters():
        mean = sum(weight * each.get_parameter(name).detach().double() for weight, each in pairs)
        yield name, mean.to(first.dtype)


def write_mix(
    folder: Path,
    models: Sequence[LoadedModel],
    parts: Parts,
    weights: Sequence[float],
    *,
    average: str = "probabilities",
) -> list[dict[str, Any]]:
    """Write the mix of the parts, of which the models are the first, and return their lines in
    mix.json. It has the text of the models, if all have the same. An average of weights, instead of
    probabilities, is an ordinary model: "Model soups" (Wortsman et al., 2022)."""
    from pretrain.model.mixture import Mixture

    mixture = Mixture([decoder for decoder, _ in parts], weights)
    total = sum(weights)
    lines = [
        {**line, "weight": weight / total} for (_, line), weight in zip(parts, weights, strict=True)
    ]
    # The settings of a part that reads the window of the mix.
    config = next(model.config for model in models if model.decoder.config is mixture.config)
    prints = [m.checkpoint.state.get("fingerprint", {}) if m.checkpoint else {} for m in models]
    texts = {name: prints[0].get(name) for name in TEXTS}
    shared = texts if all(texts.items() <= each.items() for each in prints) else {}
    write_json(folder / MIX, {"average": average, "parts": lines}, indent=2)
    one = average == "weights"  # a model without parts
    parameters = mean_weights(parts, lines) if one else mixture.named_parameters()
    origin = {"averaged" if one else "parts": lines}
    write_model(folder, config, models[0].tokenizer, parameters, texts=shared, **origin)
    return lines
