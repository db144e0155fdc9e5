"""A decoder trained by `pretrain`, for transformers: AutoModelForCausalLM loads it with
trust_remote_code=True.

This file is self-contained: it is shipped with the weights and needs only torch and transformers.
It is written where transformers has no class of its own: for the families `transformer` (Vaswani et
al., 2017, only the decoder) and `fast`, and for models with unusual choices; config.json has them
under "pretrain". There is no dropout and no cache: every new token reads the full text again. A
text that outgrows the context continues from its last half context, as in `pretrain generate`. In
packed rows each text starts where `position_ids` start again: attention, n-grams and recall.

Letters at the end of a tensor's name are its shape: B rows, T time, D model, H heads, E head width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

# The choices that this file computes; another one would be another model.
AXES = {
    "norm": ("layer", "rms"),
    "norm_place": ("before", "after"),
    "position": ("learned", "sinusoidal", "rotary"),
    "feed_forward": ("gelu", "relu", "relu2", "leaky_relu2", "swiglu"),
    "bias": ("none", "all", "feed_forward", "query_key_value"),
    "query_key_norm": (False, True),
    "scaled_embedding": (False, True),
    "embedding_norm": (False, True),
}
SIZES = """
    family preset size n_layers n_heads n_kv_heads d_model d_ff context_length tied_head
    norm_epsilon rope_theta rope_factor rope_original_context rope_low_factor rope_high_factor
    ngram_rows longest_ngram induction dropout attention_dropout initialization
