"""Hugging Face directories of random models, and changes that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.export import verification
from pretrain.export.hf import write_hugging_face
from pretrain.model.decoder import Decoder
from pretrain.tokenizer.tokenizer import Tokenizer


def write_hf(folder: Path, decoder: Decoder, tokenizer: Tokenizer, **options: Any) -> Path:
    folder.mkdir()
    write_hugging_face(folder, decoder=decoder, tokenizer=tokenizer, **options)
    return folder


def load_hf(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def run_json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """Run a command with --json and return what it printed."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def same_weights(one: Decoder, other: Decoder) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


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


def change_before_verification(
    monkeypatch: pytest.MonkeyPatch, change: Change, *, n_rows: int | None = None
) -> None:
    """Change the written files before another library reads them; keep some rows of its logits."""
    run_worker = verification._run_worker

    def run_on_changed_files(request: dict[str, Any]) -> Any:
        change(Path(request["path"]))
        answer: dict[str, Any] = run_worker(request)
        return answer if n_rows is None else {**answer, "logits": answer["logits"][:n_rows]}

    monkeypatch.setattr(verification, "_run_worker", run_on_changed_files)
