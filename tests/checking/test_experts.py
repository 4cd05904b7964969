"""Experts of a mixture as units: closed ones are never chosen, and are cut with their row of the router."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError
from tests.kit.networks import randomise_gates

E, K = 5, 2  # the number of experts, and how many of them a row goes to
ROUTERS = ["linear", "matmul", "turned", "transposed", "noisy", "biased"]
WAYS = ["dense", "stacked outputs", "before", "after", "sigmoid"]


class Mixture(nn.Module):
    """Five experts and a router.

    Args:
        way: How experts are weighted: all of them, or two for each row, chosen before or after the softmax.
        router: How the logits are computed.
        stacked: Whether the experts lie in parameters with three dimensions.
    """

    def __init__(self, way: str = "before", router: str = "linear", stacked: bool = False) -> None:
        super().__init__()
        self.way, self.router, self.num_experts = way, router, E
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        if router in ("linear", "biased"):
            self.gate = nn.Linear(6, E, bias=router == "linear")
        else:
            self.gate = nn.ParameterDict(
                {"weight": nn.Parameter(torch.randn((6, E) if router in ("matmul", "noisy") else (E, 6)))}
            )
        self.noise = nn.Linear(6, E) if router == "noisy" else None
        self.register_buffer("shift", torch.linspace(0, 1, E))
        if stacked:
            self.experts = nn.ParameterDict({"up": torch.randn(E, 6, 7), "down": torch.randn(E, 7, 6)})
        else:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(E))

    def expert(self, i: int, x: Tensor) -> Tensor:
        if isinstance(self.experts, nn.ParameterDict):
            return (x @ self.experts["up"][i]).relu() @ self.experts["down"][i]
        return self.experts[i](x)

    def logits(self, x: Tensor) -> Tensor:
        if isinstance(self.gate, nn.Linear):
            return self.gate(x)
        weight = self.gate["weight"]
        if self.router in ("turned", "transposed"):
            weight = weight.t() if self.router == "turned" else weight.transpose(0, 1)
        logits = x @ weight
        return logits if self.noise is None else logits + torch.linspace(-1, 1, len(x))[:, None].to(x) * self.noise(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits = self.logits(x)
        chosen = torch.arange(logits.shape[1]).expand(len(x), -1)
        if self.way in ("dense", "stacked outputs"):
            weights = logits.softmax(-1)
        elif self.way == "after":
            weights, chosen = logits.topk(K, -1)
            weights = weights.softmax(-1)
        else:
            scores = logits.sigmoid() if self.way == "sigmoid" else logits.softmax(-1)
            chosen = (scores + self.get_buffer("shift") if self.router == "biased" else scores).topk(K, -1)[1]
            weights = scores.gather(-1, chosen)
        if self.way == "stacked outputs":
            every = torch.stack([self.expert(i, x) for i in range(logits.shape[1])], 1)
            return self.head(x + torch.einsum("be,bed->bd", weights, every))
        y = torch.zeros_like(x)
        for i in range(logits.shape[1]):
            rows, places = torch.where(chosen == i)
            if len(rows):
                y = y.index_add(0, rows, self.expert(i, x[rows]) * weights[rows, places, None])
        return self.head(x + y)


def inputs(rows: int = 40) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


def gated(model: nn.Module, experts: str = "experts", **options: object) -> pn.PlasticNet:
    net = pn.PlasticNet(model.double(), (inputs(),), experts=experts, **options)  # pyright: ignore[reportArgumentType]
    return net.eval()


def close(net: pn.PlasticNet, closed: Sequence[int], site: str = "experts.members") -> None:
    with torch.no_grad():
        net.sites[site].phi.fill_(1.0)
        net.sites[site].phi[list(closed)] = -1.0


@pytest.mark.parametrize(
    ("way", "router", "stacked"),
    [
        *((way, "linear", False) for way in WAYS),
        *(("before", router, False) for router in ROUTERS[1:]),
        *((way, "linear", True) for way in ("dense", "before")),
    ],
)
def test_a_closed_expert_is_never_chosen_and_cut_exactly(way: str, router: str, stacked: bool) -> None:
    torch.manual_seed(0)
    net = gated(Mixture(way, router, stacked))
    site = net.sites["experts.members"]
    assert len(site) == E
    assert site.minimum == site.units.least == (1 if way in WAYS[:2] else K)
    whole, x = net(xs := inputs()), inputs()
    for number in range(1, 2**E):
        randomise_gates(net)
        closed = [i for i in range(E) if number >> i & 1]
        close(net, closed)
        small = net.compact()
        torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
        held = small.get_submodule("experts")
        left = held["up"].shape[0] if isinstance(held, nn.ParameterDict) else len(held)  # pyright: ignore
        assert left == max(E - len(closed), site.units.least)
    assert not torch.allclose(small(xs), whole)


def test_layers_may_be_as_wide_as_there_are_experts() -> None:
    class Wide(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(6, E), nn.Tanh(), nn.Linear(E, E))
            del self.shift  # which does not run, and might read what is as wide

        def logits(self, x: Tensor) -> Tensor:
            return self.gate(x)

    torch.manual_seed(0)
    net = gated(Wide())
    assert {"gate.0", "experts.members"} <= net.sites.keys()
    randomise_gates(net)
    close(net, [0, 2])
    assert len(net.compact().get_submodule("experts")) == E - 2  # pyright: ignore
    torch.testing.assert_close(net.compact()(x := inputs()), net(x), rtol=1e-9, atol=1e-9)


def test_gates_of_units_within_experts_and_of_experts_agree_at_any_k() -> None:
    torch.manual_seed(0)
    net = gated(Mixture())
    for k in (2.0, 20.0, float("inf")):
        net.k = k
        randomise_gates(net)
        torch.testing.assert_close(net.compact()(x := inputs()), net(x), rtol=1e-9, atol=1e-9)


class Odd(Mixture):
    """A mixture that cannot lose experts exactly."""

    def __init__(self, odd: str) -> None:
        super().__init__("dense")
        self.odd, self.norm = odd, nn.LayerNorm(E)

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        if self.odd == "a norm over the experts":
            return self.norm(logits)
        if self.odd == "bounded logits":
            return 5 * torch.tanh(logits)
        if self.odd == "less than their mean":
            return logits - logits.mean(-1, keepdim=True).abs()
        return -logits

    def expert(self, i: int, x: Tensor) -> Tensor:
        return super().expert(i, x) * (2 if self.odd == "the first is special" and i == 0 else 1)


@pytest.mark.parametrize(
    "odd", ["a norm over the experts", "bounded logits", "less than their mean", "turned over", "the first is special"]
)
def test_what_cannot_be_exact_is_frozen(odd: str) -> None:
    torch.manual_seed(0)
    net = gated(Odd(odd))
    assert "experts.members" not in net.sites
    assert "experts.members" in net.frozen
    randomise_gates(net)
    torch.testing.assert_close(net.compact()(x := inputs()), net(x), rtol=1e-9, atol=1e-9)


class Shared(Mixture):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1][0].weight = self.experts[0][0].weight  # pyright: ignore


class Without(nn.Module):
    """A list of layers, without a router."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + sum(layer(x) for layer in self.experts))


