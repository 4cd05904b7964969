"""A soak: two processes train one network in DDP, are killed again and again, and must end as if nothing had been.

``make soak`` runs ``python benchmarks/soak_ranks.py --count 30`` beside the other soaks. Both processes save together,
by `save_distributed`, after every epoch, and every few steps within one, over the checkpoint before. A kill ends both
at once, or one of them: the other one must then end by itself, or torchrun ends it. In the end, each process compares
everything that it holds with what it holds after a run that was left in peace. Results are written after every trial,
and a call goes on from them. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_ranks.json"

RUNS = ("prune, to a budget", "grow, with a price")
WHEN = ("at any moment", "while a file is written", "while an epoch is ended")
WHOM = ("both at once", "one of them", "one of them, under torchrun")
EPOCHS, BATCHES, EVERY = 8, 6, 4  # epochs, batches of each, and after how many steps within an epoch a state is saved
KILLS = 4  # the most kills of a trial
LIMIT = 120.0  # seconds for a run, and for the process that is left to end


# -- in the processes that train --------------------------------------------------------------


def work(run: str, folder: Path) -> None:
    """Train in this process, which is one of two, from the checkpoint in the folder if there is one."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    import plasticnet as pn

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "lo0")
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    rank, kept = dist.get_rank(), folder / "checkpoint"
    data = torch.Generator().manual_seed(0)
    x = torch.randn(2 * 16 * BATCHES, 8, generator=data)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()
    torch.manual_seed(0)
    width = 24 if run == RUNS[0] else 4
    model = torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Linear(width, width),
        torch.nn.Tanh(), torch.nn.Linear(width, 3),
    )  # fmt: skip
    net = pn.PlasticNet(model, (x[:2],))
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    options: dict[str, Any] = {"budget": pn.Budget(params=0.4), "hibernate": 0.3}
    if run == RUNS[1]:
        options = {"growth": pn.Growth(), "pressure": pn.Pressure(1e-3)}
    schedule = pn.Schedule(net, optimizer, [pn.Stage(1), pn.Stage(EPOCHS - 2, k=7.0), pn.Stage(1)], **options)
    torch.manual_seed(1 + rank)
    done: dict[str, Any] = {"step": 0, "order": None, "lines": []}
    if kept.exists() and any(kept.glob(".metadata")):
        done = pn.load_distributed(kept, ddp, optimizer, schedule)
    share = torch.arange(rank, len(x), 2)
    while schedule.epoch < EPOCHS:
        # Which order an epoch has follows from its number, so that a state within it needs no more than the step.
        order = torch.randperm(len(share), generator=torch.Generator().manual_seed(schedule.epoch))
        ddp.train()
        for step, i in enumerate(share[order].split(16)):
            if step < done["step"]:
                continue
            xs, ys = x[i], y[i]
            loss = net.expected_loss(lambda xs=xs, ys=ys: F.cross_entropy(ddp(xs), ys, reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
            done["lines"].append([schedule.epoch, step, [len(site) for site in net.sites.values()]])
            done["step"] = step + 1
            if (step + 1) % EVERY == 0:
                pn.save_distributed(kept, ddp, optimizer, schedule, extra=done)
        schedule.step(1.0)
        done["step"] = 0
        pn.save_distributed(kept, ddp, optimizer, schedule, extra=done)
    state = {k: v for k, v in net.state_dict().items() if rank == 0 or ".running_" not in k}  # they are those of rank 0
    states = {"net": state, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    pn.save_checkpoint({**states, "done": done, "random": torch.get_rng_state()}, folder / f"end-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def killed(when: str, seed: int, folder: Path) -> None:
    """Let this process be killed at a moment that follows from a seed."""
    from soak_kills import step_kill, write_kill

    draw = random.Random(seed)
    if when == WHEN[1]:
        write_kill(folder / "checkpoint", draw.randrange(1, 60))
    elif when == WHEN[2]:
        step_kill(draw.randrange(1, EPOCHS), draw.uniform(0.0001, 0.02))
    else:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 1.5))  # nothing handles SIGALRM


# -- in the process that kills ----------------------------------------------------------------


def started(run: str, folder: Path, plan: tuple[str, str, int] | None) -> list[int | subprocess.Popen[bytes]]:
    """Start two processes that train, or torchrun, and return what they can be waited for by.

    Args:
        run: Which of the runs.
        folder: Where it writes.
        plan: When to kill, whom, and a seed.
    """
    order = [run, str(folder), json.dumps(plan)]
    log = (folder.with_suffix(".log")).open("ab")
    if plan is not None and plan[1] == WHOM[2]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        return [subprocess.Popen([*command, "--work-on", *order], stdout=log, stderr=log)]
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    found: list[int | subprocess.Popen[bytes]] = []
    for rank in range(2):
        number = os.fork()
        if not number:
            status = 1
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
                meet(meeting, rank)
                prepared(folder, plan, rank)
                work(run, folder)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        found.append(number)
    return found


def meet(path: Path, rank: int) -> None:
    """Let `init_process_group` meet at a file, as a port may be taken."""
    import torch.distributed as dist

    begin = dist.init_process_group
    dist.init_process_group = lambda *a, **k: begin(*a, init_method=path.as_uri(), rank=rank, world_size=2, **k)


def prepared(folder: Path, plan: tuple[str, str, int] | None, rank: int) -> None:
    """Let this process be killed where the plan says so."""
    if plan is not None and (plan[1] == WHOM[0] or rank == plan[2] % 2):
        killed(plan[0], plan[2], folder)


def waited(things: list[int | subprocess.Popen[bytes]], both: bool) -> tuple[list[int | None], bool]:
    """Wait for processes; return their exit statuses, None for one that was killed, and whether one had to be.

    Args:
        things: What `started` returned.
        both: Whether all are killed as soon as one of them is.
    """
    from soak_kills import ended

    if isinstance(things[0], subprocess.Popen):
        try:
            return [things[0].wait(LIMIT)], False
        except subprocess.TimeoutExpired:
            things[0].kill()
            return [None], True
    left, statuses = {n: i for i, n in enumerate(things) if isinstance(n, int)}, [None, None]
    end = time.monotonic() + LIMIT
    while left and time.monotonic() < end:
        for number in list(left):
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                statuses[left.pop(number)] = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
                if both and not os.WIFEXITED(status):
                    for other in left:
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    for number in left:
        ended(number, 0.0)
    return statuses, bool(left)


def ends(folder: Path) -> list[Any]:
    """Return everything that each process held in the end."""
    from soak_kills import leaves

    from plasticnet import load_checkpoint

    return [list(leaves(load_checkpoint(folder / f"end-{rank}.safetensors"))) for rank in range(2)]


def trial(seed: int, work_folder: Path, peaceful: dict[str, Any], most: int = KILLS) -> dict[str, Any]:
    """Run one trial, with so many kills at most, and return what was done and found."""
    draw = random.Random(seed)
    run = RUNS[seed % len(RUNS)]
    if run not in peaceful:
        whole = work_folder / f"whole-{seed % len(RUNS)}"
        whole.mkdir()
        if waited(started(run, whole, None), False)[0] != [0, 0]:
            raise SystemExit(
                f"{run}: not even a run in peace has ended: {whole.with_suffix('.log').read_text()[-2000:]}"
            )
        peaceful[run] = ends(whole)
    folder, kills = work_folder / f"trial-{seed}", {f"{when}, {whom}": 0 for when in WHEN for whom in WHOM}
    folder.mkdir()
    status: list[int | None] = [None]
    row: dict[str, Any] = {"seed": seed, "run": run, "kills": kills, "status": "equal"}
    for _ in range(most):
        plan = draw.choice(WHEN), draw.choice((*WHOM[:2], *WHOM)), draw.randrange(2**30)
        status, hangs = waited(started(run, folder, plan), plan[1] == WHOM[0])
        if hangs:
            return row | {"status": "hangs", "what": f"{plan}"}
        if not any(s != 0 for s in status):
            break
        kills[f"{plan[0]}, {plan[1]}"] += 1
    if any(s != 0 for s in status):
        status, hangs = waited(started(run, folder, None), False)
    if any(s != 0 for s in status):
        row |= {"status": "not ended", "what": folder.with_suffix(".log").read_text()[-1000:]}
    elif ends(folder) != peaceful[run]:
        row |= {"status": "different"}
    elif [p.name for p in (folder / "checkpoint").iterdir() if p.suffix != ".distcp"] != [".metadata"]:
        row |= {"status": "something is left"}
    else:
        shutil.rmtree(folder)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run trials until there were so many kills; return 1 where something was not equal."""
    from soak_kills import begun, repeated

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30, help="how many kills, those of earlier calls included")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--kills", type=int, default=KILLS, help="the most kills of a trial")
    parser.add_argument("--minutes", type=float, default=600.0, help="no trial begins after so many minutes")
    parser.add_argument("--work", type=Path, help="where runs are written; in memory, as in /dev/shm, they are faster")
    parser.add_argument("--work-on", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.work_on:
        run, folder, plan = options.work_on
        prepared(Path(folder), json.loads(plan), int(os.environ["RANK"]))
        work(run, Path(folder))
        return 0
    settings = {"runs": list(RUNS), "epochs": EPOCHS, "batches": BATCHES, "every": EVERY, "kills": options.kills}
    result = begun(options.out, settings)
    import plasticnet  # noqa: F401, so that the processes find it imported

    peaceful = dict[str, Any]()
    return repeated(result, options, lambda number, work: trial(options.seed + number, work, peaceful, options.kills))


if __name__ == "__main__":
    sys.exit(main())
