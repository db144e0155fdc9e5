"""Hugging Face directories that are damaged, contradictory or unusual."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import Change, in_config, in_weights, same_weights, write_hf
from oracles import config_of, random_decoder
from pretrain.export.families import FORMATS
from pretrain.export.importing import import_model
from pretrain.export.layouts import FormatError, stored_tensors
from pretrain.export.verification import TEXTS
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from texts import LLAMA_OPTIONS, train_sentencepiece

transformers = pytest.importorskip("transformers")


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_file(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def with_index(places: dict[str, object]) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return change


def two_faults(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(400, 31)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}


MODEL_TYPES = ", ".join(formats.model_type for formats in FORMATS.values())
HOSTILE: list[tuple[Change, str]] = [
    (in_config(model_type="bert"), f"{MODEL_TYPES}, pretrain .got 'bert'"),
    (in_config(model_type=["llama"]), r"model_type must be one of .* .got \['llama'\]"),
    (in_config(model_type="gone"), "model_type must be one of .* .got None"),
    (in_config(hidden_act="gelu"), "hidden_act must be 'silu' .got 'gelu'"),
    (in_config(attention_bias=True), "attention_bias must be False .got True"),
    (in_config(hidden_size=10**15), r"model.d_model is 10+; it must be in \[1, 2\^20\]"),
    (in_config(intermediate_size=4 * 10**30), r"model.d_ff is 40+; it must be in \[1, 2\^24\]"),
    (in_config(max_position_embeddings=10**9), "context_length is 1000000000; it must be in"),
    (
        in_config(max_position_embeddings=None),
        "model.context_length is empty; it must be a number",
    ),
    (
        in_config(rope_theta=10**400),
        "model.rope_theta has more than 100 digits; it must be a smaller number",
    ),
    (in_config(hidden_size=64), r"q_proj.weight is \[32, 32\], not \[64, 64\]"),
    (in_config(hidden_size="32"), "model.d_model is '32'; it must be a whole number"),
    (
        in_config(hidden_size="gone"),
        "config.json must have the key 'hidden_size', for model.d_model",
    ),
    (in_config(num_hidden_layers=10**9), r"n_layers is 1000000000; it must be in \[1, 10000\]"),
    (
        in_config(num_hidden_layers=9000),
        "describes 9,000 layers; it must have at least 4 tensors for each .got 21",
    ),
    (in_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight .* is missing"),
    (in_config(num_hidden_layers=True), "model.n_layers is True; it must be a whole number"),
    (in_config(num_attention_heads=5), "must be a multiple of model.n_heads, 5"),
    (in_config(head_dim=16), "head_dim must be 8 .got 16"),
    (in_config(head_dim="8"), "head_dim must be 8 .got '8'"),
    (in_config(head_dim=[1]), r"head_dim must be 8 .got .1"),
    (in_config(head_dim=0), "head_dim must be 8 .got 0"),
    (
        in_config(num_attention_heads=None, head_dim=16),
        "model.n_heads is empty; it must be a whole number",
    ),
    (
        in_config(rope_scaling={"rope_type": "yarn"}),
        "must be of type .* .got 'yarn'",
    ),
    (in_config(rope_scaling=7), "rope_scaling must be an object or null .got 7"),
    (
        in_config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "llama3"}),
        "rope_type must have one value .got 'default' and 'llama3'",
    ),
    (
        in_config(rope_parameters={"rope_theta": 7.0}),
        "one value .got 7.0 and 10000.0",
    ),
    (
        in_config(rope_scaling={"rope_type": "default", "type": "linear"}),
        "rope_type must have one value .got 'default' and 'linear'",
    ),
    (
        in_config(rope_scaling=SCALED, original_max_position_embeddings=16),
        "embeddings must have one value .got 12 and 16",
    ),
    (in_config(rope_scaling={**SCALED, "mscale": 2.0}), "mscale must be absent .* .got 2.0"),
    (in_config(rope_scaling={"factor": 8.0}), "factor must be absent .* type default .got 8.0"),
    (
        in_config(rope_parameters={"partial_rotary_factor": 0.5}),
        "rotary_factor must be absent .* .got 0.5",
    ),
    (in_config(partial_rotary_factor=0.5), "rotary_factor must be absent .* .got 0.5"),
    (
        in_config(rope_scaling={"attention_factor": 2.0}),
        "attention_factor must be absent",
    ),
    (
        in_config(rope_scaling={"rope_type": "llama3"}),
        "model.rope_factor is empty; it must be a number",
    ),
    (in_config(rms_norm_eps=float("nan")), "norm_epsilon is nan"),
    (in_config(vocab_size=-1), "vocab_size must be a whole number from 1 to .* .got -1"),
    (in_config(vocab_size=10**19), "vocab_size must be a whole number from 1 to .* .got 10000"),
    (in_config(vocab_size=300), "embed_tokens.weight is .400, 32., not .300, 32."),
    (in_weights(lambda t: t.update(lm_head=torch.zeros(3))), "lm_head .3. is not part of"),
    (in_weights(lambda t: t.update({"my.lm_head.weight": torch.zeros(3)})), "is not part of"),
    (in_weights(two_faults), r"\[400, 31\], not .*norm.weight \[32\] is missing.* is not part of"),
    (
        in_weights(lambda t: t.update({"lm_head.weight": torch.zeros(400, 32, dtype=torch.int8)})),
        "type of lm_head.weight must be one of F64, F32, F16, BF16 .got I8",
    ),
    (cut, "must be a complete safetensors file"),
    (as_pickle, "pytorch_model.bin, a pickle, which can run any code"),
    (
        with_index({"a": "../weights.safetensors"}),
        "must be in its folder .got '../weights.safetensors'",
    ),
    (with_index({"a": 1}), "index.json must have a weight_map of texts"),
    (with_index({"a": "missing.safetensors"}), "must be in its folder .got 'missing.safetensors'"),
    (with_file("config.json", "[1]"), "config.json is damaged: it is not a JSON object"),
    (with_file("config.json", "{"), "config.json is damaged: it is not JSON: Expecting"),
    (
        lambda f: (f / "model.safetensors").unlink(),
        "must have a file model.safetensors or model.safetensors.index.json",
    ),
    (with_file("tokenizer.json", "{}"), "the tokenizer cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[m for _, m in HOSTILE])
def test_malformed_folder_is_rejected(
    change: Change, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    change(folder)
    with pytest.raises(FormatError, match=message):
        import_model(folder)


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": "gone", "rope_parameters": {**SCALED, "rope_theta": 7.0}},
        {"rope_theta": 7.0, "rope_scaling": SCALED, "rope_parameters": SCALED},
        {"rope_theta": 7, "rope_parameters": {**SCALED, "partial_rotary_factor": 1.0}},
    ],
)
def test_duplicate_settings_that_agree_are_accepted(
    places: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    in_config(**places)(folder)
    found = import_model(folder).config
    assert (found.rope_theta, found.rope_factor, found.rope_original_context) == (7.0, 4.0, 12)


def test_of_a_duplicate_key_the_last_value_counts_as_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"hidden_act": "gelu", ', 1))
    assert same_weights(import_model(folder).build(), decoder)


@pytest.mark.parametrize("family", FORMATS)
def test_a_tied_head_must_equal_the_embedding(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of(family, tied_head=True), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)

    modules = FORMATS[family].layout.modules
    embedding = next(name for name, module in modules.items() if module == "token_embedding")

    def head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[f"{embedding}.weight"].clone()

    in_weights(head)(folder)
    assert same_weights(import_model(folder).build(), decoder)
    in_weights(lambda t: t["lm_head.weight"][7, 7].add_(1e-3))(folder)
    with pytest.raises(FormatError, match=r"head lm_head.weight must be equal to"):
        import_model(folder).build()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(
    number: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    in_weights(lambda t: t["h.1.mlp.c_fc.weight"][3].fill_(number))(folder)
    with pytest.raises(FormatError, match=r"all numbers in .*h.1.mlp.c_fc.weight must be finite"):
        import_model(folder).build()


def test_dropout_of_attention_is_converted_and_others_are_rejected(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("gpt2", dropout=0.25, attention_dropout=False)
    folder = write_hf(tmp_path / "out", random_decoder(config, vocab_size=400), tokenizer)
    assert json.loads((folder / "config.json").read_text())["attn_pdrop"] == 0.0
    found = import_model(folder).config
    assert (found.dropout, found.attention_dropout) == (0.25, False)
    in_config(embd_pdrop=0.5)(folder)
    with pytest.raises(FormatError, match=r"attn_pdrop must be equal, .* .got 0.25, 0.5 and 0.0"):
        import_model(folder)


@pytest.mark.parametrize("case", ["same", "without the model", "other vocabulary", "other fault"])
def test_metaspace_is_read_and_the_sentencepiece_file_next_to_it_is_not(
    case: str, tmp_path: Path
) -> None:
    """As in transformers 5.23, tokenizer.json counts where there is one."""
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    if case != "without the model":
        shutil.copy(tmp_path / "tokenizer.model", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    content |= {"normalizer": None, "pre_tokenizer": {**metaspace, "split": False}}
    if case == "other vocabulary":
        vocabulary = content["model"]["vocab"]
        one, other = list(vocabulary)[400:402]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    if case == "other fault":
        content |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if case == "other fault":
        with pytest.raises(FormatError, match=r"the tokenizer cannot be used"):
            import_model(folder)
        return
    found = import_model(folder).tokenizer
    assert (found.sha256 == tokenizer.sha256) == (case != "other vocabulary")
    if case == "other vocabulary":
        assert [found.id_to_token(id_) for id_ in (vocabulary[one], vocabulary[other])] == [
            one,
            other,
        ]


def test_metaspace_that_splits_names_the_sentencepiece_file_as_the_way(tmp_path: Path) -> None:
    """As transformers 4 wrote it, without `split`: runs of spaces would get other ids."""
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    content |= {"normalizer": None, "pre_tokenizer": metaspace}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        FormatError, match=r"remove tokenizer\.json to use tokenizer\.model instead"
    ):
        import_model(folder)
    (folder / "tokenizer.json").unlink()
    assert import_model(folder).tokenizer.sha256 == tokenizer.sha256


def test_notes_next_to_a_model_may_be_large_or_damaged(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """tokenizer_config.json of Llama 3 with all its added tokens is beyond 1 MiB."""
    folder = write_hf(
        tmp_path / "out", random_decoder(config_of("llama"), vocab_size=400), tokenizer
    )
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"chat_template": "a template", "added_tokens_decoder": {"1": "x" * (1 << 20)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    for other in ("[]", "{"):
        (folder / "special_tokens_map.json").write_text(other)
        assert import_model(folder).tokenizer.carried == {"chat_template": "a template"}
    (folder / "tokenizer_config.json").write_text("[]")
    assert import_model(folder).tokenizer.carried == {}


def test_quotes_in_messages_are_short(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    config = (folder / "config.json").read_text()
    long = "x" * 10**6
    for change in (
        in_config(model_type=long),
        in_config(hidden_act=long),
        in_config(rope_scaling={"rope_type": long}),
        in_config(hidden_size=long),
        in_weights(lambda t: t.update({long: torch.zeros(1)})),
    ):
        change(folder)
        with pytest.raises(FormatError) as caught:
            import_model(folder)
        assert len(str(caught.value)) < 1000
        (folder / "config.json").write_text(config)


def test_rows_without_a_token_get_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Many models have more rows than their vocabulary; those rows have probabilities too."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=416)
    folder = write_hf(tmp_path / "out", decoder, tokenizer.padded(416))
    tokenizer.save(folder)
    back = import_model(folder)
    assert same_weights(back.build(), decoder)
    assert back.tokenizer.vocab_size == 416
    assert back.tokenizer.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    assert back.tokenizer.decode([415]) == ""
    in_config(vocab_size=400)(folder)
    with pytest.raises(FormatError, match=r"wte.weight is .416, 32., not .400, 32."):
        import_model(folder)


def test_both_spellings_of_the_names_of_gpt2_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As OpenAI published them, with the table of the causal mask, and as transformers saves them,
    with `transformer.`."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    assert "wte.weight" in tensors
    for start in ("", "transformer."):
        spelled = {start + name: values for name, values in tensors.items()}
        spelled[f"{start}h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        save_file(spelled, folder / "model.safetensors")
        assert same_weights(import_model(folder).build(), decoder)


def test_duplicate_settings_of_exported_code_must_agree(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("fast", ngram_rows=97), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    for section, message in {
        None: r"config.json must have a section 'pretrain' .got None.; export the model again",
        "new_axis": r"fields of the model must be those of this version .* .got new_axis",
    }.items():
        other = write_hf(tmp_path / f"{section}", decoder, tokenizer)
        in_config(pretrain=section and {section: 1})(other)
        with pytest.raises(FormatError, match=message):
            import_model(other)
    in_config(hidden_size=64, tie_word_embeddings=True)(folder)
    with pytest.raises(
        FormatError,
        match=r"hidden_size must be 32 .got 64.; tie_word_embeddings must be False .got True",
    ):
        import_model(folder)


def test_a_tensor_in_two_files_is_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    with_index({"a": "weights.safetensors", "b": "b.safetensors"})(folder)
    with pytest.raises(FormatError, match=r"each tensor must be in one file of .* .got .* in wei"):
        import_model(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=390)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    in_config(vocab_size=390)(folder)
    with pytest.raises(FormatError, match=r"at least the 400 tokens of its tokenizer .got 390"):
        import_model(folder)


def test_parameters_that_a_format_does_not_have_are_named() -> None:
    config = config_of("gpt2", feed_forward="swiglu", n_layers=1)
    with pytest.raises(FormatError, match=r"no tensor for blocks.0.feed_forward.gate.bias, .*gate"):
        stored_tensors(config, FORMATS["gpt2"].layout, vocab_size=400)
