"""The models of the zoo: name -> a function that gives (factory, example inputs).

Each family is represented by its smallest member, on small inputs (batches of two), with random
weights. Where even the smallest member is large, widths or depths are cut by the library's own
arguments; the architecture stays. Nothing is downloaded. timm, transformers, PyG, diffusers and ultralytics are
imported when a model of theirs is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
import zoo_examples as examples
import zoo_graphs
import zoo_others
from torch import nn
from zoo_inputs import BATCH, Example, images, tokens
from zoo_transformers import TRANSFORMERS

# -- torchvision --------------------------------------------------------------------------------


def _torchvision(name: str, size: int = 64, **options: Any) -> Example:
    return partial(torchvision.models.get_model, name, weights=None, **options), images(size)


def _maxvit() -> Example:
    """maxvit_t, with windows of 2 instead of 7 so that it takes images of 64."""
    widths = {"stem_channels": 64, "block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2], "head_dim": 32}
    build = partial(
        torchvision.models.MaxVit, input_size=(64, 64), partition_size=2, stochastic_depth_prob=0.2, **widths
    )
    return build, images(64)


def _vit() -> Example:
    """Torchvision's VisionTransformer in the widths of ViT-Tiny, four layers deep."""
    options = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return partial(torchvision.models.VisionTransformer, **options), images(64)


def _backbone(kind: str, name: str) -> Example:
    build = getattr(torchvision.models.detection.backbone_utils, f"{kind}_fpn_backbone" if kind == "resnet" else kind)
    if kind == "resnet":
        return partial(build, backbone_name=name, weights=None), images(64)
    return partial(build, backbone_name=name, weights=None, fpn=True), images(64)


def _detector(name: str, size: int = 96, **options: Any) -> Example:
    """A whole detector; the targets are what it needs to run in training mode."""
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    inputs = {"images": [torch.rand(3, size, size) for _ in range(BATCH)], "targets": [dict(box) for _ in range(BATCH)]}
    return partial(torchvision.models.get_model, name, weights=None, weights_backbone=None, **options), inputs


def _video(name: str, frames: int = 4, size: int = 32) -> Example:
    return partial(torchvision.models.get_model, name, weights=None), (torch.randn(BATCH, 3, frames, size, size),)


# Few boxes are enough to see whether the layers behind them are exact.
_PROPOSALS = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}

_IMAGENET = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2 mobilenet_v3_small
    regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_1
    swin_t swin_v2_t vgg11 vgg11_bn
"""

_TORCHVISION: dict[str, Callable[[], Example]] = {name: partial(_torchvision, name) for name in _IMAGENET.split()} | {
    "googlenet": partial(_torchvision, "googlenet", init_weights=False),
    "inception_v3": partial(_torchvision, "inception_v3", 96, init_weights=False, aux_logits=False),
    "maxvit": _maxvit,
    "vit": _vit,
    "fcn_resnet50": partial(_torchvision, "fcn_resnet50", weights_backbone=None, aux_loss=True, num_classes=5),
    "deeplabv3_mobilenet_v3_large": partial(
        _torchvision, "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5
    ),
    "lraspp_mobilenet_v3_large": partial(
        _torchvision, "lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5
    ),
    "resnet18_fpn_backbone": partial(_backbone, "resnet", "resnet18"),
    "mobilenet_v3_small_fpn_backbone": partial(_backbone, "mobilenet_backbone", "mobilenet_v3_small"),
    "ssdlite320_mobilenet_v3_large": partial(_detector, "ssdlite320_mobilenet_v3_large", num_classes=5),
    "retinanet_resnet50_fpn": partial(
        _detector, "retinanet_resnet50_fpn", num_classes=5, min_size=64, max_size=96, score_thresh=0.0
    ),
    "fasterrcnn_resnet50_fpn": partial(
        _detector,
        "fasterrcnn_resnet50_fpn",
        num_classes=5,
        min_size=64,
        max_size=96,
        box_score_thresh=0.0,
        **_PROPOSALS,
    ),
    "fcos_resnet50_fpn": partial(
        _detector, "fcos_resnet50_fpn", num_classes=5, min_size=64, max_size=96, score_thresh=0.0
    ),
    "r3d_18": partial(_video, "r3d_18"),
}


# -- timm ---------------------------------------------------------------------------------------


def _timm(name: str, size: int = 64, **options: Any) -> Example:
    timm = importlib.import_module("timm")
    return partial(timm.create_model, name, pretrained=False, **options), images(size)


# Those that need nothing but images of 64x64.
_ANY_SIZE = """
    resnet10t resnetv2_18 resnext26ts seresnet18 skresnet18 res2net50_14w_8s resnest14d gcresnext26ts eca_resnet33ts
    regnety_002 regnetz_b16 repvgg_a0 repvit_m0_9 repghostnet_050 rexnet_100 selecsls42 dla34 dpn48b densenet121
    ese_vovnet19b_slim_dw xception41 cspresnet50 cspdarknet53 nf_regnet_b0 nf_resnet26 lcnet_035 tinynet_e
    mnasnet_small mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium efficientnet_lite0
    ghostnet_050 hardcorenas_a fbnetc_100 hrnet_w18_small hgnetv2_b0 convnext_atto convnextv2_atto
    inception_next_atto mambaout_femto poolformer_s12 caformer_s18 edgenext_xx_small fastvit_t8 mobilevit_xxs
    mobilevitv2_050 efficientvit_b0 starnet_s050 swiftformer_xs shvit_s1 rdnet_tiny tresnet_m pvt_v2_b0
    twins_svt_small xcit_nano_12_p16_224 focalnet_tiny_srf davit_tiny sequencer2d_s
    regnetx_002 ecaresnet26t seresnext26t_32x4d dla46_c mixnet_s efficientnet_es semnasnet_050 spnasnet_100
    mobilenetv1_100 mobileone_s0 mobilenet_edgetpu_v2_xs cs3darknet_s gernet_s ghostnetv2_100 res2next50
    legacy_seresnet18 resnetblur18 convmixer_768_32 nextvit_small fasternet_t0 vovnet39a resnet18d
    efficientnet_b0_gn
