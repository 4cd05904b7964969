"""Names the attribute in which a compact module keeps what `save` needs to know of it."""

from __future__ import annotations

# A compact module's plain record, for `save`: the dimensions that are not those of the original
# architecture ("resized"), attributes that were set for them ("widths"), and blocks that are gone ("removed").
RECORD = "_plasticnet"
