"""The network: k-limits bit-exact, draws, passes without side effects, bad input."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import ESTIMATORS, PlasticError, PlasticNet
from tests.kit.draws import last_draw
from tests.kit.networks import ConvNet, images, mlp, randomise_gates


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 3, 4, 4, generator=generator), torch.arange(8) % 3) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_infinite_k_is_bit_identical_to_the_plain_model(estimator: str) -> None:
    model = ConvNet(dropout=0.3)
    plain = copy.deepcopy(model)
    net = PlasticNet(model, (images(),), estimator=estimator)

    def run(module: nn.Module, groups: list, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        module.train()
        for x, y in batches(50):
            loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run(plain, list(plain.parameters()), lambda x, y: F.cross_entropy(plain(x), y, reduction="none").mean())
    run(
        net,
        net.param_groups(1e-2),
        lambda x, y: (
            net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(0.1, "macs", "log")
        ),
    )
    for (name, a), b in zip(plain.state_dict().items(), net.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_gates_have_a_rate_and_betas_of_their_own() -> None:
    net = PlasticNet(mlp(5, 7, 3), (torch.randn(4, 5),))
    weights, gates = torch.optim.AdamW(net.param_groups(1e-2, weight_decay=0.1, betas=(0.8, 0.9))).param_groups
    assert (weights["lr"], weights["betas"], weights["weight_decay"]) == (1e-2, (0.8, 0.9), 0.1)
    assert (gates["lr"], gates["betas"], gates["weight_decay"]) == (1e-1, (0.9, 0.99), 0.0)
    assert gates["params"] == [s.phi for s in net.sites.values()]
    _, gates = torch.optim.AdamW(net.param_groups(1e-2, 0.5, (0.5, 0.7))).param_groups
    assert (gates["lr"], gates["betas"]) == (0.5, (0.5, 0.7))


@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_k_zero_is_dropout(gates: str) -> None:
    model = mlp(5, 7, 3)
    net = PlasticNet(model, (torch.randn(4, 5),), gates=gates)  # pyright: ignore[reportArgumentType]
    net.k = 0
    net.train()
    x = torch.randn(4, 5)
    loss = net.expected_loss(lambda: net(x).pow(2).sum(1)) + net.penalty(1.0)
    loss.backward()
    assert last_draw(net) is not None
    u = last_draw(net).u[0]
    mask = (u < 0.5).float()
    by_hand = model[2](F.dropout(model[1](model[0](x)), 0.0) * mask)  # dropout(x, 0.5) * 0.5 has this mask
    torch.testing.assert_close(loss.detach() - 3.5, by_hand.pow(2).sum(1).mean())
    assert all(site.phi.grad is None for site in net.sites.values())
    net.eval()
    torch.testing.assert_close(net(x), model[2](model[1](model[0](x)) * 0.5))


def test_gates_keep_no_moments_that_move_them() -> None:
    net = PlasticNet(mlp(5, 7, 3), (torch.randn(4, 5),))
    net.k = 5.0
    net.train()
    x = torch.randn(4, 5)
    net.expected_loss(lambda: net(x).pow(2).sum(1)).backward()
    assert net.sites["0"].phi.grad is not None
    net.k = math.inf
    assert net.sites["0"].phi.grad is None


def test_partner_pass_leaves_buffers_and_random_numbers() -> None:
    def run(estimator: str) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        net = PlasticNet(ConvNet(dropout=0.5), (images(),), estimator=estimator)
        net.k = 3.0
        net.train()
        torch.manual_seed(7)
        x = images(8)
        net.expected_loss(lambda: net(x).pow(2).sum(1))
        return {k: v for k, v in net.model.state_dict().items() if "running" in k or "tracked" in k}, torch.rand(3)

    single, one = run("ar")  # one pass
    double, two = run("disarm")  # two
    assert single.keys() == double.keys()
    for name in single:
        assert torch.equal(single[name], double[name]), name
    assert int(single["bn1.num_batches_tracked"]) == 1
    assert torch.equal(one, two)


def test_both_passes_see_the_same_dropout() -> None:
    net = PlasticNet(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Dropout(0.5)), (torch.randn(2, 4),))
    net.k = 3.0
    net.train()
    seen: list[Tensor] = []
    x = torch.randn(6, 4)

    def closure() -> Tensor:
        out = net(x)
        seen.append(out.detach() == 0)
        return out.pow(2).sum(1)

    net.sampler.mode = "sample"
    net.expected_loss(closure)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_partner_pass_is_skipped_when_nothing_is_uncertain() -> None:
    net = PlasticNet(mlp(5, 7, 3), (torch.randn(4, 5),))
    net.k = 7.0
    for site in net.sites.values():
        site.grace.fill_(1)
    net.train()
    calls = []
    x = torch.randn(4, 5)

    def closure() -> Tensor:
        calls.append(1)
        return net(x).sum(1)

    net.expected_loss(closure)  # the first step also asks whether gates can be drawn per sample
    calls.clear()
    net.expected_loss(closure)
    assert len(calls) == 1


def test_auto_draws_per_batch_where_samples_interact() -> None:
    class Mixing(nn.Module):
        """Adds the mean over the batch: rows are samples, but not independent ones."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x).tanh())
            return h + h.mean(0, keepdim=True)

    for model, apart in ((Mixing(), False), (mlp(4, 6, 2), True)):
        net = PlasticNet(model, (torch.randn(4, 4),))
        net.k = 3.0
        net.train()
        x = torch.randn(8, 4)
        net.expected_loss(lambda net=net, x=x: net(x).pow(2).sum(1))
        assert net.sampler.samples_apart is apart
        assert last_draw(net).rows == (8 if apart else 1)  # pyright: ignore[reportArgumentType]
    norm = PlasticNet(ConvNet(), (images(),))
    norm.k = 3.0
    norm.train()
    norm.expected_loss(lambda: norm(images(8)).pow(2).sum(1))
    assert len(last_draw(norm).u) == 1  # pyright: ignore[reportArgumentType]


