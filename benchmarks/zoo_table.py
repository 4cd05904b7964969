"""Write docs/zoo.md from the rows that zoo.py measured; --check only says whether it is up to date."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
from common import publish  # noqa: E402

RESULT = HERE / "results" / "zoo.json"
ATTACH = HERE / "results" / "attach.json"
OPEN = HERE / "results" / "zoo_open.json"
PAGE = HERE.parent / "docs" / "zoo.md"

INTRODUCTION = """# The zoo

What plasticnet does with {count} models of other people, each built with random weights and run on a batch of
two. `make zoo` measures them again (benchmarks/zoo.py; it takes hours) and writes this page (benchmarks/zoo_table.py).

{environment}

- **Prunable** is the share of the parameters that lie in some unit; **frozen** counts the groups of channels that
  are never gated, with their most frequent reason. All are listed below the tables.
- **Error** is the largest difference between `net.compact()` and `net.eval()`, relative to the largest output, with
  30 % and with 80 % of the units of every site closed at random: in double precision, with random parameters, after
  construction and so after the self-check, on other random numbers than it uses. At most {tolerance:.0e} is right.
- **Checks**: the outputs moved when the units were closed, every parameter that had a gradient still gets a finite
  one after compaction, and a file gives back the same tensors and outputs. **ONNX**: ONNX Runtime gives the same
  outputs (within 1e-4 in single precision) as the compact module; "one batch size" where the exporter fixes it.
- **Seconds** are those of `PlasticNet(model, inputs)`, which traces and checks.
- **torch-pruning** is version {pruning} at a ratio of 0.3, compared with the same model with all removed entries set
  to zero. [zoo_pruning.py](../benchmarks/zoo_pruning.py) says how, and what was done to be fair. Pruning the width of
  a LayerNorm is inexact by nature, because its statistics change; plasticnet freezes such widths unless asked.
  No time or accuracy is compared beyond that: the two do different things.

{summary}
"""

ENOUGH = 0.95  # a model of which so many of the parameters can be pruned counts as open

PARTS = {"onnx": "ONNX", "torch_pruning": "torch-pruning"}  # what may be left out of a run

HEADER = [
    "model", "sites", "units", "prunable, %", "frozen", "error, 30 %", "error, 80 %", "checks", "ONNX", "seconds",
    "torch-pruning", "its seconds",
]  # fmt: skip

ATTEMPTS = """The aim for ViT-H/14 and RegNet-128GF is 10 s. Four things were tried for it:

1. Copies share the parameters that they do not replace, and sites are built from labels at once.
2. Random parameters are written in place, without a second copy, and what the precise comparison runs on has at most 32
   units a site.
3. The precise comparison of a large model leaves out the pattern that was already compared at full size.
4. In the comparison at full size, gates multiplied the activations in the place of the weights. That saved nothing and
   was given up.

