"""Recipes of the networks of soak_networks.py: graphs of pieces, with more than one input and more than one output.

A recipe is JSON data, and every node has a seed of its own, as in random_recipes.py. A node reads one or two of the
nodes before it, which it adds, multiplies or puts side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import soak_attention
import soak_bridges
import soak_layers
import soak_maps
import soak_steps
import soak_wires
import torch
from random_kinds import Place, randomise, run
from soak_kinds import IDS, KINDS, SIDE, STEPS
from torch import Tensor, nn

PARTS = (soak_attention, soak_bridges, soak_layers, soak_maps, soak_steps, soak_wires)  # they register kinds

Recipe = dict[str, Any]
SHAPES = {"vector": (6,), "sequence": (STEPS, 6), "signal": (3, 2 * STEPS), "image": (3, 4, STEPS)}
MERGES = ("add", "cat", "mul", "gate", "max")
HEADS = ("tuple", "dict", "list")
ESTIMATORS = ("arm", "disarm", "bitflip", "ugc", "disarm-cv", "straight-through")


class Merge(nn.Module):
    """Brings two tensors together; the second one gets the width of the first where this is needed."""

    def __init__(self, first: Place, second: Place, how: str) -> None:
        super().__init__()
        self.how, self.axis = how, first.axis
        same = first.width == second.width and how != "gate"
        self.fit = nn.Identity() if how == "cat" or same else second.mix(second.width, first.width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one tensor."""
        y = self.fit(y)
        match self.how:
            case "add":
                return x + y
            case "mul":
                return x * y
            case "gate":
                return x * y.sigmoid()
            case "max":
                return torch.maximum(x, y)
            case _:
                return torch.cat((x, y), self.axis)


