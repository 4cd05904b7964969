"""Writes the page of the demo for a reader who knows nothing of it: what was done, what came out, and pictures."""

from __future__ import annotations

from torch import Tensor

from plasticnet.apps.data import Data
from plasticnet.apps.demo_jobs import PRICE, SHARE, Grown, Shrunk
from plasticnet.apps.drawing import STYLE, Line, bars, curves, key
from plasticnet.apps.page import Markup, joined, markup, page, table

TITLE = "plasticnet: two networks that found their own size"
STEPS = ("whole", "cut", "cut and repaired")
COLUMNS = ("network", "hidden units", "parameters", "multiply-adds", "right on the test")
_SHOWN = 9  # test digits on the page
_BEFORE, _CUT, _AFTER = 2, 0, 1  # the numbers of colours
_LAYERS = ("first hidden layer", "second hidden layer")

_STYLE = f"""{STYLE}
.lead {{ font-size: 1.15rem; }} figcaption {{ color: var(--ink); font-weight: 600; margin-bottom: .4rem; }}
.digits {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }}
.digits figure {{ margin: 0; }} .digits svg {{ width: 100%; background: none; border: 1px solid var(--line); }}
.digits figcaption {{ font-weight: 400; font-size: .85rem; line-height: 1.35; }}
pre {{ overflow-x: auto; font-size: .85rem; padding: .8rem; border: 1px solid var(--line); border-radius: .3rem; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .6rem; }}
"""


def rows(shrunk: Shrunk, grown: Grown) -> list[tuple[str, ...]]:
    """Return a row of text for each network, with a cell for each of the `COLUMNS`."""
    before, after = _widths(shrunk)
    widths = (before, after, after)
    found = [
        (name, units, f"{step.parameters:,}", f"{step.macs:,.0f}", f"{accuracy:.1%}")
        for name, units, step, accuracy in zip(STEPS, widths, shrunk.report.steps, shrunk.accuracies, strict=True)
    ]
    end = grown.widths[-1]
    return [*found, ("grown", _joined(end), f"{grown.parameters[-1]:,}", f"{grown.macs:,.0f}", f"{grown.accuracy:.1%}")]


def said(shrunk: Shrunk, grown: Grown) -> tuple[str, str]:
    """Return what was done and what came out, in a few sentences for each job."""
    whole, cut, repaired = shrunk.accuracies
    before, after = _widths(shrunk)
    first = (
        f"A trained network that reads handwritten digits was cut to {SHARE:.0%} of its multiply-adds at once, without "
        f"a label and without any training: from {before} to {after} units in its two hidden layers. It reads "
        f"{repaired:.1%} of the test digits correctly; the whole network reads {whole:.1%}. Without the repair after "
        f"the cut it would be {cut:.1%}."
    )
    start, end = grown.widths[0], grown.widths[-1]
    most, last = max(grown.parameters), grown.parameters[-1]
    never = "more parameters than at its end"
    if most > last:
        never = f"more than {most:,}, which is {grown.peak:.2f} times the number at its end"
    second = (
        f"Another network grew by itself, from {_joined(start)} units to {_joined(end)}, and stopped by itself. It "
        f"reads {grown.accuracy:.1%} of the test digits correctly, with {last:,} parameters where the wide network has "
        f"{shrunk.report.steps[0].parameters:,}. It needed no detour through a large network: on the way it never had "
        f"{never}."
    )
    return first, second


def render(shrunk: Shrunk, grown: Grown, data: Data, code: str) -> str:
    """Return the text of the page.

    Args:
        shrunk: What came of the first job.
        grown: What came of the second job.
        data: The digits.
        code: The lines of Python that load both networks.
    """
    first, second = said(shrunk, grown)
    names = [f"{name} units in the {layer}" for layer, name in zip(_LAYERS, map(str, grown.widths[-1]), strict=True)]
    body = markup(
        '<p class="lead">{}</p><p class="lead">{}</p>'
        "<h2>A trained network, made smaller</h2>{}"
        "<h2>A small network that grew</h2>{}{}"
        "<h2>What the networks were shown, and what they answer</h2>{}"
        "<h2>The numbers</h2>{}"
        "<h2>Use the two networks</h2><pre>{}</pre>"
        "<h2>What the words mean</h2>{}",
        first, second, _shrinking(shrunk), key(names), _growing(grown), _digits(shrunk, grown, data),
        table(COLUMNS, rows(shrunk, grown)), code, _words(data),
    )  # fmt: skip
    return page(TITLE, body, _STYLE)