What is left is mostly one forward pass at full size, the trace by shapes, the drawing of the parameters, and some ten
passes in double precision of what is left of the model."""


def page(content: Mapping[str, Any]) -> str:
    """The whole page."""
    rows, environment = content["results"], content["environment"]
    packages = ", ".join(f"{n} {v}" for n, v in environment["packages"].items())
    settings = content["settings"]
    parts = [
        INTRODUCTION.format(
            count=len(rows),
            tolerance=1e-9,
            pruning=environment["packages"]["torch-pruning"],
            summary=summary(rows),
            environment=f"plasticnet {environment['plasticnet']}, torch {environment['torch']}, {packages}; "
            f"Python {environment['python']}, {environment['device']}, {environment['threads']} thread, load "
            f"{environment['load']:.1f}; seed {settings['seed']} (one), at most {settings['timeout']:.0f} s a model; "
            f"{environment['date']}, `{environment['command']}`; rows by commit: {commits(rows, environment)}."
            + "".join(earlier(rows, part, name) for part, name in PARTS.items()),
        )
    ]
    for library, members in by_library(rows).items():
        parts += [f"## {library}", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        parts += [f"| {' | '.join(cells(row))} |" for row in members] + [""]
    if ATTACH.exists():
        parts += attach_section(json.loads(ATTACH.read_text()))
    parts += ["## What is frozen, and why", ""]
    for row in rows:
        if row.get("frozen"):
            parts += [f"- **{row['name']}**"]
            parts += [f"  - {reason}: {', '.join(f'`{n}`' for n in names)}" for reason, names in reasons(row).items()]
    return "\n".join(parts) + "\n"


def commits(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """How many rows were measured at which commit: a run may have been resumed."""
    found = Counter(row.get("commit", environment["commit"]) for row in rows)
    return ", ".join(f"{n} at {commit}" for commit, n in found.most_common())


def earlier(rows: Sequence[Mapping[str, Any]], part: str, name: str) -> str:
    """In how many rows a part is the result of an earlier run, and of which; nothing where there is none."""
    found = Counter(
        (r["carried"][part]["date"], r["carried"][part]["commit"]) for r in rows if part in r.get("carried", {})
    )
    runs = ", ".join(f"{n} of {date} at {commit}" for (date, commit), n in found.most_common())
    return f" {name} was not run again in {found.total()} rows: {runs}." if found else ""


def attach_section(content: Mapping[str, Any]) -> list[str]:
    """How long large models take (attach.py)."""
    environment, repeats = content["environment"], content["settings"]["repeats"]
    lines = [
        "## Attaching to large models",
        "",
        "Seconds of `PlasticNet(model, inputs)` by the clock (median, and all runs) and of the processor, self-check "
        f"included: one image of 224 pixels, {repeats} runs of [attach.py](../benchmarks/attach.py), "
        f"{environment['threads']} threads, load {environment['load']:.1f}, {environment['device']}, torch "
        f"{environment['torch']}, {environment['date']}. Llama (the sizes of the 7B) is traced on the meta device, "
        "where nothing is computed and so nothing is checked.",
        "",
        "| model | parameters | sites | checked | seconds | runs | processor seconds | one forward pass of the model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in content["results"]:
        runs = ", ".join(f"{s:.1f}" for s in r["runs"])
        forward = "" if r["forward"] is None else f"{r['forward']:.1f}"
        lines.append(
            f"| {r['name']} | {r['parameters']:,} | {r['sites']} | {'yes' if r['checked'] else 'no'} | "
            f"{r['seconds']:.1f} | {runs} | {r['cpu_seconds']:.1f} | {forward} |"
        )
    return [*lines, "", ATTEMPTS, ""]


def by_library(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what stands before the slash."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"].partition("/")[0], []).append(row)
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures that matter, in three sentences."""
    fine = [r for r in rows if r.get("status") == "ok"]
    worst = max((e for r in rows for e in r.get("error", {}).values()), default=0.0)
    onnx = Counter(_onnx(r.get("onnx")).partition(" (")[0] for r in rows if "onnx" in r)
    theirs = Counter(_verdict(r["torch_pruning"]) for r in rows if "torch_pruning" in r)
    nothing = sum(r.get("status", "").startswith("nothing to gate") for r in rows)
    text = f"**{len(fine)} of {len(rows)} pass everything**, {nothing} have nothing to gate; largest error {worst:.1e}."
    if onnx:
        text += f" ONNX: {', '.join(f'{n} {what}' for what, n in onnx.most_common())}."
    if theirs:
        text += f" torch-pruning: {', '.join(f'{n} {what}' for what, n in theirs.most_common())}."
    if frozen := stricter(rows):
        text += "\n\nWhere torch-pruning is exact, more than 5 % of the parameters stay frozen here in "
        named = (f"{r['name']} ({next(iter(reasons(r)), 'nothing')})" for r in frozen)
        text += f"{len(frozen)} models, with this most frequent reason: {'; '.join(named)}."
    return text + opened(json.loads(OPEN.read_text())["results"], len(rows)) if OPEN.exists() else text


def stricter(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The models in which torch-pruning is exact, and more than 5 % of the parameters are frozen here."""
    fine = [r for r in rows if r.get("status") == "ok"]
    return [r for r in fine if _verdict(r.get("torch_pruning", {})) == "exact" and r["prunable"] < ENOUGH]


def opened(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """What is left of these with all options."""
    left = [r for r in rows if r["prunable"] < ENOUGH]
    worst = max(error for r in rows for error in r["error"].values())
    named = "; ".join(f"{r['name']} ({100 * r['prunable']:.0f} %: {', '.join(reasons(r))})" for r in left)
    return (
        f"\n\nWith `residual=True`, and `outputs=` for the first output, which is then the only one that is read, "
        f"{len(left)} of them are left, {100 * len(left) / count:.1f} % of the zoo: {named}. The largest error in this "
        f"output is {worst:.0e} ([zoo_open.py](../benchmarks/zoo_open.py))."
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of a table."""
    name = row["name"].partition("/")[2]
    theirs = row.get("torch_pruning", {})
    pruning = [theirs.get("status", "not run"), f"{theirs['seconds']:.1f}" if "seconds" in theirs else ""]
    if "sites" not in row:
        return [_plain(c) for c in [name, *[""] * 3, row["status"], *[""] * 5, *pruning]]
    common = "; ".join(f"{len(names)} {reason}" for reason, names in list(reasons(row).items())[:2])
    return [
        _plain(c)
        for c in [
            name,
            f"{row['sites']}",
            f"{row['units']:,}",
            f"{100 * row['prunable']:.0f}",
            f"{len(row['frozen'])}: {common}" if common else "0",
            *([f"{e:.0e}" for e in row["error"].values()] if "error" in row else ["", ""]),
            "ok" if row.get("status") == "ok" else row.get("status", "?"),
            _onnx(row.get("onnx")),
            f"{row['seconds']:.1f}",
            *pruning,
        ]
    ]


def reasons(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reason to the names that are frozen for it, the most frequent first; numbers in errors are left out."""
    found: dict[str, list[str]] = {}
    for name, reason in row["frozen"].items():
        found.setdefault(reason.partition(": ")[0], []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _onnx(verdict: str | None) -> str:
    return "not run" if verdict is None else verdict.partition(": ")[0]


def _verdict(row: Mapping[str, Any]) -> str:
    return row.get("status", "not run").partition(" (")[0].partition(":")[0].partition(" after")[0]


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


def main() -> int:
    """Write the page, or compare it with --check."""
    return publish({PAGE: page(json.loads(RESULT.read_text()))})


if __name__ == "__main__":
    sys.exit(main())
