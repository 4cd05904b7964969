"""What is still frozen, with all options, in the models of the zoo in which a peer prunes exactly what is frozen here.

By default plasticnet keeps every output as it is, and what LayerNorms normalise. The models in which Torch-Pruning is
exact and more than 5 % of the parameters are frozen are gated again with ``residual=True`` and ``outputs=``, which
says that only the first output is read. A minute on one core: python benchmarks/zoo_open.py. It reads results/zoo.json
and writes results/zoo_open.json.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zoo import packages, write
from zoo_measure import CLOSED_SHARES, build, close_gates, double, prunable_share, randomise, run
from zoo_table import stricter

import plasticnet as pn
from plasticnet.tools.difference import relative_difference

RESULTS = Path(__file__).parent / "results"
SEED = 0


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


def measured(name: str) -> dict[str, Any]:
    """A model with all options: what can be pruned, what is frozen, and the error of compaction in the first output."""
    _, model, inputs = build(name, SEED)
    net = pn.PlasticNet(model, inputs, residual=True, outputs=first)
    torch.manual_seed(SEED)
    twin, inputs = copy.deepcopy(net).double().eval(), double(inputs)
    randomise(twin.model)
    errors = {}
    for share in CLOSED_SHARES:
        close_gates(twin, share)
        with torch.no_grad():
            errors[f"{share:.0%}"] = relative_difference(run(twin, inputs)[:1], run(twin.compact(), inputs)[:1])
    return {"name": name, "prunable": prunable_share(net), "error": errors, "frozen": dict(net.frozen)}


def main() -> None:
    """Measure all of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [measured(r["name"]) for r in stricter(json.loads((RESULTS / "zoo.json").read_text())["results"])]
    for row in rows:
        print(f"{row['name']}: {row['prunable']:.0%}, error {max(row['error'].values()):.0e}, frozen: {row['frozen']}")
    from common import environment  # which zoo_table lets be found

    head = {"environment": {**environment(), "packages": packages()}, "settings": {"seed": SEED}}
    write(RESULTS / "zoo_open.json", head, rows)


if __name__ == "__main__":
    main()
