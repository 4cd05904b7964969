"""The models of diffusers and ultralytics in the zoo, small and with random weights.

The libraries are imported when one of their models is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from zoo_inputs import BATCH, Example, images

_STEPS = torch.tensor([3, 7])  # the steps of diffusion at which two samples are denoised
_WIDTHS = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
_LATENT = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "attention_head_dim": 4, **_WIDTHS}


def _diffusers(kind: str, inputs: tuple[Any, ...] | dict[str, Any], **config: Any) -> Example:
    diffusers = importlib.import_module("diffusers")
    return partial(getattr(diffusers, kind), **config), inputs


def _unet() -> Example:
    """The U-Net of an unconditional diffusion model."""
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    inputs = (torch.randn(BATCH, 4, 16, 16), _STEPS)
    return _diffusers("UNet2DModel", inputs, down_block_types=down, up_block_types=up, **_LATENT)


def _conditional_unet() -> Example:
    """The U-Net of Stable Diffusion, which attends to the embedding of a text."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    inputs = (torch.randn(BATCH, 4, 16, 16), _STEPS, torch.randn(BATCH, 5, 12))
    return _diffusers(
        "UNet2DConditionModel", inputs, down_block_types=down, up_block_types=up, cross_attention_dim=12, **_LATENT
    )


def _autoencoder() -> Example:
    """The autoencoder of Stable Diffusion."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return _diffusers("AutoencoderKL", images(16), latent_channels=4, **blocks, **_WIDTHS)


def _transformer() -> Example:
    """A diffusion transformer."""
    inputs = {"hidden_states": torch.randn(BATCH, 4, 8, 8), "timestep": _STEPS, "class_labels": torch.tensor([1, 2])}
    return _diffusers(
        "DiTTransformer2DModel", inputs, num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def _yolo(name: str) -> Example:
    """A detector of ultralytics, without what makes boxes of its maps."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return partial(tasks.DetectionModel, f"{name}.yaml", ch=3, nc=3, verbose=False), images(64)


DIFFUSERS: dict[str, Callable[[], Example]] = {
    "unet2d": _unet,
    "unet2d_condition": _conditional_unet,
    "autoencoder_kl": _autoencoder,
    "dit": _transformer,
}
ULTRALYTICS: dict[str, Callable[[], Example]] = {name: partial(_yolo, name) for name in ("yolov8n", "yolo11n")}
