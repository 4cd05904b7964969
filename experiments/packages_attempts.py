"""What was tried for the models from packages on which `pn.shrink` misses a target of docs/packages.md.

Each row is one model at one share of its multiply-adds in one way. What a way chooses it chooses by the error after the
repair, on the fifth of the inputs to fit that the repair holds out:

- "default" is what `pn.shrink` does: scores "repair", divided by costs.
- "portfolio" cuts and repairs in several ways, and keeps the best: the scores "repair" and "fisher", divided by costs
  and by their roots, and "repair" with the same share of all sites. Scores that are not divided at all are tried on the
  two smallest models only.
- "steps" cuts in three steps. After each, the network is repaired, and the units that are left are scored anew. The
  last repair is of a fresh copy, from which the same units are cut at once.
- "widths" multiplies the scores of one site after the other by 3 or 1/3, and then by 1.7 or 1/1.7, and keeps what
  makes the error after the repair smaller. It is tried on the two smallest models, where a repair takes seconds.
- "inputs" repairs, and does not score, on 4,096 more inputs; on the two smallest models. Some of what the repair is
  then fitted to is in "held out".
- "ridge" lets the repair choose none of the strengths below 0.1 of the mean square of the inputs; on the others.

On the two smallest models all but "default" are fine-tuned as in packages.py, which has done so with the default.
"error" is that on the inputs of the test, "held out" the one that decides, "tries" the number of repairs, and "seconds"
CPU seconds of scores, cuts and repairs.

python experiments/packages_attempts.py --model "MTCNN RNet" --share 0.7 0.5 takes about three minutes of CPU time for
each share; the larger models take longer. Adds rows to results/packages_attempts.json; rows that are there are skipped.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from common import known, write, written
from packages import Errors, network_of, tuned
from packages_models import MODELS, Case, images
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.budgets.projection import prices
from plasticnet.repairing import ridge
from plasticnet.tools.batches import calibration

NAME = "packages_attempts"
SIZES = {"MTCNN PNet": 48, "MTCNN RNet": 24}  # the smallest models, and the sizes of their images
FACTORS = (3.0, 1.7)  # by which the scores of a site are multiplied or divided
STEPS = 3
STRONG = (1e-1, 1.0, 10.0)  # the strengths of "ridge"
Worth = Mapping[str, Tensor]


class Attempts:
    """The ways to cut one model to one share.

    Args:
        case: The model.
        errors: Compares networks with it.
        share: What is to be left of its multiply-adds.
        found: The scores of its units by their kind, filled as they are needed.
    """

    def __init__(self, case: Case, errors: Errors, share: float, found: dict[str, Worth]) -> None:
        self.case, self.errors, self.share, self.found = case, errors, share, found
        self.options = {k: case.options[k] for k in ("forward", "outputs") if k in case.options}
        self.data = calibration(case.fitted, 2048)
        self.net = network_of(case)
        self.costs = prices(self.net, pn.Budget(macs=share).targets(self.net))
        self.tries = 0

    def scores(self, kind: str, exponent: float) -> Worth:
        """The scores of a kind, divided by a power of what the units cost."""
        if kind not in self.found:
            self.found[kind] = pn.scores(self.net, kind, batches=self.data.fitted, **self.options)
        return self.divided(self.found[kind], exponent)

    def divided(self, worth: Worth, exponent: float) -> Worth:
        """Scores divided by a power of what the units cost."""
        return {n: v.double() / torch.as_tensor(self.costs[n]) ** exponent for n, v in worth.items()}

    def cut(
        self, worth: Worth, share: float | None = None, scope: Any = "global", batches: Any = None
    ) -> tuple[float, pn.PlasticNet]:
        """Close units of a copy, repair it, and return its error on the inputs held out, and the copy."""
        net = copy.deepcopy(self.net)
        budget = pn.Budget(macs=self.share if share is None else share)
        pn.prune_once(net, budget, scores=dict(worth), per_cost=False, scope=scope, cut=False)
        data, most = (self.data, 2048) if batches is None else (batches, 10**6)
        pn.repair(net, data, calibrate=most, **self.options)
        self.tries += 1
        return self.errors.of(net.compact(), self.data.held_out), net

    def default(self) -> pn.PlasticNet:
        """What `pn.shrink` does."""
        return self.cut(self.scores("repair", 1.0))[1]

    def portfolio(self) -> pn.PlasticNet:
        """The best of several ways to choose units."""
        exponents = (1.0, 0.5, 0.0) if self.small else (1.0, 0.5)
        tried = [self.cut(self.scores(kind, e)) for kind in ("repair", "fisher") for e in exponents]
        tried.append(self.cut(self.scores("repair", 0.0), scope="uniform"))
        return min(tried, key=lambda t: t[0])[1]

    def steps(self) -> pn.PlasticNet:
        """Units that are scored anew after a part of the cut and its repair."""
        _, net = self.cut(self.scores("repair", 1.0), self.share ** (1 / STEPS))
        for i in range(2, STEPS + 1):
            anew = pn.scores(net, "repair", batches=self.data.fitted, **self.options)
            # What is closed has a score of 0, and goes before all that is open.
            worth = {n: torch.where(net.sites[n].open, v.double().clamp(min=1e-30), 0.0) for n, v in anew.items()}
            _, net = self.cut(self.divided(worth, 1.0), self.share ** (i / STEPS))
        return net

    def widths(self) -> pn.PlasticNet:
        """The widths that a search from site to site finds."""
        base = self.scores("repair", 1.0)
        least, best = self.cut(base)
        factors = dict.fromkeys(base, 1.0)
        for factor in FACTORS:
            for name in base:
                for f in (factor, 1 / factor):
                    other = {**factors, name: factors[name] * f}
                    error, net = self.cut({n: v * other[n] for n, v in base.items()})
                    if error < least:
                        least, best, factors = error, net, other
                        break
        return best

    def inputs(self, name: str, seed: int) -> pn.PlasticNet:
        """The default with more inputs for the repair."""
        more = images(4096, SIZES[name], 1000 + seed).split(32)
        return self.cut(self.scores("repair", 1.0), batches=[*self.data.fitted, *more])[1]

    def ridge(self) -> pn.PlasticNet:
        """The default with strong ridges only."""
        with strengths(STRONG):
            return self.cut(self.scores("repair", 1.0))[1]

    @property
    def small(self) -> bool:
        """Whether the model has few parameters."""
        return sum(p.numel() for p in self.case.model.parameters()) < 200_000


@contextmanager
def strengths(values: tuple[float, ...]) -> Iterator[None]:
    """Let the repair choose among these strengths."""
    before = ridge.STRENGTHS
    ridge.STRENGTHS = values
    try:
        yield
    finally:
        ridge.STRENGTHS = before


def ways(name: str) -> tuple[str, ...]:
    """What is tried for a model."""
    return ("default", "portfolio", "steps", "widths", "inputs") if name in SIZES else (
        "default", "portfolio", "steps", "ridge",
    )  # fmt: skip


def measured(name: str, case: Case, errors: Errors, share: float, way: str, seed: int, found: dict[str, Worth]) -> Any:
    """One row."""
    work, begun = Attempts(case, errors, share, found), time.process_time()
    make: Callable[[], pn.PlasticNet] = getattr(work, way)
    net = work.inputs(name, seed) if way == "inputs" else make()
    small: nn.Module = net.compact()
    row = {
        "seconds": time.process_time() - begun,
        "tries": work.tries,
        "error": {"held out": errors.of(small, work.data.held_out), "repaired": errors.of(small, case.test)},
        "units": {n: int(s.open.sum()) for n, s in net.sites.items()},
    }
    if name in SIZES and way != "default":
        trained = tuned(case, errors, small, seed)
        row["error"]["tuned"], row["rate"] = trained["error"], trained["rate"]
    return row


def main() -> None:
    """Measure models at shares, in all ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="not needed: all inputs are made")
    parser.add_argument("--model", nargs="+", choices=MODELS, required=True)
    parser.add_argument("--share", nargs="+", type=float, default=(0.5,))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--way", nargs="+", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in options.model:
        for seed in options.seeds:
            torch.manual_seed(seed)
            case, found = MODELS[name](seed), dict[str, Worth]()
            errors = Errors(case)
            for share in options.share:
                for way in options.way or ways(name):
                    key = {"model": name, "share": share, "way": way, "seed": seed}
                    if not known(NAME, **key):
                        row = {**key, **measured(name, case, errors, share, way, seed, found)}
                        print(row, flush=True)
                        write(NAME, {}, [*written(NAME), row])


if __name__ == "__main__":
    main()
