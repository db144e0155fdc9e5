"""A model as lm-evaluation-harness calls it: its tasks, with our log-likelihoods and our generator.

Texts are cut into tokens as `pretrain evaluate` cuts them. `pretrain.cli.harness` opens the model
and registers it with the harness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from pretrain.evaluate.examples import cut_at_stop
from pretrain.evaluate.loglikelihood import encode_pair, rolling_pairs, score_pairs
from pretrain.evaluate.loss import Model
from pretrain.evaluate.run_tasks import continue_ids
from pretrain.generate.sampling import Sampling

# The harness' limit where a task gives none.
_DEFAULT_MAX_TOKENS = 256
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class LmEvalModel:
    """The interface of the harness' class LM. The `args` of a request are context and continuation
    of a likelihood, the text of a rolling likelihood, or prompt and settings of a generation."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

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
            options = {name: value for name, value in settings.items() if value is not None}
            until = options.pop("until", ())
            stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
            limits = [options.pop(name) for name in _MAX_TOKENS_KEYS if name in options]
            max_tokens = int(limits[0]) if limits else _DEFAULT_MAX_TOKENS
            temperature = float(options.pop("temperature", 0.0))
            is_random = options.pop("do_sample", temperature > 0)
            sampling = Sampling(
                temperature=temperature if is_random else 0.0,
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
