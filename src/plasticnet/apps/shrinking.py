"""Does what the command shrink asks for: reads a model and data, shrinks the model, and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plasticnet.apps.bounds import check_count, check_seed
from plasticnet.apps.folder import make_folder, write_text
from plasticnet.apps.loading import read_batches
from plasticnet.apps.models import IMAGE, factory
from plasticnet.apps.own_data import Reading
from plasticnet.apps.prepared import read_prepared
from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.files.modules import save
from plasticnet.files.weights import load_weights
from plasticnet.shrinking.given import Loss
from plasticnet.shrinking.report import Report
from plasticnet.shrinking.shrink import shrink
from plasticnet.tools.batches import rows
from plasticnet.tools.outputs import classes_of

LOSSES = ("imitate", "cross-entropy", "squared")


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        batch: The batch size.
        epochs: How often the data are trained on.
        loss: One of `LOSSES`.
        calibrate: How many inputs are read for scores and repair.
        exclude: An option of `shrink`.
        residual: An option of `shrink`.
        blocks: An option of `shrink`.
        multiple_of: An option of `shrink`.
        classes: The number of outputs; an mlp has by default that of the labels, and others have their own.
        seed: The seed of random weights and draws.
        like: The folder of a run of train, whose preparation of a table is used; without it columns are numbers, and
            stay as they are.
        head_dims: An option of `shrink`.
        experts: An option of `shrink`.

    Raises:
        PlasticError: A number is out of range.
    """

    batch: int = 64
    epochs: int = 0
    loss: str = "imitate"
    calibrate: int = 2048
    exclude: Sequence[str] = ()
    residual: bool = False
    blocks: Sequence[str] = ()
    multiple_of: int = 1
    classes: int | None = None
    seed: int = 0
    like: Path | None = None
    head_dims: Sequence[str] = ()
    experts: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_seed(f"--seed {self.seed}", self.seed)
        for option, value in (("--batch", self.batch), ("--calibrate", self.calibrate), ("--classes", self.classes)):
            if value is not None:
                check_count(f"{option} {value}", value)


def shrink_model(
    name: str, source: str, how: Reading, budget: Budget, weights: Path | None, out: Path, options: Options
) -> Report:
    """Shrink the model of a name, and write it into a folder, with the report beside it.

    Args:
        name: A name of `factory`.
        source: Where the data are.
        how: How they are read.
        budget: What the small network may cost.
        weights: A file with the state dict of the model; without it, what the factory builds is used as it is.
        out: The folder, in which ``compact.safetensors`` and ``report.json`` appear.
        options: The other options.

    Raises:
        PlasticError: The model, its weights, the data or an option do not exist or do not fit.
    """
    if options.loss not in LOSSES:
        raise PlasticError(f"--loss {options.loss}: choose one of {', '.join(LOSSES)}")
    torch.manual_seed(options.seed)
    like = None if options.like is None else read_prepared(options.like, "--like")
    known = (None, None) if like is None else (like.table, like.target)
    batches = read_batches(source, how, options.batch, *known)
    shape, classes = _shapes(batches)
    if like is not None:
        classes = like.outputs
    own = name.partition(":")[0] in ("mlp", "lenet5") or like is not None
    model = factory(name, shape, options.classes or (classes if own else None))()
    if weights is not None:
        load_weights(model, weights)
    small, report = shrink(
        model, batches, budget, epochs=options.epochs, loss=_loss(options.loss), calibrate=options.calibrate,
        exclude=tuple(options.exclude), residual=options.residual, blocks=tuple(options.blocks),
        head_dims=tuple(options.head_dims), experts=tuple(options.experts), multiple_of=options.multiple_of,
    )  # fmt: skip
    make_folder(out)
    save(small, out / "compact.safetensors")
    write_text(out / "report.json", json.dumps(report.as_dict(), indent=1) + "\n")
    return report


def _shapes(batches: Iterable[Any]) -> tuple[Sequence[int], int]:
    """Return the shape of one input and the number of classes, as far as the batches say."""
    shape, classes = IMAGE[1:], 1
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        x, y = batch if pair else (batch, None)
        if isinstance(x, Tensor):
            shape = tuple(x.shape[1:])
        if isinstance(y, Tensor) and not y.is_floating_point() and len(y) == rows(x):
            classes = max(classes, int(y.max()) + 1)
    return shape, classes


def _loss(name: str) -> Loss | None:
    """Return the loss of a name, which reads the labels that come second in a batch."""
    if name == "imitate":
        return None

    def labels_of(batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
            raise PlasticError(f"--loss {name}: the data have no labels; leave it at imitate, or give --target")
        return batch[1]

    def cross_entropy(output: Any, batch: Any) -> Tensor:
        logits = classes_of(output)
        if logits is None:
            raise PlasticError("--loss cross-entropy: the model returns no logits of shape (batch, classes)")
        return F.cross_entropy(logits, labels_of(batch).long(), reduction="none")

    def squared(output: Any, batch: Any) -> Tensor:
        wanted = labels_of(batch).to(output)
        return (output.reshape(wanted.shape) - wanted).square().flatten(1 if wanted.dim() > 1 else 0)

    return cross_entropy if name == "cross-entropy" else squared
