"""A peer trains or is scored, by its own code: in a process of its own, in a copy of its checkout.

python peers.py nanoGPT DATA RUN SEED FLAG...     # train.py, unmodified
python peers.py nanochat DATA RUN SEED FLAG...    # scripts/base_train.py, unmodified
python peers.py nanoGPT DATA RUN                  # nats over all of val.bin

DATA has train.bin and val.bin, ids in uint16, and meta.pkl with the vocabulary's size. What is
changed around the scripts is said at each change: the seed that they write down, and for nanochat
where the ids come from.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Both ignore such targets.
IGNORE_INDEX = -1
ROWS = 16
Nats = Callable[[Tensor, Tensor], Tensor]


def total_nats(nats: Nats, ids: NDArray[np.int64], *, context: int) -> float:
    """Every id but the first is predicted once, in windows that do not overlap: as ours is scored.
    `nats` of inputs and targets (B, T) are their sum."""
    targets = np.append(ids[1:], np.full(-(len(ids) - 1) % context, IGNORE_INDEX))
    inputs = np.append(ids[:-1], np.zeros(len(targets) - len(ids) + 1, dtype=np.int64))
    both_NT = [torch.from_numpy(ids.reshape(-1, context)) for ids in (inputs, targets)]
    with torch.no_grad():
        return sum(
            float(nats(*(each[row : row + ROWS] for each in both_NT)))
            for row in range(0, len(both_NT[0]), ROWS)
        )


def train_nanogpt(data: Path, run: Path) -> None:
    import model  # type: ignore[import-not-found]

    # What train.py does on a GPU (`with ctx`), and leaves out on a CPU.
    if os.environ.get("AUTOCAST") == "bfloat16":
        model.GPT.forward = torch.autocast("cpu", torch.bfloat16)(model.GPT.forward)
    sys.argv += [f"--dataset={data}", f"--out_dir={run}"]
    runpy.run_path("train.py", run_name="__main__")


def open_nanogpt(run: Path) -> tuple[Nats, int]:
    from model import GPT, GPTConfig

    kept = torch.load(run / "ckpt.pt", map_location="cpu", weights_only=True)
    decoder = GPT(GPTConfig(**kept["model_args"])).eval()
    weights = {name.removeprefix("_orig_mod."): w for name, w in kept["model"].items()}
    decoder.load_state_dict(weights)

    def nats(inputs: Tensor, targets: Tensor) -> Tensor:
        return decoder(inputs, targets)[1] * (targets != IGNORE_INDEX).sum()  # type: ignore[no-any-return]

    return nats, decoder.config.block_size


def train_nanochat(data: Path, run: Path) -> None:
    """Its loader packs documents so that each row begins with one, and crops the rest, which on
    long documents trains on their first lines alone; here windows begin anywhere, as nanoGPT's
    do."""
    ids = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")
    n_entries = _vocab_size(data)

    def windows(
        _: object, rows: int, length: int, *, device: Any, **__: object
    ) -> Iterator[tuple[Any, ...]]:
        place = {"epoch": 0, "pq_idx": 0, "rg_idx": 0}
        while True:
            starts = torch.randint(len(ids) - length, (rows,)).tolist()
            both = np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)
            both_BT = torch.from_numpy(both).to(device)
            yield both_BT[:, :-1].contiguous(), both_BT[:, 1:].contiguous(), place

    tokenizer = SimpleNamespace(get_vocab_size=lambda: n_entries)
    _stand_in("wandb")
    _stand_in("nanochat.tokenizer", get_tokenizer=lambda: tokenizer, get_token_bytes=lambda **_: 0)
    loader = "tokenizing_distributed_data_loader"
    names = (f"{loader}_bos_bestfit", f"{loader}_with_state_bos_bestfit")
    _stand_in("nanochat.dataloader", **dict.fromkeys(names, windows))
    # They write samples and judge tasks, which no flag of ours asks for.
    _stand_in("nanochat.engine", Engine=None)
    _stand_in("scripts.base_eval", evaluate_core=None)
    os.environ["NANOCHAT_BASE_DIR"] = str(run)
    runpy.run_module("scripts.base_train", run_name="__main__")


def open_nanochat(run: Path) -> tuple[Nats, int]:
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    (weights,) = run.glob("base_checkpoints/*/model_*.pt")
    (about,) = run.glob("base_checkpoints/*/meta_*.json")
    decoder = GPT(GPTConfig(**json.loads(about.read_text())["model_config"]))
    decoder.init_weights()
    decoder.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    decoder.eval()

    def nats(inputs: Tensor, targets: Tensor) -> Tensor:
        return decoder(inputs, targets, loss_reduction="sum")  # type: ignore[no-any-return]

    return nats, decoder.config.sequence_len


PEERS = {
    "nanoGPT": (train_nanogpt, open_nanogpt),
    "nanochat": (train_nanochat, open_nanochat),
}


def _stand_in(module: str, **names: Any) -> None:
    sys.modules[module] = ModuleType(module)
    vars(sys.modules[module]).update(names)


def _vocab_size(data: Path) -> int:
    return int(pickle.loads((data / "meta.pkl").read_bytes())["vocab_size"])


def main() -> None:
    who, data, run, *rest = sys.argv[1:]
    sys.path.insert(0, os.getcwd())  # the peer's own modules, before those next to this file
    train, opened = PEERS[who]
    if not rest:
        nats, context = opened(Path(run))
        ids = np.fromfile(Path(data) / "val.bin", np.uint16).astype(np.int64)
        print(total_nats(nats, ids, context=context))
        return
    # Both scripts seed torch with a number that is written in them.
    plain, seed = torch.manual_seed, int(rest[0])
    torch.manual_seed = lambda given: plain(given + seed)  # type: ignore[assignment]
    sys.argv = [who, *rest[1:]]
    train(Path(data), Path(run))


if __name__ == "__main__":
    main()
