"""What holds for every test: the seed, and one thread."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from plasticnet.learning.coupling import Draw
from plasticnet.learning.sampler import Sampler
from tests.kit.draws import REMEMBERED

# Programs that tests start have one thread, too: several of them run at a time, and their threads would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where the tests run in the background of a shell, Ctrl-C is ignored by them and by the programs that they start, and a
# test that sends it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _remember_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests a sampler remembers its first draw of each step: see `last_draw`."""
    draw = Sampler.draw

    def remembering(sampler: Sampler, *args: Any) -> Draw:
        found = draw(sampler, *args)
        REMEMBERED[sampler] = found
        return found

    monkeypatch.setattr(Sampler, "draw", remembering)
