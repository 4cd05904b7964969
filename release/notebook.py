"""Runs the code of a notebook, and compares what it prints with what the notebook says; --write puts it in instead.

A notebook is JSON, so that nothing is needed for this but Python: the cells run in their order in one namespace. What
is printed is compared without its numbers, which are not the same on every machine; pictures are only compared by their
being there. From the root of the repository: python release/notebook.py --write
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "shrink_and_grow.ipynb"


def outputs(content: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run the cells of a notebook, and return the outputs of each cell with code: what it printed, and its pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")  # a figure that somebody left open is no output of a cell
    names: dict[str, Any] = {"__name__": "__main__"}
    found: list[list[dict[str, Any]]] = []
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        own: list[dict[str, Any]] = []
        if text := printed.getvalue():
            own.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
        for figure in map(plt.figure, plt.get_fignums()):
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=80, metadata={"Software": None})
            picture = base64.b64encode(image.getvalue()).decode()
            own.append({"data": {"image/png": picture}, "metadata": {}, "output_type": "display_data"})
        plt.close("all")
        found.append(own)
    return found


def committed(content: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the outputs that a notebook holds, for each of its cells with code."""
    return [cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code"]


def wordless(found: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """Return outputs with a sign in the place of each number, and with the type in the place of a picture."""

    def shown(output: dict[str, Any]) -> Any:
        if output["output_type"] != "stream":
            return sorted(output["data"])
        return [re.sub(r"[\d.,e%-]*\d[\d.,e%-]*", "#", " ".join(line.split())) for line in output["text"]]

    return [[shown(output) for output in own] for own in found]


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="Put what was printed into the notebook.")
    options = parser.parse_args()
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    found = outputs(content)
    if options.write:
        cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        for count, (cell, own) in enumerate(zip(cells, found, strict=True), 1):
            cell["outputs"], cell["execution_count"] = own, count
        NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif wordless(found) != wordless(committed(content)):
        raise SystemExit(f"{NOTEBOOK.name} prints something else: python release/notebook.py --write puts it in")


if __name__ == "__main__":
    main()
