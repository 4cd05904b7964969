"""A soak: random networks of kinds of their own, each of which goes through twenty changes of size and must stay exact.

``make soak`` runs ``python benchmarks/soak_networks.py --count 1000`` beside the other soaks. A network is attached in
double precision, cut and grown twenty times with training steps in between, then compacted, saved and loaded. After
every change the optimizer may hold nothing of what is gone. The kinds are none of random_networks.py, from which only
the way to run, to count and to make smaller is taken. Results are written after every chunk, and a call goes on from
them. ``--jobs 2`` checks them in two processes. ``--again`` runs the networks that have failed once more,
``--seed N --count 1`` runs one network, and ``--recipe '{...}'`` one that was made smaller. soak_table.py writes
docs/soak.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

from random_networks import BAD, again, minimised, print_rows, reason, rows_of, show, write

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_networks.json"
AMPLE = 3600.0  # seconds, which no network needs
CHUNK = 100  # how many networks a process checks before results are written
SUMS = ("sites", "resizes", "cut", "added", "seconds")


def checked(recipe: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the row of one network."""
    from random_checks import check
    from soak_lives import life

    return check(recipe, seconds, life)


def child(seeds: range, seconds: float) -> None:
    """Check networks, and print a line of JSON for each."""
    from soak_recipes import draw, smaller

    def own(recipe: dict[str, Any]) -> dict[str, Any]:
        return checked(recipe, seconds)

    checked(draw(0), AMPLE)  # imports what is imported late: a time limit within an import would leave half of it
    print_rows(seeds, draw, own, lambda recipe, row: minimised(recipe, row, own, smaller, 120.0))


def tally(content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add rows to the counts."""
    from soak_recipes import draw

    counts = {name: Counter(content["counts"].get(name, {})) for name in ("status", "kinds", "optimizers", "refused")}
    for row in rows:
        recipe = draw(row["seed"])
        counts["status"][row["status"]] += 1
        counts["kinds"].update({node["kind"] for node in recipe["nodes"]})
        counts["optimizers"][recipe["optimizer"]] += 1
        if row["status"] == "refused":
            counts["refused"][reason(row["what"])] += 1
        for name in SUMS:
            content["totals"][name] += round(row.get(name, 0), 2)
    content["counts"] = {name: dict(found.most_common()) for name, found in counts.items()}
    bad = [r for r in rows if r["status"] in BAD]
    content["failures"] += [{k: v for k, v in r.items() if k not in ("frozen", "traceback")} for r in bad]


def main(arguments: list[str] | None = None) -> int:
    """Check networks until there are so many; return 1 where one of them has failed, and fails still."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000, help="how many networks, those of earlier calls included")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of the processor for one network")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no chunk after this time")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes check networks side by side")
    parser.add_argument("--again", action="store_true", help="run what has failed once more")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--recipe", type=json.loads, help="check this recipe only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.count)
    if options.child:
        child(seeds, options.seconds)
        return 0
    if options.recipe or (options.count == 1 and not options.again):
        from soak_recipes import build, draw

        recipe = options.recipe or draw(options.seed)
        row = checked(recipe, options.seconds)
        print(
            json.dumps(recipe, indent=1), build(recipe), row.pop("traceback", ""), json.dumps(row, indent=1), sep="\n"
        )
        return int(row["status"] in BAD)
    return soak(seeds, options)


def chunk_of(left: list[int]) -> range:
    """Return the next seeds that follow one another, as many as one process checks."""
    following = takewhile(lambda pair: pair[1] == left[0] + pair[0], enumerate(left[:CHUNK]))
    return range(left[0], left[0] + len(list(following)))


def soak(seeds: range, options: argparse.Namespace) -> int:
    """Check many networks and write what was found."""
    from common import environment

    now = environment()
    settings = {"seconds": options.seconds, "tolerance": 1e-9, "dtype": "float64", "resizes": 20}
    content: dict[str, Any] = {
        "environment": now, "settings": settings, "done": [], "totals": dict.fromkeys(SUMS, 0), "counts": {},
        "failures": [],
    }  # fmt: skip
    if options.out.exists():
        content = json.loads(options.out.read_text()) | {"environment": now}
    if options.again:
        return again(content, now, options, options.out, __file__)
    done = {seed for d in content["done"] for seed in range(d["seeds"][0], d["seeds"][1] + 1)}
    end = time.monotonic() + 60 * options.minutes
    left = [seed for seed in seeds if seed not in done]
    while left and time.monotonic() < end:
        chunks = []
        while left and len(chunks) < options.jobs:
            chunks.append(chunk_of(left))
            left = left[len(chunks[-1]) :]
        with ThreadPoolExecutor(len(chunks)) as pool:  # each thread waits for a process
            found = list(pool.map(lambda chunk: list(rows_of(chunk, options, __file__)), chunks))
        for chunk, rows in zip(chunks, found, strict=True):
            tally(content, rows)
            done_now = {"seeds": [chunk.start, chunk.stop - 1], "commit": now["commit"], "date": now["date"]}
            content["done"].append(done_now)
            for row in rows:
                if row["status"] in BAD:
                    show(row, __file__)
        write(options.out, content)
        print(f"{chunks[-1].stop - 1}: {content['counts']['status']}", flush=True)
    return int(any(f.get("again", f)["status"] in BAD for f in content["failures"]))


if __name__ == "__main__":
    sys.exit(main())
