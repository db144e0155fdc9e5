"""Weights <-> other people's formats: transformers' directories, GGUF, llama2.c.

`layouts` and `architectures` hold the names, a table a family; `hugging_face`, `gguf` and `llama2c`
the files; `opening` finds out what a file is; `certificate` proves an export by another library,
which `witness.py` asks in a process of its own. `modeling_pretrain.py` travels with the weights
that transformers has no class for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.export.certificate import Exported, certify
    from pretrain.export.foreign import ForeignModel
    from pretrain.export.gguf import write_gguf
    from pretrain.export.hugging_face import write_hugging_face
    from pretrain.export.layouts import FormatError
    from pretrain.export.opening import open_foreign

__getattr__ = lazily(
    __name__,
    certificate="Exported certify",
    foreign="ForeignModel",
    gguf="write_gguf",
    hugging_face="write_hugging_face",
    layouts="FormatError",
    opening="open_foreign",
)
__all__ = [
    "Exported",
    "ForeignModel",
    "FormatError",
    "certify",
    "open_foreign",
    "write_gguf",
    "write_hugging_face",
]
