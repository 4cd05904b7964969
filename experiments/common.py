"""What every experiment records beside its numbers."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import plasticnet

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions, device, threads, load, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "plasticnet": plasticnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {model}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def write(name: str, settings: dict[str, Any], results: Any) -> None:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    content = {"environment": environment(), "settings": settings, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def spread(values: list[float], digits: int = 2) -> str:
    """``mean ± standard deviation``."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):,.{digits}f} ± {deviation:,.{digits}f}"
