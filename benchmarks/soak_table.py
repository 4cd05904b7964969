"""Write docs/soak.md from what the three soaks found; --check only says whether it is up to date."""

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

RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "soak.md"

PAGE_TEXT = """# Soaks

What becomes of a training that is killed, of files that are damaged or crafted, and of a training that takes long.
`make soak` goes on with the first two (benchmarks/soak_kills.py and benchmarks/soak_files.py), repeats the third
(benchmarks/soak_long.py) and writes this page (benchmarks/soak_table.py).

## Trainings that are killed

`plasticnet train` is killed (SIGKILL) again and again, and resumed each time. In the end its folder is compared with
that of a run of the same settings that was left in peace: all tensors and numbers of the newest and of the best
checkpoint, with optimizer, schedule and random numbers, the lines of metrics.jsonl, summary.json, prepared.json,
run.json and the bytes of the compact module; only what was timed may differ. No file may be left over. Kills come

- at any moment, which a random time decides;
- while a file is written: before a random time that the process opens, renames or removes a file of the run;
- while an epoch is ended: up to 20 ms after a random call of `Schedule.step`, in which units are cut and grown.

In some trials the newest checkpoint is then damaged: a byte is changed, it is cut off, emptied or removed. States are
saved after every epoch, and within epochs every 0.05 seconds.

**{kills_summary}**

{kills_table}

{kills_environment}

## Files that are damaged or crafted

Sound files are changed at random, one to four times each: bytes are flipped, cut out, doubled and overwritten, and what
is JSON in them gets other values and keys. Seven of ten files with a checksum get the one that fits what they have
become. Each case may take {seconds} seconds, and {memory} GiB of memory more than the process has. A file must be read,
or refused by a `PlasticError`.

**{files_summary}**

{files_table}

{files_environment}

## A long training

A small network with a convolution, a norm and linear layers is trained, and brought to other widths again and again:
every site to {narrowest} to {widest} units at random, so that units are cut as often as they are added, with the state
of Adam. Every so often it gets its first widths, and then everything is measured that must not grow. The table compares
the median of the first third of the measurements with that of the last. What is counted may not grow at all, memory by
2 % and 64 KiB, because Python keeps some small objects to use them again, and the time of a step by half.

**{long_summary}**

{long_table}

{long_environment}

## Limits

- A kill ends the process, and not the computer: what the disk has not yet written is not lost here. Files are brought
  to the disk (fsync) before they get their name, which is not tested by this.
- The trainings are small ones of multilayer perceptrons on handwritten digits, on the CPU with one thread.
- That a crafted file is read does not mean that the module can run: see [SECURITY.md](../SECURITY.md).
"""


def kills(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of trainings that were killed."""
    trials = content["trials"]
    when = list(trials[0]["kills"])
    rows = []
    for run in content["settings"]["runs"]:
        own = [t for t in trials if t["run"] == run]
        counts = [sum(t["kills"][w] for t in own) for w in when]
        damaged = sum(sum(t["damaged"].values()) for t in own)
        rows.append((run, len(own), *counts, damaged, sum(t["status"] == "equal" for t in own)))
    total = sum(sum(t["kills"].values()) for t in trials)
    equal = sum(t["status"] == "equal" for t in trials)
    bad = Counter(t["status"] for t in trials if t["status"] != "equal")
    what = ", ".join(f"{n} {status}" for status, n in bad.items()) or "none is different"
    damage: Counter[str] = Counter()
    for t in trials:
        damage.update(t["damaged"])
    return {
        "kills_summary": f"{len(trials)} trainings, {total} kills, {sum(damage.values())} damaged checkpoints: {equal} "
        f"trainings ended equal to the bit; {what}.",
        "kills_table": table(("run", "trainings", *when, "damaged checkpoints", "equal at the end"), rows),
        "kills_environment": environment(content["environment"], (t["commit"] for t in trials), "trainings"),
    }


def files(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of files."""
    counts, total = content["counts"], Counter[str]()
    for own in counts.values():
        total.update(own)
    kinds = ["read", "refused", *sorted(total.keys() - {"read", "refused"})]
    rows = [(kind, *(own.get(k, 0) for k in kinds)) for kind, own in counts.items()]
    bad = ", ".join(f"{total[k]:,} {k}" for k in kinds[2:]) or "no other error, no crash, no hang"
    settings = content["settings"]
    good = f"{total['read']:,} were read, {total['refused']:,} refused"
    return {
        "seconds": str(settings["seconds"]),
        "memory": str(settings["memory"] // 2**30),
        "files_summary": f"{content['done']:,} files: {good}; {bad}.",
        "files_table": table(("file", *kinds), rows),
        "files_environment": environment(content["environment"], content["commits"], None),
    }


def long(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of a long training."""
    settings, found = content["settings"], content["found"]
    grew = ", ".join(name for name, f in found.items() if f["grew"]) or "nothing"
    rows = [
        (name, f"{f['first']:,.1f}", f"{f['last']:,.1f}", "yes" if f["grew"] else "no") for name, f in found.items()
    ]
    e = content["environment"]
    return {
        "narrowest": str(settings["narrowest"]),
        "widest": str(settings["widest"]),
        "long_summary": f"{settings['steps']:,} steps, {settings['resizes']:,} changes of size, {len(content['rows'])} "
        f"measurements: {grew} has grown.",
        "long_table": table(("measured", "at first", "at last", "grew"), rows),
        "long_environment": environment(e, [e["commit"]], None),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table, whose first column holds words."""
    lines = [f"| {' | '.join(f'{c:,}' if isinstance(c, int) else c for c in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}", *lines])


def environment(e: Mapping[str, Any], commits: Iterable[str], what: str | None) -> str:
    """Return how results were obtained, and at which commits."""
    found = Counter(commits)
    at = ", ".join(f"{n:,} {what} at {c}" if what else c for c, n in found.items())
    return (
        f"plasticnet {e['plasticnet']}, torch {e['torch']}; Python {e['python']}, {e['device']}; load {e['load']:.1f} "
        f"at the begin; {e['date']}; commit: {at}."
    )


def main() -> int:
    """Write the page, or compare it with --check."""
    found = {name: json.loads((RESULTS / f"soak_{name}.json").read_text()) for name in ("kills", "files", "long")}
    texts = {**kills(found["kills"]), **files(found["files"]), **long(found["long"])}
    return publish({PAGE: PAGE_TEXT.format(**texts)})


if __name__ == "__main__":
    sys.exit(main())
