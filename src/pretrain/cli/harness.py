"""Start lm-evaluation-harness with our models in it.

python -m pretrain.cli.harness --model pretrain --model_args pretrained=runs/english-1 --tasks piqa

The harness finds models only in its registry, so its command is started here, with `pretrain`
registered. Its tasks get our log-likelihoods and our generator, and texts are cut into tokens as
`pretrain evaluate` cuts them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

from pretrain import needs_package
from pretrain.cli.output import Output
from pretrain.cli.scoring import STARTS, open_scored
from pretrain.evaluate.examples import cut_at_stop
from pretrain.evaluate.loglikelihood import encode_pair, rolling_pairs, score_pairs
from pretrain.evaluate.run_tasks import continue_ids
from pretrain.generate.sampling import Sampling
from pretrain.machine import yield_idle_cores

# The harness' limit where a task gives none.
_DEFAULT_MAX_TOKENS = 256
# Settings that we do not have, with the values that change nothing: tasks of the harness have them.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_k": 0}
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel:
    """The model `pretrain` of the harness, with the interface of its class LM: the `args` of a
    request are context and continuation of a likelihood, the text of a rolling likelihood, or
    prompt and settings of a generation.

    `pretrained` is anything that `pretrain evaluate` opens, and `start_of_text` is its option.
    Batch sizes are ignored: rows are filled by tokens.
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
        if start_of_text not in STARTS:
            raise ValueError(
                f"start_of_text must be one of {', '.join(STARTS)} (got {start_of_text!r})"
            )
        super().__init__()
        device = (device or "auto").removesuffix(":0")
        self._model = open_scored(str(pretrained), device=device, start_of_text=start_of_text)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding generates it."""
        pairs = [encode_pair(self._model.tokenizer, *request.args) for request in requests]
        return [(-score.nats, score.is_greedy) for score in score_pairs(self._model, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of full texts after a start-of-text, in nats."""
        tokenizer = self._model.tokenizer
        pairs_of_texts = [
            rolling_pairs(
                tokenizer.encode(request.args[0]).tolist(),
                start=tokenizer.start_of_text,
                context_length=self._model.decoder.config.window_tokens,
            )
            for request in requests
        ]
        scores = iter(score_pairs(self._model, list(chain.from_iterable(pairs_of_texts))))
        return [-sum(next(scores).nats for _ in pairs) for pairs in pairs_of_texts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model generates after each prompt, cut at the first of its `until`. ValueError
        for a setting that we do not have."""
        # A repeated request asks for another sample, so it gets the next seed.
        n_seen: Counter[str] = Counter()
        tokenizer, context = self._model.tokenizer, self._model.decoder.config.window_tokens
        texts = []
        for request in requests:
            prompt, settings = request.args
            n_seen[prompt] += 1
            options = {k: v for k, v in settings.items() if v not in (None, _NEUTRAL.get(k))}
            until = options.pop("until", ())
            stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
            limits = [options.pop(name) for name in _MAX_TOKENS_KEYS if name in options]
            max_tokens = int(limits[0]) if limits else _DEFAULT_MAX_TOKENS
            is_random = options.pop("do_sample", None)
            temperature = float(options.pop("temperature", 1.0 if is_random else 0.0))
            sampling = Sampling(
                temperature=0.0 if is_random is False else temperature,
                top_k=options.pop("top_k", None),
                top_p=options.pop("top_p", None),
                seed=n_seen[prompt],
            )
            if options:
                raise ValueError(
                    "settings of a generation must be until, do_sample, temperature, top_k, top_p "
                    f"or one of {', '.join(_MAX_TOKENS_KEYS)} (got {', '.join(options)})"
                )
            # Leave max_tokens of the context for the completion, as the harness does.
            n_prompt = context - max_tokens if max_tokens < context else max(1, context // 2)
            before = tokenizer.encode_prompt(prompt)[-n_prompt:]
            ids = continue_ids(
                self._model, before, max_tokens=max_tokens, sampling=sampling, stops=stops
            )
            texts.append(cut_at_stop(tokenizer.decode_after(before, ids), stops))
        return texts


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
