"""A loop of one's own with Accelerate: examples/accelerate_loop.py checks sizes and multiply-adds itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

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


def mean_accuracy(*arguments: str) -> float:
    """The mean over three seeds. A single accuracy is that of 360 images, and varies by a point."""
    return fmean(end(alone(*arguments, "--seed", str(seed)))[0] for seed in range(3))


def test_bf16() -> None:
    """In bf16 a loop ends within the budget, and on average within a point of single precision."""
    assert abs(mean_accuracy("--cpu", "--precision", "bf16") - mean_accuracy("--cpu")) <= 1.0


def test_resumed(tmp_path: Path) -> None:
    """A loop that goes on from a state of Accelerate ends in the same network to the bit."""
    options = ["--cpu", "--precision", "bf16"]
    whole, folder = end(alone(*options)), [*options, "--folder", str(tmp_path / "state")]
    assert "epoch  9" in alone(*folder, "--stop", "9")
    assert end(alone(*folder, "--resume")) == whole


@pytest.mark.integration("Accelerate", 2)
def test_two_processes(tmp_path: Path) -> None:
    """Two processes have equal sizes, with bf16, accumulation and clipping; going on is equal to the bit."""
    options = [EXAMPLE, "--cpu", "--precision", "bf16", "--accumulate", "2"]
    accuracy, total = end(torchrun(*options))
    assert accuracy > 85
    folder = [*options, "--folder", str(tmp_path / "state")]
    torchrun(*folder, "--stop", "9")
    assert end(torchrun(*folder, "--resume")) == (accuracy, total)


def test_fp16() -> None:
    """In fp16, with a GradScaler on a GPU, a loop ends within the budget, and within a point of single precision."""
    if not torch.cuda.is_available():
        pytest.skip("fp16 with a GradScaler needs a GPU")
    assert abs(mean_accuracy("--precision", "fp16") - mean_accuracy()) <= 1.0
