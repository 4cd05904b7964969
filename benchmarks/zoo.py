"""Run every model of the zoo, each in a process of its own, and collect a row for each as JSON.

``make zoo`` installs what is needed and runs ``python benchmarks/zoo.py``; zoo_table.py writes
docs/zoo.md from the result. Rows are written as they come, so that an interrupted run can be
continued with ``--resume``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))

RESULT = HERE / "results" / "zoo.json"
PACKAGES = (
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch-pruning",
    "peft",
    "torch-geometric",
    "diffusers",
    "ultralytics",
)


def preload() -> None:
    """Import what the models need, once, before the processes are forked: imports take longer than most models."""
    import torch
    import zoo_measure  # noqa: F401

    torch.set_num_threads(1)
    for package in ("timm", "transformers", "torch_geometric", "onnxruntime", "onnxscript", "torch._dynamo"):
        with suppress(ImportError):
            importlib.import_module(package)


def child(name: str, part: str, out: Path, errors: Path, options: argparse.Namespace) -> None:
    """Measure one model; called in a process of its own."""
    import torch

    with errors.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)

    def report(row: dict[str, Any]) -> None:
        out.write_text(json.dumps(row))

    if part == "plasticnet":
        from zoo_measure import measure

        measure(name, options.seed, report, not options.skip_onnx, options.residual)
    else:
        from zoo_pruning import compare

        compare(name, options.seed, report)


def part_of_row(name: str, part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a child with a time limit; what it had reported when it crashed or ran out of time counts."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "row.json", Path(folder) / "errors.txt"
        process = multiprocessing.get_context("fork").Process(target=child, args=(name, part, out, errors, options))
        process.start()
        process.join(options.timeout)
        trouble, said = None, ""
        if process.exitcode is None:
            process.kill()
            process.join()
            trouble = f"timeout after {options.timeout:.0f} s"
        elif process.exitcode:
            said = errors.read_text(errors="replace") if errors.exists() else ""
            trouble = f"crash: {(said.strip().splitlines() or [f'exit {process.exitcode}'])[-1][:300]}"
        row = json.loads(out.read_text()) if out.exists() else {}
        if trouble and "status" not in row:
            row["status"] = trouble
        if said:
            row["traceback"] = re.sub(r"/\S*/(?=[^/\s]+\.py)", "", said)[-3000:]  # without folders of the machine
        return row


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: ours, and torch-pruning's under "torch_pruning"."""
    row = {"name": name, **part_of_row(name, "plasticnet", options)}
    if not options.skip_torch_pruning:
        row["torch_pruning"] = part_of_row(name, "torch-pruning", options)
    return row


def carried(row: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what was skipped in it taken from an earlier result file, and the commit and the date of that."""
    before = next((r for r in earlier["results"] if r["name"] == row["name"]), {})
    row = {**row, "carried": dict(row.get("carried", {}))}
    for part in ("onnx", "torch_pruning"):
        if part not in row and part in before:
            commit = before.get("commit", earlier["environment"]["commit"])
            row[part] = before[part]
            row["carried"][part] = before.get("carried", {}).get(
                part, {"commit": commit, "date": earlier["environment"]["date"]}
            )
    return row


def chosen(options: argparse.Namespace) -> list[str]:
    """The names asked for."""
    from zoo_models import FAST, MODELS

    names = list(FAST) if options.fast else list(MODELS)
    return [n for n in names if fnmatchcase(n, options.only)]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the rows were measured with."""
    keys = ("seed", "timeout", "threads", "jobs", "only", "fast", "residual", "skip_onnx", "skip_torch_pruning")
    return {key: getattr(options, key) for key in keys}


def packages() -> dict[str, str]:
    """The versions of the libraries that the models come from."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(path: Path, head: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Replace the result file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**head, "results": list(rows)}, indent=1) + "\n")
    partial.replace(path)


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    parts = [f"{row['name']:45}", str(row.get("status", "?"))]
    if "sites" in row:
        parts.append(
            f"[{row['sites']} sites, {len(row['frozen'])} frozen, {row['prunable']:.0%}, {row['seconds']:.0f} s]"
        )
    parts += [f"onnx: {row['onnx']}"] if "onnx" in row else []
    parts += [f"torch-pruning: {row['torch_pruning'].get('status')}"] if "torch_pruning" in row else []
    return "  ".join(parts)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to run, such as 'timm/*'")
    parser.add_argument("--fast", action="store_true", help="about a tenth of the zoo, quick models of all kinds")
    parser.add_argument("--skip-torch-pruning", action="store_true")
    parser.add_argument("--skip-onnx", action="store_true")
    parser.add_argument("--residual", action="store_true", help="gate what LayerNorms normalise, too")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model and library")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has already")
    parser.add_argument("--carry", type=Path, help="an earlier result, from which what is skipped is taken in the end")
    parser.add_argument("--out", type=Path, help="default: results/zoo.json, or zoo_part.json for a part of the zoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    if options.out is None:
        options.out = RESULT if options.only == "*" and not options.fast else RESULT.with_name("zoo_part.json")
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}  # before torch is imported
    preload()
    from common import environment

    head = {"environment": {**environment(), "packages": packages()}, "settings": settings(options)}
    rows: dict[str, dict[str, Any]] = {}
    if options.resume and options.out.exists():
        before = json.loads(options.out.read_text())
        rows = {r["name"]: {"commit": before["environment"]["commit"], **r} for r in before["results"]}
    names = chosen(options)
    missing = [n for n in names if n not in rows]
    with ThreadPoolExecutor(options.jobs) as pool:  # each only forks a process and waits for it
        for i, row in enumerate(pool.map(lambda name: measured(name, options), missing)):
            rows[row["name"]] = {**row, "commit": head["environment"]["commit"]}
            write(options.out, head, rows.values())
            print(f"{i + 1:3}/{len(missing)}  {line(row)}", flush=True)
    if options.carry:
        earlier = json.loads(options.carry.read_text())
        rows = {n: carried(row, earlier) for n, row in rows.items()}
        write(options.out, head, rows.values())
    wrong = [n for n in names if not rows[n].get("status", "").startswith(("ok", "nothing to gate"))]
    print(f"{len(names) - len(wrong)} of {len(names)} as they should be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
