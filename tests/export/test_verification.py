"""`pretrain export`, and the verification by another library, which fails for changed files."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from exports import (
    Change,
    change_before_verification,
    in_config,
    in_weights,
    run_json,
    same_weights,
    write_hf,
)
from oracles import config_of, random_decoder
from pretrain.cli import main
from pretrain.export import verification
from pretrain.export.verification import AGREES, DISAGREES, NOT_VERIFIED
from pretrain.runner.open import load_model
from pretrain.tokenizer.train import train_tokenizer
from tiny import write_llama

Capture = pytest.CaptureFixture[str]


SHARED = Path(__file__).parents[3] / "shared/data/models"


def test_a_finished_run_is_exported_and_imported(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    result = run_json(capsys, "export", str(finished_run), "--format", "hf", "--out", str(out))
    assert result["verdict"] == AGREES
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["checks"] == result["checks"]
    assert certificate["files"] == verification.checksums(out)
    assert {"model.safetensors", "tokenizer.json", "modeling_pretrain.py"} <= set(result["files"])
    assert result["library"].startswith("transformers")
    assert result["checks"]["logits"]["positions"] >= 100
    original, imported = load_model(str(finished_run)), load_model(str(out))
    assert same_weights(original.decoder, imported.decoder)
    assert original.tokenizer.sha256 == imported.tokenizer.sha256
    # A Hugging Face folder is a MODEL: commands accept it without an import.
    for command, options in {
        "generate": ["--prompt", "The", "--max-tokens", "5"],
        "next": ["--prompt", "The"],
    }.items():
        capsys.readouterr()
        assert run_json(capsys, command, str(out), *options) == run_json(
            capsys, command, str(finished_run), *options
        )


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("hf", "model.safetensors"),
        ("hf", "config.json"),
        ("hf", "tokenizer.json"),
        ("hf", "tokenizer_config.json"),
        ("gguf", "model.gguf"),
    ],
)
def test_an_export_is_held_to_its_certificate(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    format: str,
    name: str,
) -> None:
    source = finished_run
    if format == "gguf":
        pytest.importorskip("gguf")
        (tmp_path / "llama").mkdir()
        source = write_llama(tmp_path / "llama", context_length=32)
    monkeypatch.setattr(verification, "verification_library", lambda format: None)
    out = tmp_path / "out"
    words = ["export", str(source), "--format", format, "--out", str(out), "--unverified"]
    assert main(words) == 0
    model = out / name if format == "gguf" else out
    load_model(model, device="cpu")
    content = bytearray((out / name).read_bytes())
    content[-20] ^= 1
    (out / name).write_bytes(content)
    for command in (["next", str(model)], ["import", str(model), "--out", str(tmp_path / "in")]):
        capsys.readouterr()
        assert main(command) == 2
        assert f"{out / name} was changed or damaged since it was" in capsys.readouterr().err
    (out / "certificate.json").write_text("{")
    assert main(["next", str(model)]) == 2
    assert "certificate.json is damaged" in capsys.readouterr().err


def test_a_folder_with_files_is_not_changed(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    words = ["export", str(finished_run), "--format", "hf", "--out", str(tmp_path)]
    assert main(words) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert main(["import", str(finished_run), "--out", str(tmp_path)]) == 2


def test_without_another_library_nothing_is_verified(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(verification, "verification_library", lambda format: None)
    words = ["export", str(finished_run), "--format", "hf", "--out"]
    result = run_json(capsys, *words, str(tmp_path / "a"), code=2)
    assert result["verdict"] == NOT_VERIFIED
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


# One fault of the model and one of the tokenizer: each takes its own process.
FAST_FAULTS = ("one number", "nothing before a prompt")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] * (f not in FAST_FAULTS)) for f in FAULTS],
)
def test_a_planted_fault_fails_the_export(
    fault: str, hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The fault happens after the files were written and before they are verified."""
    pytest.importorskip("transformers")
    assert main(["import", str(hf_llama), "--out", str(tmp_path / "model")]) == 0
    change, check = FAULTS[fault]
    change_before_verification(monkeypatch, change)
    words = ["export", str(tmp_path / "model"), "--format", "hf", "--out", str(tmp_path / "out")]
    result = run_json(capsys, *words, code=1)
    assert result["verdict"] == result["checks"][check]["verdict"] == DISAGREES
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.disagrees/certificate.json").is_file()


