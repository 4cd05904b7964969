"""Declares the commands train, demo, inspect, report and export, and says what their options mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from plasticnet.apps.console import console, print_line
from plasticnet.apps.inspecting import inspect_model, print_inspection
from plasticnet.apps.models import IMAGE, example_inputs, factory
from plasticnet.apps.own_data import KNOWN, Reading
from plasticnet.apps.runs import compare_runs, holds_demo, rewrite_report, train_modes
from plasticnet.apps.settings import MODES, Config
from plasticnet.apps.shrinking import LOSSES, Options, shrink_model
from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.files.exporting import export
from plasticnet.files.modules import load
from plasticnet.learning.estimators import ESTIMATORS

NAMES = "mlp:300-100, lenet5, torchvision:resnet18, timm:resnet18, transformers:bert or PACKAGE:FACTORY"
OVERWRITE = "Replace the run that --out holds. Only files of a run are removed, when everything else was accepted."

app = typer.Typer(help="Neural networks that choose their own size while they train.", no_args_is_help=True)


@app.command("train")
def train_command(
    data: Annotated[str, typer.Option(help="The data set: digits, moons or mnist.")] = "digits",
    model: Annotated[str, typer.Option(help=f"The model: {NAMES}.")] = "mlp:256-128",
    mode: Annotated[
        str, typer.Option(help="What to train: prune, grow, dense, or both, which trains all three.")
    ] = "both",
    epochs: Annotated[int, typer.Option(help="The number of epochs of each run.")] = 150,
    k: Annotated[float, typer.Option(help="The plasticity k of the gates in the middle stage.")] = 7.0,
    k_end: Annotated[float | None, typer.Option(help="The k at the end of the middle stage, if it is to rise.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The most that the network may cost, as in macs=0.3,params=5000. It takes the place of --penalty."
        ),
    ] = None,
    penalty: Annotated[float, typer.Option(help="The strength of the pressure on the cost.")] = 0.05,
    cost: Annotated[str, typer.Option(help="The cost that is penalised: units, parameters or macs.")] = "parameters",
    scale: Annotated[
        str,
        typer.Option(
            help="The scale of the penalty: linear, or log, which keeps the pressure relative to what is left."
        ),
    ] = "log",
    estimator: Annotated[
        str, typer.Option(help=f"The estimator of the gradient of the gates: {', '.join(ESTIMATORS)}.")
    ] = "bitflip-cv",
    gates: Annotated[
        str, typer.Option(help="How gates are drawn: sample (once per sample), batch (once per batch), or auto.")
    ] = "auto",
    inputs: Annotated[
        list[str] | None, typer.Option(help="A name pattern of layers whose input features get gates.")
    ] = None,
    start: Annotated[int, typer.Option(help="The number of units per site from which growth starts.")] = 3,
    batch: Annotated[int, typer.Option(help="The batch size.")] = 32,
    lr: Annotated[float, typer.Option(help="The learning rate of the weights (Adam).")] = 3e-3,
    gate_lr: Annotated[float, typer.Option(help="The learning rate of the gates (Adam).")] = 5e-2,
    seed: Annotated[int, typer.Option(help="The seed of the weights, the draws, the batches and the data split.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="The folder that holds MNIST/raw.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted run in --out, with the options with which it began.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Train a network that prunes itself, one that grows, a dense one, or all three for comparison."""
    choices: dict[str, Any] = {"cost": cost, "scale": scale, "gates": gates}
    config = Config(
        epochs=epochs, k=k, k_end=k_end, budget=_budget(budget), penalty=penalty, estimator=estimator,
        inputs=tuple(inputs or ()), start=start, batch=batch, lr=lr, gate_lr=gate_lr, seed=seed, **choices,
    )  # fmt: skip
    if mode not in MODES:
        raise PlasticError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    train_modes(data, model, MODES[mode], config, out, data_dir=data_dir, resume=resume, overwrite=overwrite)


