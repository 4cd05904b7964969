"""How long `PlasticNet(model, inputs)` takes with large models, self-check included, and Llama-7B by its shapes.

    python benchmarks/attach.py

Every model runs in a process of its own, on one image of 224 pixels (Llama: two rows of eight tokens on the
meta device, where nothing is checked), with two threads. Takes about 5 minutes and 8 GiB of memory. Writes
results/attach.json; zoo_table.py puts it on the page of the zoo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "attach.json"
MODELS = (
    "torchvision:resnet50", "torchvision:densenet201", "torchvision:efficientnet_v2_l", "torchvision:maxvit_t",
    "torchvision:swin_b", "torchvision:convnext_large", "torchvision:vit_h_14", "torchvision:regnet_y_128gf",
    "transformers:llama",
)  # fmt: skip


def child(name: str) -> dict[str, Any]:
    """Seconds of one model, by the clock and of the processor."""
    import torch

    from plasticnet import PlasticNet
    from plasticnet.apps.models import build_model, example_inputs, factory

    torch.set_num_threads(2)
    meta = name.startswith("transformers:")
    shape = None if meta else (1, 3, 224, 224)
    make = factory(name, (3, 224, 224), None, full=meta)
    model = build_model(make, meta)
    inputs = example_inputs(name, model, shape)
    forward = None if meta else alone(model.eval(), inputs)
    clock, cpu = time.perf_counter(), time.process_time()
    net = PlasticNet(model, inputs)
    return {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
        "forward": forward,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(net.sites),
        "checked": net.checked,
    }


def alone(model: Any, inputs: Any) -> float:
    """Seconds of one forward pass of the model itself, after one that does not count."""
    import torch

    with torch.inference_mode():
        for _ in range(2):
            clock = time.perf_counter()
            model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(
                inputs
            )
    return time.perf_counter() - clock


def main() -> None:
    """Measure every model some times, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names to run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return

    import torch
    from common import environment

    torch.set_num_threads(2)
    rows: dict[str, list[dict[str, Any]]] = {n: [] for n in MODELS if options.only in n}
    for _ in range(options.repeats):
        for name, found in rows.items():
            done = subprocess.run(
                [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:32} {found[-1]['seconds']:6.1f} s", flush=True)
    results = [
        {
            **found[0],
            "name": name,
            "seconds": median(r["seconds"] for r in found),
            "cpu_seconds": median(r["cpu_seconds"] for r in found),
            "forward": None if found[0]["forward"] is None else median(r["forward"] for r in found),
            "runs": [r["seconds"] for r in found],
        }
        for name, found in rows.items()
    ]
    RESULT.parent.mkdir(exist_ok=True)
    content = {"environment": environment(), "settings": {"repeats": options.repeats}, "results": results}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