def test_files_that_transformers_cannot_open_fail_the_export(
    hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("transformers")
    change_before_verification(monkeypatch, in_weights(lambda t: t.pop("model.norm.weight")))
    words = ["export", str(hf_llama), "--format", "hf", "--out", str(tmp_path / "out")]
    result = run_json(capsys, *words, code=1)
    assert result["verdict"] == DISAGREES
    assert "model.norm.weight" in result["refusal"]
    assert not (tmp_path / "out").exists()


# What the worker does instead of loading the library, and the message.
UNABLE: dict[str, tuple[str, str]] = {
    "it lacks a package": ("raise ImportError('no module there')", "ImportError: no module there"),
    "it is killed": ("import os; os.kill(os.getpid(), 9)", "transformers was killed by signal 9"),
}


@pytest.mark.parametrize("case", UNABLE)
def test_a_worker_that_cannot_run_verifies_nothing(
    case: str, hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The worker reports nothing about the files, which keep their name."""
    pytest.importorskip("transformers")
    source = Path(verification.__file__).with_name("verification_worker.py").read_text()
    line, message = UNABLE[case]
    broken = source.replace("import transformers  # noqa: F401", line)
    assert broken != source
    (tmp_path / "verification_worker.py").write_text(broken)
    monkeypatch.setattr(verification, "__file__", str(tmp_path / "verification.py"))
    words = ["export", str(hf_llama), "--format", "hf", "--out", str(tmp_path / "out")]
    result = run_json(capsys, *words, code=2)
    assert result["verdict"] == NOT_VERIFIED
    assert message in result["unable"]
    assert json.loads((tmp_path / "out/certificate.json").read_text())["unable"] == result["unable"]
    assert main([*words[:-1], str(tmp_path / "other"), "--unverified"]) == 0


def test_numbers_that_are_not_finite_are_null_in_a_certificate(
    hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A huge perplexity is printed with an exponent, not with 300 digits."""
    pytest.importorskip("transformers")
    change = in_weights(lambda t: t["model.norm.weight"].mul_(1e30))
    change_before_verification(monkeypatch, change, n_rows=3)
    words = ["export", str(hf_llama), "--format", "hf", "--out", str(tmp_path / "out")]
    result = run_json(capsys, *words, code=1)
    text = (tmp_path / "out.disagrees/certificate.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["checks"]["logits"]["largest_difference"] is None
    assert content["checks"]["perplexity"]["theirs"] is None
    rows = verification.table(result)
    assert "not finite there" in rows[3][1]
    content["checks"]["perplexity"]["theirs"] = 1e300
    assert "1.000e+300 there" in verification.table(content)[3][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "has no text to score"),
        ("\n \n", "has no text to score"),
        (
            "中文字符",
            "the vocabulary of this model has no token of the text; name another text with --text",
        ),
    ],
)
def test_a_text_that_cannot_be_scored_is_rejected_before_anything_is_written(
    text: str | None, message: str, tmp_path: Path, capsys: Capture
) -> None:
    tokenizer = train_tokenizer(["some words and more"], name="characters", vocab_size=None)
    decoder = random_decoder(config_of("llama"), vocab_size=tokenizer.vocab_size)
    model = write_hf(tmp_path / "model", decoder, tokenizer)
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    out = tmp_path / "out" / "deep"
    words = ["export", str(model), "--format", "hf", "--out", str(out), "--text", str(file)]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_out_may_be_a_link_but_not_the_current_folder(
    hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-nothing").symlink_to("new")
    (tmp_path / "round").symlink_to("round")
    for name, at in {"to-empty": "empty", "to-nothing": "new"}.items():
        assert main(["import", str(hf_llama), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / at / "config.yaml").is_file()
    assert main(["import", str(hf_llama), "--out", str(tmp_path / "round")]) == 2
    assert "leads back to itself" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "", str(tmp_path / "here")):
        for words in (
            ["import", str(hf_llama)],
            ["export", str(hf_llama), "--format", "hf"],
        ):
            assert main([*words, "--out", name]) == 2
            assert (
                "is the current folder, which cannot be replaced; name a new folder"
                in capsys.readouterr().err
            )
    assert list(Path().iterdir()) == []
    # A name in the current folder is accepted like a path.
    assert main(["import", str(hf_llama), "--out", "model"]) == 0
    assert [p.name for p in Path().iterdir()] == ["model"]


def test_files_of_others_are_never_removed(
    hf_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "verify_export", lambda *_, **__: {"verdict": DISAGREES})
    monkeypatch.setattr(verification, "table", lambda _: [])
    names = [".out.work", "out.disagrees"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    words = ["export", str(hf_llama), "--format", "hf", "--out", str(tmp_path / "out")]
    assert main(words) == main(words) == 1
    assert all((tmp_path / name / "mine").is_file() for name in names)
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {*names, "out.disagrees-2", "out.disagrees-3"}
    assert (tmp_path / "out.disagrees-3" / "model.safetensors").is_file()


def test_two_exports_at_once_have_their_own_work_folders(tmp_path: Path) -> None:
    from pretrain.cli.out_folder import work_folder

    with work_folder(tmp_path / "out") as one, work_folder(tmp_path / "out") as other:
        assert one != other
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_full_disk_is_named_by_the_folder_on_it(tmp_path: Path) -> None:
    from pretrain.cli.out_folder import work_folder

    with pytest.raises(OSError, match="No space left") as raised, work_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as safetensors does
    assert raised.value.filename == str(tmp_path / "out")


def test_the_worker_never_imports_pretrain() -> None:
    source = (Path(verification.__file__).with_name("verification_worker.py")).read_text()
    assert "import pretrain" not in source
    assert "from pretrain" not in source
