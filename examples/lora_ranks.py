"""Learn the rank of every LoRA adapter: start at rank 16, let the gates choose, and hand the ranks back to PEFT.

The weights of the model stay frozen, as always with LoRA. The sites are the ranks, and a budget says how many of them
may stay in all adapters together. What comes out is an ordinary adapter of PEFT, whose ``rank_pattern`` has the ranks.
Run it with ``python examples/lora_ranks.py``, where transformers and peft are installed; it takes a minute on one core.
"""

import copy
import math
import tempfile

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import plasticnet as pn

WORDS, LENGTH, CLASSES, RANK = 24, 10, 4, 16
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]


def base_model() -> nn.Module:
    """Return a tiny BERT with random weights; in real life, this is the model that you have downloaded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=CLASSES, **sizes)
    return BertForSequenceClassification(config)


def task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sentences, shape (count, LENGTH), and their classes.

    Each has one word of 1 to 4 and one of 5 to 8 at random places; the class is the sum of the two, modulo 4. All other
    words are noise. With frozen weights and a trained classifier alone, the model finds no more than chance does.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(9, WORDS, (count, LENGTH), generator=generator)
    first, second = torch.randint(4, (2, count, 1), generator=generator)
    places = torch.rand(count, LENGTH - 1, generator=generator).argsort(1) + 1
    x.scatter_(1, places[:, :1], first + 1)
    x.scatter_(1, places[:, 1:2], second + 5)
    return x, ((first + second) % CLASSES).squeeze(1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of sentences whose class a model finds, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return (model(input_ids=x).logits.argmax(1) == y).float().mean().item()


def ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of every adapter, by the name of the layer in the base model."""
    prefix = "base_model.model."
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {name.removeprefix(prefix): layer.lora_A["default"].out_features for name, layer in layers}


def hand_back(model: PeftModel) -> None:
    """Write the ranks of a model that was cut into the config of PEFT, so that each adapter keeps its scaling."""
    config, found = model.peft_config["default"], ranks(model)
    scaling = {name: model.get_submodule(f"base_model.model.{name}").scaling["default"] for name in found}
    root = math.sqrt if config.use_rslora else float  # what the alpha is divided by
    config.rank_pattern = dict(found)
    config.alpha_pattern = {name: scaling[name] * root(rank) for name, rank in found.items()}


def main() -> None:
    x, y = task(4000, seed=1)
    x_test, y_test = task(1000, seed=2)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="SEQ_CLS")
    model = get_peft_model(base_model(), config)
    net = pn.PlasticNet(model, {"input_ids": x[:2]}, exclude=("*base_layer", "*pooler*"))  # the ranks are left
    print(f"{len(net.sites)} adapters of rank {RANK}", end="\n\n")

    optimizer = torch.optim.Adam(net.param_groups(lr=5e-3, gate_lr=0.1))
    stages = [pn.Stage(16, k=math.inf), pn.Stage(14, k=7.0), pn.Stage(6, k=math.inf)]
    schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(units=0.25))
    for epoch in range(schedule.epochs):
        net.train()
        for i in torch.randperm(len(x)).split(64):
            xs, ys = x[i], y[i]
            loss = net.expected_loss(
                lambda xs=xs, ys=ys: F.cross_entropy(net(input_ids=xs).logits, ys, reduction="none")
            )
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1:2}  loss {loss.item():6.3f}  ranks {list(ranks(model).values())}")
        if epoch == stages[0].epochs - 1:
            before = accuracy(net, x_test, y_test)

    small = net.compact()  # a PeftModel, as the one above
    hand_back(small)
    print()
    for name, rank in ranks(small).items():
        print(f"{rank:2} of {RANK}  {name}")
    print(
        f"{sum(ranks(small).values())} of {RANK * len(ranks(small))} ranks stay. Test accuracy before: {before:.1%}, ",
        end="",
    )
    print(f"and with the ranks that were learned: {accuracy(small, x_test, y_test):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base_model(), folder)
    assert ranks(loaded) == ranks(small)
    loaded.double()  # so that a difference is one of the networks, and not of rounding
    merged = copy.deepcopy(loaded).merge_and_unload()
    with torch.no_grad():
        expected = small.double().eval()(input_ids=x_test).logits
        for what, other in (("loaded by PEFT", loaded), ("loaded and merged", merged)):
            error = (other.eval()(input_ids=x_test).logits - expected).abs().max().item()
            print(f"{what}: the outputs differ by at most {error:.1e}")
            assert error < 1e-9


if __name__ == "__main__":
    main()
