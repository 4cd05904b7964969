"""A soak: files that a fuzzer makes, which sees what each of them reaches, and goes on from those that reach more.

The kinds of files, what reads them, and what counts as a failure are those of soak_files.py; the inputs are made by
atheris (libFuzzer), which is told of the branches within plasticnet. Half of its inputs are its own changes of bytes,
half are those of soak_changes.py, which know JSON and the headers of safetensors; files with a checksum mostly get the
right one. Atheris is no dependency: ``pip install atheris`` first, for a Python that it is built for. ``--count`` is
the number of inputs of each kind; results are written after every kind, and a call goes on with the kinds that have
had fewer. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_coverage.json"
LONGEST = 16384  # bytes of an input at most
EVERY = 1000  # inputs after which what was found is written down

with atheris.instrument_imports(include=["plasticnet"]):
    import soak_files  # its readers import what they read with
    from common import environment  # which imports plasticnet
    from soak_changes import changed, sealed


def fuzz(soak: soak_files.Soak, kind: str, count: int, seed: int, place: Path) -> None:
    """Try inputs of a kind in this process, write what came of them to a file, and end the process."""
    suffix, sound, reader = soak.readers[kind]
    corpus, case, found = place / "corpus", place / f"case{suffix}", Counter[str]()
    failures: list[dict[str, str]] = []
    corpus.mkdir()
    for i, content in enumerate(sound):
        (corpus / str(i)).write_bytes(content)

    def mutated(data: bytes, longest: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.5:
            return changed(draw, data, suffix)[:longest]
        data = atheris.Mutate(data, longest)
        return sealed(data) if draw.random() < 0.7 else data

    def one(data: bytes) -> None:
        case.write_bytes(data)
        status, what = soak_files.outcome(reader, case)
        found[status] += 1
        if status not in soak_files.GOOD:
            failures.append({"found": status, "what": what, "input": data.hex()})
        done = sum(found.values())
        if status not in soak_files.GOOD or not done % EVERY or done >= count:
            (place / "found.json").write_text(json.dumps({"counts": found, "failures": failures}))

    soak_files.bounded(os.open(place / "log", os.O_WRONLY | os.O_CREAT))
    flags = {"runs": count, "seed": seed, "max_len": LONGEST, "mutate_depth": 2, "rss_limit_mb": 0, "handle_alrm": 0}
    flags |= {"cross_over": 0, "reduce_inputs": 0}  # the sound files stay among what is changed
    options = [f"-{name}={value}" for name, value in flags.items()]
    atheris.Setup(["soak", *options, f"-artifact_prefix={place}/", str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def tried(soak: soak_files.Soak, kind: str, count: int, seed: int) -> dict[str, Any]:
    """Try inputs of a kind in a process of its own, and return its row."""
    with tempfile.TemporaryDirectory(dir=soak.folder) as folder:
        place, begun = Path(folder), time.monotonic()
        number = os.fork()
        if not number:
            fuzz(soak, kind, count, seed, place)
            os._exit(0)
        _, status = os.waitpid(number, 0)
        row = {"kind": kind, "count": count, "seed": seed, "seconds": time.monotonic() - begun}
        row |= json.loads((place / "found.json").read_text())
        log = (place / "log").read_text(errors="replace")
        reached = [int(n) for n in re.findall(r"cov: (\d+)", log)]
        row |= {"first": reached[0], "last": reached[-1], "kept": len(list((place / "corpus").iterdir()))}
        if status:
            row["failures"] += [
                {"found": "crash", "what": log[-2000:], "input": path.read_bytes().hex()}
                for path in place.glob("*-*")
                if path.is_file()
            ] or [{"found": "crash", "what": log[-2000:], "input": ""}]
    return row


def main(arguments: list[str] | None = None) -> int:
    """Try every kind; return 1 where an input was neither read nor refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="how many inputs of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", help="the kinds; all without it")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        rows = {row["kind"]: row for row in json.loads(options.out.read_text())["rows"]}
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="soak-", dir=shared) as folder, atheris.instrument_imports(["plasticnet"]):
        soak = soak_files.Soak(Path(folder))
        for kind in options.kinds or soak.readers:
            if kind in rows and rows[kind]["count"] >= options.count:
                continue
            rows[kind] = {**tried(soak, kind, options.count, options.seed), "commit": environment()["commit"]}
            print({k: v for k, v in rows[kind].items() if k != "failures"}, flush=True)
            for failure in rows[kind]["failures"][:3]:
                print(failure, flush=True)
            result = {"environment": environment(), "settings": {"longest": LONGEST}, "rows": list(rows.values())}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
