"""The estimators of plasticnet.sklearn beside scikit-learn's own MLPs, whose widths a cross-validated grid chooses.

The grid has twelve choices of hidden widths and five folds; columns are normalised. It is searched with all settings of
the MLPs as they are by default, and once more with early stopping on held-out rows. Ours choose their widths in one
fit, with the settings they have by default. Five seeds divide the rows: two thirds to fit, and one third to test. It
takes an hour and a half on one core: python experiments/sklearn_grid.py --data-dir DIR. DIR holds the folder tabular.
Adds rows to results/sklearn_grid.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import known, write, written
from growth_tasks import adult, housing
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from plasticnet.sklearn import PlasticMLPClassifier, PlasticMLPRegressor

NAME = "sklearn_grid"
GRID = [(16,), (32,), (64,), (128,), (256,), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64), (128, 64), (256, 128)]
FOLDS, SEEDS = 5, 5
Arrays = tuple[np.ndarray, np.ndarray]


def arrays(parts: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> Arrays:
    """All rows of a task together."""
    return tuple(torch.cat([part[i] for part in parts]).numpy() for i in range(2))


def data(name: str, folder: Path) -> Arrays:
    """Inputs and targets."""
    if name == "digits":
        return load_digits(return_X_y=True)
    return arrays(adult(folder) if name == "adult" else housing(folder))


def grid(name: str, seed: int, early: bool) -> Any:
    """The search over widths, of MLPs that stop early or do not."""
    kind = MLPRegressor if name == "housing" else MLPClassifier
    model = make_pipeline(StandardScaler(), kind(early_stopping=early, random_state=seed))
    return GridSearchCV(model, {f"{kind.__name__.lower()}__hidden_layer_sizes": GRID}, cv=FOLDS)


def ours(name: str, seed: int) -> Any:
    """The estimator that chooses widths by itself."""
    return (PlasticMLPRegressor if name == "housing" else PlasticMLPClassifier)(random_state=seed)


def size(found: Any) -> tuple[list[int], int]:
    """The hidden widths and the number of parameters."""
    if hasattr(found, "widths_"):
        return list(found.widths_), found.n_params_
    mlp = found.best_estimator_[-1]
    widths = [len(b) for b in mlp.intercepts_[:-1]]
    return widths, sum(a.size for a in (*mlp.coefs_, *mlp.intercepts_))


WAYS: dict[str, Callable[[str, int], Any]] = {
    "plasticnet": ours,
    "grid of 12": partial(grid, early=False),
    "grid of 12, early stopping": partial(grid, early=True),
}


def divided(name: str, seed: int, rows: Arrays) -> list[np.ndarray]:
    """Inputs to fit and to test on, and targets to fit and to test on."""
    return train_test_split(*rows, test_size=1 / 3, random_state=seed, stratify=None if name == "housing" else rows[1])


def run(name: str, way: str, seed: int, rows: Arrays) -> dict[str, Any]:
    """Fit, and score on the rows that were not fitted: accuracy, or R²."""
    x, x_test, y, y_test = divided(name, seed, rows)
    model = WAYS[way](name, seed)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    seconds = time.process_time() - begun
    widths, parameters = size(model)
    return {"score": float(model.score(x_test, y_test)), "widths": widths, "parameters": parameters, "seconds": seconds}


def measure(
    results: str,
    text: str,
    settings: dict[str, Any],
    ways: Iterable[str],
    run: Callable[[str, str, int, Arrays], dict[str, Any]],
) -> None:
    """Run what is not there yet, all ways in turn.

    Args:
        results: The name of the results.
        text: What --help says.
        settings: The settings that all rows share.
        ways: The names of the ways.
        run: Makes a row from the names of a task and of a way, the seed, and the rows of the task.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "housing", "adult"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for name in options.tasks:
            rows = data(name, options.data_dir)
            for way in ways:
                if not known(results, task=name, way=way, seed=seed):
                    row = {"task": name, "way": way, "seed": seed, **run(name, way, seed, rows)}
                    write(results, settings, [*written(results), row])
                    print(row, flush=True)


if __name__ == "__main__":
    measure(NAME, __doc__, {"grid": GRID, "folds": FOLDS}, WAYS, run)
