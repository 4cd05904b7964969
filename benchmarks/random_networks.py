"""A soak: random networks, each of which must be exact, or frozen with a reason; never a crash, never wrong in silence.

``make random`` runs ``python benchmarks/random_networks.py --count 2000 --workers 2``. Results are written after every
chunk of networks, so that an interrupted run can be continued with ``--resume``. What fails is made as small as it
goes and printed. ``--seed N --count 1`` runs one network, and ``--recipe '{...}'`` one that was made smaller.
``--again`` runs the networks that have failed once more, and notes beside each failure what comes of it now.
random_table.py writes docs/random.md from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))

RESULT = HERE / "results" / "random_networks.json"
CHUNK = 50  # how many networks a process checks before results are written
BAD = ("wrong", "crash", "error", "timeout", "unfit")
TOTALS = ("networks with gates", "networks with counted units", "sites", "units", "gated weights", "seconds")
COUNTED = ("status", "kinds", "starts", "outputs", "options", "estimators", "refused", "frozen")


# -- in the process of a chunk ----------------------------------------------------------------


def child(seeds: range, seconds: float) -> None:
    """Check networks, and print a line of JSON for each."""
    from random_checks import check
    from random_recipes import draw, smaller

    def simplest(recipe: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        fit = row["status"] != "unfit"
        return minimised(recipe, row, lambda r: check(r, seconds), smaller) if fit else recipe

    print_rows(seeds, draw, lambda recipe: check(recipe, seconds), simplest)


def print_rows(
    seeds: range,
    draw: Callable[[int], dict[str, Any]],
    check: Callable[[dict[str, Any]], dict[str, Any]],
    simplest: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> None:
    """Check the networks that ``draw`` gives, and print a line of JSON for each, with its recipe where it fails."""
    import torch

    torch.set_num_threads(1)
    for seed in seeds:
        print(json.dumps({"seed": seed}), flush=True)  # so that it is known which network ended the process
        recipe = draw(seed)
        row = {"seed": seed, **check(recipe)}
        if row["status"] in BAD:
            row["recipe"] = simplest(recipe, row)
        print(json.dumps(row), flush=True)


def minimised(
    recipe: dict[str, Any],
    row: dict[str, Any],
    check: Callable[[dict[str, Any]], dict[str, Any]],
    smaller: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    limit: float = 25.0,
) -> dict[str, Any]:
    """Return the smallest recipe found, within a time limit, that fails in the same way."""
    end = time.monotonic() + limit
    while True:
        for simpler in smaller(recipe):
            if time.monotonic() > end:
                return recipe
            found = check(simpler)
            if found["status"] == row["status"] and family(found) == family(row):
                recipe = simpler
                break
        else:
            return recipe


def family(row: dict[str, Any]) -> str:
    """Return what failures of one sort have in common: the step without its numbers, and the type of an error."""
    step = re.split(r" at k| after| \d", row["step"])[0]
    return f"{step}: {row['what'].partition(':')[0]}" if row["status"] == "crash" else step


# -- in the main process ----------------------------------------------------------------------


def rows_of(seeds: range, options: argparse.Namespace, script: str = __file__) -> Iterator[dict[str, Any]]:
    """Yield a row for each network, checked in processes of their own; one that ends its process is a crash, too."""
    while seeds:
        command = [sys.executable, script, "--child", "--seed", str(seeds.start), "--count", str(len(seeds))]
        command += ["--seconds", str(options.seconds)]
        limit, trouble, last = 300 + 4 * options.seconds * len(seeds), "", seeds.start
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
            output, trouble = done.stdout, done.stderr.strip()[-600:] if done.returncode else ""
            code = done.returncode
        except subprocess.TimeoutExpired as error:
            output, code = (error.stdout or b"").decode(), -1
            trouble = "the process did not end"
        for line in output.splitlines():
            row = json.loads(line)
            last = row["seed"]
            if "status" in row:
                yield row
                seeds = range(last + 1, seeds.stop)
        if seeds:
            yield {"seed": last, "status": "crash", "step": "process", "what": f"exit {code}: {trouble}", "seconds": 0}
            seeds = range(last + 1, seeds.stop)


def tally(content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add rows to the counts."""
    from random_recipes import draw, kinds_of

    counts = {key: Counter(content["counts"].get(key, {})) for key in COUNTED}
    for row in rows:
        recipe = draw(row["seed"])
        counts["status"][row["status"]] += 1
        if row["status"] == "unfit":
            continue
        counts["kinds"].update(set(kinds_of(recipe["nodes"])))
        counts["starts"][recipe["start"]] += 1
        counts["outputs"][recipe["head"]] += 1
        counts["options"].update(o for o in recipe["options"])
        counts["options"].update(o for o in ("condition", "other", "tied", "keywords", "minimum") if recipe[o])
        counts["estimators"][recipe["options"].get("estimator", "default")] += 1
        if row["status"] == "refused":
            counts["refused"][reason(row["what"])] += 1
        counts["frozen"].update(map(reason, row.get("frozen", {}).values()))
        content["totals"]["sites"] += row.get("sites", 0)
        content["totals"]["units"] += row.get("units", 0)
        content["totals"]["networks with counted units"] += "units" in row
        content["totals"]["gated weights"] += row.get("weights", 0)
        content["totals"]["networks with gates"] += "sites" in row
    content["totals"]["seconds"] += round(sum(r["seconds"] for r in rows))
    content["counts"] = {key: dict(found.most_common()) for key, found in counts.items()}
    bad = [r for r in rows if r["status"] in BAD]
    content["failures"] += [{k: v for k, v in r.items() if k not in ("frozen", "traceback")} for r in bad]


