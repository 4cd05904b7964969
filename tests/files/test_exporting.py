"""Hand-over of a compacted module: ONNX, torch.export, torch.compile, names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plasticnet import PlasticError, PlasticNet
from plasticnet.apps.models import example_inputs, factory
from plasticnet.files import exporting
from plasticnet.files.exporting import export
from tests.kit.networks import ConvNet, images, mlp, randomise_gates

needs_onnx = pytest.mark.skipif(
    not all(exporting.importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the onnx packages are not installed",
)
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="torch.compile needs a C++ compiler"
)
FORMATS = ["x.pt2", pytest.param("x.onnx", marks=[needs_onnx, pytest.mark.slow])]


def compacted(model: nn.Module, x: Any, **options: Any) -> nn.Module:
    net = PlasticNet(model, x, **options)
    net.k = 7.0
    randomise_gates(net)
    return net.compact()


def run(path: Path, *args: Tensor) -> list[Tensor]:
    if path.suffix == ".pt2":
        return [torch.export.load(path).module()(*args)]
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))]


# -- files ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("inputs", [(), ("fc1",)], ids=["plain", "take"])
def test_any_batch_size(file: str, inputs: tuple[str, ...], tmp_path: Path) -> None:
    small = compacted(ConvNet(), (images(1),), inputs=inputs)
    written = export(small, tmp_path / file, (images(1),))
    assert written.dynamic_batch
    assert written.error <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [file]
    for batch in (1, 2, 7):
        x = images(batch)
        torch.testing.assert_close(run(tmp_path / file, x)[0], small(x), rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.slow
def test_weights_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONE_FILE", 0)
    model = nn.Linear(100, 100)
    export(model, tmp_path / "x.onnx", (torch.randn(2, 100),))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    torch.testing.assert_close(run(tmp_path / "x.onnx", x := torch.randn(3, 100))[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", FORMATS)
def test_only_the_given_batch_size_where_that_is_asked_for(file: str, tmp_path: Path) -> None:
    small = compacted(mlp(4, 6, 3), (torch.randn(2, 4),))
    assert not export(small, tmp_path / file, (torch.randn(5, 4),), dynamic_batch=False).dynamic_batch
    torch.testing.assert_close(run(tmp_path / file, x := torch.randn(5, 4))[0], small(x))
    with pytest.raises(Exception, match="5"):
        run(tmp_path / file, torch.randn(4, 4))


class OneSize(nn.Module):
    """A forward that depends on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(6, 2)


def test_a_model_for_one_batch_size_is_exported_for_that(tmp_path: Path) -> None:
    model = OneSize()
    assert not export(model, tmp_path / "x.pt2", (torch.randn(4, 4),)).dynamic_batch
    torch.testing.assert_close(run(tmp_path / "x.pt2", x := torch.randn(4, 4))[0], model(x))


class Two(nn.Module):
    """Two inputs, of which one is not batched, and several outputs."""

    def forward(self, scale: Tensor, x: Tensor, *, flip: bool = False) -> dict[str, Tensor]:
        return {"sum": x.sum(1), "scaled": x.flip(1) * scale if flip else x * scale}


@pytest.mark.parametrize("file", FORMATS)
def test_keyword_arguments_in_any_order(file: str, tmp_path: Path) -> None:
    example = {"flip": True, "x": torch.randn(3, 4), "scale": torch.arange(4.0)}
    assert export(Two(), tmp_path / file, example).dynamic_batch


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.slow
def test_transformers(kind: str, file: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    name = f"transformers:{kind}"
    model = factory(name, (), 0)().eval()
    example = example_inputs(name, model)
    small = compacted(model, example)
    assert export(small, tmp_path / file, example).dynamic_batch
    assert small.config.use_cache is model.config.use_cache  # a setting that the export changes for a while


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    model = ConvNet().train()
    model.bn1.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    export(model, tmp_path / "x.pt2", (images(),))
    assert model.training
    assert not model.bn1.training
    assert model.conv1.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_was_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_text("old")
    export(mlp(4, 3), tmp_path / "x.pt2", (torch.randn(2, 4),))
    assert run(tmp_path / "x.pt2", torch.randn(2, 4))[0].shape == (2, 3)


# -- what is wrong ----------------------------------------------------------------------------


class Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "shape", "file", "message"),
    [
        (mlp(4, 3), (2, 4), "x.pth", r"the suffix is \.onnx or \.pt2"),
        (mlp(4, 3), (2, 5), "x.pt2", "cannot be multiplied"),
        (mlp(4, 3), (2, 4), "gone/x.pt2", "No such file"),
        (Unexportable(), (2, 4), "x.pt2", "cannot export to"),
    ],
)
def test_refusals(model: nn.Module, shape: tuple[int, ...], file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match=message) as caught:
        export(model, tmp_path / file, (torch.randn(shape),))
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_gated_network_is_refused(tmp_path: Path) -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    for module in (net, nn.Sequential(net)):
        with pytest.raises(PlasticError, match=r"net\.compact\(\)"):
            export(module, tmp_path / "x.pt2", (torch.randn(2, 4),))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if "onnx" in name else object())
    with pytest.raises(PlasticError, match="pip install onnx onnxscript onnxruntime"):
        export(mlp(4, 3), tmp_path / "x.onnx", (torch.randn(2, 4),))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_file_with_other_outputs_is_refused(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = exporting.outputs

    def disturbed(run: Any, args: Any, kwargs: Any) -> list[Tensor]:
        return [t * (1.0 if run is model else factor) for t in outputs(run, args, kwargs)]

    model = mlp(4, 3)
    (tmp_path / "x.pt2").write_text("old")
    monkeypatch.setattr(exporting, "outputs", disturbed)
    with pytest.raises(PlasticError, match="differ from the module's"):
        export(model, tmp_path / "x.pt2", (torch.randn(2, 4),))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt2"]
    assert (tmp_path / "x.pt2").read_text() == "old"


# -- the module itself ------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_a_compacted_module_compiles() -> None:
    small = compacted(ConvNet(), (images(),), inputs=("fc1",))
    compiled: Any = torch.compile(small, fullgraph=True)
    torch.testing.assert_close(compiled(x := images()), small(x))


def test_names_are_those_of_the_original() -> None:
    model = ConvNet()
    names = list(model.state_dict())
    assert list(compacted(model, (images(),)).state_dict()) == names


def test_only_a_take_changes_names() -> None:
    model = ConvNet()
    names = [n.replace("fc1.", "fc1.1.") for n in model.state_dict()]
    found = list(compacted(model, (images(),), inputs=("fc1",)).state_dict())
    assert [n for n in found if n != "fc1.0.indices"] == names
