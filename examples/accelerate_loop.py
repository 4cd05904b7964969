"""Your own loop with Accelerate: mixed precision, accumulated gradients, several processes, and going on from a state.

Nothing of plasticnet is needed but what a plain loop needs. Run it in one process or in several:

    python examples/accelerate_loop.py --precision bf16
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --precision bf16
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --folder state      # and with --resume, to go on

It takes some ten seconds on one core.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import plasticnet as pn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--folder", help="where the state is saved after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=int, default=10**6, help="the epoch to stop at, to go on later")
    given = parser.parse_args()

    set_seed(given.seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, x_test = (torch.tensor(images).float() / 8 - 1)[order].split([1437, 360])
    y, y_test = torch.tensor(labels)[order].split([1437, 360])
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True)

    accelerator = Accelerator(
        cpu=given.cpu,
        mixed_precision=given.precision,
        gradient_accumulation_steps=given.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # to go on with the same batches
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    net = pn.PlasticNet(model, (x[:2],))
    optimizer = torch.optim.AdamW(net.param_groups(3e-3))
    stages = [pn.Stage(1), pn.Stage(12, k=7.0), pn.Stage(5)]
    schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(macs=0.25))  # before the network is made smaller
    most = 0.25 * net.summary().macs
    wrapped, stepper, loader = accelerator.prepare(net, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)
    if given.resume:
        accelerator.load_state(given.folder)

    for epoch in range(schedule.epoch, min(schedule.epochs, given.stop)):
        wrapped.train()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for xs, ys in loader:
            with accelerator.accumulate(wrapped):
                loss = net.expected_loss(lambda xs=xs, ys=ys: F.cross_entropy(wrapped(xs), ys, reduction="none"))
                accelerator.backward(loss + schedule.penalty())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                stepper.zero_grad()
        schedule.step()
        if given.folder:
            accelerator.save_state(given.folder)
        accelerator.print(f"epoch {epoch + 1:2}  units {[len(s) for s in net.sites.values()]}")

    sizes = torch.tensor([len(s) for s in net.sites.values()], device=accelerator.device)
    everywhere = accelerator.gather(sizes).view(accelerator.num_processes, -1)
    assert (everywhere == sizes).all(), "the ranks have networks of other sizes"
    if schedule.epoch == schedule.epochs:
        assert net.summary().macs <= most, "the budget is not met"
        small = net.compact().cpu()
        right = (small(x_test).argmax(1) == y_test).float().mean()
        total = sum(p.double().abs().sum() for p in small.parameters())
        accelerator.print(f"{net.summary().macs:,} of {4 * most:,.0f} multiply-adds, test accuracy {right:.2%}")
        accelerator.print(f"sum of all weights, without signs: {total:.12f}")


if __name__ == "__main__":
    main()
