"""`pretrain import`: a model of another program becomes a MODEL of pretrain."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exports import run_json, same_weights, write_hf
from oracles import config_of, random_decoder
from pretrain.cli import main
from pretrain.corpus.reading import read_documents
from pretrain.evaluate.run_tasks import stop_ids_of
from pretrain.export.gguf import write_gguf
from pretrain.export.hf import _tokenizer_of as tokenizer_of
from pretrain.export.importing import import_model
from pretrain.export.layouts import FormatError
from pretrain.generate.sampling import generate
from pretrain.runner.open import load_model
from pretrain.tokenizer.load import load_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
from pretrain.tokenizer.train import train_tokenizer
from texts import train_sentencepiece
from tiny import TINY

Capture = pytest.CaptureFixture[str]


SHARED = Path(__file__).parents[3] / "shared/data/models"


def test_an_imported_model_is_a_model(hf_llama: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    result = run_json(capsys, "import", str(hf_llama), "--out", str(folder))
    assert result["format"] == "transformers' llama"
    assert set(result["files"]) == {"config.json", "model.safetensors"}
    assert same_weights(load_model(str(folder)).decoder, import_model(hf_llama).build())
    text = tmp_path / "text.txt"
    text.write_text("Some text to score. " * 20)
    one, other = (
        run_json(capsys, "evaluate", str(model), "--text", str(text))
        for model in (folder, hf_llama)
    )
    assert one == other
    # It has no held-out text, and nothing to resume.
    assert main(["evaluate", str(folder)]) == 2
    message = (
        "was not trained here, so there is no training text and no held-out text; score files with "
        "--text, without --overlap"
    )
    assert message in capsys.readouterr().err
    assert main(["train", "--resume", "--run", str(folder)]) == 2
    assert f"--train.init_from {folder}" in capsys.readouterr().err


def test_stop_ids_are_read_from_the_files_of_a_model(
    hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that do not exist are ignored; without one, the end-of-text token is used."""
    stops: list[set[int]] = []

    def record(*_: Any, stop_ids: set[int], **__: Any) -> list[list[int]]:
        stops.append(stop_ids)
        return []

    monkeypatch.setattr("pretrain.generate.sampling.generate_ids", record)
    folder = Path(shutil.copytree(hf_llama, tmp_path / "copy"))
    cases = [(7, None, [7]), (10**6, "x", [0]), (7, 9, [9]), (None, [9, 10**6, 7], [9, 7])]
    for general, generation, expected in cases:
        for name, value in (("config.json", general), ("generation_config.json", generation)):
            content = json.loads((folder / name).read_text()) | {"eos_token_id": value}
            (folder / name).write_text(json.dumps(content))
        assert import_model(folder).tokenizer.stop_ids == expected
    assert main(["import", str(folder), "--out", str(tmp_path / "model")]) == 0
    model = load_model(str(tmp_path / "model"))
    generate(model.decoder, model.tokenizer, "a")
    assert stops == [{0, 7, 9}]
    assert stops[0] <= stop_ids_of(model.tokenizer, ())
    out = write_hf(tmp_path / "out", model.decoder, model.tokenizer)
    assert import_model(out).tokenizer.stop_ids == [9, 7]
    result = json.loads((out / "tokenizer_config.json").read_text())
    assert result["eos_token"] == model.tokenizer.id_to_token(9)
    if importlib.util.find_spec("gguf"):
        file = tmp_path / "model.gguf"
        write_gguf(file, decoder=model.decoder, tokenizer=model.tokenizer)
        assert import_model(file).tokenizer.stop_ids == [9]


