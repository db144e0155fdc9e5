"""lm-evaluation-harness with our models in it: its command, its tasks, our scorer and generator.

python -m pretrain.cli.harness --model pretrain --model_args pretrained=runs/english-1 --tasks piqa

What its tasks ask of a model comes in, and what evaluate and generate say of it goes out, texts cut
into tokens as `pretrain evaluate` cuts them. It finds models in its registry alone, so its command
is started here, with `pretrain` in it. A setting of generation that we do not have is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pretrain.cli import scoring
from pretrain.distributed import yield_idle_cores

# What it writes at most where a task does not say.
_MAX_TOKENS = 256
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel:
    """A model as lm-evaluation-harness asks one. Each request has `args`: of the two texts of a
    likelihood, of the one of a rolling likelihood, of a prompt and how to write on.

    `pretrained` is anything that `pretrain evaluate` opens; `start_of_text` is evaluate's option.
    The sizes of batches are taken and not used: rows are filled up by their tokens.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        start_of_text: str = "model",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if start_of_text not in scoring.STARTS:
            legal = ", ".join(scoring.STARTS)
            raise ValueError(f"start_of_text is {start_of_text!r}; legal: {legal}")
        device = (device or "auto").removesuffix(":0")
        asked = argparse.Namespace(device=device, start_of_text=start_of_text)
        self._model = scoring.open_scored(str(pretrained), asked)
        self._window: int = self._model.decoder.config.window_tokens
        self._ends: dict[tuple[str, ...], set[int]] = {}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding writes it."""
        from pretrain.evaluate import encode_pair

        pairs = [encode_pair(self._model.tokenizer, *request.args) for request in requests]
        return [(-answer.nats, answer.is_greedy) for answer in self._scored(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of whole texts behind a start-of-text, in nats."""
        from pretrain.evaluate.loglikelihood import rolled

        tokenizer = self._model.tokenizer
        texts = [
            rolled(
                tokenizer.encode(request.args[0]).tolist(),
                start=tokenizer.start_of_text,
                context_length=self._window,
            )
            for request in requests
        ]
        answers = iter(self._scored([pair for text in texts for pair in text]))
        return [-sum(next(answers).nats for _ in text) for text in texts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each prompt, cut before the first of its `until`."""
        # A request that is repeated asks for another sample.
        asked: Counter[str] = Counter()
        written = []
        for request in requests:
            prompt, settings = request.args
            asked[prompt] += 1
            written.append(self._written(prompt, settings, seed=asked[prompt]))
        return written

    def get_model_info(self) -> dict[str, Any]:
        """What its results say of the model beside the arguments."""
        model = self._model
        return {
            "checkpoint": str(model.path),
            "precision": model.precision,
            "begins_texts": model.tokenizer.add_bos,
        }

    def _scored(self, pairs: Sequence[Any]) -> list[Any]:
        from pretrain.evaluate import score_pairs

        model = self._model
        return score_pairs(model.decoder, pairs, world=model.world, precision=model.precision)

    def _written(self, prompt: str, settings: Mapping[str, Any], *, seed: int) -> str:
        from pretrain.evaluate.run_tasks import cut_before, ends_of
        from pretrain.generate import Sampling, generate_ids

        stops, max_tokens, how = _read_settings(settings)
        model, tokenizer = self._model, self._model.tokenizer
        if stops not in self._ends:
            self._ends[stops] = ends_of(tokenizer, stops)
        # What is written has room in the window, where there is as much of it, as there.
        room = self._window - max_tokens if max_tokens < self._window else self._window // 2
        before = tokenizer.encode_prompt(prompt)[-max(1, room) :]
        with model.world.autocast(model.precision):
            (ids,) = generate_ids(
                model.decoder,
                before,
                max_tokens=max_tokens,
                sampling=Sampling(**how, seed=seed),
                stop_ids=self._ends[stops],
            )
        return cut_before(tokenizer.decode_after(before, ids), stops)


def _read_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """Stops, most tokens, and what Sampling takes. ValueError for a setting that is not ours."""
    given = {name: value for name, value in settings.items() if value is not None}
    until = given.pop("until", ())
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    counts = [given.pop(name) for name in _COUNTS if name in given]
    temperature = float(given.pop("temperature", 0.0))
    draws = given.pop("do_sample", temperature > 0)
    how: dict[str, Any] = {name: given.pop(name) for name in ("top_k", "top_p") if name in given}
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be asked of our generator; legal: until, do_sample, "
            f"temperature, top_k, top_p, {', '.join(_COUNTS)}"
        )
    how["temperature"] = temperature if draws else 0.0
    return stops, int(counts[0]) if counts else _MAX_TOKENS, how


@cache
def register() -> type[HarnessModel]:
    """Make `pretrain` a model of lm-evaluation-harness; returns its class. ValueError where that is
    not installed."""
    from pretrain import missing_package

    try:
        # It fills its registry when it finds it empty: theirs come first, or stay away.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise missing_package("pretrain.cli.harness", "lm_eval", extra="harness") from error
    theirs: type[HarnessModel] = type("PretrainModel", (HarnessModel, LM), {})
    register_model("pretrain")(theirs)
    return theirs


def main() -> int:
    """Their command, on the words of ours; returns the exit code."""
    yield_idle_cores()
    try:
        register()
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
