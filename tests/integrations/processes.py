"""Starts two processes on the CPU, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str) -> str:
    """Run a script, or a module after ``-m``, in two processes, and return what they print."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


def python(*arguments: str) -> str:
    """Run a script, or a module after ``-m``, which may start others, and return what it prints."""
    local = "lo" if Path("/sys/class/net/lo").exists() else "lo0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": local, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout
