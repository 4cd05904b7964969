"""Write docs/soak.md from what the soaks found; --check only says whether it is up to date."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
from common import publish  # noqa: E402
from soak_ranks import WHOM  # noqa: E402

RESULTS = HERE / "results"
MS = ("ms", "ms, drawn anew", "ms at full width", "ms at full width, drawn anew")
ENDED = {  # what is said of networks with a status
    "ok": "exact", "wrong": "differed", "crash": "crashed", "error": "ended with an error",
    "timeout": "took too long", "unfit": "could not be built", "refused": "had nothing to gate",
}  # fmt: skip
PAGE = HERE.parent / "docs" / "soak.md"

PAGE_TEXT = """# Soaks

This page says what becomes of trainings that are killed, of files that are damaged or crafted, of networks that change
their size again and again, and of a training that takes long. `make soak` goes on with the first four
(benchmarks/soak_kills.py, soak_ranks.py, soak_files.py and soak_networks.py there) up to the numbers that it is given,
as in `make soak NETWORKS=10000`, repeats the others (soak_denormals.py and soak_long.py), and writes this page
(soak_table.py); `make fuzz` lets a fuzzer make files.

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

## Trainings in two processes that are killed

Two processes train one network in `DistributedDataParallel` (gloo), with a norm, and save together by
`save_distributed` after every epoch and every {every} steps, over the checkpoint before. They are killed at the same
moments as above: both at once, or one of them, and then the other one must end by itself within two minutes, or
torchrun ends it. Then both begin again. In the end all that each process holds is compared with a run that was left in
peace: network, optimizer, schedule, random numbers, and a list with a line for every step. The running statistics of
the norm are those of rank 0.

**{ranks_summary}**

{ranks_table}

{ranks_environment}

## Files that are damaged or crafted

Sound files are changed at random, once, twice or four times each: bytes are flipped, cut out, doubled and overwritten,
and what is JSON in them gets other values and keys. Seven of ten files with a checksum get the one that fits what they
have become. Each case may take {seconds} seconds, and {memory} GiB of memory more than the process has. A file must be
read, or refused by a `PlasticError`.

**{files_summary}**

{files_table}

{files_environment}

The same is done by a fuzzer that sees which branches of plasticnet an input reaches, keeps those that reach new ones,
and changes them further (atheris, benchmarks/soak_coverage.py). Half of the changes are its own, half those above.
The last two columns count the branches that the sound files reach, and those reached in the end.

**{coverage_summary}**

{coverage_table}

{coverage_environment}

## Networks that change their size again and again

Networks are put together at random, from {kinds} kinds of pieces that [the other random networks](random.md) do not
have: attention with slopes, tables and latents, recurrence into attention, scans, graphs, capsules, memories, stacks of
experts, pyramids, two resolutions, and so on. A piece reads one or two of those before it; a network has up to three
inputs and two outputs. Each one is attached in double precision, and then twenty times cut and grown, with a training
step after each change (Adam, AdamW, SGD with momentum, RMSprop or Adagrad). Gates and compact module must agree to
1e-09 at several of these moments and in the end, also after the module was saved and loaded, and after a checkpoint was
loaded into a fresh network. After every change and every step the optimizer must hold the present parameters, each
once, and no state that is of another shape or of what is gone.

**{networks_summary}**

{networks_table}

{networks_environment}

## A long training

A small network with a convolution, a norm and linear layers is trained, and brought to other widths again and again:
every site to {narrowest} to {widest} units at random, so that units are cut as often as they are added, with the state
of Adam. Every so often it gets its first widths, and then everything is measured that must not grow. The table compares
the median of the first third of the measurements with that of the last. What is counted may not grow at all, memory by
2 % and 64 KiB, because Python keeps some small objects to use them again, and the time of a step by half.

**{long_summary}**

{long_table}

{long_environment}

## Numbers next to zero

Half of the units of a network are closed, and it trains on with weight decay for {steps} steps, until the weights of
the closed units are not zero and below the normal numbers of float32. Some processors compute many times slower with
those; the processor of this run takes {minds} times as long for single products of this size. The compact module is
timed against one of the same widths whose weights were drawn anew. It keeps such weights where open units have died in
training, too.

**{denormals_summary}**

{denormals_table}

{denormals_environment}

## Limits

- A kill ends the process and not the computer, so that what had not reached the disk is not lost in this test. Files
  are synced (fsync) before they get their name; this soak does not test that.
- The trainings that are killed are small ones of multilayer perceptrons, on handwritten digits or, in two processes, on
  random vectors, on the CPU with one thread.
- Where a processor does not mind numbers next to zero, times say little of them; the counts hold everywhere.
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
    what = ", ".join(f"{n} {status}" for status, n in bad.items()) or "no training differed"
    damage: Counter[str] = Counter()
    for t in trials:
        damage.update(t["damaged"])
    return {
        "kills_summary": f"{len(trials)} trainings, {total} kills, {sum(damage.values())} damaged checkpoints: {equal} "
        f"trainings ended equal to the bit; {what}.",
        "kills_table": table(("run", "trainings", *when, "damaged checkpoints", "equal at the end"), rows),
        "kills_environment": environment(content["environment"], (t["commit"] for t in trials), "trainings"),
    }