def test_per_sample_gates_equal_a_loop_over_samples() -> None:
    """The fast path (one batch, gates in hooks) against the readable one (sample by sample, folded)."""
    net = PlasticNet(ConvNet(norm=False), (images(),), gates="sample", inputs=("fc1",))
    net.k = 2.0
    randomise_gates(net)
    net.train()
    x = images(6)
    together = net(x)
    assert last_draw(net) is not None
    u = last_draw(net).u[0]
    pi = torch.cat([s.probability(2.0) for s in net.sites.values()])
    z = (u < pi).float()
    net.k = math.inf
    for i in range(6):
        with torch.no_grad():
            for site, part in zip(net.sites.values(), z[i].split([len(s) for s in net.sites.values()]), strict=True):
                site.phi.copy_(part - 0.5)
        torch.testing.assert_close(net(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_accumulation_and_order_do_not_matter() -> None:
    def gradients(order: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 6, 2), (torch.randn(4, 4),))
        net.k = 3.0
        net.train()
        torch.manual_seed(1)
        x = torch.randn(8, 4)
        loss = net.expected_loss(lambda: net(x).pow(2).sum(1))
        if order == "zero after":
            for p in net.parameters():
                p.grad = None
        (loss / 4).backward(retain_graph=order == "accumulate")
        if order == "accumulate":
            (loss * 0.75).backward()
            return [p.grad / 4 for p in net.parameters() if p.grad is not None]
        return [p.grad for p in net.parameters() if p.grad is not None]

    reference = gradients("plain")
    for order in ("zero after", "accumulate"):
        for a, b in zip(reference, gradients(order), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_around_expected_loss_trains_the_weights() -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(4, 4),))
    net.k = 3.0
    net.train()
    x = torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.expected_loss(lambda: net(x).float().pow(2).sum(1))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_delegates_and_copies() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    assert net.fc1 is net.model.fc1
    twin = copy.deepcopy(net)
    assert twin.sites["conv1"].phi is not net.sites["conv1"].phi
    with pytest.raises(AttributeError):
        _ = net.nothing_of_the_kind
    assert "conv1" in str(net.summary())


