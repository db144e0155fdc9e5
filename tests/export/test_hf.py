"""Hugging Face directories, written and read: the same logits, ids and text in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from safetensors.torch import load_file

from exports import load_hf, same_weights, write_hf
from oracles import CASES, config_of, random_decoder
from pretrain.corpus.reading import read_documents
from pretrain.export.families import FORMATS, is_native
from pretrain.export.hf import from_hf_config, to_hf_config
from pretrain.export.importing import import_model
from pretrain.export.layouts import deinterleave, interleave
from pretrain.export.verification import TEXTS
from pretrain.generate.sampling import Sampling, generate, generate_ids
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer
from pretrain.validation import type_hints
from texts import LLAMA_OPTIONS, train_sentencepiece

transformers = pytest.importorskip("transformers")


# Our own family, and combinations of choices that no class of transformers has.
CUSTOM_CASES: dict[str, dict[str, Any]] = {
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


ALL_CASES = {**CASES, **CUSTOM_CASES}


@pytest.fixture(params=ALL_CASES)
def decoder(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    config = config_of(**{**ALL_CASES[request.param], "context_length": 128})
    return random_decoder(config, vocab_size=tokenizer.vocab_size)


def test_transformers_computes_the_same_logits_and_text(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    model = load_hf(folder)
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


def test_export_and_import_keep_every_bit(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_hf(tmp_path / "out", decoder, tokenizer, largest_file_bytes=30_000)
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    for file in files:  # as transformers 5.23: larger only if it is one tensor
        sizes = [p.nbytes for p in load_file(file).values()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1
    imported = import_model(folder)
    assert same_weights(imported.build(), decoder)
    assert imported.tokenizer.sha256 == tokenizer.sha256
    assert imported.config.family == decoder.config.family
    whole = write_hf(tmp_path / "whole", decoder, tokenizer)
    ids = torch.arange(100).view(2, 50)
    assert torch.equal(load_hf(folder)(ids).logits, load_hf(whole)(ids).logits)


def test_models_saved_by_transformers_are_imported(
    decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As a model that was trained with transformers: its keys of config.json, its file names."""
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    again = tmp_path / "again"
    load_hf(folder).save_pretrained(again, max_shard_size="40KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    imported = import_model(again)
    assert same_weights(imported.build(), decoder)
    assert imported.tokenizer.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["fast", "transformer"])