def ranks(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of trainings in two processes that were killed."""
    trials, settings = content["trials"], content["settings"]
    rows = []
    for run in settings["runs"]:
        own = [t for t in trials if t["run"] == run]
        counts = {whom: sum(n for t in own for k, n in t["kills"].items() if k.endswith(f", {whom}")) for whom in WHOM}
        rows.append((run, len(own), *counts.values(), sum(t["status"] == "equal" for t in own)))
    total, equal = sum(sum(t["kills"].values()) for t in trials), sum(t["status"] == "equal" for t in trials)
    bad = Counter(t["status"] for t in trials if t["status"] != "equal")
    what = ", ".join(f"{n} {status}" for status, n in bad.items()) or "no training differed, and none has hung"
    return {
        "every": str(settings["every"]),
        "ranks_summary": f"{len(trials)} trainings, {total} kills: {equal} trainings ended equal to the bit; {what}.",
        "ranks_table": table(("run", "trainings", *WHOM, "equal at the end"), rows),
        "ranks_environment": environment(content["environment"], (t["commit"] for t in trials), "trainings"),
    }


def networks(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of random networks."""
    from soak_recipes import KINDS

    counts, totals, failures = content["counts"], content["totals"], content["failures"]
    status = Counter(counts["status"])
    bad = {name: n for name, n in status.items() if name not in ("ok", "refused")}
    again = Counter(f["again"]["status"] for f in failures if "again" in f)
    failed = in_words(bad, ENDED) or "none failed"
    rows = [
        (str(f["seed"]), f["status"], f["step"], short(f["what"]), f.get("again", {}).get("status", ""))
        for f in failures
    ]
    done = [d for d in content["done"] for _ in range(d["seeds"][1] - d["seeds"][0] + 1)]
    return {
        "kinds": str(len(KINDS)),
        "networks_summary": f"{sum(status.values()):,} networks, {totals['resizes']:,} changes of size, in which "
        f"{totals['cut']:,} units were cut and {totals['added']:,} added: {status['ok']:,} are exact to the end, "
        f"{status['refused']:,} have nothing to gate; {failed}{again_later(sum(bad.values()), again)}.",
        "networks_table": table_of_words(("seed", "found", "at", "what", "run again later"), rows)
        if rows
        else "No network failed.",
        "networks_environment": environment(content["environment"], (d["commit"] for d in done), "networks"),
    }


def in_words(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    """Return how many networks there are of each status, in words: "2 crashed and 1 was wrong"."""
    parts = [f"{n:,} {words.get(status, status)}" for status, n in counts.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def again_later(failed: int, again: Mapping[str, int]) -> str:
    """Return what became of the networks that failed and were run again later.

    Args:
        failed: How many failed.
        again: How many of these were run again later, by what was found then.
    """
    n = sum(again.values())
    if not n:
        return ""
    who = {1: "it", 2: "both"}.get(n, f"all {n}") if n == failed else f"{n} of them"
    were = "was" if n == 1 else "were"
    if set(again) == {"ok"}:
        return f"; {who} {were} run again later and {'is' if n == 1 else 'are'} exact"
    return f"; {who} {were} run again later: {in_words(again, ENDED)}"


def short(text: str) -> str:
    """Return the beginning of a message, without paths and in one line, for a cell of a table."""
    text = re.sub(r"/tmp/\S*/", "", text.replace("\n", " ").replace("|", "/"))
    return text if len(text) <= 100 else f"{text[:100].rsplit(' ', 1)[0]} ..."


def table_of_words(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of words."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


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


def coverage(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of files that a fuzzer made."""
    found, total = content["rows"], Counter[str]()
    for row in found:
        total.update(row["counts"])
    bad = Counter(f["found"] for row in found for f in row["failures"])
    what = ", ".join(f"{n:,} {kind}" for kind, n in bad.items()) or "no other error, no crash, no hang"
    rows = [(r["kind"], *(r["counts"].get(k, 0) for k in ("read", "refused")), r["first"], r["last"]) for r in found]
    return {
        "coverage_summary": f"{sum(total.values()):,} files: {total['read']:,} were read, {total['refused']:,} "
        f"refused; {what}.",
        "coverage_table": table(("file", "read", "refused", "branches at first", "in the end"), rows),
        "coverage_environment": environment(content["environment"], (r["commit"] for r in found), "kinds"),
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


def denormals(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of numbers next to zero."""
    found, e = content["rows"], content["environment"]
    slower = ", ".join(r["network"] for r in found if r["slower"]) or "no compact module"
    before, after = (sum(r[k] for r in found) for k in ("before", "after"))
    allowed = content["settings"]["allowed"] - 1
    rows = [
        (r["network"], f"{100 * r['right']:.0f}%", r["before"], r["after"], *(f"{r[k]:.2f}" for k in MS)) for r in found
    ]
    return {
        "steps": f"{content['settings']['steps']:,}",
        "minds": f"{content['minds']:.1f}",
        "denormals_summary": f"{before:,} such weights before the cut, {after:,} after it: {slower} is more than "
        f"{allowed:.0%} slower than with other weights.",
        "denormals_table": table(("network", "training accuracy", "such weights", "after", *MS), rows),
        "denormals_environment": environment(e, [e["commit"]], None),
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
        f"at the beginning; {e['date']}; commit: {at}."
    )


def main() -> int:
    """Write the page, or compare it with --check."""
    parts = {"kills": kills, "ranks": ranks, "files": files, "networks": networks, "long": long}
    parts |= {"coverage": coverage, "denormals": denormals}
    texts: dict[str, str] = {}
    for name, part in parts.items():
        texts |= part(json.loads((RESULTS / f"soak_{name}.json").read_text()))
    return publish({PAGE: PAGE_TEXT.format(**texts)})


if __name__ == "__main__":
    sys.exit(main())
