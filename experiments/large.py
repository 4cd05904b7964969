"""What `pn.shrink` takes for large models: time and memory from 0.1B to 1.1B parameters.

Llamas of `transformers` with random weights, in bfloat16, on the CPU, are cut to 0.8 of their parameters, with scores
and repair on 32 sequences of 256 random tokens, one sequence in a batch. As a language model is used for its logits,
their ``use_cache`` is off. All have 4 key-value heads, heads of 64 and 32,000 tokens in their vocabulary:

- 0.1B: hidden 768, 8 layers, 12 heads, intermediate 2112
- 0.3B: hidden 1024, 20 layers, 16 heads, intermediate 2816
- 0.6B: hidden 1536, 20 layers, 24 heads, intermediate 4224
- 1.1B: hidden 2048, 22 layers, 32 heads, intermediate 5632, the shape of TinyLlama

Random weights say nothing of what a cut costs a trained model: no unit does what others do, so that the repair has
nothing to gain.

Every size runs in a process of its own, with one thread. The parts of a run are "attach" (`PlasticNet`), "scores"
(`pn.scores`), "cut" (`prune_once`) and "repair" (`pn.repair`); "rest" are the errors of the whole network, the cut one
and the repaired one, the variance of the outputs, the copy that is cut, and the times of a forward pass, all of which
`shrink` takes too. Memory is the peak of each part, as the kernel counts it (VmHWM), and all parts over what the
process had when the model was there. It takes some minutes for 0.1B, a quarter of an hour for 0.3B, and more than an
hour for 1.1B.

Needs ``transformers``. ``--data-dir`` is not read, because the tokens are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write, written
from torch import nn

import plasticnet as pn
from plasticnet.shrinking import shrink as shrinking

NAME = "large"
SHAPES = {  # hidden, layers, heads, intermediate
    "0.1B": (768, 8, 12, 2112),
    "0.3B": (1024, 20, 16, 2816),
    "0.6B": (1536, 20, 24, 4224),
    "1.1B": (2048, 22, 32, 5632),
}
VOCABULARY, KEY_VALUE_HEADS = 32000, 4
PARTS = {"PlasticNet": "attach", "scores_of": "scores", "prune_once": "cut", "repaired": "repair"}


def llama(size: str) -> nn.Module:
    """A Llama of one of the sizes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, intermediate = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        num_key_value_heads=KEY_VALUE_HEADS, vocab_size=VOCABULARY, use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def memory(key: str) -> float:
    """A figure of this process that the kernel keeps, such as VmRSS or VmHWM, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[key].split()[0]) / 1024


class Parts:
    """The CPU seconds and the peak memory of each part of a run of `shrink`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*PARTS.values(), "rest"], 0.0)
        self.peak = dict.fromkeys(self.seconds, 0.0)
        self._begun = time.process_time()

    def note(self, part: str) -> None:
        """Count what was since the last note for a part."""
        self.seconds[part] += time.process_time() - self._begun
        self.peak[part] = max(self.peak[part], memory("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._begun = time.process_time()

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that notes what it takes."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.note("rest")
            found = function(*args, **kwargs)
            self.note(part)
            print(f"{part}: {self.seconds[part]:.0f} s, {self.peak[part]:.0f} MiB", file=sys.stderr, flush=True)
            return found

        return noting


def measured(size: str, sequences: int, tokens: int, share: float) -> dict[str, Any]:
    """Shrink one model, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = llama(size)
    batches = list(torch.randint(VOCABULARY, (sequences, tokens)).split(1))
    model(batches[0][:, :8])  # so that what torch loads at first is there
    gc.collect()
    before, parts = memory("VmRSS"), Parts()
    for name, part in PARTS.items():
        setattr(shrinking, name, parts.of(part, getattr(shrinking, name)))
    parts.note("rest")
    parts.seconds["rest"] = 0.0
    small, report = pn.shrink(model, batches, pn.Budget(params=share), outputs=lambda output: output.logits)
    parts.note("rest")
    peak = max(parts.peak.values())
    return {
        "size": size,
        "sequences": sequences,
        "tokens": tokens,
        "share": share,
        "seed": 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters after": sum(p.numel() for p in small.parameters()),
        "units": {site.name: [site.after, site.before] for site in report.sites},
        "error": {step.name: step.error for step in report.steps},
        "left out": report.left_out,
        "milliseconds": report.milliseconds,
        "cpu_seconds": {**parts.seconds, "all": sum(parts.seconds.values())},
        "mib": {"model": before, "peak": peak, "over the model": peak - before, "by part": parts.peak},
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure the sizes that are not known yet, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--only-show", action="store_true", help="measure one size here, and write nothing")
    options = parser.parse_args()
    if options.only_show:
        print(json.dumps(measured(options.size[0], options.sequences, options.tokens, options.share)))
        return
    torch.set_num_threads(1)  # for what is written of the environment
    for size in options.size:
        what = {"size": size, "sequences": options.sequences, "tokens": options.tokens, "share": options.share}
        if any(all(row[k] == v for k, v in what.items()) for row in written(NAME)):
            continue
        given = [str(x) for name, value in what.items() for x in (f"--{name}", value)]
        command = [sys.executable, __file__, "--only-show", *given]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        print({k: v for k, v in row.items() if k != "units"}, flush=True)
        shapes = {
            n: dict(zip(("hidden", "layers", "heads", "intermediate"), s, strict=True)) for n, s in SHAPES.items()
        }
        write(NAME, {"shapes": shapes, "dtype": "bfloat16"}, [*written(NAME), row])


if __name__ == "__main__":
    main()
