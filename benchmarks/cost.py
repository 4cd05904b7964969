"""What training and its result cost: steps, inference, resizing, memory.

    python benchmarks/cost.py                       # everything, about 10 minutes
    python benchmarks/cost.py --only steps --repeats 5

Random data, one thread, processor time; the variants that are compared take turns. Each part writes its
own results/cost_PART.json; cost_table.py makes docs/cost.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from cost_inference import inference
from cost_memory import memory
from cost_resize import resize
from cost_steps import BATCH, PENALTY, K, growth_of_cost, steps

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))

PARTS = {f.__name__: f for f in (steps, inference, resize, memory, growth_of_cost)}


def main() -> None:
    """Measure the parts asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, separated by commas")
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [n for n in names if n not in PARTS]:
        parser.error(f"{unknown[0]!r}: choose from {', '.join(PARTS)}")
    from common import environment

    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        before = environment()  # the load of others: this run adds 1 to it
        results = PARTS[name](options.repeats)
        content = {
            "environment": {**before, "load_after": os.getloadavg()[0]},
            "settings": {"seed": 0, "repeats": options.repeats, "batch": BATCH, "k": K, "penalty": PENALTY},
            "results": results,
        }
        path = HERE / "results" / f"cost_{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
