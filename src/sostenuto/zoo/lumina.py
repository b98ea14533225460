"""Tiny single-stream image networks (Lumina, Z-Image, OmniGen, PRX) and the audio and music networks."""

from __future__ import annotations

from typing import Any

import torch

from sostenuto.compat import diffusers_name
from sostenuto.zoo.tiny import TinyModel

_BATCH = 2
_CHANNELS = 4
_TEXT_LENGTH = 6
_TEXT_WIDTH = 12
_SIDE = 8
_AUDIO_LENGTH = 8


def _share(timestep: float, size: int = _BATCH) -> torch.Tensor:
    return torch.full((size,), timestep / 1000)


def _images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE, generator=generator)


def _audio(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_BATCH, _CHANNELS, _AUDIO_LENGTH, generator=generator)


def _text(generator: torch.Generator, length: int = _TEXT_LENGTH) -> torch.Tensor:
    return torch.randn(_BATCH, length, _TEXT_WIDTH, generator=generator)


def _mask(length: int = _TEXT_LENGTH) -> torch.Tensor:
    """The second sample is two tokens shorter."""
    return torch.arange(length) < torch.tensor([[length], [length - 2]])


def _lumina2(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _images(generator),
        "timestep": 1 - _share(timestep),
        "encoder_hidden_states": _text(generator),
        "encoder_attention_mask": _mask(),
    }


def _lumina_next(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    get_2d_rotary_pos_embed_lumina = diffusers_name("get_2d_rotary_pos_embed_lumina", "models.embeddings")

    return {
        "hidden_states": _images(generator),
        "timestep": 1 - _share(timestep),
        "encoder_hidden_states": _text(generator),
        "encoder_mask": _mask().int(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, _SIDE // 2, _SIDE // 2),
        "cross_attention_kwargs": {},
    }


def _z_image(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "x": list(_images(generator).unsqueeze(2)),
        "t": 1 - _share(timestep),
        "cap_feats": list(_text(generator)),
    }


def _omnigen(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # The first sample's prompt holds an input image of 2 × 2 patches; a token with the timestep follows the text.
    image = slice(1, 5)
    before = _TEXT_LENGTH + 1
    length = before + (_SIDE // 2) ** 2
    attention = torch.ones(_BATCH, length, length)
    attention[:, :before] = attention[:, :before].tril()
    attention[0, image, image] = 1
    return {
        "hidden_states": _images(generator),
        "timestep": _share(timestep),
        "input_ids": torch.randint(32, (_BATCH, _TEXT_LENGTH), generator=generator),
        "input_img_latents": [torch.randn(1, _CHANNELS, 4, 4, generator=generator)],
        "input_image_sizes": {0: [[image.start, image.stop]]},
        "attention_mask": attention,
        "position_ids": torch.arange(length).expand(_BATCH, -1),
    }


def _prx(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _images(generator),
        "timestep": _share(timestep),
        "encoder_hidden_states": _text(generator),
        "attention_mask": _mask(),
    }


def _ace_step(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    latents = _audio(generator).mT
    return {
        "hidden_states": latents,
        "timestep": _share(timestep),
        "timestep_r": _share(timestep),
        "encoder_hidden_states": _text(generator),
        # The source's latents and a mask of the part to generate, side by side.
        "context_latents": torch.cat([_audio(generator).mT, torch.ones_like(latents)], dim=-1),
    }


def _stable_audio(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    get_1d_rotary_pos_embed = diffusers_name("get_1d_rotary_pos_embed", "models.embeddings")

    return {
        "hidden_states": _audio(generator),
        "timestep": _share(timestep, 1),
        "encoder_hidden_states": _text(generator),
        "global_hidden_states": _text(generator, 1),
        "rotary_embedding": get_1d_rotary_pos_embed(8, _AUDIO_LENGTH + 1, use_real=True, repeat_interleave_real=False),
    }


def _stable_audio_3(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _audio(generator),
        "timestep": _share(timestep),
        "encoder_hidden_states": _text(generator),
        "global_hidden_states": _text(generator, 1)[:, 0],
        "encoder_attention_mask": _mask(),
    }


def _longcat_audio(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    latents = _audio(generator).mT
    return {
        "hidden_states": latents,
        "encoder_hidden_states": _text(generator),
        "encoder_attention_mask": _mask(),
        "timestep": _share(timestep),
        "attention_mask": _mask(_AUDIO_LENGTH),
        "latent_cond": torch.zeros_like(latents),
    }


def _minimax_music(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _audio(generator),
        "timestep": _share(timestep),
        "encoder_hidden_states": _text(generator, _AUDIO_LENGTH),
    }


MODELS: tuple[TinyModel, ...] = (
    TinyModel(
        "Lumina2Transformer2DModel",
        {
            "sample_size": _SIDE,
            "in_channels": _CHANNELS,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (8, 4, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": _TEXT_WIDTH,
        },
        _lumina2,
    ),
    TinyModel(
        "LuminaNextDiT2DModel",
        {
            "sample_size": _SIDE,
            "in_channels": _CHANNELS,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": _TEXT_WIDTH,
        },
        _lumina_next,
    ),
    TinyModel(
        "ZImageTransformer2DModel",
        {
            "in_channels": _CHANNELS,
            "dim": 16,
            "n_layers": 3,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": _TEXT_WIDTH,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 16, 16],
        },
        _z_image,
    ),
    TinyModel(
        "OmniGenTransformer2DModel",
        {
            "in_channels": _CHANNELS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": _SIDE,
        },
        _omnigen,
    ),
    TinyModel(
        "PRXTransformer2DModel",
        {
            "in_channels": _CHANNELS,
            "context_in_dim": _TEXT_WIDTH,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
        _prx,
    ),
    TinyModel(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 3 * _CHANNELS,
            "audio_acoustic_hidden_dim": _CHANNELS,
            "sliding_window": 1,
            "encoder_hidden_size": _TEXT_WIDTH,
        },
        _ace_step,
    ),
    TinyModel(
        "StableAudioDiTModel",
        {
            "sample_size": _AUDIO_LENGTH,
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": _TEXT_WIDTH,
            "cross_attention_input_dim": _TEXT_WIDTH,
        },
        _stable_audio,
    ),
    TinyModel(
        "StableAudio3DiTModel",
        {
            "io_channels": _CHANNELS,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "cond_token_dim": _TEXT_WIDTH,
            "global_cond_dim": _TEXT_WIDTH,
            "local_add_cond_dim": _CHANNELS + 1,
            "timestep_features_dim": 16,
            "ff_mult": 2.0,
            "num_memory_tokens": 3,
        },
        _stable_audio_3,
    ),
    TinyModel(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 3,
            "dit_heads": 2,
            "dit_text_dim": _TEXT_WIDTH,
            "latent_dim": _CHANNELS,
            "cross_attn_norm": True,
            "ff_mult": 2.0,
        },
        _longcat_audio,
    ),
    TinyModel(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": _CHANNELS,
            "condition_dim": _TEXT_WIDTH,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        _minimax_music,
    ),
)
"""One network per class."""

UNBUILT: dict[str, str] = {}
"""Classes that can't be built tiny, with the reason."""
