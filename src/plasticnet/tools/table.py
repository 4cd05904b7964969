"""TODO."""

from __future__ import annotations


def readable_bytes(count: int) -> str:
    """``1.5 KiB``"""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
