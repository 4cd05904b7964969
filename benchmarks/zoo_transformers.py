"""The models of transformers in the zoo, small and with random weights, as `zoo_models` describes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo_inputs import BATCH, LENGTH, VOCABULARY, Example, images, tokens

_TEXT = {"vocab_size": VOCABULARY, "use_cache": False}
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
    return {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)}


def _pairs() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": images(64)[0]}


def _clip() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": images(64)[0]}


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 16, 60), "decoder_input_ids": tokens(5)}


def _spectrogram() -> dict[str, Any]:
    return {"spectrogram": torch.randn(BATCH, 9, 8)}


def _noisy() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 7, 10), "noise_sequence": torch.randn(BATCH, 7, 8)}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 800)}


_HIFIGAN = {
    "model_in_dim": 8, "upsample_initial_channel": 32, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 3]],
}  # fmt: skip
_UNIVNET = {
    "model_hidden_channels": 8, "model_in_channels": 8, "num_mel_bins": 10, "resblock_kernel_sizes": [3],
    "resblock_stride_sizes": [2], "resblock_dilation_sizes": [[1, 3]], "kernel_predictor_hidden_channels": 8,
}  # fmt: skip
_WAV2VEC2 = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
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

TRANSFORMERS: dict[str, Callable[[], Example]] = {
    name: partial(_transformers, config, model, options, inputs)
    for name, (config, model, options, inputs) in {
        "bert": ("BertConfig", "BertForSequenceClassification", {**_TEXT, **_ENCODER}, _text),
        "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_TEXT, **_ENCODER, "pad_token_id": 0}, _text),
        "distilbert": (
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "num_labels": 5},
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
        "olmoe": (
            "OlmoeConfig",
            "OlmoeForCausalLM",
            {**_TEXT, **_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
            _text,
        ),
        "mamba": (
            "MambaConfig", "MambaForCausalLM", {**_TEXT, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3},
            _text,
        ),
        "mamba2": (
            "Mamba2Config",
            "Mamba2ForCausalLM",
            {
                **_TEXT, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8,
                "n_groups": 1, "chunk_size": 4,
            },
            _text,
        ),
        "speecht5_hifigan": ("SpeechT5HifiGanConfig", "SpeechT5HifiGan", _HIFIGAN, _spectrogram),
        "univnet": ("UnivNetConfig", "UnivNetModel", _UNIVNET, _noisy),
        "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", _WAV2VEC2, _wave),
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
                "text_config": {**_CLIP_TOWER, "vocab_size": VOCABULARY, "eos_token_id": 1},
                "vision_config": {**_CLIP_TOWER, "image_size": 64, "patch_size": 16},
                "projection_dim": 16,
            },
            _clip,
        ),
    }.items()
}  # fmt: skip
