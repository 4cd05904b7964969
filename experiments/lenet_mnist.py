"""LeNet-5 on MNIST through the command line: dense, pruned and grown, as many epochs each, three seeds.

About 25 minutes on one core: python experiments/lenet_mnist.py --data-dir DIR. Writes results/lenet_mnist.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write

SETTINGS = {
    "--data": "mnist", "--model": "lenet5", "--mode": "both", "--epochs": "15", "--inputs": "fc*", "--cost": "macs",
    "--scale": "log", "--penalty": "0.1", "--batch": "128", "--lr": "1e-3", "--gate-lr": "2e-2",
}  # fmt: skip


def main() -> None:
    """Run the command for every seed and keep its summaries."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            options = [word for pair in SETTINGS.items() for word in pair]
            command = [sys.executable, "-m", "plasticnet", "train", *options, "--seed", str(seed), "--out", folder]
            subprocess.run([*command, "--data-dir", arguments.data_dir], check=True)
            for summary in json.loads((Path(folder) / "summary.json").read_text()).values():
                results.append({"seed": seed, **summary})
        sys.argv = [sys.argv[0], "--data-dir", "DIR"]  # where the data lay says nothing
        write("lenet_mnist", SETTINGS, results)


if __name__ == "__main__":
    main()
