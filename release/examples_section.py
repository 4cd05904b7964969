"""Shows the "Example:" of a docstring as code: griffe knows such a section under the name "Examples" only."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Gives the section the name that griffe knows, in the docstrings that it reads and nowhere else."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of a module, a class or a function."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
