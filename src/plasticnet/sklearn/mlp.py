"""Estimators of scikit-learn that choose the widths of their hidden layers themselves."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
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
    one_epoch,
    outputs,
    perceptron,
    plain_step,
)


class BadParameter(PlasticError, ValueError):
    """Says that a parameter of an estimator is out of range; scikit-learn expects a `ValueError`."""


class _PlasticMLP(BaseEstimator):
    """What the classifier and the regressor share."""

    def __init__(
        self,
        price: float = 0.05,
        *,
        hidden_layers: int = 2,
        activation: str = "relu",
        batch_size: Any = "auto",
        learning_rate_init: float = 3e-3,
        max_iter: int = 100,
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

        for name in ("hidden_layers", "max_iter", "n_iter_no_change"):
            whole(name, 1)
        if self.batch_size != "auto":
            whole("batch_size", 1)
        for name, most in (("price", math.inf), ("learning_rate_init", math.inf), ("validation_fraction", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) < most or (name != "price" and not value):
                raise BadParameter(f"{name}={value!r}: a number from 0{'' if most == math.inf else ' to 1'}")
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
            self._input = _Scale(x, weight)
        random = check_random_state(self.random_state)
        held_out = np.zeros(len(x), dtype=bool)
        if self.early_stopping:
            _, chosen = train_test_split(
                np.arange(len(x)), test_size=self.validation_fraction, random_state=random, stratify=labels
            )
            held_out[chosen] = True
        scaled = self._input.scaled(x)
        parts = [Rows(*(torch.from_numpy(np.ascontiguousarray(a[part])) for a in (scaled, y, weight.astype(x.dtype))))
                 for part in (~held_out, held_out)]  # fmt: skip
        seed = int(random.randint(np.iinfo(np.int32).max))
        self._order = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (
                copy.deepcopy(self.module_)
                if again
                else perceptron([x.shape[1], *[START] * self.hidden_layers, out], self.activation, parts[0].x.dtype)
            )
            self._run(Fit(model, parts[0], self._how(len(parts[0]))), parts[1])
        self._optimizer = None

    def _how(self, rows: int) -> Training:
        """Return how a network is trained on so many rows."""
        size = batch_size(rows) if self.batch_size == "auto" else int(self.batch_size)
        return Training(self._losses, float(self.price), float(self.learning_rate_init), size, int(self.max_iter))

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
                f"max_iter={self.max_iter} epochs of {len(fit.rows)} rows are too few to choose widths by, which stay",
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
        rows = Rows(
            *(torch.from_numpy(np.ascontiguousarray(a)) for a in (self._input.scaled(x), y, weight.astype(x.dtype)))
        )
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.module_.parameters(), self.learning_rate_init)
        step = partial(plain_step, self._optimizer)
        with torch.enable_grad():
            self.loss_curve_.append(one_epoch(self.module_, step, rows, self._how(len(rows)), self._order))
        self.n_iter_ += 1

    # -- predicting ---------------------------------------------------------------------------

    def _outputs(self, x: Any) -> Tensor:
        """Return what the network makes of inputs, shape (rows, outputs)."""
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=(np.float64, np.float32))
        like = next(self.module_.parameters())
        return outputs(self.module_, torch.from_numpy(self._input.scaled(x)).to(like.dtype))

    _losses: Losses


class _Scale:
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


class PlasticMLPClassifier(ClassifierMixin, _PlasticMLP):
    """A multilayer perceptron for classification that chooses the widths of its hidden layers by itself.

    It begins with a few units in each hidden layer, grows while its newest units lower the loss by more than they cost,
    and is then pruned under the same price (see `plasticnet.Growth`). The last fifth of the epochs trains the network
    at the widths that were found. Columns are normalised inside.

    Args:
        price: What a parameter costs: so many nats of the summed log-likelihood of all rows. A larger price makes a
            smaller network. With 1, a parameter must pay as much as by Akaike's criterion.
        hidden_layers: The number of hidden layers, 1 or more.
        activation: "relu", "gelu" or "tanh".
        batch_size: How many rows a batch has; "auto" takes between 64 and 256.
        learning_rate_init: The learning rate of Adam, which falls to 0 over the last fifth of the epochs.
        max_iter: The number of epochs. About 100 training steps or more are needed to choose widths.
        random_state: A seed, a `RandomState`, or None.
        tol: By how much a held-out loss must fall to count as better, with ``early_stopping``.
        verbose: Whether a line is printed for each epoch.
        warm_start: Whether `fit` goes on from the network that is there, which grows and is pruned again.
        early_stopping: Whether some rows are held out. The epochs at the final widths then end when these get no better
            for ``n_iter_no_change`` epochs, and the best network of those epochs is kept.
        validation_fraction: The share of the rows that is held out, with ``early_stopping``.
        n_iter_no_change: How many epochs may bring nothing, with ``early_stopping``.
        class_weight: Weights of the classes: a dict, "balanced", or None.

    Attributes:
        widths_: The numbers of hidden units that were chosen.
        n_params_: The number of parameters.
        module_: The network, a plain `torch.nn.Sequential` on normalised columns.
        classes_: The labels.
        loss_curve_: The mean loss of each epoch, in nats.
        validation_scores_: The negative held-out losses with ``early_stopping``, else None.
        n_iter_: The number of epochs.
        n_features_in_: The number of columns.

    Raises:
        PlasticError: A parameter is out of range; it is a ``ValueError``, too.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from plasticnet.sklearn import PlasticMLPClassifier
        >>> x, y = load_iris(return_X_y=True)
        >>> model = PlasticMLPClassifier(max_iter=60, random_state=0).fit(x, y)
        >>> len(model.widths_)
        2
        >>> bool(model.score(x, y) > 0.9)
        True
    """

    def __init__(
        self,
        price: float = 0.05,
        *,
        hidden_layers: int = 2,
        activation: str = "relu",
        batch_size: Any = "auto",
        learning_rate_init: float = 3e-3,
        max_iter: int = 100,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        class_weight: Any = None,
    ) -> None:
        super().__init__(
            price, hidden_layers=hidden_layers, activation=activation, batch_size=batch_size,
            learning_rate_init=learning_rate_init, max_iter=max_iter, random_state=random_state, tol=tol,
            verbose=verbose, warm_start=warm_start, early_stopping=early_stopping,
            validation_fraction=validation_fraction, n_iter_no_change=n_iter_no_change,
        )  # fmt: skip
        self.class_weight = class_weight

    def _losses(self, found: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(found, y, reduction="none")

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlasticMLPClassifier:
        """Choose the widths, and train.

        Args:
            X: The inputs, shape (rows, features).
            y: The labels, shape (rows,).
            sample_weight: What each row counts, shape (rows,); all count the same by default.
        """
        self._check()
        again = self.warm_start and hasattr(self, "module_")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=not again)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if again and not np.array_equal(classes, self.classes_):
            raise BadParameter(f"warm_start: the labels were {self.classes_}, and are {classes}; make a new estimator")
        self.classes_ = classes
        weight = self._class_weights(labels, self._weights(sample_weight, len(X)))
        self._train(X, labels, weight, len(classes), labels)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> PlasticMLPClassifier:
        """Train for one more epoch on these rows, at the widths that are there; the first call chooses them, as `fit`.

        Args:
            X: The inputs, shape (rows, features).
            y: The labels, shape (rows,).
            classes: All labels that will ever come, which the first call needs if ``y`` lacks some of them.
            sample_weight: What each row counts, shape (rows,).
        """
        self._check()
        first = not hasattr(self, "module_")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), reset=first)
        check_classification_targets(y)
        if first:
            self.classes_ = np.unique(y if classes is None else classes)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise BadParameter(f"classes={classes!r} is not the same as on the last call, {self.classes_}")
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise BadParameter(f"y has labels that classes= lacks: {unknown}")
        labels = np.searchsorted(self.classes_, y)
        weight = self._class_weights(labels, self._weights(sample_weight, len(X)))
        if first:
            self._train(X, labels, weight, len(self.classes_), labels)
        else:
            self._go_on(X, labels, weight)
        return self

    def _class_weights(self, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the weights of rows, times those of their classes."""
        if self.class_weight is None:
            return weight
        of = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_[labels])
        return weight * of[labels]

    def predict(self, X: Any) -> np.ndarray:
        """Return the most likely label of each row, shape (rows,)."""
        found = self._outputs(X)
        return self.classes_[found.argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the labels, in the order of ``classes_``, shape (rows, labels)."""
        return self._outputs(X).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of the probabilities of the labels, shape (rows, labels)."""
        return self._outputs(X).log_softmax(1).numpy()


class PlasticMLPRegressor(RegressorMixin, _PlasticMLP):
    """A multilayer perceptron for regression that chooses the widths of its hidden layers by itself.

    It works as `PlasticMLPClassifier` does, with the squared error. Targets are normalised inside, so that the price is
    one in units of their variance.

    Args:
        price: What a parameter costs: so many times the variance of the targets, in the summed squared error of all
            rows. A larger price makes a smaller network.
        hidden_layers: The number of hidden layers, 1 or more.
        activation: "relu", "gelu" or "tanh".
        batch_size: How many rows a batch has; "auto" takes between 64 and 256.
        learning_rate_init: The learning rate of Adam, which falls to 0 over the last fifth of the epochs.
        max_iter: The number of epochs. About 100 training steps or more are needed to choose widths.
        random_state: A seed, a `RandomState`, or None.
        tol: By how much a held-out loss must fall to count as better, with ``early_stopping``.
        verbose: Whether a line is printed for each epoch.
        warm_start: Whether `fit` goes on from the network that is there, which grows and is pruned again.
        early_stopping: As in `PlasticMLPClassifier`.
        validation_fraction: The share of the rows that is held out, with ``early_stopping``.
        n_iter_no_change: How many epochs may bring nothing, with ``early_stopping``.

    Attributes:
        widths_: The numbers of hidden units that were chosen.
        n_params_: The number of parameters.
        module_: The network, a plain `torch.nn.Sequential` from normalised columns to normalised targets.
        loss_curve_: The mean loss of each epoch, in units of the variance of the targets.
        validation_scores_: The negative held-out losses with ``early_stopping``, else None.
        n_iter_: The number of epochs.
        n_features_in_: The number of columns.

    Raises:
        PlasticError: A parameter is out of range; it is a ``ValueError``, too.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> from plasticnet.sklearn import PlasticMLPRegressor
        >>> x, y = load_diabetes(return_X_y=True)
        >>> model = PlasticMLPRegressor(max_iter=60, random_state=0).fit(x, y)
        >>> bool(model.score(x, y) > 0.4)
        True
    """

    def _losses(self, found: Tensor, y: Tensor) -> Tensor:
        return (found - y).square().mean(1)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlasticMLPRegressor:
        """Choose the widths, and train.

        Args:
            X: The inputs, shape (rows, features).
            y: The targets, shape (rows,) or (rows, outputs).
            sample_weight: What each row counts, shape (rows,); all count the same by default.
        """
        self._check()
        again = self.warm_start and hasattr(self, "module_")
        X, targets = self._checked(X, y, reset=not again)
        weight = self._weights(sample_weight, len(X))
        if not again:
            self._target = _Scale(targets, weight)
        self._train(X, self._target.scaled(targets).astype(X.dtype), weight, targets.shape[1], None)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlasticMLPRegressor:
        """Train for one more epoch on these rows, at the widths that are there; the first call chooses them, as `fit`.

        Args:
            X: The inputs, shape (rows, features).
            y: The targets, shape (rows,) or (rows, outputs).
            sample_weight: What each row counts, shape (rows,).
        """
        if not hasattr(self, "module_"):
            return self.fit(X, y, sample_weight)
        self._check()
        X, targets = self._checked(X, y, reset=False)
        weight = self._weights(sample_weight, len(X))
        self._go_on(X, self._target.scaled(targets).astype(X.dtype), weight)
        return self

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return checked inputs, and targets of shape (rows, outputs)."""
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), multi_output=True, y_numeric=True, reset=reset)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else np.asarray(y)
        if reset:
            self._flat = y.ndim == 1
        y = y.astype(np.float64)
        return X, y[:, None] if y.ndim == 1 else y

    def predict(self, X: Any) -> np.ndarray:
        """Return the predictions, shape (rows,) or (rows, outputs), as the targets were."""
        scaled = self._outputs(X).numpy()  # first of all it asks whether there is a network
        found = self._target.restored(scaled)
        return found[:, 0] if self._flat else found
