"""The models of the zoo: name -> a function that gives (factory, example inputs).

Each family is represented by its smallest member, on small inputs (batches of two), with random
weights. Where even the smallest member is large, widths or depths are cut by the library's own
arguments; the architecture stays. Nothing is downloaded. timm and transformers are imported when a
model of theirs is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
import zoo_examples as examples
from torch import nn

Factory = Callable[[], nn.Module]
Example = tuple[Factory, tuple[Any, ...] | dict[str, Any]]

BATCH = 2
_LENGTH = 7
_VOCABULARY = 97


def _images(size: int, channels: int = 3) -> tuple[torch.Tensor]:
    return (torch.randn(BATCH, channels, size, size),)


def _tokens(length: int = _LENGTH, vocabulary: int = _VOCABULARY) -> torch.Tensor:
    return torch.randint(2, vocabulary, (BATCH, length))


# -- torchvision --------------------------------------------------------------------------------


def _torchvision(name: str, size: int = 64, **options: Any) -> Example:
    return partial(torchvision.models.get_model, name, weights=None, **options), _images(size)


def _maxvit() -> Example:
    """maxvit_t, with windows of 2 instead of 7 so that it takes images of 64."""
    widths = {"stem_channels": 64, "block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2], "head_dim": 32}
    build = partial(
        torchvision.models.MaxVit, input_size=(64, 64), partition_size=2, stochastic_depth_prob=0.2, **widths
    )
    return build, _images(64)


def _vit() -> Example:
    """Torchvision's VisionTransformer in the widths of ViT-Tiny, four layers deep."""
    options = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return partial(torchvision.models.VisionTransformer, **options), _images(64)


def _backbone(kind: str, name: str) -> Example:
    build = getattr(torchvision.models.detection.backbone_utils, f"{kind}_fpn_backbone" if kind == "resnet" else kind)
    if kind == "resnet":
        return partial(build, backbone_name=name, weights=None), _images(64)
    return partial(build, backbone_name=name, weights=None, fpn=True), _images(64)


def _detector(name: str, size: int = 96, **options: Any) -> Example:
    """A whole detector; the targets are what it needs to run in training mode."""
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    inputs = {"images": [torch.rand(3, size, size) for _ in range(BATCH)], "targets": [dict(box) for _ in range(BATCH)]}
    return partial(torchvision.models.get_model, name, weights=None, weights_backbone=None, **options), inputs


def _video(name: str, frames: int = 4, size: int = 32) -> Example:
    return partial(torchvision.models.get_model, name, weights=None), (torch.randn(BATCH, 3, frames, size, size),)


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
    "r3d_18": partial(_video, "r3d_18"),
}


# -- timm ---------------------------------------------------------------------------------------


def _timm(name: str, size: int = 64, **options: Any) -> Example:
    timm = importlib.import_module("timm")
    return partial(timm.create_model, name, pretrained=False, **options), _images(size)


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
"""
_TIMM = {name: partial(_timm, name) for name in _ANY_SIZE.split()}
# Those whose image size is fixed when they are built.
_FIXED_SIZE = """
    vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 convit_tiny mixer_s32_224 gmlp_ti16_224 resmlp_12_224
    pit_ti_224 visformer_tiny mvitv2_tiny coat_lite_tiny volo_d1_224
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


# -- transformers -------------------------------------------------------------------------------

_TEXT = {"vocab_size": _VOCABULARY, "use_cache": False}
_ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5,
}  # fmt: skip
_DECODER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_VISION = {**_ENCODER, "image_size": 64, "patch_size": 16}


def _transformers(config: str, model: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Example:
    library = importlib.import_module("transformers")

    def build() -> nn.Module:
        return getattr(library, model)(getattr(library, config)(**options))

    return build, inputs()


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(BATCH, _LENGTH, dtype=torch.int64)}


def _pairs() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _images(64)[0]}


def _clip() -> dict[str, Any]:
    return {"input_ids": _tokens(), "pixel_values": _images(64)[0]}


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 16, 60), "decoder_input_ids": _tokens(5)}


