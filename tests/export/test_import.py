"""`pretrain import` and `pretrain export`: somebody else's model becomes a MODEL, and ours theirs,
with a certificate that a fault makes fail."""

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

from oracles import config_of, random_decoder
from pretrain.cli import main
from pretrain.corpus import read_documents
from pretrain.evaluate.run_tasks import stop_ids_of
from pretrain.export import FormatError, certificate, import_model, write_gguf
from pretrain.export.verification import AGREES, DISAGREES, NOT_VERIFIED
from pretrain.generate import generate
from pretrain.runner.open import load_model
from pretrain.tokenizer import Tokenizer, train_tokenizer
from test_export import Change, in_config, in_weights, same, written
from tiny import TINY

Capture = pytest.CaptureFixture[str]
SHARED = Path(__file__).parents[3] / "shared/data/models"


def asked(capsys: Capture, *words: str, code: int = 0) -> dict[str, Any]:
    """What a verb says with --json."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a Llama of grouped heads."""
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, vocab_size=400, split="llama3")
    decoder = random_decoder(config_of("llama", n_kv_heads=2), vocab_size=400)
    return written(tmp_path_factory.mktemp("theirs") / "llama", decoder, tokenizer)


# --- export
# ------------------------------------------------------------------------------


def test_what_train_leaves_behind_is_exported_and_read_back(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    said = asked(capsys, "export", str(finished_run), "--format", "hf", "--out", str(out))
    assert said["verdict"] == AGREES
    written_down = json.loads((out / "certificate.json").read_text())
    assert written_down["checks"] == said["checks"]
    assert written_down["files"] == certificate.checksums(out)
    assert {"model.safetensors", "tokenizer.json", "modeling_pretrain.py"} <= set(said["files"])
    assert said["library"].startswith("transformers")
    assert said["checks"]["logits"]["positions"] >= 100
    ours, back = load_model(str(finished_run)), load_model(str(out))
    assert same(ours.decoder, back.decoder)
    assert ours.tokenizer.sha256 == back.tokenizer.sha256
    # A Hugging Face folder is a MODEL: the verbs take it as it is.
    for verb, options in {
        "generate": ["--prompt", "The", "--max-tokens", "5"],
        "next": ["--prompt", "The"],
    }.items():
        capsys.readouterr()
        assert asked(capsys, verb, str(out), *options) == asked(
            capsys, verb, str(finished_run), *options
        )


def test_a_folder_that_holds_something_is_left_alone(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    words = ["export", str(finished_run), "--format", "hf", "--out", str(tmp_path)]
    assert main(words) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert main(["import", str(finished_run), "--out", str(tmp_path)]) == 2


def test_without_another_library_nothing_is_verified(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(certificate, "verification_library", lambda format: None)
    words = ["export", str(finished_run), "--format", "hf", "--out"]
    said = asked(capsys, *words, str(tmp_path / "a"), code=2)
    assert said["verdict"] == NOT_VERIFIED
    assert json.loads((tmp_path / "a/certificate.json").read_text())["verdict"] == NOT_VERIFIED
    assert main([*words, str(tmp_path / "b"), "--unverified"]) == 0
    assert "pretrain[hf]" not in capsys.readouterr().out


def _swap_heads(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(8, 0)


def _nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 0.5


def _other_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _no_start(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))


FAULTS: dict[str, tuple[Change, str]] = {
    "a head in another place": (in_weights(_swap_heads), "logits"),
    "one number": (in_weights(_nudge), "logits"),
    "the base of the positions": (in_config(rope_theta=11_000.0), "logits"),
    "the norm's epsilon": (in_config(rms_norm_eps=1e-2), "logits"),
    "the order of merges": (_other_merges, "tokenizer"),
    "nothing before a prompt": (_no_start, "tokenizer"),
}

# One of the model and one of the tokenizer: each is asked about by a process of its own.
IN_SHORT = ("one number", "nothing before a prompt")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] * (f not in IN_SHORT)) for f in FAULTS],
)
def test_a_planted_fault_fails_the_export(
    fault: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The fault happens after the files were written and before they are asked about."""
    pytest.importorskip("transformers")
    assert main(["import", str(theirs), "--out", str(tmp_path / "model")]) == 0
    change, check = FAULTS[fault]
    asking = certificate._ask

    def damaged(request: dict[str, Any]) -> Any:
        change(Path(request["path"]))
        return asking(request)

    monkeypatch.setattr(certificate, "_ask", damaged)
    words = ["export", str(tmp_path / "model"), "--format", "hf", "--out", str(tmp_path / "out")]
    said = asked(capsys, *words, code=1)
    assert said["verdict"] == said["checks"][check]["verdict"] == DISAGREES
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.disagrees/certificate.json").is_file()


def test_files_that_they_cannot_open_fail_the_export(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("transformers")
    asking = certificate._ask

    def damaged(request: dict[str, Any]) -> Any:
        in_weights(lambda t: t.pop("model.norm.weight"))(Path(request["path"]))
        return asking(request)

    monkeypatch.setattr(certificate, "_ask", damaged)
    words = ["export", str(theirs), "--format", "hf", "--out", str(tmp_path / "out")]
    said = asked(capsys, *words, code=1)
    assert said["verdict"] == DISAGREES
    assert "model.norm.weight" in said["refusal"]
    assert not (tmp_path / "out").exists()


# What is put at the beginning of the witness; the folders; what is said.
UNABLE: dict[str, tuple[str, str]] = {
    "it lacks a package": ("raise ImportError('no module there')", "ImportError: no module there"),
    "it is killed": ("import os; os.kill(os.getpid(), 9)", "transformers was killed by signal 9"),
}


@pytest.mark.parametrize("case", UNABLE)
def test_a_witness_that_cannot_run_has_verified_nothing(
    case: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It says nothing of the files, which are kept under their name."""
    pytest.importorskip("transformers")
    source = Path(certificate.__file__).with_name("witness.py").read_text()
    line, message = UNABLE[case]
    broken = source.replace("        import transformers  # noqa: F401", f"        {line}")
    assert broken != source
    (tmp_path / "witness.py").write_text(broken)
    monkeypatch.setattr(certificate, "__file__", str(tmp_path / "certificate.py"))
    words = ["export", str(theirs), "--format", "hf", "--out", str(tmp_path / "out")]
    said = asked(capsys, *words, code=2)
    assert said["verdict"] == NOT_VERIFIED
    assert message in said["unable"]
    assert json.loads((tmp_path / "out/certificate.json").read_text())["unable"] == said["unable"]
    assert main([*words[:-1], str(tmp_path / "other"), "--unverified"]) == 0


def test_numbers_that_are_not_finite_are_null_in_a_certificate(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """And a perplexity beyond all bounds is no line of 300 digits."""
    pytest.importorskip("transformers")
    asking = certificate._ask

    def damaged(request: dict[str, Any]) -> Any:
        in_weights(lambda t: t["model.norm.weight"].mul_(1e30))(Path(request["path"]))
        answer, logits = asking(request)
        return answer, logits[:, :-1]

    monkeypatch.setattr(certificate, "_ask", damaged)
    words = ["export", str(theirs), "--format", "hf", "--out", str(tmp_path / "out")]
    said = asked(capsys, *words, code=1)
    text = (tmp_path / "out.disagrees/certificate.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["checks"]["logits"]["largest_difference"] is None
    assert content["checks"]["perplexity"]["theirs"] is None
    rows = certificate.table(said)
    assert "not finite there" in rows[3][1]
    content["checks"]["perplexity"]["theirs"] = 1e300
    assert "1.000e+300 there" in certificate.table(content)[3][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "holds no text to score"),
        ("\n \n", "holds no text to score"),
        ("中文字符", "has nothing of the text that is scored"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_before_anything_is_written(
    text: str | None, message: str, tmp_path: Path, capsys: Capture
) -> None:
    tokenizer = train_tokenizer(["some words and more"], name="characters", vocab_size=None)
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    model = written(tmp_path / "model", decoder, tokenizer)
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    out = tmp_path / "out" / "deep"
    words = ["export", str(model), "--format", "hf", "--out", str(out), "--text", str(file)]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


# --- the folder that is written
# ------------------------------------------------------------------------------


def test_out_may_be_a_link_and_not_where_we_stand(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-nothing").symlink_to("new")
    (tmp_path / "round").symlink_to("round")
    for name, at in {"to-empty": "empty", "to-nothing": "new"}.items():
        assert main(["import", str(theirs), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / at / "config.yaml").is_file()
    assert main(["import", str(theirs), "--out", str(tmp_path / "round")]) == 2
    assert "leads back to itself" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "", str(tmp_path / "here")):
        for words in (["import", str(theirs)], ["export", str(theirs), "--format", "hf"]):
            assert main([*words, "--out", name]) == 2
            assert "is the folder that this runs in" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
    # A name in the folder is as good as a path to it.
    assert main(["import", str(theirs), "--out", "model"]) == 0
    assert [p.name for p in Path().iterdir()] == ["model"]


def test_what_others_made_is_never_removed(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "certify", lambda *_, **__: {"verdict": DISAGREES})
    monkeypatch.setattr(certificate, "table", lambda _: [])
    names = [".out.work", "out.disagrees"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    words = ["export", str(theirs), "--format", "hf", "--out", str(tmp_path / "out")]
    assert main(words) == main(words) == 1
    assert all((tmp_path / name / "mine").is_file() for name in names)
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {*names, "out.disagrees-2", "out.disagrees-3"}
    assert (tmp_path / "out.disagrees-3" / "model.safetensors").is_file()


def test_two_exports_at_once_do_not_meet(tmp_path: Path) -> None:
    from pretrain.cli.out_folder import work_folder

    with work_folder(tmp_path / "out") as one, work_folder(tmp_path / "out") as other:
        assert one != other
    assert list(tmp_path.iterdir()) == []


def test_the_witness_is_not_ours() -> None:
    source = (Path(certificate.__file__).with_name("witness.py")).read_text()
    assert "import pretrain" not in source
    assert "from pretrain" not in source


# --- import
# ------------------------------------------------------------------------------


def test_an_imported_model_is_a_model(theirs: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    said = asked(capsys, "import", str(theirs), "--out", str(folder))
    assert said["format"] == "transformers' llama"
    assert set(said["files"]) == {"config.json", "model.safetensors"}
    assert same(load_model(str(folder)).decoder, import_model(theirs).build())
    text = tmp_path / "text.txt"
    text.write_text("Some text to score. " * 20)
    one, other = (
        asked(capsys, "evaluate", str(model), "--text", str(text)) for model in (folder, theirs)
    )
    assert one == other
    # It has no text of its own, and nothing to resume.
    assert main(["evaluate", str(folder)]) == 2
    assert "was not trained here and has no held-out text" in capsys.readouterr().err
    assert main(["train", "--resume", "--run", str(folder)]) == 2
    assert f"--train.init_from {folder}" in capsys.readouterr().err


def test_a_model_stops_where_its_own_files_say(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that does not exist is passed over; what names none stops where its vocabulary does."""
    stops: list[set[int]] = []

    def remember(*_: Any, stop_ids: set[int], **__: Any) -> list[list[int]]:
        stops.append(stop_ids)
        return []

    monkeypatch.setattr("pretrain.generate.sampling.generate_ids", remember)
    folder = Path(shutil.copytree(theirs, tmp_path / "theirs"))
    cases = [(7, None, [7]), (10**6, "x", [0]), (7, 9, [9]), (None, [9, 10**6, 7], [9, 7])]
    for general, generation, found in cases:
        for name, value in (("config.json", general), ("generation_config.json", generation)):
            content = json.loads((folder / name).read_text()) | {"eos_token_id": value}
            (folder / name).write_text(json.dumps(content))
        assert import_model(folder).tokenizer.stop_ids == found
    assert main(["import", str(folder), "--out", str(tmp_path / "model")]) == 0
    model = load_model(str(tmp_path / "model"))
    generate(model.decoder, model.tokenizer, "a")
    assert stops == [{0, 7, 9}]
    assert stops[0] <= stop_ids_of(model.tokenizer, ())
    out = written(tmp_path / "out", model.decoder, model.tokenizer)
    assert import_model(out).tokenizer.stop_ids == [9, 7]
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said["eos_token"] == model.tokenizer.id_to_token(9)
    if importlib.util.find_spec("gguf"):
        own = {name: p.detach() for name, p in model.decoder.named_parameters()}
        config, file = model.decoder.config, tmp_path / "model.gguf"
        write_gguf(file, config=config, tokenizer=model.tokenizer, read=own.__getitem__)
        assert import_model(file).tokenizer.stop_ids == [9]


def test_a_folder_that_needs_no_import_or_holds_none_says_so(
    theirs: Path, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.gguf").write_bytes(b"GGUF")
    checkpoint = next((finished_run / "checkpoints").iterdir())
    for folder, message in {
        finished_run: "is a run of this program or a checkpoint in one: a MODEL as it is",
        checkpoint: "is a run of this program or a checkpoint in one: a MODEL as it is",
        tmp_path / "empty": "has no config.json; legal: config.json, model.safetensors",
        tmp_path / "files": "has no config.json; name the file in it: model.gguf",
    }.items():
        with pytest.raises(FormatError, match=message):
            import_model(folder)


def test_an_imported_model_trains_on(
    theirs: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    assert main(["import", str(theirs), "--out", str(model)]) == 0
    words = ["train", str(corpus), "--train.init_from", str(model), "--run", str(run)]
    words += "--train.batch_tokens 240 --train.evaluate_tokens 512 --train.threads 1".split()
    words += "--train.device cpu --optimizer.learning_rate 1e-9 --model.dropout 0.1".split()
    assert main([*words, "--train.steps", "2"]) == 0
    ours, first = load_model(str(run)), load_model(str(model))
    assert ours.tokenizer.sha256 == first.tokenizer.sha256
    assert ours.config.model.n_kv_heads == 2
    assert ours.config.model.dropout == 0.1
    # Two updates of nearly nothing: the weights are those it came with, and not fresh ones.
    for (name, a), (_, b) in zip(
        ours.decoder.named_parameters(), first.decoder.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    # Its own run trains on too, and so does a checkpoint of it.
    checkpoint = next((run / "checkpoints").iterdir())
    again = ["train", str(corpus), "--train.init_from", str(checkpoint), *words[6:]]
    assert main([*again, "--run", str(tmp_path / "again"), "--train.steps", "1"]) == 0


def test_a_killed_run_begins_again_from_the_same_weights(
    theirs: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    assert main(["import", str(theirs), "--out", str(model)]) == 0
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
    # Other weights under the same name are another run.
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    shutil.rmtree(model)
    assert main(["import", str(SHARED.parent), "--out", str(model)]) == 2
    other = written_llama(tmp_path / "other", seed=7)
    assert main(["import", str(other), "--out", str(model)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--run", str(run)]) == 2
    assert "first weights" in capsys.readouterr().err


def written_llama(folder: Path, seed: int) -> Path:
    texts = [d.text for d in list(read_documents("bundled"))[:20]]
    tokenizer = train_tokenizer(texts, vocab_size=400, split="llama3")
    decoder = random_decoder(config_of("llama", n_kv_heads=2), vocab_size=400)
    with torch.no_grad():
        decoder.head_weight.mul_(seed)
    return written(folder, decoder, tokenizer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.n_layers", "3"], "would not fit: model.n_layers 2 -> 3"),
        (["--model.family", "gpt2"], "would not fit: model.family llama -> gpt2"),
        (["--tokenizer.vocab_size", "300"], "do not go with train.init_from"),
        (["--train.init_from", "missing"], "is neither a run nor a checkpoint"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(
    words: list[str], message: str, theirs: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "model"
    assert main(["import", str(theirs), "--out", str(model)]) == 0
    start = ["train", str(corpus), "--train.init_from", str(model), "--run", str(tmp_path / "run")]
    assert main([*start, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_must_be_imported_before_it_trains_on(
    theirs: Path, corpus: Path, capsys: Capture
) -> None:
    assert main(["train", str(corpus), "--train.init_from", str(theirs), *TINY]) == 2
    assert "pretrain import" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 and more", "is a pickle of PyTorch"),
        (b"\x80\x02ctorch", "is a pickle of PyTorch"),
        (b"GGUF", "is no whole GGUF file"),
        (b"", "nor a GGUF file"),
        (b"something else " * 30, "nor a GGUF file"),
    ],
)
def test_files_that_are_no_model_are_refused(
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
        assert f"{path} is none, leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- llama2.c
# ------------------------------------------------------------------------------


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
                # llama2.c turns the elements 2i and 2i + 1 of a head, we i and i + 4.
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
    back = import_model(file)
    assert same(back.build(), decoder)
    # The space before a text, then merges by their score.
    assert back.tokenizer.encode("ab a").tolist() == [259, 262, 263]
    assert back.tokenizer.decode([259, 262, 264]) == "abé"
    assert (back.tokenizer.start_of_text, back.tokenizer.end_of_text) == (1, 2)


def test_llama2c_files_that_are_cut_or_lack_a_tokenizer_are_refused(tmp_path: Path) -> None:
    file, _ = llama2c(tmp_path / "c", tied=True)
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(FormatError, match="bytes; its sizes"):
        import_model(file)
    file.write_bytes(struct.pack("<i", 0x616B3432) + data[4:])
    with pytest.raises(FormatError, match=r"a later version of llama2.c's format"):
        import_model(file)
    file.write_bytes(data)
    table = (file.parent / "tok265.bin").read_bytes()
    (file.parent / "tok265.bin").write_bytes(table[:-3])
    with pytest.raises(FormatError, match=r"no piece of llama2.c"):
        import_model(file)
    (file.parent / "tok265.bin").write_bytes(table[: len(table) // 2])
    with pytest.raises(FormatError, match=r"no piece of llama2.c|too few"):
        import_model(file)
    # Without its last piece, of two bytes, a file looks whole.
    (file.parent / "tok265.bin").write_bytes(table[:-10])
    with pytest.raises(FormatError, match=r"has 264 pieces and .* a vocabulary of 265"):
        import_model(file)
    (file.parent / "tok265.bin").unlink()
    with pytest.raises(FormatError, match="there are 0 files tok"):
        import_model(file)


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.mark.skipif(not (SHARED / "stories260K.bin").is_file(), reason="needs stories260K.bin")
def test_stories260k_tells_its_story(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "stories"
    assert main(["import", str(SHARED / "stories260K.bin"), "--out", str(folder)]) == 0
    words = ["generate", str(folder), "--temperature", "0", "--max-tokens", "90"]
    assert asked(capsys, *words)["completions"][0].startswith(STORY)


def test_imported_llamas_begin_a_text_with_their_own_token(tmp_path: Path) -> None:
    """And texts that they train on are framed by both."""
    from pretrain.data import prepare

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
