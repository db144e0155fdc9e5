#!/usr/bin/env bash
# tokenizers 0.23.3: training a BPE vocabulary with end_of_word_suffix is not repeatable.
#
# Expected: the same texts give the same vocabulary, as they do without a suffix.
# Seen: the same tokens with other ids in each training, within one process and between processes.
# The ids of single letters with the suffix are permuted, so ids, and models trained on them, differ.
#
#   without a suffix: 1 different vocabulary in 6 trainings
#   with </w>: 6 different vocabularies in 6 trainings, all with the same tokens
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ["the quick brown fox jumps over the lazy dog and runs away from the old house"] * 50


def vocabulary(suffix: str | None) -> dict[str, int]:
    options = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return json.loads(tokenizer.to_str())["model"]["vocab"]


counts = {}
for suffix in (None, "</w>"):
    found = [vocabulary(suffix) for _ in range(6)]
    counts[suffix] = len({json.dumps(each, sort_keys=True) for each in found})
    same_tokens = all(sorted(each) == sorted(found[0]) for each in found)
    print(f"suffix {suffix}: {counts[suffix]} different in 6 trainings; same tokens: {same_tokens}")
assert counts[None] == 1, "without a suffix training is no longer repeatable"
assert counts["</w>"] > 1, "with a suffix training is repeatable now"
PYTHON
