"""Weights <-> other programs' formats: Hugging Face directories, GGUF, llama2.c.

`families` is the table of the names that other programs use for each family; `layouts` and
`hf_config` convert tensors and configs by it; `hf`, `gguf` and `llama2c` read and write the files;
`importing` opens any of them. `verification` checks an export with another library, which
`verification_worker.py` loads in its own process. `modeling_pretrain.py` is shipped with the
weights that transformers has no class for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.export.gguf import write_gguf
    from pretrain.export.hf import write_hugging_face
    from pretrain.export.imported import ImportedModel
    from pretrain.export.importing import import_model
    from pretrain.export.layouts import FormatError
    from pretrain.export.verification import Exported, verify_export

__getattr__ = lazily(
    __name__,
    gguf="write_gguf",
    hf="write_hugging_face",
    imported="ImportedModel",
    importing="import_model",
    layouts="FormatError",
    verification="Exported verify_export",
)
__all__ = [
    "Exported",
    "FormatError",
    "ImportedModel",
    "import_model",
    "verify_export",
    "write_gguf",
    "write_hugging_face",
]
