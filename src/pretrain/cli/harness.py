"""Start lm-evaluation-harness with our models in it.

python -m pretrain.cli.harness --model pretrain --model_args pretrained=runs/english-1 --tasks piqa

The harness finds models only in its registry, so its command is started here, with `pretrain`
registered.
"""

from __future__ import annotations

import sys
from functools import cache

from pretrain import needs_package
from pretrain.cli.output import Output
from pretrain.cli.scoring import STARTS, open_scored
from pretrain.evaluate.lm_eval import LmEvalModel
from pretrain.machine import yield_idle_cores


class HarnessModel(LmEvalModel):
    """The model `pretrain` of the harness: `pretrained` is anything that `pretrain evaluate` opens,
    and `start_of_text` is its option. Batch sizes are ignored: rows are filled by tokens."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        start_of_text: str = "model",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if start_of_text not in STARTS:
            raise ValueError(
                f"start_of_text must be one of {', '.join(STARTS)} (got {start_of_text!r})"
            )
        device = (device or "auto").removesuffix(":0")
        super().__init__(open_scored(str(pretrained), device=device, start_of_text=start_of_text))


@cache
def register() -> type[HarnessModel]:
    """Register `pretrain` as a model of the harness and return its class. ValueError if the harness
    is not installed."""
    with needs_package("pretrain.cli.harness", "lm_eval", extra="harness"):
        # The harness fills its registry only while that is empty, so its own models come first.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    model_class: type[HarnessModel] = type("PretrainModel", (HarnessModel, LM), {})
    register_model("pretrain")(model_class)
    return model_class


def main() -> int:
    """Run the harness' command on our arguments; returns the exit code."""
    yield_idle_cores()
    try:
        register()
    except ValueError as error:
        Output(json=False).fail(str(error), 2)
        return 2
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