@pytest.mark.parametrize(
    ("model", "pattern", "reason"),
    [
        (Shared, "experts", "shares a parameter"),
        (Without, "experts", "nothing around the experts"),
        (Without, "head", "two or more modules"),
    ],
)
def test_what_are_no_experts_is_named_with_the_reason(model: type[nn.Module], pattern: str, reason: str) -> None:
    net = gated(model(), pattern)
    assert reason in net.frozen[f"{pattern} (as experts)"]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlasticError, match=r"experts='nowhere'.*experts"):
        gated(Mixture(), "nowhere")


def test_experts_stay_until_the_network_is_compacted() -> None:
    net = gated(Mixture())
    close(net, [1, 2])
    net.prune()
    assert len(net.sites["experts.members"]) == E
    with pytest.raises(PlasticError, match="whole experts"):
        net.resize({"experts.members": [0, 1]})


def test_a_compact_mixture_is_saved_loaded_and_gated_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = gated(Mixture())
    randomise_gates(net)
    close(net, [0, 3])
    small, x = net.compact(), inputs()
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        pn.save(small, path)
        small = pn.load(path, lambda: Mixture().double())
        assert [n for n, _ in small.get_submodule("experts").named_children()] == ["1", "2", "4"]
        torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
    again = gated(small)
    assert len(again.sites["experts.members"]) == 3
    close(again, [1])
    torch.testing.assert_close(again.compact()(x), again(x), rtol=1e-9, atol=1e-9)


