"""Hugging Face: what a config describes comes back from it, what it does not is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from plasticnet import PlasticError, PlasticNet
from plasticnet.apps.models import example_inputs, factory
from plasticnet.files.pretrained import equalise, save_pretrained
from tests.kit.networks import mlp

pytest.importorskip("transformers")


def network(kind: str, **options: Any) -> tuple[PlasticNet, dict[str, Tensor]]:
    name = f"transformers:{kind}"
    model = factory(name, (), 0)()
    example = example_inputs(name, model)
    assert isinstance(example, dict)
    return PlasticNet(model, example, **options), example


def keep(net: PlasticNet, share: float, sites: Sequence[str] = ()) -> None:
    """Leave so many units of each site open."""
    with torch.no_grad():
        for name, site in net.sites.items():
            if name in sites or not sites:
                site.phi[max(1, round(share * len(site))) :] = -1.0


def last(output: Any) -> Tensor:
    return output.last_hidden_state


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "exclude", "fields"),
    [
        ("llama", (), {**HEADS, "intermediate_size": 32}),
        ("qwen2", (), {**HEADS, "head_dim": 8, "intermediate_size": 32}),  # its config does not hold it before
        ("bert", ("*attention*",), {"intermediate_size": 32}),
        ("gpt2", ("*attn*",), {"n_inner": 64}),
        ("bart", ("*attn*",), {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}),
        ("vit", (), {"num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32}),
        ("swin", ("*attention*",), {"mlp_ratio": 2.0}),
    ],
)
def test_round_trip(kind: str, exclude: tuple[str, ...], fields: dict[str, Any], tmp_path: Path) -> None:
    net, example = network(kind, exclude=exclude)
    keep(net, 0.5)
    small = net.compact()
    before = {f: getattr(net.model.config, f, None) for f in fields}
    assert save_pretrained(small, tmp_path / "new") == fields
    loaded = type(small).from_pretrained(tmp_path / "new")
    torch.testing.assert_close(last(loaded(**example)), last(net.eval()(**example)), rtol=1e-6, atol=1e-6)
    assert {f: getattr(loaded.config, f) for f in fields} == fields
    assert {f: getattr(small.config, f) for f in fields} == fields
    assert {f: getattr(net.model.config, f, None) for f in fields} == before  # of the network, not the copy
    assert save_pretrained(small, tmp_path / "new") == {}  # the config describes it already


def test_layers_that_differ_are_refused_and_named(tmp_path: Path) -> None:
    net, _ = network("llama")
    keep(net, 0.5, sites=["layers.1.mlp.gate_proj"])
    with pytest.raises(
        PlasticError, match=r"layers\.0\.mlp\.\w+\.weight .*64.*layers\.1.*32.*equalise.*plasticnet\.save"
    ):
        save_pretrained(net.compact(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_heads_of_bert_are_refused(tmp_path: Path) -> None:
    net, _ = network("bert")
    keep(net, 0.5)
    small = net.compact()
    with pytest.raises(PlasticError, match=r"attention\.self\.query.*size of a head.*plasticnet\.save"):
        save_pretrained(small, tmp_path / "new")
    assert small.config.num_attention_heads == 4
    assert not list(tmp_path.iterdir())


def test_what_transformers_refuses_is_passed_on(tmp_path: Path) -> None:
    """Llama wants the width of the model to be a multiple of the number of heads."""
    name = "transformers:llama"
    model = factory(name, (), 0)()
    config = model.config
    config.num_key_value_heads = 4
    model = type(model)(config)
    net = PlasticNet(model, example_inputs(name, model))
    keep(net, 0.75)
    small = net.compact()
    with pytest.raises(PlasticError, match="not a multiple of the number of attention heads"):
        save_pretrained(small, tmp_path / "new")
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (4, 64)
    assert not list(tmp_path.iterdir())


def test_a_config_that_gives_other_outputs_is_refused(tmp_path: Path) -> None:
    """Equal shapes are not enough."""
    net, _ = network("llama")
    small = net.compact()
    small.layers[0].self_attn.scaling *= 2
    with pytest.raises(PlasticError, match="differ"):
        save_pretrained(small, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_module_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match="not a transformers model"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(PlasticError, match="not a transformers model"):
        equalise(PlasticNet(mlp(4, 5, 3), (torch.randn(2, 4),)))


@pytest.mark.parametrize("cut", [False, True], ids=["closed", "cut"])
def test_equalise_opens_or_adds_units(cut: bool, tmp_path: Path) -> None:
    net, example = network("llama")
    keep(net, 0.5, sites=["layers.0.mlp.gate_proj"])
    keep(net, 0.25, sites=["layers.1.mlp.gate_proj"])
    with torch.no_grad():
        net.sites["layers.1.mlp.gate_proj"].phi[40] = -0.1  # the most probable of the closed ones
    optimizer = Adam(net.param_groups(1e-3))
    before = last(net.eval()(**example))
    if cut:
        net.prune(0.5, optimizer)
    assert equalise(net, optimizer) == {
        "layers.0.self_attn.q_proj": 2, "layers.0.mlp.gate_proj": 32,
        "layers.1.self_attn.q_proj": 2, "layers.1.mlp.gate_proj": 32,
    }  # fmt: skip
    assert [int(site.open.sum()) for site in net.sites.values()] == [2, 32, 2, 32]
    if cut:
        torch.testing.assert_close(last(net(**example)), before)
    else:
        assert net.sites["layers.1.mlp.gate_proj"].open[[*range(16), 40]].all()
    assert save_pretrained(net.compact(), tmp_path / "new") == {"intermediate_size": 32}


def test_equalise_leaves_stages_apart() -> None:
    """Layers that were of different width from the start are of different kinds."""
    net, _ = network("swin", exclude=("*attention*",))
    keep(net, 0.5, sites=[n for n in net.sites if ".blocks.0." in n])
    counts = equalise(net)
    assert sorted(set(counts.values())) == [64, 128, 256, 512]
    keep(net, 0.5)
    assert sorted(set(equalise(net).values())) == [32, 64, 128, 256]
