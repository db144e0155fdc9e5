"""Run exported models in the tools that come after pre-training: the table of
docs/how-to/where-a-model-runs.md.

    python scripts/handover.py            every tool that was not asked at its version yet
    python scripts/handover.py peft trl   these again

A tiny model of each family is trained, exported and asked for its greedy continuations of four
prompts. Each tool is installed at the version below in an environment of its own, one after the
other (torch is this environment's), and asked for the same by scripts/handover_checks.py, which
does not import this package. Results are kept in .handover/results.json; a tool that cannot be
installed is "not run". Outside the tests: it downloads gigabytes.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from textwrap import shorten
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/how-to/where-a-model-runs.md"
WORK = Path(os.environ.get("HANDOVER", ROOT / ".handover"))
FAMILIES = ("llama", "gpt2", "fast")
N_NEW = 30
PROMPTS = ("the ship", "rain and wind", "A bird of gold.", "  the house\n")

# Check of handover_checks.py -> its packages, of which the first is the tool of the table's row
# where ROWS has no other name.
TOOLS: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers==5.24.0",),
    "transformers-4": ("transformers==4.57.6",),
    "peft": ("peft==0.21.2", "transformers==5.24.0"),
    "trl": ("trl==1.16.0", "transformers==5.24.0"),
    "torchao": ("torchao==0.18.0", "transformers==5.24.0"),
    "mergekit": ("mergekit==0.1.5",),
    "lm-eval": ("lm-eval==0.4.13", "accelerate", "transformers==5.24.0"),
    "onnx": ("onnxruntime==1.32.0", "onnxscript", "onnx", "transformers==5.24.0"),
    "optimum": ("optimum-onnx==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6"),
    "transformers.js": ("optimum-onnx==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6"),
    "genai": ("onnxruntime-genai==0.18.0", "onnx-ir", "onnx", "transformers==5.24.0"),
    "openvino": ("optimum-intel[openvino]==2.2.0",),
    "ctranslate2": ("ctranslate2==4.8.5", "transformers==5.24.0"),
    "mlx": ("mlx-lm==0.32.2", "mlx[cpu]"),
    "llama.cpp": ("numpy==2.4.6",),
    "vllm": ("vllm==0.32.0",),
}
ROWS = {
    "onnx": "torch.onnx, onnxruntime 1.32.0",
    "transformers.js": "transformers.js 4.3.2 (node, ONNX of optimum-onnx)",
    "llama.cpp": "llama.cpp (node-llama-cpp 3.22.1)",
}


def make_models() -> dict[str, Any]:
    """Train and export a model of each family; returns prompts with ids and continuations."""
    file = WORK / "answers.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    from pretrain.export.importing import import_model
    from pretrain.generate.sampling import Sampling, generate_ids

    shutil.rmtree(WORK / "models", ignore_errors=True)
    models = WORK / "models"
    models.mkdir(parents=True)
    draw = random.Random(1)
    words = "the sea ship and rain wind gold bird of stone river winter road house fire".split()
    lines = [" ".join(draw.choice(words) for _ in range(12)).capitalize() for _ in range(2000)]
    (models / "text.txt").write_text(".\n".join(lines))
    sizes = "--model.n_layers 2 --model.n_heads 4 --model.d_model 128"
    answers: dict[str, Any] = {}
    for family in FAMILIES:
        shape = "--model.size 1 --model.ngram_rows 512" if family == "fast" else sizes
        pretrain(
            f"train text.txt --run {family} --model.family {family} {shape} --train.steps 60 "
            "--model.context_length 64 --tokenizer.vocab_size 300 --train.batch_tokens 1024 "
            "--train.device cpu"
        )
        pretrain(f"export {family} --format hf --out {family}-hf --unverified")
        if family != "fast":
            pretrain(f"export {family} --format gguf --out {family}-gguf --unverified")
        model = import_model(models / f"{family}-hf")
        decoder, tokenizer, rows = model.build().eval(), model.tokenizer, []
        for prompt in PROMPTS:
            ids = tokenizer.encode_prompt(prompt)
            found = generate_ids(decoder, ids, max_tokens=N_NEW, sampling=Sampling(temperature=0.0))
            rows.append({"prompt": prompt, "ids": ids, "tokens": found[0]})
        answers[family] = {"end": tokenizer.end_of_text, "rows": rows}
    file.write_text(json.dumps(answers))
    return answers


def pretrain(words: str) -> None:
    command = [sys.executable, "-m", "pretrain", *words.split()]
    paths = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PRETRAIN_CACHE": str(WORK / "cache")}
    subprocess.run(command, cwd=WORK / "models", env=paths, check=True, capture_output=True)


def ask(tool: str) -> dict[str, str]:
    """Install a tool, and ask it for each family; the result of each is a few words."""
    environment = WORK / "environments" / tool
    python = environment / "bin/python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        # Torch is that of this environment, so that it is not installed once for each tool; what
        # a tool's own packages need in another version is found first.
        theirs = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
        (theirs / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", *TOOLS[tool]]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        return dict.fromkeys(FAMILIES, f"not run: not installed ({shorten(reason, 90)})")
    results = {}
    for family in FAMILIES:
        script = ROOT / "scripts/handover_checks.py"
        command = [str(python), str(script), tool, family, str(WORK)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=offline, timeout=900, cwd=WORK
            )
        except subprocess.TimeoutExpired:
            results[family] = "not run: more than 15 minutes"
            continue
        (WORK / f"{tool}-{family}.log").write_text(done.stdout + done.stderr)
        found = re.findall("^RESULT (.*)$", done.stdout, re.MULTILINE)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        results[family] = found[-1] if found else f"fails: {shorten(last, 90)}"
    return results


def write_page(results: dict[str, Any]) -> None:
    """Put the table after its mark in the page; what was not asked here keeps its row."""
    head, mark, table = PAGE.read_text().partition("<!-- table -->")
    rows = {line.split(" | ")[0]: line for line in table.splitlines()}
    lines = ["| tool | " + " | ".join(FAMILIES) + " | run on |", "|---|---|---|---|---|"]
    for tool, packages in TOOLS.items():
        named = f"| {ROWS.get(tool, packages[0]).replace('==', ' ')}"
        if tool not in results and named in rows:
            lines.append(rows[named])
            continue
        row = results.get(tool, {"families": {}, "date": "-"})
        cells = [row["families"].get(family, "not run") for family in FAMILIES]
        cells = [re.sub(r"[|`]", "'", cell) for cell in cells]
        lines.append(f"{named} | {' | '.join(cells)} | {row['date']} |")
    PAGE.write_text(head + mark + "\n\n" + "\n".join(lines) + "\n")


def main(tools: list[str]) -> None:
    unknown = set(tools) - TOOLS.keys()
    if unknown:
        sys.exit(f"tools must be among {', '.join(TOOLS)} (got {', '.join(sorted(unknown))})")
    WORK.mkdir(exist_ok=True)
    make_models()
    file = WORK / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for tool, packages in TOOLS.items():
        known = results.get(tool, {}).get("packages") == list(packages)
        if tool in tools or (not tools and not known):
            families = ask(tool)
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            results[tool] = {"packages": list(packages), "families": families, "date": date}
            file.write_text(json.dumps(results, indent=1))
            print(tool, families, flush=True)
    write_page(results)


if __name__ == "__main__":
    main(sys.argv[1:])
