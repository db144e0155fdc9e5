"""A path -> the model in it, whichever other program wrote it."""

from __future__ import annotations

from pathlib import Path

from pretrain.export.layouts import FormatError, ImportedModel
from pretrain.fileio import check_not_pointer, file_sha256, read_json

_MODELS = (
    "a model must be a folder with config.json, model.safetensors and tokenizer.json, a GGUF file, "
    "or a .bin of llama2.c; one of the Hugging Face Hub must be downloaded first (hf download NAME "
    "--local-dir DIR)"
)


def import_model(path: Path, *, tokenizer: Path | None = None) -> ImportedModel:
    """Open a Hugging Face directory, a GGUF file, or a .bin of llama2.c (with its `tokenizer`).

    FormatError for another kind of file, a damaged file, another architecture, or a file that was
    changed since it was exported here; ValueError for a pointer of Git LFS.
    """
    from pretrain.export.gguf import open_gguf
    from pretrain.export.hf import open_hugging_face
    from pretrain.export.llama2c import is_llama2c, open_llama2c

    if tokenizer is not None and not (path.is_file() and is_llama2c(path)):
        raise FormatError(f"--tokenizer is only for a .bin of llama2.c, which {path} is not")
    if (path / "adapter_config.json").is_file():
        raise FormatError(
            f"{path} is an adapter, which needs another model; merge the two first "
            "(merge_and_unload of peft), save the model, and import that folder"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "config.yaml").is_file() or (path / "manifest.json").is_file():
            raise FormatError(
                f"{path} is a run or a checkpoint of pretrain, which needs no import: use it as "
                "MODEL"
            )
        files = sorted(p.name for pattern in ("*.gguf", "*.bin") for p in path.glob(pattern))
        advice = f"name the file in it: {', '.join(files[:5])}" if files else _MODELS
        raise FormatError(f"{path} is not a Hugging Face folder: it has no config.json; {advice}")
    _check_certificate(path)
    if path.is_dir():
        return open_hugging_face(path)
    if not path.is_file():
        raise FormatError(f"there is no model at {path}; {_MODELS}")
    check_not_pointer(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return open_gguf(path)
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        raise FormatError(
            f"{path} is a pickle of PyTorch, which can run any code when it is opened; save the "
            "model as safetensors with the program that wrote it"
        )
    if is_llama2c(path):
        return open_llama2c(path, tokenizer)
    raise FormatError(f"{path} is not a model; {_MODELS}")


def _check_certificate(path: Path) -> None:
    """FormatError for files that are not those of the certificate.json next to them."""
    from pretrain.export.verification import FILE_NAME

    folder = path if path.is_dir() else path.parent
    if not (folder / FILE_NAME).is_file():
        return
    files = read_json(folder / FILE_NAME).get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        file = folder / name
        expected = entry.get("sha256") if isinstance(entry, dict) else None
        if path in (folder, file) and file.is_file() and expected not in (None, file_sha256(file)):
            raise FormatError(
                f"{file} was changed or damaged since it was exported: its SHA-256 must be that "
                f"in {FILE_NAME}; export the model again, or delete {FILE_NAME} if the change is "
                "yours"
            )
