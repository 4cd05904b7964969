"""What must hold of every network of soak_networks.py, through twenty changes of size with training in between."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from random_checks import Progress, check_compact, check_generator, random_logits, resize, train
from random_compare import Wrong, agree
from soak_recipes import Recipe, build, examples
from torch.optim import Optimizer

import plasticnet as pn

RESIZES = 20
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5}}


def life(recipe: Recipe, progress: Progress) -> None:
    """Attach, resize and train again and again, compact, save and load; raise where something is wrong."""
    rng = Random(recipe["seed"])
    model = build(recipe)
    inputs = [examples(recipe, model.inputs, batch, seed) for batch, seed in ((3, 1), (3, 2), (5, 3))]
    plain = copy.deepcopy(model)
    check_generator(model, inputs)

    progress.step = "attach"
    torch.manual_seed(recipe["seed"])
    net = attached(recipe, model, inputs[0])
    sizes = {name: len(site) for name, site in net.sites.items()}
    progress.found |= {"sites": len(sizes), "frozen": dict(net.frozen), "resizes": 0, "cut": 0, "added": 0}
    progress.step = "after attaching"
    agree(plain.eval(), net.eval(), inputs)
    old = "OldNorms" in {node["kind"] for node in recipe["nodes"]}  # torch does not copy a weight that was computed
    spare = attached(recipe, build(recipe), inputs[0]) if old else copy.deepcopy(net)
    net.k = rng.choice((2.0, 7.0, 7.0, float("inf")))
    optimizer = optimizer_of(recipe, net)
    train(net, optimizer, inputs[0], rng)

    for number in range(RESIZES):
        when = f"resize {number + 1} at k={net.k:g}"
        before = {name: len(site) for name, site in net.sites.items()}
        progress.step = when
        if number % 5 == 3:
            random_logits(net, rng)
            net.prune(0.5, optimizer)
        else:
            resize(net, optimizer, rng)
        after = {name: len(site) for name, site in net.sites.items()}
        progress.found["resizes"] += 1
        progress.found["cut"] += sum(max(0, before[n] - after[n]) for n in before)
        progress.found["added"] += sum(max(0, after[n] - before[n]) for n in before)
        progress.step = f"optimizer after {when}"
        check_optimizer(net, optimizer)
        progress.step = f"training after {when}"
        train(net, optimizer, inputs[number % 3], rng)
        check_optimizer(net, optimizer)
        progress.step = f"compact after {when}"
        if number % 4 == 3:
            check_compact(net, inputs)
    check_files(recipe, net, optimizer, spare, inputs, progress)


def attached(recipe: Recipe, model: torch.nn.Module, example: Any) -> pn.PlasticNet:
    """Return a network with gates, as the recipe asks for them."""
    args, kwargs = example
    return pn.PlasticNet(model, {"x": args[0], **kwargs} if kwargs else args, **recipe["options"])


def optimizer_of(recipe: Recipe, net: pn.PlasticNet) -> Optimizer:
    """Return the optimizer that a recipe asks for."""
    name = recipe["optimizer"]
    return getattr(torch.optim, name)(net.param_groups(1e-3), **OPTIONS.get(name, {}))


def check_optimizer(net: pn.PlasticNet, optimizer: Optimizer) -> None:
    """Raise `Wrong` unless an optimizer holds the present parameters, each once, and no state of others."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: name for name, p in net.named_parameters()}
    if len(held) != len(set(held)) or set(held) != set(names):
        raise Wrong(f"the optimizer holds {len(held)} parameters, and the network has {len(names)}")
    gone = [tuple(p.shape) for p in optimizer.state if p not in names]
    if gone:
        raise Wrong(f"stale state: of parameters of the shapes {gone[:5]}, which are gone")
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != p.shape:
                raise Wrong(f"stale state: {key} of {names[p]} is {tuple(value.shape)}, and not {tuple(p.shape)}")
    wrong = [names[p] for p in held if p.grad is not None and p.grad.shape != p.shape]
    if wrong:
        raise Wrong(f"gradients of another shape: {wrong[:5]}")


def check_files(
    recipe: Recipe, net: pn.PlasticNet, optimizer: Optimizer, spare: pn.PlasticNet, inputs: Any, progress: Progress
) -> None:
    """Raise `Wrong` unless the compact module that is saved and loaded, and a checkpoint, give the same network."""
    progress.step = "compact at the end"
    small = net.compact()
    with tempfile.TemporaryDirectory() as folder:
        progress.step = "save"
        pn.save(small, Path(folder) / "small.safetensors")
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        pn.save_checkpoint(state, Path(folder) / "state.safetensors")
        progress.step = "load"
        loaded = pn.load(Path(folder) / "small.safetensors", lambda: build(recipe))
        state = pn.load_checkpoint(Path(folder) / "state.safetensors")
    agree(small, loaded, inputs)
    agree(net.eval(), loaded, inputs)
    progress.step = "load_state_dict"
    spare.load_state_dict(state["net"])
    other = optimizer_of(recipe, spare)
    other.load_state_dict(state["optimizer"])
    agree(net, spare.eval(), inputs)
    check_optimizer(spare, other)
