"""Tiny networks of the Hunyuan family and of other two-stream transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tiny import TinyModel

_BATCH, _CHANNELS, _SIDE, _FRAMES, _TEXT, _TEXT_DIM = 2, 4, 4, 2, 5, 16
_HEADS, _HEAD_DIM = 2, 8
_WIDTH = _HEADS * _HEAD_DIM
_ROPE_AXES = (4, 2, 2)
_GUIDANCE_SCALE = 6.0

_HEADS_CONFIG = {"num_attention_heads": _HEADS, "attention_head_dim": _HEAD_DIM}
_VIDEO_CONFIG = {
    **_HEADS_CONFIG,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "mlp_ratio": 2.0,
    "text_embed_dim": _TEXT_DIM,
    "rope_axes_dim": _ROPE_AXES,
}
_HUNYUAN_VIDEO_CONFIG = {
    **_VIDEO_CONFIG,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "pooled_projection_dim": _TEXT_DIM,
}
_CONDITIONED_CHANNELS = 2 * _CHANNELS + 1
"""Latents, the latents of the conditioning image and its mask, side by side."""


def _batched(value: float) -> Tensor:
    return torch.full((_BATCH,), value)


def _image(generator: torch.Generator) -> Tensor:
    return torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE, generator=generator)


def _video(generator: torch.Generator, channels: int = _CHANNELS, frames: int = _FRAMES) -> Tensor:
    return torch.randn(_BATCH, channels, frames, _SIDE, _SIDE, generator=generator)


def _tokens(generator: torch.Generator, length: int = _TEXT) -> Tensor:
    return torch.randn(_BATCH, length, _TEXT_DIM, generator=generator)


def _pooled(generator: torch.Generator) -> Tensor:
    return torch.randn(_BATCH, _TEXT_DIM, generator=generator)


def _mask(length: int = _TEXT) -> Tensor:
    """Attention mask of texts of which the second is one token shorter."""
    mask = torch.ones(_BATCH, length, dtype=torch.long)
    mask[1, -1] = 0
    return mask


def _hunyuan_video(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(generator),
        "timestep": _batched(timestep),
        "encoder_hidden_states": _tokens(generator),
        "encoder_attention_mask": _mask(),
        "pooled_projections": _pooled(generator),
        "guidance": _batched(1000.0 * _GUIDANCE_SCALE),
    }


def _framepack(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # Frames in time: the prefix, four coarse ones, two medium ones, the last one, and those to be generated.
    prefix, coarse, medium, last, new = torch.arange(8 + _FRAMES).split([1, 4, 2, 1, _FRAMES])
    return {
        **_hunyuan_video(timestep, generator),
        "image_embeds": _tokens(generator, length=3),
        "indices_latents": new,
        "latents_clean": _video(generator, frames=2),
        "indices_latents_clean": torch.cat([prefix, last]),
        "latents_history_2x": _video(generator, frames=2),
        "indices_latents_history_2x": medium,
        "latents_history_4x": _video(generator, frames=4),
        "indices_latents_history_4x": coarse,
    }


def _hunyuan_video_15(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(generator, channels=_CONDITIONED_CHANNELS),
        "timestep": _batched(timestep),
        "encoder_hidden_states": _tokens(generator),
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_2": _tokens(generator, length=3),
        "encoder_attention_mask_2": _mask(3),
        "image_embeds": torch.zeros(_BATCH, 3, _TEXT_DIM),  # no image: text to video
    }


def _hunyuan_image(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _image(generator),
        "timestep": _batched(timestep),
        "encoder_hidden_states": _tokens(generator),
        "encoder_attention_mask": _mask(),
    }


def _hunyuan_dit(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    angles = torch.randn((_SIDE // 2) ** 2, _HEAD_DIM, generator=generator)
    return {
        "hidden_states": _image(generator),
        "timestep": _batched(timestep),
        "encoder_hidden_states": _tokens(generator),
        "text_embedding_mask": _mask(),
        "encoder_hidden_states_t5": _tokens(generator, length=3),
        "text_embedding_mask_t5": _mask(3),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]] * _BATCH),
        "style": torch.zeros(_BATCH, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hidream_image(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _image(generator),
        "timesteps": _batched(timestep),
        "encoder_hidden_states_t5": _tokens(generator),
        # The states of four layers of the language model; the batch is the second dimension.
        "encoder_hidden_states_llama3": torch.stack([_tokens(generator, length=3) for _ in range(4)]),
        "pooled_embeds": _pooled(generator),
    }


def _aura_flow(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _image(generator),
        "encoder_hidden_states": _tokens(generator),
        "timestep": _batched(timestep / 1000),
    }


def _stable_diffusion_3(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _image(generator),
        "encoder_hidden_states": _tokens(generator),
        "pooled_projections": _pooled(generator),
        "timestep": _batched(timestep),
    }


def _motif_video(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(generator, channels=_CONDITIONED_CHANNELS),
        "timestep": _batched(timestep),
        "encoder_hidden_states": _tokens(generator),
        "encoder_attention_mask": _mask(),
        "image_embeds": _tokens(generator, length=3),
    }


MODELS: tuple[TinyModel, ...] = (
    TinyModel("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO_CONFIG, _hunyuan_video),
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HUNYUAN_VIDEO_CONFIG,
            "has_image_proj": True,
            "image_proj_dim": _TEXT_DIM,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    TinyModel(
        # Most of its weights are in a text projection whose width can't be set.
        "HunyuanVideo15Transformer3DModel",
        {
            **_VIDEO_CONFIG,
            "in_channels": _CONDITIONED_CHANNELS,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_2_dim": _TEXT_DIM,
            "image_embed_dim": _TEXT_DIM,
        },
        _hunyuan_video_15,
    ),
    TinyModel(
        "HunyuanImageTransformer2DModel",
        {
            **_VIDEO_CONFIG,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "rope_axes_dim": (4, 4),
        },
        _hunyuan_image,
    ),
    TinyModel(
        "HunyuanDiT2DModel",
        {
            **_HEADS_CONFIG,
            "in_channels": _CHANNELS,
            "patch_size": 2,
            "sample_size": _SIDE,
            "hidden_size": _WIDTH,
            "num_layers": 6,  # two long skip connections
            "mlp_ratio": 2.0,
            "cross_attention_dim": _TEXT_DIM,
            "cross_attention_dim_t5": _TEXT_DIM,
            "pooled_projection_dim": _TEXT_DIM,
            "text_len": _TEXT,
            "text_len_t5": 3,
        },
        _hunyuan_dit,
    ),
    TinyModel(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS_CONFIG,
            "patch_size": 2,
            "in_channels": _CHANNELS,
            "num_layers": 2,
            "num_single_layers": 3,
            "caption_channels": [_TEXT_DIM, _TEXT_DIM],
            "text_emb_dim": _TEXT_DIM,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": _ROPE_AXES,
            "max_resolution": (_SIDE, _SIDE),
            "llama_layers": [0, 1, 2, 3, 3],
        },
        _hidream_image,
    ),
    TinyModel(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS_CONFIG,
            "sample_size": _SIDE,
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 3,
            "joint_attention_dim": _TEXT_DIM,
            "caption_projection_dim": _WIDTH,
            "pos_embed_max_size": 16,
        },
        _aura_flow,
    ),
    TinyModel(
        "SD3Transformer2DModel",
        {
            **_HEADS_CONFIG,
            "sample_size": _SIDE,
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            "num_layers": 3,
            "joint_attention_dim": _TEXT_DIM,
            "caption_projection_dim": _WIDTH,
            "pooled_projection_dim": _TEXT_DIM,
            "pos_embed_max_size": 4,
            "dual_attention_layers": (0,),  # as in Stable Diffusion 3.5 medium
            "qk_norm": "rms_norm",
        },
        _stable_diffusion_3,
    ),
    TinyModel(
        "MotifVideoTransformer3DModel",
        {
            **_VIDEO_CONFIG,
            "in_channels": _CONDITIONED_CHANNELS,
            "num_layers": 2,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "image_embed_dim": _TEXT_DIM,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif_video,
    ),
)
"""One tiny network per class."""

UNBUILT: dict[str, str] = {}
"""Classes that can't be built here, with the reason."""
