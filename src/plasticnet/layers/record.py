"""Names the attribute in which a compact module keeps what `save` needs to know."""

from __future__ import annotations

# The attribute is a dict of plain data. It names the dimensions that are not those of the original architecture
# ("resized"), the attributes that were set for them ("widths"), and the blocks that are gone ("removed"). Where
# experts of a mixture are gone, it names these, too ("experts").
RECORD = "_plasticnet"
