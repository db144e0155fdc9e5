"""Directories of transformers, written and read: the same logits, ids and text in their classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles import CASES, config_of, random_decoder
from pretrain.corpus import read_documents
from pretrain.export import FormatError, import_model, write_hugging_face
from pretrain.export.architectures import KEYS, from_hf_config, is_native, to_hf_config
from pretrain.export.layouts import deinterleave, interleave
from pretrain.export.verification import TEXTS
from pretrain.generate import Sampling, generate, generate_ids
from pretrain.model import Decoder, ModelConfig
from pretrain.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from texts import LLAMA_OPTIONS, train_sentencepiece

transformers = pytest.importorskip("transformers")

# Our own family, and choices that no class of transformers has together.
OWN_CASES: dict[str, dict[str, Any]] = {
    "fast": {"family": "fast", "ngram_rows": 97},
    "qwen 2": {"family": "llama", "bias": "query_key_value", "tied_head": True},
    "odd": {
        "family": "fast",
        "ngram_rows": 0,
        "position": "learned",
        "feed_forward": "gelu",
        "norm": "layer",
        "bias": "all",
        "n_kv_heads": 1,
    },
    "odder": {
        "family": "transformer",
        "position": "rotary",
        "rope_factor": 3.0,
        "rope_original_context": 40,
        "feed_forward": "swiglu",
        "d_ff": 37,
    },
}
ALL_CASES = {**CASES, **OWN_CASES}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    return train_tokenizer(texts, vocab_size=400)


def written(folder: Path, decoder: Decoder, tokenizer: Tokenizer, **options: Any) -> Path:
    own = {name: p.detach() for name, p in decoder.named_parameters()}
    folder.mkdir()
    write_hugging_face(
        folder, config=decoder.config, tokenizer=tokenizer, read=own.__getitem__, **options
    )
    return folder


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


@pytest.fixture(params=ALL_CASES)
def decoder(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    config = config_of(**{**ALL_CASES[request.param], "context_length": 128})
    return random_decoder(config, vocab_size=tokenizer.vocab_size)


def test_their_class_gives_our_logits_and_text(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "out", decoder, tokenizer)
    model = theirs(folder)
    assert type(model).__name__ == to_hf_config(decoder.config)["architectures"][0]
    ids = torch.randint(0, 400, (2, 128), generator=torch.Generator().manual_seed(0))
    expected = decoder.logits(decoder(ids)).detach()
    assert float((model(input_ids=ids).logits - expected).abs().max().detach()) < 1e-4
    prompt = tokenizer.encode("The people of the").tolist()
    text = model.generate(
        torch.tensor([prompt]), max_new_tokens=100, min_new_tokens=100, do_sample=False,
        pad_token_id=0, eos_token_id=401,
    )  # fmt: skip
    found = generate_ids(decoder, prompt, max_tokens=100, sampling=Sampling(temperature=0.0))
    assert text[0, len(prompt) :].tolist() == found[0]
    loss = model(input_ids=ids, labels=ids).loss
    nats = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(nats), rel=1e-5)


def test_it_is_read_back_bit_for_bit(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "out", decoder, tokenizer, largest_file_bytes=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    back = import_model(folder)
    assert same(back.build(), decoder)
    assert back.tokenizer.sha256 == tokenizer.sha256
    assert back.config.family == decoder.config.family
    whole = written(tmp_path / "whole", decoder, tokenizer)
    ids = torch.arange(100).view(2, 50)
    assert torch.equal(theirs(folder)(ids).logits, theirs(whole)(ids).logits)


def test_what_their_class_saves_is_read(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As a model of somebody who used transformers: its spelling of config.json, its file names."""
    folder = written(tmp_path / "out", decoder, tokenizer)
    again = tmp_path / "again"
    theirs(folder).save_pretrained(again, max_shard_size="40KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    back = import_model(again)
    assert same(back.build(), decoder)
    assert back.tokenizer.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["fast", "transformer"])
