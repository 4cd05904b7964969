"""Signals stop a training after a step; the library itself handles none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import plasticnet as pn
from plasticnet.apps.stopping import Interrupted, stopped_by_signals
from tests.kit.commands import succeed

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
TRAIN = ["--data", "moons", "--model", "mlp:6-4", "--epochs", "500", "--batch", "20"]


@POSIX
@pytest.mark.slow
def test_a_training_that_is_stopped_is_saved_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "a run"
    command = [sys.executable, "-m", "plasticnet", "train", *TRAIN, "--out", str(out)]
    steps = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            path = out / "prune" / "checkpoint.safetensors"
            before = path.stat().st_mtime_ns if path.exists() else 0
            while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
                time.sleep(0.05)
            process.send_signal(number)
            text, errors = process.communicate(timeout=60)
        assert process.returncode == status, (text, errors)
        assert f"interrupted, and saved in {out}: plasticnet train --resume --out '{out}' goes on" in text
        assert errors == ""
        saved = pn.load_checkpoint(path)
        taken = len(saved["history"]) * 20 + (saved["place"] or {"step": 0})["step"]
        assert taken > steps
        steps = taken
        assert len((out / "metrics.jsonl").read_text().splitlines()) == len(saved["history"])
        command = [sys.executable, "-m", "plasticnet", "train", "--resume", "--out", str(out)]  # as the line says


SLOW = """
import os, signal, sys, time
from plasticnet.apps.stopping import stopped_by_signals
with stopped_by_signals() as stop:
    print("in", flush=True)
    end = time.monotonic() + 60
    while stop.signal is None and time.monotonic() < end:
        time.sleep(0.01)
    print("first" if stop.signal else "no signal", flush=True)
    time.sleep(600)  # a long step
"""


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("in\n", "first\n"):
            assert process.stdout.readline() == line
            process.send_signal(number)
        assert process.wait(timeout=60) == -number


@POSIX
def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stopped_by_signals() as stop:
        stop.check()  # nothing was asked for
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@POSIX
def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a process in the background
    try:
        with stopped_by_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_handles_no_signals() -> None:
    found: list[object] = []

    def work() -> None:
        with stopped_by_signals() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_the_library_installs_no_handlers() -> None:
    """Whoever writes the loop decides what a signal does."""
    program = (
        "import signal\nbefore = [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "import torch, plasticnet as pn\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "pn.shrink(model, [torch.randn(32, 4)], pn.Budget(macs=0.5), epochs=1)\n"
        "assert [signal.getsignal(s) for s in signal.valid_signals()] == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@POSIX
@pytest.mark.slow
def test_the_line_that_says_how_to_go_on_stands_alone(tmp_path: Path) -> None:
    """Also where the output is no terminal, on which the table of the progress ends without a new line."""
    command = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "2000", "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, "-m", "plasticnet", *command], stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run/prune/checkpoint.safetensors").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.splitlines()[-1].startswith("interrupted, and saved in")


def test_resume_alone_takes_the_options_of_the_start(tmp_path: Path) -> None:
    args = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100"]
    succeed(*args, "--out", tmp_path)
    before = (tmp_path / "prune/compact.safetensors").read_bytes()
    (tmp_path / "prune/checkpoint.safetensors").unlink()
    assert "going on from" in succeed("train", "--resume", "--out", tmp_path, "--checkpoint-seconds", "0")
    assert (tmp_path / "prune/compact.safetensors").read_bytes() == before
