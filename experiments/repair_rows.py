"""How many rows `pn.repair` should read: the error after it, and the seconds it takes.

Rows are positions of all inputs that are read. A layer's sums take time with the rows times the square of its inputs,
so a fixed number of rows for each input makes the time cubic. Networks are cut once, and copies are repaired with so
many rows for each input. At least 8,192 rows are read for any layer, so only wide layers can show a difference. Errors
are those of other inputs, to the outputs of the model itself.

Minutes a network on one core: python experiments/repair_rows.py --data-dir DIR --network "MTCNN ONet". Adds rows to
results/repair_rows.json; rows that are there are skipped.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from cifar import BATCH, images, published
from common import known, write, written
from packages import Errors, network_of
from packages_models import MODELS, Case

import plasticnet as pn
from plasticnet.repairing import paired
from plasticnet.tools.batches import calibration

CALIBRATE = 2048


def case_of(network: str, folder: Path) -> Case:
    """A model with inputs to fit and to test by."""
    if network in MODELS:
        return MODELS[network](0)
    x, test = images(folder, "train", CALIBRATE)[0], images(folder, "test", 10_000)[0]
    depth = int(network.removeprefix("ResNet-"))
    return Case(published(depth, folder), list(x.split(BATCH)), [], list(test.split(BATCH)), last=(), classes=True)


class Cut:
    """A network whose units are closed to a share of its multiply-adds."""

    def __init__(self, case: Case, share: float, scores: str) -> None:
        self.case, self.errors, self.data = case, Errors(case), calibration(case.fitted, CALIBRATE)
        self.options = {k: v for k, v in case.options.items() if k in ("forward", "outputs")}
        self.net = network_of(case)
        found = pn.scores(self.net, scores, batches=self.data.fitted, **self.options)
        pn.prune_once(self.net, pn.Budget(macs=share), scores=found, per_cost=True, cut=False)

    def repaired(self, rows: int) -> dict[str, Any]:
        """Repair a copy with so many rows for each input, and measure it."""
        paired.ROWS, net = rows, copy.deepcopy(self.net)
        at_once = self.errors.of(net.compact(), self.case.test)
        begun = time.process_time()
        pn.repair(net, self.data, **self.options)
        seconds = time.process_time() - begun
        return {
            "error": {"at once": at_once, "repaired": self.errors.of(net.compact(), self.case.test)},
            "seconds": seconds,
        }


def main() -> None:
    """Measure networks at a share with several numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--network", nargs="+", required=True)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--scores", choices=("fisher", "repair"), default="fisher")
    parser.add_argument("--rows", nargs="+", type=int, default=(32, 8, 4))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for network in options.network:
        what = {"network": network, "share": options.share, "scores": options.scores}
        wanted = [n for n in options.rows if not known("repair_rows", **what, rows=n)]
        cut = Cut(case_of(network, options.data_dir), options.share, options.scores) if wanted else None
        for n in wanted:
            found = {**what, "rows": n, **cut.repaired(n)}
            print(found, flush=True)
            write("repair_rows", {"calibrate": CALIBRATE}, [*written("repair_rows"), found])


if __name__ == "__main__":
    main()
