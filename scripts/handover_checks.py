"""One tool that comes after pre-training, asked about one exported model: scripts/handover.py runs
this in the tool's environment. The last line that is printed is `RESULT` and a few words.

    python handover_checks.py TOOL FAMILY WORK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOOL, FAMILY, WORK = sys.argv[1], sys.argv[2], Path(sys.argv[3])
MODELS, SCRATCH = WORK / "models", WORK / "scratch" / f"{TOOL}-{FAMILY}"
FOLDER = str(MODELS / f"{FAMILY}-hf")
ANSWERS = json.loads((WORK / "answers.json").read_text())[FAMILY]
N_NEW = 30
TRUST = {"trust_remote_code": True} if FAMILY == "fast" else {}


def until_end(tokens: list[int]) -> list[int]:
    """The tokens before the first end-of-text: not all tools stop there."""
    end = ANSWERS["end"]
    return tokens[: tokens.index(end)] if end in tokens else tokens


def result(continuations: list[list[int]]) -> str:
    """How many of the four continuations are ours."""
    expected = [row["tokens"] for row in ANSWERS["rows"]]
    pairs = zip(expected, continuations, strict=True)
    n = sum(until_end(list(ours)) == until_end(list(theirs)) for ours, theirs in pairs)
    return "equal" if n == len(expected) else f"{n} of {len(expected)} continuations are equal"


def load() -> tuple[Any, Any]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, **TRUST)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, **TRUST).eval()
    return tokenizer, model


def continued(tokenizer: Any, model: Any) -> str:
    """As people write it: all that the tokenizer returns goes to generate."""
    found = []
    for row in ANSWERS["rows"]:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return result(found)


def check_transformers() -> str:
    import transformers

    tokenizer, model = load()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    pipeline("the ship", do_sample=False)  # with its default length
    model.save_pretrained(SCRATCH)
    tokenizer.save_pretrained(SCRATCH)
    again = transformers.AutoModelForCausalLM.from_pretrained(SCRATCH, **TRUST).eval()
    one, other = continued(tokenizer, model), continued(tokenizer, again)
    return one if one == other else f"{one}; saved again: {other}"


def check_peft() -> str:
    """LoRA on all linear layers, and on the head by itself; merged, saved, loaded."""
    import peft
    import torch

    head = "head" if FAMILY == "fast" else "lm_head"
    ids = torch.tensor([row["ids"] + row["tokens"] for row in ANSWERS["rows"]][:1])
    notes = []
    # GPT-2's head is its embedding, which the merge would change too (peft warns).
    for target in ("all-linear", *([] if FAMILY == "gpt2" else [[head]])):
        _, model = load()
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=target, r=2)
        adapted = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        moved = [p for n, p in adapted.named_parameters() if "lora_B" in n and bool(p.any())]
        n_adapted = sum("lora_B" in n for n, _ in adapted.named_parameters())
        notes.append(f"{len(moved)} of {n_adapted} adapters learn")
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        difference = float((merged(input_ids=ids).logits - expected).abs().max())
        if difference > 1e-4:
            notes.append(f"merged: {difference:.1e} off")
    learned = all(note.split()[0] == note.split()[2] for note in notes)
    return "equal" if learned else "; ".join(notes)


def check_trl() -> str:
    """Plain text must learn to end; packed rows must train."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": ["the ship and the sea."] * 16})
    shared: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no"}
    shared |= {"max_length": 64, "model_init_kwargs": TRUST or None, "disable_tqdm": True}
    notes = []
    for packing in (False, True):
        steps = 3 if packing else 60
        config = SFTConfig(
            str(SCRATCH), packing=packing, max_steps=steps, learning_rate=1e-3, bf16=False, **shared
        )
        trainer = SFTTrainer(FOLDER, args=config, train_dataset=data)
        trainer.train()
        if not packing:
            tokenizer, model = trainer.processing_class, trainer.model.eval()
            inputs = tokenizer("the ship", return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
            if out[-1] != ANSWERS["end"]:
                notes.append("never learns to end")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        if losses and not torch.tensor(losses).isfinite().all():
            notes.append("a loss is not finite")
    return "; ".join(notes) or "trains, packed too, and learns to end"


def check_torchao() -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    tokenizer, model = load()
    quantize_(model, Int8WeightOnlyConfig())
    return f"int8: {continued(tokenizer, model)}"


def check_mergekit() -> str:
    """A linear merge of a model with its copy is that model."""
    import shutil
    import subprocess

    import transformers

    shutil.copytree(FOLDER, SCRATCH / "copy", dirs_exist_ok=True)
    weight = "    parameters:\n      weight: 0.5\n"
    parts = [f"  - model: {folder}\n{weight}" for folder in (FOLDER, SCRATCH / "copy")]
    (SCRATCH / "merge.yml").write_text(
        f"models:\n{parts[0]}{parts[1]}merge_method: linear\ndtype: float32\n"
    )
    tool = Path(sys.executable).with_name("mergekit-yaml")
    command = [str(tool), str(SCRATCH / "merge.yml"), str(SCRATCH / "out")]
    command += ["--trust-remote-code"] if TRUST else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, **TRUST)
    model = transformers.AutoModelForCausalLM.from_pretrained(SCRATCH / "out", **TRUST).eval()
    return continued(tokenizer, model)


