"""MODEL -> a loaded model: `load_model` is the front door of the library.

MODEL is a run directory, one checkpoint in it, an imported model, a mix, a Hugging Face folder, a
GGUF file, or a .bin file of llama2.c. ValueError for other paths, and for a run whose config.yaml
or tokenizer are not those that it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.config import RunConfig, compose, read_file, to_dict, to_yaml
from pretrain.fileio import read_json
from pretrain.run.directory import (
    CHECKPOINT_MANIFEST,
    CHECKPOINTS,
    CONFIG,
    MIX,
    MIX_FOLDER,
    SUMMARY,
    TOKENIZER,
    read_summary,
)
from pretrain.run.identity import check_config

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.checkpoint.load import Checkpoint
    from pretrain.distributed import World
    from pretrain.evaluate.loss import Score
    from pretrain.model.decoder import Decoder
    from pretrain.model.loss import LMLoss
    from pretrain.tokenizer.tokenizer import Tokenizer

MODEL_HELP = (
    "a run directory, one checkpoint in it, an imported model, a mix, a Hugging Face folder, "
    "a GGUF file, or a .bin file of llama2.c"
)


class TokenProbability(NamedTuple):
    """A possible next token."""

    id: int
    text: str
    probability: float


def evaluate(model: LoadedModel, text: str | Sequence[str], *, stride: int | None = None) -> Score:
    """Return the nats, tokens and bytes of a text, or of several documents together;
    `perplexity` and `bits_per_byte` are properties of the result. Windows have the context's
    length and start every `stride` tokens (default: they do not overlap); every token is
    counted once. Files and tasks: `pretrain.evaluate.evaluate`."""
    from pretrain.evaluate.loss import score_texts

    return score_texts(model, [text] if isinstance(text, str) else text, stride=stride)


def generate(
    model: LoadedModel,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    n: int = 1,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1,
    special: bool = False,
) -> list[str]:
    """Return `n` continuations of `prompt`, each of at most `max_tokens` tokens, without the
    prompt. Temperature 0 is greedy; with `special`, names of special tokens in the prompt
    become those tokens. ValueError for counts below 1."""
    from pretrain.generate import sampling
    from pretrain.generate.packing import pack_weights

    chosen = sampling.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if not model._is_optimized:
        pack_weights(model.decoder)
        model._is_optimized = True
    return sampling.generate(
        model.decoder,
        model.tokenizer,
        prompt,
        max_tokens=max_tokens,
        n=n,
        sampling=chosen,
        special=special,
    )


@dataclass(slots=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer, and where it came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    """the run's settings; of a foreign model only `model` is set; of a mix those of the part with
    the shortest context"""
    path: Path
    """the checkpoint directory, or the foreign file or folder"""
    checkpoint: Checkpoint | None
    """None for a foreign model"""
    world: World
    """the device that the weights are on"""
    precision: str = "fp32"
    """the run's own on the device type it was trained on; fp32 elsewhere, on every device"""
    _is_optimized: bool = field(default=False, repr=False)

    # As methods too.
    score = evaluate
    generate = generate

    @property
    def run_folder(self) -> Path:
        """The run directory, also where the model is the mean of the run's networks, in it."""
        folder = self.path.parent.parent
        is_mean = folder.name == MIX_FOLDER and (folder.parent / SUMMARY).is_file()
        return folder.parent if is_mean else folder

    @property
    def lm_loss(self) -> LMLoss:
        """The loss module: micro-batch -> (sum of nats, number of valid targets)."""
        from pretrain.model.loss import LMLoss

        return LMLoss(self.decoder).eval()

    def next_tokens(
        self, prompt: str = "", *, top: int = 10, special: bool = False
    ) -> list[TokenProbability]:
        """Return the `top` most probable tokens after `prompt`, the most probable first."""
        from pretrain.generate.sampling import next_distribution

        with self.world.autocast(self.precision):
            probabilities_V = next_distribution(
                self.decoder, self.tokenizer, prompt, special=special
            )
        values, ids = probabilities_V.topk(min(top, len(probabilities_V)))
        return [
            TokenProbability(id_, self.tokenizer.token_text(id_), probability)
            for id_, probability in zip(ids.tolist(), values.tolist(), strict=True)
        ]


def load_model(path: str | Path, *, device: str = "auto", alone: bool = False) -> LoadedModel:
    """Load MODEL onto a device (auto, cpu, cuda or mps). Of a finished run this is the mean of its
    networks and counts, if it has one and not the first network `alone` is wanted, else the best
    checkpoint; of an unfinished run the newest. ValueError where `path` is not a model."""
    path = Path(path)
    foreign_files = ("config.json", "adapter_config.json")
    is_foreign = path.is_file() or any((path / name).is_file() for name in foreign_files)
    if not is_foreign:
        find_checkpoint(path, alone=alone)  # before torch is imported, which takes seconds

    from pretrain.distributed import open_world
    from pretrain.train.build import load_decoder

    if is_foreign:
        from pretrain.export.importing import import_model

        foreign = import_model(path)
        world = open_world(device, alone=True)
        config = compose([{"model": asdict(foreign.config)}])
        decoder = foreign.build(device=world.device.type).eval()
        return LoadedModel(decoder, foreign.tokenizer, config, path, None, world)
    world = open_world(device, alone=True)
    run, checkpoint = open_checkpoint_of(path, alone=alone)
    config, tokenizer = read_unchanged(run, checkpoint)
    tokenizer.add_bos = checkpoint.state.get("begins_texts", True)
    tokenizer.stop_ids = checkpoint.state.get("ends", tokenizer.stop_ids)
    tokenizer.carried = checkpoint.state.get("carried", {})
    size = tokenizer.vocab_size
    decoder = load_decoder(checkpoint, config.model, vocab_size=size, world=world)
    same_device = config.train.device == world.device.type
    precision = config.train.precision if same_device else "fp32"
    return LoadedModel(decoder, tokenizer, config, checkpoint.path, checkpoint, world, precision)


