"""Writes the HTML page of a run, which loads nothing from elsewhere: what came out, in words, tables and pictures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plasticnet.apps.page import Markup, joined, markup, page, table
from plasticnet.apps.scores import shown
from plasticnet.cost.latency import TIME
from plasticnet.tools.table import readable_bytes

mpl.use("Agg")

_COLOURS = {"dense": "#777777", "prune": "#c0392b", "grow": "#2471a3"}

_DONE = {
    "dense": "The network that was trained as it is",
    "prune": "The network that was pruned while it was trained",
    "grow": "The network that grew while it was trained",
}

# Pictures keep their size where the screen is narrow, so that their words can be read, and are scrolled.
_STYLE = """
figure svg { background: #fff; border-radius: .3rem; min-width: 38rem; }
@media print { figure svg { min-width: 0; } }
"""

_LONGEST = 40  # the most letters of a name in a picture
_WHEN = ("before", "during", "after")

# For each measure: the field of a profile, its name in the table, and a function that writes it as text.
# The first four fields exist for each module, too.
_MEASURES: list[tuple[str, str, Callable[[Any], str]]] = [
    ("macs", "MACs", "{:,}".format),
    ("parameters", "parameters", "{:,}".format),
    ("peak_bytes", "peak activation memory", readable_bytes),
    ("milliseconds", "ms", "{:.3f}".format),
    ("kept_bytes", "kept for the backward pass", readable_bytes),
    ("training_milliseconds", "ms with the backward pass", "{:.3f}".format),
]

COLUMNS = ("network", "test score", "units per site", "parameters", "MACs", "ms per 1,000 inputs")


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row of text for each network, with a cell for each of the `COLUMNS`.

    Args:
        results: For each run the summary that `train_run` returned.
    """
    return [
        (
            name,
            shown(r["test_score"], r.get("task", "classification")),
            "-".join(str(n) for n in r["units"].values()),
            f"{r['parameters']:,}",
            f"{r['macs']:,}",
            f"{r['ms_per_1000']:.2f}",
        )
        for name, r in results.items()
    ]


def render(
    title: str,
    results: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> str:
    """Return the text of the page.

    Args:
        title: The title.
        results: For each run the summary that `train_run` returned.
        history: The lines of metrics.jsonl, each with its ``run``.
        config: The settings to list.
    """
    runs = list(dict.fromkeys(str(r["run"]) for r in history))
    by_run = {run: [r for r in history if r["run"] == run] for run in runs}
    plastic = {run: h for run, h in by_run.items() if run != "dense"}
    pictures = [
        ("How good the network was at every size",
         "A dot is the validation score after an epoch; the star is the test score at the end.",
         _svg(lambda f: _size(f.subplots(), by_run, results))),
        ("How many units each site had, epoch by epoch",
         "A site is all units of one place, such as the hidden units of a layer.",
         _svg(lambda f: _units(f, plastic))),
        ("How the gates decided",
         "A column is an epoch. Its colours say which share of the gates has which probability of being open. A gate "
         "decides by leaving the middle: at 1 its unit stays, and at 0 it is cut.",
         _svg(lambda f: _histograms(f, plastic))),
        ("How plastic the gates were",
         "The larger k is, the more decided the gates are; at infinity, on top, they no longer change. Dashed is "
         "2π(1-π), the mean probability that a gate would come out otherwise if it were drawn again.",
         _svg(lambda f: _plasticity(f.subplots(), plastic))),
    ]  # fmt: skip
    figures = joined(
        markup(
            '<h2>{}</h2><figure><div class="scroll" tabindex="0">{}</div><figcaption>{}</figcaption></figure>',
            name, svg, caption,
        )
        for name, caption, svg in pictures
    )  # fmt: skip
    profiles = joined(_profiles(run, results.get(run, {}), h) for run, h in by_run.items())
    body = markup(
        "{}{}{}<h2>What the network cost</h2>{}<h2>Settings</h2>{}",
        _lead(results, config), table(COLUMNS, rows(results)), figures, profiles, table((), config.items()),
    )  # fmt: skip
    return page(title, body, _STYLE)


def _lead(results: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Markup:
    """Return what was done and what came out, in a sentence for each network."""
    sentences = joined(
        markup(
            "<li>{} has {} units, {:,} parameters and {:,} multiply-adds for one input, and reaches {} on test data "
            "that it was not trained on.</li>",
            _DONE.get(name, name), "-".join(str(n) for n in r["units"].values()), r["parameters"], r["macs"],
            shown(r["test_score"], r.get("task", "classification")),
        )
        for name, r in results.items()
    )  # fmt: skip
    return markup(
        "<p>The model <b>{}</b> was trained on <b>{}</b>. What came out:</p><ul>{}</ul>",
        config.get("model", "a model"), config.get("data", "data"), sentences,
    )  # fmt: skip


def _profiles(run: str, result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Markup:
    """Return tables of what the network of a run cost before, during and after training, in total and per module.

    Args:
        run: The name of the run.
        result: Its summary.
        history: The records of its epochs.
    """
    ends = result.get("profile", {})
    measured = [r for r in history if "profile" in r]
    plastic = [r for r in measured if r["k"] != "inf"] or measured
    middle = plastic[len(plastic) // 2] if plastic else {}
    profiles = [ends.get("before"), middle.get("profile"), ends.get("after")]
    if not any(profiles):
        return markup("<h3>{}</h3><p>not recorded</p>", run)
    batch, device = next((p["batch"], p["device"]) for p in profiles if p)
    during = f"epoch {middle['epoch']}, with gates, those of closed units included" if middle else "not recorded"
    about = (
        f"Before: the model that was given. During: {during}. After: the compact network. MACs are those of one "
        f"sample, the rest is for a batch of {batch}; time is {TIME[device]}."
    )
    total = [(name, *(_cell(p, key, write) for p in profiles)) for key, name, write in _MEASURES]
    return markup(
        "<h3>{}</h3><p>{}</p>{}<details><summary>per module</summary>{}</details>",
        run, about, table(("", *_WHEN), total), _modules(profiles),
    )  # fmt: skip


def _modules(profiles: Sequence[Mapping[str, Any] | None]) -> Markup:
    """Return a table with a row for each module, and with columns before, during and after for each measure."""
    gated = {row["name"] for p in profiles[:2] if p for row in p["rows"]}

    def known(name: str) -> str:  # in a compact network, fc1 is called fc1.1 where a Take stands before it
        return stem if name not in gated and (stem := name.removesuffix(".1")) in gated else name

    found = [{known(row["name"]): row for row in p["rows"]} if p else None for p in profiles]
    names = dict.fromkeys(name for modules in found if modules for name in modules)
    measures = _MEASURES[:4]
    head = joined(markup('<th colspan="3">{}</th>', name) for _, name, _ in measures)
    body = joined(
        markup(
            "<tr><td>{}</td>{}</tr>",
            name or "(the model)",
            joined(
                markup("<td>{}</td>", _cell(None if m is None else m.get(name, {}), key, write))
                for key, _, write in measures
                for m in found
            ),
        )
        for name in names
    )
    when = joined(markup("<th>{}</th>", w) for w in _WHEN * len(measures))
    return markup("<table><tr><th></th>{}</tr><tr><th></th>{}</tr>{}</table>", head, when, body)


def _cell(profile: Mapping[str, Any] | None, key: str, write: Callable[[Any], str]) -> str:
    """Return a figure as text: a dash where the profile does not have it, as for a module that was removed."""
    if profile is None:
        return "not recorded"
    value = profile.get(key)
    return "-" if value is None else write(value)


def _label(name: str) -> str:
    """Return a name as matplotlib shows it as it is: no formula, in one line, of bounded length, and never hidden."""
    shown = "".join(c if c.isprintable() else " " for c in name)
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]}…{shown[-_LONGEST // 2 + 1 :]}"
    # What begins with an underscore has no place in a legend, unless something is before it.
    return ("\u200b" if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _svg(draw: Any) -> Markup:
    """Return the SVG of a figure that a function draws. Matplotlib escapes what stands in it."""
    figure = Figure(figsize=(9, 4), layout="constrained")  # no figure of pyplot, which would outlive an interrupt
    draw(figure)
    buffer = io.StringIO()
    # The picture has no date, and its ids are fixed, so that equal runs give equal pages.
    with mpl.rc_context({"svg.hashsalt": "plasticnet"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # such letters are shown as boxes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _size(axes: Axes, by_run: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Draw the score against the number of parameters."""
    for run, h in by_run.items():
        x, y = [r["parameters"] for r in h], [100 * r["val_score"] for r in h]
        axes.plot(x, y, ".-", alpha=0.5, lw=0.8, color=_COLOURS.get(run), label=run)
    for run, r in results.items():
        axes.plot(r["parameters"], 100 * r["test_score"], "*", ms=14, color=_COLOURS.get(run), mec="white")
    score = next((r["score"] for r in results.values() if "score" in r), "accuracy")
    axes.set(xscale="log", xlabel="parameters of the open units", ylabel=f"{score}, %")
    axes.legend()


def _units(figure: Figure, plastic: Mapping[str, Any]) -> None:
    """Draw the open units of each site over the epochs."""
    panels = figure.subplots(1, max(len(plastic), 1), squeeze=False)[0]
    for axes, (run, h) in zip(panels, plastic.items(), strict=False):
        for site in h[0]["units"]:
            axes.plot([r["epoch"] for r in h], [r["units"][site] for r in h], label=_label(site))
        axes.set(title=run, xlabel="epoch", ylabel="open units", yscale="log")
        if len(h[0]["units"]) <= 12:
            axes.legend()


def _histograms(figure: Figure, plastic: Mapping[str, Any]) -> None:
    """Draw the distribution of the gate probabilities over the epochs."""
    panels = figure.subplots(1, max(len(plastic), 1), squeeze=False)[0]
    for axes, (run, h) in zip(panels, plastic.items(), strict=False):
        shares = [[n / max(sum(r["histogram"]), 1) for n in r["histogram"]] for r in h]
        columns = [list(c) for c in zip(*shares, strict=True)]
        mesh = axes.imshow(
            columns, origin="lower", aspect="auto", extent=(1, len(h), 0, 1), vmin=0, vmax=1, cmap="magma"
        )
        axes.set(title=run, xlabel="epoch", ylabel="gate probability π")
        figure.colorbar(mesh, ax=axes, label="share of gates")


def _plasticity(axes: Axes, plastic: Mapping[str, Any]) -> None:
    """Draw k and the mean transition probability of the gates over the epochs."""
    finite = [float(r["k"]) for h in plastic.values() for r in h if r["k"] != "inf"]
    top = 1.3 * max(finite, default=1.0)
    other = axes.twinx()
    for run, h in plastic.items():
        x = [r["epoch"] for r in h]
        axes.step(x, [top if r["k"] == "inf" else r["k"] for r in h], color=_COLOURS.get(run), label=f"k, {run}")
        other.plot(x, [r["transition"] for r in h], "--", color=_COLOURS.get(run))
    axes.set(xlabel="epoch", ylabel="k (solid)")
    axes.set_yticks([*sorted(set(finite)), top], [*(f"{k:g}" for k in sorted(set(finite))), "∞"])
    other.set(ylabel="mean 2π(1-π) (dashed)")
    if plastic:
        # The legend is above the picture, where it covers no line.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(plastic), frameon=False)
