"""A regressor of scikit-learn that chooses the widths of its hidden layers itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from plasticnet.sklearn.base import PlasticMLP, Scale


class PlasticMLPRegressor(RegressorMixin, PlasticMLP):
    """A multilayer perceptron for regression that chooses the widths of its hidden layers by itself.

    It works as `PlasticMLPClassifier` does, with half of the squared error of normalised targets: the negative
    log-likelihood of a normal distribution, but for a constant.

    Args:
        price: What a parameter costs: so many nats, of which one is the squared error of √2 standard deviations of the
            target in one row. A larger price makes a smaller network.
        hidden_layers: The number of hidden layers, 1 or more.
        activation: "relu", "gelu" or "tanh".
        batch_size: How many rows a batch has; "auto" takes between 64 and 256.
        learning_rate_init: The learning rate of Adam at the widths that were found, from where it falls to 0. It is
            three tenths of this while widths are chosen.
        max_iter: The number of epochs. About 100 training steps or more are needed to choose widths. "auto" takes 100
            epochs; more if these have less than 1,000 steps, and fewer, 30 at least, if they have more than 5,000.
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
        noise_: The noise that was added to the normalised inputs while training, as a standard deviation: what helped a
            small network most on rows that it was not trained on, if anything did.
        module_: The network, a plain `torch.nn.Sequential` from normalised columns to normalised targets.
        loss_curve_: The mean loss of each epoch: half of the squared errors of normalised targets.
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
        return (found - y).square().sum(1) / 2

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlasticMLPRegressor:
        """Choose the widths, and train.

        Args:
            X: The inputs, shape (rows, features); a sparse matrix becomes a dense one.
            y: The targets, shape (rows,) or (rows, outputs).
            sample_weight: What each row counts, shape (rows,); all count the same by default.
        """
        self._check()
        again = self.warm_start and hasattr(self, "module_")
        X, targets = self._checked(X, y, reset=not again)
        weight = self._weights(sample_weight, len(X))
        if not again:
            self._target = Scale(targets, weight)
        self._train(X, self._target.scaled(targets).astype(X.dtype), weight, targets.shape[1], None)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlasticMLPRegressor:
        """Train for one more epoch on these rows, at the widths that are there; the first call chooses them, as `fit`.

        Args:
            X: The inputs, shape (rows, features); a sparse matrix becomes a dense one.
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
        X, y = self._validated(X, y, reset=reset, multi_output=True, y_numeric=True)
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