"""
_TIMM = {name: partial(_timm, name) for name in _ANY_SIZE.split()}
# Those whose image size is fixed when they are built.
_FIXED_SIZE = """
    vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 convit_tiny mixer_s32_224 gmlp_ti16_224 resmlp_12_224
    pit_ti_224 visformer_tiny mvitv2_tiny coat_lite_tiny volo_d1_224 tiny_vit_5m_224 efficientvit_m0 hiera_tiny_224
    coatnet_nano_rw_224
"""
_TIMM |= {name: partial(_timm, name, 64, img_size=64) for name in _FIXED_SIZE.split()}
_TIMM |= {
    "beit_base_patch16_224": partial(_timm, "beit_base_patch16_224", img_size=64, embed_dim=64, depth=3, num_heads=4),
    "eva02_tiny_patch14_224": partial(_timm, "eva02_tiny_patch14_224", 56, img_size=56, depth=4, num_classes=10),
    "cait_xxs24_224": partial(_timm, "cait_xxs24_224", img_size=64, depth=4),
    "crossvit_9_240": partial(_timm, "crossvit_9_240", 240),
    "swin_tiny_patch4_window7_224": partial(_timm, "swin_tiny_patch4_window7_224", img_size=64, window_size=4),
    "levit_128s": partial(_timm, "levit_128s", 224),
    "hiera_tiny_224": partial(_timm, "hiera_tiny_224", 224),
    "nest_tiny": partial(_timm, "nest_tiny", 64, img_size=64),
    "tiny_vit_5m_224": partial(_timm, "tiny_vit_5m_224", 224),
    "inception_v4": partial(_timm, "inception_v4", 96),
    "efficientformer_l1": partial(_timm, "efficientformer_l1", 224),
    "maxvit_pico_rw_256": partial(_timm, "maxvit_pico_rw_256", 64, img_size=64),
    "halonet26t": partial(_timm, "halonet26t", 256),
}


# -- the list -----------------------------------------------------------------------------------

_EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (examples.MultilayerPerceptron, (torch.randn(BATCH, 20),)),
    "lstm_classifier": lambda: (partial(examples.RecurrentClassifier, nn.LSTM), (tokens(6, 50),)),
    "gru_classifier": lambda: (partial(examples.RecurrentClassifier, nn.GRU), (tokens(6, 50),)),
    "lstm_tagger": lambda: (partial(examples.RecurrentTagger, nn.LSTM), (torch.randn(BATCH, 6, 8),)),
    "gru_tagger": lambda: (partial(examples.RecurrentTagger, nn.GRU), (torch.randn(BATCH, 6, 8),)),
    "unet": lambda: (examples.UNet, images(32)),
    "dcgan_generator": lambda: (examples.Generator, (torch.randn(BATCH, 16, 1, 1),)),
    "autoencoder": lambda: (examples.Autoencoder, images(32)),
    "conv_lstm": lambda: (examples.ConvLSTM, (torch.randn(BATCH, 3, 3, 16, 16),)),
    "vae": lambda: (examples.VariationalAutoencoder, images(32)),
    "ensemble": lambda: (examples.Ensemble, (torch.randn(BATCH, 20),)),
    "quantisation_aware": lambda: (examples.quantisation_aware, images(16)),
    "seq2seq_transformer": lambda: (examples.Seq2Seq, (tokens(6, 40), tokens(5, 40))),
    "pointnet": lambda: (examples.PointNet, (torch.randn(BATCH, 3, 16),)),
    "dgcnn": lambda: (examples.DGCNN, (torch.randn(BATCH, 3, 16),)),
}

MODELS: dict[str, Callable[[], Example]] = {
    f"{library}/{name}": build
    for library, models in {
        "examples": _EXAMPLES,
        "torchvision": _TORCHVISION,
        "timm": _TIMM,
        "transformers": TRANSFORMERS,
        "pyg": zoo_graphs.PYG,
        "diffusers": zoo_others.DIFFUSERS,
        "ultralytics": zoo_others.ULTRALYTICS,
    }.items()
    for name, build in models.items()
}

# A tenth of the zoo, quick and of different kinds.
FAST = (
    "examples/lstm_classifier",
    "examples/unet",
    "torchvision/mobilenet_v3_small",
    "torchvision/resnet18",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "transformers/bert",
    "transformers/llama",
    "pyg/gat",
    "diffusers/unet2d",
    "ultralytics/yolov8n",
)
