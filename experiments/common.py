"""What every experiment records beside its numbers."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import plasticnet

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions, device, threads, load, date and commit."""
    commit, changed = (
        subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "../src", "."))
    )
    changed = [line for line in changed.stdout.splitlines() if "results/" not in line]
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *without_folders(sys.argv[1:])]),
        "plasticnet": plasticnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {model}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() + (" and changes" if changed else ""),
    }


def without_folders(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with DIR for the folders of a machine."""
    before = ["", *arguments]
    return [
        "DIR" if last in ("--data-dir", "--cache") else re.sub(r"^(--(?:data-dir|cache)=).*", r"\1DIR", argument)
        for last, argument in zip(before, arguments, strict=False)
    ]


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def write(name: str, settings: dict[str, Any], results: Any) -> None:
    """Write ``results/NAME.json``, with the environments of earlier runs of which it keeps the results."""
    RESULTS.mkdir(exist_ok=True)
    path, now = RESULTS / f"{name}.json", environment()
    before = earlier(json.loads(path.read_text()), now, results) if path.exists() else []
    content = {"environment": now, **({"earlier": before} if before else {}), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def earlier(old: dict[str, Any], now: dict[str, Any], results: Any) -> list[dict[str, Any]]:
    """The environments of all runs but the present one that had a part in results, the latest last.

    Args:
        old: What the file holds.
        now: The environment of the present run.
        results: What the present run writes.
    """
    kept = set(map(json.dumps, results)) if isinstance(results, list) else set()
    if any(json.dumps(row) not in kept for row in old["results"]):
        return []  # the run began anew
    runs = [*old.get("earlier", []), old["environment"]]
    return [run for run in runs if any(run[k] != now[k] for k in ("command", "commit", "device"))]


def written(name: str) -> list[dict[str, Any]]:
    """The results that ``results/NAME.json`` has so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def known(name: str, **what: Any) -> bool:
    """Whether ``results/NAME.json`` has a row with these values."""
    return any(all(row.get(k) == v for k, v in what.items()) for row in written(name))


def between(text: str, name: str, content: str) -> str:
    """``text`` with this content between its markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def publish(files: Mapping[Path, str]) -> int:
    """Write the files; with --check on the command line only say whether they are up to date: 0, or 1."""
    if "--check" in sys.argv:
        return int(any(not path.exists() or path.read_text() != text for path, text in files.items()))
    for path, text in files.items():
        path.write_text(text)
    return 0


def how(content: dict[str, Any]) -> str:
    """A line on how results were obtained, from the content of their file."""
    e, before = content["environment"], len(content.get("earlier", []))
    runs = f" Some rows come from {before} earlier run{'s' * (before > 1)}, which the JSON names." if before else ""
    after = f" before and {e['load_after']:.1f} after" if "load_after" in e else " at the end"
    return (
        f"`{e['command']}`: torch {e['torch']}, {e['threads']} thread, {e['device']}, load {e['load']:.1f}{after}, "
        f"{e['date']}, commit {e['commit']}.{runs}"
    )


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """A picture that ``draw(figure)`` makes, as SVG: equal results give equal bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # The date and the version are left out, ids are fixed, text stays text.
    with mpl.rc_context({"svg.hashsalt": "plasticnet", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = plt.figure(figsize=size)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def spread(values: list[float], digits: int = 2) -> str:
    """``mean ± standard deviation``."""
    middle = f"{mean(values):,.{digits}f}"
    return f"{middle} ± {stdev(values):,.{digits}f}" if len(values) > 1 else middle
