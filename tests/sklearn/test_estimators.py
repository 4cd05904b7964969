"""The estimators: scikit-learn's own checks, the widths they choose, pipelines, searches, and files."""

from __future__ import annotations

import io
import pickle
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine, make_classification, make_moons, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from plasticnet import PlasticError
from plasticnet.sklearn import PlasticMLPClassifier, PlasticMLPRegressor

ESTIMATORS = [PlasticMLPClassifier, PlasticMLPRegressor]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the checks fit on data of every kind
@parametrize_with_checks([PlasticMLPClassifier(), PlasticMLPRegressor()])
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    """Only those checks that ask for accuracy get all epochs; the others would need as long to say the same."""
    learns = check.func.__name__.endswith("_train")
    check(estimator if learns else clone(estimator).set_params(max_iter=12))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_inputs_give_what_dense_ones_give(estimator: Any) -> None:
    """Such as those of a OneHotEncoder."""
    x, y = make_classification(60, 5, random_state=0)
    x[x < 0] = 0
    plain = estimator(random_state=0, max_iter=9).fit(x, y)
    sparse = estimator(random_state=0, max_iter=9).fit(csr_matrix(x), y)
    assert sparse.widths_ == plain.widths_
    np.testing.assert_array_equal(sparse.predict(csr_matrix(x)), plain.predict(x))
    sparse.partial_fit(csr_matrix(x), y)
    plain.partial_fit(x, y)
    np.testing.assert_array_equal(sparse.predict(x), plain.predict(x))


def moons() -> tuple[np.ndarray, np.ndarray]:
    return make_moons(400, noise=0.1, random_state=0)


def test_it_finds_widths_that_solve_the_task() -> None:
    x, y = moons()
    model = PlasticMLPClassifier(random_state=0).fit(x, y)
    assert model.score(x, y) > 0.95
    assert len(model.widths_) == 2
    assert all(3 < width < 60 for width in model.widths_)
    shapes = [tuple(p.shape) for p in model.module_.parameters()]
    assert shapes[0] == (model.widths_[0], 2)
    assert model.n_params_ == sum(int(np.prod(shape)) for shape in shapes)
    assert len(model.loss_curve_) == model.n_iter_ == 142  # 1,000 steps, seven in an epoch


