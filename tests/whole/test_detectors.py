"""Detectors of torchvision: they take a list of images, and want targets in training mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

import plasticnet as pn
from plasticnet.tools.trees import tensors_within
from tests.kit.heavy import heavy

PLAIN: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
SMALL: dict[str, Any] = {"min_size": 64, "max_size": 96}
FEW: dict[str, Any] = {
    "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16, "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
}  # fmt: skip


SITES = {"ssdlite": 37, "fasterrcnn": 33, "retinanet": 47, "fcos": 47, "maskrcnn": 20, "keypointrcnn": 20}  # at least


def small_backbone() -> nn.Module:
    """The backbone of Mask R-CNN and Keypoint R-CNN, with ResNet-18 in the place of ResNet-50."""
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)


def small_ssdlite() -> nn.Module:
    """SSDlite, for images of 96 pixels in the place of 320."""
    model = detection.ssdlite320_mobilenet_v3_large(**PLAIN, score_thresh=0.0, detections_per_img=20)
    model.transform.fixed_size = (96, 96)
    return model


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "ssdlite": small_ssdlite,
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**PLAIN, **SMALL, **FEW),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(**PLAIN, **SMALL, score_thresh=0.0, detections_per_img=20),
    "fcos": lambda: detection.fcos_resnet50_fpn(**PLAIN, **SMALL, score_thresh=0.0, detections_per_img=20),
    "maskrcnn": lambda: detection.MaskRCNN(small_backbone(), 4, **SMALL, **FEW),
    "keypointrcnn": lambda: detection.KeypointRCNN(
        small_backbone(), 4, keypoint_head=KeypointRCNNHeads(256, (64,) * 8),
        keypoint_predictor=KeypointRCNNPredictor(64, 5), **SMALL, **FEW,
    ),
}  # fmt: skip

NAMES = [n if n == "ssdlite" else pytest.param(n, marks=heavy) for n in DETECTORS]


def example(dtype: torch.dtype) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images, and everything that some detector wants to know of them in training."""
    images = [torch.rand(3, 64, 64, dtype=dtype), torch.rand(3, 64, 80, dtype=dtype)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [10.0, 20.0, 50.0, 60.0]], dtype=dtype)
    targets = [
        {
            "boxes": boxes + i,
            "labels": torch.tensor([1, 2]),
            "masks": torch.randint(0, 2, (2, *image.shape[1:]), dtype=torch.uint8),
            "keypoints": torch.cat([20 + 10 * torch.rand(2, 5, 2), torch.ones(2, 5, 1)], 2),  # in no other precision
        }
        for i, image in enumerate(images)
    ]
    return images, targets


def attached(name: str, targets: bool, dtype: torch.dtype) -> tuple[pn.PlasticNet, nn.Module, Any]:
    """A detector with a third of its units closed, and its compact module; a warning says where targets are missing."""
    images, given = example(dtype)
    more = [(images, given)] if targets else []
    says = pytest.warns(UserWarning, match=r"does not run in training mode.*targets.*more_inputs")
    with warnings.catch_warnings() if targets else says:
        warnings.simplefilter("error" if targets else "always")
        net = pn.PlasticNet(DETECTORS[name]().to(dtype), (images,), more_inputs=more)
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 3]] = -1
    return net, net.eval().compact(), (images, given)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compact_is_exact(name: str, targets: bool) -> None:
    net, small, (images, given) = attached(name, targets, torch.float64)
    assert len(net.sites) >= SITES[name]
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
@pytest.mark.parametrize("name", NAMES)
def test_training_to_a_budget(name: str) -> None:
    """Both passes of a plastic step, the cut that hardening makes, and the network that comes out."""
    images, targets = example(torch.float64)
    net = pn.PlasticNet(DETECTORS[name]().double(), (images,), more_inputs=[(images, targets)])
    optimizer = torch.optim.SGD(net.param_groups(1e-5))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(1, k=7.0), pn.Stage(1)], budget=pn.Budget(params=0.5))
    before = sum(p.numel() for p in net.model.parameters())
    for _ in range(schedule.epochs):
        plastic = net.k == 7.0
        net.train()

        def losses() -> Tensor:
            return torch.stack(list(net(images, targets).values())).sum()

        loss = net.expected_loss(losses) + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        if plastic:
            slopes = [site.phi.grad for site in net.sites.values()]
            assert all(s is not None and s.isfinite().all() for s in slopes)
            assert any(s is not None and (s != 0).any() for s in slopes)
        optimizer.step()
        schedule.step()
    assert sum(p.numel() for p in net.model.parameters()) <= 0.5 * before
    small = net.eval().compact()
    with torch.no_grad():
        for a, b in zip(tensors_within(net(images)), tensors_within(small(images)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_single_precision() -> None:
    net, small, (images, _) = attached("ssdlite", True, torch.float32)
    with torch.no_grad():
        for a, b in zip(tensors_within(net(images)), tensors_within(small(images)), strict=True):
            assert (a.to(torch.float64) - b.to(torch.float64)).abs().max() <= 1e-4 * max(a.abs().max(), 1)


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
