"""TODO."""

from __future__ import annotations

# A compact module's plain record, for `save`: the dimensions that are not those of the original
# architecture ("resized"), attributes that were set for them ("widths"), and blocks that are gone ("removed").
RECORD = "_plasticnet"
