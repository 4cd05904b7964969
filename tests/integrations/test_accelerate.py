"""A loop of one's own with Accelerate: examples/accelerate_loop.py checks sizes and multiply-adds itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")

from tests.integrations.processes import torchrun

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "accelerate_loop.py")
pytestmark = [pytest.mark.slow, pytest.mark.integration("Accelerate", 1)]


def alone(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def end(printed: str) -> tuple[float, str]:
    """The accuracy, and the sum of all weights as it was printed."""
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", printed)
    (total,) = re.findall(r"without signs: ([\d.]+)", printed)
    return float(accuracy), total


def test_bf16(tmp_path: Path) -> None:
    """In bf16 a loop ends within the budget, within a point of single precision, and one that goes on is equal to the bit."""
    single, _ = end(alone("--cpu"))
    accuracy, total = end(alone("--cpu", "--precision", "bf16"))
    assert abs(accuracy - single) <= 1.0
    assert accuracy > 88
    folder = ["--cpu", "--precision", "bf16", "--folder", str(tmp_path / "state")]
    assert "epoch  9" in alone(*folder, "--stop", "9")
    assert end(alone(*folder, "--resume")) == (accuracy, total)


@pytest.mark.integration("Accelerate", 2)
def test_two_processes(tmp_path: Path) -> None:
    """In two processes ranks have equal sizes; bf16, accumulation and clipping together; one that goes on is equal to the bit."""
    options = [EXAMPLE, "--cpu", "--precision", "bf16", "--accumulate", "2"]
    accuracy, total = end(torchrun(*options))
    assert accuracy > 85
    folder = [*options, "--folder", str(tmp_path / "state")]
    torchrun(*folder, "--stop", "9")
    assert end(torchrun(*folder, "--resume")) == (accuracy, total)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with a GradScaler needs a GPU")
def test_fp16() -> None:
    """In fp16, with the GradScaler of Accelerate on a GPU, a loop ends within the budget, within a point of single precision."""
    single, _ = end(alone())
    accuracy, _ = end(alone("--precision", "fp16"))
    assert abs(accuracy - single) <= 1.0
