"""What MODEL may name: a run, one checkpoint in it, an imported model, or somebody else's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import Layer, Rules, RunConfig, compose, read_file
from pretrain.train.records import read_json

if TYPE_CHECKING:
    from pretrain.checkpoint import Checkpoint
    from pretrain.distributed import World
    from pretrain.model import Decoder, ModelConfig
    from pretrain.tokenizer import Tokenizer

HELP = (
    "a run directory, one checkpoint in it, an imported model, a Hugging Face folder, a GGUF file, "
    "or a .bin of llama2.c"
)
# What training may do otherwise than the run that weights come from: none of it changes a shape.
_MAY_CHANGE = frozenset({"preset", "dropout", "attention_dropout", "initialization"})


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that is ready to be used, and where it came from."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    path: Path
    """The checkpoint, or somebody else's files."""
    checkpoint: Checkpoint | None
    world: World

    @property
    def precision(self) -> str:
        """The run's own arithmetic where it was trained; elsewhere float32, which every device
        has."""
        same_device = self.config.train.device == self.world.device.type
        return self.config.train.precision if same_device else "fp32"


def open_model(name: str, *, device: str = "auto") -> OpenModel:
    """Open MODEL; of a run its best checkpoint once finished, else its newest."""
    given = Path(name)
    if given.is_file() or (given / "config.json").is_file():
        from pretrain.distributed import open_world
        from pretrain.export import open_foreign

        foreign = open_foreign(given)

        world = open_world(device)
        config = compose([{"model": asdict(foreign.config)}])
        decoder = foreign.build(device=world.device.type).eval()
        return OpenModel(decoder, foreign.tokenizer, config, given, None, world)
    find_checkpoint(given)  # what is no run is said before torch is loaded

    from pretrain.distributed import open_world
    from pretrain.model import LMLoss, build
    from pretrain.parallel import Parallel
    from pretrain.tokenizer import load_tokenizer
    from pretrain.train.run import load_weights

    world = open_world(device)
    run, checkpoint = _opened(given)
    config = compose([read_file(run / "config.yaml")])
    tokenizer = load_tokenizer(run / "tokenizer")
    tokenizer.add_bos = checkpoint.state.get("begins_texts", True)
    tokenizer.stop_ids = checkpoint.state.get("ends", tokenizer.stop_ids)
    trained_with = checkpoint.state.get("fingerprint", {}).get("tokenizer", tokenizer.sha256)
    if tokenizer.sha256 != trained_with:
        raise ValueError(
            f"{run / 'tokenizer'} is not the tokenizer that {checkpoint.path.name} was trained "
            "with: it was changed or damaged"
        )
    decoder = build(config.model, vocab_size=tokenizer.vocab_size, seed=None, device=world.device)
    lm_loss = LMLoss(decoder)
    load_weights(Parallel(lm_loss, lm_loss, world), checkpoint)
    return OpenModel(decoder.eval(), tokenizer, config, checkpoint.path, checkpoint, world)


def _opened(given: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint that a MODEL argument means, while a run may go on, saving and forgetting."""
    from pretrain.checkpoint import DamagedCheckpoint, open_checkpoint

    before = None
    while True:
        run, path = find_checkpoint(given)
        try:
            return run, open_checkpoint(path)
        except DamagedCheckpoint:
            # One that has gone was forgotten for a newer one; the same twice is damage.
            if path.exists() or path == before:
                raise
        before = path


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The run directory and the checkpoint that a MODEL argument means."""
    if not path.exists():
        raise ValueError(f"there is no model at {path}: neither a run directory nor a checkpoint")
    if (path / "manifest.json").is_file() and (path.parent.parent / "config.yaml").is_file():
        return path.parent.parent, path
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{path} is neither a run directory (it has no config.yaml), nor a checkpoint in one, "
            "nor a Hugging Face folder (it has no config.json); a GGUF file or a .bin of llama2.c "
            "is named itself"
        )
    summary = path / "summary.json"
    if summary.is_file():
        return path, path / str(read_json(summary).get("checkpoint"))
    from pretrain.checkpoint import list_checkpoints

    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"the run {path} has no checkpoint yet")
    return path, found[-1]


def first_weights(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that train.init_from names."""
    if config.train.init_from is None:
        return None
    from pretrain.checkpoint import open_checkpoint

    return open_checkpoint(find_checkpoint(Path(config.train.init_from))[1])


def with_first_weights(
    below: list[Layer], above: list[Layer], *, also: Rules | None = None
) -> RunConfig:
    """A config from layers, `above` winning; where train.init_from is set, architecture and
    tokenizer are that model's, and `below` (a recipe's) says nothing of them. `also`: see compose.

    ValueError for a setting in `above` under which the weights would not fit.
    """
    config = compose([*below, *above], also=also)
    if config.train.init_from is None:
        return config
    source = Path(config.train.init_from)
    if not (source / "config.yaml").is_file() and not (source / "manifest.json").is_file():
        raise ValueError(
            f"train.init_from {source} is neither a run nor a checkpoint; somebody else's model is "
            f"imported first: pretrain import {source} --out DIR"
        )
    run, checkpoint = find_checkpoint(source)
    theirs = compose([read_file(run / "config.yaml")]).model
    came: Layer = {
        "model": {**asdict(theirs), "preset": None},
        "tokenizer": {"name": str((run / "tokenizer").resolve()), "vocab_size": None},
        "train": {"init_from": str(checkpoint.resolve())},
    }
    rest = [{k: v for k, v in each.items() if k not in ("model", "tokenizer")} for each in below]
    kept = [{**each, "train": _without_source(each)} if "train" in each else each for each in above]

    def misfits(config: RunConfig) -> Iterator[tuple[str, str]]:
        if any("tokenizer" in each for each in above):
            sentence = "tokenizer settings do not go with train.init_from: its own is used"
            yield "train.init_from", sentence
        yield from _misfits(theirs, config.model)

    return compose([*rest, came, *kept], also=misfits)


def _without_source(layer: Layer) -> dict[str, object]:
    return {key: value for key, value in layer["train"].items() if key != "init_from"}


def _misfits(old: ModelConfig, new: ModelConfig) -> Iterator[tuple[str, str]]:
    """Why weights of the old model do not fit the new one: fields, and a sentence."""
    may_change = _MAY_CHANGE | (frozenset() if old.position == "learned" else {"context_length"})
    before, after = asdict(old), asdict(new)
    changes = {
        f"model.{key}": f"model.{key} {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and key not in may_change
    }
    if changes:
        sentence = f"the weights of train.init_from would not fit: {'; '.join(changes.values())}"
        yield " ".join(changes), sentence
