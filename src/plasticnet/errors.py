"""Defines the exception that the library raises, and shortens those of others."""

from __future__ import annotations


class PlasticError(Exception):
    """Says that an input is bad, or that a model cannot be handled.

    The message names the module and the shapes, and says what to do. What raises the error has changed nothing.

    Example:
        >>> import torch, plasticnet as pn
        >>> try:
        ...     pn.PlasticNet(torch.nn.Linear(4, 2), (torch.zeros(2, 3),))
        ... except pn.PlasticError as error:
        ...     print(str(error).split(":")[0])
        Linear does not run on the example inputs (shapes [(2, 3)])
    """


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's message, for a message of ours; or the error itself if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
