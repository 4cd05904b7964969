"""The kinds of pieces of soak_networks.py, and what its networks read beside their first input."""

from __future__ import annotations

from random_kinds import Kind, registering

KINDS: dict[str, Kind] = {}  # none of them is one of random_networks.py
kind = registering(KINDS)
STEPS = 6  # of every sequence
IDS, SIDE = 9, 4  # the size of the vocabulary of the second input, and the width of the third
