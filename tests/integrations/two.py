"""Trains in one of two processes that torchrun has started, and writes what each of them ends with.

Run as ``python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.integrations.two NAME FOLDER PHASE``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import plasticnet as pn
from tests.integrations import task

EPOCHS, KILLED = 10, 6
RANK = int(os.environ.get("RANK", "0"))


def lightning(folder: Path, phase: str) -> Any:
    """Fit under DDP."""
    import lightning.pytorch as L

    from plasticnet.lightning import PlasticCallback
    from tests.integrations.kit_lightning import Module, Scheduled, Stop

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)  # the sampler takes its seed from it
    rich = phase == "rich"
    module = Scheduled() if rich else Module()
    torch.manual_seed(100 + RANK if phase != "resumed" else 200 + RANK)
    callback = PlasticCallback(task.stages(), budget=task.budget(), monitor="val_loss")
    saving = L.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    more = [Stop(KILLED)] if phase == "stopped" else []
    strategy = "ddp_spawn" if phase == "spawn" else "ddp"
    options: dict[str, Any] = {}
    if rich:
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
        more.append(L.callbacks.StochasticWeightAveraging(5e-3, swa_epoch_start=4))
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=EPOCHS, callbacks=[callback, saving, *more],
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    start = str(folder / f"epoch={KILLED - 1}.ckpt") if phase == "resumed" else None
    held_out = DataLoader(task.dataset(256, 2), 256)  # without a generator, which torch cannot hand to what it spawns
    trainer.fit(module, task.loader(16), held_out, ckpt_path=start)
    return module.net, trainer.optimizers, None


def huggingface(folder: Path, phase: str) -> Any:
    """Train in the Trainer."""
    from tests.integrations.kit_huggingface import Stop, accuracy, network, trainer

    rich = phase == "rich"
    torch.manual_seed(0)
    net = network()
    torch.manual_seed(100 + RANK if phase != "resumed" else 200 + RANK)
    options: dict[str, Any] = {"save_strategy": "epoch", "per_device_train_batch_size": 16}
    if rich:
        options |= {
            "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "bf16": True, "lr_scheduler_type": "linear",
            "load_best_model_at_end": True, "eval_strategy": "epoch", "learning_rate": 1e-2,
        }  # fmt: skip
    found = trainer(folder, net, more=[Stop(KILLED)] if phase == "stopped" else [], **options)
    found.train(resume_from_checkpoint=phase == "resumed")
    return net, [found.optimizer], accuracy(net)


def main() -> None:
    """Run one phase."""
    name, folder, phase = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        net, optimizers, accuracy = {"lightning": lightning, "huggingface": huggingface}[name](folder, phase)
    except KeyError as error:
        if phase != "stopped" or "stopped by the test" not in str(error):
            raise
        os._exit(0)  # the other process stops by itself, too
    assert isinstance(net, pn.PlasticNet)
    # Processes that were spawned have kept their optimizers.
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    found = {
        "state": net.state_dict(),
        "parameters": task.parameters(net),
        "k": net.k,
        "held": phase == "spawn" or held == {id(p) for p in net.parameters()},
        "accuracy": task.accuracy(net) if accuracy is None else accuracy,
    }
    folder.mkdir(exist_ok=True)
    torch.save(found, folder / f"{phase}-{RANK}.pt")


if __name__ == "__main__":
    main()
