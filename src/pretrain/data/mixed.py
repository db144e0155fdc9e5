"""Several sources as one training text: a `PreparedData` whose order is a mixture.

The sources are texts that were prepared together, or prepared folders of the same tokenizer, which
are concatenated. Nothing is copied: weights and stages affect the order only. ValueError for
tokenizers that differ, and for a source that has nothing left to train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pretrain.data.config import DataConfig
from pretrain.data.format import SPLITS, Origin, PreparedData, SourceShare, TokenStream
from pretrain.data.order import MixtureOrder, SourceSpan

UNKNOWN_STEPS = 1 << 40
"""In place of a number of training steps that is not known yet."""


class ConcatenatedStream:
    """Several streams one after the other, with the methods of a `TokenStream`."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = streams
        self._ends = np.cumsum([stream.n_tokens for stream in streams])
        self.n_tokens = int(self._ends[-1])
        self.n_documents = sum(stream.n_documents for stream in streams)
        self.n_bytes = sum(stream.n_bytes for stream in streams)
        self.sources: list[SourceShare] = [s for stream in streams for s in stream.sources]
        hashes = "".join(stream.sha256 for stream in streams)
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """As of a `TokenStream`; the end-of-text token between two streams is counted as the end of
        the document before it."""
        pieces = []
        start = 0
        for stream in self._streams:
            offsets = stream.document_offsets + start
            pieces.append(offsets[:-1])
            start += stream.n_tokens
        pieces.append(offsets[-1:])
        return np.concatenate(pieces)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids [start, stop)."""
        assert 0 <= start <= stop <= self.n_tokens, (start, stop)
        pieces = [np.empty(0, np.int64)]
        for stream, end in zip(self._streams, self._ends.tolist(), strict=True):
            begin = end - stream.n_tokens
            if start < end and stop > begin:
                pieces.append(stream.read(max(start, begin) - begin, min(stop, end) - begin))
        return np.concatenate(pieces)

    def origins(self) -> Iterator[Origin]:
        """As of a `TokenStream`."""
        return chain.from_iterable(stream.origins() for stream in self._streams)

    def verify(self) -> None:
        """As of a `TokenStream`."""
        for stream in self._streams:
            stream.verify()


class MixedData(PreparedData):
    """Prepared text of several sources, and the weights by which a run reads them."""

    def __init__(self, config: DataConfig, prepared: Sequence[PreparedData]) -> None:
        """`prepared` is one folder of all paths of `config`, or one for each path, in their
        order."""
        first = prepared[0]
        for other in prepared[1:]:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"data.source: {str(first.folder)!r} and {str(other.folder)!r} have different "
                    "tokenizers; prepare them with --tokenizer and the same one"
                )
        self.folder, self.manifest = first.folder, first.manifest
        self._streams = {
            name: ConcatenatedStream([data.split(name) for data in prepared])  # type: ignore[misc]
            for name in SPLITS
        }
        self._config = config
        # Where the ids of each path of the config are in the training stream.
        spans: dict[str, SourceSpan] = {}
        end = 0
        if len(prepared) > 1:
            for path, data in zip(config.paths, prepared, strict=True):
                n_tokens = data.split("train").n_tokens
                spans[path] = SourceSpan(path, end, n_tokens)
                end += n_tokens
        else:
            for share in self._streams["train"].sources:
                if share.n_documents:
                    # A source's first input is the end-of-text token before its first document.
                    spans[share.source] = SourceSpan(share.source, end, share.n_tokens + 1)
                end += share.n_tokens
        for path in config.paths:
            if path not in spans:
                raise ValueError(
                    f"data.source: {path!r} has no text left to train on; remove this source, or "
                    "use fewer filters"
                )
        self.spans = [spans[path] for path in config.paths]

    @property
    def tokens_for_epochs(self) -> int | None:
        """Tokens of a run that reads every source for the configured number of epochs; None if the
        sources have weights."""
        assert not isinstance(self._config.source, str)
        sizes = {span.source: span.n_tokens for span in self.spans}
        if any(entry.epochs is None for entry in self._config.source):
            return None
        if len({entry.stage for entry in self._config.source}) > 1:
            raise ValueError(
                "data.source has epochs and stages, so train.steps must be set: a stage begins "
                "after a fraction of the steps"
            )
        return round(sum((e.epochs or 0) * sizes[e.path] for e in self._config.source))

    @property
    def min_source_tokens(self) -> int:
        return min(span.n_tokens for span in self.spans)

    def order(
        self, *, context_length: int, seed: int, steps: int = UNKNOWN_STEPS, batch_size: int = 1
    ) -> MixtureOrder:
        """The mixture of a run of `steps` steps with `batch_size` samples each.

        ValueError if the run is too short for its stages, or if it would repeat a source although
        `data.exhausted` is "error".
        """
        entries = self._config.source
        assert not isinstance(entries, str)
        sizes = {span.source: span.n_tokens for span in self.spans}
        stages: dict[float, dict[str, float]] = {}
        for entry in entries:
            weight = entry.weight or (entry.epochs or 0) * sizes[entry.path]
            stages.setdefault(entry.stage, {})[entry.path] = weight
        beginnings = sorted(stages)
        first_samples = [round(beginning * steps) * batch_size for beginning in beginnings]
        if len({*first_samples, steps * batch_size}) <= len(first_samples):
            raise ValueError(
                f"data.source: {steps} steps are too few for {len(stages)} stages; use more steps"
            )
        weights = [[stages[start].get(path, 0.0) for path in sizes] for start in beginnings]
        mixture = MixtureOrder(
            self.spans,
            stages=list(zip(first_samples, weights, strict=True)),
            context_length=context_length,
            seed=seed,
        )
        # A run of exactly the configured epochs may read a few windows more: steps and shares are
        # rounded.
        max_steps = sum(stages[0.0].values()) / (context_length * batch_size) + 1
        is_single_epoch = (
            len(stages) == 1 and steps < max_steps and all((e.epochs or 2) <= 1 for e in entries)
        )
        if self._config.exhausted == "error" and steps < UNKNOWN_STEPS and not is_single_epoch:
            for path, epochs in mixture.epochs(steps * batch_size).items():
                if epochs > 1:
                    raise ValueError(
                        f"the run would read {path!r} {epochs:.2f} times, and data.exhausted is "
                        "'error'; take fewer steps, a smaller weight, or data.exhausted repeat"
                    )
        return mixture
