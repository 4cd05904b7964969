"""Run the quick tests on the oldest and the newest torch, by every Python that is supported and at hand.

``make versions`` runs it. Each pair gets an environment of its own in build/versions, into which pip brings what the
tests need. A pair is skipped, and named, where the interpreter or the wheel of torch is missing. With ``--dry-run`` it
only says which interpreters are there and what would be run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "versions"


def pythons() -> list[str]:
    """Return the versions of Python that the project says it supports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [c.rpartition(" :: ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    return sorted(names, key=lambda name: int(name.partition(".")[2]))


def oldest_torch() -> str:
    """Return the oldest version of torch that the project says it supports."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(d.partition(">=")[2] for d in dependencies if d.startswith("torch>="))


def run(python: str, torch: str, dry: bool) -> str:
    """Run the tests by a Python with a torch ("" for the newest), and return what came out in a few words."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode:
        return f"skipped, because there is no python{python} that runs"
    wanted = f"torch=={torch}.*" if torch else "torch"
    folder = FOLDER / f"{python}-{torch or 'newest'}"
    commands = {
        "no environment can be made": [interpreter, "-m", "venv", str(folder)],
        f"pip finds no {wanted}": [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", wanted],
        "what the tests need does not fit it": [
            str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", wanted, "-e", f"{ROOT}[test]",
        ],
    }  # fmt: skip
    tests = [str(folder / "bin" / "python"), "-m", "pytest", "-m", "not slow", str(ROOT / "tests")]
    if dry:
        return "would run " + ", then ".join(" ".join(c) for c in (*commands.values(), tests))
    for reason, command in commands.items():
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            return f"skipped, because {reason}"
    return "passed" if subprocess.run(tests, cwd=ROOT, check=False).returncode == 0 else "failed"


def main(arguments: list[str] | None = None) -> int:
    """Run all pairs, print a line on each of them, and return 1 where one has failed or all were skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    options = parser.parse_args(arguments)
    pairs = [(python, torch) for python in pythons() for torch in (oldest_torch(), "")]
    found = {}
    for python, torch in pairs:
        found[python, torch] = run(python, torch, options.dry_run)
        print(f"Python {python}, torch {torch or 'newest'}: {found[python, torch]}", flush=True)
    skipped = sum(outcome.startswith("skipped") for outcome in found.values())
    print(f"{len(found) - skipped} of {len(found)} pairs, {skipped} skipped")
    return int("failed" in found.values() or skipped == len(found))


if __name__ == "__main__":
    sys.exit(main())
