"""Finds out what the command inspect says about a model, and prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plasticnet.apps.console import print_line, print_table
from plasticnet.apps.loading import example_of, load_any
from plasticnet.apps.models import IMAGE, build_model, example_inputs, factory
from plasticnet.apps.own_data import Reading
from plasticnet.apps.scores import evaluate
from plasticnet.errors import PlasticError
from plasticnet.files.modules import load
from plasticnet.measuring.profiling import PROFILE_COLUMNS, Profile, profile
from plasticnet.measuring.summary import Summary
from plasticnet.net import PlasticNet
from plasticnet.oneshot.sensitivity import Sensitivity, sensitivity

_SITE_COLUMNS = ("site", "units", "parameters/unit", "MACs/unit", "read by")


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        summary: The sites, their costs, and what is frozen.
        checked: Whether masking was compared with cutting.
        profile: The measured memory and time, or None if they were not asked for.
        sensitivity: How much each site can lose, or None if that was not asked for.
        weights: The file that the weights came from, or None where they are random.
    """

    summary: Summary
    checked: bool
    profile: Profile | None
    sensitivity: Sensitivity | None
    weights: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        found = {**self.summary.as_dict(), "checked": self.checked}
        if self.profile is not None:
            found["profile"] = self.profile.as_dict()
        if self.sensitivity is not None:
            found["sensitivity"] = {**self.sensitivity.as_dict(), "weights": str(self.weights or "random")}
        return found


def inspect_model(
    name: str,
    shape: Sequence[int] | None = None,
    *,
    inputs: Sequence[str] = (),
    residual: bool = False,
    blocks: Sequence[str] = (),
    head_dims: Sequence[str] = (),
    experts: Sequence[str] = (),
    full: bool = False,
    meta: bool = False,
    data: str | None = None,
    how: Reading | None = None,
    weights: Path | None = None,
    with_profile: bool = False,
    with_sensitivity: bool = False,
) -> Inspection:
    """Gate the model of this name, and measure what was asked for.

    Args:
        name: A name of `factory`.
        shape: The shape of the input, batch first; by default that of the data, or one that suits the model.
        inputs: An option of `PlasticNet`.
        residual: An option of `PlasticNet`.
        blocks: An option of `PlasticNet`.
        head_dims: An option of `PlasticNet`.
        experts: An option of `PlasticNet`.
        full: Whether a transformers model has its own size, and not a tiny one.
        meta: Whether the model is built on the meta device, where nothing is computed.
        data: Where the data lie that the model reads.
        how: How they are read, or None where there is nothing to say.
        weights: The file of a compact module of this model, whose weights it gets.
        with_profile: Whether to measure memory and time.
        with_sensitivity: Whether to measure how much each site can lose, on the validation data of ``data``.

    Raises:
        PlasticError: The network would have to run on the meta device; the sensitivity is asked for without data; or
            the model, its weights, the shape or the data set do not fit or do not exist.
    """
    if meta and (with_profile or with_sensitivity or weights):
        what = "--profile" if with_profile else "--sensitivity" if with_sensitivity else "--weights"
        raise PlasticError(f"{what} runs the network, and with --meta nothing is computed: leave out one of them")
    if with_sensitivity and data is None:
        raise PlasticError("--sensitivity needs the data that the model reads: --data digits, my.csv, ...")
    how = how or Reading()
    splits = load_any(data, how) if with_sensitivity and data is not None else None
    given, outputs = (None, None) if data is None else example_of(data, how)
    if shape is None and given is not None:
        shape = (2, *given.shape[1:])
    make = factory(name, (shape or IMAGE)[1:], outputs, full=full)
    module = build_model(make, meta) if weights is None else load(weights, make)
    examples = example_inputs(name, module, shape)
    net = PlasticNet(
        module, examples, inputs=tuple(inputs), residual=residual, blocks=tuple(blocks), head_dims=tuple(head_dims),
        experts=tuple(experts),
    )  # fmt: skip
    return Inspection(
        net.summary(),
        net.checked,
        profile(net, examples) if with_profile else None,
        None if splits is None else sensitivity(net, lambda n: evaluate(n, splits.val, splits.task).loss),
        weights,
    )


def print_inspection(found: Inspection, every_name: bool = False) -> None:
    """Print the sites, what is frozen, and what was measured.

    Args:
        found: What `inspect_model` returned.
        every_name: Whether to print every name that is frozen, and not just the first ones for each reason.
    """
    summary = found.summary
    print_table(_SITE_COLUMNS, summary.rows(), words=(0, len(_SITE_COLUMNS) - 1))
    print_line(f"{summary.parameters:,} parameters, {summary.macs:,} multiply-adds for one sample")
    print_line(summary.prunable())
    if not found.checked:
        print_line("unchecked: on the meta device masking and cutting cannot be compared")
    for reason in summary.reasons(every=every_name):
        print_line(f"frozen {reason}")
    if found.profile is not None:
        print_table(PROFILE_COLUMNS, found.profile.cells())
        print_line(found.profile.total())
    losses = found.sensitivity
    if losses is not None:
        print_table(losses.columns(), losses.rows())
        whose = "random weights (--weights names a file)" if found.weights is None else str(found.weights)
        print_line(f"validation loss by the share of a site that is closed; {losses.loss:.4g} with all open; {whose}")
