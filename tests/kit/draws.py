"""The draws that networks have made: `tests/conftest.py` lets every sampler remember its last one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from plasticnet import PlasticNet
from plasticnet.learning.coupling import Draw
from plasticnet.learning.sampler import Sampler

REMEMBERED: WeakKeyDictionary[Sampler, Draw] = WeakKeyDictionary()


def last_draw(net: PlasticNet) -> Draw:
    """The draw that a network has made last."""
    return REMEMBERED[net.sampler]