def settings_of_model(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the numbers of a model depend on, by name, as JSON values."""
    model = {f"model.{key}": value for key, value in to_dict(config)["model"].items()}
    return {**model, "train.precision": config.train.precision, "device": config.train.device}


def read_unchanged(run: Path, checkpoint: Checkpoint) -> tuple[RunConfig, Tokenizer]:
    """Read config.yaml and the tokenizer of a run. ValueError if they, or the parts of a mix, are
    not those that the checkpoint, which has their hashes, was trained or imported with."""
    from pretrain.tokenizer.load import load_tokenizer

    config, tokenizer = compose([read_file(run / CONFIG)]), load_tokenizer(run / TOKENIZER)
    fingerprint = dict(checkpoint.state.get("fingerprint", {}))
    if tokenizer.sha256 != fingerprint.get("tokenizer", tokenizer.sha256):
        raise ValueError(
            f"{run / TOKENIZER} is not the tokenizer that {checkpoint.path.name} was trained "
            "with: it was changed or damaged"
        )
    parts = checkpoint.state.get("parts") or checkpoint.state.get("averaged")
    if parts is not None and read_json(run / MIX).get("parts") != parts:
        raise ValueError(
            f"{run / MIX} is not that of the mix: it was changed or damaged; restore it"
        )
    values = {**fingerprint.pop("settings", {}), **fingerprint}
    check_config(run, settings_of_model(config), values, step=checkpoint.step)
    return config, tokenizer


def write_model(
    folder: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    texts: Mapping[str, str] = MappingProxyType({}),
    **origin: Any,
) -> None:
    """Write a folder that `load_model` opens, of weights that were not trained in it. `texts` are
    hashes of the text that they were trained on; `origin` is what else the checkpoint says."""
    from pretrain.checkpoint.save import save_checkpoint

    tokenizer.save(folder / TOKENIZER)
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    state = {
        "fingerprint": {**settings_of_model(config), "tokenizer": tokenizer.sha256, **texts},
        "begins_texts": tokenizer.add_bos,
        "ends": tokenizer.stop_ids,
        "carried": tokenizer.carried,
        **origin,
    }
    tensors = {f"model/{name}": values for name, values in parameters}
    save_checkpoint(folder / CHECKPOINTS, step=0, tensors=tensors, state=state)


def open_checkpoint_of(path: Path, *, alone: bool = False) -> tuple[Path, Checkpoint]:
    """Return the run directory and the opened checkpoint that MODEL means: `load_model`. The run
    may be in training: it saves new checkpoints and deletes old ones meanwhile."""
    from pretrain.checkpoint.format import DamagedCheckpoint
    from pretrain.checkpoint.load import Checkpoint

    last_tried = None
    while True:
        run, checkpoint = find_checkpoint(path, alone=alone)
        try:
            return run, Checkpoint(checkpoint)
        except DamagedCheckpoint:
            # One that is gone was deleted for a newer one; the same one twice is damaged.
            if checkpoint.exists() or checkpoint == last_tried:
                raise
        last_tried = checkpoint


def find_checkpoint(path: Path, *, alone: bool = False) -> tuple[Path, Path]:
    """Return the run directory and the checkpoint directory that MODEL means, of a run with a mean
    of networks those of the mean, unless the first network `alone` is wanted; ValueError where it
    is neither a run nor a checkpoint."""
    if not path.exists():
        raise ValueError(
            f"there is no model at {path}: neither a run directory nor a checkpoint; one of the "
            "Hugging Face Hub must be downloaded first (hf download NAME --local-dir DIR)"
        )
    if (path / CHECKPOINT_MANIFEST).is_file() and (path.parent.parent / CONFIG).is_file():
        return path.parent.parent, path
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{path} is neither a run directory (it has no {CONFIG}), nor a checkpoint in one, "
            "nor a Hugging Face folder (it has no config.json); name a GGUF file or a .bin file of "
            "llama2.c itself"
        )
    if (path / SUMMARY).is_file():
        summary = read_summary(path)
        if alone or MIX_FOLDER not in summary:
            return path, path / summary["checkpoint"]
        path /= MIX_FOLDER
    from pretrain.checkpoint.load import list_checkpoints

    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        raise ValueError(f"the run {path} has no checkpoint yet")
    return path, checkpoints[-1]
