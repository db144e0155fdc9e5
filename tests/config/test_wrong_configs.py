"""Wrong configs: one error names every mistake, fast, before torch, and nothing is left behind.

The table has a config file, words of a command line, and what must be said: one fragment for each
mistake, and no mistake more than there are fragments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.config import SECTIONS, Layer, compose, parse_overrides, read_file
from pretrain.model.config import ModelConfig
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.train.config import TrainConfig

# name: (a file's text, words after it, a fragment for each mistake)
WRONG: dict[str, tuple[str, str, list[str]]] = {
    # Sections and keys that are not there.
    "a section misspelled": ("modelx: {n_heads: 2}", "", ["'modelx'; did you mean 'model'?"]),
    "a section from nowhere": ("wandb: {}", "", ["no section 'wandb'; there are data, corpus"]),
    "a section that is a number": ("1: {a: 2}", "", ["no section 1"]),
    "a section that is null": ("~: {a: 2}", "", ["no section None"]),
    "a section in capitals": ("Train: {steps: 1}", "", ["'Train'; did you mean 'train'?"]),
    "a merge key": ("<<: {train: {steps: 1}}", "", ["no section '<<'"]),
    "a key misspelled": ("train: {step: 1}", "", ["train.step; did you mean 'train.steps'?"]),
    "a key of another section": ("train: {n_layers: 1}", "", ["there is no train.n_layers"]),
    "a key that is a number": ("train: {1: 2}", "", ["there is no train.1"]),
    "a key that is null": ("train: {~: 2}", "", ["there is no train.None"]),
    "a key of two lines": ('train: {"a\\nb": 2}', "", [r"there is no train.a\nb"]),
    "a very long key": (f"train: {{{'k' * 900}: 2}}", "", [f"there is no train.{'k' * 74};"]),
    "a key in a section too many": ("model: {model: {n_heads: 2}}", "", ["no model.model"]),
    "keys misspelled in three sections": (
        "model: {n_head: 2}\noptimizer: {lr: 1}\nschedule: {warmup: 3}",
        "",
        ["did you mean 'model.n_heads'?", "no optimizer.lr", "mean 'schedule.warmup_steps'?"],
    ),
    "a key misspelled says nothing of what hangs on it": (
        "model: {n_head: 3, d_model: 130}",
        "",
        ["did you mean 'model.n_heads'?"],
    ),
    "a hyphen is no misspelling": ("", "--train.batch-tokens 0", ["train.batch_tokens is 0"]),
    "a word on the command line": (
        "",
        "--train.stpes 5 --modelx.d_model 3",
        ["did you mean 'train.steps'?", "did you mean 'model'?"],
    ),
    "a dot too many": ("", "--train.steps.more 5", ["there is no train.steps.more"]),
    # Sections that are none.
    "a section of a number": ("train: 3", "", ["train holds 3; keys with values are meant"]),
    "a section of a list": ("train: [steps]", "", ["train holds ['steps']; keys"]),
    "a section of a text": ("train: steps=3", "", ["train holds 'steps=3'; keys"]),
    "a section of nothing": ("train:", "", ["train holds None; keys"]),
    "two sections of nothing": ("train:\nmodel: ~", "", ["train holds None", "model holds None"]),
    "a section of a number, others": (
        "model: 5\ntrain: {steps: 0}",
        "--model.d_model 130",
        ["model holds 5", "train.steps is 0"],
    ),
    # Wrong types.
    "a text for a whole number": (
        "train: {steps: many}",
        "",
        ["steps is 'many'; it must be a whol"],
    ),
    "a quoted number": ('train: {steps: "3"}', "", ["steps is '3'; it must be a whole number"]),
    "a fraction for a whole number": (
        "train: {steps: 2.5}",
        "",
        ["steps is 2.5; it must be a whole"],
    ),
    "a boolean for a whole number": ("model: {n_heads: true}", "", ["model.n_heads is True; it"]),
    "a boolean for a number": ("model: {dropout: false}", "", ["model.dropout is False; it must"]),
    "a number for a boolean": ("train: {deterministic: 1}", "", ["is 1; it must be true or false"]),
    "a yes of YAML 1.1": ("model: {tied_head: yes}", "", ["is 'yes'; it must be true or false"]),
    "an underscore in a number": ("train: {steps: 1_000}", "", ["train.steps is '1_000'; it must"]),
    "a number with a unit": (
        "train: {minutes: 5m}",
        "",
        ["train.minutes is '5m'; it must be a num"],
    ),
    "a list for a number": ("train: {steps: [1, 2]}", "", ["train.steps is [1, 2]; it must be"]),
    "a mapping for a number": ("train: {steps: {a: 1}}", "", ["train.steps is {'a': 1}; it must"]),
    "a list for a choice": (
        "schedule: {name: [wsd]}",
        "",
        ["schedule.name is ['wsd']; it must be"],
    ),
    "a mapping for a choice": ("train: {device: {cuda: 0}}", "", ["train.device is {'cuda': 0}"]),
    "a boolean for a choice": (
        "train: {compile: true}",
        "",
        ["train.compile is True; it must be o"],
    ),
    "null for a whole number": (
        "model: {n_layers: ~}",
        "",
        ["model.n_layers is None; it must be a"],
    ),
    "null for a number": ("optimizer: {clip: ~}", "", ["optimizer.clip is None; it must be a num"]),
    "null for a choice": (
        "optimizer: {name: ~}",
        "",
        ["optimizer.name is None; it must be one of"],
    ),
    "null for a source": ("data: {source: ~}", "", ["data.source is None; it must be a text"]),
    "null for a boolean": ("train: {deterministic: ~}", "", ["is None; it must be true or false"]),
    "null for a name": ("tokenizer: {name: ~, vocab_size: 9}", "", ["tokenizer.name is None"]),
    "an empty value": ("", "--train.seed=", ["train.seed is None; it must be a whole number"]),
    "nested too much": ("model: {n_heads: [[[[0]]]]}", "", ["model.n_heads is [[[[0]]]]; it must"]),
    "a date": ("train: {steps: 2024-01-01}", "", ["train.steps is '2024-01-01'; it must be"]),
    "a time": ("train: {minutes: 1:30}", "", ["train.minutes is '1:30'; it must be a number"]),
    "a long text for a number": (
        f"train: {{steps: {'x' * 5000}}}",
        "",
        [f"train.steps is '{'x' * 76}...; it must be a whole number"],
    ),
    "wrong types in every section": (
        "data: {val_fraction: half}\ncorpus: {remove_overlap: 2}\ntokenizer: {vocab_size: big}\n"
        "model: {n_heads: few}\noptimizer: {clip: [1]}\nschedule: {name: 3}\ntrain: {seed: a}\n"
        "report: {to: [[wandb]]}",
        "",
        [
            "data.val_fraction is 'half'",
            "corpus.remove_overlap is 2",
            "tokenizer.vocab_size is 'big'",
            "model.n_heads is 'few'",
            "optimizer.clip is [1]",
            "schedule.name is 3",
            "train.seed is 'a'",
            "report.to is ['wandb']",
        ],
    ),
    # Out of range.
    "no steps": ("train: {steps: 0}", "", ["train.steps is 0; it must be at least 1"]),
    "steps below zero": ("", "--train.steps -5", ["train.steps is -5; it must be at least 1"]),
    "no minutes": ("train: {minutes: 0}", "", ["train.minutes is 0.0; it must be above 0"]),
    "minutes for twenty years": ("", "--train.minutes 1e8", ["must be at most 10,000,000"]),
    "a smoothing of 1": ("train: {label_smoothing: 1}", "", ["is 1.0; it must be in [0, 1)"]),
    "a seed below zero": ("train: {seed: -1}", "", ["train.seed is -1; it must be 0 or above"]),
    "every count of train": (
        "train: {steps: 0, batch_tokens: -1, micro_batch_rows: 0, evaluate_every: 0, patience: -2,"
        " evaluate_tokens: 0, save_every: 0, keep_checkpoints: 0, threads: 0}",
        "",
        [
            "train.steps is 0",
            "train.batch_tokens is -1",
            "train.micro_batch_rows is 0",
            "train.evaluate_every is 0",
            "train.evaluate_tokens is 0",
            "train.save_every is 0",
            "train.keep_checkpoints is 0",
            "train.patience is -2",
            "train.threads is 0",
        ],
    ),
    "no heads": ("model: {n_heads: 0}", "", ["model.n_heads is 0; it must be at least 1"]),
    "no heads of keys": ("model: {n_kv_heads: 0}", "", ["model.n_kv_heads is 0; it must be"]),
    "no width": ("model: {d_model: 0}", "", ["model.d_model is 0; it must be at least 1"]),
    "a width below zero": ("model: {d_model: -64}", "", ["model.d_model is -64; it must be"]),
    "no context": ("model: {context_length: 0}", "", ["model.context_length is 0; it must be"]),
    "all dropped": ("model: {dropout: 1}", "", ["model.dropout is 1.0; it must be in [0, 1)"]),
    "a dial that is not there": (
        "model: {family: llama, size: 2}",
        "",
        ["model.size is the dial of the family fast, and model.family is llama"],
    ),
    "a size of nothing": ("model: {family: fast, size: 0}", "", ["model.size is 0; it must be at"]),
    "no more recall": ("model: {induction: 9}", "", ["model.induction is 9; it must be in [0, 8]"]),
    "grams of nine": ("model: {longest_ngram: 9}", "", ["model.longest_ngram is 9; it must be"]),
    "rows below zero": ("model: {ngram_rows: -1}", "", ["ngram_rows is -1; it must be 0 or above"]),
    "no epsilon": ("model: {norm_epsilon: 0}", "", ["model.norm_epsilon is 0.0; it must be above"]),
    "rope turned round": (
        "model: {rope_theta: -1, rope_factor: 0, rope_original_context: 0, rope_low_factor: -1}",
        "",
        ["rope_theta is -1.0", "rope_factor is 0.0", "original_context is 0", "low_factor is -1.0"],
    ),
    "a rate of zero": ("optimizer: {learning_rate: 0}", "", ["must be a number above 0"]),
    "every number of the optimizer": (
        "optimizer: {learning_rate: -1, embedding_lr_mult: -2, head_lr_mult: -3, momentum: 1,"
        " weight_decay: -0.1, beta1: 1, beta2: 2, epsilon: 0, clip: -1}",
        "",
        [
            "learning_rate is -1.0",
            "embedding_lr_mult is -2.0",
            "head_lr_mult is -3.0",
            "momentum is 1.0",
            "weight_decay is -0.1",
            "beta1 is 1.0",
            "beta2 is 2.0",
            "epsilon is 0.0",
            "clip is -1.0",
        ],
    ),
    "every number of the schedule": (
        "schedule: {warmup_steps: -1, decay_fraction: 1.5, final_fraction: -1}",
        "",
        ["warmup_steps is -1; it must be 0 or above", "decay_fraction is 1.5", "fraction is -1.0"],
    ),
    "a validation of everything": (
        "data: {val_fraction: 1}",
        "",
        ["legal: above 0 and at most 0.5"],
    ),
    "no field": ('data: {text_field: ""}', "", ["data.text_field is empty; legal: the name of"]),
    "no source": ('data: {source: ""}', "", ["data.source is ''; legal: a path of a file"]),
    "an empty list of sources": ("data: {source: []}", "", ["data.source is (); legal: a path"]),
    "no tokenizer": ('tokenizer: {name: ""}', "", ["tokenizer.name is ''; legal: bpe"]),
    "a vocabulary of one": (
        "tokenizer: {name: characters, vocab_size: 1}",
        "",
        ["legal: 2 or more"],
    ),
    "a vocabulary below zero": (
        "tokenizer: {vocab_size: -5}",
        "",
        ["vocab_size is -5; legal: 257"],
    ),
    # Names that are not there.
    "a family from elsewhere": ("model: {family: bert}", "", ["'bert' is not one of transformer"]),
    "a preset from elsewhere": ("model: {preset: gpt9}", "", ["model.preset 'gpt9' is not one of"]),
    "a preset that is a list": (
        "model: {preset: [gpt]}",
        "",
        ["model.preset ['gpt'] is not one of"],
    ),
    "a family that is a mapping": ("model: {family: {a: 1}}", "", ["model.family {'a': 1} is not"]),
    "family, preset and more": (
        "model: {family: bert, preset: gpt9, n_heads: 3, n_kv_heads: 2, dropout: -1}",
        "",
        [
            "'gpt9' is not one",
            "'bert' is not one",
            "n_heads 3 is not a multiple",
            "dropout is -1.0",
        ],
    ),
    "a preset unknown says nothing of its sizes": (
        "model: {preset: gpt9, n_heads: 5}",
        "",
        ["'gpt9' is not one of"],
    ),
    "choices": (
        "model: {norm: batch, position: alibi, feed_forward: elu, bias: some, initialization: one,"
        " norm_place: both}\ntrain: {device: tpu, precision: fp8, compile: maybe}",
        "",
        [
            "model.norm is 'batch'",
            "model.norm_place is 'both'",
            "model.position is 'alibi'",
            "model.feed_forward is 'elu'",
            "model.bias is 'some'",
            "model.initialization is 'one'",
            "train.device is 'tpu'",
            "train.precision is 'fp8'",
            "train.compile is 'maybe'",
        ],
    ),
    "filters and languages": (
        "corpus: {filters: [gopher, best, c5], languages: [english, en, DE]}",
        "",
        ["filters has 'best'", "filters has 'c5'", "languages has 'english'", "languages has 'DE'"],
    ),
    "a deduplication": ("corpus: {deduplicate: fuzzy}", "", ["is 'fuzzy'; it must be one of none"]),
    "trackers": ("", "--report.to mlflow,neptune", ["contains 'mlflow'", "contains 'neptune'"]),
    "an optimizer and a schedule": (
        "optimizer: {name: sgd}",
        "--schedule.name steep",
        ["optimizer.name is 'sgd'; it must be one of adamw, muon", "schedule.name is 'steep'"],
    ),
    # Fields that contradict each other.
    "a width that heads do not divide": (
        "model: {n_heads: 3, d_model: 128}",
        "",
        ["model.d_model 128 is not a multiple of model.n_heads 3"],
    ),
    "heads of an odd width": ("model: {n_heads: 2, d_model: 6}", "", ["an even head width, but"]),
    "sinusoids of an odd width": (
        "model: {family: transformer, n_heads: 1, d_model: 33}",
        "",
        ["sinusoidal positions need an even model.d_model, not 33"],
    ),
    "heads that groups do not divide": (
        "model: {n_heads: 4, n_kv_heads: 3}",
        "",
        ["model.n_heads 4 is not a multiple of model.n_kv_heads 3"],
    ),
    "more groups than heads": ("model: {n_kv_heads: 8}", "", ["model.n_heads 4 is not a multiple"]),
    "a preset of another family": (
        "model: {preset: gpt2-124m, family: llama}",
        "",
        ["gpt2-124m is of the family gpt2, but model.family is llama; name one of the two"],
    ),
    "a preset in the file, a family on the command line": (
        "model: {preset: llama3-8b}",
        "--model.family gpt2 --train.steps 0",
        ["llama3-8b is of the family llama, but model.family is gpt2", "train.steps is 0"],
    ),
    "a preset with its heads changed": (
        "model: {preset: gpt2-124m}",
        "--model.n_heads 7",
        ["model.d_model 768 is not a multiple of model.n_heads 7"],
    ),
    "rope's factors": (
        "model: {rope_low_factor: 5}",
        "",
        ["rope_low_factor is 5.0; it must be above 0 and below model.rope_high_factor, 4.0"],
    ),
    "overlap with nothing": (
        "corpus: {remove_overlap: true}",
        "",
        ["needs corpus.evaluation_texts"],
    ),
    "bytes of another size": (
        "tokenizer: {name: bytes, vocab_size: 300}",
        "",
        ["the tokenizer 'bytes' always has 257 entries"],
    ),
    "pairs of bytes without the bytes": (
        "tokenizer: {vocab_size: 256}",
        "",
        ["is 256; legal: 257"],
    ),
    "a batch of a part of a window": (
        "model: {context_length: 128}\ntrain: {batch_tokens: 1000}",
        "",
        ["1,000 is not a multiple of model.context_length 128; the nearest that are: 896 or"],
    ),
    "micro-batches beyond the batch": (
        "model: {context_length: 128}\ntrain: {batch_tokens: 1024, micro_batch_rows: 9}",
        "",
        ["train.micro_batch_rows 9 is more than the 8 windows of a batch; legal: 1 to 8"],
    ),
    "contradictions and a value out of range": (
        "model: {n_heads: 3, d_model: 128, n_kv_heads: 2, n_layers: 0}",
        "--model.context_length 100 --train.batch_tokens 130",
        [
            "d_model 128 is not a multiple of model.n_heads 3",
            "n_heads 3 is not a multiple of model.n_kv_heads 2",
            "model.n_layers is 0",
            "the nearest that are: 100 or 200",
        ],
    ),
    "a contradiction that hangs on a wrong type is not said": (
        "model: {n_heads: many, d_model: 130, position: alibi, n_kv_heads: 3}",
        "",
        ["model.n_heads is 'many'", "model.position is 'alibi'"],
    ),
    "a contradiction that hangs on a wrong range is not said": (
        "model: {n_heads: -4, d_model: 130, context_length: 0}",
        "--train.batch_tokens 77",
        ["model.n_heads is -4", "model.context_length is 0"],
    ),
    # Lists of sources.
    "a source without weight": (
        "data: {source: [{path: a}]}",
        "",
        ["'a' needs either a weight or"],
    ),
    "a source with both": (
        "data: {source: [{path: a, weight: 1, epochs: 1}]}",
        "",
        ["data.source: 'a' needs either a weight or epochs"],
    ),
    "a source without a path": ("data: {source: [{weight: 1}]}", "", ["an entry without a path"]),
    "a source of nothing": ("data: {source: [~]}", "", ["data.source has the entry None; legal"]),
    "sources that are texts": (
        "data: {source: [a, b]}",
        "",
        ["data.source has the entry 'a'", "data.source has the entry 'b'"],
    ),
    "a source that is a mapping": (
        "data: {source: {path: a}}",
        "",
        ["data.source is {'path': 'a'}"],
    ),
    "three wrong sources": (
        "data: {source: [{path: a, weight: -1, stage: 2}, {path: b, weigh: 1}, {path: [c]}]}",
        "",
        [
            "weight of 'a' is -1.0; legal: above 0",
            "stage of 'a' is 2.0; legal: from 0 to below 1",
            "an entry has no 'weigh'; did you mean 'weight'?",
            "data.source.path is ['c']; it must be a text",
        ],
    ),
    "weights of infinity": (
        "data: {source: [{path: a, weight: .inf}, {path: b, epochs: .nan}]}",
        "",
        ["data.source.weight is inf; it must be a f", "data.source.epochs is nan; it must be a f"],
    ),
    "a mixture of both kinds, twice": (
        "data: {source: [{path: a, weight: 1}, {path: a, epochs: 1}]}",
        "",
        ["has both weights and epochs", "names a path twice"],
    ),
    "a stage that begins late": (
        "data: {source: [{path: a, weight: 1, stage: 0.5}], exhausted: stop}",
        "",
        ["the first stage begins at 0.5; legal: 0", "data.exhausted is 'stop'; it must be one of"],
    ),
    "a stage before the first": (
        "data: {source: [{path: a, epochs: 0, stage: -1}, {path: '', weight: 1}]}",
        "",
        ["epochs of 'a' is 0.0", "stage of 'a' is -1.0", "an entry without a path"],
    ),
    # Numbers that are none, and numbers beyond all bounds.
    "not a number": (
        "optimizer: {learning_rate: .nan}",
        "",
        ["is nan; it must be a finite number"],
    ),
    "infinity": (
        "",
        "--optimizer.clip .inf",
        ["optimizer.clip is inf; it must be a finite number"],
    ),
    "minus infinity": ("", "--train.minutes=-.inf", ["train.minutes is -inf; it must be a finite"]),
    "a rate of 1e400": ("optimizer: {learning_rate: 1e400}", "", ["is inf; it must be a finite"]),
    "not a whole number": ("train: {steps: .nan}", "", ["train.steps is nan; it must be a whole"]),
    "infinitely many steps": (
        "train: {steps: .inf}",
        "",
        ["train.steps is inf; it must be a whole"],
    ),
    "not numbers, in four sections": (
        "model: {dropout: .nan, rope_theta: .inf}\nschedule: {final_fraction: .nan}",
        "--train.label_smoothing .nan --data.val_fraction .nan",
        [
            "dropout is nan",
            "rope_theta is inf",
            "final_fraction is nan",
            "smoothing is nan",
            "val_fr",
        ],
    ),
    "a batch of 10**18": (
        "train: {batch_tokens: 1000000000000000000}\nmodel: {context_length: 7}",
        "",
        ["train.batch_tokens is 1000000000000000000; it must be at most 10,000,000,000"],
    ),
    "layers of 10**30": (
        "",
        f"--model.n_layers {10**30}",
        [f"model.n_layers is {10**30}; it must be at most 10,000"],
    ),
    "a width of 1e30": ("model: {d_model: 1e30}", "", ["it must be at most 1,048,576"]),
    "a million layers": (
        "model: {n_layers: 1000000}",
        "",
        ["n_layers is 1000000; it must be at most"],
    ),
    "a context of a billion": (
        "model: {context_length: 1e9}",
        "",
        ["it must be at most 16,777,216"],
    ),
    "heads of a billion": (
        "model: {n_heads: 1e9}",
        "",
        ["n_heads is 1000000000; it must be at most"],
    ),
    "a vocabulary of a billion": ("tokenizer: {vocab_size: 1e9}", "", ["at most 16,777,216"]),
    "rows of 10**15": ("model: {ngram_rows: 1e15}", "", ["it must be at most 1,099,511,627,776"]),
    "warm for ever": ("schedule: {warmup_steps: 1e18}", "", ["must be at most 10,000,000,000"]),
    "a seed of 80 bits": ("train: {seed: 0xffffffffffffffffffff}", "", ["must be below 2**63"]),
    "a number of 300 digits": (
        "train: {steps: 1e300}",
        "",
        ["train.steps has more than 100 digits"],
    ),
    "a million threads": ("train: {threads: 1e6}", "", ["1000000; it must be at most 4,096"]),
    "a model that cannot be": (
        "model: {n_layers: 9999, d_model: 1000000, n_heads: 1000}",
        "",
        ["has at least 73,326,426,624,000,000 parameters; legal: at most 10,000,000,000,000"],
    ),
    "a table that cannot be": (
        "model: {ngram_rows: 1e12}",
        "",
        ["model.ngram_rows 1000000000000 has"],
    ),
    "a layer that cannot be": (
        "model: {d_ff: 16777216, d_model: 1048576}",
        "",
        ["model.d_ff 16777216 and model.ngram_rows 0 has at least"],
    ),
    "sizes beyond all bounds, everywhere": (
        "model: {n_layers: 1e9, d_model: 1e9, d_ff: 1e12, context_length: 1e12}",
        "--train.batch_tokens 1e18 --tokenizer.vocab_size 1e12",
        [
            "model.n_layers is 1000000000",
            "model.d_model is 1000000000",
            "model.d_ff is 1000000000000",
            "model.context_length is 1000000000000",
            "train.batch_tokens is 1000000000000000000",
            "tokenizer.vocab_size is 1000000000000",
        ],
    ),
    # What is not YAML, or not this YAML, is said alone: nobody knows what it would have been.
    "a bracket left open": ("train: {steps: [1", "--train.seed -1", ["not the YAML that is meant"]),
    "a tab": ("train:\n\tsteps: 1", "", ["not the YAML that is meant"]),
    "a key twice": ("train: {steps: 1, steps: 2}", "", ["the key 'steps' stands twice"]),
    "a section twice": (
        "train: {steps: 1}\ntrain: {seed: 2}",
        "",
        ["the key 'train' stands twice"],
    ),
    "an alias": ("a: &x {steps: 1}\ntrain: *x", "", ["aliases (*) and tags (!) are not used"]),
    "a bomb of aliases": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "",
        ["aliases (*) and tags (!) are not used"],
    ),
    "a tag of Python": (
        "train: !!python/object/apply:os.system [x]",
        "",
        ["tags (!) are not used"],
    ),
    "a tag of YAML": ("train: {steps: !!timestamp x}", "", ["tags (!) are not used"]),
    "a list as a key": ("? [a, b]\n: 1", "", ["not the YAML that is meant", "unhashable key"]),
    "two documents": ("train: {steps: 1}\n---\nmodel: {}", "", ["expected a single document"]),
    "a directive": ("%YAML 9.9\n---\ntrain: {}", "", ["not the YAML that is meant"]),
    "a null byte": ("train: {seed: 1\0}", "", ["not the YAML that is meant"]),
    "ten thousand digits": (
        f"train: {{steps: {'9' * 10000}}}",
        "",
        ["a number of 10000 characters"],
    ),
    "ten thousand brackets": ("[" * 10000, "", ["nested too deeply"]),
    "a file of a list": ("- train\n- model", "", ["holds ['train', 'model']; sections such as"]),
    "a file of an empty list": ("[]", "", ["holds []; sections such as `train:` are meant"]),
    "a file of a word": ("train", "", ["holds 'train'; sections such as `train:` are meant"]),
    "a file of a megabyte": ("# " + "x" * (1 << 20), "", ["bytes: not a config"]),
    "words that are no settings": (
        "",
        "steps 3 --train.seed [1 --model.n_heads",
        ["'steps' is not understood", "'3' is not understood", "not the YAML", "needs a value"],
    ),
    # A file and a command line together.
    "a file and a command line": (
        "model: {n_heads: 0, d_modelx: 3}\ntrain: {steps: many}",
        "--optimizer.clip -1 --train.stepz 4 --report.to mlflow",
        ["n_heads is 0", "'model.d_model'?", "clip is -1.0", "no train.stepz", "mlflow", "'many'"],
    ),
    "a command line that mends a part of a file": (
        "model: {n_heads: 0}\ntrain: {steps: many, seed: -1}",
        "--model.n_heads 2 --train.steps 3",
        ["train.seed is -1; it must be 0 or above"],
    ),
    "the same mistake in both": (
        "train: {stepz: 1}",
        "--train.stepz 2",
        ["there is no train.stepz; did you mean 'train.steps'?"],
    ),
    "a contradiction between a file and a command line": (
        "model: {d_model: 128}\ntokenizer: {name: bytes}",
        "--model.n_heads 3 --tokenizer.vocab_size 300",
        ["model.d_model 128 is not a multiple of model.n_heads 3", "always has 257 entries"],
    ),
}


def said_of(*layers: Layer) -> str:
    """What is said of layers; nothing where they are a config."""
    try:
        compose(layers)
    except ValueError as error:
        return str(error)
    return ""


def refused(path: Path, text: str, words: str) -> str:
    """What is said of a config file and words after it."""
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match=r".") as caught:
        compose([read_file(path), parse_overrides(words.split())])
    return str(caught.value)


def mistakes_in(message: str) -> list[str]:
    """The mistakes that an error names: its lines after the first, or itself."""
    heading = re.match(r"(\d+) mistakes:\n  ", message)
    if heading is None:
        return [message]
    listed = message[heading.end() :].split("\n  ")
    # Lines of one mistake after its first stand further right.
    found = [each for each in listed if not each.startswith("  ")]
    assert len(found) == int(heading[1])
    return found


def test_the_table_is_long() -> None:
    assert len(WRONG) >= 110
    assert sum(len(fragments) > 1 for _, _, fragments in WRONG.values()) >= 30


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_named_at_once(name: str, tmp_path: Path) -> None:
    text, words, fragments = WRONG[name]
    began = time.process_time()  # of this process, so that a busy machine changes nothing
    message = refused(tmp_path / "wrong.yaml", text, words)
    assert time.process_time() - began < 1
    for fragment in fragments:
        assert fragment in message
    if "not the YAML that is meant" not in message:
        assert len(mistakes_in(message)) == len(fragments), message


@pytest.mark.parametrize("name", [name for name in WRONG if "cannot be" in name or "10**" in name])
def test_nothing_is_allocated_for_absurd_sizes(name: str, tmp_path: Path) -> None:
    text, words, _ = WRONG[name]
    tracemalloc.start()
    refused(tmp_path / "wrong.yaml", text, words)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_one_mistake_is_a_sentence_and_several_are_a_list(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    assert refused(path, "train: {steps: 0}", "") == "train.steps is 0; it must be at least 1"
    assert refused(path, "train: {steps: 0}", "--model.n_heads 0") == (
        "2 mistakes:\n"
        "  model.n_heads is 0; it must be at least 1\n"
        "  train.steps is 0; it must be at least 1"
    )


def test_a_room_alone_names_every_mistake_too() -> None:
    with pytest.raises(
        ValueError, match=r"n_layers is 0.*\n.*n_heads is 0; it must be at least 1$"
    ):
        ModelConfig(n_layers=0, n_heads=0)
    with pytest.raises(ValueError, match=r"^train.steps is 0; it must be at least 1$"):
        TrainConfig(steps=0)
    size: Any = "big"
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size is 'big'; legal: a whole number"):
        TokenizerConfig(vocab_size=size)


def test_a_legal_config_is_what_its_classes_make_of_it() -> None:
    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 64}
    config = compose([{"model": sizes, "train": {"steps": 5}}])
    assert config.model == ModelConfig(**sizes)
    assert hash(config.train) == hash(TrainConfig(steps=5))


def test_thousands_of_mistakes_are_named_in_a_second(tmp_path: Path) -> None:
    text = "train:\n" + "".join(f"  step_{number}: 1\n" for number in range(3000))
    began = time.process_time()
    message = refused(tmp_path / "wrong.yaml", text, "")
    assert time.process_time() - began < 1
    assert message.startswith("3000 mistakes:\n  there is no train.step_0; did you mean")
    assert message.endswith("there is no train.step_2999")


JUNK = st.recursive(
    # No subnormal numbers: a test that trained in this process has them flushed to zero.
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False)
    | st.text(max_size=8)
    | st.sampled_from([10**18, -(10**30), 10**200, 1e300, "\0", "nan", "bundled", "auto", "bytes"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4) | st.sampled_from(["path", "weight"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
FIELDS = [(name, field.name) for name, kind in SECTIONS.items() for field in fields(kind)]


@settings(deadline=None)
@example(field=("schedule", "anneal"), junk=True)
@given(field=st.sampled_from(FIELDS), junk=JUNK)
def test_junk_in_a_field_is_taken_or_refused_by_its_name(field: tuple[str, str], junk: Any) -> None:
    section, key = field
    said = said_of({section: {key: junk}})
    assert not said or f"{section}.{key}" in said


@settings(deadline=None)
@given(a=st.sampled_from(FIELDS), b=st.sampled_from(FIELDS), junk=JUNK)
@example(a=("model", "family"), b=("model", "rope_low_factor"), junk=4)
def test_no_mistake_hides_another(a: tuple[str, str], b: tuple[str, str], junk: Any) -> None:
    """A wrong type beside junk: what is said of the junk alone is said here too."""
    wrong: dict[str, dict[str, Any]] = {a[0]: {a[1]: {"no": "value"}}}
    for section, key in (a, b):
        wrong.setdefault(section, {}).setdefault(key, junk)
    said = said_of(wrong)
    assert f"{a[0]}.{a[1]}" in said
    if a != b:
        alone = said_of({b[0]: {b[1]: junk}})
        for mistake in mistakes_in(alone) if alone else []:
            # A wrong family leaves all that it decides open, and nothing is compared with that.
            is_open = a == ("model", "family") and mistake.count("model.") > 1
            assert mistake in said or f"{a[0]}.{a[1]}" in mistake or is_open


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "a file": (
        ["wrong.yaml"],
        [
            "4 mistakes:",
            "there is no train.stepz",
            "model.n_heads is 0",
            "optimizer.clip is -1.0",
            "missing.txt",
        ],
    ),
    "a file and a command line": (
        ["wrong.yaml", "--train.batch_tokens", "1000000000000000000", "--report.to", "mlflow"],
        ["6 mistakes:", "train.batch_tokens is 1000000000000000000", "mlflow", "missing.txt"],
    ),
    "a text": (
        ["text.txt", "--model.n_layers", "1e9", "--model.d_model", "1e9"],
        ["2 mistakes:", "n_layers is 1000000000", "d_model is 1000000000"],
    ),
    "a source and no end": (
        ["endless.yaml"],
        ["2 mistakes:", "missing.txt", "give train.steps or train.minutes"],
    ),
    "two sources": (["two.yaml"], ["2 mistakes:", "missing.txt", "lost.txt"]),
    "not YAML": (["broken.yaml"], ["not the YAML that is meant here"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses_at_once_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    words, fragments = COMMANDS[name]
    files = {
        "wrong.yaml": "data: {source: missing.txt}\nmodel: {n_heads: 0}\noptimizer: {clip: -1}\n"
        "train: {stepz: 4}\n",
        "endless.yaml": "data: {source: missing.txt}",
        "two.yaml": "data: {source: [{path: missing.txt, weight: 1}, {path: lost.txt, weight: 1}]}",
        "broken.yaml": "train: [1",
        "text.txt": "It was the best of times. ",
    }
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    # What `python -m pretrain` does, and then a look at what was imported.
    code = (
        "import json, sys; from pretrain.cli import main; code = main(['train', *sys.argv[1:]]);"
        "print(json.dumps(['torch' in sys.modules, code]))"
    )
    looked = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert json.loads(looked.stdout) == [False, 2], looked.stderr
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "train", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    seconds = time.perf_counter() - began
    print(f"{name}: {seconds:.2f} s")
    assert done.returncode == 2, done.stderr
    assert seconds < 5
    assert done.stderr == looked.stderr
    assert done.stderr.startswith("pretrain: ")
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(files)
