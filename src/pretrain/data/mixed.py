"""Several sources as one text to train on: a `PreparedData` whose order is a mixture.

The sources are texts that were prepared together, or prepared folders with the same tokenizer, each
of them whole. Nothing is copied: shares and stages are in the order alone. Refused are tokenizers
that differ, and a source that left nothing to train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.data.config import DataConfig
from pretrain.data.manifest import SourceShare
from pretrain.data.mixture import Mixture, Portion
from pretrain.data.origins import Origin
from pretrain.data.shards import PreparedData, TokenStream


class JoinedStream:
    """Streams one after the other, with the methods of a `TokenStream`."""

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
        """As of a `TokenStream`; between two streams lies an end-of-text token of no document,
        which counts to the one before."""
        starts = [0, *self._ends[:-1].tolist()]
        pairs = zip(self._streams, starts, strict=True)
        offsets = [stream.document_offsets + start for stream, start in pairs]
        return np.concatenate([*[each[:-1] for each in offsets], offsets[-1][-1:]])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids [start, stop)."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"cannot read ids {start} to {stop}; legal: 0 to {self.n_tokens}")
        found = [np.empty(0, np.int64)]
        for stream, end in zip(self._streams, self._ends.tolist(), strict=True):
            begin = end - stream.n_tokens
            if start < end and stop > begin:
                found.append(stream.read(max(start, begin) - begin, min(stop, end) - begin))
        return np.concatenate(found)

    def origins(self, wanted: Callable[[int, Origin], bool]) -> Iterator[tuple[int, Origin]]:
        """As of a `TokenStream`."""
        first = 0
        for stream in self._streams:
            for number, origin in stream.origins(lambda n, o, first=first: wanted(first + n, o)):  # type: ignore[misc]
                yield first + number, origin
            first += stream.n_documents

    def verify(self) -> None:
        for stream in self._streams:
            stream.verify()


class MixedData(PreparedData):
    """Prepared text of several sources, and the shares that a run reads of them."""

    def __init__(self, config: DataConfig, prepared: Sequence[PreparedData]) -> None:
        """`prepared` is one folder of all paths of `config`, or one for each path, in their
        order."""
        first, *others = prepared
        for other in others:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"data.source: {str(first.folder)!r} and {str(other.folder)!r} have different "
                    "tokenizers; prepare them with --tokenizer and the same one"
                )
        self.folder, self.manifest = first.folder, first.manifest
        self._streams = {
            name: JoinedStream([data.split(name) for data in prepared])  # type: ignore[misc, arg-type]
            for name in first.manifest.streams
        }
        self._config = config
        train = self._streams["train"]
        if others:
            starts = np.cumsum([0, *(data.split("train").n_tokens for data in prepared)]).tolist()
            sizes = [data.split("train").n_tokens for data in prepared]
            found = dict(zip(config.paths, zip(starts, sizes, strict=False), strict=True))
        else:
            # The end-of-text token before its first document is a source's own first input.
            ends = np.cumsum([share.n_tokens for share in train.sources]).tolist()
            found = {
                share.source: (end - share.n_tokens, share.n_tokens + 1)
                for share, end in zip(train.sources, ends, strict=True)
                if share.n_documents
            }
        missing = [path for path in config.paths if path not in found]
        if missing:
            raise ValueError(f"data.source: nothing of {missing[0]!r} is left to train on")
        self.portions = [Portion(path, *found[path]) for path in config.paths]

    @property
    def asked_tokens(self) -> int | None:
        """Tokens of the run that reads every source as many epochs as it is asked for; None if some
        have weights."""
        assert not isinstance(self._config.source, str)
        sizes = {portion.source: portion.n_tokens for portion in self.portions}
        if any(entry.epochs is None for entry in self._config.source):
            return None
        if len({entry.stage for entry in self._config.source}) > 1:
            raise ValueError(
                "data.source: epochs say how much is read of each source, and stages when: with "
                "both give train.steps, of which a stage is a share"
            )
        return round(sum((e.epochs or 0) * sizes[e.path] for e in self._config.source))

    @property
    def shortest_tokens(self) -> int:
        return min(portion.n_tokens for portion in self.portions)

    def order(
        self, *, context_length: int, seed: int, steps: int = 1 << 40, batch_rows: int = 1
    ) -> Mixture:
        """The mixture of a run of so many steps; ValueError for stages that it is too short for,
        and for sources that it would read again where `data.exhausted` refuses that."""
        entries = self._config.source
        assert not isinstance(entries, str)
        stages: dict[float, dict[str, float]] = {}
        sizes = {portion.source: portion.n_tokens for portion in self.portions}
        for entry in entries:
            weight = entry.weight or (entry.epochs or 0) * sizes[entry.path]
            stages.setdefault(entry.stage, {})[entry.path] = weight
        firsts = [round(begin * steps) * batch_rows for begin in sorted(stages)]
        if len({*firsts, steps * batch_rows}) <= len(firsts):
            raise ValueError(f"data.source: {steps} steps are too few for {len(stages)} stages")
        weights = [[stages[begin].get(path, 0.0) for path in sizes] for begin in sorted(stages)]
        mixture = Mixture(
            self.portions,
            stages=list(zip(firsts, weights, strict=True)),
            context_length=context_length,
            seed=seed,
        )
        # What is asked for in epochs may be a few windows more: steps and shares are rounded.
        asked = sum(stages[0.0].values()) / (context_length * batch_rows) + 1
        is_asked = len(stages) == 1 and steps < asked and all((e.epochs or 2) <= 1 for e in entries)
        if self._config.exhausted == "error" and steps < 1 << 40 and not is_asked:
            for path, epochs in mixture.epochs(steps * batch_rows).items():
                if epochs > 1:
                    raise ValueError(
                        f"the run would read {path!r} {epochs:.2f} times, and data.exhausted is "
                        "'error'; take fewer steps, a smaller weight, or data.exhausted repeat"
                    )
        return mixture
