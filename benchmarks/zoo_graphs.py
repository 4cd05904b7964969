"""The graph networks of PyG in the zoo, and an equivariant one. PyG is imported when one of them is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_inputs import Example


class _Graph(nn.Module):
    """Two layers of a graph network, and a head on the mean of each of two graphs."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        pyg = importlib.import_module("torch_geometric.nn")
        layers = [(6, 16, options), (16 * options.get("heads", 1), 24, {**options, "heads": 1})]
        if name == "GINConv":
            mlps = [nn.Sequential(nn.Linear(a, 20), nn.ReLU(), nn.Linear(20, b)) for a, b, _ in layers]
            self.convs = nn.ModuleList(pyg.GINConv(mlp, train_eps=True) for mlp in mlps)
        else:
            known = [{k: v for k, v in o.items() if "heads" in options or k != "heads"} for *_, o in layers]
            pairs = zip(layers, known, strict=True)
            self.convs = nn.ModuleList(getattr(pyg, name)(a, b, **o) for (a, b, _), o in pairs)
        self.pool = pyg.global_mean_pool
        self.head = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, edges).relu()
        return self.head(self.pool(x, graph))


def _graph(name: str, **options: Any) -> Example:
    return partial(_Graph, name, **options), (torch.randn(10, 6), torch.randint(10, (2, 30)), torch.arange(10) // 5)


class _AllPairs(nn.Module):
    """All pairs of the atoms of a molecule, where PyG would want a compiled package for those that are near."""

    def forward(self, where: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        edges = (batch[:, None] == batch[None]).nonzero().t()
        between = where[edges[0]] - where[edges[1]]
        apart = edges[0] != edges[1]
        lengths = torch.zeros(edges.shape[1]).to(where)
        lengths[apart] = between[apart].norm(dim=-1)
        return edges, lengths, between


def _visnet() -> Example:
    """An equivariant network on atoms in space, for two molecules of five."""

    def build() -> nn.Module:
        pyg = importlib.import_module("torch_geometric.nn.models")
        model = pyg.ViSNet(num_heads=2, num_layers=2, hidden_channels=16, num_rbf=8)
        model.representation_model.distance = _AllPairs()
        return model

    inputs = {"z": torch.randint(1, 9, (10,)), "pos": torch.randn(10, 3), "batch": torch.arange(10) // 5}
    return build, inputs


PYG: dict[str, Callable[[], Example]] = {
    "gcn": partial(_graph, "GCNConv"),
    "gat": partial(_graph, "GATConv", heads=4),
    "gatv2": partial(_graph, "GATv2Conv", heads=4),
    "sage": partial(_graph, "SAGEConv"),
    "sage_max": partial(_graph, "SAGEConv", aggr="max"),
    "gin": partial(_graph, "GINConv"),
    "visnet": _visnet,
}