class Network(nn.Module):
    """A stem, a graph of pieces, and one head or more."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, domain = recipe["head"], recipe["start"]
        x = torch.randn(3, *SHAPES[domain])
        place = Place(x, domain, Random(0))
        self.stem = place.mix(place.width, recipe["stem"])
        values, domains, needed = [run(self.stem, x)], [domain], {"ids": False, "side": False}
        examples = {"ids": torch.zeros(3, 2, dtype=torch.long), "side": torch.randn(3, SIDE)}
        self.reads: list[tuple[int, ...]] = []
        self.needs: list[tuple[str, ...]] = []
        self.merges, self.nodes, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for node in recipe["nodes"]:
            kind = KINDS[node["kind"]]
            domain = domains[-1]
            if domain not in kind.domains:
                raise ValueError(f"{kind.name} cannot stand in the domain {domain}")
            begun = len(domains) - next((i for i, d in enumerate(reversed(domains)) if d != domain), len(domains))
            reads = [max(begun, len(values) - back) for back in node["reads"]]
            places = [Place(values[i], domain, Random(0)) for i in reads]
            merge = Merge(places[0], places[1], node["merge"]) if len(reads) > 1 else nn.Identity()
            with torch.no_grad():
                x = merge(*(values[i] for i in reads))
                piece = kind.make(Place(x, domain, Random(node["seed"])))
                needs = getattr(piece, "needs", ())
                more = {name: examples[name] for name in needs}
                values.append(piece.eval()(x, **more))
            piece.train()
            needed |= dict.fromkeys(needs, True)
            domains.append(kind.to or domain)
            self.reads.append(tuple(reads))
            self.needs.append(needs)
            self.merges.append(merge)
            self.nodes.append(piece)
        self.outputs = sorted({max(0, len(values) - back) for back in recipe["outputs"]})
        for i in self.outputs:
            place = Place(values[i], domains[i], Random(0))
            self.heads.append(place.mix(place.width, 3))
        self.inputs = tuple(name for name, read in needed.items() if read)

    def forward(self, x: Tensor, ids: Tensor | None = None, side: Tensor | None = None) -> Any:
        """Return one output, or all of them as the recipe says."""
        more, values = {"ids": ids, "side": side}, [self.stem(x)]
        for reads, needs, merge, node in zip(self.reads, self.needs, self.merges, self.nodes, strict=True):
            h = merge(*[values[i] for i in reads])
            values.append(node(h, **{name: more[name] for name in needs}))
        found = [head(values[i]) for i, head in zip(self.outputs, self.heads, strict=True)]
        if len(found) == 1:
            return found[0]
        if self.kind == "dict":
            return {f"out{i}": t for i, t in enumerate(found)}
        return tuple(found) if self.kind == "tuple" else found


def build(recipe: Recipe) -> Network:
    """Build the network of a recipe, in double precision; equal recipes give equal networks."""
    torch.manual_seed(recipe["seed"])
    network = Network(recipe)
    randomise(network)
    return network


def examples(recipe: Recipe, inputs: tuple[str, ...], batch: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a network that reads these inputs beside the first one."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *SHAPES[recipe["start"]], generator=draw, dtype=torch.float64)
    more = {
        "ids": torch.randint(IDS, (batch, 3), generator=draw),
        "side": torch.randn(batch, SIDE, generator=draw, dtype=torch.float64),
    }
    return (x,), {name: more[name] for name in inputs}


# -- drawing, and making smaller --------------------------------------------------------------


def draw_nodes(rng: Random, domain: str, count: int) -> list[Recipe]:
    """Draw nodes that stay in a domain."""
    usable = sorted(k.name for k in KINDS.values() if domain in k.domains and k.keeps)
    special = [n for n in usable if len(KINDS[n].domains) < 3]  # those that can stand almost nowhere else
    found = []
    for _ in range(count):
        reads = [1, rng.randint(2, 4)] if rng.random() < 0.35 else [1]
        name = rng.choice(special if special and rng.random() < 0.6 else usable)
        found.append({"kind": name, "seed": rng.randrange(2**20), "reads": reads, "merge": rng.choice(MERGES)})
    return found


def draw(seed: int) -> Recipe:
    """Draw the recipe of a network."""
    rng = Random(f"soak {seed}")

    def chance(share: float) -> bool:
        return rng.random() < share

    start = domain = rng.choice(("vector", "sequence", "sequence", "signal", "image", "image"))
    nodes = draw_nodes(rng, domain, rng.choice((1, 2, 2, 3, 4)))
    for share in (0.7, 0.3):
        if chance(share):
            way = rng.choice(sorted(k.name for k in KINDS.values() if domain in k.domains and not k.keeps))
            nodes.append({"kind": way, "seed": rng.randrange(2**20), "reads": [1], "merge": "add"})
            domain = KINDS[way].to
            nodes += draw_nodes(rng, domain, rng.choice((1, 1, 2, 3)))
    options: dict[str, Any] = {}
    if chance(0.35):
        options["residual"] = True
    if chance(0.15):
        options["inputs"] = ["*"]
    if chance(0.1):
        options["weights"] = ["*"]
    if chance(0.1):
        options["blocks"] = ["nodes.?"]
    if chance(0.3):
        options["gates"] = rng.choice(("sample", "batch"))
    if chance(0.3):
        options["estimator"] = rng.choice(ESTIMATORS)
    return {
        "seed": seed, "start": start, "stem": rng.choice((4, 6, 8, 8, 12)), "nodes": nodes,
        "outputs": [1, *([rng.randint(2, 5)] if chance(0.3) else [])], "head": rng.choice(HEADS),
        "optimizer": rng.choice(("Adam", "Adam", "SGD", "AdamW", "RMSprop", "Adagrad")), "options": options,
    }  # fmt: skip


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Yield recipes that are simpler by one thing; some of them cannot be built."""
    nodes = recipe["nodes"]
    for i, node in enumerate(nodes):
        yield {**recipe, "nodes": nodes[:i] + nodes[i + 1 :]}
        if len(node["reads"]) > 1:
            yield {**recipe, "nodes": [*nodes[:i], {**node, "reads": [1]}, *nodes[i + 1 :]]}
    for key in recipe["options"]:
        yield {**recipe, "options": {k: v for k, v in recipe["options"].items() if k != key}}
    for key, value in {"outputs": [1], "stem": 4, "optimizer": "SGD", "head": "tuple"}.items():
        if recipe[key] != value:
            yield {**recipe, key: value}