_CLIP_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_T5 = {
    **_TEXT, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    **_TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
_WHISPER = {**_BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 20}

_TRANSFORMERS: dict[str, Callable[[], Example]] = {
    name: partial(_transformers, config, model, options, inputs)
    for name, (config, model, options, inputs) in {
        "bert": ("BertConfig", "BertForSequenceClassification", {**_TEXT, **_ENCODER}, _text),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_TEXT, **_ENCODER, "pad_token_id": 0}, _text),
        "distilbert": (
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            {"vocab_size": _VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "num_labels": 5},
            _text,
        ),
        "albert": (
            "AlbertConfig", "AlbertForSequenceClassification", {**_TEXT, **_ENCODER, "embedding_size": 16}, _text,
        ),
        "electra": (
            "ElectraConfig", "ElectraForTokenClassification", {**_TEXT, **_ENCODER, "embedding_size": 16}, _text,
        ),
        "deberta_v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", {**_TEXT, **_ENCODER}, _text),
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            {**_TEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1},
            _text,
        ),
        "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_TEXT, **_DECODER}, _text),
        "opt": (
            "OPTConfig",
            "OPTForCausalLM",
            {
                **_TEXT, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
                "max_position_embeddings": 32, "word_embed_proj_dim": 32, "pad_token_id": 0,
            },
            _text,
        ),
        "bloom": ("BloomConfig", "BloomForCausalLM", {**_TEXT, "hidden_size": 32, "n_layer": 3, "n_head": 4}, _text),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {**_TEXT, **_DECODER}, _text),
        "mistral": ("MistralConfig", "MistralForCausalLM", {**_TEXT, **_DECODER}, _text),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_TEXT, **_DECODER}, _text),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_TEXT, **_DECODER, "head_dim": 8}, _text),
        "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_TEXT, **_DECODER, "head_dim": 8}, _text),
        "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_TEXT, **_DECODER}, _text),
        "mixtral": (
            "MixtralConfig",
            "MixtralForCausalLM",
            {**_TEXT, **_DECODER, "num_local_experts": 4, "experts_implementation": "eager"},  # runs in float64
            _text,
        ),
        "t5": ("T5Config", "T5ForConditionalGeneration", _T5, _pairs),
        "bart": ("BartConfig", "BartForConditionalGeneration", _BART, _pairs),
        "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER, _speech),
        "vit": ("ViTConfig", "ViTForImageClassification", _VISION, _pixels),
        "deit": ("DeiTConfig", "DeiTForImageClassification", _VISION, _pixels),
        "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**_VISION, "mlp_ratio": 2}, _pixels),
        "swin": (
            "SwinConfig",
            "SwinForImageClassification",
            {
                "image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
                "num_labels": 5,
            },
            _pixels,
        ),
        "convnext": (
            "ConvNextConfig",
            "ConvNextForImageClassification",
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5},
            _pixels,
        ),
        "segformer": (
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            {
                "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
                "decoder_hidden_size": 16, "num_labels": 5,
            },
            _pixels,
        ),
        "clip": (
            "CLIPConfig",
            "CLIPModel",
            {
                "text_config": {**_CLIP_TOWER, "vocab_size": _VOCABULARY, "eos_token_id": 1},
                "vision_config": {**_CLIP_TOWER, "image_size": 64, "patch_size": 16},
                "projection_dim": 16,
            },
            _clip,
        ),
    }.items()
}  # fmt: skip


# -- the list -----------------------------------------------------------------------------------

_EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (examples.MultilayerPerceptron, (torch.randn(BATCH, 20),)),
    "lstm_classifier": lambda: (partial(examples.RecurrentClassifier, nn.LSTM), (_tokens(6, 50),)),
    "gru_classifier": lambda: (partial(examples.RecurrentClassifier, nn.GRU), (_tokens(6, 50),)),
    "lstm_tagger": lambda: (partial(examples.RecurrentTagger, nn.LSTM), (torch.randn(BATCH, 6, 8),)),
    "gru_tagger": lambda: (partial(examples.RecurrentTagger, nn.GRU), (torch.randn(BATCH, 6, 8),)),
    "unet": lambda: (examples.UNet, _images(32)),
    "dcgan_generator": lambda: (examples.Generator, (torch.randn(BATCH, 16, 1, 1),)),
    "autoencoder": lambda: (examples.Autoencoder, _images(32)),
    "seq2seq_transformer": lambda: (examples.Seq2Seq, (_tokens(6, 40), _tokens(5, 40))),
}

MODELS: dict[str, Callable[[], Example]] = {
    f"{library}/{name}": build
    for library, models in {
        "examples": _EXAMPLES,
        "torchvision": _TORCHVISION,
        "timm": _TIMM,
        "transformers": _TRANSFORMERS,
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
)
