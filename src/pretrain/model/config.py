"""The section `model` of a config: the axes of the decoder's architecture, its sizes, and the
number of parameters and FLOP that follow from them.

`families` sets the architecture by family and the sizes by preset; the user's own values replace
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, assert_never

from pretrain.model.families import (
    FAMILIES,
    HAS_FINAL_NORM,
    IS_GATED,
    PRESETS,
    Bias,
    Family,
    FeedForwardKind,
    Initialization,
    Norm,
    NormPlace,
    Position,
    sizes_of,
)
from pretrain.validation import (
    Checked,
    FieldError,
    Range,
    did_you_mean,
    nearest,
    raise_errors,
    suggestion,
)

MAX_PARAMETERS = 10**13
"""No machine can train more; a larger number is an error in the config."""
LONGEST_NGRAM = 8
# Of each n-gram table for each head, unless a text is too small to fill them.
MAX_TABLE_ROWS = 131_072
_SIZE = Range(1, 1000)
_WIDTH = Range(1, 1 << 20)
_CONTEXT = Range(1, 1 << 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Checked):
    """The section `model`."""

    section = "model"

    family: Family = "llama"
    """the architecture's family: transformer (2017), gpt, gpt2, llama or fast"""
    preset: str | None = None
    """published sizes by name (gpt2-124m, llama3-8b, ...); your own values replace them"""
    size: Annotated[int | None, _SIZE] = None
    """number of layers of the family fast, from which its other sizes follow: one more head than
    layers, each 64 wide. Your own n_layers, n_heads and d_model replace them"""
    n_layers: Annotated[int, Range(1, 10_000)] = 4
    """number of blocks"""
    n_heads: Annotated[int, _WIDTH] = 4
    """number of attention heads; d_model must be a multiple of it"""
    n_kv_heads: Annotated[int | None, _WIDTH] = None
    """number of key/value heads (grouped-query attention); empty: n_heads"""
    d_model: Annotated[int, _WIDTH] = 128
    """width of the residual stream"""
    d_ff: Annotated[int | None, Range(1, 1 << 24)] = None
    """width of the feed-forward layer; empty: 4 d_model, for swiglu 8/3 d_model rounded up to a
    multiple of 32"""
    context_length: Annotated[int | None, _CONTEXT] = None
    """number of previous ids that a prediction depends on (T); empty: 128; for the family fast 128
    times the largest power of 2 in size; less for a tiny text"""
    dropout: Annotated[float, Range(0, lt=1)] = 0.0
    """fraction of activations set to zero in training: of embeddings, attention and residual
    branches"""
    attention_dropout: bool = True
    """apply dropout to attention weights too"""
    table_dropout: Annotated[float, Range(0, lt=1)] = 0.0
    """fraction of n-gram embeddings set to zero in training, so that the model does not learn to
    trust what its tables remember of a text that is read several times"""
    norm: Norm = "rms"
    """kind of normalisation: layer (mean and variance) or rms"""
    norm_place: NormPlace = "before"
    """before: normalise the input of each branch, and the last block's output; after: normalise the
    sum of residual stream and branch"""
    norm_epsilon: Annotated[float, Range(gt=0)] = 1e-5
    """constant added under the square root of a norm, against division by zero"""
    position: Position = "rotary"
    """position encoding: learned or sinusoidal (added to the embedding), or rotary (queries and
    keys are rotated)"""
    rope_theta: Annotated[float, Range(gt=0)] = 10_000.0
    """base of the rotary wavelengths"""
    rope_factor: Annotated[float, Range(gt=0)] = 1.0
    """factor by which the longest rotary wavelengths are scaled (Llama 3.1: 8); 1: not scaled"""
    rope_original_context: Annotated[int, _CONTEXT] = 8192
    """context length before the scaling by rope_factor"""
    rope_low_factor: Annotated[float, Range(gt=0)] = 1.0
    """wavelengths above rope_original_context / rope_low_factor are scaled by the full factor"""
    rope_high_factor: Annotated[float, Range(gt=0)] = 4.0
    """wavelengths below rope_original_context / rope_high_factor are not scaled; those between are
    interpolated"""
    feed_forward: FeedForwardKind = "swiglu"
    """kind of feed-forward layer: gelu, relu, relu2 (its square) or leaky_relu2 (the square of
    max(x, x / 2)), of two matrices; swiglu, of three"""
    query_key_norm: bool = False
    """normalise queries and keys before attention"""
    scaled_embedding: bool = False
    """multiply token embeddings by the square root of d_model"""
    embedding_norm: bool = False
    """normalise embeddings before the first block"""
    ngram_rows: Annotated[int | None, Range(0, 1 << 40)] = 0
    """rows of each hashed n-gram table, for each head's part of the embedding; 0: no tables; empty:
    131,072, and for a small text the largest power of 2 up to a quarter of its tokens"""
    longest_ngram: Annotated[int | None, Range(1, LONGEST_NGRAM)] = None
    """longest n-gram with a table; there is one for each length from 2 to this; empty: 3, and 6 for
    a vocabulary of single characters or bytes"""
    induction: Annotated[int, Range(0, LONGEST_NGRAM)] = 0
    """for each n-gram length from 1 to this, add an embedding of the id that followed the last
    occurrence of the same n-gram in the window; 0: none"""
    bias: Bias = "none"
    """linear layers that have biases: none, all, feed_forward, or query_key_value; with any of them
    layer norms have biases too"""
    tied_head: bool = False
    """share the token embedding's weights with the output head"""
    initialization: Initialization = "normal"
    """initial weights: normal, N(0, 0.02); scaled, normal with residual branches divided by the
    root of their number; zero, normal with residual branches of 0; xavier"""

    def conflicts(self) -> Iterator[FieldError]:
        d, heads, kv_heads = self.d_model, self.n_heads, self.kv_heads
        if self.size is not None and self.family != "fast":
            yield (
                "size family",
                f"model.size is {self.size}; it must be empty, because model.family is "
                f"{self.family} and not fast; give n_layers, n_heads and d_model, or a preset",
            )
        if not self.rope_low_factor < self.rope_high_factor:
            yield (
                "rope_low_factor rope_high_factor",
                f"model.rope_low_factor is {self.rope_low_factor}; it must be below "
                f"model.rope_high_factor, {self.rope_high_factor}",
            )
        multiples = (("d_model", d, "n_heads", heads), ("n_heads", heads, "n_kv_heads", kv_heads))
        for name, size, part, n in multiples:
            if size % n:
                message = f"model.{name} is {size}; it must be a multiple of model.{part}, {n}"
                yield f"{name} {part}", message
        if d % heads == 0 and self.position == "rotary" and self.d_head % 2:
            yield (
                "d_model n_heads position",
                f"model.d_model {d} / model.n_heads {heads} is {self.d_head}; it must be even for "
                "rotary positions",
            )
        if self.position == "sinusoidal" and d % 2:
            message = f"model.d_model is {d}; it must be even for sinusoidal positions"
            yield "d_model position", message

        # A lower bound: positions, the vocabulary and a third matrix are added to it.
        n_least = 2 * self.n_layers * d * (d + self.feed_forward_width)
        n_least += len(self.ngram_lengths) * self.rows_of_a_table * d
        if n_least > MAX_PARAMETERS:
            yield (
                "n_layers d_model d_ff feed_forward ngram_rows longest_ngram",
                f"a model of model.n_layers {self.n_layers}, model.d_model {d}, model.d_ff "
                f"{self.feed_forward_width} and model.ngram_rows {self.rows_of_a_table} has at "
                f"least {n_least:,} parameters; it must have at most {MAX_PARAMETERS:,}",
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
        if not IS_GATED[self.feed_forward]:
            return 4 * self.d_model
        # Three matrices of 8/3 d have as many weights as two of 4 d (Shazeer, "GLU Variants Improve
        # Transformer", 2020).
        return math.ceil(8 * self.d_model / (3 * 32)) * 32

    @property
    def ngram_lengths(self) -> range:
        """The lengths of n-grams that have a table."""
        longest = min(self.longest_ngram or 3, LONGEST_NGRAM)
        return range(2, longest + 1) if self.rows_of_a_table else range(0)

    @property
    def rows_of_a_table(self) -> int:
        """The rows of a table for one head: those of a large text where none are given."""
        return MAX_TABLE_ROWS if self.ngram_rows is None else self.ngram_rows

    def table_rows(self, vocab_size: int) -> int:
        """Return the number of rows of all lookup tables, d_model numbers each."""
        return len(self.ngram_lengths) * self.rows_of_a_table + self.induction * (vocab_size + 1)

    def has_bias(self, part: Literal["query_key_value", "output", "feed_forward", "norm"]) -> bool:
        """Return whether a part of each block has biases; rms norms never have."""
        if part == "norm":
            return self.norm == "layer" and self.bias != "none"
        match self.bias:
            case "none":
                return False
            case "all":
                return True
            case "feed_forward" | "query_key_value":
                return part == self.bias
            case _:
                assert_never(self.bias)

    @property
    def window_tokens(self) -> int:
        """The context length T, once it is resolved."""
        assert self.context_length is not None, "context_length is resolved before a model is built"
        return self.context_length


def model_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a `model` section starts from: its family's, preset's or size's.

    Raises ConfigError for an unknown family or preset, and for a preset of another family.
    """
    preset_name, family = section.get("preset"), section.get("family")
    # Compared by equality: what a user wrote may be a list, which is not hashable.
    preset = PRESETS[preset_name] if preset_name in list(PRESETS) else {}
    errors = []
    if preset_name is not None and not preset:
        hint = suggestion(preset_name, PRESETS)
        errors.append(("preset", f"there is no model.preset {preset_name!r}; {hint}"))
    if family is not None and family not in list(FAMILIES):
        hint = f"; {did_you_mean(close)}" if (close := nearest(family, FAMILIES)) else ""
        message = f"model.family is {family!r}; it must be one of {', '.join(FAMILIES)}{hint}"
        errors.append(("family", message))
    elif preset and family not in (None, preset["family"]):
        message = (
            f"model.preset {preset_name} is of the family {preset['family']}, but model.family is "
            f"{family}; give one of the two"
        )
        errors.append(("preset family", message))
    raise_errors(errors)

    family = preset.get("family", family or "llama")
    if family != "fast":
        return {**FAMILIES[family], **preset}
    size: Any = section.get("size")
    own_sizes = {"size": size, **sizes_of(size)} if _is_size(size) else {}
    values = {**FAMILIES[family], **own_sizes}
    width = section.get("d_model")
    if type(width) is int and _WIDTH.accepts(width):
        # Another width has heads of about 64 as well.
        fitting = [n for n in range(width // 64, 1, -1) if width % (2 * n) == 0]
        values["n_heads"] = fitting[0] if fitting else 1
    return values


def replaced_fields(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields whose values of earlier layers are dropped, because this `model` section
    names a preset, a size or another family: a recipe's sizes are those of another model."""
    if section.get("preset") is not None:
        yield from model_defaults({"preset": section["preset"]})
    if _is_size(section.get("size")):
        yield from sizes_of(section["size"])
    elif section.get("preset") is not None or section.get("family") not in (None, "fast"):
        yield "size"


def _is_size(value: object) -> bool:
    return type(value) is int and _SIZE.accepts(value)


def n_parameters(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the number of parameters; a tied head is counted once."""
    d, f = config.d_model, config.feed_forward_width
    d_kv = config.kv_heads * config.d_head

    biases_of_block = 0
    if config.has_bias("query_key_value"):
        biases_of_block += d + 2 * d_kv
    if config.has_bias("output"):
        biases_of_block += d
    if config.has_bias("feed_forward"):
        biases_of_block += f + d
        if IS_GATED[config.feed_forward]:
            biases_of_block += f

    norm = 2 * d if config.has_bias("norm") else d
    n_norms = 2 * config.n_layers
    if HAS_FINAL_NORM[config.norm_place]:
        n_norms += 1

    # The matrices include the head's, which is the token embedding's where it is tied.
    embeddings = config.table_rows(vocab_size) * d
    if not config.tied_head:
        embeddings += vocab_size * d
    if config.position == "learned":
        embeddings += config.window_tokens * d

    matrices = n_matmul_parameters(config, vocab_size=vocab_size)
    return matrices + embeddings + config.n_layers * biases_of_block + n_norms * norm


def n_matmul_parameters(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the number of weights that every token is multiplied with.

    These are all matrices, with the head's also where it is tied, and no table of embeddings.
    """
    d, f = config.d_model, config.feed_forward_width
    d_kv = config.kv_heads * config.d_head
    attention = 2 * d * d + 2 * d * d_kv
    feed_forward = (3 if IS_GATED[config.feed_forward] else 2) * d * f
    return config.n_layers * (attention + feed_forward) + vocab_size * d


def training_flops(config: ModelConfig, *, vocab_size: int) -> int:
    """Return the FLOP of a training step for each token, 6 N + 6 L d T.

    N is the number of weights that a token is multiplied with, L d T the cost of attention, of
    which only the causal half is counted: "PaLM" (Chowdhery et al., 2022), appendix B.
    """
    attention = config.n_layers * config.d_model * config.window_tokens
    return 6 * (n_matmul_parameters(config, vocab_size=vocab_size) + attention)
