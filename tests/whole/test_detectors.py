"""Detectors of torchvision: they take a list of images, and want targets in training mode."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

import plasticnet as pn
from plasticnet.tools.trees import tensors_within

PLAIN = {"weights": None, "weights_backbone": None, "num_classes": 4}
SMALL = {"min_size": 64, "max_size": 96}
FEW = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
DETECTORS = {
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(**PLAIN, score_thresh=0.0, detections_per_img=20),
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**PLAIN, **SMALL, **FEW),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(**PLAIN, **SMALL, score_thresh=0.0, detections_per_img=20),
}


def example(dtype: torch.dtype) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 64, 64, dtype=dtype), torch.rand(3, 64, 80, dtype=dtype)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [10.0, 20.0, 50.0, 60.0]], dtype=dtype)
    return images, [{"boxes": boxes + i, "labels": torch.tensor([1, 2])} for i in range(2)]


def attached(name: str, targets: bool, dtype: torch.dtype) -> tuple[pn.PlasticNet, nn.Module, Any]:
    """A detector with a third of its units closed, and its compact module."""
    images, given = example(dtype)
    more = [(images, given)] if targets else []
    with warnings.catch_warnings():
        warnings.simplefilter("error" if targets else "ignore")
        net = pn.PlasticNet(DETECTORS[name]().to(dtype), (images,), more_inputs=more)
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 3]] = -1
    return net, net.eval().compact(), (images, given)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_compact_is_exact(name: str, targets: bool) -> None:
    net, small, (images, given) = attached(name, targets, torch.float64)
    assert len(net.sites) > 30
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in net.model.parameters())
    with torch.no_grad():
        out, found = tensors_within(net(images)), tensors_within(small(images))
        assert sum(len(t) for t in out) > 0
        for a, b in zip(out, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        if targets:
            losses = []
            for module in (net.train(), small.train()):
                torch.manual_seed(0)  # some detectors sample what they train on
                losses.append(module(images, given))
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_single_precision() -> None:
    net, small, (images, _) = attached("ssdlite", True, torch.float32)
    with torch.no_grad():
        for a, b in zip(tensors_within(net(images)), tensors_within(small(images)), strict=True):
            assert (a.to(torch.float64) - b.to(torch.float64)).abs().max() <= 1e-4 * max(a.abs().max(), 1)


@pytest.mark.slow
def test_without_targets_a_warning_says_so() -> None:
    images, _ = example(torch.float32)
    with pytest.warns(UserWarning, match=r"does not run in training mode.*targets.*more_inputs"):
        pn.PlasticNet(DETECTORS["ssdlite"](), (images,))


@pytest.mark.slow
def test_inception_on_images_that_are_too_small_for_its_auxiliary_head() -> None:
    from torchvision.models import inception_v3

    x = torch.randn(2, 3, 96, 96)
    with pytest.warns(UserWarning, match=r"training mode.*Output size is too small"):
        net = pn.PlasticNet(inception_v3(weights=None, init_weights=False, num_classes=10), (x,))
    assert len(net.sites) > 50
    assert "AuxLogits" in net.frozen
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 3]] = -1
        out = net.eval()(x)
        assert (net.compact()(x) - out).abs().max() <= 1e-4 * out.abs().max()
