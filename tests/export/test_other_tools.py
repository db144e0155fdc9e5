"""What tools that come after pre-training ask of an exported folder: TRL, PEFT, pipelines, chats.

Their calls are made here by transformers alone; `make handover` runs the tools themselves."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from exports import change_before_verification, in_config, load_hf, run_json, same_weights, write_hf
from oracles import config_of, random_decoder
from pretrain.cli import main
from pretrain.export.importing import import_model
from pretrain.export.layouts import FormatError
from pretrain.generate.sampling import Sampling, generate
from pretrain.runner.open import load_model
from pretrain.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

FAST: dict[str, Any] = {"family": "fast", "ngram_rows": 97}
OWN_CODE: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "fast, tied": {**FAST, "tied_head": True},
    "learned positions": {**FAST, "position": "learned"},
    "transformer": {"family": "transformer"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama"},
    "fast": FAST,
}


@pytest.fixture(params=OWN_CODE)
def own_folder(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    decoder = random_decoder(config_of(**OWN_CODE[request.param]), vocab_size=400)
    return write_hf(tmp_path / "out", decoder, tokenizer)


# The code that is shipped -------------------------------------------------------------------------


def test_texts_packed_in_a_row_do_not_see_each_other(own_folder: Path) -> None:
    """TRL 1.16 packs texts into one row, longer than the context, and position_ids start again."""
    model = load_hf(own_folder)
    first, second = torch.tensor([5, 6, 7, 5, 6, 7, 8] * 3)[:20], torch.tensor([5, 6, 7, 5, 6, 9])
    row, texts = torch.cat([first, second, first])[None], [first, second, first]
    position_ids = torch.cat([torch.arange(len(text)) for text in texts])[None]
    found = model(row, position_ids=position_ids, use_cache=False).logits[0]
    for text, logits in zip(texts, found.split([20, 6, 20]), strict=True):
        torch.testing.assert_close(logits, model(text[None]).logits[0], rtol=1e-5, atol=1e-5)
    # Padding before positions that start again, as in a batch of packed rows.
    padded = torch.nn.functional.pad(row, (3, 0), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(row), (3, 0))
    positions = torch.nn.functional.pad(position_ids, (3, 0))
    again = model(padded, attention_mask=mask, position_ids=positions).logits[0, 3:]
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-5)


def test_the_model_without_its_head_is_called_as_others_call_it(own_folder: Path) -> None:
    """TRL 1.16 takes `base_model`'s hidden states and multiplies with the head itself."""
    model, ids = load_hf(own_folder), torch.arange(2, 22).view(2, 10)
    mask = torch.tensor([[0, 0, *[1] * 8], [1] * 10])
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    found = torch.nn.functional.linear(hidden, head.weight, head.bias)
    assert torch.equal(found, model(input_ids=ids, attention_mask=mask).logits)
    assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    # What stands in the head's place is called: an adapter, a quantized layer, a hook.
    called = []
    head.register_forward_hook(lambda *_: called.append(1))
    model(ids)
    assert called == [1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "input_ids must be given, not inputs_embeds"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)},
            r"attention_mask must be .B, T. .got 4 dims",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "position_ids": torch.tensor([[22, 23, 24]])},
            r"at most 24 ids, the context length, .* .got 25",
        ),
    ],
)
def test_inputs_that_the_code_cannot_take_are_rejected(
    inputs: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    decoder = random_decoder(config_of(**FAST), vocab_size=400)
    model = load_hf(write_hf(tmp_path / "out", decoder, tokenizer))
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_gradient_checkpointing_changes_no_gradient(own_folder: Path) -> None:
    ids, found = torch.arange(2, 22).view(2, 10), []
    for is_on in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            own_folder, trust_remote_code=True, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        if is_on:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        assert model.is_gradient_checkpointing == is_on
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_a_resized_vocabulary_is_recalled_saved_and_imported(
    own_folder: Path, tmp_path: Path
) -> None:
    """As for the tokens of a chat: the tables of recalled ids have a row for each token."""
    model, ids = load_hf(own_folder), torch.tensor([[5, 6, 7, 5, 6]])
    before = model(ids).logits
    model.resize_token_embeddings(403)
    torch.testing.assert_close(model(ids).logits[..., :400], before, rtol=1e-5, atol=1e-5)
    chat = torch.tensor([[402, 5, 402, 5, 401, 402]])
    expected = model(chat).logits
    model.save_pretrained(tmp_path / "chat")
    assert torch.equal(load_hf(tmp_path / "chat")(chat).logits, expected)
    shutil.copy(own_folder / "tokenizer.json", tmp_path / "chat")
    decoder = import_model(tmp_path / "chat").build()
    torch.testing.assert_close(decoder.logits(decoder(chat)), expected, rtol=1e-5, atol=1e-5)
    model.resize_token_embeddings(400)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


# The tokenizer and its settings -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_settings_of_a_tokenizer_are_those_that_other_programs_read(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A special token that a text spells is that token, as in every published model: TRL 1.16
    appends `eos_token` to a text. transformers 4.57 adds token types unless model_input_names
    forbids it; transformers.js 4.3 and onnxruntime-genai 0.18 read add_bos_token and add_eos_token;
    CTranslate2 4.8 needs unk_token; mlx-lm 0.32 needs n_ctx, and names without `transformer.`."""
    decoder = random_decoder(config_of(**FAMILIES[family]), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert reference("hi<|endoftext|>")["input_ids"][-1] == tokenizer.end_of_text
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (True, False)
    assert settings["unk_token"] == "<|endoftext|>"
    assert "split_special_tokens" not in settings
    assert "n_ctx" in json.loads((folder / "config.json").read_text()) or family != "gpt2"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_without_a_length_ends_at_the_context(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """transformers generates 256 tokens by default: GPT-2's code fails beyond its positions."""
    decoder = random_decoder(config_of(**FAMILIES[family]), vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    pipeline = transformers.pipeline(
        "text-generation", model=load_hf(folder), tokenizer=str(folder), device="cpu"
    )
    found = pipeline("The people", do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    greedy = Sampling(temperature=0.0)
    expected = generate(decoder, tokenizer, "The people", max_tokens=256, sampling=greedy)[0]
    text = tokenizer.decode(found)
    assert ("The people" + expected).startswith(text)
    assert len(found) > 100 if family == "fast" else len(found) <= 24


def test_token_types_fail_the_export(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """GPT-2 adds the embedding of id 0 to every position if its tokenizer returns token types."""
    decoder = random_decoder(config_of("gpt2"), vocab_size=400)
    model = write_hf(tmp_path / "model", decoder, tokenizer)

    def with_token_types(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        content = json.loads(file.read_text())
        content["model_input_names"].append("token_type_ids")
        file.write_text(json.dumps(content))

    words = ["export", str(model), "--format", "hf", "--out", str(tmp_path / "out")]
    change_before_verification(monkeypatch, with_token_types)
    result = run_json(capsys, *words, code=1)
    verdicts = {name: check["verdict"] for name, check in result["checks"].items()}
    assert verdicts == {**dict.fromkeys(verdicts, "agrees"), "usual_call": "disagrees"}


# A chat model, through an import ------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


@pytest.fixture
def chat(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder of transformers after a fine-tuning: three new tokens, a template, padding."""
    library = Library.from_str(json.dumps(tokenizer.description))
    names = ["<|user|>", "<|assistant|>", "<|pad|>"]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    decoder = random_decoder(config_of("llama"), vocab_size=403)
    folder = write_hf(tmp_path / "model", decoder, Tokenizer(library))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    reference.add_special_tokens({"additional_special_tokens": names[:2], "pad_token": names[2]})
    reference.chat_template = TEMPLATE
    reference.save_pretrained(tmp_path / "chat")
    model = load_hf(folder)
    model.config.pad_token_id = 402
    model.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_an_import_keeps_what_a_chat_needs(chat: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", str(chat), "--out", str(run)]) == 0
    for source in (chat, run):  # a folder as MODEL, and an imported model
        assert main(["export", str(source), "--format", "hf", "--out", str(out)]) == 0
        before, after = map(transformers.AutoTokenizer.from_pretrained, (chat, out))
        messages = [{"role": "user", "content": "Who is there?"}]
        text = after.apply_chat_template(messages, tokenize=False)
        ids = after(text)["input_ids"]
        assert ids == before(before.apply_chat_template(messages, tokenize=False))["input_ids"]
        assert [id_ for id_ in ids if id_ >= 400] == [400, 401]
        assert (after.pad_token, after.pad_token_id) == ("<|pad|>", 402)
        assert set(before.all_special_tokens) <= set(after.all_special_tokens)
        assert load_hf(out).config.pad_token_id == 402
        shutil.rmtree(out)


def test_an_import_keeps_the_template_in_gguf(chat: Path, tmp_path: Path) -> None:
    """llama.cpp invents the format of a chat where the file has no template."""
    gguf = pytest.importorskip("gguf")
    words = ["export", str(chat), "--format", "gguf", "--unverified", "--out", str(tmp_path / "g")]
    assert main(words) == 0
    fields = gguf.GGUFReader(tmp_path / "g/model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 402
    assert main(["import", str(tmp_path / "g/model.gguf"), "--out", str(tmp_path / "run")]) == 0
    carried = load_model(tmp_path / "run").tokenizer.carried
    assert carried == {"pad_token": "<|pad|>", "chat_template": TEMPLATE}


# Folders of other tools, not models of ours ------------------------------------------------------


def as_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()


def converted(name: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)

    return change


FOLDERS: dict[str, tuple[Any, str]] = {
    "adapter of peft": (as_adapter, "is an adapter, .* .merge_and_unload of peft"),
    "torchao, bitsandbytes, GPTQ": (
        in_config(quantization_config={"quant_method": "torchao"}),
        "got quantization_config in config.json: the model is quantized",
    ),
    "mlx": (in_config(quantization={"bits": 4}), "got quantization in config.json"),
    "onnx": (converted("model.onnx"), "must have its weights as safetensors .got model.onnx"),
    "optimum": (converted("onnx/model.onnx"), "safetensors .got model.onnx, converted for another"),
    "openvino": (converted("openvino_model.xml"), "safetensors .got openvino_model.xml"),
    "a config of 30 MB": (in_config(x="x" * 30_000_000), "config.json has 30.* at most 1,048,576"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_another_tool_is_rejected_with_the_reason(
    case: str, hf_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hf_llama, tmp_path / "theirs")
    change, message = FOLDERS[case]
    change(folder)
    with pytest.raises(FormatError, match=message):
        import_model(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", ["f32", "f16"])
def test_every_file_has_the_mode_of_the_umask(
    numbers: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """safetensors 0.8 makes files that their owner alone can read."""
    decoder = random_decoder(config_of("llama"), vocab_size=400)
    folder = write_hf(
        tmp_path / "out", decoder, tokenizer, numbers=numbers, largest_file_bytes=30_000
    )
    plain = tmp_path / "plain"
    plain.touch(0o644)
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert set(modes.values()) == {plain.stat().st_mode}, modes


def test_a_model_of_width_one_is_exported_and_imported(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("gpt2", d_model=1, n_heads=1, d_ff=1, context_length=1)
    decoder = random_decoder(config, vocab_size=400)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert same_weights(load_model(tmp_path / "run").decoder, decoder)


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_full_disk_ends_an_export_with_75(
    format: str, hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nothing is left. numpy's error for a full disk has no number, which gguf 0.19 passes on."""

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real_write(descriptor, data))

    def write_tensor_data(*_: Any) -> None:
        raise OSError("3072 requested and 504 written")

    if format == "gguf":
        gguf = pytest.importorskip("gguf")
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_tensor_data)
    else:
        real_write = os.write
        monkeypatch.setattr(os, "write", write)
    words = ["export", str(hf_llama), "--format", format, "--out", str(tmp_path / "out")]
    assert main(words) == 75
    assert list(tmp_path.iterdir()) == []
    assert re.search("No space left|3072 requested", capsys.readouterr().err)
