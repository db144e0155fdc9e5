"""Verify an export: another library must compute from the files what the model computes here.

The files are loaded by `verification_worker.py` in a fresh process that does not import this
package. Compared are logits, a greedy continuation, the ids of difficult texts, the perplexity of a
text, and (of transformers) a call with all that the tokenizer returns. The verdict is `agrees`,
`disagrees`, or, if no other library is installed or it does not run, `not verified`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain import __version__
from pretrain.evaluate.loss import Score
from pretrain.export.families import is_native
from pretrain.export.verification_worker import CANNOT_RUN
from pretrain.fileio import file_sha256, read_json
from pretrain.model.decoder import Decoder
from pretrain.rng import uniform
from pretrain.tokenizer.tokenizer import Tokenizer

FILE_NAME = "certificate.json"
AGREES, DISAGREES, NOT_VERIFIED = "agrees", "disagrees", "not verified"

# Largest difference of a logit, times a tenth of the largest logit if that is above 1: the order of
# rounding differs. llama.cpp also rounds the activations for f16 and q8_0 weights.
_TRANSFORMERS_TOLERANCE = 1e-4
_LLAMA_CPP_TOLERANCES = {"f32": 2e-3, "f16": 2e-2, "q8_0": 1.0}
# llama.cpp reads GELU from a float16 table.
_GELU_TOLERANCE = 1e-2
# Largest mean KL divergence in nats. For q8_0 in llama.cpp, whose activations have 8 bits too, this
# is the test that decides.
_MAX_DIVERGENCE = 5e-3
_MAX_LOGITS = 1 << 23
_MAX_FIXED_POINT = 1e7  # larger numbers are shown with an exponent
_N_ROWS = 4
_MAX_ROW_TOKENS = 128
_NEW_TOKENS = 100
_PROMPT_TOKENS = 8

# An example of everything that tokenizers treat differently; the special token's name is text.
TEXTS = (
    "The capital of France is Paris.",
    "  two spaces, a tab\t, lines\n\n\r\n and the end ",
    "it's 1234567 or 3.14159; x_1 = f(y) // ok? [[a]] {b} <c>",
    "été Straße ÆØÅ naïve coöperate",
    "中文字符 日本語 한국어 नमस्ते שלום العربية กรุงเทพ",
    "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f469\u200d\U0001f680 \u00a0\u200b\u2028 \ufffd",
    "<|endoftext|> </s> [INST] are text",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          zzzz",
    "the house\n  ",
)


@dataclass(frozen=True, slots=True)
class Exported:
    """Exported files, and a model with exactly the numbers in them."""

    path: Path
    """The folder, or the .gguf file."""
    format: str
    numbers: str
    decoder: Decoder
    tokenizer: Tokenizer


def verification_library(format: str) -> str | None:
    """The library that reads the format, or None if it is not installed."""
    name = {"hf": "transformers", "gguf": "llama_cpp"}[format]
    return name if importlib.util.find_spec(name) is not None else None


def verify_export(
    exported: Exported, text: str, score: Score, *, threads: int = 1
) -> dict[str, Any]:
    """Compare the files in another library with the model; `score` is the model's score of `text`.
    Returns the content of certificate.json."""
    folder = exported.path if exported.path.is_dir() else exported.path.parent
    content: dict[str, Any] = {
        "verdict": NOT_VERIFIED,
        "pretrain": __version__,
        "format": exported.format,
        "numbers": exported.numbers,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "files": checksums(folder),
    }
    library = verification_library(exported.format)
    if library is None:
        return content
    request = make_request(exported, text, library=library, threads=threads)
    answer = _run_worker(request)
    if "logits" not in answer:
        return {**content, "library": library, **answer}
    checks = {
        "logits": _compare_logits(exported, request, answer["logits"]),
        "greedy": _compare_greedy(exported, request, answer["greedy"]),
        "tokenizer": _compare_ids(exported.tokenizer, request["texts"], answer),
        "perplexity": _compare_scores(exported, score, answer),
    }
    if "usual_call" in answer:
        is_equal = answer["usual_call"] <= checks["logits"]["tolerance"]
        checks["usual_call"] = {**_verdict(is_equal), "largest_difference": answer["usual_call"]}
    agrees = all(check["verdict"] == AGREES for check in checks.values())
    return {**content, **_verdict(agrees), "library": answer["library"], "checks": checks}


def _verdict(agrees: bool) -> dict[str, Any]:
    return {"verdict": AGREES if agrees else DISAGREES}


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of an export."""
    content = {}
    for path in sorted(folder.iterdir()):
        if path.name != FILE_NAME and path.is_file():
            content[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return content


def table(certificate: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows to print: what was compared, the result, and the verdict."""
    checks = certificate.get("checks")
    if "refusal" in certificate:
        return [("opening", certificate["refusal"], DISAGREES)]
    if checks is None:
        reason = certificate.get("unable", "no library that reads the format is installed")
        return [("anything", reason, NOT_VERIFIED)]
    logits, greedy = checks["logits"], checks["greedy"]
    ids, scores = checks["tokenizer"], checks["perplexity"]
    results = {
        "logits": f"largest difference {_shown(logits['largest_difference'], '.1e')} (at most "
        f"{_shown(logits['tolerance'], '.1e')}) at {logits['positions']} positions",
        "greedy": f"{greedy['equal']} of {greedy['tokens']} tokens in a row are the same",
        "tokenizer": f"{ids['equal']} of {ids['texts']} texts are encoded and decoded equally",
        "perplexity": f"{_shown(scores['ours'])} here, {_shown(scores['theirs'])} there, on "
        f"{scores['tokens']:,} tokens",
        "usual_call": "model(**tokenizer(text)) gives the logits of the ids alone",
    }
    return [(name, results[name], checks[name]["verdict"]) for name in checks]


def _shown(number: float | None, form: str = ".4f") -> str:
    if number is None or not math.isfinite(number):  # JSON has null for it
        return "not finite"
    return format(number, form if abs(number) < _MAX_FIXED_POINT else ".3e")


def make_request(exported: Exported, text: str, *, library: str, threads: int) -> dict[str, Any]:
    """What the worker computes: the content of request.json."""
    config, tokenizer = exported.decoder.config, exported.tokenizer
    context = config.window_tokens
    length = max(1, min(_MAX_ROW_TOKENS, context, _MAX_LOGITS // tokenizer.vocab_size // _N_ROWS))
    start = tokenizer.encode_prompt(text)
    # The text itself, and ids from all over the vocabulary.
    index = torch.arange((_N_ROWS - 1) * length)
    scattered = (uniform(1, "certificate", index) * tokenizer.vocab_size).long()
    prompt = start[: max(1, min(_PROMPT_TOKENS, context // 2))]
    added = [t["content"] for t in tokenizer.description["added_tokens"] if not t["special"]]
    texts = []
    for hard in (*TEXTS, *(f"a {name} b" for name in added)):
        with suppress(ValueError):  # a vocabulary of characters cannot encode it
            tokenizer.encode(hard)
            texts.append(hard)
    return {
        "library": library,
        "path": str(exported.path.resolve()),
        "own_code": exported.format == "hf" and not is_native(config),
        "threads": threads,
        "context": context,
        "rows": [(start * length)[:length], *scattered.view(-1, length).tolist()],
        "texts": texts or [text[:200]],
        "start": tokenizer.start_of_text,
        "scored_text": text,
        "prompt": prompt,
        "new_tokens": max(1, min(_NEW_TOKENS, context - len(prompt))),
    }


def _run_worker(request: dict[str, Any]) -> dict[str, Any]:
    worker = Path(__file__).with_name("verification_worker.py")
    with tempfile.TemporaryDirectory(prefix="pretrain-certificate-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: do not import modules from the script's folder, which belongs to this package.
        command = [sys.executable, "-P", str(worker), name]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            logits = np.load(folder / "logits.npy", allow_pickle=False)
            return {**read_json(folder / "answer.json"), "logits": logits}
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]
    if done.returncode < 0:
        last = f"{request['library']} was killed by signal {-done.returncode}: {last}"
    if done.returncode < 0 or done.returncode == CANNOT_RUN:
        return {"unable": last}
    return {"verdict": DISAGREES, "refusal": last}


@torch.no_grad()
def _logits(decoder: Decoder, rows: list[list[int]]) -> torch.Tensor:
    ids = torch.tensor(rows, device=decoder.device)
    return decoder.logits(decoder.forward(ids)).float().cpu()


def _compare_logits(
    exported: Exported, request: dict[str, Any], library_logits: Any
) -> dict[str, Any]:
    logits = _logits(exported.decoder, request["rows"])
    other = torch.from_numpy(np.array(library_logits, np.float32))
    difference = divergence = math.inf
    if other.shape == logits.shape:
        difference = float((logits - other).abs().max())
        log_p, log_q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    tolerance = _tolerance(exported, request["library"], logits)
    return {
        **_verdict(difference <= tolerance and divergence <= _MAX_DIVERGENCE),
        "largest_difference": difference,
        "tolerance": tolerance,
        "positions": logits[..., 0].numel(),
        "mean_divergence_nats": divergence,
    }


def _tolerance(exported: Exported, library: str, logits: torch.Tensor) -> float:
    least = _TRANSFORMERS_TOLERANCE
    if library == "llama_cpp":
        least = _LLAMA_CPP_TOLERANCES[exported.numbers]
        if exported.decoder.config.feed_forward == "gelu":
            least = max(least, _GELU_TOLERANCE)
    return least * max(1.0, float(logits.abs().max()) / 10)


def _compare_greedy(
    exported: Exported, request: dict[str, Any], generated: list[int]
) -> dict[str, Any]:
    """Each token of the library's continuation must be our most probable one after those before it,
    or within the tolerance of it."""
    prompt, n = request["prompt"], request["new_tokens"]
    logits = _logits(exported.decoder, [prompt + generated[:-1]])[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
    tolerance = 2 * _tolerance(exported, request["library"], logits)
    is_right = (logits.amax(-1) - chosen <= tolerance).tolist()
    equal = [*is_right, False].index(False)
    return {**_verdict(equal == len(generated) == n), "equal": equal, "tokens": n}


def _compare_ids(tokenizer: Tokenizer, texts: list[str], answer: dict[str, Any]) -> dict[str, Any]:
    wrong = []
    rows = zip(texts, answer["ids"], answer["prompts"], answer["decoded"], strict=True)
    for text, library_ids, prompt, decoded in rows:
        ids = tokenizer.encode(text).tolist()
        expected = tokenizer.decode(ids)
        if tokenizer.kind == "gpt":  # its ids do not have the number of spaces
            decoded, expected = "".join(decoded.split()), "".join(expected.split())
        # llama.cpp keeps the space that SentencePiece puts before a text.
        accepted = {expected, f" {expected}"} if tokenizer.space_prefix else {expected}
        same_ids = library_ids == ids and prompt == tokenizer.encode_prompt(text)
        if not same_ids or decoded not in accepted:
            both = {"text": text, "ours": ids, "theirs": library_ids}
            wrong.append({**both, "decoded": decoded, "their_prompt": prompt})
    n_equal = len(texts) - len(wrong)
    return {**_verdict(not wrong), "equal": n_equal, "texts": len(texts), "wrong": wrong}


def _compare_scores(exported: Exported, score: Score, answer: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = score.nats_per_token, math.inf
    if answer["nats"] is not None:
        theirs = answer["nats"] / max(1, answer["tokens"])
    tolerance = 10 * _MAX_DIVERGENCE if exported.numbers == "q8_0" else 1e-4 * max(1.0, ours)
    return {
        **_verdict(score.tokens == answer["tokens"] and abs(theirs - ours) <= tolerance),
        "ours": _perplexity(ours),
        "theirs": _perplexity(theirs),
        "nats_per_token": [ours, theirs],
        "tokens": score.tokens,
    }


def _perplexity(nats_per_token: float) -> float:
    # Infinite beyond the range of a float, and for NaN.
    return math.exp(nats_per_token) if nats_per_token < 700.0 else math.inf