def test_padded_rows_do_not_change_their_logits(
    case: str, side: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of(**ALL_CASES[case]), vocab_size=400)
    model = theirs(written(tmp_path / "out", decoder, tokenizer))
    texts = [torch.arange(3, 15), torch.arange(40, 47)]
    ids, mask = torch.full((2, 12), 9), torch.zeros(2, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(12 - len(text), 12) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, text in enumerate(texts):
        expected = decoder.logits(decoder(text[None]))[0]
        torch.testing.assert_close(logits[row][mask[row] == 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("numbers", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_numbers_are_rounded_once(
    numbers: str, dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer, numbers=numbers)
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(p.to(dtype))
    assert same(import_model(folder).build(), decoder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] in str(dtype)
    ids = torch.arange(20)[None]
    difference = theirs(folder)(ids).logits - decoder.logits(decoder(ids))
    assert float(difference.abs().max().detach()) < 1e-4


def test_rounded_numbers_are_given_file_by_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """So that they can be put in place, and no second copy of the weights is held."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    (tmp_path / "out").mkdir()
    own = {name: p.detach() for name, p in decoder.named_parameters()}
    seen: list[tuple[str, int]] = []

    def rounded(name: str, values: torch.Tensor) -> None:
        seen.append((name, len(list((tmp_path / "out").glob("model-*.safetensors")))))
        own[name].copy_(values)

    write_hugging_face(
        tmp_path / "out", config=decoder.config, tokenizer=tokenizer, read=own.__getitem__,
        numbers="bf16", rounded=rounded, largest_file_bytes=20_000,
    )  # fmt: skip
    assert {name for name, _ in seen} == set(own)
    assert {n for _, n in seen} == set(range(1, seen[-1][1] + 1))
    assert seen[-1][1] > 1
    assert same(import_model(tmp_path / "out").build(), decoder)


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama3": {"split": "llama3"},
    "smollm": {"split": "smollm"},
    "gpt": {"name": "gpt"},
    "characters": {"name": "characters", "vocab_size": None},
    "bytes": {"name": "bytes", "vocab_size": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_their_tokenizer_gives_our_ids(kind: str, tmp_path: Path) -> None:
    texts = [d.text[:5000] for d in list(read_documents("bundled"))[:20]]
    ours = train_tokenizer(texts, **{"vocab_size": 400, **KINDS[kind]})
    decoder = random_decoder(config_of("llama"), vocab_size=ours.vocab_size)
    folder = written(tmp_path / "out", decoder, ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.end_of_text
    for text in (texts[0], *(TEXTS if kind != "characters" else ())):
        ids = ours.encode(text).tolist()
        assert tokenizer(text)["input_ids"] == ours.encode_prompt(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        if kind not in ("gpt", "characters"):
            assert tokenizer.decode(ids) == text
    # Ours is text unless it is asked for; theirs can be told so.
    if kind == "gpt2":
        asked = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
        assert asked("<|endoftext|>")["input_ids"] == [ours.end_of_text] * 2


def test_a_start_of_its_own_stands_before_their_texts_and_is_dropped_here(tmp_path: Path) -> None:
    """Llama's; a tokenizer.json that says so is no other tokenizer."""
    ours = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    decoder = random_decoder(config_of("llama"), vocab_size=ours.vocab_size)
    folder = written(tmp_path / "out", decoder, ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode_prompt(text)
        assert tokenizer(text)["input_ids"][0] == ours.start_of_text != ours.end_of_text
    pair = tokenizer("a", "b")["input_ids"]
    assert pair == [*ours.encode_prompt("a"), *ours.encode_prompt("b")]
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["post_processor"]["type"] == "TemplateProcessing"
    again = load_tokenizer(folder)
    assert again.sha256 == ours.sha256
    assert again.encode("<s> [INST]").tolist() == ours.encode("<s> [INST]").tolist()
    # As in the files of Llama 3: what says where ids come from is kept, the rest is not.
    offsets = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    both = {"type": "Sequence", "processors": [offsets, content["post_processor"]]}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": both}))
    assert load_tokenizer(folder).description["post_processor"] == offsets


def test_their_pipeline_continues_a_prompt_as_we_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = random_decoder(config_of("fast", ngram_rows=97, context_length=64), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    continuing = transformers.pipeline(
        "text-generation", model=theirs(folder), tokenizer=str(folder), device="cpu"
    )
    found = continuing("The people", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    greedy = Sampling(temperature=0.0)
    text = generate(decoder, tokenizer, "The people", max_tokens=20, sampling=greedy)[0]
    assert found == "The people" + text


@pytest.mark.parametrize("context", [1, 7, 24])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_own_code_outgrows_its_context_as_we_do(
    position: str, context: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("fast", ngram_rows=97, context_length=context, position=position)
    decoder = random_decoder(config, vocab_size=400)
    model = theirs(written(tmp_path / "out", decoder, tokenizer))
    prompt = [5, 6, 7, 8][: max(1, context - 1)]
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    found = model.generate(
        torch.tensor([prompt]), attention_mask=mask, max_new_tokens=60, min_new_tokens=60,
        do_sample=False, pad_token_id=0, eos_token_id=401,
    )  # fmt: skip
    ours = generate_ids(decoder, prompt, max_tokens=60, sampling=Sampling(temperature=0.0))
    assert found[0, len(prompt) :].tolist() == ours[0]
    with pytest.raises(ValueError, match=f"a text of {context + 1} ids.* a context of {context}"):
        model(torch.zeros(1, context + 1, dtype=torch.int64))


@pytest.mark.parametrize("tied", [True, False])
def test_own_code_gives_its_head_and_takes_more_entries(
    tied: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("fast", ngram_rows=0, tied_head=tied)
    model = theirs(written(tmp_path / "out", random_decoder(config, vocab_size=400), tokenizer))
    assert model.get_output_embeddings() is model.model.head
    assert (model.model.head is None) == tied
    ids = torch.arange(20)[None]
    before = model(ids).logits
    model.resize_token_embeddings(408, mean_resizing=False)
    after = model(ids).logits
    assert after.shape == (1, 20, 408)
    torch.testing.assert_close(after[..., :400], before, rtol=0, atol=1e-6)


def test_trainer_divides_by_its_micro_batches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It leaves that to a model of which it believes that it divides by all targets."""
    pytest.importorskip("accelerate")
    decoder = random_decoder(config_of("fast", ngram_rows=97), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    rows = torch.randint(0, 400, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for n in (1, 2):
        options = transformers.TrainingArguments(
            str(tmp_path / "trainer"), max_steps=1, gradient_accumulation_steps=n, report_to=[],
            per_device_train_batch_size=4 // n, max_grad_norm=1e9, learning_rate=0.0,
            logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model=theirs(folder), args=options, train_dataset=data)
        trainer.train()
        found.append(next(h for h in trainer.state.log_history if "grad_norm" in h))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert float(found[0]["grad_norm"]) == pytest.approx(float(found[1]["grad_norm"]), rel=1e-3)


def test_a_description_goes_both_ways() -> None:
    for case in ALL_CASES.values():
        config = config_of(**case)
        again = from_hf_config(to_hf_config(config))
        for name in ModelConfig.__dataclass_fields__:
            if name in ("initialization", "attention_dropout") and is_native(config):
                continue  # matters in training only, and transformers has no key for it
            found, expected = getattr(again, name), getattr(config, name)
            if name == "d_ff":
                found, expected = again.feed_forward_width, config.feed_forward_width
            if name == "n_kv_heads":
                found, expected = again.kv_heads, config.kv_heads
            assert found == expected, name


def test_a_changed_choice_is_no_native_model() -> None:
    """A Llama with another choice would load in their class, and give other logits."""
    assert all(is_native(config_of(**case)) for case in CASES.values() if case["family"] in KEYS)
    for family in KEYS:
        for change in (
            {"query_key_norm": True},
            {"embedding_norm": True},
            {"feed_forward": "relu2"},
            {"bias": "feed_forward"},
            {"norm_place": "after" if family != "gpt" else "before"},
            {"scaled_embedding": True},
        ):
            assert not is_native(config_of(family, **change))
    assert not is_native(config_of("gpt2", n_kv_heads=2))
    assert not is_native(config_of("gpt", d_ff=40))
    assert not is_native(config_of("gpt2", tied_head=False))


def test_interleaving_is_undone() -> None:
    x = torch.arange(48.0).view(16, 3)
    assert torch.equal(deinterleave(interleave(x, 2), 2), x)
    # Of a head of 8 rows, the pair (0, 4) becomes rows 0 and 1.
    assert interleave(x, 2)[:4, 0].tolist() == [0, 12, 3, 15]


# --- files that are not what they say
# ------------------------------------------------------------------------------

Change = Callable[[Path], None]


def in_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content |= changes
        content = {key: value for key, value in content.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def in_weights(change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_file(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def with_index(places: dict[str, str]) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return change


def two_faults(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(400, 31)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


STRETCHED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
HOSTILE: list[tuple[Change, str]] = [
    (in_config(model_type="bert"), "model_type 'bert' is not one of openai-gpt, gpt2, llama"),
    (in_config(model_type="gone"), "model_type None is not one of"),
    (in_config(hidden_act="gelu"), "hidden_act is 'gelu', not 'silu'"),
    (in_config(attention_bias=True), "attention_bias is True, not False"),
    (in_config(hidden_size=10**15), "d_model is 1000000000000000; legal: below 2,147,483,648"),
    (in_config(intermediate_size=4 * 10**30), "d_ff is 4000000.*; legal: below"),
    (in_config(max_position_embeddings=10**9), "context_length is 1000000000; it must be in"),
    (in_config(max_position_embeddings=None), "context_length is None; legal: a whole number"),
    (in_config(rope_theta=10**400), "rope_theta is 1000000.*; legal: below"),
    (in_config(hidden_size=64), r"q_proj.weight is \[32, 32\], not \[64, 64\]"),
    (in_config(hidden_size="32"), "d_model is '32'"),
    (in_config(hidden_size="gone"), "has no 'hidden_size'"),
    (in_config(num_hidden_layers=10**9), r"n_layers is 1000000000; it must be in \[1, 10000\]"),
    (in_config(num_hidden_layers=9000), "9,000 layers in 21 tensors"),
    (in_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight .* is missing"),
    (in_config(num_hidden_layers=True), "n_layers is True"),
    (in_config(num_attention_heads=5), "not a multiple of model.n_heads 5"),
    (in_config(head_dim=16), "head_dim 16 times 4 heads"),
    (in_config(head_dim="8"), "head_dim '8' times 4 heads"),
    (in_config(head_dim=[1]), r"head_dim \[1\] times 4 heads"),
    (in_config(head_dim=0), "head_dim 0 times 4 heads"),
    (in_config(num_attention_heads=None, head_dim=16), "n_heads is None; legal: int"),
    (in_config(rope_scaling={"rope_type": "yarn"}), "of the kind 'yarn'"),
    (in_config(rope_scaling=7), "rope_scaling is 7"),
    (
        in_config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "llama3"}),
        "rope_type is given as 'default' and as 'llama3'; legal: one value",
    ),
    (in_config(rope_parameters={"rope_theta": 7.0}), "rope_theta is given as 7.0 and as 10000.0"),
    (
        in_config(rope_scaling={"rope_type": "default", "type": "linear"}),
        "rope_type is given as 'default' and as 'linear'",
    ),
    (
        in_config(rope_scaling=STRETCHED, original_max_position_embeddings=16),
        "original_max_position_embeddings is given as 12 and as 16",
    ),
    (in_config(rope_scaling={**STRETCHED, "mscale": 2.0}), "mscale is 2.0; legal"),
    (in_config(rope_scaling={"factor": 8.0}), "factor is 8.0; legal .* default: none"),
    (in_config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    (in_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (in_config(rope_scaling={"attention_factor": 2.0}), "attention_factor is 2.0"),
    (in_config(rope_scaling={"rope_type": "llama3"}), "rope_factor is None"),
    (in_config(rms_norm_eps=float("nan")), "norm_epsilon is nan"),
    (in_config(vocab_size=-1), "vocab_size is -1"),
    (in_config(vocab_size=10**19), "vocab_size is 10000.*; legal: a whole number from 1 to"),
    (in_config(vocab_size=300), "embed_tokens.weight is .400, 32., not .300, 32."),
    (in_weights(lambda t: t.update(lm_head=torch.zeros(3))), "lm_head .3. has no place"),
    (in_weights(lambda t: t.update({"my.lm_head.weight": torch.zeros(3)})), "has no place"),
    (in_weights(two_faults), r"\[400, 31\], not .*norm.weight \[32\] is missing.* has no place"),
    (
        in_weights(lambda t: t.update({"lm_head.weight": torch.zeros(400, 32, dtype=torch.int8)})),
        "lm_head.weight holds I8; legal: F64, F32, F16, BF16",
    ),
    (cut, "is no whole safetensors file"),
    (as_pickle, "pytorch_model.bin, a pickle, which may run anything"),
    (with_index({"a": "../weights.safetensors"}), "names '../weights.safetensors', which is no"),
    (with_index({"a": "missing.safetensors"}), "which is no file beside it"),
    (with_file("config.json", "[1]"), "is not a JSON object"),
    (with_file("config.json", "{"), "cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    (with_file("tokenizer.json", "{}"), "the tokenizer cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[m for _, m in HOSTILE])
def test_a_folder_that_is_not_what_it_says_is_refused(
    change: Change, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    change(folder)
    with pytest.raises(FormatError, match=message):
        import_model(folder)


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": "gone", "rope_parameters": {**STRETCHED, "rope_theta": 7.0}},
        {"rope_theta": 7.0, "rope_scaling": STRETCHED, "rope_parameters": STRETCHED},
        {"rope_theta": 7, "rope_parameters": {**STRETCHED, "partial_rotary_factor": 1.0}},
    ],
)
def test_settings_that_stand_twice_and_agree_are_read(
    places: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    in_config(**places)(folder)
    found = import_model(folder).config
    assert (found.rope_theta, found.rope_factor, found.rope_original_context) == (7.0, 4.0, 12)


EMBEDDINGS = {
    "gpt": "transformer.tokens_embed.weight",
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_tied_head_may_be_a_copy_and_nothing_else(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of(family, tied_head=True), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)

    def head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDINGS[family]].clone()

    in_weights(head)(folder)
    assert same(import_model(folder).build(), decoder)
    in_weights(lambda t: t["lm_head.weight"][7, 7].add_(1e-3))(folder)
    with pytest.raises(FormatError, match=r"head lm_head.weight is not its token embedding"):
        import_model(folder).build()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    number: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    in_weights(lambda t: t["transformer.h.1.mlp.c_fc.weight"][3].fill_(number))(folder)
    with pytest.raises(FormatError, match=r"h.1.mlp.c_fc.weight holds numbers that are not finite"):
        import_model(folder).build()


def test_dropout_of_attention_goes_both_ways_and_others_are_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("gpt2", dropout=0.25, attention_dropout=False)
    folder = written(tmp_path / "out", random_decoder(config, vocab_size=400), tokenizer)
    assert json.loads((folder / "config.json").read_text())["attn_pdrop"] == 0.0
    found = import_model(folder).config
    assert (found.dropout, found.attention_dropout) == (0.25, False)
    in_config(embd_pdrop=0.5)(folder)
    with pytest.raises(FormatError, match=r"embd_pdrop 0.5 and attn_pdrop 0.0; legal: one value"):
        import_model(folder)


@pytest.mark.parametrize("case", ["same", "other vocabulary", "other fault"])
def test_sentencepieces_file_stands_in_for_metaspace_only(case: str, tmp_path: Path) -> None:
    """A tokenizer.json that is refused for another reason is not passed over."""
    ours = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    decoder = random_decoder(config_of("llama"), vocab_size=ours.vocab_size)
    folder = written(tmp_path / "out", decoder, ours)
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
    if case == "same":
        assert import_model(folder).tokenizer.sha256 == ours.sha256
        return
    with pytest.raises(FormatError, match=r"the tokenizer cannot be used"):
        import_model(folder)


def test_what_a_file_says_is_quoted_to_a_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
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


def test_rows_without_an_entry_get_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Many models have more rows than their vocabulary, and those have probabilities too."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=416)
    folder = written(tmp_path / "out", decoder, tokenizer.padded(416))
    tokenizer.save(folder)
    back = import_model(folder)
    assert same(back.build(), decoder)
    assert back.tokenizer.vocab_size == 416
    assert back.tokenizer.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    assert back.tokenizer.decode([415]) == ""
    in_config(vocab_size=400)(folder)
    with pytest.raises(FormatError, match=r"wte.weight is .416, 32., not .400, 32."):
        import_model(folder)


def test_the_names_that_gpt2_was_published_under_are_read(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Without `transformer.`, with the table of the causal mask in the file."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    folder = written(tmp_path / "out", decoder, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(bare, folder / "model.safetensors")
    assert same(import_model(folder).build(), decoder)
