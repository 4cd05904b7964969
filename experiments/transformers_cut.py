"""Small transformers, trained here, cut at once by several scores, and repaired: accuracy or perplexity on test data.

Four architectures of ``transformers``, from random weights: a ViT on 20,000 images of Fashion-MNIST, a BERT on the
sentences of SST-2 (the words of its training part are the vocabulary), and GPT-2 and Llama on the characters of tiny
Shakespeare (90 % to train on, the last 5 % to test on). Heads and the hidden units of the MLPs are cut to a share of
the multiply-adds, in one row of each share whole layers, too. Nothing is trained after the cut. Scores and repair read
the same training inputs. Test data are read at the end of each row and decide nothing.

Scores are those of `pn.scores`. "fisher" and "repair" read no labels; "fisher, loss" and "gate" read the loss that the
network was trained with.

Some minutes for each network and seed on one core, half of them training: python experiments/transformers_cut.py
--data-dir DIR --network vit --seed 0. Trained weights stay in --cache. Adds rows to results/transformers_cut.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write, written
from repair import fashion
from torch import Tensor, nn

import plasticnet as pn

KINDS = ("repair", "fisher", "fisher, loss", "gate", "magnitude")
SHARES = (0.75, 0.5, 0.25)
LENGTH, CONTEXT, PADDING, UNKNOWN = 40, 64, 0, 1  # words of a sentence, characters of a window, and two words
NAME = "transformers_cut"


class Logits(nn.Module):
    """A network of ``transformers`` that returns nothing but its logits.

    Args:
        network: The network.
        padded: Whether its inputs are numbers of words, of which some are padding.
    """

    def __init__(self, network: nn.Module, padded: bool = False) -> None:
        super().__init__()
        self.network, self.padded = network, padded

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) to (batch, ..., classes)."""
        return self.network(x, attention_mask=x.ne(PADDING).long()).logits if self.padded else self.network(x).logits


@dataclass(frozen=True)
class Data:
    """Inputs and labels to train on, and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Task:
    """A network and how it is trained.

    Attributes:
        build: Makes it with random weights.
        data: Reads its data from a folder.
        layers: A name pattern of its layers.
        steps: How many steps it is trained.
        batch: The size of a batch.
        rate: The largest learning rate.
        calibrate: How many inputs scores and repair read.
    """

    build: Callable[[], nn.Module]
    data: Callable[[Path], Data]
    layers: str
    steps: int
    batch: int
    rate: float
    calibrate: int


def vit() -> nn.Module:
    """A ViT with four layers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, num_labels=10, hidden_size=64, intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    return Logits(ViTForImageClassification(config))


def bert() -> nn.Module:
    """A BERT with two layers."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.3,
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config), padded=True)


def gpt2() -> nn.Module:
    """A GPT-2 with four layers: LayerNorm, GELU, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=CHARACTERS, n_positions=CONTEXT, n_embd=96, n_layer=4, n_head=4, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """A Llama with four layers: RMSNorm, SwiGLU, rotary embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CHARACTERS, max_position_embeddings=CONTEXT, hidden_size=96, intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=4, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


def images(folder: Path) -> Data:
    """20,000 images of Fashion-MNIST, and all that are for tests."""
    x, y = fashion(folder, train=True)
    return Data(x[:20_000], y[:20_000], *fashion(folder, train=False))


WORDS = 6000  # the most frequent words of the training part


def sentences(folder: Path, test: str = "test") -> Data:
    """SST-2: sentences as numbers of words, padded at the end."""

    def read(part: str) -> list[tuple[list[str], int]]:
        lines = (folder / "text" / "sst2" / f"{part}.tsv").read_text().splitlines()
        return [(words.split(), int(label)) for words, label in (line.rsplit("\t", 1) for line in lines)]

    train = read("train")
    counts = Counter(word for words, _ in train for word in words)
    numbers = {word: i + UNKNOWN + 1 for i, (word, _) in enumerate(counts.most_common(WORDS - UNKNOWN - 1))}

    def tensors(rows: list[tuple[list[str], int]]) -> tuple[Tensor, Tensor]:
        x = torch.full((len(rows), LENGTH), PADDING)
        for i, (words, _) in enumerate(rows):
            found = torch.tensor([numbers.get(word, UNKNOWN) for word in words[:LENGTH]])
            x[i, : len(found)] = found
        return x, torch.tensor([label for _, label in rows])

    return Data(*tensors(train), *tensors(read(test)))


CHARACTERS = 65


def characters(folder: Path, test: tuple[float, float] = (0.95, 1.0)) -> Data:
    """Tiny Shakespeare: all windows of the first 90 %, and those side by side of another part."""
    text = (folder / "text" / "tinyshakespeare" / "input.txt").read_text()
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    assert len(numbers) == CHARACTERS
    ids = torch.tensor([numbers[character] for character in text])
    first, last = (int(share * len(ids)) for share in test)
    windows = ids[: int(0.9 * len(ids))].unfold(0, CONTEXT + 1, 1)
    others = ids[first:last].unfold(0, CONTEXT + 1, CONTEXT)
    return Data(windows[:, :-1], windows[:, 1:], others[:, :-1], others[:, 1:])


TASKS = {
    "vit": Task(vit, images, "network.vit.layers.?", 2500, 128, 2e-3, 2048),
    "bert": Task(bert, sentences, "network.bert.encoder.layer.?", 500, 64, 1e-3, 2048),
    "gpt2": Task(gpt2, characters, "network.transformer.h.?", 1000, 32, 3e-3, 512),
    "llama": Task(llama, characters, "network.model.layers.?", 1000, 32, 3e-3, 512),
}


def losses(output: Tensor, y: Tensor) -> Tensor:
    """The losses of samples, shape (batch,): of a sequence the mean over its positions."""
    return F.cross_entropy(output.movedim(-1, 1), y, reduction="none").reshape(len(y), -1).mean(1)


def train(task: Task, model: nn.Module, data: Data) -> None:
    """Train a network with AdamW along one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=task.steps, pct_start=0.1)
    model.train()
    rows = iter(())
    for _ in range(task.steps):
        if (i := next(rows, None)) is None:
            rows = iter(torch.randperm(len(data.x)).split(task.batch))
            i = next(rows)
        optimizer.zero_grad()
        losses(model(data.x[i]), data.y[i]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()


def trained(name: str, seed: int, data: Data, cache: Path) -> tuple[nn.Module, float]:
    """A trained network in evaluation mode, from the cache where it is there, and the CPU seconds of its training."""
    path, task = cache / f"{name}-{seed}.pt", TASKS[name]
    torch.manual_seed(seed)
    model = task.build()
    if not path.exists():
        begun = time.process_time()
        train(task, model, data)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"state": model.state_dict(), "seconds": time.process_time() - begun}, path)
    saved = torch.load(path)
    model.load_state_dict(saved["state"])
    return model.eval(), saved["seconds"]


