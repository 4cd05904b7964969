"""A network that grows for new data and prunes again: digits 0 to 4 first, then all ten.

Run it with ``python examples/lifelong.py``; it takes about a minute on one core. The old images stay at hand: without
them, any network forgets.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import plasticnet as pn

torch.manual_seed(0)
images, classes = load_digits(return_X_y=True)
order = torch.randperm(len(classes))
x, x_test = (torch.tensor(images).float() / 8 - 1)[order].split([1437, 360])
y, y_test = torch.tensor(classes)[order].split([1437, 360])


def of(labels: Tensor, below: int) -> Tensor:
    """The indices of images of the first classes."""
    return (labels < below).nonzero()[:, 0]


def accuracy(net: pn.PlasticNet, below: int) -> str:
    i = of(y_test, below)
    with torch.no_grad():
        return f"{100 * (net.eval()(x_test[i]).argmax(1) == y_test[i]).float().mean():.1f} %"


def train(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, schedule: pn.Schedule, below: int) -> int:
    """To the end of the schedule; returns how many parameters there were at most."""
    most = 0
    while schedule.epoch < schedule.epochs:
        net.train()
        for i in of(y, below)[torch.randperm(len(of(y, below)))].split(32):
            loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()  # the pressure begins when growth has stopped
            optimizer.step()
        schedule.step()
        most = max(most, net.summary().parameters)
    return most


def report(what: str, net: pn.PlasticNet, most: int) -> None:
    units = "-".join(str(len(site)) for site in net.sites.values())
    now = net.summary().parameters
    known, all_ten = accuracy(net, 5), accuracy(net, 10)
    print(f"{what:<22} units {units:<8} parameters {now:>6,} (at most {most:>6,})  0-4: {known}  0-9: {all_ten}")


def main() -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10))
    net = pn.PlasticNet(model, (x[:2],))
    optimizer = torch.optim.Adam(net.param_groups(lr=3e-3, gate_lr=0.05))
    stages = [pn.Stage(5), pn.Stage(80, k=7.0), pn.Stage(15)]
    pressure = pn.Pressure(2e-5, cost="parameters")
    schedule = pn.Schedule(net, optimizer, stages, growth=pn.Growth(), pressure=pressure)
    report("before", net, net.summary().parameters)
    report("digits 0 to 4", net, train(net, optimizer, schedule, below=5))
    schedule.wake()  # the stages from the first plastic one on, once more
    report("then 0 to 9", net, train(net, optimizer, schedule, below=10))


if __name__ == "__main__":
    main()
