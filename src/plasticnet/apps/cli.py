"""The command line: its commands, train, demo, inspect, report and export, and what their options mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from plasticnet.apps.console import console
from plasticnet.apps.inspecting import inspect_model, print_inspection
from plasticnet.apps.loop import Config, Mode
from plasticnet.apps.models import IMAGE, example_inputs, factory
from plasticnet.apps.runs import rewrite_report, train_modes
from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.files.exporting import export
from plasticnet.files.modules import load
from plasticnet.learning.estimators import ESTIMATORS

NAMES = "mlp:300-100, lenet5, torchvision:resnet18, timm:resnet18, transformers:bert or PACKAGE:FACTORY"
MODES: dict[str, tuple[Mode, ...]] = {
    "prune": ("prune",),
    "grow": ("grow",),
    "both": ("dense", "prune", "grow"),
    "dense": ("dense",),
}

app = typer.Typer(help="Neural networks that choose their own size while they train.", no_args_is_help=True)


@app.command("train")
def train_command(
    data: Annotated[str, typer.Option(help="digits, moons or mnist")] = "digits",
    model: Annotated[str, typer.Option(help=NAMES)] = "mlp:256-128",
    mode: Annotated[str, typer.Option(help="prune, grow, dense, or both (all three)")] = "both",
    epochs: Annotated[int, typer.Option(help="epochs of each run")] = 150,
    k: Annotated[float, typer.Option(help="plasticity of the middle stage")] = 7.0,
    k_end: Annotated[float | None, typer.Option(help="k at the end of the middle stage, if it is to rise")] = None,
    budget: Annotated[str | None, typer.Option(help="what it may cost, as macs=0.3,params=5000; for --penalty")] = None,
    penalty: Annotated[float, typer.Option(help="strength of the pressure on the cost")] = 0.05,
    cost: Annotated[str, typer.Option(help="units, parameters or macs")] = "parameters",
    scale: Annotated[str, typer.Option(help="linear, or log: pressure relative to what is left")] = "log",
    estimator: Annotated[
        str, typer.Option(help="how the gradient of the gates is estimated: " + ", ".join(ESTIMATORS))
    ] = "bitflip-cv",
    gates: Annotated[str, typer.Option(help="draw per sample, per batch, or auto")] = "auto",
    inputs: Annotated[list[str] | None, typer.Option(help="name pattern of layers whose inputs are gated")] = None,
    start: Annotated[int, typer.Option(help="units per site that growing starts from")] = 3,
    batch: Annotated[int, typer.Option(help="batch size")] = 32,
    lr: Annotated[float, typer.Option(help="learning rate of the weights (Adam)")] = 3e-3,
    gate_lr: Annotated[float, typer.Option(help="learning rate of the gates (Adam)")] = 5e-2,
    seed: Annotated[int, typer.Option(help="seed of weights, draws, batches and split")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="where MNIST lies")] = None,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="go on with an interrupted run in --out")] = False,
) -> None:
    """Train a network that prunes itself, grows, or both beside a dense one."""
    choices: dict[str, Any] = {"cost": cost, "scale": scale, "gates": gates}
    config = Config(
        epochs=epochs, k=k, k_end=k_end, budget=_budget(budget), penalty=penalty, estimator=estimator,
        inputs=tuple(inputs or ()), start=start, batch=batch, lr=lr, gate_lr=gate_lr, seed=seed, **choices,
    )  # fmt: skip
    if mode not in MODES:
        raise PlasticError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    train_modes(data, model, MODES[mode], config, out, data_dir=data_dir, resume=resume)


def _budget(text: str | None) -> Budget | None:
    """The targets that --budget gives."""
    if text is None:
        return None
    try:
        targets = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
        budget = Budget(**targets)
    except (ValueError, TypeError):
        raise PlasticError(f"--budget {text}: write targets as in macs=0.3,params=5000; or loss=0.02") from None
    if budget.latency_ms is not None:
        raise PlasticError("--budget latency_ms: latency is measured in Python, by net.measure_latency(...)")
    return budget


@app.command("demo")
def demo_command(out: Annotated[Path, typer.Option(help="folder for the results")] = Path("runs/demo")) -> None:
    """On embedded handwritten digits: prune a too wide network, grow a too narrow one."""
    config = Config(epochs=150, k=7.0, penalty=0.05, cost="parameters", scale="log", batch=32, lr=3e-3, gate_lr=5e-2)
    torch.set_num_threads(1)  # threads on networks of this size wait for each other, and long on a busy machine
    train_modes("digits", "mlp:256-128", MODES["both"], config, out)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help=NAMES)],
    input: Annotated[str | None, typer.Option(help="shape of the input, batch first: 1,3,224,224")] = None,
    inputs: Annotated[list[str] | None, typer.Option(help="name pattern of layers whose inputs are gated")] = None,
    residual: Annotated[bool, typer.Option(help="gate what LayerNorm and RMSNorm normalise, too")] = False,
    blocks: Annotated[list[str] | None, typer.Option(help="name pattern of modules that are units as a whole")] = None,
    full: Annotated[bool, typer.Option(help="a transformers model in its own size, not a tiny one")] = False,
    meta: Annotated[bool, typer.Option(help="without memory or arithmetic, for large models: unchecked")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="name everything that is frozen")] = False,
    measure: Annotated[bool, typer.Option("--profile", help="run it, and measure memory and time")] = False,
    sensitivity: Annotated[bool, typer.Option(help="how much each site can lose, on the validation data")] = False,
    data: Annotated[str | None, typer.Option(help="digits, moons or mnist: what the model reads")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where MNIST lies")] = None,
    weights: Annotated[Path | None, typer.Option(help="a compact.safetensors of this model; else random")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """What can be gated, what a unit costs and who reads it; and what is frozen, with the reason."""
    found = inspect_model(
        model, _shape(input), inputs=inputs or (), residual=residual, blocks=blocks or (), full=full, meta=meta,
        data=data, data_dir=data_dir, weights=weights, with_profile=measure, with_sensitivity=sensitivity,
    )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_inspection(found, every_name=show_all)


def _shape(text: str | None) -> tuple[int, ...] | None:
    """The shape that --input gives."""
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
def report_command(run: Annotated[Path, typer.Argument(help="folder that train wrote")]) -> None:
    """Write report.html of a run anew."""
    rewrite_report(run)
    console.print(f"written {run / 'report.html'}")


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="compact.safetensors")],
    model: Annotated[str, typer.Option(help=f"the original model: {NAMES}")],
    out: Annotated[Path, typer.Option(help="an .onnx or .pt2 file")],
    input: Annotated[str | None, typer.Option(help="shape of the input, batch first")] = None,
    classes: Annotated[int, typer.Option(help="outputs of an mlp")] = 10,
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
    """Run the command line; an error of ours is one line, not a traceback."""
    sys.path.insert(0, str(Path.cwd()))  # for PACKAGE:FACTORY, as with python -m
    try:
        app()
    except PlasticError as error:
        print(f"plasticnet: {error}", file=sys.stderr)
        sys.exit(2)