@pytest.mark.parametrize("special", ["<|endoftext|>", "</s>"])
def test_gpt2_with_vocab_and_merges_is_imported(special: str, tmp_path: Path) -> None:
    """The files of GPT2Tokenizer in transformers 4, with OpenAI's or the guides' end-of-text."""
    from tokenizers import ByteLevelBPETokenizer

    library = ByteLevelBPETokenizer()
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    library.train_from_iterator(texts, vocab_size=400, special_tokens=["<pad>", special])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    decoder = random_decoder(config_of("gpt2"), vocab_size=tokenizer.vocab_size)
    folder = write_hf(tmp_path / "out", decoder, tokenizer)
    (folder / "tokenizer.json").unlink()
    library.save_model(str(folder))
    model = import_model(folder)
    assert same_weights(model.build(), decoder)
    assert (model.tokenizer.end_of_text, model.tokenizer.stop_ids) == (1, [1])
    assert model.tokenizer.encode(texts[0]).tolist() == tokenizer.encode(texts[0]).tolist()


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    "files", ["tokenizer.model", "vocab.json", "plain json", "template json", "RoBERTa's json"]
)
def test_a_prompt_begins_as_in_transformers(
    files: str, add_bos: bool | None, tmp_path: Path
) -> None:
    """In transformers 5.23 the template of a tokenizer.json counts, whatever add_bos_token is; of
    other files add_bos_token does. 4.57 puts <s> before texts of each tokenizer.model."""
    transformers = pytest.importorskip("transformers", minversion="5")
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing, TemplateProcessing

    name = "GPT2Tokenizer"
    if files == "tokenizer.model":
        name = "LlamaTokenizer"
        train_sentencepiece(tmp_path / files)
    else:
        library = ByteLevelBPETokenizer()
        library.train_from_iterator(["the ship"] * 9, special_tokens=["<s>", "<pad>", "</s>"])
        if files == "template json":
            library._tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
            )
        if files == "RoBERTa's json":
            library._tokenizer.post_processor = RobertaProcessing(
                ("</s>", 2), ("<s>", 0), add_prefix_space=False
            )
        if files == "vocab.json":
            library.save_model(str(tmp_path))
        else:
            library.save(str(tmp_path / "tokenizer.json"))
    content: dict[str, Any] = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    content |= {} if add_bos is None else {"add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("the ship")["input_ids"]
    if theirs[-1] == 2:  # RoBERTa's puts </s> at the end too, and a prompt lacks it
        theirs.pop()
    assert tokenizer_of(tmp_path).encode_prompt("the ship") == theirs


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "hf/model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(name: str, hf_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_llama, tmp_path / "hf")
    file = tmp_path / name
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS; it must be the file"):
        import_model(file.parent if file.parent.name == "hf" else file)


def test_folders_without_a_foreign_model_are_rejected(
    hf_llama: Path, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.gguf").write_bytes(b"GGUF")
    checkpoint = next((finished_run / "checkpoints").iterdir())
    for folder, message in {
        finished_run: "is a run or a checkpoint of pretrain, which needs no import",
        checkpoint: "is a run or a checkpoint of pretrain, which needs no import",
        tmp_path / "empty": "has no config.json; a model must be a folder with config.json",
        tmp_path / "files": "has no config.json; name the file in it: model.gguf",
    }.items():
        with pytest.raises(FormatError, match=message):
            import_model(folder)


def test_training_starts_from_an_imported_model(
    hf_llama: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    assert main(["import", str(hf_llama), "--out", str(model)]) == 0
    words = ["train", str(corpus), "--train.init_from", str(model), "--run", str(run)]
    words += "--train.batch_tokens 240 --train.evaluate_tokens 512 --train.threads 1".split()
    words += "--train.device cpu --optimizer.learning_rate 1e-9 --model.dropout 0.1".split()
    assert main([*words, "--train.steps", "2"]) == 0
    trained, first = load_model(str(run)), load_model(str(model))
    assert trained.tokenizer.sha256 == first.tokenizer.sha256
    assert trained.config.model.n_kv_heads == 2
    assert trained.config.model.dropout == 0.1
    # Two updates of almost nothing: the weights are the imported ones, and not random ones.
    for (name, a), (_, b) in zip(
        trained.decoder.named_parameters(), first.decoder.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    # Training can also continue from a checkpoint of that run.
    checkpoint = next((run / "checkpoints").iterdir())
    again = ["train", str(corpus), "--train.init_from", str(checkpoint), *words[6:]]
    assert main([*again, "--run", str(tmp_path / "again"), "--train.steps", "1"]) == 0


def test_a_killed_run_restarts_from_the_same_weights(
    hf_llama: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    assert main(["import", str(hf_llama), "--out", str(model)]) == 0
    words = ["train", str(corpus), "--train.init_from", str(model), "--run", str(run)]
    words += "--train.batch_tokens 240 --train.evaluate_tokens 512 --train.threads 1".split()
    assert main([*words, "--train.device", "cpu", "--train.steps", "3"]) == 0
    whole = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in whole if '"train"' in line]
    # As after a kill before the first checkpoint.
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert main(["train", "--resume", "--run", str(run)]) == 0
    again = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in again if '"train"' in line] == losses
    # Other weights in the same folder are rejected.
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    shutil.rmtree(model)
    assert main(["import", str(SHARED.parent), "--out", str(model)]) == 2
    other = write_llama_with_head(tmp_path / "other", seed=7)
    assert main(["import", str(other), "--out", str(model)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(run)]) == 2
    assert "first weights" in capsys.readouterr().err


def write_llama_with_head(folder: Path, seed: int) -> Path:
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, vocab_size=400, split="llama3")
    decoder = random_decoder(config_of("llama", n_kv_heads=2), vocab_size=400)
    with torch.no_grad():
        decoder.head_weight.mul_(seed)
    return write_hf(folder, decoder, tokenizer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.n_layers", "3"], "would not fit: model.n_layers 2 -> 3"),
        (["--model.family", "gpt2"], "would not fit: model.family llama -> gpt2"),
        (
            ["--tokenizer.vocab_size", "300"],
            "tokenizer settings must not be given with train.init_from: its tokenizer is used",
        ),
        (
            ["--train.init_from", "missing"],
            "train.init_from must be a run or a checkpoint (got missing)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_rejected(
    words: list[str],
    message: str,
    hf_llama: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    model = tmp_path / "model"
    assert main(["import", str(hf_llama), "--out", str(model)]) == 0
    start = ["train", str(corpus), "--train.init_from", str(model), "--run", str(tmp_path / "run")]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_init_from_rejects_a_folder_that_is_not_imported(
    hf_llama: Path, corpus: Path, capsys: Capture
) -> None:
    assert main(["train", str(corpus), "--train.init_from", str(hf_llama), *TINY]) == 2
    assert "pretrain import" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 and more", "is a pickle of PyTorch"),
        (b"\x80\x02ctorch", "is a pickle of PyTorch"),
        (b"GGUF", "must be a complete GGUF file"),
        (b"", "model.bin is not a model; a model must be a folder with config.json"),
        (b"something else " * 30, "model.bin is not a model; a model must be a folder with"),
    ],
)
def test_files_that_are_not_models_are_rejected(
    data: bytes, message: str, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.bin"
    file.write_bytes(data)
    assert main(["import", str(file), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    for path in (file, tmp_path):
        words = ["import", str(path), "--tokenizer", str(file), "--out", str(tmp_path / "out")]
        assert main(words) == 2
        assert f"only for a .bin of llama2.c, which {path} is not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def llama2c(folder: Path, *, tied: bool) -> tuple[Path, Any]:
    """A model and a tokenizer in llama2.c's first format, and the decoder that they hold."""
    config = config_of("llama", n_kv_heads=2, d_ff=40, tied_head=tied)
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [" ", "a", "b", "ab", " a", "é"]
    decoder = random_decoder(config, vocab_size=len(pieces))
    folder.mkdir()
    table = struct.pack("<i", max(map(len, pieces)))
    for number, piece in enumerate(pieces):
        raw = piece.encode()
        table += struct.pack("<fi", -float(number), len(raw)) + raw
    (folder / "tok265.bin").write_bytes(table)
    own = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    sign = 1 if tied else -1
    data = struct.pack("<7i", 32, 40, 2, 4, 2, sign * len(pieces), 24)
    parts = [own["token_embedding.weight"]]
    for name in (
        *("attention_norm", "attention.query", "attention.key", "attention.value"),
        *("attention.output", "feed_forward_norm", "feed_forward.gate", "feed_forward.down"),
        "feed_forward.up",
    ):
        for layer in range(2):
            values = own[f"blocks.{layer}.{name}.weight"]
            if name in ("attention.query", "attention.key"):
                # llama2.c rotates the elements 2i and 2i + 1 of a head, we i and i + 4.
                heads = values.reshape(-1, 2, 4, 32)
                values = np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(values.shape)
            parts.append(values)
    parts += [own["final_norm.weight"], np.zeros((2, 24, 4), np.float32)]
    parts += [] if tied else [own["head.weight"]]
    (folder / "model.bin").write_bytes(data + b"".join(p.tobytes() for p in parts))
    return folder / "model.bin", decoder


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_file_is_read(tied: bool, tmp_path: Path) -> None:
    file, decoder = llama2c(tmp_path / "c", tied=tied)
    imported = import_model(file)
    assert same_weights(imported.build(), decoder)
    # The space before a text, then merges by their score.
    assert imported.tokenizer.encode("ab a").tolist() == [259, 262, 263]
    assert imported.tokenizer.decode([259, 262, 264]) == "abé"
    assert (imported.tokenizer.start_of_text, imported.tokenizer.end_of_text) == (1, 2)


def test_truncated_llama2c_files_or_without_a_tokenizer_are_rejected(tmp_path: Path) -> None:
    file, _ = llama2c(tmp_path / "c", tied=True)
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(FormatError, match=r"must have .* bytes for"):
        import_model(file)
    file.write_bytes(struct.pack("<i", 33) + data[4:])
    with pytest.raises(
        FormatError, match=r"model.d_model is 33; it must be a multiple of model.n_heads, 4"
    ):
        import_model(file)
    file.write_bytes(struct.pack("<i", 0x616B3432) + data[4:])
    with pytest.raises(FormatError, match=r"must have the first version of llama2.c's format"):
        import_model(file)
    file.write_bytes(data)
    table = (file.parent / "tok265.bin").read_bytes()
    (file.parent / "tok265.bin").write_bytes(table[:-3])
    with pytest.raises(FormatError, match=r"must have a complete piece of llama2.c at byte"):
        import_model(file)
    (file.parent / "tok265.bin").write_bytes(table[: len(table) // 2])
    with pytest.raises(
        FormatError, match=r"must have a complete piece|must have a piece for each byte"
    ):
        import_model(file)
    # Without its last piece, of two bytes, a file looks complete.
    (file.parent / "tok265.bin").write_bytes(table[:-10])
    with pytest.raises(FormatError, match=r"must have 265 pieces, .*got 264"):
        import_model(file)
    (file.parent / "tok265.bin").unlink()
    with pytest.raises(FormatError, match=r"must have one file tok\*.bin .got 0"):
        import_model(file)


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.mark.skipif(not (SHARED / "stories260K.bin").is_file(), reason="needs stories260K.bin")
def test_stories260k_generates_its_known_text(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "stories"
    assert main(["import", str(SHARED / "stories260K.bin"), "--out", str(folder)]) == 0
    words = ["generate", str(folder), "--temperature", "0", "--max-tokens", "90"]
    assert run_json(capsys, *words)["completions"][0].startswith(STORY)


def test_imported_llamas_have_their_own_start_of_text(tmp_path: Path) -> None:
    """Training texts have a start-of-text and an end-of-text token."""
    from pretrain.data.preparation import prepare

    _, decoder = llama2c(tmp_path / "c", tied=True)
    tokenizer: Tokenizer = import_model(tmp_path / "c/model.bin").tokenizer
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("ab a b " * 400)
    data = prepare(
        [str(tmp_path / "text.txt")], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer")
    )
    assert (data.manifest.start_of_text, data.manifest.end_of_text) == (1, 2)
    stream = data.split("train")
    ids = stream.read(0, stream.n_tokens).tolist()
    assert ids[:2] == [2, 1]
    assert ids[-1] == 2
    assert ids.count(1) == 1
    assert decoder.vocab_size == data.manifest.vocab_size
