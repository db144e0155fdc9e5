"""A path -> the model in it, whichever other program wrote it."""

from __future__ import annotations

from pathlib import Path

from pretrain.export.imported import ImportedModel
from pretrain.export.layouts import FormatError


def import_model(path: Path, *, tokenizer: Path | None = None) -> ImportedModel:
    """A folder of transformers, a GGUF file, or a .bin of llama2.c (with its `tokenizer`).

    Raises FormatError for what is none of them, is damaged, or is another architecture.
    """
    from pretrain.export.llama2c import is_llama2c, open_llama2c

    if tokenizer is not None and not (path.is_file() and is_llama2c(path)):
        raise FormatError(f"--tokenizer is for a .bin of llama2.c; {path} is none, leave it out")
    if path.is_dir():
        from pretrain.export.hf import open_hugging_face

        _refuse_other_folders(path)
        return open_hugging_face(path)
    if not path.is_file():
        raise FormatError(f"there is no model at {path}")
    from pretrain.export.gguf import is_gguf, open_gguf

    if is_gguf(path):
        return open_gguf(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        raise FormatError(
            f"{path} is a pickle of PyTorch, which may run anything when it is opened; have the "
            "program that made it save safetensors"
        )
    if is_llama2c(path):
        return open_llama2c(path, tokenizer)
    raise FormatError(
        f"{path} is no model: neither a run directory, nor a folder of transformers, nor a GGUF "
        "file, nor one of llama2.c"
    )


def _refuse_other_folders(path: Path) -> None:
    """FormatError for a folder without config.json, with what it is instead."""
    if (path / "config.json").is_file():
        return
    if (path / "config.yaml").is_file() or (path / "manifest.json").is_file():
        raise FormatError(
            f"{path} is a run of this program or a checkpoint in one: a MODEL as it is, which "
            "needs no import"
        )
    files = sorted(p.name for end in ("*.gguf", "*.bin") for p in path.glob(end))
    instead = f"name the file in it: {', '.join(files[:5])}" if files else (
        "legal: config.json, model.safetensors and tokenizer.json in a folder, a GGUF file, or a "
        ".bin of llama2.c"
    )  # fmt: skip
    raise FormatError(f"{path} is no model of transformers: it has no config.json; {instead}")
