"""A small BERT, trained on SST-2 by the Trainer of Hugging Face, and then cut to half of its multiply-adds by it.

Attention heads and the hidden units of the MLPs are pruned. The folder holds SST-2 as train.tsv and dev.tsv, with a
sentence and a class in each row:

    python examples/bert_in_trainer.py --sst2 DIR

It takes some five minutes on one core. The network has random weights at first, and its vocabulary is that of the
training sentences, so that nothing is downloaded.
"""

import argparse
import csv
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import plasticnet as pn
from plasticnet.huggingface import PlasticCallback, PlasticTrainer

LENGTH, WORDS = 40, 6000
Rows = list[dict[str, torch.Tensor]]


def sentences(path: Path) -> list[tuple[list[str], int]]:
    """The words and the class of each row."""
    with path.open(newline="") as file:
        return [
            (words.split(), int(label)) for words, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def rows(found: list[tuple[list[str], int]], vocabulary: dict[str, int]) -> Rows:
    """What the Trainer takes: 0 is padding, 1 is an unknown word, and 2 stands before the first word."""
    made = []
    for words, label in found:
        ids = [2, *(vocabulary.get(word, 1) for word in words)][:LENGTH]
        mask = [1] * len(ids) + [0] * (LENGTH - len(ids))
        ids += [0] * (LENGTH - len(ids))
        made.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": label})
    return made


def accuracy(prediction) -> dict[str, float]:
    """What the Trainer reports beside the loss."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def run(folder: Path, seed: int = 0, dense_epochs: int = 4, epochs: int = 8) -> dict[str, float]:
    """Train, prune and return what came of it: accuracies and multiply-adds, before and after."""
    set_seed(seed)
    torch.set_num_threads(1)
    train = sentences(folder / "train.tsv")
    counts = Counter(word for words, _ in train for word in words)
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS), start=3)}
    train, validation = rows(train, vocabulary), rows(sentences(folder / "dev.tsv"), vocabulary)
    config = BertConfig(
        vocab_size=WORDS + 3, hidden_size=96, num_hidden_layers=3, num_attention_heads=6, intermediate_size=384,
        max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)

    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 256, "use_cpu": True,
            "report_to": [], "save_strategy": "no", "logging_strategy": "no", "seed": seed, "disable_tqdm": True,
            "weight_decay": 0.05,
        }  # fmt: skip
        arguments = TrainingArguments(num_train_epochs=dense_epochs, learning_rate=5e-4, **common)
        trainer = Trainer(
            model, arguments, train_dataset=train, eval_dataset=validation, compute_metrics=accuracy
        )  # fmt: skip
        trainer.train()
        before = trainer.evaluate()["eval_accuracy"]

        # The five lines of plasticnet: its import above, the network, the stages, the callback and the Trainer.
        example = {name: torch.stack([torch.as_tensor(row[name]) for row in train[:2]]) for name in train[0]}
        net = pn.PlasticNet(model, example, outputs=lambda out: out["logits"])
        macs = net.summary().macs
        stages = [pn.Stage(epochs // 2, k=7.0), pn.Stage(epochs - epochs // 2)]
        callback = PlasticCallback(stages, budget=pn.Budget(macs=0.5))
        arguments = TrainingArguments(num_train_epochs=epochs, learning_rate=3e-4, **common)
        trainer = PlasticTrainer(
            net, arguments, train_dataset=train, eval_dataset=validation, compute_metrics=accuracy,
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
    print(net.summary())
    return {
        "before": 100 * before, "after": 100 * after, "macs before": macs, "macs after": net.summary().macs,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, required=True, help="the folder that holds train.tsv and dev.tsv")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = run(given.sst2, given.seed)
    print(
        f"accuracy {found['before']:.1f} % before, {found['after']:.1f} % after, with "
        f"{found['macs after'] / found['macs before']:.0%} of the multiply-adds"
    )