def test_padding_does_not_change_logits(
    case: str, side: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of(**ALL_CASES[case]), vocab_size=400)
    model = load_hf(write_hf(tmp_path / "out", decoder, tokenizer))
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
    """In the files and in the decoder that was written."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    expected = {name: p.detach().to(dtype).float() for name, p in decoder.named_parameters()}
    options = {"numbers": numbers, "largest_file_bytes": 20_000}
    folder = write_hf(tmp_path / "out", decoder, tokenizer, **options)
    assert all(torch.equal(p, expected[name]) for name, p in decoder.named_parameters())
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same_weights(import_model(folder).build(), decoder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] in str(dtype)
    ids = torch.arange(20)[None]
    difference = load_hf(folder)(ids).logits - decoder.logits(decoder(ids))
    assert float(difference.abs().max().detach()) < 1e-4


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama3": {"split": "llama3"},
    "smollm": {"split": "smollm"},
    "gpt": {"name": "gpt"},
    "characters": {"name": "characters", "vocab_size": None},
    "bytes": {"name": "bytes", "vocab_size": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_the_same_token_ids(kind: str, tmp_path: Path) -> None:
    texts = [d.text[:5000] for d in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, **{"vocab_size": 400, **KINDS[kind]})
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert reference.bos_token_id == reference.eos_token_id == tokenizer.end_of_text
    for text in (texts[0], *(TEXTS if kind != "characters" else ())):
        ids = tokenizer.encode(text).tolist()
        assert reference(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert reference(text, add_special_tokens=False)["input_ids"] == ids
        if kind not in ("gpt", "characters"):
            assert reference.decode(ids) == text
    # The name of a special token in a text is text; the reference has an option for that.
    if kind == "gpt2":
        special = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
        assert special("<|endoftext|>")["input_ids"] == [tokenizer.end_of_text] * 2


def test_a_start_token_is_added_by_transformers_and_ignored_on_import(tmp_path: Path) -> None:
    """As in Llama; a tokenizer.json with that template has the same hash."""
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model", **LLAMA_OPTIONS))
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in TEXTS:
        assert reference(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert reference(text)["input_ids"][0] == tokenizer.start_of_text != tokenizer.end_of_text
    pair = reference("a", "b")["input_ids"]
    assert pair == [*tokenizer.encode_prompt("a"), *tokenizer.encode_prompt("b")]
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["post_processor"]["type"] == "TemplateProcessing"
    again = load_tokenizer(folder)
    assert again.sha256 == tokenizer.sha256
    assert again.encode("<s> [INST]").tolist() == tokenizer.encode("<s> [INST]").tolist()
    # As in the files of Llama 3: the processor of offsets is kept, the template is not.
    offsets = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    both = {"type": "Sequence", "processors": [offsets, content["post_processor"]]}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": both}))
    assert load_tokenizer(folder).description["post_processor"] == offsets


def test_the_pipeline_of_transformers_generates_the_same_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("fast", ngram_rows=97, context_length=64), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    pipeline = transformers.pipeline(
        "text-generation", model=load_hf(folder), tokenizer=str(folder), device="cpu"
    )
    found = pipeline("The people", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    greedy = Sampling(temperature=0.0)
    text = generate(decoder, tokenizer, "The people", max_tokens=20, sampling=greedy)[0]
    assert found == "The people" + text


@pytest.mark.parametrize("context", [1, 7, 24])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_exported_code_generates_beyond_the_context(
    position: str, context: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("fast", ngram_rows=97, context_length=context, position=position)
    decoder = random_decoder(config, vocab_size=400)
    model = load_hf(write_hf(tmp_path / "out", decoder, tokenizer))
    prompt = [5, 6, 7, 8][: max(1, context - 1)]
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    found = model.generate(
        torch.tensor([prompt]), attention_mask=mask, max_new_tokens=60, min_new_tokens=60,
        do_sample=False, pad_token_id=0, eos_token_id=401,
    )  # fmt: skip
    expected = generate_ids(decoder, prompt, max_tokens=60, sampling=Sampling(temperature=0.0))
    assert found[0, len(prompt) :].tolist() == expected[0]
    with pytest.raises(ValueError, match=rf"at most {context} ids, .* .got {context + 1}"):
        model(torch.zeros(1, context + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("axis", "value"), [("norm_place", "between"), ("query_key_norm", "all"), ("new_axis", "new")]
)
def test_exported_code_rejects_unknown_choices(
    axis: str, value: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of("fast", ngram_rows=0), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    content = json.loads((folder / "config.json").read_text())
    content["pretrain"][axis] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"a model with {axis} '{value}': it must be one of "):
        load_hf(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_exported_code_has_its_head_and_can_be_resized(
    tied: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("fast", ngram_rows=0, tied_head=tied)
    model = load_hf(write_hf(tmp_path / "out", random_decoder(config, vocab_size=400), tokenizer))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    ids = torch.arange(20)[None]
    before = model(ids).logits
    model.resize_token_embeddings(408, mean_resizing=False)
    after = model(ids).logits
    assert after.shape == (1, 20, 408)
    torch.testing.assert_close(after[..., :400], before, rtol=0, atol=1e-6)


def test_trainer_divides_by_the_number_of_micro_batches(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Trainer leaves the division to a model that seems to divide by all targets."""
    pytest.importorskip("accelerate")
    decoder = random_decoder(config_of("fast", ngram_rows=97), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    rows = torch.randint(0, 400, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for n in (1, 2):
        options = transformers.TrainingArguments(
            str(tmp_path / "trainer"), max_steps=1, gradient_accumulation_steps=n, report_to=[],
            per_device_train_batch_size=4 // n, max_grad_norm=1e9, learning_rate=0.0,
            logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model=load_hf(folder), args=options, train_dataset=data)
        trainer.train()
        found.append(next(h for h in trainer.state.log_history if "grad_norm" in h))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert float(found[0]["grad_norm"]) == pytest.approx(float(found[1]["grad_norm"]), rel=1e-3)


def test_a_config_is_converted_in_both_directions() -> None:
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


def test_a_model_with_another_choice_is_not_native() -> None:
    """A Llama with another choice would load in its class of transformers, with other logits."""
    assert all(is_native(config_of(**case)) for case in CASES.values() if case["family"] in FORMATS)
    for family, formats in FORMATS.items():
        config = config_of(family)
        for name, hint in type_hints(ModelConfig).items():
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            values = (False, True) if hint is bool else choices
            free = ("family", "initialization", "attention_dropout", *formats.keys)
            for value in values if name not in free else ():
                is_own = value == getattr(config, name)
                assert is_native(replace(config, **{name: value})) == is_own, (family, name, value)
    assert not is_native(config_of("gpt2", n_kv_heads=2))
    assert not is_native(config_of("gpt", d_ff=40))
    assert not is_native(config_of("gpt2", tied_head=False))


def test_deinterleave_inverts_interleave() -> None:
    x = torch.arange(48.0).view(16, 3)
    assert torch.equal(deinterleave(interleave(x, 2), 2), x)
    # In a head of 8 rows, the pair (0, 4) becomes rows 0 and 1.
    assert interleave(x, 2)[:4, 0].tolist() == [0, 12, 3, 15]
