"""Write docs/random.md from what random_networks.py found; --check only says whether it is up to date."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
from common import publish  # noqa: E402

RESULT = HERE / "results" / "random_networks.json"
PAGE = HERE.parent / "docs" / "random.md"
GOOD = ("ok", "refused")
FEWEST = 5  # reasons that were seen less often are counted together

INTRODUCTION = """# Random networks

What plasticnet does with {count:,} networks that were put together at random. Each must be exact, or frozen with a
reason: never a crash, never wrong in silence. `make random` runs them again (benchmarks/random_networks.py; it takes an
hour or more) and writes this page (benchmarks/random_table.py).

{environment}

{summary}

## What is checked

A network is a stem, a chain of pieces and a head. Each piece is of one of {kinds} kinds, some of which hold chains of
their own, and the options of `PlasticNet` are drawn, too. All numbers are in double precision, and outputs count as
equal where they differ by at most {tolerance:.0e}. Each network goes through this life, on three batches of two sizes:

- Attaching leaves parameters and buffers as they were, and gives the same sites and reasons for an equal network. No
  reason is an error of the library itself.
- Under random gates `net.compact()` gives what `net.eval()` gives, call after call, at k = 0, 0.5, 7 and infinity, then
  after three steps of training, after a resize that cuts and adds units, a step more, `prune`, and another step. Where
  a network draws random numbers in evaluation, all entries of a draw are made one number for this.
- At three of these moments `copy.deepcopy`, `save` and `load`, and `state_dict` loaded into a fresh network give the
  same outputs. `prune` leaves no closed unit that could go.
- Steps leave all parameters finite, and the optimizer holds all of them after each change of size.

**Refused** networks have nothing to gate, and the error says why.

## Limits

- The networks are small: they have up to some tens of layers of up to some tens of channels, and batches of three and
  five. Speed, memory, accuracy after training, GPUs, half precision, `torch.compile`, several processes and export are
  tested elsewhere.
- A network has at most {seconds:.0f} s of the processor. One that takes longer counts as "timeout"; that depends on the
  load of the machine.
- The kinds are those that somebody thought of. That a network is frozen where it could be gated is no failure here; the
  last table shows how often this is so, and why.
"""


def page(content: Mapping[str, Any]) -> str:
    """Return the whole page."""
    environment, settings, counts = content["environment"], content["settings"], content["counts"]
    parts = [
        INTRODUCTION.format(
            count=sum(counts["status"].values()),
            kinds=len(counts["kinds"]),
            tolerance=settings["tolerance"],
            seconds=settings["seconds"],
            summary=summary(content),
            environment=f"plasticnet {environment['plasticnet']}, torch {environment['torch']}; Python "
            f"{environment['python']}, {environment['device']}, {environment['threads']} thread; seeds "
            f"{spans(content['done'])}; {environment['date']}, `{environment['command']}`; networks by commit: "
            f"{commits(content['done'])}; {content['totals']['seconds'] / 3600:.1f} hours.",
        )
    ]
    parts += failures(content["failures"])
    parts += table("What networks begin with", "input", counts["starts"])
    parts += table("What they return", "output", counts["outputs"])
    parts += table("Options", "option", counts["options"])
    parts += table("Estimators", "estimator", counts["estimators"])
    parts += table("Kinds of pieces", "kind", counts["kinds"])
    parts += table("What is refused, and why", "reason", counts["refused"])
    parts += table("What is frozen, and why", "reason", rare_together(counts["frozen"]), "groups of channels")
    return "\n".join(parts)


def summary(content: Mapping[str, Any]) -> str:
    """Return the figures that matter."""
    status, totals = content["counts"]["status"], content["totals"]
    bad = {name: n for name, n in status.items() if name not in GOOD}
    found = ", ".join(f"{n} {name}" for name, n in bad.items()) or "none is wrong, and none crashes"
    text = f"**{status.get('ok', 0):,} are exact, {status.get('refused', 0):,} refused with a reason; {found}.**"
    if bad:
        now = Counter(f["again"]["status"] if "again" in f else "not run again" for f in content["failures"])
        text += f" Run again later, of those that failed: {', '.join(f'{n} {name}' for name, n in now.items())}."
    text += (
        f"\n\n{totals['networks with gates']:,} networks have gates: on {totals['sites']:,} sites in all, and on "
        f"the weights of {totals['gated weights']:,} layers entry by entry. Units were counted in "
        f"{totals['networks with counted units']:,} of the networks: {totals['units']:,}."
    )
    return text


def failures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what failed when it was first run, and what became of it."""
    if not found:
        return []
    lines = ["## What failed", "", "| seed | found | at | what | run again |", "|---|---|---|---|---|"]
    for f in found:
        again = f.get("again")
        now = "no" if again is None else f"{again['status']} at {again['commit']}, within {again['seconds']:.0f} s"
        lines.append(f"| {f['seed']} | {f['status']} | {plain(f['step'])} | {plain(f['what'])} | {now} |")
    return [*lines, ""]


def table(title: str, column: str, counts: Mapping[str, int], what: str = "networks") -> list[str]:
    """Return a section with a table of counts."""
    if not counts:
        return []
    rows = [f"| {plain(name)} | {n:,} |" for name, n in counts.items()]
    return [f"## {title}", "", f"| {column} | {what} |", "|---|---|", *rows, ""]


def rare_together(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts in which those below `FEWEST` are one, at the end."""
    often = {name: n for name, n in counts.items() if n >= FEWEST}
    rare = [n for n in counts.values() if n < FEWEST]
    return {**often, f"{len(rare)} other reasons": sum(rare)} if rare else often


def spans(done: Iterable[Mapping[str, Any]]) -> str:
    """Return the seeds that were run, neighbours together: ``0 to 99 and 150 to 199``."""
    found: list[list[int]] = []
    for first, last in sorted(d["seeds"] for d in done):
        if found and found[-1][1] + 1 == first:
            found[-1][1] = last
        else:
            found.append([first, last])
    return " and ".join(f"{first} to {last}" for first, last in found)


def commits(done: Iterable[Mapping[str, Any]]) -> str:
    """Return how many networks were run at which commit: a run may have been resumed."""
    found: Counter[str] = Counter()
    for d in done:
        found[d["commit"]] += d["seeds"][1] - d["seeds"][0] + 1
    return ", ".join(f"{n:,} at {commit}" for commit, n in found.items())


def plain(text: str) -> str:
    """Return a text that fits into a cell of a table."""
    return text.replace("|", "/").replace("\n", " ").replace("<", "&lt;").strip()[:160]


def main() -> int:
    """Write the page, or compare it with --check."""
    return publish({PAGE: page(json.loads(RESULT.read_text()))})


if __name__ == "__main__":
    sys.exit(main())
