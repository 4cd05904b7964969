"""Declares the commands shrink, inspect, report and export, and gathers all others."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from plasticnet.apps.cli_train import demo_command, predict_command, train_command
from plasticnet.apps.console import accept_any_letter, console, finish_output, print_line
from plasticnet.apps.inspecting import inspect_model, print_inspection
from plasticnet.apps.loading import example_of
from plasticnet.apps.models import IMAGE, example_inputs, factory, reads_numbers
from plasticnet.apps.options import (
    DATA,
    MODELS,
    Channels,
    DataDir,
    Experts,
    HeadDims,
    Ignore,
    ImageSize,
    Mean,
    Std,
    Target,
    Task,
    budget_of,
    reading_of,
    shape_of,
)
from plasticnet.apps.runs import compare_runs, rewrite_report
from plasticnet.apps.shrinking import LOSSES, Options, shrink_model
from plasticnet.errors import PlasticError
from plasticnet.files.exporting import export
from plasticnet.files.modules import load

app = typer.Typer(help="Neural networks that choose their own size while they train.", no_args_is_help=True)


app.command("train")(train_command)
app.command("demo")(demo_command)
app.command("predict")(predict_command)


@app.command("shrink")
def shrink_command(
    model: Annotated[str, typer.Argument(help=f"The trained model: {MODELS}.")],
    data: Annotated[str, typer.Option(help=DATA)],
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
    target: Target = None,
    ignore: Ignore = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    mean: Mean = 0.0,
    std: Std = 1.0,
    like: Annotated[
        Path | None, typer.Option(help="The folder of a run of train, to prepare a table as it did.")
    ] = None,
    calibrate: Annotated[int, typer.Option(help="How many inputs are read to score units and repair layers.")] = 2048,
    exclude: Annotated[list[str] | None, typer.Option(help="A name pattern of sites to leave alone.")] = None,
    residual: Annotated[bool, typer.Option(help="Cut also what LayerNorm and RMSNorm normalise.")] = False,
    blocks: Annotated[
        list[str] | None, typer.Option(help="A name pattern of modules that may be removed as a whole.")
    ] = None,
    head_dims: HeadDims = None,
    experts: Experts = None,
    multiple_of: Annotated[int, typer.Option(help="What widths are multiples of.")] = 1,
    classes: Annotated[int | None, typer.Option(help="The number of outputs of the model.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of all draws.")] = 0,
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="The folder for compact.safetensors and report.json.")] = Path(
        "runs/shrink"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds of these files.")] = False,
) -> None:
    """Make a trained model smaller in one go, without labels unless they are asked for."""
    if (out / "compact.safetensors").exists() and not overwrite:
        raise PlasticError(f"--out {out} holds a compact.safetensors: give another folder, or --overwrite")
    asked = budget_of(budget, latency=True)
    assert asked is not None
    options = Options(
        batch, epochs, loss, calibrate, tuple(exclude or ()), residual, tuple(blocks or ()), multiple_of, classes, seed,
        like, tuple(head_dims or ()), tuple(experts or ()),
    )  # fmt: skip
    how = reading_of(target, None, ignore, image_size, channels, mean, std, data_dir)
    if weights is None:
        random = model.partition(":")[0] in ("mlp", "lenet5", "torchvision", "timm", "transformers")
        what = "random" if random else "as it makes them, and random if it does not load any"
        print_line(f"the weights of {model} are {what}: --weights names those of a trained model")
    report = shrink_model(model, data, how, asked, weights, out, options)
    print_line(str(report))
    print_line(f"written {out / 'compact.safetensors'}; load it with plasticnet.load and the factory of the model")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help=f"The model: {MODELS}.")],
    input: Annotated[str | None, typer.Option(help="The shape of the input, batch first, as in 1,3,224,224.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option(help="A name pattern of layers whose input features get gates.")
    ] = None,
    residual: Annotated[bool, typer.Option(help="Gate also what LayerNorm and RMSNorm normalise.")] = False,
    blocks: Annotated[
        list[str] | None, typer.Option(help="A name pattern of modules that are units as a whole.")
    ] = None,
    head_dims: HeadDims = None,
    experts: Experts = None,
    full: Annotated[bool, typer.Option(help="Build a transformers model in its own size, not a tiny one.")] = False,
    meta: Annotated[
        bool, typer.Option(help="Use no memory and compute nothing, for large models; sites are then not checked.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Name everything that is frozen.")] = False,
    measure: Annotated[bool, typer.Option("--profile", help="Run the model, and measure memory and time.")] = False,
    sensitivity: Annotated[
        bool, typer.Option(help="Measure on the validation data how much each site can lose; this needs --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    target: Target = None,
    task: Task = None,
    ignore: Ignore = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    mean: Mean = 0.0,
    std: Std = 1.0,
    data_dir: DataDir = None,
    weights: Annotated[
        Path | None, typer.Option(help="A compact.safetensors of this model. Without it the weights are random.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List what can be gated, what a unit costs and what reads it, and what is frozen and why."""
    how = reading_of(target, task, ignore, image_size, channels, mean, std, data_dir)
    found = inspect_model(
        model, shape_of(input), inputs=inputs or (), residual=residual, blocks=blocks or (),
        head_dims=head_dims or (), experts=experts or (), full=full, meta=meta, data=data, how=how, weights=weights,
        with_profile=measure, with_sensitivity=sensitivity,
    )  # fmt: skip
    if json_output:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_inspection(found, every_name=show_all)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that train wrote.")],
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
    model: Annotated[str, typer.Option(help=f"The original model: {MODELS}.")],
    out: Annotated[Path, typer.Option(help="The file to write, with the suffix .onnx or .pt2.")],
    input: Annotated[str | None, typer.Option(help="The shape of the input, batch first, as in 1,3,224,224.")] = None,
    classes: Annotated[int | None, typer.Option(help="The number of outputs of the model.")] = None,
    data: Annotated[str | None, typer.Option(help=f"In the place of --input and --classes: {DATA[4:]}")] = None,
    target: Target = None,
    task: Task = None,
    ignore: Ignore = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    mean: Mean = 0.0,
    std: Std = 1.0,
    data_dir: DataDir = None,
) -> None:
    """Turn a saved network into an ONNX file or a torch.export program, and check that it computes the same."""
    shape, examples = shape_of(input), None
    if data is not None:
        if input is not None or classes is not None:
            raise PlasticError("--data gives the shape and the classes: leave out --input and --classes")
        x, classes = example_of(data, reading_of(target, task, ignore, image_size, channels, mean, std, data_dir))
        shape, examples = tuple(x.shape), (x.float() if reads_numbers(model) else x,)
    small = load(file, factory(model, (shape or IMAGE)[1:], classes))
    written = export(small, out, examples or example_inputs(model, small, shape))
    batch = "any batch size" if written.dynamic_batch else "the batch size of --input only"
    console.print(
        f"written {out} ({batch}; differs from the module by {written.error:.1e} at most, relatively)", soft_wrap=True
    )


def main() -> None:
    """Run the command line. What is wrong is shown as a line of text, and the exit status is then 2.

    Where nobody reads the output to its end, as in a pipe to head, the command ends quietly, with exit status 1.
    """
    sys.path.insert(0, str(Path.cwd()))  # so that PACKAGE:FACTORY is found here, as it is with python -m
    accept_any_letter()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            try:
                app()
            finally:
                finish_output()
        except PlasticError as error:
            _give_up(str(error))
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            what = error.strerror or str(error)
            _give_up(what if error.filename is None else f"{error.filename}: {what}")


def _give_up(what: str) -> NoReturn:
    """Say what is wrong, and end the program."""
    with suppress(OSError):  # nobody reads it
        print(f"plasticnet: {what}", file=sys.stderr)
    sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning as one line, without the place in the code, which says nothing to whoever calls a command."""
    print(f"plasticnet: warning: {message}", file=sys.stderr)
