"""What the estimators share: parameters, normalised columns, training, and the network that predicts."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.sklearn.fitting import (
    ACTIVATIONS,
    START,
    Fit,
    Losses,
    Rows,
    Training,
    batch_size,
    number_of_epochs,
    one_epoch,
    outputs,
    perceptron,
    plain_step,
)
from plasticnet.sklearn.noise import chosen_noise


class BadParameter(PlasticError, ValueError):
    """Says that a parameter of an estimator is out of range; scikit-learn expects a `ValueError`."""


class PlasticMLP(BaseEstimator):
    """What the classifier and the regressor share."""

    def __init__(
        self,
        price: float = 0.02,
        *,
        hidden_layers: int = 2,
        activation: str = "relu",
        batch_size: Any = "auto",
        learning_rate_init: float = 1e-2,
        max_iter: Any = "auto",
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
    ) -> None:
        self.price = price
        self.hidden_layers = hidden_layers
        self.activation = activation
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    # -- training -----------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise `BadParameter` where a parameter is out of range."""

        def whole(name: str, least: int) -> None:
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise BadParameter(f"{name}={value!r}: a whole number, {least} or more")

        for name in ("hidden_layers", "n_iter_no_change"):
            whole(name, 1)
        for name in ("batch_size", "max_iter"):
            if getattr(self, name) != "auto":
                whole(name, 1)
        for name, most in (("price", math.inf), ("learning_rate_init", math.inf), ("validation_fraction", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < most or (name != "price" and not value):
                bound = "" if most == math.inf else ", and less than 1"
                least = "at least 0" if name == "price" else "above 0"
                raise BadParameter(f"{name}={value!r}: it must be a finite number, {least}{bound}")
        if self.activation not in ACTIVATIONS:
            raise BadParameter(f"activation={self.activation!r}: one of {', '.join(ACTIVATIONS)}")

    def _weights(self, sample_weight: Any, rows: int) -> np.ndarray:
        """Return the weights of the rows, ones if there are none."""
        if sample_weight is None:
            return np.ones(rows)
        weight = np.asarray(sample_weight, dtype=np.float64)
        if weight.shape != (rows,):
            raise BadParameter(
                f"sample_weight has shape {weight.shape}; there are {rows} rows, so that it is ({rows},)"
            )
        if not np.isfinite(weight).all() or (weight < 0).any():
            raise BadParameter("sample_weight: finite numbers, 0 or more; some are negative, infinite or NaN")
        if not weight.any():
            raise BadParameter("sample_weight: all weights are zero, so that there is nothing to train on")
        return weight

    def _train(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray, out: int, labels: np.ndarray | None) -> None:
        """Choose the widths and train, from the network that is there under ``warm_start``.

        Args:
            x: The inputs, shape (rows, features).
            y: The targets as the losses take them, shape (rows,) or (rows, outputs).
            weight: What each row counts.
            out: The number of outputs.
            labels: The class of each row, by which held-out rows are drawn, or None.
        """
        again = self.warm_start and hasattr(self, "module_")
        if not again:
            self._input = Scale(x, weight)
        random = check_random_state(self.random_state)
        held_out = np.zeros(len(x), dtype=bool)
        if self.early_stopping:
            _, chosen = train_test_split(
                np.arange(len(x)), test_size=self.validation_fraction, random_state=random, stratify=labels
            )
            held_out[chosen] = True
        scaled = self._input.scaled(x)
        parts = [_rows(scaled[part], y[part], weight[part]) for part in (~held_out, held_out)]
        seed = int(random.randint(np.iinfo(np.int32).max))
        self._order = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (
                copy.deepcopy(self.module_)
                if again
                else perceptron([x.shape[1], *[START] * self.hidden_layers, out], self.activation, parts[0].x.dtype)
            )
            how = self._how(len(parts[0]))
            if not again:
                self.noise_ = chosen_noise(parts[0], how, self.activation, self.hidden_layers, out, self._order)
            self._run(Fit(model, parts[0], replace(how, noise=self.noise_)), parts[1])
        self._optimizer = None

    def _how(self, rows: int) -> Training:
        """Return how a network is trained on so many rows."""
        size = batch_size(rows) if self.batch_size == "auto" else int(self.batch_size)
        epochs = number_of_epochs(rows, size) if self.max_iter == "auto" else int(self.max_iter)
        return Training(self._losses, float(self.price), float(self.learning_rate_init), size, epochs)

    def _run(self, fit: Fit, held_out: Rows) -> None:
        """Train to the end, or until held-out rows get no better, and note what came of it."""
        self.loss_curve_, self.validation_scores_, since = [], ([] if self.early_stopping else None), 0
        best: tuple[float, nn.Module] | None = None
        for loss in fit.epochs(self._order):
            self.loss_curve_.append(loss)
            if self.verbose:
                widths = "-".join(str(len(site)) for site in fit.net.sites.values())
                print(f"Iteration {len(self.loss_curve_)}, loss = {loss:.8f}, hidden units {widths}")
            if self.validation_scores_ is not None and math.isinf(fit.net.k):
                small = fit.net.compact()
                error = float(self._losses(outputs(small, held_out.x), held_out.y).mul(held_out.weight).sum())
                self.validation_scores_.append(-error / float(held_out.weight.sum()))
                better = best is None or -self.validation_scores_[-1] < best[0] - self.tol
                since = 0 if better else since + 1
                if best is None or -self.validation_scores_[-1] < best[0]:
                    best = -self.validation_scores_[-1], small
                if since >= self.n_iter_no_change:
                    break
        if fit.schedule.growth is None:
            warnings.warn(
                f"max_iter={fit.how.epochs} epochs of {len(fit.rows)} rows are too few to choose widths by, which stay",
                ConvergenceWarning,
                stacklevel=4,
            )
        self._take(fit.net.compact() if best is None else best[1])
        self.n_iter_ = len(self.loss_curve_)

    def _take(self, module: nn.Module) -> None:
        """Take a network as the one that predicts."""
        self.module_ = module
        layers = [layer for layer in module if isinstance(layer, nn.Linear)]  # pyright: ignore[reportGeneralTypeIssues]
        self.widths_ = [layer.out_features for layer in layers[:-1]]
        self.n_params_ = sum(p.numel() for p in module.parameters())

    def _go_on(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Train for one more epoch at the widths that are there."""
        rows = _rows(self._input.scaled(x), y, weight)
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.module_.parameters(), self._how(len(rows)).plastic_rate)
        step = partial(plain_step, self._optimizer)
        with torch.enable_grad():
            how = replace(self._how(len(rows)), noise=self.noise_)
            self.loss_curve_.append(one_epoch(self.module_, step, rows, how, self._order))
        self.n_iter_ += 1

    def _validated(self, x: Any, *y: Any, reset: bool, **how: Any) -> Any:
        """Return checked inputs as an array, and checked targets beside them if there are any.

        A sparse matrix becomes a dense one, since a column of zeros and ones is dense once it is normalised.
        """
        kinds = (np.float64, np.float32)
        found: Any = validate_data(self, x, *y, accept_sparse=True, dtype=kinds, reset=reset, **how)
        if y:
            return found[0].toarray() if issparse(found[0]) else found[0], found[1]
        return found.toarray() if issparse(found) else found

    # -- predicting ---------------------------------------------------------------------------

    def _outputs(self, x: Any) -> Tensor:
        """Return what the network makes of inputs, shape (rows, outputs)."""
        check_is_fitted(self)
        x = self._validated(x, reset=False)
        like = next(self.module_.parameters())
        return outputs(self.module_, torch.from_numpy(self._input.scaled(x)).to(like.dtype))

    def __sklearn_tags__(self) -> Tags:
        """Say that sparse matrices are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    _losses: Losses


class Scale:
    """The weighted mean and standard deviation of columns, by which they are normalised."""

    def __init__(self, x: np.ndarray, weight: np.ndarray) -> None:
        self.mean = np.average(x, axis=0, weights=weight)
        deviation = np.sqrt(np.average((x - self.mean) ** 2, axis=0, weights=weight))
        self.deviation = np.where(deviation > 1e-12 * np.maximum(np.abs(self.mean), 1.0), deviation, 1.0)

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Return columns normalised, in their own precision."""
        return ((x - self.mean) / self.deviation).astype(x.dtype)

    def restored(self, x: np.ndarray) -> np.ndarray:
        """Return what normalised columns were before."""
        return x * self.deviation + self.mean


def _rows(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Rows:
    """Return arrays as tensors, the weights in the precision of the inputs."""
    return Rows(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, y, weight.astype(x.dtype))))
