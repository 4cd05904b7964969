"""Every public name has an example in its docstring, and each of them runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
from typing import Any

import pytest

import plasticnet as pn

NAMES = [n for n in pn.__all__ if inspect.isclass(getattr(pn, n)) or inspect.isfunction(getattr(pn, n))]
# What other packages are needed for, and the classes that their modules have for users.
OTHERS = {
    "plasticnet.sklearn": ("PlasticMLPClassifier", "PlasticMLPRegressor"),
    "plasticnet.huggingface": ("PlasticCallback", "PlasticTrainer"),
    "plasticnet.lightning": ("PlasticCallback",),
}
NEEDED = {"plasticnet.huggingface": "transformers", "plasticnet.lightning": "lightning"}
ALL = [*(("plasticnet", n) for n in NAMES), *((module, n) for module, names in OTHERS.items() for n in names)]


def public(module: str, name: str) -> Any:
    """The class or function of this name; the test is skipped where the package that it needs is missing."""
    if module in NEEDED:
        pytest.importorskip(NEEDED[module])
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("module", "name"), ALL)
def test_example(module: str, name: str) -> None:
    thing = public(module, name)
    docstring = inspect.getdoc(thing) or ""
    assert "Example:" in docstring, f"the docstring of {name} has no example"
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    (test,) = [t for t in found if t.examples]
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(
        test, out=report.append
    )
    assert results.failed == 0, "".join(report)
    assert results.attempted > 0 or module == "plasticnet.lightning"  # whose example is part of a page that is run


@pytest.mark.parametrize(("module", "name"), ALL)
def test_docstrings_say_something_themselves(module: str, name: str) -> None:
    thing = public(module, name)
    members = (
        [thing, *(m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_"))]
        if (inspect.isclass(thing))
        else [thing]
    )
    for member in members:
        first = (inspect.getdoc(member) or "").split("\n")[0]
        assert first, member
        assert not first.startswith("See "), member
