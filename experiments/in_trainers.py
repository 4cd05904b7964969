"""A small BERT on SST-2 in the Trainer and a ViT on Fashion-MNIST in Lightning, cut to half of their multiply-adds.

Runs examples/bert_in_trainer.py and examples/vit_in_lightning.py with three seeds each, some five minutes a run on one
core: python experiments/in_trainers.py --data-dir DIR. DIR holds FashionMNIST/raw and text/sst2. Lightning must be
there. Adds rows to results/in_trainers.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import known, write, written

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
NAME = "in_trainers"


def bert(data: Path, seed: int) -> dict[str, float]:
    """BERT in the Trainer."""
    from bert_in_trainer import run

    return run(data / "text" / "sst2", seed)


def vit(data: Path, seed: int) -> dict[str, float]:
    """The vision transformer in Lightning."""
    from vit_in_lightning import run

    return run(data, seed)


WAYS: dict[str, Callable[[Path, int], dict[str, float]]] = {"BERT": bert, "ViT": vit}


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.seeds):
        for name, run in WAYS.items():
            if not known(NAME, network=name, seed=seed):
                begun = time.process_time()
                row: dict[str, Any] = {"network": name, "seed": seed, **run(options.data_dir, seed)}
                row["CPU seconds"] = round(time.process_time() - begun, 1)
                write(NAME, {}, [*written(NAME), row])
                print(row, flush=True)


if __name__ == "__main__":
    main()
