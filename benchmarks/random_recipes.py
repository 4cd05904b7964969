"""Recipes of random networks: how they are drawn, built, and made smaller.

A recipe is JSON data. Every node has a kind and a seed of its own, so that it stays what it is when others are left
out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import random_images
import random_layers
import random_oddities
import random_sequences
import random_weights
import torch
from random_kinds import ANY, CONDITION, FIRST, KINDS, Place, randomise, run
from torch import Tensor, nn

PARTS = (random_images, random_layers, random_oddities, random_sequences, random_weights)  # they register kinds

Recipe = dict[str, Any]
SHAPES = {"vector": (6,), "sequence": (5, 6), "signal": (3, 7), "image": (3, 6, 4), "volume": (2, 4, 3, 3)}
WAYS = {
    "vector": ("Unfold", "Decode"), "sequence": ("Pool", "Pool", "Flatten", "Signal"),
    "signal": ("Pool", "Flatten", "Steps"), "image": ("Pool", "Pool", "Flatten", "Steps"),
    "volume": ("Pool", "Flatten", "Steps"),
}  # fmt: skip
HEADS = ("tensor",) * 6 + ("tuple", "dict", "dataclass", "namespace", "named", "object", "nested", "labels")
WORDS = 11  # the size of the vocabulary
ESTIMATORS = ("arm", "disarm", "ar", "loorf", "arms", "bitflip", "ugc", "disarm-cv", "disarm-mean", "straight-through")


class Named(NamedTuple):
    """An output with names."""

    out: Tensor
    hidden: Tensor | None


@dataclass
class Output:
    """An output as in transformers, but plain."""

    out: Tensor
    hidden: Tensor | None = None


class Result:
    """An output that nothing but its attributes describes."""

    def __init__(self, out: Tensor, hidden: Tensor | None) -> None:
        self.out, self.hidden = out, hidden


class Chain(nn.ModuleList):
    """Pieces in a row."""

    conditional = True

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Run them, and give the condition to those that take it."""
        for piece in self:
            x = piece(x, c) if getattr(piece, "conditional", False) else piece(x)
        return x


