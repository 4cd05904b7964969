"""Widths chosen by an Optuna search, beside the estimators of plasticnet.sklearn, which choose them in one fit.

The search has 40 trials of two hidden widths from 4 to 256 and of the noise on the inputs, scored on a fifth of the
rows that are fitted, with the sampler and the median pruner that Optuna has by default. A trial is trained as the
estimators train once their widths are known: the same batches, number of epochs, optimizer and learning rate, which
falls to 0 along a cosine. The best trial is then trained on all rows. Five seeds divide the rows as in sklearn_grid.py.

Twenty minutes on one core: python experiments/width_search.py --data-dir DIR. Adds rows to results/width_search.json;
what is there is not run again. Optuna is needed (the extra peers).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from sklearn_grid import Arrays, divided, measure
from sklearn_grid import run as fitted
from torch import Tensor, nn

from plasticnet.apps.models import MLP
from plasticnet.sklearn import PlasticMLPClassifier
from plasticnet.sklearn.fitting import batch_size, number_of_epochs

NAME, OURS, TRIALS = "width_search", "plasticnet", 40
NARROWEST, WIDEST = 4, 256
NOISES, RATE = (0.0, 0.1, 0.2, 0.4), PlasticMLPClassifier().learning_rate_init
Rows = tuple[Tensor, Tensor]


def train(widths: list[int], noise: float, rows: Rows, classes: bool, seed: int, after: Any = None) -> nn.Module:
    """A network of these widths, trained on normalised rows; ``after`` is called with it and the epoch."""
    torch.manual_seed(seed)
    x, y = rows
    outputs = int(y.max()) + 1 if classes else 1
    network = MLP([x.shape[1], *widths, outputs])
    batch = batch_size(len(x))
    epochs = number_of_epochs(len(x), batch)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        network.train()
        for i in torch.randperm(len(x)).split(batch):
            output = network(x[i] + noise * torch.randn_like(x[i]))
            loss = F.cross_entropy(output, y[i]) if classes else F.mse_loss(output[:, 0], y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if after is not None and epoch % 10 == 9:
            after(network, epoch)
    return network.eval()


@torch.no_grad()
def score(network: nn.Module, rows: Rows, classes: bool) -> float:
    """The share of right answers, or R²."""
    network.eval()
    output, y = network(rows[0]), rows[1]
    if classes:
        return float(output.argmax(1).eq(y).float().mean())
    return 1 - float((output[:, 0] - y).square().mean() / y.var(correction=0))


def searched(rows: Rows, classes: bool, seed: int) -> tuple[nn.Module, list[int], float]:
    """The network that the search ends with, its widths, and the noise."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
    middle = len(order) // 5
    held_out, fitted = ((rows[0][i], rows[1][i]) for i in (order[:middle], order[middle:]))

    def chosen(trial: Any) -> tuple[list[int], float]:
        widths = [trial.suggest_int(f"width{i}", NARROWEST, WIDEST, log=True) for i in range(2)]
        return widths, trial.suggest_categorical("noise", NOISES)

    def objective(trial: Any) -> float:
        def after(network: nn.Module, epoch: int) -> None:
            trial.report(score(network, held_out, classes), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        return score(train(*chosen(trial), fitted, classes, seed, after), held_out, classes)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=TRIALS)
    widths, noise = chosen(optuna.trial.FixedTrial(study.best_params))
    return train(widths, noise, rows, classes, seed), widths, noise


def run(name: str, way: str, seed: int, arrays: Arrays) -> dict[str, Any]:
    """Fit in one way, and score on the rows that were not fitted: accuracy, or R²."""
    if way == OURS:
        return fitted(name, way, seed, arrays)
    classes = name != "housing"
    x, x_test, y, y_test = divided(name, seed, arrays)
    begun = time.process_time()
    columns = StandardScaler().fit(x)
    middle, deviation = (0.0, 1.0) if classes else (float(y.mean()), float(y.std()))

    def tensors(x: Any, y: Any) -> Rows:
        targets = torch.as_tensor(y) if classes else (torch.as_tensor(y).float() - middle) / deviation
        return torch.as_tensor(columns.transform(x)).float(), targets

    network, widths, noise = searched(tensors(x, y), classes, seed)
    seconds = time.process_time() - begun
    row = {"score": score(network, tensors(x_test, y_test), classes), "widths": widths, "noise": noise}
    return {**row, "parameters": sum(p.numel() for p in network.parameters()), "seconds": seconds}


if __name__ == "__main__":
    SETTINGS = {"trials": TRIALS, "widths": [NARROWEST, WIDEST], "noises": NOISES, "rate": RATE}
    measure(NAME, __doc__, SETTINGS, (OURS, "Optuna"), run)
