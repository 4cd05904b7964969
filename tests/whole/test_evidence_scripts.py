"""The experiments that compare ways to a smaller network, and those of the paper, for a few steps."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import plasticnet as pn
from plasticnet.apps.models import MLP

sys.path.append(str(Path(__file__).parents[2] / "experiments"))

import cifar
import cifar_gates
import cifar_scratch
import common
import lenet_targets
import paper_cifar
import peers
import peers_standing
import peers_table
from peers_tasks import MLP_POINTS, Task, Transformer
from peers_training import Points
from peers_ways import SETTINGS, WIDE
from pruning import operations


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    return tmp_path


def clouds() -> Task:
    """Four clouds of points, of which two are close to each other."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(4, 6)

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(n) % 4
        return centres[y] + 0.5 * torch.randn(n, 6), y

    parts = part(256), part(64), part(64)
    return Task(parts, lambda: MLP([6, 32, 24, 4]), MLP_POINTS, ("5",), (0.6, 0.5, 0.3, 0.2), 4, 4, 32, 5e-3)


@pytest.mark.parametrize("way", [way for way in SETTINGS if not way.startswith("Torch-Pruning")])
def test_every_way_meets_the_budget(way: str) -> None:
    if way == "GroMo":
        pytest.importorskip("gromo")
    task = clouds()
    start, _ = peers.started(task, 0)
    before = [p.clone() for p in start.dense.parameters()]
    rows = [peers.run(way, start, 0.3, s, {"1": 12, "3": 8}) for s in SETTINGS[way][:: len(SETTINGS[way]) - 1]]
    assert all("failed" not in row for row in rows), rows
    assert all(row["macs"] <= 0.3 or way == WIDE for row in rows)
    assert min(row["test"] for row in rows) < 60
    assert all(torch.equal(p, q) for p, q in zip(start.dense.parameters(), before, strict=True))


def test_torch_pruning_meets_the_budget() -> None:
    pytest.importorskip("torch_pruning")
    start, _ = peers.started(clouds(), 0)
    for way in ("Torch-Pruning, Taylor", "Torch-Pruning, norm"):
        for setting in SETTINGS[way]:
            assert peers.run(way, start, 0.3, setting, {})["macs"] <= 0.3


def test_a_way_that_fails_says_so() -> None:
    start, _ = peers.started(clouds(), 0)
    assert "cannot be met" in peers.run("magnitude", start, 1e-4, {"uniform": False, "rate": 1e-3}, {})["failed"]


def test_points_multiply_what_is_cut_in_the_end() -> None:
    """A unit that is multiplied by 0 at its point is a unit that is cut: in an MLP, and heads of a transformer."""
    torch.manual_seed(0)
    mlp, x = MLP([6, 32, 24, 4]), torch.randn(5, 6)
    transformer, words = Transformer(30, 7, 16, 1, 2, False, 0.0), torch.randint(1, 30, (5, 7))
    heads = {"blocks.0.q": ("blocks.0.heads", 1), "blocks.0.up": ("blocks.0.act", 2)}
    for model, inputs, points, site in ((mlp, x, MLP_POINTS, "3"), (transformer, words, heads, "blocks.0.q")):
        model.double().eval()
        inputs = inputs if inputs.dtype == torch.long else inputs.double()
        net = pn.PlasticNet(model, (inputs,))
        task = replace(clouds(), points=points)
        values = torch.ones(len(net.sites[site])).double()
        values[1] = 0
        multiplied = Points(task, model)
        multiplied.values = {site: values}
        expected = model(inputs)
        multiplied.remove()
        net.resize({site: [i for i in range(len(values)) if i != 1]})
        torch.testing.assert_close(net.compact()(inputs), expected, atol=1e-12, rtol=0)


def test_operations_are_those_of_the_layers() -> None:
    assert operations(MLP([6, 32, 24, 4]), torch.zeros(2, 6)) == 6 * 32 + 32 * 24 + 24 * 4


@pytest.mark.parametrize("by", [0, 1, 2])
def test_a_teacher_answers_the_images_that_it_is_shown(by: int) -> None:
    torch.manual_seed(0)
    teacher, x = lenet_targets.LeNet(), torch.randn(7, 1, 28, 28)
    answers = lenet_targets.answers(teacher, x, by)
    assert answers.shape == (2 * by + 1, 2 * by + 1, 7, 10)
    down, right = cifar.moves(7, by)
    torch.testing.assert_close(answers[down, right, torch.arange(7)], teacher(cifar.shifted(x, by, down, right)))
    torch.testing.assert_close(answers[by, by], teacher(x))  # in the middle nothing is moved
    torch.manual_seed(3)
    images = cifar.moved(x, by)
    torch.manual_seed(3)
    assert torch.equal(images, cifar.shifted(x, by, *cifar.moves(7, by)))