def reason(text: str) -> str:
    """Return a reason without names and numbers, so that equal ones can be counted."""
    text = re.sub(r"^\w+ has nothing to gate.*", "nothing to gate", text.replace("\n", " "), flags=re.DOTALL)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", text)
    text = re.sub(r"\b(stem|head|other|chain)(\.[\w.]+)?", "...", text)
    return re.sub(r"[-\d.,()]*\d[\d.,e()-]*", "#", text)[:110]


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the result file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def show(row: dict[str, Any], script: str = __file__) -> None:
    """Print a failure with what reproduces it."""
    print(f"\n{row['status'].upper()} at {row['step']!r}: {row['what']}")
    print(f"  python benchmarks/{Path(script).name} --seed {row['seed']} --count 1")
    if "recipe" in row:
        print(f"  python benchmarks/{Path(script).name} --recipe '{json.dumps(row['recipe'])}'")


def one(recipe: dict[str, Any], seconds: float) -> int:
    """Check one recipe and print all about it."""
    import torch
    from random_checks import check
    from random_recipes import build

    torch.set_num_threads(1)
    row = check(recipe, seconds)
    print(json.dumps(recipe, indent=1), build(recipe), sep="\n")
    print(row.pop("traceback", ""))
    print(json.dumps(row, indent=1))
    return int(row["status"] in BAD)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="how many networks")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of the processor for one network")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no chunk after this time")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, and leave out what was done")
    parser.add_argument("--again", action="store_true", help="run what has failed once more")
    parser.add_argument("--out", type=Path, help=f"default: {RESULT.relative_to(HERE.parent)}; none for --count 1")
    parser.add_argument("--recipe", type=json.loads, help="check this recipe only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.count)
    if options.child:
        child(seeds, options.seconds)
        return 0
    from random_recipes import draw

    if options.recipe or (options.count == 1 and not options.again):
        return one(options.recipe or draw(options.seed), options.seconds)
    return soak(seeds, options)


def soak(seeds: range, options: argparse.Namespace) -> int:
    """Check many networks and write what was found."""
    import torch
    from common import environment

    torch.set_num_threads(1)
    out = options.out or RESULT
    content: dict[str, Any] = {
        "environment": environment(),
        "settings": {"seconds": options.seconds, "tolerance": 1e-9, "dtype": "float64"},
        "done": [],
        "totals": dict.fromkeys(TOTALS, 0),
        "counts": {},
        "failures": [],
    }
    now = content["environment"]
    if (options.resume or options.again) and out.exists():
        before = json.loads(out.read_text())
        content = {**before, "environment": before["environment"] if options.again else now}
        content["totals"] = {**dict.fromkeys(TOTALS, 0), **before["totals"]}
    if options.again:
        return again(content, now, options, out)
    begun = {d["seeds"][0] for d in content["done"]}
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    chunks = [c for c in chunks if c.start not in begun]
    end = time.monotonic() + 60 * options.minutes

    def checked(chunk: range) -> list[dict[str, Any]]:
        return list(rows_of(chunk, options)) if time.monotonic() < end else []

    with ThreadPoolExecutor(options.workers) as pool:  # each thread only waits for its process
        for chunk, rows in zip(chunks, pool.map(checked, chunks), strict=True):
            if not rows:
                continue
            tally(content, rows)
            commit, date = content["environment"]["commit"], content["environment"]["date"]
            content["done"].append({"seeds": [chunk.start, chunk.stop - 1], "commit": commit, "date": date})
            for row in rows:
                if row["status"] in BAD:
                    show(row)
            write(out, content)
            print(f"{chunk.stop - 1}: {content['counts']['status']}", flush=True)
    return int(any(r["status"] in BAD for r in content["failures"]))


def again(
    content: dict[str, Any],
    environment: dict[str, Any],
    options: argparse.Namespace,
    out: Path,
    script: str = __file__,
) -> int:
    """Run the networks that have failed once more, and note beside each failure what was found now."""
    commit, date = environment["commit"], environment["date"]
    for failure in content["failures"]:
        (row,) = rows_of(range(failure["seed"], failure["seed"] + 1), options, script)
        found = {key: row[key] for key in ("status", "step", "what")}
        failure["again"] = {**found, "seconds": options.seconds, "commit": commit, "date": date}
        print(failure["seed"], failure["status"], "is now", row["status"], flush=True)
        if row["status"] in BAD:
            show(row, script)
    write(out, content)
    return int(any(f["again"]["status"] in BAD for f in content["failures"]))


if __name__ == "__main__":
    sys.exit(main())