def _shrinking(shrunk: Shrunk) -> Markup:
    """Return the pictures of the first job."""
    steps, sites = shrunk.report.steps, shrunk.report.sites
    right = [(name, a, f"{a:.1%}") for name, a in zip(STEPS, shrunk.accuracies, strict=True)]
    work = [(name, steps[i].macs, f"{steps[i].macs:,.0f}") for name, i in (("whole", 0), ("small", -1))]
    left = [
        (f"{layer}, {when}", n, f"{n}")
        for layer, site in zip(_LAYERS, sites, strict=True)
        for when, n in (("before", site.before), ("after", site.after))
    ]
    pictures = [
        bars("Test digits that are read correctly", right, 1, [_BEFORE, _CUT, _AFTER]),
        bars("Multiply-adds to read one digit", work, steps[0].macs, [_BEFORE, _AFTER]),
        bars("Units in each hidden layer", left, max(site.before for site in sites), [_BEFORE, _AFTER] * len(sites)),
    ]
    return markup(
        '<div class="pictures">{}</div><p>The cut closes the units that the others can replace best. '
        "The repair then refits the weights that read the remaining units, by least squares, so that each layer "
        "computes nearly what it did before. Both took {:.1f} seconds.</p>",
        joined(pictures), sum(step.seconds for step in steps[1:]),
    )  # fmt: skip


def _growing(grown: Grown) -> Markup:
    """Return the pictures of the second job."""
    units = [Line(name, list(enumerate(w[i] for w in grown.widths))) for i, name in enumerate(_LAYERS)]
    parameters = [Line("parameters", list(enumerate(grown.parameters)))]
    pictures = [
        curves("Units in each hidden layer, epoch by epoch", units),
        curves("Parameters, epoch by epoch; the dashed line is where it ends", parameters, level=grown.parameters[-1]),
    ]
    return markup(
        '<div class="pictures">{}</div><p>After every epoch the newest units were asked by how much '
        "the network would be worse without them. As long as that was more than their parameters cost, others came; "
        "units that turned out to be worth nothing left again.</p>",
        joined(pictures),
    )


def _digits(shrunk: Shrunk, grown: Grown, data: Data) -> Markup:
    """Return pictures of the first test digits, with the answers of three networks below each."""
    x, y = data.test.x[:_SHOWN], data.test.y[:_SHOWN].tolist()
    networks = {"wide": shrunk.whole, "small": shrunk.small, "grown": grown.network}
    answers = {name: network.eval()(x).argmax(1).tolist() for name, network in networks.items()}
    figures = joined(
        markup(
            "<figure>{}<figcaption>{}</figcaption></figure>",
            _digit(image[0], label),
            joined(
                markup("{}{}: {}", markup("<br>") if place else "", name, _answer(a[i], label))
                for place, (name, a) in enumerate(answers.items())
            ),
        )
        for i, (image, label) in enumerate(zip(x, y, strict=True))
    )
    return markup(
        '<p>The first {} of the {} test digits:</p><div class="digits">{}</div>', _SHOWN, len(data.test), figures
    )


def _answer(answer: int, label: int) -> Markup:
    """Return an answer, and whether it is wrong."""
    return markup("{}" if answer == label else "<b>{}, wrong</b>", answer)


def _digit(image: Tensor, label: int) -> Markup:
    """Return the picture of an image of shape (rows, columns), with values from -1 to 1."""
    square = '<path d="M{} {}h1.02v1.02h-1.02z" fill="var(--ink)" fill-opacity="{:.2f}"/>'
    squares = joined(
        markup(square, c, r, (value + 1) / 2)
        for r, line in enumerate(image.tolist())
        for c, value in enumerate(line)
        if value > -1
    )
    height, width = image.shape
    frame = '<svg viewBox="0 0 {} {}" role="img" aria-label="a handwritten {}">{}</svg>'
    return markup(frame, width, height, label, squares)


def _words(data: Data) -> Markup:
    """Return what the page's words mean."""
    meanings = {
        "unit": "A neuron of a hidden layer. Without it the layers before and after it have fewer weights.",
        "parameter": "A number that is learned.",
        "multiply-add": "A multiplication and an addition: what it takes to use one weight once.",
        "epoch": f"One pass through all {len(data.train):,} digits for training.",
        "price": "What growth compares the newest units with. A parameter is worth its place if it adds "
        f"{PRICE:g} to the log-likelihood of all training digits together, in nats.",
        "test digits": f"{len(data.test)} digits that no network was trained on, and by which nothing was chosen.",
    }
    return markup("<dl>{}</dl>", joined(markup("<dt>{}</dt><dd>{}</dd>", *pair) for pair in meanings.items()))


def _widths(shrunk: Shrunk) -> tuple[str, str]:
    """Return the widths before and after."""
    sites = shrunk.report.sites
    return _joined([site.before for site in sites]), _joined([site.after for site in sites])


def _joined(widths: tuple[int, ...] | list[int]) -> str:
    """Return widths as text, as in 256-128."""
    return "-".join(map(str, widths))
