"""The error that ends the epochs of `shrink` where there is a network to return."""

from __future__ import annotations

from plasticnet.errors import PlasticError


class NotFinite(PlasticError):
    """Says that a loss, an error or an output is NaN or infinite."""