def chosen(data: Data, n: int) -> Tensor:
    """The numbers of the training inputs that scores and repair read, evenly spread over all."""
    return torch.linspace(0, len(data.x) - 1, n).long()


@torch.no_grad()
def measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean loss, and the share of right answers in percent."""
    model.eval()
    loss = right = 0.0
    for a, b in zip(x.split(500), y.split(500), strict=True):
        output = model(a)
        loss += float(losses(output, b).sum())
        right += float(output.argmax(-1).eq(b).double().reshape(len(b), -1).mean(1).sum())
    return {"loss": loss / len(x), "accuracy": 100 * right / len(x)}


def scored(net: pn.PlasticNet, kind: str, x: Tensor, y: Tensor, batch: int) -> dict[str, Tensor]:
    """The scores of one kind, from these inputs; labels are read by those that need a loss."""
    if kind in ("repair", "fisher"):
        return pn.scores(net, kind, batches=x.split(batch))
    if kind == "magnitude":
        return pn.scores(net, kind)
    labelled = zip(x.split(batch), y.split(batch), strict=True)

    def loss() -> Tensor:
        inputs, wanted = next(labelled)
        return losses(net(inputs), wanted)

    return pn.scores(net, kind.split(",")[0], loss, batches=len(x.split(batch)))


def row(net: pn.PlasticNet, found: dict[str, Tensor], kind: str, share: float, x: Tensor, data: Data) -> dict[str, Any]:
    """Cut a copy of a network by these scores, repair it, and measure it after each step."""
    net = copy.deepcopy(net)
    whole = net.summary().macs
    pn.prune_once(net, pn.Budget(macs=share), scores=found, per_cost=kind.startswith(("repair", "fisher")), cut=False)
    at_once = measured(net.compact(), data.test_x, data.test_y)
    begun = time.process_time()
    repaired = pn.repair(net, x.split(128))
    seconds = time.process_time() - begun
    return {
        "units": {n: [int(s.open.sum()), len(s)] for n, s in net.sites.items()},
        "macs": net.summary().open_macs / whole,
        "at once": {**at_once, "error": repaired.before},
        "repaired": {**measured(net.compact(), data.test_x, data.test_y), "error": repaired.after},
        "repair_cpu_seconds": seconds,
    }


def main() -> None:
    """Measure one network, by all kinds of scores and at all shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/transformers_cut"))
    parser.add_argument("--network", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seed:
        for name in options.network:
            measure(name, seed, options.data_dir, options.cache)


def measure(name: str, seed: int, folder: Path, cache: Path) -> None:
    """Measure one network, and write its rows one by one."""
    keys = ("network", "seed", "scores", "blocks", "share")
    todo = [(name, seed, kind, False, share) for kind in KINDS for share in SHARES]
    todo += [(name, seed, "repair", True, share) for share in SHARES]
    done = {tuple(r[k] for k in keys) for r in written(NAME)}
    if all(t in done for t in todo):
        return
    task = TASKS[name]
    data = task.data(folder)
    model, seconds = trained(name, seed, data, cache)
    before = measured(model, data.test_x, data.test_y)
    i = chosen(data, task.calibrate)
    x, y = data.x[i], data.y[i]
    for kind, blocks in dict.fromkeys(t[2:4] for t in todo if t not in done):
        net = pn.PlasticNet(copy.deepcopy(model), (x[:2],), blocks=(task.layers,) if blocks else ())
        begun = time.process_time()
        found = scored(net, kind, x, y, 128)
        score_seconds = time.process_time() - begun
        for t in todo:
            if t in done or t[2:4] != (kind, blocks):
                continue
            new = {
                **dict(zip(keys, t, strict=True)),
                "train_cpu_seconds": seconds,
                "whole": before,
                "score_cpu_seconds": score_seconds,
                **row(net, found, kind, t[-1], x, data),
                "frozen": dict(net.frozen),
            }
            print({k: v for k, v in new.items() if k not in ("units", "frozen")}, flush=True)
            settings = {n: {k: v for k, v in vars(s).items() if not callable(v)} for n, s in TASKS.items()}
            write(NAME, settings, [*written(NAME), new])


if __name__ == "__main__":
    main()