def _budget(text: str | None, *, latency: bool = False) -> Budget | None:
    """Return the budget that the text of --budget describes; with a time among its targets only where that is said."""
    if text is None:
        return None
    try:
        targets = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
        budget = Budget(**targets)
    except (ValueError, TypeError):
        raise PlasticError(f"--budget {text}: write targets as in macs=0.3,params=5000; or loss=0.02") from None
    if budget.latency_ms is not None and not latency:
        raise PlasticError("--budget latency_ms: latency is measured in Python, by net.measure_latency(...)")
    return budget


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Prune a network that is too wide, and grow one that is too narrow, on handwritten digits.

    The digits come with scikit-learn, so that nothing is downloaded. The results of a demo before are replaced; another
    run in --out is refused without --overwrite.
    """
    config = Config(epochs=100, k=7.0, penalty=2e-5, cost="parameters", batch=32, lr=3e-3, gate_lr=1e-1)
    torch.set_num_threads(1)  # on networks of this size threads mostly wait for each other
    run = "digits", "mlp:256-128", MODES["both"], config
    train_modes(*run, out, overwrite=overwrite or holds_demo(out, *run), command="demo")


@app.command("shrink")
def shrink_command(
    model: Annotated[str, typer.Argument(help=f"The trained model: {NAMES}.")],
    data: Annotated[str, typer.Option(help=f"The data: {KNOWN}.")],
    budget: Annotated[str, typer.Option(help="The most that it may cost, as in macs=0.5,params=5000, or loss=0.02.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="The state dict of the model: a .safetensors file, or one that torch.save wrote."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often the data are trained on after the cut.")] = 0,
    loss: Annotated[
        str, typer.Option(help=f"What is trained on: {', '.join(LOSSES)}. To imitate the model takes no labels.")
    ] = "imitate",
    batch: Annotated[int, typer.Option(help="The batch size.")] = 64,
    target: Annotated[str | None, typer.Option(help="The column of a table that is to be predicted.")] = None,
    image_size: Annotated[int | None, typer.Option(help="The height and width that images are brought to.")] = None,
    mean: Annotated[float, typer.Option(help="What is subtracted from pixels between 0 and 1.")] = 0.0,
    std: Annotated[float, typer.Option(help="What they are then divided by.")] = 1.0,
    calibrate: Annotated[int, typer.Option(help="How many inputs are read to score units and repair layers.")] = 2048,
    exclude: Annotated[list[str] | None, typer.Option(help="A name pattern of sites to leave alone.")] = None,
    residual: Annotated[bool, typer.Option(help="Cut also what LayerNorm and RMSNorm normalise.")] = False,
    blocks: Annotated[
        list[str] | None, typer.Option(help="A name pattern of modules that may be removed as a whole.")
    ] = None,
    multiple_of: Annotated[int, typer.Option(help="What widths are multiples of.")] = 1,
    classes: Annotated[int | None, typer.Option(help="The number of outputs of an mlp.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of all draws.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="The folder that holds MNIST/raw.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for compact.safetensors and report.json.")] = Path(
        "runs/shrink"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds of these files.")] = False,
) -> None:
    """Make a trained model smaller in one go, without labels unless they are asked for."""
    if (out / "compact.safetensors").exists() and not overwrite:
        raise PlasticError(f"--out {out} holds a compact.safetensors: give another folder, or --overwrite")
    asked = _budget(budget, latency=True)
    assert asked is not None
    options = Options(
        epochs, loss, calibrate, tuple(exclude or ()), residual, tuple(blocks or ()), multiple_of, classes, seed
    )
    how = Reading(batch, target, image_size, mean, std, data_dir)
    if weights is None and model.partition(":")[0] in ("mlp", "lenet5", "torchvision", "timm", "transformers"):
        print_line(f"the weights of {model} are random: --weights names those of a trained model")
    report = shrink_model(model, data, how, asked, weights, out, options)
    print_line(str(report))
    print_line(f"written {out / 'compact.safetensors'}; load it with plasticnet.load and the factory of the model")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help=f"The model: {NAMES}.")],
    input: Annotated[str | None, typer.Option(help="The shape of the input, batch first, as in 1,3,224,224.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option(help="A name pattern of layers whose input features get gates.")
    ] = None,
    residual: Annotated[bool, typer.Option(help="Gate also what LayerNorm and RMSNorm normalise.")] = False,
    blocks: Annotated[
        list[str] | None, typer.Option(help="A name pattern of modules that are units as a whole.")
    ] = None,
    full: Annotated[bool, typer.Option(help="Build a transformers model in its own size, not a tiny one.")] = False,
    meta: Annotated[
        bool, typer.Option(help="Use no memory and compute nothing, for large models; sites are then not checked.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Name everything that is frozen.")] = False,
    measure: Annotated[bool, typer.Option("--profile", help="Run the model, and measure memory and time.")] = False,
    sensitivity: Annotated[
        bool, typer.Option(help="Measure on the validation data how much each site can lose; this needs --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="The data set that the model reads: digits, moons or mnist.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The folder that holds MNIST/raw.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A compact.safetensors of this model. Without it the weights are random.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List what can be gated, what a unit costs and what reads it, and what is frozen and why."""
    found = inspect_model(
        model, _shape(input), inputs=inputs or (), residual=residual, blocks=blocks or (), full=full, meta=meta,
        data=data, data_dir=data_dir, weights=weights, with_profile=measure, with_sensitivity=sensitivity,
    )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_inspection(found, every_name=show_all)


def _shape(text: str | None) -> tuple[int, ...] | None:
    """Return the shape that the text of --input gives."""
    if text is None:
        return None
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise PlasticError(f"--input {text}: write the shape as 1,3,224,224")
    return shape


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that train or demo wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page that compares the runs, such as page.html.")] = None,
) -> None:
    """Write the report.html of a finished run again; or, with --out, a page that compares several."""
    if out is not None:
        compare_runs(runs, out)
    elif len(runs) == 1:
        rewrite_report(runs[0])
    else:
        raise PlasticError(f"to compare {len(runs)} runs, name the page: --out page.html")
    print_line(f"written {out or runs[0] / 'report.html'}")


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="The compact.safetensors of a run.")],
    model: Annotated[str, typer.Option(help=f"The original model: {NAMES}.")],
    out: Annotated[Path, typer.Option(help="The file to write, with the suffix .onnx or .pt2.")],
    input: Annotated[str | None, typer.Option(help="The shape of the input, batch first, as in 1,3,224,224.")] = None,
    classes: Annotated[int, typer.Option(help="The number of outputs of an mlp.")] = 10,
) -> None:
    """Turn a saved network into an ONNX file or a torch.export program, and check that it computes the same."""
    shape = _shape(input)
    small = load(file, factory(model, (shape or IMAGE)[1:], classes))
    written = export(small, out, example_inputs(model, small, shape))
    batch = "any batch size" if written.dynamic_batch else "the batch size of --input only"
    console.print(
        f"written {out} ({batch}; differs from the module by {written.error:.1e} at most, relatively)", soft_wrap=True
    )


def main() -> None:
    """Run the command line. A `PlasticError` is shown as a line of text, and the exit status is then 2."""
    sys.path.insert(0, str(Path.cwd()))  # so that PACKAGE:FACTORY is found here, as it is with python -m
    try:
        app()
    except PlasticError as error:
        print(f"plasticnet: {error}", file=sys.stderr)
        sys.exit(2)
