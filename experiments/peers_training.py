"""What all ways of peers.py share: the training, the cost that decides whether a budget is met, and cutting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peers_tasks import Task
from pruning import cycle, renewed
from torch import Tensor, nn

import plasticnet as pn

CALIBRATE, DECAY, CLIP = 2048, 0.01, 1.0
Losses = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """What a way begins with.

    Attributes:
        task: The task.
        dense: The wide network, trained.
        outputs: Its outputs for the inputs to train on, or None where these are too many to keep.
        seed: The seed of the run.
    """

    task: Task
    dense: nn.Module
    outputs: Tensor | None
    seed: int

    def taught(self, network: nn.Module, i: Tensor) -> Tensor:
        """The losses of the training inputs with these numbers, which also ask for the wide network's outputs."""
        x, y = (part[i] for part in self.task.parts[0])
        with torch.no_grad():
            teacher = self.dense(x) if self.outputs is None else self.outputs[i]
        return self.task.taught(network(x), teacher, y)

    def labelled(self, network: nn.Module, i: Tensor) -> Tensor:
        """The losses of the training inputs with these numbers, from labels alone."""
        x, y = (part[i] for part in self.task.parts[0])
        return self.task.losses(network(x), y)

    def chosen(self) -> Tensor:
        """The numbers of the training inputs that scores, repair and statistics read."""
        n = len(self.task.parts[0][0])
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:CALIBRATE]


def batches(task: Task) -> Iterator[Tensor]:
    """The numbers of the training inputs of an epoch, batch by batch."""
    n = len(task.parts[0][0])
    order = torch.randperm(n) if task.rows is None else torch.randint(n, (task.rows,))
    yield from order.split(task.batch)


def train(
    task: Task,
    network: nn.Module,
    epochs: int,
    rate: float,
    losses: Losses,
    extra: Callable[[], Tensor] | None = None,
    own: Sequence[nn.Parameter] = (),
    own_rate: float = 0.0,
    after_epoch: Callable[[int, torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
) -> None:
    """Train a network in place.

    Args:
        task: The task.
        network: The network.
        epochs: The epochs.
        rate: The largest learning rate.
        losses: The losses of the training inputs with some numbers.
        extra: What is added to the mean loss of every step.
        own: Parameters that are not the network's, such as gates.
        own_rate: Their learning rate, which does not change.
        after_epoch: Called with the number of each epoch that is over and the optimizer; it returns the one that goes
            on, for a network that has changed.
    """
    groups = [{"params": list(network.parameters()), "weight_decay": DECAY}]
    if own:
        groups.append({"params": list(own), "weight_decay": 0.0, "lr": own_rate})
    optimizer = torch.optim.AdamW(groups, rate)
    for epoch in range(epochs):
        network.train()
        order = list(batches(task))
        for n, i in enumerate(order):
            optimizer.param_groups[0]["lr"] = cycle((epoch + n / len(order)) / epochs, rate)
            loss = losses(network, i).mean()
            if extra is not None:
                loss = loss + extra()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
        if after_epoch is not None:
            optimizer = after_epoch(epoch, optimizer)
    network.eval()


def gated(start: Start) -> pn.PlasticNet:
    """A network around a copy of the wide one."""
    return pn.PlasticNet(copy.deepcopy(start.dense), (start.task.parts[0][0][:2],))


def anew(start: Start, widths: Mapping[str, int]) -> nn.Module:
    """A network of these widths with random weights."""
    torch.manual_seed(start.seed)
    return renewed(gated(start), widths)


@torch.no_grad()
def scale(net: pn.PlasticNet, factors: Mapping[str, Tensor]) -> None:
    """Multiply what reads the units of each site by a factor for each unit, shape (units,)."""
    for name, factor in factors.items():
        for s in net.sites[name].units.slices:
            if s.consumed:
                weight = net.model.get_parameter(s.tensor)
                by = torch.ones(weight.shape[s.dim])
                by[torch.from_numpy(s.index)] = factor[:, None].expand(-1, s.index.shape[1])
                weight.mul_(by.view([-1 if d == s.dim else 1 for d in range(weight.dim())]))


def by_scores(net: pn.PlasticNet, scores: Mapping[str, Tensor], share: float, uniform: bool = False) -> nn.Module:
    """The network without the units that score least, so that it meets the budget."""
    scope = "uniform" if uniform else "global"
    found = {name: scores[name] for name in net.sites}
    pn.prune_once(net, pn.Budget(macs=share), scores=found, per_cost=False, scope=scope)
    return net.compact()


class Points:
    """Multiplies the units of a network by numbers, which ways that are not plasticnet's learn.

    Args:
        task: The task, whose ``points`` say where.
        network: The network.
    """

    def __init__(self, task: Task, network: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        self._handles = [
            network.get_submodule(module).register_forward_hook(self._hook(site, axis))
            for site, (module, axis) in task.points.items()
        ]

    def _hook(self, site: str, axis: int) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        def multiply(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
            if site not in self.values:
                return None
            values = self.values[site]  # (units,) or (batch, units)
            shape = [1] * output.dim()
            shape[axis] = values.shape[-1]
            if values.dim() == 2:
                shape[0] = len(values)
            return output * values.view(shape)

        return multiply

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
