"""Tiny networks of the DiT, PixArt, Latte, Allegro and Sana families, and of the transformers of older pipelines."""

from __future__ import annotations

from typing import Any

import torch

from sostenuto.compat import diffusers_name
from sostenuto.zoo.tiny import TinyModel

_BATCH = 2
_TEXT = 5
_CAPTION = 12
_FRAMES = 3
_WIDTH = {"num_attention_heads": 2, "attention_head_dim": 8}
_WIDTH_3D = {"num_attention_heads": 2, "attention_head_dim": 12}  # a head's channels are split over three axes


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(_BATCH, *shape, generator=generator)


def _steps(timestep: float) -> torch.Tensor:
    """As schedulers over a trained grid of steps have it: whole numbers."""
    return torch.tensor(int(timestep))


def _expanded(timestep: float | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(timestep).expand(_BATCH)


def _mask() -> torch.Tensor:
    """A text mask; the first prompt is the shorter one."""
    mask = torch.ones(_BATCH, _TEXT, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def _text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": _draw(generator, _TEXT, _CAPTION), "encoder_attention_mask": _mask()}


def _angles(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """Angles of a rotary position embedding, one for each pair of channels."""
    return torch.outer(positions.float(), 10000.0 ** -(torch.arange(0, channels, 2) / channels))


def _dit(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _draw(generator, 2, 8, 8),
        "timestep": _expanded(_steps(timestep)),
        "class_labels": torch.arange(_BATCH),
    }


def _pixart(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _draw(generator, 2, 8, 8),
        "timestep": _expanded(_steps(timestep)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        **_text(generator),
    }


def _latte(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _draw(generator, 2, _FRAMES, 4, 4),
        "timestep": _expanded(_steps(timestep)),
        "encoder_hidden_states": _draw(generator, _TEXT, _CAPTION),
        "enable_temporal_attentions": True,
    }


def _allegro(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    sizes = (_FRAMES, 2, 2)  # in tokens
    positions = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).T.reshape(3, 1, -1).contiguous()
    angles = [_angles(torch.arange(size), _WIDTH_3D["attention_head_dim"] // 3).repeat(1, 2) for size in sizes]
    return {
        "hidden_states": _draw(generator, 2, _FRAMES, 4, 4),
        "timestep": _expanded(timestep),
        "image_rotary_emb": (tuple((angle.cos(), angle.sin()) for angle in angles), tuple(positions)),
        **_text(generator),
    }


def _sana(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": _draw(generator, 2, 4, 4), "timestep": _expanded(timestep), **_text(generator)}


def _sana_video(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": _draw(generator, 2, _FRAMES, 4, 4), "timestep": _expanded(timestep), **_text(generator)}


def _sana_world(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    timesteps = torch.full((_BATCH, 1, _FRAMES), float(timestep))
    timesteps[:, :, 0] = 0.0  # the first frame is given
    poses = torch.eye(4).repeat(_BATCH, _FRAMES, 1, 1)
    poses[..., :3, 3] = _draw(generator, _FRAMES, 3)
    intrinsics = torch.tensor([2.0, 2.0, 1.0, 1.0]).expand(_BATCH, _FRAMES, 4)
    return {
        "hidden_states": _draw(generator, 2, _FRAMES, 2, 2),
        "timestep": timesteps,
        "encoder_hidden_states": _draw(generator, 1, _TEXT, _CAPTION),
        "mask": _mask(),
        "data_info": {"img_hw": torch.tensor([[64.0, 64.0]])},
        "camera_conditions": torch.cat([poses.flatten(2), intrinsics], dim=-1),
        "chunk_plucker": _draw(generator, 6, _FRAMES, 2, 2),
    }


def _sana_refiner(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    SanaWMRefinerKVCache = diffusers_name("SanaWMRefinerKVCache", "models.transformers.transformer_sana_wm_refiner")

    tokens, width = 4, 16

    def rotary(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = _angles(torch.arange(first, first + tokens), width).repeat_interleave(2, dim=-1)
        angles = angles.expand(_BATCH, tokens, width)
        return angles.cos(), angles.sin()

    cache = SanaWMRefinerKVCache(3)
    cache.sink_pe = rotary(0)
    for layer in cache.layer_caches:
        layer.store_sink(_draw(generator, tokens, width), _draw(generator, tokens, width))
        layer.store_history(_draw(generator, tokens, width), _draw(generator, tokens, width))
    return {
        "hidden_states": _draw(generator, tokens, 4),
        "timestep": torch.full((_BATCH, tokens), float(timestep)),
        "video_rotary_emb": rotary(2 * tokens),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        **_text(generator),
    }


def _codes(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randint(0, 12, (_BATCH, 16), generator=generator),
        "timestep": _steps(timestep),
        "encoder_hidden_states": _draw(generator, _TEXT, _CAPTION),
    }


def _prior(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _draw(generator, _CAPTION),
        "timestep": _steps(timestep),
        "proj_embedding": _draw(generator, _CAPTION),
        "encoder_hidden_states": _draw(generator, _TEXT, _CAPTION),
        "attention_mask": _mask().bool(),
    }


def _dreamlite(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": _draw(generator, 8, 4, 4), "timestep": _steps(timestep), **_text(generator)}


MODELS: tuple[TinyModel, ...] = (
    TinyModel(
        "DiTTransformer2DModel",
        {**_WIDTH, "in_channels": 2, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10},
        _dit,
    ),
    TinyModel(
        "PixArtTransformer2DModel",
        {
            **_WIDTH,
            "in_channels": 2,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 16,
            "caption_channels": _CAPTION,
            "sample_size": 8,
        },
        _pixart,
    ),
    TinyModel(
        "LatteTransformer3DModel",
        {
            **_WIDTH,
            "in_channels": 2,
            "num_layers": 3,
            "cross_attention_dim": 16,
            "caption_channels": _CAPTION,
            "sample_size": 4,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": _FRAMES,
        },
        _latte,
    ),
    TinyModel(
        "AllegroTransformer3DModel",
        {
            **_WIDTH_3D,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "caption_channels": _CAPTION,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": _FRAMES,
        },
        _allegro,
    ),
    TinyModel(
        "SanaTransformer2DModel",
        {
            **_WIDTH,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": _CAPTION,
            "sample_size": 4,
        },
        _sana,
    ),
    TinyModel(
        "SanaVideoTransformer3DModel",
        {
            **_WIDTH_3D,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": _CAPTION,
            "sample_size": 4,
            "rope_max_seq_len": 8,
        },
        _sana_video,
    ),
    TinyModel(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 2,
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": _CAPTION,
        },
        _sana_world,
    ),
    TinyModel(
        "SanaWMLTX2RefinerTransformer3DModel",
        {
            **_WIDTH,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 3,
            "caption_channels": _CAPTION,
        },
        _sana_refiner,
    ),
    TinyModel(
        "Transformer2DModel",  # as in VQ-Diffusion, the only pipeline in which it is the denoiser itself
        {
            **_WIDTH,
            "num_layers": 3,
            "cross_attention_dim": _CAPTION,
            "sample_size": 4,
            "num_vector_embeds": 13,
            "num_embeds_ada_norm": 1001,
            "norm_type": "ada_norm",
        },
        _codes,
    ),
    TinyModel(
        "PriorTransformer",
        {**_WIDTH, "num_layers": 3, "embedding_dim": _CAPTION, "num_embeddings": _TEXT},
        _prior,
    ),
    TinyModel(
        "DreamLiteTransformer2DModel",  # pipelines have it in a U-Net; on its own it needs a norm that knows the time
        {
            **_WIDTH,
            "in_channels": 8,
            "num_layers": 3,
            "norm_num_groups": 4,
            "cross_attention_dim": _CAPTION,
            "num_embeds_ada_norm": 1001,
            "norm_type": "ada_norm",
        },
        _dreamlite,
    ),
)

UNBUILT: dict[str, str] = {}
"""Classes that can't be built or run here, with the reason."""
