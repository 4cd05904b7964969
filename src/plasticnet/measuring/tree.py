"""Nests the rows of a table like the modules of a network, and folds equal siblings into one row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Row = tuple[str, str, str, str, str]
SHOWN = 3  # the most names that are listed: of the readers of a site, or of what is frozen for one reason


@dataclass
class Node:
    """A module in the table.

    Two nodes are equal, and can share a row, where their children and their cells are equal.

    Attributes:
        children: The modules in this one, by the last part of their name.
        cells: If the module is a site, the cells of its row without the name, else None.
    """

    children: dict[str, Node] = field(default_factory=dict)
    cells: tuple[str, str, str, str] | None = None


def walk_rows(node: Node, depth: int) -> Iterator[Row]:
    """Yield the rows of everything in a module, indented by two spaces for each level.

    A module that is no site and holds a single other one shares its row: ``layer.0.conv``.

    Args:
        node: The module; it gets no row itself.
        depth: The level of the modules in it, 0 or more.
    """
    for name, child in _folded(node.children):
        while child.cells is None and len(below := _folded(child.children)) == 1:
            name, child = f"{name}.{below[0][0]}", below[0][1]
        units, parameters, macs, readers = child.cells or ("", "", "", "")
        yield ("  " * depth + name, units, parameters, macs, readers)
        yield from walk_rows(child, depth + 1)


def _folded(children: Mapping[str, Node]) -> list[tuple[str, Node]]:
    """Return the children with their names, equal numbered ones as one: ``[0-11]``, ``layer[1-3]``."""
    groups: list[tuple[str, list[str], Node]] = []  # a stem, the numbers that follow it, and the node that they share
    for name, child in children.items():
        stem = name.rstrip("0123456789")
        twins = next((numbers for s, numbers, first in groups if s == stem != name and first == child), [])
        if not twins:
            groups.append((stem, twins, child))
        twins.append(name[len(stem) :])
    return [(stem + (n[0] if len(n) == 1 else f"[{_ranges([int(i) for i in n])}]"), child) for stem, n, child in groups]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, with ranges: ``0-3,5``."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1][1:] = [n]
        else:
            spans.append([n])
    return ",".join("-".join(map(str, span)) for span in spans)


def relative_name(name: str, site: str) -> str:
    """Return a module's name without the leading part that it shares with the module around a site.

    Example:
        >>> relative_name("layers.0.mlp.fc2", "layers.0.mlp.fc1")
        'fc2'
    """
    parts, around = name.split("."), site.split(".")[:-1]
    while len(parts) > 1 and around and parts[0] == around[0]:
        parts, around = parts[1:], around[1:]
    return ".".join(parts)


def listed_names(names: Sequence[str], shown: int) -> str:
    """Return the first names as text, and how many more there are.

    Example:
        >>> listed_names(["conv1", "conv2", "fc1", "fc2"], shown=2)
        'conv1, conv2 and 2 more'
    """
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {len(names) - shown:,} more"