class Network(nn.Module):
    """A stem, a chain and a head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.exposed = recipe["head"], recipe["exposed"]
        self.tokens = recipe["start"] == "tokens"
        domain = "sequence" if self.tokens else recipe["start"]
        shape = SHAPES[domain]
        if self.tokens:
            self.stem: nn.Module = nn.Embedding(WORDS, 6)
            x = torch.zeros(3, 5, 6)
        else:
            x = torch.randn(3, *shape)
            place = Place(x, domain, Random(0))
            self.stem = place.mix(place.width, recipe["stem"]) if recipe["stem"] else nn.Identity()
            x = run(self.stem, x)
        place = Place(x, domain, Random(0))
        self.other = nn.Linear(4, place.width) if recipe["other"] else None
        self.first = place.first
        self.chain, x, domain = build_chain(recipe["nodes"], x, domain)
        place = Place(x, domain, Random(0))
        if recipe["tied"] and self.tokens and not place.first:
            self.head: nn.Module = nn.Sequential(nn.Linear(place.width, 6), nn.Linear(6, WORDS, bias=False))
            self.head[1].weight = self.stem.weight
        else:
            self.head = place.mix(place.width, 3) if recipe["last"] else nn.Identity()

    def forward(
        self, x: Tensor, condition: Tensor | None = None, other: Tensor | None = None, factor: float = 1.0
    ) -> Any:
        """Return what the recipe says: a tensor, or something that holds tensors."""
        h = self.stem(x)
        if self.other is not None and other is not None:
            y = self.other(other)
            while y.dim() < h.dim():
                y = y.unsqueeze(-1 if self.first else 1)
            h = h + y
        hidden = None
        for i, piece in enumerate(self.chain):
            h = piece(h, condition) if getattr(piece, "conditional", False) else piece(h)
            if i == self.exposed:
                hidden = h
        out = self.head(h) * factor
        match self.kind:
            case "tuple":
                return out, hidden
            case "dict":
                return {"out": out, "hidden": hidden}
            case "nested":
                return {"out": [out], "more": ({"hidden": hidden},)}
            case "dataclass":
                return Output(out, hidden)
            case "namespace":
                return SimpleNamespace(out=out, hidden=hidden)
            case "named":
                return Named(out, hidden)
            case "object":
                return Result(out, hidden)
            case "labels":
                return out, (out > 0.1234).long()
            case _:
                return out


def build_chain(nodes: list[Recipe], x: Tensor, domain: str) -> tuple[Chain, Tensor, str]:
    """Build pieces in a row; return them, what they give for an example, and its domain."""
    chain = Chain()
    for node in nodes:
        kind = KINDS[node["kind"]]
        if domain not in kind.domains:
            raise ValueError(f"{kind.name} cannot stand in the domain {domain}")
        chains = [lambda y, inner=inner, domain=domain: build_chain(inner, y, domain)[0] for inner in node["inner"]]
        piece = kind.make(Place(x, domain, Random(node["seed"]), chains))
        chain.append(piece)
        x, domain = run(piece, x), kind.to or domain
    return chain, x, domain


def build(recipe: Recipe) -> nn.Module:
    """Build the network of a recipe, in double precision; equal recipes give equal networks."""
    torch.manual_seed(recipe["seed"])
    return randomise(Network(recipe))


def examples(recipe: Recipe, batch: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a network."""
    draw = torch.Generator().manual_seed(seed)
    domain = "sequence" if recipe["start"] == "tokens" else recipe["start"]
    x = torch.randn(batch, *SHAPES[domain], generator=draw, dtype=torch.float64)
    if recipe["start"] == "tokens":
        x = torch.randint(WORDS, (batch, SHAPES[domain][0]), generator=draw)
    more: dict[str, Any] = {}
    if recipe["condition"]:
        more["condition"] = torch.randn(batch, CONDITION, generator=draw, dtype=torch.float64)
    if recipe["other"]:
        more["other"] = torch.randn(batch, 4, generator=draw, dtype=torch.float64)
    if recipe["factor"]:
        more["factor"] = 0.5
    if recipe["keywords"]:
        return (), {"x": x, **more}
    names = ("condition", "other", "factor")
    last = max((i + 1 for i, n in enumerate(names) if n in more), default=0)
    defaults = {"factor": 1.0}
    return (x, *(more.get(n, defaults.get(n)) for n in names[:last])), {}


# -- drawing ----------------------------------------------------------------------------------


def draw_nodes(rng: Random, domain: str, count: int, depth: int) -> list[Recipe]:
    """Draw pieces in a row that stay in a domain."""
    usable = [
        k
        for k in KINDS.values()
        if domain in k.domains and k.often and (depth == 0 or k.keeps) and (depth < 2 or not k.inner)
    ]
    nodes = []
    for kind in rng.choices(usable, [k.often for k in usable], k=count):
        inner = [draw_nodes(rng, domain, rng.choice((1, 1, 2)), depth + 1) for _ in range(kind.inner)]
        nodes.append({"kind": kind.name, "seed": rng.randrange(2**20), "inner": inner})
    return nodes


