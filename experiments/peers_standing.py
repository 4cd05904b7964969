"""Which rows of peers.py count, and how plasticnet's ways stand beside the others in them."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from gates_table import grouped, table
from peers_ways import ANEW, OURS, PEERS

TUNING = 100  # the seed for tuning
CHOSEN = "plasticnet, by validation"  # that one of our ways in the full grid which validation data choose
BESIDE = ("ETTh1",)  # tasks beside the six
BEHIND, LEVEL, BETTER = range(3)
Rows = list[dict[str, Any]]


def measured(rows: Rows) -> Rows:
    """The rows that count: with the settings that validation data have chosen, not those for tuning, none that failed.

    Rows of settings that were chosen before further ones were tried stay in the files.
    """
    of = chosen(rows)
    return [
        r
        for r in rows
        if r["seed"] != TUNING
        and "failed" not in r
        and (r["way"] == "dense" or r["setting"] == of[r["task"], r["way"]]["setting"])
    ]


def chosen(rows: Rows) -> dict[tuple[str, str], dict[str, Any]]:
    """The row of each task and way, among those for tuning, with the smallest error on validation data."""
    tuned = grouped([r for r in rows if r["seed"] == TUNING and "failed" not in r], "task", "way")
    return {(key[0], key[1]): min(found, key=lambda r: r["validation"]) for key, found in tuned.items()}


def with_chosen(rows: Rows) -> Rows:
    """The rows that count, and once more those of the way that validation data choose among ours."""
    of = chosen(rows)
    found = measured(rows)
    for task in dict.fromkeys(r["task"] for r in found):
        ours = [of[task, way] for way in OURS if (task, way) in of]
        best = min(ours, key=lambda r: r["validation"])["way"]
        found += [r | {"way": CHOSEN} for r in found if (r["task"], r["way"]) == (task, best)]
    return found


def seconds(row: dict[str, Any]) -> float:
    """The CPU seconds of a way, with those of the wide network."""
    return row["seconds"] + row["dense_seconds"]


def deviation(values: list[float]) -> float:
    """The standard deviation, 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def totals(rows: Rows) -> str:
    """At how many budgets of the six tasks our ways are better than another, level with it and behind it."""
    found = [r for r in with_chosen(rows) if r["task"] not in BESIDE]
    cells = []
    for our in (*OURS, CHOSEN):
        counts = []
        for way in PEERS:
            at = [level for of in grouped(found, "task").values() for level in standings(list(of), our, way)]
            counts.append(" / ".join(str(at.count(level)) for level in (BETTER, LEVEL, BEHIND)))
        cells.append([our, *counts])
    return "\n".join(table(["way", *PEERS], cells))


def verdict(rows: Rows) -> str:
    """The same, task by task, and at how many budgets none of the four peers is ahead."""
    cells = []
    for (task,), found in grouped(with_chosen(rows), "task").items():
        for our in (our for our in (*OURS, ANEW) if any(r["way"] == our for r in found)):
            of = [standings(list(found), our, way) for way in PEERS]
            everywhere = [
                min((at for at in budget if at is not None), default=BEHIND) for budget in zip(*of, strict=True)
            ]
            ahead = sum(at > BEHIND for at in everywhere)
            cells.append([task, our, *map(_compared, of), f"{ahead} of {len(everywhere)}"])
    return "\n".join(table(["task", "way", *PEERS, "all"], cells))


def standings(rows: Rows, our: str, way: str) -> list[int | None]:
    """How one of our ways stands beside another at each budget: `BETTER`, `LEVEL`, `BEHIND`, or None without rows."""
    found: list[int | None] = []
    for share in sorted({r["share"] for r in rows if r["way"] == our}):
        ours, theirs = ([r["test"] for r in rows if (r["way"], r["share"]) == (w, share)] for w in (our, way))
        if not theirs:
            found.append(None)
            continue
        beyond = mean(ours) - mean(theirs)
        level = LEVEL if beyond <= max(deviation(ours), deviation(theirs)) else BEHIND
        found.append(BETTER if beyond <= 0 else level)
    return found


def _compared(found: list[int | None]) -> str:
    total = len(found) - found.count(None)
    return f"{found.count(BETTER)} / {found.count(LEVEL)} / {found.count(BEHIND)}" if total else ""
