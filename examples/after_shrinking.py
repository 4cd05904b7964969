"""After shrinking: fold each BatchNorm into its convolution, quantise to int8 in torch, and export to ONNX in int8.

What `pn.shrink` returns is a plain module, so that the tools of others apply to it as they are.

Run it with ``python examples/after_shrinking.py``; it takes about 20 seconds on one core. Quantisation in torch needs
torchao (``pip install torchao``), and ONNX needs onnx, onnxscript and onnxruntime. Where one of them is missing, a line
says what was skipped.
"""

import copy
import io
import logging
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import plasticnet as pn

images, classes = load_digits(return_X_y=True)
order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
x, x_test = (torch.tensor(images).float().reshape(-1, 1, 8, 8) / 8 - 1)[order].split([1437, 360])
y, y_test = torch.tensor(classes)[order].split([1437, 360])


class ConvNet(nn.Module):
    """Nothing in here knows of plasticnet: (batch, 1, 8, 8) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = F.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.fc(x.flatten(1))


def mlp() -> nn.Sequential:
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(8):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model.eval()


def folded(model: ConvNet) -> ConvNet:
    """Return a copy with each BatchNorm folded into its convolution; `nn.Identity` takes its place."""
    model = copy.deepcopy(model).eval()
    model.conv1, model.bn1 = fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    model.conv2, model.bn2 = fuse_conv_bn_eval(model.conv2, model.bn2), nn.Identity()
    return model


def show(name: str, run: Callable[[Tensor], Tensor], size: int, like: nn.Module) -> float:
    """Print the size of a network, its accuracy, and how far its outputs are from those of another one."""
    with torch.no_grad():
        wanted, found = like(x_test), run(x_test)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    accuracy = (found.argmax(1) == y_test).float().mean().item()
    print(f"  {name:34} {size:9,} bytes   accuracy {accuracy:.2%}   largest error {error:.1e}")
    return error


def in_memory(model: nn.Module) -> int:
    """Return how many bytes a file with the tensors of a model has."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def shrunk(model: nn.Module) -> nn.Module:
    small, report = pn.shrink(model, list(x.split(64)), pn.Budget(macs=0.25), epochs=2)
    show("trained", model, in_memory(model), model)
    show("shrunk", small, in_memory(small), model)
    print(f"  multiply-adds {report.steps[0].macs:,.0f} before, {report.steps[-1].macs:,.0f} after")
    return small


def fold(small: ConvNet) -> ConvNet:
    print("\nEach BatchNorm folded into its convolution, against the shrunk network")
    plain = folded(small)
    assert show("folded", plain, in_memory(plain), small) < 1e-5
    with tempfile.TemporaryDirectory() as folder:  # the factory folds, too; or save before, and fold what load returns
        pn.save(plain, f"{folder}/folded.safetensors")
        again = pn.load(f"{folder}/folded.safetensors", lambda: folded(ConvNet()))
    assert torch.equal(again(x_test), plain(x_test))
    return plain


def quantise_in_torch(small: nn.Module) -> None:
    print("\nLinear layers in int8 by torchao, against the shrunk network")
    if find_spec("torchao") is None:
        print("  skipped: torchao is not installed (pip install torchao)")
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantised = copy.deepcopy(small)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    assert show("weights and activations in int8", quantised, in_memory(quantised), small) < 0.1


def quantise_in_onnx(plain: nn.Module) -> None:
    print("\nONNX, against the folded network")
    if missing := [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]:
        print(f"  skipped: {', '.join(missing)} not installed (pip install {' '.join(missing)})")
        return
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Inputs(CalibrationDataReader):
        """Gives some training images, by which the ranges of the activations are chosen."""

        def __init__(self, name: str) -> None:
            self.batches = iter([{name: batch.numpy()} for batch in x[:512].split(64)])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    def opened(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return name, lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    logging.disable(logging.WARNING)  # onnxruntime advises a step that this small graph does not need
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "int8.onnx"
        pn.export(plain, whole, (x[:2],))
        name, run = opened(whole)
        assert show("float32", run, whole.stat().st_size, plain) < 1e-4
        # Weights of 7 bits, because sums of products overflow on processors without instructions for 8 (VNNI).
        quantize_static(whole, small, Inputs(name), per_channel=True, reduce_range=True)
        assert show("weights and activations in int8", opened(small)[1], small.stat().st_size, plain) < 0.1


def main() -> None:
    torch.manual_seed(0)
    print("A convolutional network, to a quarter of its multiply-adds")
    plain = fold(shrunk(trained(ConvNet())))
    quantise_in_onnx(plain)
    print("\nAn MLP, to a quarter of its multiply-adds")
    quantise_in_torch(shrunk(trained(mlp())))


if __name__ == "__main__":
    main()
