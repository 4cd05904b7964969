"""A classifier of scikit-learn that chooses the widths of its hidden layers itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from sklearn.base import ClassifierMixin
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from plasticnet.sklearn.base import BadParameter, PlasticMLP


class PlasticMLPClassifier(ClassifierMixin, PlasticMLP):
    """A multilayer perceptron for classification that chooses the widths of its hidden layers by itself.

    It begins with a few units in each hidden layer, grows while its newest units lower the loss by more than they cost,
    and is then pruned under the same price (see `plasticnet.Growth`). Widths are chosen in a quarter of the epochs, or
    in more where these have few steps; the others train the network at the widths that were found. Columns are
    normalised inside.

    Args:
        price: What a parameter costs: so many nats of the summed log-likelihood of all rows. A larger price makes a
            smaller network. With 1, a parameter must pay as much as by Akaike's criterion.
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
        early_stopping: Whether some rows are held out. The epochs at the final widths then end when these get no better
            for ``n_iter_no_change`` epochs, and the best network of those epochs is kept.
        validation_fraction: The share of the rows that is held out, with ``early_stopping``.
        n_iter_no_change: How many epochs may bring nothing, with ``early_stopping``.
        class_weight: Weights of the classes: a dict, "balanced", or None.

    Attributes:
        widths_: The numbers of hidden units that were chosen.
        n_params_: The number of parameters.
        noise_: The noise that was added to the normalised inputs while training, as a standard deviation: what helped a
            small network most on rows that it was not trained on, if anything did.
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
        >>> model = PlasticMLPClassifier(random_state=0).fit(x, y)
        >>> len(model.widths_)
        2
        >>> bool(model.score(x, y) > 0.9)
        True
    """

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
            X: The inputs, shape (rows, features); a sparse matrix becomes a dense one.
            y: The labels, shape (rows,).
            sample_weight: What each row counts, shape (rows,); all count the same by default.
        """
        self._check()
        again = self.warm_start and hasattr(self, "module_")
        X, y = self._validated(X, y, reset=not again)
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
            X: The inputs, shape (rows, features); a sparse matrix becomes a dense one.
            y: The labels, shape (rows,).
            classes: All labels that will ever come, which the first call needs if ``y`` lacks some of them.
            sample_weight: What each row counts, shape (rows,).
        """
        self._check()
        first = not hasattr(self, "module_")
        X, y = self._validated(X, y, reset=first)
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
