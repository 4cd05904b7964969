"""The one exception family of the library."""

from __future__ import annotations


class PlasticError(Exception):
    """Bad input or a model that cannot be handled; the message names the module, the shapes and the way out.

    Whatever raises it has changed nothing.
    """
