"""A model that is changed after it was gated: what the gates cannot know of is refused, and changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Adam

from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import assert_same

X = torch.randn(8, 4)


def network() -> PlasticNet:
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    net = PlasticNet(nn.Sequential(*layers), (X,))
    net.k = 3.0
    return net


def losses(net: PlasticNet) -> Tensor:
    return net(X).square().sum(1)


def replaced(net: PlasticNet) -> None:
    net.model[2] = nn.Linear(6, 4)  # pyright: ignore[reportIndexIssue]


def normed(net: PlasticNet) -> None:
    net.model[1] = nn.LayerNorm(6)  # pyright: ignore[reportIndexIssue]


def removed(net: PlasticNet) -> None:
    del net.model[2:4]  # pyright: ignore[reportIndexIssue]


def tied(net: PlasticNet) -> None:
    net.model[4].weight = net.model[0].weight  # pyright: ignore[reportIndexIssue]


def parametrized(net: PlasticNet) -> None:
    nn.utils.parametrizations.weight_norm(net.model[2])  # pyright: ignore[reportIndexIssue]


def of_spectral_norm(net: PlasticNet) -> None:
    nn.utils.parametrizations.spectral_norm(net.model[2])  # pyright: ignore[reportIndexIssue]


def of_the_old_weight_norm(net: PlasticNet) -> None:
    nn.utils.weight_norm(net.model[2])  # pyright: ignore


def pruned_by_torch(net: PlasticNet) -> None:
    prune.l1_unstructured(net.model[2], "weight", 0.5)  # pyright: ignore[reportIndexIssue]


def without_a_bias(net: PlasticNet) -> None:
    net.model[2].bias = None  # pyright: ignore


CHANGES = {"replaced": replaced, "a norm for an activation": normed, "removed": removed, "tied": tied}
PARAMETERS = [parametrized, of_spectral_norm, of_the_old_weight_norm, pruned_by_torch, without_a_bias]
CALLS: dict[str, Callable[[PlasticNet], object]] = {
    "expected_loss": lambda net: net.train().expected_loss(lambda: losses(net)),
    "evaluation": lambda net: net.eval()(X),
    "resize": lambda net: net.resize({"0": [0, 1]}),
    "grow": lambda net: net.grow({"0": 1}),
    "prune": lambda net: net.prune(),
    "compact": lambda net: net.compact(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_gates_do_not_know_is_refused(change: str, call: str) -> None:
    net = network()
    CHANGES[change](net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PlasticError, match=r"(were tied|replaced).*after PlasticNet was made.*make a new PlasticNet"):
        CALLS[call](net)
    assert_same(copy.deepcopy(net.state_dict()), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", PARAMETERS)
def test_a_parameter_that_was_parametrized_or_taken_away_is_refused(
    change: Callable[[PlasticNet], None], call: str
) -> None:
    net = network()
    change(net)
    leaf = "bias" if change is without_a_bias else "weight"
    expected = rf"'2.{leaf}'.*(parametrized|removed) after PlasticNet was made.*make a new PlasticNet"
    with pytest.raises(PlasticError, match=expected):
        CALLS[call](net)


def test_a_bias_that_was_added_is_refused() -> None:
    net = PlasticNet(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)), (X,))
    net.model[0].bias = nn.Parameter(torch.zeros(6))  # pyright: ignore
    with pytest.raises(PlasticError, match=r"'0.bias'.*added after PlasticNet was made"):
        net.resize({"0": [0, 1]})


def test_what_was_parametrized_may_be_undone() -> None:
    net = network()
    parametrized(net)
    with pytest.raises(PlasticError, match="parametrized"):
        net(X)
    nn.utils.parametrize.remove_parametrizations(net.model[2], "weight")  # pyright: ignore[reportIndexIssue]
    net.resize({"0": [0, 1]})
    torch.testing.assert_close(net.eval()(X), net.compact()(X))


def test_what_was_parametrized_before_is_known() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    net = PlasticNet(model, (X,))
    net.resize({"0": [0, 1, -1]})
    net.train().expected_loss(lambda: losses(net)).backward()
    torch.testing.assert_close(net.eval()(X), net.compact()(X))


def test_the_module_is_named_and_may_be_put_back() -> None:
    net = network()
    own = net.model[2]  # pyright: ignore[reportIndexIssue]
    expected = net.eval()(X)
    replaced(net)
    with pytest.raises(PlasticError, match=r"'2': this Linear"):
        net(X)
    net.model[2] = own  # pyright: ignore[reportIndexIssue]
    assert torch.equal(net(X), expected)


class Around(nn.Module):
    """Wraps a module, as a checkpoint does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("place", [1, 2])
def test_wrappers_and_other_activations_are_right(place: int) -> None:
    net = network()
    net.model[place] = Around(net.model[2]) if place == 2 else nn.ReLU()  # pyright: ignore[reportIndexIssue]
    if place == 2:  # what it wraps has another name now, so that only runs go on
        net.train().expected_loss(lambda: losses(net)).backward()
        assert all(p.grad is not None for p in net.parameters())
        return
    optimizer = Adam(net.param_groups(1e-2))
    net.resize({"0": [0, 1, -1]}, optimizer)
    torch.testing.assert_close(net.eval()(X), net.compact()(X))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_know_their_own_modules(twin: Callable[[PlasticNet], PlasticNet]) -> None:
    net = network()
    other = twin(net)
    replaced(net)
    other.resize({"0": [0, 1]})
    other.train().expected_loss(lambda: losses(other)).backward()
    replaced(other)
    with pytest.raises(PlasticError, match="'2'"):
        other(X)


def test_parameters_may_be_replaced() -> None:
    net = network()
    net.model[2].weight = nn.Parameter(torch.randn(4, 6))  # pyright: ignore[reportIndexIssue]
    net.resize({"0": [0, 1, 5]})
    torch.testing.assert_close(net.eval()(X), net.compact()(X))
