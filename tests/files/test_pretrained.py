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

transformers = pytest.importorskip("transformers")


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


def test_blocks_of_a_stage_that_differ_are_refused(tmp_path: Path) -> None:
    """Swin does not count its layers, and has lists with an entry for each stage."""
    net, _ = network("swin", exclude=("*attention*",))
    keep(net, 0.5, sites=[n for n in net.sites if "layers.1.blocks.0" in n])
    with pytest.raises(PlasticError, match="SwinModel reads one width for all"):
        save_pretrained(net.compact(), tmp_path / "new")


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


def tiny(kind: str, **fields: Any) -> Any:
    """A config of three layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    return transformers.AutoConfig.for_model(kind, **{**sizes, "num_key_value_heads": 2, **fields})


def cut_and_saved(model: nn.Module, example: dict[str, Tensor], counts: dict[str, int], then: str, folder: Path) -> Any:
    """Cut sites of a model to so many units, save it, cut another one to a unit, save again: the first fields set."""
    net = PlasticNet(model, example)
    net.resize({name: range(count) for name, count in counts.items()})
    small = net.compact()
    before = small.config.to_dict()
    fields = save_pretrained(small, folder, example)
    assert net.model.config.to_dict() == before  # of the network, not the copy
    loaded = type(small).from_pretrained(folder)
    assert torch.equal(last(loaded(**example)), last(small(**example)))
    assert small.config.to_dict() == type(small.config).from_pretrained(folder).to_dict() | {
        key: small.config.to_dict().get(key) for key in ("architectures", "dtype", "_name_or_path")
    }
    again = PlasticNet(loaded, example)  # what was saved can be cut and saved once more
    again.resize({then: range(1)})
    smaller = again.compact()
    assert save_pretrained(smaller, folder, example)
    assert torch.equal(last(type(small).from_pretrained(folder)(**example)), last(smaller(**example)))
    return fields


TEXT = {"input_ids": torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))}
LAYERS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


@pytest.mark.slow
def test_widths_in_a_list(tmp_path: Path) -> None:
    config = tiny(
        "gemma3n_text", intermediate_size=[48, 48, 48], hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
        num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0] * 3, **LAYERS,
    )  # fmt: skip
    counts = {"layers.0.mlp.gate_proj": 20, "layers.2.mlp.gate_proj": 7}
    fields = cut_and_saved(transformers.AutoModel.from_config(config), TEXT, counts, "layers.0.mlp.gate_proj", tmp_path)
    assert fields == {"intermediate_size": [20, 48, 7]}
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert [layer.mlp.gate_proj.out_features for layer in loaded.layers] == [1, 48, 7]


@pytest.mark.slow
def test_heads_in_the_config_of_a_layer(tmp_path: Path) -> None:
    config = tiny(
        "step3p5", intermediate_size=48, moe_intermediate_size=16, share_expert_dim=16, sliding_window=4,
        mlp_layer_types=["dense"] * 3, **LAYERS,
    )  # fmt: skip
    config.per_layer_config = {2: {"attention_dropout": 0.25}}  # what it says of a layer already is kept
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7").Step3p7TextModel
    every = {f"layers.{i}.mlp.gate_proj": 12 for i in range(3)}
    counts = {**every, "layers.1.self_attn.q_proj": 1}
    fields = cut_and_saved(step(config), TEXT, counts, "layers.0.self_attn.q_proj", tmp_path)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert fields == {
        "intermediate_size": 12, "per_layer_config": {1: heads, 2: {"attention_dropout": 0.25}},
    }  # fmt: skip


@pytest.mark.slow
def test_layers_that_the_architecture_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    """Gemma 4 reads only the heads of keys and values per layer."""
    config = tiny(
        "gemma4_text", intermediate_size=48, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
        num_kv_shared_layers=0, global_head_dim=8, use_double_wide_mlp=False, **LAYERS,
    )  # fmt: skip
    net = PlasticNet(transformers.AutoModel.from_config(config), TEXT)
    net.resize({"layers.0.mlp.gate_proj": range(20)})
    small = net.compact()
    before = small.config.to_dict()
    with pytest.raises(PlasticError, match=r"Gemma4TextModel reads one width for all.*equalise"):
        save_pretrained(small, tmp_path / "new", TEXT)
    assert small.config.to_dict() == before
    assert not list(tmp_path.iterdir())
    assert equalise(net)
    assert save_pretrained(net.compact(), tmp_path / "new", TEXT) == {}