def test_a_higher_price_makes_a_smaller_network() -> None:
    x, y = moons()
    sizes = [PlasticMLPClassifier(price, random_state=0).fit(x, y).n_params_ for price in (0.005, 0.05, 0.5)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_same_seed_gives_the_same_and_leaves_random_numbers_alone(kind: Any) -> None:
    x, y = moons()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (kind(random_state=3, max_iter=30).fit(x, y).predict(x) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("through", ["pickle", "joblib"])
def test_what_is_stored_predicts_the_same(kind: Any, through: str) -> None:
    x, y = moons()
    model = kind(random_state=0, max_iter=30).fit(x, y)
    stream = io.BytesIO()
    (pickle.dump if through == "pickle" else joblib.dump)(model, stream)
    stream.seek(0)
    again = (pickle.load if through == "pickle" else joblib.load)(stream)
    assert np.array_equal(model.predict(x), again.predict(x))
    again.partial_fit(x, y)


def test_pipelines_and_grid_search() -> None:
    x, y = moons()
    pipeline = make_pipeline(StandardScaler(), PlasticMLPClassifier(random_state=0, max_iter=30))
    search = GridSearchCV(pipeline, {"plasticmlpclassifier__price": [0.02, 0.2]}, cv=2).fit(x, y)
    assert search.best_params_["plasticmlpclassifier__price"] in (0.02, 0.2)


def test_warm_start_goes_on_from_the_network_that_is_there() -> None:
    x, y = moons()
    model = PlasticMLPClassifier(random_state=0, max_iter=30, warm_start=True).fit(x, y)
    loss = model.loss_curve_[0]
    model.fit(x, y)
    assert model.loss_curve_[0] < loss / 2
    with pytest.raises(PlasticError, match="make a new estimator"):
        model.fit(x, y + 1)


def test_partial_fit_keeps_the_widths() -> None:
    x, y = moons()
    model = PlasticMLPClassifier(random_state=0, max_iter=30)
    model.partial_fit(x[:200], y[:200], classes=[0, 1])
    widths, loss = model.widths_, model.loss_curve_[-1]
    for _ in range(30):
        model.partial_fit(x, y)
    assert model.widths_ == widths
    assert model.loss_curve_[-1] < loss
    assert model.n_iter_ == 60
    with pytest.raises(PlasticError, match=r"labels that classes= lacks: \[7\]"):
        model.partial_fit(x, np.where(y == 1, 7, y))


def test_early_stopping_ends_the_last_epochs_and_keeps_the_best() -> None:
    x, y = make_classification(300, 10, random_state=0, flip_y=0.3)
    options: dict[str, Any] = {"random_state": 0, "max_iter": 60, "tol": 10.0, "n_iter_no_change": 2}
    model = PlasticMLPClassifier(early_stopping=True, **options).fit(x, y)
    assert model.validation_scores_ is not None
    # The first of the last twelve epochs is the best by definition, and no other is better by ten nats.
    assert len(model.validation_scores_) == 3
    assert model.n_iter_ == 60 - 12 + 3


def test_weights_of_rows_and_classes_count() -> None:
    x, y = make_classification(300, 5, weights=[0.9], random_state=0, flip_y=0.1)
    options: dict[str, Any] = {"random_state": 0, "max_iter": 30}
    plain = PlasticMLPClassifier(**options).fit(x, y)
    for balanced in (
        PlasticMLPClassifier(class_weight="balanced", **options).fit(x, y),
        PlasticMLPClassifier(**options).fit(x, y, sample_weight=np.where(y == 1, 9.0, 1.0)),
    ):
        assert balanced.predict(x).sum() > plain.predict(x).sum()


def test_several_targets() -> None:
    x, y = make_regression(300, 5, n_targets=3, random_state=0)
    model = PlasticMLPRegressor(random_state=0).fit(x, y)
    assert model.predict(x).shape == (300, 3)
    assert model.score(x, y) > 0.95


def test_verbose_says_how_wide_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = moons()
    PlasticMLPClassifier(random_state=0, max_iter=20, verbose=True).fit(x, y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("Iteration 1, loss = ")
    assert lines[0].endswith("hidden units 3-3")


def test_too_few_epochs_are_said() -> None:
    x, y = moons()
    with pytest.warns(ConvergenceWarning, match="max_iter=5 epochs of 400 rows are too few to choose widths"):
        model = PlasticMLPClassifier(max_iter=5, random_state=0).fit(x, y)
    assert model.widths_ == [3, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"price": -1}, {"price": "cheap"}, {"hidden_layers": 0}, {"activation": "step"}, {"batch_size": 0},
        {"max_iter": 2.5}, {"learning_rate_init": 0.0}, {"validation_fraction": 1.0}, {"price": float("nan")},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parameters_out_of_range_are_refused_by_name(kind: Any, wrong: dict[str, Any]) -> None:
    x, y = moons()
    with pytest.raises(PlasticError, match=f"{next(iter(wrong))}=") as found:
        kind(**wrong).fit(x, y)
    assert isinstance(found.value, ValueError)  # what scikit-learn expects


@pytest.mark.parametrize("wrong", [np.ones(3), -np.ones(400), np.zeros(400), np.full(400, np.nan), np.ones((400, 1))])
def test_weights_that_fit_nothing_are_refused(wrong: np.ndarray) -> None:
    x, y = moons()
    with pytest.raises(PlasticError, match="sample_weight"):
        PlasticMLPClassifier().fit(x, y, sample_weight=wrong)


def test_noise_on_the_inputs_is_chosen_by_rows_that_are_held_out() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 20))
    by_heart = (x[:, 0] + 2 * random.normal(size=400) > 0).astype(int)  # most of which cannot be learned
    precise = np.sin(4 * x[:, 0])  # which noise would blur
    assert PlasticMLPClassifier(random_state=0, max_iter=30).fit(x, by_heart).noise_ > 0
    assert PlasticMLPRegressor(random_state=0, max_iter=30).fit(x[:, :2], precise).noise_ == 0.0
    assert PlasticMLPClassifier(random_state=0, max_iter=30).fit(x[:150], by_heart[:150]).noise_ == 0.0  # too few


@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_a_hundred_rows_are_enough(load: Any) -> None:
    x, y = load(return_X_y=True)
    scores = [
        PlasticMLPClassifier(random_state=seed).fit(x[seed % 2 :: 2], y[seed % 2 :: 2]).score(x, y) for seed in range(4)
    ]
    assert min(scores) > 0.9


@pytest.mark.parametrize(("rows", "epochs"), [(100, 500), (500, 125), (5000, 100), (20_000, 63), (10**6, 30)])
def test_small_tables_have_more_epochs_and_large_ones_fewer(rows: int, epochs: int) -> None:
    from plasticnet.sklearn.fitting import batch_size, number_of_epochs

    assert number_of_epochs(rows, batch_size(rows)) == epochs
