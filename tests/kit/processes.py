"""Scenarios that run in two processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def start(path: Path, rank: int, ranks: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "lo0")
    dist.init_process_group(
        "gloo", init_method=(path / "init").as_uri(), rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )


def together(path: Path, *scenarios: Callable[[int], None]) -> None:
    """Run them in two processes, one after the other; an assertion that fails in one ends the test."""
    multiprocessing.spawn(_work, (path, scenarios), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def _work(rank: int, path: Path, scenarios: Sequence[Callable[[int], None]]) -> None:
    torch.set_num_threads(1)
    start(path, rank, 2)
    for scenario in scenarios:
        torch.manual_seed(0)  # the networks are built alike
        scenario(rank)
        gc.collect()  # a wrapper that is left keeps the threads of the group alive when the interpreter ends
        dist.barrier()
    dist.destroy_process_group()


def everywhere(value: Any) -> list[Any]:
    """The values of all ranks."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found