def draw(seed: int) -> Recipe:
    """Draw the recipe of a network."""
    rng = Random(seed)

    def chance(share: float) -> bool:
        return rng.random() < share

    start = rng.choice(("vector", "sequence", "sequence", "tokens", "signal", "image", "image", "image", "volume"))
    domain = "sequence" if start == "tokens" else start
    nodes = draw_nodes(rng, domain, rng.choice((1, 2, 2, 3, 4)), 0)
    for share in (0.2 if domain == "vector" else 0.75, 0.25):
        if chance(share):
            way = rng.choice(WAYS[domain])
            domain = KINDS[way].to
            nodes.append({"kind": way, "seed": rng.randrange(2**20), "inner": []})
            after = draw_nodes(rng, domain, rng.choice((1, 1, 2, 3)), 0)
            nodes += [{"kind": "Layer", "seed": rng.randrange(2**20), "inner": []}] if way == "Flatten" else []
            nodes += after
    if chance(0.5):
        nodes.append({"kind": "Layer", "seed": rng.randrange(2**20), "inner": []})
    options: dict[str, Any] = {}
    if chance(0.35):
        options["residual"] = True
    if chance(0.15):
        options["inputs"] = [rng.choice(("*", "*", "chain.*"))]
    if chance(0.15):
        options["weights"] = [rng.choice(("*", "[hs]*", "chain.*"))]
    kinds = set(kinds_of(nodes))
    if "Blocks" in kinds and chance(0.7):
        options["blocks"] = ["*blocks.?"]
    elif chance(0.12):
        options["blocks"] = [rng.choice(("chain.?", "chain.?", "*"))]
    if chance(0.15):
        options["exclude"] = rng.randrange(2**20)  # which of the sites: see `random_checks.attach`
    if chance(0.3):
        options["gates"] = rng.choice(("sample", "batch"))
    if chance(0.3):
        options["estimator"] = rng.choice(ESTIMATORS)
    return {
        "seed": seed, "start": start, "stem": rng.choice((0, 4, 6, 8, 8)), "nodes": nodes, "last": chance(0.93),
        "head": rng.choice(HEADS), "exposed": rng.randrange(len(nodes)) if chance(0.5) else None,
        "condition": chance(0.8) if "Modulated" in kinds else chance(0.05), "other": start in ANY and chance(0.12),
        "factor": chance(0.1), "keywords": chance(0.2), "tied": start == "tokens" and chance(0.3),
        "minimum": chance(0.1), "options": options,
    }  # fmt: skip


def kinds_of(nodes: list[Recipe]) -> Iterator[str]:
    """Yield the kind of every node."""
    for node in nodes:
        yield node["kind"]
        for inner in node["inner"]:
            yield from kinds_of(inner)


def draws_numbers(recipe: Recipe) -> bool:
    """Return whether a network draws random numbers in training."""
    return any(KINDS[k].chance for k in kinds_of(recipe["nodes"]))


# -- making smaller ---------------------------------------------------------------------------


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Yield recipes that are simpler by one thing; some of them cannot be built."""
    for nodes in _without_one(recipe["nodes"]):
        yield {**recipe, "nodes": nodes, "exposed": None}
        if recipe["exposed"] is not None:
            yield {**recipe, "nodes": nodes, "exposed": len(nodes) - 1}
    for key in recipe["options"]:
        yield {**recipe, "options": {k: v for k, v in recipe["options"].items() if k != key}}
    plain = {
        "head": "tensor", "exposed": None, "condition": False, "other": False, "factor": False, "keywords": False,
        "tied": False, "minimum": False, "last": True, "stem": 4,
    }  # fmt: skip
    for key, value in plain.items():
        if recipe[key] != value:
            yield {**recipe, key: value}
    domain = "sequence" if recipe["start"] == "tokens" else recipe["start"]
    if domain in FIRST and domain != "signal":
        yield {**recipe, "start": "signal"}
    if recipe["start"] in ("tokens", "sequence"):
        yield {**recipe, "start": "vector"}


def _without_one(nodes: list[Recipe]) -> Iterator[list[Recipe]]:
    """Yield the lists that one node less, or one node replaced by what it holds, leaves."""
    for i, node in enumerate(nodes):
        yield nodes[:i] + nodes[i + 1 :]
        for j, inner in enumerate(node["inner"]):
            yield nodes[:i] + copy.deepcopy(inner) + nodes[i + 1 :]
            for fewer in _without_one(inner):
                if fewer:
                    chains = [*node["inner"][:j], fewer, *node["inner"][j + 1 :]]
                    yield [*nodes[:i], {**node, "inner": chains}, *nodes[i + 1 :]]