def test_signature_and_pickle() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    assert list(inspect.signature(net.forward).parameters) == ["x"]
    assert pickle.loads(pickle.dumps(net)).frozen == net.frozen


def test_moves_with_its_readers() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).to("meta")
    assert {r.units.device.type for r in net.gating.readers} == {"meta"}


class Counting(nn.Module):
    """Binds a buffer anew in every training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.n = self.n + 1
        return self.b(self.a(x).tanh())


def test_rebound_buffers_count_once() -> None:
    net = PlasticNet(Counting(), (torch.randn(2, 3),))
    net.k = 3.0
    net.train()
    for _ in range(3):
        net.expected_loss(lambda: net(torch.randn(4, 3)).pow(2).sum(1))
    assert net.model.n == 3


@pytest.mark.parametrize("k", [3.0, math.inf])
def test_a_bad_batch_leaves_the_statistics_alone(k: float) -> None:
    net = PlasticNet(ConvNet(), (images(),))
    net.k = k
    net.train()
    before = {n: b.clone() for n, b in net.model.named_buffers()}
    state = torch.get_rng_state()
    with pytest.raises(PlasticError, match="not finite"):
        net.expected_loss(lambda: net(torch.full((4, 3, 4, 4), math.nan)).sum(1))
    assert torch.equal(torch.get_rng_state(), state)
    for n, b in net.model.named_buffers():
        assert torch.equal(b, before[n]), n


def test_auto_asks_again_after_a_batch_of_one() -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),))
    net.k = 3.0
    net.train()
    for n, apart in ((1, None), (4, True)):
        x = torch.randn(n, 4)
        net.expected_loss(lambda x=x: net(x).pow(2).sum(1))
        assert net.sampler.samples_apart is apart


# -- bad input --------------------------------------------------------------------------------


def test_rejected_inputs_keep_the_cause() -> None:
    with pytest.raises(PlasticError, match=r"does not run on the example inputs.*\(2, 9\)") as caught:
        PlasticNet(mlp(4, 6, 2), (torch.randn(2, 9),))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_nothing_to_gate() -> None:
    with pytest.raises(PlasticError, match=r"nothing to gate.*reaches the model's output"):
        PlasticNet(nn.Linear(4, 2), (torch.randn(2, 4),))
    with pytest.raises(PlasticError, match="nothing to gate"):
        PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),), exclude=("0",))


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda net, x: torch.zeros(()), "never called"),
        (lambda net, x: net.model(x).sum(), "never called"),
        (lambda net, x: net(x), "must return the losses"),
        (lambda net, x: net(x).sum().item(), "must return the losses"),
        (lambda net, x: net(x).sum(1) * math.nan, "not finite"),
        (lambda net, x: net(x).sum(1)[:2], r"shape \(2,\), which is not \(batch,\)"),
    ],
)
def test_bad_closures(closure: Callable[[PlasticNet, Tensor], Tensor], message: str) -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),), gates="sample")
    net.k = 3.0
    net.train()
    x = torch.randn(4, 4)
    with pytest.raises(PlasticError, match=message):
        net.expected_loss(lambda: closure(net, x))


def test_scalar_closure_with_per_sample_gates_is_refused() -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),), gates="sample")
    net.k = 3.0
    x = torch.randn(4, 4)
    with pytest.raises(PlasticError, match="reduction="):
        net.train().expected_loss(lambda: net(x).sum())


def test_gates_that_are_not_finite_cut_nothing() -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),))
    with torch.no_grad():
        net.sites["0"].phi[2] = math.nan
    with pytest.raises(PlasticError, match="not finite"):
        net.prune()
    assert len(net.sites["0"]) == 6


@pytest.mark.parametrize("name", ["inputs", "exclude", "blocks", "weights"])
@pytest.mark.parametrize("wrong", [5, None, ["0", 1]])
def test_patterns_that_are_no_names(name: str, wrong: Any) -> None:
    model = mlp(4, 6, 3)
    with pytest.raises(PlasticError, match=rf"{name}=.*one name pattern or several, such as {name}="):
        PlasticNet(model, (torch.randn(2, 4),), **{name: wrong})
    PlasticNet(model, (torch.randn(2, 4),))  # nothing has changed in it


def test_other_refusals() -> None:
    net = PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),))
    for k in (-1, math.nan, "7"):
        with pytest.raises(PlasticError, match="k is a number"):
            net.k = k  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PlasticError, match="training mode"):
        net.eval().expected_loss(lambda: net(torch.randn(2, 4)).sum())
    with pytest.raises(PlasticError, match="estimator"):
        PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),), estimator="magic")
    with pytest.raises(PlasticError, match="gates"):
        PlasticNet(mlp(4, 6, 2), (torch.randn(2, 4),), gates="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlasticError, match="not gated yet"):
        PlasticNet(net, (torch.randn(2, 4),))
    for strength in (-1.0, math.nan, math.inf, "1"):
        with pytest.raises(PlasticError, match="strength"):
            net.penalty(strength)  # pyright: ignore[reportArgumentType]
    for below in (math.nan, -0.1, 2, "a"):
        with pytest.raises(PlasticError, match="probability"):
            net.prune(below)  # pyright: ignore[reportArgumentType]
    for counts in ({"0": -1}, {"0": 1.5}):
        with pytest.raises(PlasticError, match="whole numbers"):
            net.grow(counts)  # pyright: ignore[reportArgumentType]
    for sources in (None, [0, 1], {"0": None}, {"0": [0.5]}):
        with pytest.raises(PlasticError, match="indices"):
            net.resize(sources)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlasticError, match="cost"):
        net.penalty(1.0, "flops")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlasticError, match="example_inputs"):
        PlasticNet(mlp(4, 6, 2), 3)


# -- as other code sees it --------------------------------------------------------------------


class Keyword(nn.Module):
    """A model as those of transformers: named inputs, some with defaults, and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, values: Tensor, mask: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        h = self.a(values).relu()
        return self.b(h if mask is None else h * mask)


