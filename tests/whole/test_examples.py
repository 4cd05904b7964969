"""Every public name has an example in its docstring, and each of them runs."""

from __future__ import annotations

import doctest
import inspect

import pytest

import plasticnet as pn

NAMES = [n for n in pn.__all__ if inspect.isclass(getattr(pn, n)) or inspect.isfunction(getattr(pn, n))]


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str) -> None:
    thing = getattr(pn, name)
    docstring = inspect.getdoc(thing) or ""
    assert "Example:" in docstring, f"the docstring of {name} has no example"
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    (test,) = [t for t in found if t.examples]
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert results.failed == 0, "".join(report)
    assert results.attempted > 0


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_something_themselves(name: str) -> None:
    thing = getattr(pn, name)
    members = (
        [thing, *(m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_"))]
        if (inspect.isclass(thing))
        else [thing]
    )
    for member in members:
        first = (inspect.getdoc(member) or "").split("\n")[0]
        assert first, member
        assert not first.startswith("See "), member
