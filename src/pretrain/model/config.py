"""What a decoder is made of: the few axes of its architecture, and its sizes.

`families` fixes the axes by family and the sizes by preset; whatever the user wrote wins. Both
files are free of torch, so that a wrong number is refused before two seconds of imports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.model.families import (
    FAMILIES,
    PRESETS,
    Bias,
    Family,
    FeedForwardKind,
    Initialization,
    Norm,
    NormPlace,
    Position,
    is_gated,
    sizes_of,
)

MOST_PARAMETERS = 10**13
"""No machine holds more; a larger model is a slip of the pen."""
_MOST_ROWS = 1 << 40
LONGEST_NGRAM = 8
_LARGEST = {
    "size": 1_000,
    "longest_ngram": LONGEST_NGRAM,
    "n_layers": 10_000,
    "n_heads": 1 << 20,
    "d_model": 1 << 20,
    "n_kv_heads": 1 << 20,
    "d_ff": 1 << 24,
    "context_length": 1 << 24,
    "rope_original_context": 1 << 24,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    family: Family = "llama"
    """the architecture's family: transformer (2017), gpt, gpt2, llama or fast"""
    preset: str | None = None
    """published sizes by name (gpt2-124m, llama3-8b, ...); your own values win over them"""
    size: int | None = None
    """the one dial of the family fast: its layers; it has a head more than layers, each 64 wide.
    Your own n_layers, n_heads and d_model win over it"""
    n_layers: int = 4
    """number of blocks"""
    n_heads: int = 4
    """number of attention heads; d_model must be a multiple of it"""
    n_kv_heads: int | None = None
    """number of key/value heads (grouped-query attention); empty: as many as heads"""
    d_model: int = 128
    """width of the residual stream"""
    d_ff: int | None = None
    """width of the feed-forward layer; empty: 4 d_model, for swiglu 8/3 d_model to the next 32"""
    context_length: int | None = None
    """how many ids a prediction may look back on (T); empty: 128, in the family fast 128 times the
    largest power of 2 in size, less for a tiny text"""
    dropout: float = 0.0
    """share of activations set to zero in training, on embeddings, attention and residual
    branches"""
    attention_dropout: bool = True
    """whether dropout falls on attention weights too"""
    norm: Norm = "rms"
    """kind of normalisation: layer (mean and variance) or rms"""
    norm_place: NormPlace = "before"
    """before: a branch reads the normalised stream, with one more norm at the end; after: the sum
    is normalised"""
    norm_epsilon: float = 1e-5
    """added under the square root of a norm"""
    position: Position = "rotary"
    """how position enters: learned or sinusoidal (added to the embedding), or rotary (queries and
    keys turn)"""
    rope_theta: float = 10_000.0
    """base of the rotary wavelengths"""
    rope_factor: float = 1.0
    """how many times longer the longest rotary wavelengths are made (Llama 3.1: 8); 1: none"""
    rope_original_context: int = 8192
    """context before that stretching"""
    rope_low_factor: float = 1.0
    """wavelengths above the original context over this are stretched whole"""
    rope_high_factor: float = 4.0
    """wavelengths below the original context over this stay; those between are blended"""
    feed_forward: FeedForwardKind = "swiglu"
    """kind of feed-forward layer: gelu, relu or relu2 (two matrices), swiglu (three)"""
    query_key_norm: bool = False
    """whether queries and keys are normalised before they meet"""
    scaled_embedding: bool = False
    """whether embedded ids are multiplied by the root of d_model"""
    embedding_norm: bool = False
    """whether embeddings are normalised before the first block"""
    ngram_rows: int = 0
    """rows of each hashed table of n-gram embeddings, for each head's share of them; 0: none"""
    longest_ngram: int | None = None
    """there is such a table for the last 2 to so many ids; empty: 3, and 6 for a vocabulary of
    single characters or bytes"""
    induction: int = 0
    """for the last 1 to so many ids there is an embedding of what followed them when they last
    occurred in the window; 0: none"""
    bias: Bias = "none"
    """which linear layers have biases: none, all, feed_forward, or query_key_value; with any of
    them layer norms have too"""
    tied_head: bool = False
    """whether the output head shares the token embedding's weights"""
    initialization: Initialization = "normal"
    """first weights: normal, N(0, 0.02); scaled, with residual branches over the root of their
    number; zero, with branches of 0; xavier"""

    def __post_init__(self) -> None:
        if mistakes := [sentence for _, sentence in self.mistakes()]:
            raise ValueError("\n".join(mistakes))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """What is wrong: the fields that it hangs on, and a sentence."""
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                legal = "at least 1" if value < 1 else f"at most {most:,}"
                yield name, f"model.{name} is {value}; it must be {legal}"
        if self.size is not None and self.family != "fast":
            yield (
                "size family",
                f"model.size is the dial of the family fast, and model.family is {self.family}; "
                "give n_layers, n_heads and d_model, or a preset",
            )
        if not 0.0 <= self.dropout < 1.0:
            yield "dropout", f"model.dropout is {self.dropout}; it must be in [0, 1)"
        if not 0 <= self.ngram_rows <= _MOST_ROWS:
            legal = "0 or above" if self.ngram_rows < 0 else f"at most {_MOST_ROWS:,}"
            yield "ngram_rows", f"model.ngram_rows is {self.ngram_rows}; it must be {legal}"
        if not 0 <= self.induction <= LONGEST_NGRAM:
            yield (
                "induction",
                f"model.induction is {self.induction}; it must be in [0, {LONGEST_NGRAM}]",
            )
        for name in ("norm_epsilon", "rope_theta", "rope_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                yield name, f"model.{name} is {getattr(self, name)}; it must be above 0"
        if not 0 < self.rope_low_factor < self.rope_high_factor:
            yield (
                "rope_low_factor" + " rope_high_factor" * (self.rope_low_factor > 0),
                f"model.rope_low_factor is {self.rope_low_factor}; it must be above 0 and below "
                f"model.rope_high_factor, {self.rope_high_factor}",
            )
        yield from self._mistakes_of_shape()

    def _mistakes_of_shape(self) -> Iterator[tuple[str, str]]:
        """What does not fit together; a number that cannot be divided by has been named already."""
        d, heads, kv_heads = self.d_model, self.n_heads, self.kv_heads
        if heads and d % heads:
            yield (
                "d_model n_heads",
                f"model.d_model {d} is not a multiple of model.n_heads {heads}",
            )
        elif heads and self.position == "rotary" and (d // heads) % 2:
            yield (
                "d_model n_heads position",
                f"rotary positions need an even head width, but model.d_model {d} / "
                f"model.n_heads {heads} is {d // heads}",
            )
        if kv_heads and heads % kv_heads:
            yield (
                "n_heads n_kv_heads",
                f"model.n_heads {heads} is not a multiple of model.n_kv_heads {self.n_kv_heads}",
            )
        if self.position == "sinusoidal" and d % 2:
            yield "d_model position", f"sinusoidal positions need an even model.d_model, not {d}"
        # Fewer than there would be: positions, the vocabulary and a third matrix come on top.
        least = 2 * self.n_layers * d * (d + self.feed_forward_width)
        least += len(self.ngram_lengths) * self.ngram_rows * d
        if least > MOST_PARAMETERS:
            yield (
                "n_layers d_model d_ff feed_forward ngram_rows longest_ngram",
                f"a model of model.n_layers {self.n_layers}, model.d_model {d}, model.d_ff "
                f"{self.feed_forward_width} and model.ngram_rows {self.ngram_rows} has at least "
                f"{least:,} parameters; legal: at most {MOST_PARAMETERS:,}",
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def feed_forward_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        if not is_gated(self.feed_forward):
            return 4 * self.d_model
        # Three matrices of 8/3 d hold what two of 4 d hold (Shazeer, "GLU Variants", 2020).
        return -(-8 * self.d_model // 3 // 32) * 32

    @property
    def ngram_lengths(self) -> range:
        """The lengths of n-grams that have a table."""
        longest = min(self.longest_ngram or 3, LONGEST_NGRAM)
        return range(2, longest + 1) if self.ngram_rows else range(0)

    def table_rows(self, vocab_size: int) -> int:
        """Rows of all the tables that are only looked up, d_model numbers each."""
        return len(self.ngram_lengths) * self.ngram_rows + self.induction * (vocab_size + 1)

    def has_bias(self, part: Literal["query_key_value", "output", "feed_forward", "norm"]) -> bool:
        """Whether a part of each block has biases; rms norms never have."""
        if part == "norm":
            return self.norm == "layer" and self.bias != "none"
        return self.bias in ("all", part)

    @property
    def window_tokens(self) -> int:
        """The context length T, once it has been decided."""
        assert self.context_length is not None, "context_length is decided before a model is built"
        return self.context_length


def model_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a `model` section starts from: its family's, then its preset's or size's.

    Raises ValueError, a line for each mistake, for an unknown family or preset, and for a preset of
    another family.
    """
    preset_name, family = section.get("preset"), section.get("family")
    # Looked up by equality: what a user wrote may be a list, which no dict is asked for.
    preset = PRESETS[preset_name] if preset_name in list(PRESETS) else {}
    mistakes = []
    if preset_name is not None and not preset:
        mistakes.append(f"model.preset {preset_name!r} is not one of {', '.join(PRESETS)}")
    if family is not None and family not in list(FAMILIES):
        mistakes.append(f"model.family {family!r} is not one of {', '.join(FAMILIES)}")
    elif preset and family not in (None, preset["family"]):
        mistakes.append(
            f"model.preset {preset_name} is of the family {preset['family']}, "
            f"but model.family is {family}; name one of the two"
        )
    if mistakes:
        raise ValueError("\n".join(mistakes))
    family = preset.get("family", family or "llama")
    if family != "fast":
        return FAMILIES[family](**preset)
    values = FAMILIES[family](
        **({"size": section["size"]} if _is_size(section.get("size")) else {})
    )
    width = section.get("d_model")
    if type(width) is int and 1 <= width <= _LARGEST["d_model"]:
        # Of another width, too, heads are about 64 wide.
        fits = (n for n in range(width // 64, 1, -1) if width % (2 * n) == 0)
        values["n_heads"] = next(fits, 1)
    return values


def replaced_by(section: Mapping[str, Any]) -> Iterator[str]:
    """The fields whose earlier values mean nothing once a `model` section names a preset, a size,
    or another family: a recipe's sizes are another model's."""
    if section.get("preset") is not None:
        yield from model_defaults({"preset": section["preset"]})
    if _is_size(section.get("size")):
        yield from sizes_of(section["size"])
    elif section.get("preset") is not None or section.get("family") not in (None, "fast"):
        yield "size"


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST["size"]