def check_lm_eval() -> str:
    """log p of our continuations, against transformers' own."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = load()
    judge = HFLM(FOLDER, device="cpu", dtype="float32", trust_remote_code=bool(TRUST))
    requests, expected = [], []
    for row in ANSWERS["rows"]:
        context, text = row["prompt"].rstrip(), " and the sea"
        requests.append(Instance("loglikelihood", {}, (context, text), 0))
        n, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text)["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0, n - 1 : -1].log_softmax(-1)
        expected.append(float(log_p.gather(1, torch.tensor(ids[n:])[:, None]).sum()))
    found = [log_p for log_p, _ in judge.loglikelihood(requests)]
    off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return "equal" if off < 1e-3 else f"log p {off:.1e} off"


def check_onnx() -> str:
    """torch.onnx's exporter, logits in onnxruntime."""
    import onnxruntime
    import torch

    _, model = load()
    model.config.use_cache = False
    SCRATCH.mkdir(parents=True, exist_ok=True)
    file, ids = SCRATCH / "model.onnx", torch.tensor([ANSWERS["rows"][0]["ids"] * 2])

    class Logits(torch.nn.Module):
        def forward(self, input_ids: Any) -> Any:
            return model(input_ids=input_ids, use_cache=False).logits

    try:
        torch.onnx.export(
            Logits().eval(), (ids,), str(file), input_names=["input_ids"], dynamo=True
        )
    except Exception as error:  # its reason is in the error before it
        raise RuntimeError(str(error.__cause__ or error).partition("\n")[0]) from None
    found = onnxruntime.InferenceSession(str(file)).run(None, {"input_ids": ids.numpy()})[0]
    off = float((torch.from_numpy(found) - model(ids).logits).abs().max())
    return "equal" if off < 1e-3 else f"logits {off:.1e} off"


def check_optimum() -> str:
    from optimum.onnxruntime import ORTModelForCausalLM

    tokenizer, _ = load()
    return continued(tokenizer, ORTModelForCausalLM.from_pretrained(FOLDER, export=True, **TRUST))