def errors_of(task: str, way: str, tuned: float, budgets: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows of a way: one for tuning, and those of two seeds at three budgets."""
    tuning = {"task": task, "way": way, "share": 0.3, "seed": 100, "setting": {"rate": 1}, "validation": tuned}
    rows = [
        {"task": task, "way": way, "share": share, "seed": seed, "setting": {"rate": 1}, "test": test}
        for share, tests in zip((0.5, 0.3, 0.1), budgets, strict=True)
        for seed, test in enumerate(tests)
    ]
    return [tuning, *rows]


def test_budgets_are_counted_at_which_a_way_is_better_level_and_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_standing, "OURS", ("shrink", "gates"))
    monkeypatch.setattr(peers_standing, "PEERS", ("magnitude", "same widths"))
    shrink = [(1.0, 1.0), (1.1, 1.1), (2.0, 2.0)]
    rows = [
        *errors_of("clouds", "shrink", 1.0, shrink),
        *errors_of("clouds", "gates", 2.0, [(9.0, 9.0)] * 3),
        *errors_of(
            "clouds", "magnitude", 1.0, [(2.0, 2.0), (1.0, 1.2), (1.0, 1.2)]
        ),  # behind, level by its mean, ahead
        *errors_of("clouds", "same widths", 1.0, [(0.5, 0.5), (2.0, 2.0), (1.8, 2.1)]),  # ahead, behind, level
        *errors_of("ETTh1", "shrink", 1.0, shrink),
        *errors_of("ETTh1", "magnitude", 1.0, [(0.0, 0.0)] * 3),
    ]
    lines = peers_standing.verdict(rows).splitlines()
    assert lines[2:4] == [
        "| clouds | shrink | 2 / 0 / 1 | 1 / 1 / 1 | 1 of 3 |",
        "| clouds | gates | 0 / 0 / 3 | 0 / 0 / 3 | 0 of 3 |",
    ]
    assert (
        peers_standing.totals(rows).splitlines()[2] == "| shrink | 2 / 0 / 1 | 1 / 1 / 1 |"
    )  # without the seventh task


def test_only_the_setting_that_validation_data_choose_counts() -> None:
    rows = errors_of("clouds", "shrink", 2.0, [(1.0, 1.0)] * 3)
    better = errors_of("clouds", "shrink", 1.0, [(3.0, 3.0)] * 3)
    better = [row | {"setting": {"rate": 2}} for row in better]
    assert peers_standing.measured([*rows, *better]) == better[1:]
    assert peers_standing.measured([*rows, better[0] | {"failed": "it has failed"}, *better[1:]]) == rows[1:]


@pytest.mark.slow
def test_it_goes_on_and_its_table_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    names = ("totals", "verdict", "budgets", "choices", "search", "few", "attempts", "cifar", "scratch")
    page = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in names)
    (tmp_path / "docs" / "peers.md").write_text(page)
    committed = Path(common.__file__).parent / "results"
    for name in ("width_search", "few_units", "peers_attempts", "cifar_gates", "cifar_scratch"):
        (tmp_path / f"{name}.json").write_bytes((committed / f"{name}.json").read_bytes())
    monkeypatch.setattr(peers_table, "RESULTS", tmp_path)
    monkeypatch.setattr(peers_table, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(peers_table, "SEEDS", 1)
    for module in (peers_table, peers_standing):
        monkeypatch.setattr(module, "OURS", ("plasticnet, shrink",))
        monkeypatch.setattr(module, "PEERS", ("magnitude",))
    monkeypatch.setattr(peers_table, "TASKS", {"clouds": clouds})
    task, ways = clouds(), ("wide, trained on", "plasticnet, shrink", "magnitude")
    measured = partial(peers.measure, "clouds", task, ways=ways)
    measured(seed=100, budgets=(0.3,))
    measured(seed=0, budgets=(0.3,))
    before = common.written("peers_clouds")
    measured(seed=0, budgets=(0.6, 0.3))
    after = common.written("peers_clouds")
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2  # the whole network is trained on once
    assert peers_table.main() == 0
    text = (tmp_path / "docs" / "peers.md").read_text()
    assert "| plasticnet, shrink |" in text
    assert (tmp_path / "docs" / "peers-clouds.svg").exists()


@pytest.mark.parametrize("name", ["budgets", "interpolation", "moons"])
def test_what_is_there_is_not_run_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (Path(common.__file__).parent / "results" / f"{name}.json").read_bytes()
    path = common.RESULTS / f"{name}.json"
    path.write_bytes(committed)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    importlib.import_module(name).main()
    assert path.read_bytes() == committed


def test_the_command_can_be_run_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ["--ways", "plasticnet, gates", "magnitude"]
    monkeypatch.setattr(sys, "argv", ["peers.py", "--data-dir", "some folder", "--cache=another one", *ways])
    command = shlex.split(common.environment()["command"])
    assert command == ["python", "peers.py", "--data-dir", "DIR", "--cache=DIR", *ways]


def pictures(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ten classes that differ in their colours."""
    y = torch.arange(n) % 10
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(10, 3, generator=generator)
    return colours[y][:, :, None, None] + 0.3 * torch.randn(n, 3, 8, 8, generator=generator), y


def test_results_name_all_runs_that_they_come_from(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    def run(command: str, rows: list[dict[str, float]]) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["some.py", command])
        common.write("some", {}, rows)
        return json.loads((results / "some.json").read_text())

    a, b, c = {"loss": float("nan")}, {"loss": 2.0}, {"loss": 3.0}
    assert "earlier" not in run("one", [a])
    assert "earlier" not in run("one", [a, b])  # the same command goes on
    assert "Some rows" not in common.how(run("one", [a, b]))
    kept = run("two", [c, b, a])
    assert kept["environment"]["command"] == "python some.py two"
    assert [e["command"] for e in kept["earlier"]] == ["python some.py one"]
    assert "Some rows come from 1 earlier run, which" in common.how(kept)
    assert [e["command"] for e in run("three", [a, b, c])["earlier"]] == ["python some.py one", "python some.py two"]
    assert "earlier" not in run("four", [a, b])  # it has begun anew


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gates", "gates, a quarter", "shrink", "dense"])
def test_a_cifar_training_goes_on_where_it_was_cut_off(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, data, held_out = cifar.ResNet(8).eval(), pictures(256), pictures(50)

    def trained(name: str, epochs: int, most: int) -> torch.nn.Module | None:
        torch.manual_seed(1)
        training = cifar_gates.Training(cifar_gates.taught(dense), data, epochs, 0, tmp_path / f"{name}.safetensors")
        if most < epochs:
            monkey = pytest.MonkeyPatch()
            save, done = pn.save_checkpoint, []

            def saved(*args: object) -> None:
                save(*args)  # pyright: ignore[reportArgumentType]
                done.append(1)
                if len(done) == most:
                    raise KeyboardInterrupt

            monkey.setattr(pn, "save_checkpoint", saved)
            try:
                cifar_gates.trained(way, dense, 0.5, (data, held_out), training)
            except KeyboardInterrupt:
                return None
            finally:
                monkey.undo()
        return cifar_gates.trained(way, dense, 0.5, (data, held_out), training)

    whole = trained("whole", 4, 4)
    trained("parts", 4, 3)
    parts = trained("parts", 4, 4)
    assert whole is not None
    assert parts is not None
    assert whole.state_dict().keys() == parts.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    if way != "dense":
        assert operations(whole, data[0]) <= 0.5 * operations(dense, data[0])


@pytest.mark.slow
def test_a_resnet_from_random_weights_is_pruned_in_its_one_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(pictures(5256), tmp_path / "train.pt")
    torch.save(pictures(50), tmp_path / "test.pt")
    options = {"--data-dir": tmp_path, "--cache": tmp_path, "--depth": 8, "--epochs": 2, "--images": 256}
    monkeypatch.setattr(sys, "argv", ["cifar_scratch.py", *(str(part) for pair in options.items() for part in pair)])
    for _ in range(2):  # what is there is not run again
        cifar_scratch.main()
    dense, gates, known = common.written("cifar_scratch")
    assert gates["macs"] == known["macs"] <= 0.5
    assert gates["widths"] == known["widths"] != dense["widths"]
    assert not list(tmp_path.glob("scratch-*"))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--mode prune", "--mode grow", "--mode grow --paper --data cifar100"])
@pytest.mark.parametrize("network", ["resnet56", "wrn-28-10"])
def test_the_experiments_of_the_paper_run(
    network: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_cifar, "images", lambda *_: pictures(600))
    narrower = {"resnet56": lambda n: cifar_like(n), "wrn-28-10": lambda n: paper_cifar.WideResNet(n, 10, 1)}
    monkeypatch.setattr(paper_cifar, "NETWORKS", narrower)
    kept = tmp_path / "kept.safetensors"
    fixed = f"--data-dir {tmp_path} --kept {kept} --epochs 22 --steps 4 --device cpu --network {network}"
    paper_cifar.main([*fixed.split(), *arguments.split()])
    (row,) = common.written("paper_cifar")
    assert row["history"][-1]["epoch"] == 22
    assert 0 <= row["test"] <= 100
    assert not kept.exists()


def cifar_like(classes: int) -> torch.nn.Module:
    model = cifar.ResNet(8)
    model.linear = torch.nn.Linear(64, classes)
    return model


def test_the_networks_of_the_paper_have_their_sizes() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make(10).parameters()) for make in paper_cifar.NETWORKS.values()]
    assert [round(n / 1e6, 2) for n in sizes] == [0.85, 36.48]
