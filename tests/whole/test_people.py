"""Models as people have them: exact, or frozen with the reason, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from tests.kit import people
from tests.kit.adversarial import Case
from tests.kit.adversarial_checks import (
    check_exact,
    check_expectation,
    check_life,
    close_units,
    distance,
    double,
    precise,
    train,
)


@pytest.mark.parametrize("case", people.CASES.values(), ids=lambda c: c.name)
def test_expectation(case: Case) -> None:
    check_expectation(case)


@pytest.mark.parametrize("case", people.CASES.values(), ids=lambda c: c.name)
def test_closing_cutting_and_growing(case: Case, tmp_path: Path) -> None:
    check_life(case.factory, case.inputs(), tmp_path)


def test_what_does_not_train_is_cut_and_stays_as_it_is() -> None:
    """The optimizer holds the head and the gates only; what is left of the backbone keeps its values."""
    case = people.CASES["frozen_backbone"]
    net = pn.PlasticNet(case.factory(), case.inputs())
    groups = net.param_groups(1e-2)
    groups[0]["params"] = [p for p in groups[0]["params"] if p.requires_grad]
    optimizer = Adam(groups)
    net.k = 2.0
    train(net, optimizer, case.inputs())
    before = net.model.a.weight.clone()
    net.resize({"a": [0, 2, 5, -1], "b": [1, 3]}, optimizer)
    train(net, optimizer, case.inputs())
    assert torch.equal(net.model.a.weight[:3], before[[0, 2, 5]])
    assert {n for n, p in net.model.named_parameters() if p.requires_grad} == {"c.weight", "c.bias"}
    assert not any(p.requires_grad for n, p in net.compact().named_parameters() if n[0] in "ab")
    assert net.model.a.weight.grad is None


@pytest.mark.slow  # importing peft
@pytest.mark.parametrize("rank", [1, 3])
def test_peft(rank: int) -> None:
    """LoRA of the peft package: exact, and merging the compact module keeps its outputs."""
    peft = pytest.importorskip("peft")

    def factory() -> nn.Module:
        model = people.Named(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
        config = peft.LoraConfig(r=rank, target_modules=["a", "b"], modules_to_save=["c"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    x = torch.randn(3, 4).double()
    net = pn.PlasticNet(precise(factory()), (x,))
    found = {n.removeprefix("base_model.model."): len(s) for n, s in net.sites.items()}
    ranks = {f"{n}.lora_A.default": rank for n in "ab"}
    assert {n: found.get(n) for n in ("a.base_layer", "b.base_layer")} == {"a.base_layer": 6, "b.base_layer": 5}
    assert found == {"a.base_layer": 6, "b.base_layer": 5, **ranks}
    check_exact(net, (x,), net.eval()(x))
    small = net.compact()
    reference = small(x)
    assert distance(reference, small.merge_and_unload()(x)) <= 1e-9
    optimizer = Adam(net.param_groups(1e-3))
    train(net, optimizer, (x,))
    net.resize({n: [*range(len(s) - 1), -1] if len(s) > 1 else [0, -1] for n, s in net.sites.items()}, optimizer)
    train(net, optimizer, (x,))
    check_exact(net, (x,), net.eval()(x))
    assert distance(net.compact()(x), net.compact().merge_and_unload()(x)) <= 1e-9


def test_parametrizations_can_be_removed_after_compaction() -> None:
    for name in ("weight_norm", "spectral_norm"):
        case = people.CASES[name]
        x = double(case.inputs()[0])
        net = pn.PlasticNet(precise(case.factory()), (x,))
        close_units(net, 0.5)
        small = net.compact()
        reference = small(x)
        nn.utils.parametrize.remove_parametrizations(small.a, "weight")
        assert distance(reference, small(x)) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", people.RECURRENT)
def test_recurrent(name: str, tmp_path: Path) -> None:
    """Exact, or frozen with the reason; the layer behind is exact in any case."""
    torch.manual_seed(0)
    net = check_life(people.RECURRENT[name], people.steps(), tmp_path)
    assert len(net.sites["b"])
    inner = [n for n in (*net.sites, *net.frozen) if n.startswith(("rnn", "cell"))]
    assert inner
    assert all(net.frozen.values())


@pytest.mark.parametrize("name", [n for n in people.RECURRENT if "projected" not in n])
def test_recurrent_units_are_gated(name: str) -> None:
    """One site for all layers and directions: they share one hidden size."""
    net = pn.PlasticNet(people.RECURRENT[name](), people.steps())
    (inner,) = [n for n in net.sites if n.startswith(("rnn", "cell"))]
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 6, inner: 5, "b": 7}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}])
def test_of_a_projection_the_projected_units_are_gated(options: dict[str, Any], tmp_path: Path) -> None:
    """Torch needs more hidden units than projected ones, so the hidden ones stay, and the others do not grow."""

    def build() -> nn.Module:
        return people.Recurrent(nn.LSTM, proj_size=3, batch_first=True, **options).double()

    x = people.steps()[0].double()
    net = pn.PlasticNet(build(), (x,))
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 6, "rnn#2": 3, "b": 7}
    assert "must be more" in net.frozen["rnn"]
    with pytest.raises(pn.PlasticError, match="rnn#2"):
        net.grow({"rnn#2": 1})
    net.resize({"rnn#2": [0, 2]})
    small: Any = net.eval().compact()
    assert (small.rnn.hidden_size, small.rnn.proj_size) == (5, 2)
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-9)
    pn.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(pn.load(tmp_path / "small.safetensors", build)(x), small(x), rtol=0, atol=0)


def hooks(module: nn.Module) -> Callable[[], int]:
    """How often the module has been called."""
    calls: list[Tensor] = []
    module.register_forward_hook(lambda m, args, out: calls.append(out))
    return lambda: len(calls)


def test_hooks_of_the_user_stay() -> None:
    case = people.CASES["frozen_batch_norm"]
    model = case.factory()
    count = hooks(model[0])
    net = pn.PlasticNet(model, case.inputs())
    before = count()
    net.eval()(*case.inputs())
    assert count() == before + 1
    net.resize({"0": [0, 2]})
    net.compact()(*case.inputs())
    assert count() == before + 2