def check_transformers_js() -> str:
    """The ONNX of optimum in node; pipelines of transformers.js return text and no ids."""
    import subprocess

    tool = Path(sys.executable).with_name("optimum-cli")
    task = ["--task", "text-generation-with-past", *(["--trust-remote-code"] if TRUST else [])]
    export = [str(tool), "export", "onnx", "--model", FOLDER, *task, str(SCRATCH / "onnx")]
    done = subprocess.run(export, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    for file in Path(FOLDER).glob("*.json"):  # optimum's transformers writes its own again
        (SCRATCH / file.name).write_bytes(file.read_bytes())
    words = [str(SCRATCH), str(WORK / "answers.json"), FAMILY]
    return in_node("@huggingface/transformers@4.3.2", "handover_checks.mjs", *words)


def in_node(package: str, script: str, *words: str) -> str:
    """The last line that a script of this folder prints in node, with a package from npm."""
    import subprocess

    folder = WORK / "environments/node"
    folder.mkdir(parents=True, exist_ok=True)
    # Install scripts fetch runtimes for GPUs, or compile.
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    copy = folder / script
    copy.write_bytes(Path(__file__).with_name(script).read_bytes())
    done = subprocess.run(["node", str(copy), *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-1]


def check_genai() -> str:
    """The builder of onnxruntime-genai, and its text without and with a start token."""
    import subprocess

    import onnxruntime_genai as genai

    build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", FOLDER, "-e", "cpu"]
    build += ["-o", str(SCRATCH), "-p", "fp32", "-c", str(SCRATCH / "cache")]
    build += ["--extra_options", "hf_remote=true"] if TRUST else []
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    # transformers 5, which the builder saves the tokenizer by, leaves add_bos_token out; then an
    # end is put after each prompt.
    config = Path(FOLDER, "tokenizer_config.json")
    (SCRATCH / config.name).write_bytes(config.read_bytes())
    model, found = genai.Model(str(SCRATCH)), []
    tokenizer = genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    for row in ANSWERS["rows"]:
        ids = tokenizer.encode(row["prompt"])
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + N_NEW, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < N_NEW:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        found.append(tokens)
    return result(found)


def check_openvino() -> str:
    from optimum.intel import OVModelForCausalLM

    tokenizer, _ = load()
    # By default keys, values and activations have 8 bits.
    exact = {
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = OVModelForCausalLM.from_pretrained(FOLDER, export=True, ov_config=exact, **TRUST)
    return continued(tokenizer, model)


def check_ctranslate2() -> str:
    import ctranslate2

    tokenizer, _ = load()
    converter = ctranslate2.converters.TransformersConverter(FOLDER, trust_remote_code=bool(TRUST))
    converter.convert(str(SCRATCH), force=True)
    generator, found = ctranslate2.Generator(str(SCRATCH), device="cpu"), []
    for row in ANSWERS["rows"]:
        tokens = tokenizer.convert_ids_to_tokens(row["ids"])
        options = {"max_length": N_NEW, "include_prompt_in_result": False, "end_token": []}
        answer = generator.generate_batch([tokens], sampling_topk=1, **options)[0]
        found.append(answer.sequences_ids[0])
    return result(found)


def check_mlx() -> str:
    import mlx.core as mx
    from mlx_lm import load as load_mlx

    model, _ = load_mlx(FOLDER)
    found = []
    for row in ANSWERS["rows"]:
        ids = list(row["ids"])
        for _ in range(N_NEW):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
        found.append(ids[len(row["ids"]) :])
    return result(found)


def check_llama_cpp() -> str:
    """GGUF in llama.cpp, of which node's package brings a build."""
    if FAMILY == "fast":
        return "no GGUF"
    file = MODELS / f"{FAMILY}-gguf" / "model.gguf"
    words = [str(file), str(WORK / "answers.json"), FAMILY, str(N_NEW)]
    return result(json.loads(in_node("node-llama-cpp@3.22.1", "handover_llama_cpp.mjs", *words)))


def check_vllm() -> str:
    from vllm import LLM, SamplingParams

    model = LLM(FOLDER, dtype="float32", enforce_eager=True, **TRUST)
    options = SamplingParams(temperature=0.0, max_tokens=N_NEW, ignore_eos=True)
    answers = model.generate([row["prompt"] for row in ANSWERS["rows"]], options)
    return result([list(answer.outputs[0].token_ids) for answer in answers])


CHECKS = {
    "transformers": check_transformers,
    "transformers-4": check_transformers,
    "peft": check_peft,
    "trl": check_trl,
    "torchao": check_torchao,
    "mergekit": check_mergekit,
    "lm-eval": check_lm_eval,
    "onnx": check_onnx,
    "optimum": check_optimum,
    "transformers.js": check_transformers_js,
    "genai": check_genai,
    "openvino": check_openvino,
    "ctranslate2": check_ctranslate2,
    "mlx": check_mlx,
    "llama.cpp": check_llama_cpp,
    "vllm": check_vllm,
}

if __name__ == "__main__":
    print("RESULT", CHECKS[TOOL]())
