"""The worker of `verification`: load exported files with another library and record its results.

It is run by its path in a fresh process and never imports pretrain, so that both sides are
independent. Its argument is a folder with request.json; it writes answer.json and logits.npy there.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

CANNOT_RUN = 69
"""The exit code if the library itself cannot be loaded, whatever the files are."""


class Transformers:
    """transformers: a model directory."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        # It copies the modelling file here, and not into the user's cache.
        transformers.dynamic_module_utils.HF_MODULES_CACHE = request["folder"]
        self.torch, self.version = torch, f"transformers {transformers.__version__}"
        torch.set_num_threads(request["threads"])
        # The trusted code is the file that was just written with the weights.
        options = {"local_files_only": True, "trust_remote_code": request["own_code"]}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        self.model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, **options, output_loading_info=True
        )
        wrong = {name: sorted(map(str, report[name])) for name in report if report[name]}
        if wrong:
            raise ValueError(f"the weights do not fit the model: {wrong}")
        # The argument for a type has had two names since transformers 4.50.
        self.model.eval().float()

    def encode(self, text: str, *, is_prompt: bool = False) -> list[int]:
        # As here, the name of a special token in a text is text.
        options = {"add_special_tokens": is_prompt, "split_special_tokens": True}
        return list(self.tokenizer(text, **options)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def logits(self, ids: list[int]) -> Any:
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()

    def usual_call(self, text: str) -> float:
        """Largest difference of a logit if the model gets everything that its tokenizer returns for
        a text, as in the first lines that people write, and not the ids alone."""
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True)
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
        with self.torch.no_grad():
            logits = self.model(**inputs).logits[0].float().numpy()
        return float(abs(logits - self.logits(inputs["input_ids"][0].tolist())).max())

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        ids = self.torch.tensor([prompt])
        generated = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=self.model.config.vocab_size + 1,
        )
        return list(generated[0, len(prompt) :].tolist())


class LlamaCpp:
    """llama.cpp itself, by its Python binding, with keys and values kept in float32."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=request["context"],
            n_batch=request["context"],
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            logits_all=True,
            verbose=False,
            type_k=0,
            type_v=0,
            flash_attn=False,
        )

    def encode(self, text: str, *, is_prompt: bool = False) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=is_prompt, special=False))

    def decode(self, ids: list[int]) -> str:
        return bytes(self.model.detokenize(ids)).decode("utf-8", "replace")

    def logits(self, ids: list[int]) -> Any:
        self.model.reset()
        self.model.eval(ids)
        return self.model.scores[: len(ids)].copy()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        self.model.reset()
        self.model.eval(prompt)
        generated: list[int] = []
        while len(generated) < n:
            generated.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(generated[-1:])
        return generated


def score(library: Any, ids: list[int], context: int) -> float:
    """Nats of ids 1, 2, ... in windows of `context` that do not overlap."""
    import numpy as np

    nats = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        logits = library.logits(window[:-1]).astype(np.float64)
        largest = logits.max(-1)
        total = np.log(np.exp(logits - largest[:, None]).sum(-1)) + largest
        nats += float((total - logits[np.arange(len(logits)), window[1:]]).sum())
    return nats


def main(folder: Path) -> None:
    import numpy as np

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    request["folder"] = str(folder)
    try:
        if request["library"] == "llama_cpp":
            import llama_cpp  # noqa: F401
        else:
            import transformers  # noqa: F401
    except Exception as error:  # one of its packages, or a system library, is missing
        raise ImportError(str(error)) from error
    kinds: dict[str, Any] = {"transformers": Transformers, "llama_cpp": LlamaCpp}
    library = kinds[request["library"]](Path(request["path"]), request)
    logits = np.stack([library.logits(row) for row in request["rows"]])
    encoded = [library.encode(text) for text in request["texts"]]
    ids = [request["start"], *library.encode(request["scored_text"])]
    nats = score(library, ids, request["context"])
    answer = {
        "library": library.version,
        "ids": encoded,
        "prompts": [library.encode(text, is_prompt=True) for text in request["texts"]],
        "decoded": [library.decode(ids) for ids in encoded],
        "greedy": library.greedy(request["prompt"], request["new_tokens"]),
        "nats": nats if math.isfinite(nats) else None,
        "tokens": len(ids) - 1,
    }
    if request["library"] == "transformers":
        answer["usual_call"] = library.usual_call(request["scored_text"][:200])
    assert "pretrain" not in sys.modules, "the export would be compared with our own code"
    try:
        (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        np.save(folder / "logits.npy", logits)
    except OSError as error:  # the disk is full, which says nothing about the files
        raise MemoryError(f"the answer cannot be written: {error}") from error


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (ImportError, MemoryError) as error:
        # The reason in one line on standard error is reported.
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=sys.stderr)
        sys.exit(CANNOT_RUN)