""".split()


class PretrainConfig(PretrainedConfig):
    model_type = "pretrain"

    def __init__(self, pretrain=None, vocab_size=1, **rest):
        self.pretrain = pretrain or {}
        self.vocab_size = vocab_size
        super().__init__(**rest)


def norm(c):
    if c["norm"] == "rms":
        return nn.RMSNorm(c["d_model"], c["norm_epsilon"])
    return nn.LayerNorm(c["d_model"], c["norm_epsilon"], bias=c["bias"] != "none")


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, d, width = c, c["d_model"], c["d_model"] // c["n_heads"]
        n_kv_heads = c["n_kv_heads"] or c["n_heads"]
        has_bias = c["bias"] in ("all", "query_key_value")
        self.query = nn.Linear(d, d, bias=has_bias)
        self.key = nn.Linear(d, n_kv_heads * width, bias=has_bias)
        self.value = nn.Linear(d, n_kv_heads * width, bias=has_bias)
        self.output = nn.Linear(d, d, bias=c["bias"] == "all")

    def forward(self, x_BTD, rotation, mask_B1TT):
        width = self.c["d_model"] // self.c["n_heads"]
        query, key, value = (
            part(x_BTD).unflatten(-1, (-1, width)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if self.c["query_key_norm"]:
            query, key = F.rms_norm(query, (width,)), F.rms_norm(key, (width,))
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mixed_BHTE = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_B1TT, is_causal=mask_B1TT is None
        )
        return self.output(mixed_BHTE.transpose(1, 2).flatten(2))


def rotate(x_BHTE, cos_B1TE, sin_B1TE):
    """Rotary positions (Su et al., 2021); pair i is elements i and i + E/2 of a head."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_B1TE + torch.cat([-second, first], dim=-1) * sin_B1TE


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind, d, f = c["feed_forward"], c["d_model"], c["d_ff"]
        has_bias = c["bias"] in ("all", "feed_forward")
        self.gate = nn.Linear(d, f, bias=has_bias) if self.kind == "swiglu" else None
        self.up = nn.Linear(d, f, bias=has_bias)
        self.down = nn.Linear(f, d, bias=has_bias)

    def forward(self, x):
        up = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * up)
        if self.kind == "gelu":
            return self.down(F.gelu(up, approximate="tanh"))
        if self.kind == "leaky_relu2":
            return self.down(F.leaky_relu(up, 0.5).square())
        return self.down(F.relu(up).square() if self.kind == "relu2" else F.relu(up))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.after = c["norm_place"] == "after"
        self.attention_norm, self.attention = norm(c), Attention(c)
        self.feed_forward_norm, self.feed_forward = norm(c), FeedForward(c)

    def forward(self, x, rotation, mask):
        if self.after:
            x = self.attention_norm(x + self.attention(x, rotation, mask))
            return self.feed_forward_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Ngrams(nn.Module):
    """Embeddings looked up by a hash of the last n ids, and of the id that followed them when they
    last occurred."""

    def __init__(self, c, vocab_size):
        super().__init__()
        rows, d, n_parts = c["ngram_rows"], c["d_model"], c["n_heads"]
        self.rows, self.n_parts, shape = rows, n_parts, (n_parts * rows, d // n_parts)
        lengths = range(2, 1 + (c["longest_ngram"] or 3)) if rows else ()
        recalled = range(1, 1 + c["induction"])
        self.parts = nn.ModuleDict({str(n): nn.Embedding(*shape) for n in lengths})
        self.recalled = nn.ModuleDict({str(n): nn.Embedding(vocab_size + 1, d) for n in recalled})

    def forward(self, ids_BT, starts_BT):
        grams = {n: hashes(ids_BT, starts_BT, int(n)) for n in {**self.parts, **self.recalled}}
        parts = [table(self.rows_of(grams[n])).flatten(2) for n, table in self.parts.items()]
        parts += [t(followers(ids_BT, starts_BT, grams[n])) for n, t in self.recalled.items()]
        return sum(parts[1:], parts[0])

    def rows_of(self, hashes_BT):
        """Row of each part of an embedding; the parts are stacked in one table."""
        parts = torch.arange(self.n_parts, device=hashes_BT.device)
        return mix((hashes_BT >> 8)[..., None] * (2 * parts + 1)) % self.rows + parts * self.rows


FACTORS = (
    *(0x2545F491, 0x5BD1E995, 0x1B873593, 0x27D4EB2F),
    *(0x165667B1, 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35),
)


def hashes(ids_BT, starts_BT, n):
    """A hash of the last n ids; ids before the start of a text count as zero."""
    padded, length, mixed = F.pad(ids_BT + 1, (n - 1, 0)), ids_BT.shape[1], 0
    age_BT = torch.arange(length, device=ids_BT.device) - starts_BT
    for back in range(n):
        ids = padded[:, n - 1 - back : n - 1 - back + length] * (age_BT >= back)
        mixed = mixed ^ (ids * FACTORS[back])
    return mix(mixed)


def mix(numbers):
    numbers = (numbers ^ (numbers >> 15)) * 0x2C1B3C6D & 0x7FFFFFFFFFFFFFFF
    return numbers ^ (numbers >> 17)


def followers(ids_BT, starts_BT, grams):
    """1 + the id that followed the last n ids where they last occurred in the same text; 0 where
    they did not."""
    places = grams.argsort(dim=1, stable=True)
    in_order, starts = grams.gather(1, places), starts_BT.expand_as(grams).gather(1, places)
    same = (in_order[:, 1:] == in_order[:, :-1]) & (starts[:, 1:] == starts[:, :-1])
    following = ids_BT.gather(1, (places[:, :-1] + 1).clamp(max=ids_BT.shape[1] - 1)) + 1
    return torch.zeros_like(ids_BT).scatter_(1, places[:, 1:], torch.where(same, following, 0))


def starts_of_texts(position_ids, attention_mask):
    """For each place of a row the place where its text begins (B, T): positions start again there,
    or padding ends."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is not None:
        begins[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    places_T = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(begins, places_T, 0).cummax(1).values


class Decoder(nn.Module):
    gradient_checkpointing = False  # set by transformers, with _gradient_checkpointing_func

    def __init__(self, c, vocab_size):
        super().__init__()
        for name, value in c.items():
            known = AXES.get(name, (False, None))
            if name not in SIZES and value not in known:
                raise ValueError(
                    f"modeling_pretrain.py cannot compute a model with {name} {value!r}: it must "
                    f"be one of {', '.join(map(str, known))}; a pretrain that trains this model "
                    "needs the choice in src/pretrain/export/modeling_pretrain.py too"
                )
        self.c = c
        self.token_embedding = nn.Embedding(vocab_size, c["d_model"])
        self.position_embedding = None
        if c["position"] == "learned":
            self.position_embedding = nn.Embedding(c["context_length"], c["d_model"])
        self.ngrams = Ngrams(c, vocab_size) if c["ngram_rows"] or c["induction"] else None
        self.blocks = nn.ModuleList([Block(c) for _ in range(c["n_layers"])])
        self.final_norm = norm(c) if c["norm_place"] == "before" else None
        # transformers ties its weight to the embedding's where config.json says so.
        self.head = nn.Linear(c["d_model"], vocab_size, bias=False)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **rest
    ):
        """Hidden states (B, T, D). Padding may be before or after a text, not inside it."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids must be given, not inputs_embeds: n-grams are made of ids")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (B, T) (got {attention_mask.dim()} dims)")
        x_BTD = self.token_embedding(input_ids)
        n = input_ids.shape[1]
        places_T = torch.arange(n, device=input_ids.device)
        positions_BT, starts_BT, mask_B1TT = places_T[None], torch.zeros_like(places_T)[None], None
        if position_ids is None and attention_mask is not None and not attention_mask[:, 0].all():
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is not None:
            positions_BT = position_ids.expand_as(input_ids)
            starts_BT = starts_of_texts(positions_BT, attention_mask)
            is_same_text = starts_BT[:, None, :, None] == starts_BT[:, None, None, :]
            mask_B1TT = is_same_text & (places_T[:, None] >= places_T)
            n = int(positions_BT.max()) + 1
        if self.c["scaled_embedding"]:
            x_BTD = x_BTD * math.sqrt(self.c["d_model"])
        if self.ngrams is not None:
            x_BTD = x_BTD + self.ngrams(input_ids, starts_BT)
        if n > self.c["context_length"]:
            raise ValueError(
                f"a text must have at most {self.c['context_length']} ids, the context length, "
                f"padding included (got {n})"
            )
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_BT)
        if self.c["position"] == "sinusoidal":
            evens = torch.arange(0, self.c["d_model"], 2, device=x_BTD.device).float()
            angles = positions_BT.float()[..., None] / 10_000 ** (evens / self.c["d_model"])
            waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)
            x_BTD = x_BTD + waves.to(x_BTD.dtype)
        if self.c["embedding_norm"]:
            x_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:])
        rotation = None
        if self.c["position"] == "rotary":
            angles = positions_BT.float()[:, None, :, None] * frequencies(self.c, x_BTD.device)
            angles = torch.cat([angles, angles], dim=-1)
            rotation = angles.cos().to(x_BTD.dtype), angles.sin().to(x_BTD.dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x_BTD = self._gradient_checkpointing_func(block, x_BTD, rotation, mask_B1TT)
            else:
                x_BTD = block(x_BTD, rotation, mask_B1TT)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return BaseModelOutput(last_hidden_state=x_BTD)


def frequencies(c, device):
    """Frequencies of the rotary pairs (E/2); a factor scales the low ones as in Llama 3.1."""
    width = c["d_model"] // c["n_heads"]
    plain = 1.0 / c["rope_theta"] ** (torch.arange(0, width, 2, device=device).float() / width)
    if c["rope_factor"] == 1.0:
        return plain
    turns = c["rope_original_context"] * plain / (2 * math.pi)
    low, high = c["rope_low_factor"], c["rope_high_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / c["rope_factor"] + kept * plain


class PretrainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PretrainConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    # transformers 4 takes the keys alone.
    _tied_weights_keys = {"model.head.weight": "model.token_embedding.weight"}  # noqa: RUF012
    _supports_sdpa = supports_gradient_checkpointing = True
    # The loss is the mean over its batch. Because of **rest, Trainer would assume a loss that is
    # divided by the targets of all micro-batches, and not divide by their number itself.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config.pretrain, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """Weights come from the file."""

    def get_input_embeddings(self):
        return self.model.token_embedding

    def set_input_embeddings(self, value):
        self.model.token_embedding = value

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, value):
        self.model.head = value

    def resize_token_embeddings(self, *args, **options):
        """Change the vocabulary size; new rows of the tables of recalled ids are zeros."""
        embedding = super().resize_token_embeddings(*args, **options)
        tables = self.model.ngrams.recalled if self.model.ngrams else {}
        for n, table in tables.items():
            missing = embedding.num_embeddings + 1 - table.num_embeddings
            rows = F.pad(table.weight.detach(), (0, 0, 0, missing))
            tables[n] = nn.Embedding.from_pretrained(rows, freeze=not table.weight.requires_grad)
        return embedding

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **rest):
        n, context = input_ids.shape[1], self.config.pretrain["context_length"]
        half = max(1, context // 2)
        if n > context:
            n = half + (n - context - 1) % (context - half + 1)
        mask = None if attention_mask is None else attention_mask[:, -n:]
        return {"input_ids": input_ids[:, -n:], "attention_mask": mask}

    def forward(self, input_ids=None, attention_mask=None, labels=None, **rest):
        """Logits (B, T, V)."""
        hidden_BTD = self.model(input_ids, attention_mask, **rest).last_hidden_state
        logits_BTV = self.model.head(hidden_BTD)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits_BTV.device)
            loss = F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV)