def test_the_signature_of_forward_is_the_models() -> None:
    model = Keyword()
    signature = inspect.signature(model.forward)
    net = PlasticNet(model, {"values": torch.randn(2, 4)})
    assert inspect.signature(net.forward) == signature
    assert list(signature.parameters) == ["values", "mask", "labels"]
    assert inspect.signature(copy.deepcopy(net).forward) == signature
    assert list(inspect.signature(PlasticNet.forward).parameters) == ["self", "args", "kwargs"]


def test_a_copy_runs_its_own_model() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),)).eval()
    x = torch.randn(5, 4)
    twin = copy.deepcopy(net)
    read = pickle.loads(pickle.dumps(net))
    expected = net(x)
    with torch.no_grad():
        for p in net.model.parameters():
            p.zero_()
    assert not net(x).any()
    assert torch.equal(twin(x), expected)
    assert torch.equal(read(x), expected)


def test_forward_can_be_replaced_and_put_back() -> None:
    """As Accelerate does for mixed precision: it wraps the function of the method, and binds it again."""
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),)).eval()
    x = torch.randn(5, 4)
    expected, own = net(x), net.forward
    function = own.__func__
    net.forward = MethodType(lambda self, *args: 2 * function(self, *args), net)
    assert torch.equal(net(x), 2 * expected)
    net.forward = own
    assert torch.equal(net(x), expected)
    del net.forward
    assert torch.equal(net(x), expected)


def test_attributes_of_the_model_that_the_network_has_are_named_once() -> None:
    class Shadowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.gates, self.out = 3, nn.Linear(4, 6), nn.Linear(6, 2)

        def limit(self) -> int:
            return 7

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.gates(x).relu())

    with pytest.warns(UserWarning, match="Shadowed has attributes.*gates, k, limit.*net.model.gates") as caught:
        net = PlasticNet(Shadowed(), (torch.randn(2, 4),))
    assert len(caught) == 1
    assert math.isinf(net.k)
    assert net.model.k == 3
    assert net.model.limit() == 7
    assert net.out is net.model.out  # what is not shadowed falls through
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlasticNet(Keyword(), {"values": torch.randn(2, 4)})
