"""The command line: train, demo, inspect, report, export."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from plasticnet.apps.data import load_data
from plasticnet.apps.loop import Config, Mode, evaluate, prepare_run, train_run
from plasticnet.apps.models import IMAGE, build_model, example_inputs, factory
from plasticnet.apps.report import COLUMNS, render, rows
from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.files.exporting import export
from plasticnet.files.modules import load, save
from plasticnet.learning.estimators import ESTIMATORS
from plasticnet.measuring.profiling import PROFILE_COLUMNS, profile
from plasticnet.net import PlasticNet
from plasticnet.oneshot.sensitivity import sensitivity as measure_sensitivity
from plasticnet.version import __version__

app = typer.Typer(help="Neural networks that choose their own size while they train.", no_args_is_help=True)


console = Console()


NAMES = "mlp:300-100, lenet5, torchvision:resnet18, timm:resnet18, transformers:bert or PACKAGE:FACTORY"


MODES: dict[str, tuple[Mode, ...]] = {
    "prune": ("prune",),
    "grow": ("grow",),
    "both": ("dense", "prune", "grow"),
    "dense": ("dense",),
}


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
    _run(data, model, MODES[mode], config, data_dir, out, resume)


def _budget(text: str | None) -> Budget | None:
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
    _run("digits", "mlp:256-128", MODES["both"], config, None, out, resume=False)


def _run(
    data_name: str,
    model_name: str,
    modes: tuple[Mode, ...],
    config: Config,
    data_dir: Path | None,
    out: Path,
    resume: bool,
) -> None:
    data = load_data(data_name, data_dir, config.seed)
    make = factory(model_name, data.shape, data.classes)
    for mode in modes:  # what is refused is refused before anything is written
        prepare_run(make(), data, config, mode)
    described = {"data": data_name, "model": model_name, "modes": modes, **asdict(config), **environment()}
    text = json.dumps(described, indent=2) + "\n"
    if resume:
        _check_same(out / "config.json", data_name, model_name)
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(text)
    metrics: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {}
    for mode in modes:
        folder = out / mode
        folder.mkdir(exist_ok=True)
        if not resume:
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        with Live(console=console, refresh_per_second=8) as live:

            def show(record: dict[str, Any], mode: str = mode, live: Live = live) -> None:
                metrics.append({"run": mode, **record})
                _write_metrics(out, metrics)
                live.update(_progress(mode, record, config.epochs))

            torch.manual_seed(config.seed)
            result = train_run(
                make(), data, config, mode, on_epoch=show,
                checkpoint=folder / "checkpoint.safetensors", resume=resume,
            )  # fmt: skip
        if not console.is_terminal:  # there Live ends without a new line
            console.print()
        if not result.summary.get("growth_stopped", True):
            console.print("growth had not stopped by itself when the plastic stage ended; more --epochs would help")
        save(result.compact, folder / "compact.safetensors")
        results[mode] = result.summary
    (out / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    title = f"plasticnet: {model_name} on {data_name}"
    (out / "report.html").write_text(render(title, results, metrics, json.loads(text)))
    console.print(_table(results))
    console.print(f"written to {out}: report.html, metrics.jsonl, summary.json, config.json, */compact.safetensors")


def _check_same(path: Path, data_name: str, model_name: str) -> None:
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlasticError(f"--resume: there is no run in {path.parent}: {error}") from error
    held = f"{before.get('model')} on {before.get('data')}" if isinstance(before, dict) else "something else"
    if held != f"{model_name} on {data_name}":
        raise PlasticError(f"--resume: {path.parent} holds a run of {held}, not of {model_name} on {data_name}")


def _write_metrics(out: Path, metrics: list[dict[str, Any]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))


def _progress(mode: str, record: dict[str, Any], epochs: int) -> Table:
    table = Table("run", "epoch", "loss", "validation", "k", "open units", "parameters", "MACs")
    units = "-".join(str(n) for n in list(record["units"].values())[:8])
    table.add_row(
        mode, f"{record['epoch']}/{epochs}", f"{record['loss']:.4f}", f"{100 * record['val_accuracy']:.2f} %",
        "∞" if record["k"] == "inf" else f"{record['k']:g}", units, f"{record['parameters']:,}", f"{record['macs']:,}",
    )  # fmt: skip
    return table


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    return table


def environment() -> dict[str, Any]:
    """What a result depends on beside its settings."""
    return {
        "plasticnet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


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
    if meta and (measure or sensitivity or weights):
        what = "--profile" if measure else "--sensitivity" if sensitivity else "--weights"
        raise PlasticError(f"{what} runs the network, and with --meta nothing is computed: leave out one of them")
    if sensitivity and data is None:
        raise PlasticError("--sensitivity needs the data that the model reads: --data digits, moons or mnist")
    splits = None if data is None else load_data(data, data_dir)
    shape = None if splits is None else (2, *splits.shape)
    shape = shape if input is None else _shape(input)
    make = factory(model, (shape or IMAGE)[1:], 10 if splits is None else splits.classes, full=full)
    module = build_model(make, meta) if weights is None else load(weights, make)
    examples = example_inputs(model, module, shape)
    net = PlasticNet(
        module, examples, inputs=tuple(inputs or ()), residual=residual, blocks=tuple(blocks or ())
    )  # fmt: skip
    summary = net.summary()
    measured = profile(net, examples) if measure else None
    losses = None
    if sensitivity and splits is not None:
        losses = measure_sensitivity(net, lambda n: evaluate(n, splits.val)[0])
    if json_output:
        found = {**summary.as_dict(), "checked": net.checked}
        if measured is not None:
            found["profile"] = measured.as_dict()
        if losses is not None:
            found["sensitivity"] = {**losses.as_dict(), "weights": str(weights) if weights else "random"}
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(box=SIMPLE)
    table.add_column("site", overflow="fold")
    for column in ("units", "parameters/unit", "MACs/unit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("read by", overflow="fold")
    for row in summary.rows():
        table.add_row(*map(escape, row))
    console.print(table)
    lines = [f"{summary.parameters:,} parameters, {summary.macs:,} multiply-adds for one sample", summary.prunable()]
    if not net.checked:
        lines.append("unchecked: on the meta device masking and cutting cannot be compared")
    for line in [*lines, *(f"frozen {reason}" for reason in summary.reasons(every=show_all))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if measured is not None:
        _print_table(PROFILE_COLUMNS, measured.cells(), measured.total())
    if losses is not None:
        whose = "random weights (--weights names a file)" if weights is None else str(weights)
        line = f"validation loss by the share of a site that is closed; {losses.loss:.4g} with all open; {whose}"
        _print_table(losses.columns(), losses.rows(), line)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], line: str) -> None:
    """A table of names and numbers, and a line below it."""
    table = Table(box=SIMPLE)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, ...]:
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
    try:
        config = json.loads((run / "config.json").read_text())
        results = json.loads((run / "summary.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise PlasticError(f"{run} is not a finished run: {error}") from error
    try:
        title = f"plasticnet: {config['model']} on {config['data']}"
        page = render(title, results, metrics, config)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlasticError(f"{run} is not a finished run: {error!r}") from error
    (run / "report.html").write_text(page)
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
    shape = _shape(input) if input is not None else None
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