def test_a_file_may_only_take_experts_out_of_lists(tmp_path: Path) -> None:
    net = gated(Mixture())
    close(net, [0])
    pn.save(net.compact(), path := tmp_path / "a.safetensors")

    def other() -> nn.Module:
        model = Mixture().double()
        model.experts = nn.Sequential(*model.experts)  # pyright: ignore
        return model

    with pytest.raises(PlasticError, match="no module of a list"):
        pn.load(path, other)


def test_training_closes_an_expert_that_only_does_harm() -> None:
    torch.manual_seed(0)
    model, x = Mixture("dense"), torch.randn(64, 4)
    target = copy.deepcopy(model)
    with torch.no_grad():
        y = target(x)
        model.experts[2][2].bias += 3.0  # pyright: ignore
    net = pn.PlasticNet(model, (x,), experts="experts", exclude=("stem", "experts.*.0"))
    optimizer = torch.optim.Adam([net.sites["experts.members"].phi], lr=0.05)
    net.k = 5.0
    for _ in range(60):
        optimizer.zero_grad()
        net.expected_loss(lambda: (net(x) - y).square().mean(1)).backward()
        optimizer.step()
    assert net.sites["experts.members"].phi.argmin() == 2


def test_work_that_rows_share_does_not_follow_the_number_of_experts() -> None:
    torch.manual_seed(0)
    for way, falls in (("before", False), ("dense", True)):
        net = gated(Mixture(way), exclude=("stem", "experts.*.0"))
        before = {cost: float(net.penalty(1.0, cost)) for cost in ("macs", "parameters")}
        close(net, [0, 1])
        rows = 6 * 2  # of the router
        assert float(net.penalty(1.0, "parameters")) < before["parameters"]
        assert (float(net.penalty(1.0, "macs")) < before["macs"] - rows) == falls


def test_a_profile_counts_experts_as_they_run() -> None:
    torch.manual_seed(0)
    net = gated(Mixture("before"), exclude=("stem", "experts.*.0"))
    x, before = (inputs(),), pn.profile(net, (inputs(),)).macs
    close(net, [0, 3])
    assert pn.profile(net, x).macs == before  # rows go to others, and the router still has all its rows
    small = pn.profile(net.compact(), x).macs
    assert before - small == pytest.approx(2 * 6, abs=1)  # two rows of the router


def test_scores_find_the_expert_that_matters_least() -> None:
    torch.manual_seed(0)
    model = Mixture("dense").double()
    with torch.no_grad():
        for expert in model.experts:
            expert[2].bias.normal_(std=3.0)  # pyright: ignore
        model.gate.weight[3], model.gate.bias[3] = 0.0, -9.0  # pyright: ignore
    net, x = gated(model), inputs()
    for rule in ("taylor", "fisher"):
        found = pn.scores(net, rule, lambda: net(x).square().mean(1))["experts.members"]  # pyright: ignore
        assert found.argmin() == 3


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_mixtures_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = {"num_local_experts": E} if name == "Mixtral" else {
        "n_routed_experts": E, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 0,
        "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vocab_size=30, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=K, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, **own,
    )  # fmt: skip
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, **options).double().eval()
    tokens = torch.randint(3, 30, (3, 8))
    net = pn.PlasticNet(model, (tokens,), experts="*.experts", outputs=lambda out: out.logits).eval()
    whole = net(tokens).logits
    randomise_gates(net)
    close(net, [0, 3], "model.layers.0.mlp.experts.members")
    small = net.compact()
    assert small.get_parameter("model.layers.0.mlp.experts.down_proj").shape[0] == E - 2
    assert small.get_parameter("model.layers.0.mlp.gate.weight").shape[0] == E - 2
    assert not torch.allclose(net(tokens).logits, whole)
    tolerance = 1e-9 if name == "Mixtral" else 1e-6  # DeepSeek's router computes in single precision
    torch.testing.assert_close(small(tokens).logits, net(tokens).logits, rtol=tolerance, atol=tolerance)
