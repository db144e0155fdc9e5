"""What `same_numbers.py` trains on and with: a text that is always the same, and settings.

In come a folder to write the text to, and settings as words; out come files, and settings by their
dotted names, spelled as they were at commit f2ed868.
"""

from __future__ import annotations

import csv
import json
import random
from functools import partial
from pathlib import Path
from typing import Any


def write_text(folder: Path) -> None:
    """Texts of pseudo-words, always the same: txt, jsonl and csv files with exact and near
    duplicates and junk that quality filters remove, a task file and a text to evaluate on."""
    draw = random.Random(20170612)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(400)]
    common = "the be to of and that have with".split()
    frames = [[draw.choice(words) for _ in range(6)] for _ in range(40)]

    def sentence() -> str:
        chosen = list(draw.choice(frames)) + draw.choices(words[:60], k=draw.randint(3, 8))
        for _ in range(4):
            chosen.insert(draw.randrange(len(chosen)), draw.choice(common))
        return " ".join(chosen).capitalize() + draw.choice((".", ".", "!", "?"))

    def document() -> str:
        paragraphs = (" ".join(sentence() for _ in range(5)) for _ in range(draw.randint(2, 4)))
        return "\n".join(paragraphs) + "\n"

    texts = [document() for _ in range(200)]
    texts[20:20] = [texts[3], texts[5].replace(" the ", " The ", 1), "zz zz zz\n" * 20, "kurz\n"]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for i in range(4):
        (corpus / f"part-{i}.txt").write_text("\n".join(texts[i * 20 : i * 20 + 20]), "utf-8")
    lines = [json.dumps({"id": f"doc-{i}", "body": each}) for i, each in enumerate(texts[10:120])]
    lines[7:7] = ["{broken", json.dumps({"id": "none", "body": None})]
    (corpus / "records.jsonl").write_text("\n".join(lines), "utf-8")
    with open(corpus / "table.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["number", "text"])
        rows.writerows([i, f'{each} "quoted", über'] for i, each in enumerate(texts[110:]))
    (folder / "held-out.txt").write_text("\n".join(document() for _ in range(3)), "utf-8")
    pick = partial(draw.choices, words, k=3)
    tasks: dict[str, list[dict[str, Any]]] = {"choice": [], "cloze": [], "answer": []}
    for i in range(8):
        options = [" ".join(pick()) for _ in range(2)]
        tasks["choice"].append({"query": sentence(), "choices": options, "gold": i % 2})
        tasks["cloze"].append({"context": sentence(), "continuation": f" {draw.choice(words)}"})
        tasks["answer"].append({"context": sentence(), "answers": pick()})
    for name, examples in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)), "utf-8")


def settings_of(words: str, **placed: object) -> dict[str, Any]:
    """Settings by name, from names and values in turn; `{text}` is replaced by placed["text"]. A
    value is read as JSON where it is JSON; null takes a setting back."""
    for name, value in placed.items():
        words = words.replace(f"{{{name}}}", str(value))
    each = words.split()
    return dict(zip(each[::2], map(_value, each[1::2]), strict=True))


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


TINY = """
    tokenizer.name bpe tokenizer.vocab_size 320 model.family llama model.n_layers 2 model.n_heads 2
    model.d_model 32 model.context_length 16 train.batch_tokens 128 train.steps 10 train.seed 3
    train.evaluate_every 5 train.evaluate_tokens 512 train.precision fp32 train.device cpu
    schedule.warmup_steps 3 optimizer.learning_rate 0.01
"""
FAST = """
    model.family fast model.ngram_rows 512 model.recall 2
    optimizer.name muon optimizer.embedding_rate 4 optimizer.head_rate 1.4
"""
GPT2 = " model.family gpt2 model.dropout 0.1 "
TUNED = " optimizer.tuned_width 64 optimizer.tuned_batch_tokens 512 "
INHERITED = """
    tokenizer.name null tokenizer.vocab_size null model.family null model.n_layers null
    model.n_heads null model.d_model null model.context_length null
"""
MIXTURE = [
    {"path": "{text}/part-0.txt", "weight": 2.0},
    {"path": "{text}/table.csv", "weight": 1.0},
    {"path": "{text}/records.jsonl", "epochs": 0.002, "stage": 0.4},
    {"path": "{text}/part-2.txt", "epochs": 0.004, "stage": 0.4},
    {"path": "{text}/part-3.txt", "weight": 1.0, "stage": 0.8},
]
TRAININGS: dict[str, str] = {
    "transformer": """model.family transformer model.tied_head false optimizer.clip 0
        schedule.name inverse_sqrt train.label_smoothing 0.1""",
    "transformer-tied": """model.family transformer train.micro_batch_rows 3 schedule.name linear
        parallel.recompute selective optimizer.weight_decay 0.01""",
    "gpt": """model.family gpt model.tied_head false model.dropout 0.2 model.attention_dropout true
        schedule.name constant data.source {text}/part-*.txt""",
    "gpt-tied": "model.family gpt optimizer.beta1 0.8 optimizer.beta2 0.99 optimizer.epsilon 1e-6",
    "gpt2": f"""{GPT2} model.attention_dropout false model.tied_head false train.z_loss 0.001
        schedule.name cosine schedule.final_fraction 0.1""",
    "gpt2-tied": f"{GPT2} {TUNED} optimizer.name muon optimizer.momentum 0.9",
    "llama": f"{TUNED} model.n_kv_heads 1 model.rope_factor 8 parallel.recompute full",
    "llama-tied": """model.tied_head true optimizer.name muon train.label_smoothing 0.1
        train.z_loss 0.001 train.micro_batch_rows 2 train.save_every 3""",
    "llama-bf16": "train.precision bf16 schedule.name wsd train.keep_every 2 train.patience 1",
    "fast": f"{FAST} {TUNED} tokenizer.name characters tokenizer.vocab_size null model.dropout 0.1",
    "fast-tied": f"""{FAST} tokenizer.name bytes tokenizer.vocab_size null
        model.tied_head true model.longest_ngram 3
        model.recall 0 optimizer.name adamw train.micro_batch_rows 3""",
    "corpus": """data.source {text}/records.jsonl data.text_field body data.val_fraction 0.2
        corpus.deduplicate near corpus.filters ["gopher"] corpus.remove_overlap true
        corpus.evaluation_texts ["{text}/part-1.txt"]""",
    "mixture": "data.source " + json.dumps(MIXTURE, separators=(",", ":")),
    "tasks": """evaluate.task_files ["{text}/../choice.jsonl","{text}/../answer.jsonl"]
        evaluate.texts ["{text}/../held-out.txt"] evaluate.examples 4 evaluate.every 5""",
}
SPIKES: dict[str, str] = {
    "spike-skip": "train.spike_action skip train.spike_threshold 0.7 train.steps 44",
    "spike-rollback": "train.spike_action rollback train.spike_threshold 0.7 train.steps 50",
}
PROCESSES: dict[str, str] = {
    "2-data": f"{GPT2} parallel.data 2",
    "2-shard": "optimizer.name muon parallel.shard 2",
    "2-tensor": f"{GPT2} parallel.tensor 2",
    "2-context": f"{GPT2} parallel.context 2",
    "2-pipeline": f"{FAST} parallel.pipeline 2 train.micro_batch_rows 2",
}
