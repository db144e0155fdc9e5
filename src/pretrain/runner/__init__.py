"""A request -> a running loop, and MODEL -> a loaded model: what is above `train` and below `cli`.

`request` turns a target and settings into a config and a folder; `launch` starts or joins
processes; `text` opens the prepared text; `open` loads a model for use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import lazily

if TYPE_CHECKING:
    from pretrain.runner.open import LoadedModel, load_model

__getattr__ = lazily(__name__, open="LoadedModel load_model")
__all__ = ["LoadedModel", "load_model"]
