"""A soak: `plasticnet train`, killed again and again, must end as a run that nothing has interrupted, to the bit.

``make soak`` runs ``python benchmarks/soak_kills.py --count 100`` beside the other soaks. A trial is one run: it is
killed, resumed, killed again, and in the end compared with the run of the same settings that was left in peace. Kills
come at any moment, while a file is written, or while an epoch is ended (where units are cut and grown), and in some
trials the newest checkpoint is damaged after a kill. Results are written after every trial, and a call with the same
settings goes on from them. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_kills.json"

COMMON = "--data digits --model mlp:24-12 --batch 64 --lr 0.01 --gate-lr 0.1"
OFTEN = ("--checkpoint-seconds", "0.05")
RUNS = {
    "prune, with a price": "--epochs 8 --price 0.3",
    "prune, to a budget": "--epochs 8 --budget params=0.4",
    "prune, within a loss": "--epochs 8 --budget loss=0.1",
    "grow, with a price": "--growth --epochs 12 --batch 16 --price 0.02",
    "grow, to a budget": "--growth --epochs 10 --batch 16 --budget params=0.6",
    "all three": "--compare --epochs 6 --batch 32",
}
WHEN = ("at any moment", "while a file is written", "while an epoch is ended")
DAMAGE = ("nothing", "nothing", "a changed byte", "cut off", "emptied", "removed")
KILLS = 4  # the most kills of a trial


def train(run: str, folder: Path, resume: bool) -> None:
    """Do what the command does, in this process."""
    import torch

    from plasticnet.apps.cli import app

    torch.set_num_threads(1)
    args = ["train", *OFTEN, *(["--resume"] if resume else f"{COMMON} {RUNS[run]}".split())]
    app([*args, "--out", str(folder)], standalone_mode=False)


def child(run: str, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Start the command in a process of its own, which begins with ``prepare``; return its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        train(run, folder, (folder / "run.json").exists())
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def write_kill(folder: Path, number: int) -> None:
    """Let this process be killed before a certain time that it opens, renames or removes a file of the run."""
    left = [number]

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def step_kill(number: int, seconds: float) -> None:
    """Let this process die a moment after a certain epoch begins to be ended."""
    from plasticnet import Schedule

    step, left = Schedule.step, [number]

    def stepping(schedule: Schedule, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # nothing handles SIGALRM, and the process ends at once
        return step(schedule, *args)

    Schedule.step = stepping  # type: ignore[method-assign]


def ended(number: int, limit: float) -> int | None:
    """Wait until a process has ended, and return its exit status; None where a signal has ended it, also ours."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return None


def damage(folder: Path, how: str, draw: random.Random) -> bool:
    """Damage the newest checkpoint of a network, where there is another one beside it; return whether it was done."""
    found = [path for path in folder.glob("*/checkpoint.safetensors") if path.with_stem("checkpoint-before").exists()]
    if how == "nothing" or not found:
        return False
    path = max(found, key=lambda p: p.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    if not content:
        return False  # it was emptied after the kill before, and none has been written since
    if how == "a changed byte":
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    elif how == "cut off":
        del content[draw.randrange(1, len(content)) :]
    path.unlink() if how == "removed" else path.write_bytes(b"" if how == "emptied" else content)
    return True


def timeless(found: Any) -> Any:
    """Return plain data without what was timed."""
    if isinstance(found, list):
        return [timeless(f) for f in found]
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if "seconds" not in str(k) and not str(k).startswith("ms_")}
    return found


def content(folder: Path) -> dict[str, Any]:
    """Return what a run has left, by the name of the file: bytes, tensors as bytes, and records without times."""
    from plasticnet import load_checkpoint

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name.startswith("checkpoint") and path.suffix == ".safetensors":
            # The one before may lie within the last epoch here, and at the end of the one before it there.
            found[name] = None if "before" in path.name else list(leaves(load_checkpoint(path)))
        else:
            found[name] = path.read_bytes() if path.suffix == ".safetensors" else None  # the report shows times
    return found


def leaves(tree: Any) -> Iterator[Any]:
    """Yield everything in a checkpoint, in order, with tensors as bytes and without what was timed."""
    if hasattr(tree, "numpy"):
        yield (str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes())
    elif isinstance(tree, dict):
        for key, value in timeless(tree).items():
            yield key
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def trial(seed: int, work: Path, peaceful: dict[str, Any], times: dict[str, float]) -> dict[str, Any]:
    """Run one trial, and return what was done and found."""
    draw = random.Random(seed)
    run = list(RUNS)[seed % len(RUNS)]
    if run not in peaceful:
        whole, begun = work / f"whole-{seed % len(RUNS)}", time.monotonic()
        if ended(child(run, whole), 300) != 0:
            raise SystemExit(
                f"{run}: not even a run in peace has ended: {whole.with_suffix('.log').read_text()[-2000:]}"
            )
        times[run] = time.monotonic() - begun
        peaceful[run] = content(whole)
    folder, kills, damaged = work / f"trial-{seed}", dict.fromkeys(WHEN, 0), dict[str, int]()
    status: int | None = None
    for _ in range(KILLS):
        when, how = draw.choice(WHEN), draw.choice(DAMAGE)
        if when == WHEN[0]:
            status = ended(child(run, folder), draw.uniform(0.05, 0.8 * times[run]))
        elif when == WHEN[1]:
            number = draw.randrange(1, 120)
            status = ended(child(run, folder, lambda number=number: write_kill(folder, number)), 300)
        else:
            moment = draw.randrange(1, 6), draw.uniform(0.0001, 0.02)
            status = ended(child(run, folder, lambda moment=moment: step_kill(*moment)), 300)
        if status is not None:
            break
        kills[when] += 1
        if damage(folder, how, draw):
            damaged[how] = damaged.get(how, 0) + 1
    if status is None:
        status = ended(child(run, folder), 300)
    row: dict[str, Any] = {"seed": seed, "run": run, "kills": kills, "damaged": damaged, "status": "equal"}
    if status != 0:
        row |= {"status": "not ended", "what": folder.with_suffix(".log").read_text()[-1000:]}
    else:
        found = content(folder)
        wrong = [name for name in sorted(found | peaceful[run]) if found.get(name, 0) != peaceful[run].get(name, 0)]
        if wrong:
            row |= {"status": "different", "what": ", ".join(wrong)}
    if row["status"] == "equal":
        shutil.rmtree(folder)
    return row


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file of trials with these settings goes on from."""
    from common import environment

    before = json.loads(path.read_text()) if path.exists() else {"settings": None}
    trials = before["trials"] if before["settings"] == settings else []
    return {"environment": environment(), "settings": settings, "trials": trials}


def repeated(result: dict[str, Any], options: argparse.Namespace, trial: Callable[[int, Path], dict[str, Any]]) -> int:
    """Run trials until there were so many kills; return 1 where something was not equal.

    Args:
        result: What is there already, to which trials are added.
        options: The options "count", "minutes", "work" and "out" of the command line.
        trial: Runs the trial of a number, counted from 0, in a folder.
    """
    trials, end = result["trials"], time.monotonic() + 60 * options.minutes
    work = Path(tempfile.mkdtemp(prefix="soak-", dir=options.work))
    while sum(sum(t["kills"].values()) for t in trials) < options.count and time.monotonic() < end:
        row = trial(len(trials), work)
        trials.append({**row, "commit": result["environment"]["commit"]})
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(row, flush=True)
    bad = [t for t in trials if t["status"] != "equal"]
    if bad:
        print(f"what is left of the trials: {work}")
    else:
        shutil.rmtree(work)
    return int(bool(bad))


def main(arguments: list[str] | None = None) -> int:
    """Run trials until there were so many kills; return 1 where something was not equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="how many kills, those of earlier calls included")
    parser.add_argument("--minutes", type=float, default=600.0, help="no trial begins after so many minutes")
    parser.add_argument("--work", type=Path, help="where runs are written; in memory, as in /dev/shm, they are faster")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    settings = {"runs": RUNS, "common": f"{COMMON} {' '.join(OFTEN)}"}
    result = begun(options.out, settings)
    with tempfile.TemporaryDirectory() as folder:  # so that the processes find everything imported
        train("prune, with a price", Path(folder) / "warm", resume=False)
    peaceful, times = dict[str, Any](), dict[str, float]()
    return repeated(result, options, lambda number, work: trial(number, work, peaceful, times))


if __name__ == "__main__":
    sys.exit(main())
