"""Tiny video transformers: LTX, Mochi, Cosmos, Kandinsky, MiniMax."""

from __future__ import annotations

from typing import Any

import torch

from sostenuto.zoo.tiny import TinyModel

_BATCH, _TEXT_TOKENS = 2, 5
_FRAMES, _HEIGHT, _WIDTH = 2, 4, 4


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _repeat(timestep: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (_BATCH,), timestep)


def _text_mask(dtype: torch.dtype) -> torch.Tensor:
    """The second prompt is shorter than the first."""
    mask = torch.ones(_BATCH, _TEXT_TOKENS, dtype=dtype)
    mask[1, -2:] = 0
    return mask


def _ltx(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, _BATCH, _FRAMES * _HEIGHT * _WIDTH, 8),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
        "timestep": _repeat(timestep),
        "encoder_attention_mask": _text_mask(torch.int64),
        "num_frames": _FRAMES,
        "height": _HEIGHT,
        "width": _WIDTH,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    audio_frames = 6
    return {
        "hidden_states": _noise(generator, _BATCH, _FRAMES * _HEIGHT * _WIDTH, 8),
        "audio_hidden_states": _noise(generator, _BATCH, audio_frames, 4),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 32),
        "audio_encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
        "timestep": _repeat(timestep),
        "sigma": _repeat(timestep),
        "encoder_attention_mask": _text_mask(torch.int64),
        "audio_encoder_attention_mask": _text_mask(torch.int64),
        "num_frames": _FRAMES,
        "height": _HEIGHT,
        "width": _WIDTH,
        "audio_num_frames": audio_frames,
        "use_cross_timestep": True,
    }


def _mochi(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, _BATCH, 4, _FRAMES, _HEIGHT, _WIDTH),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
        "timestep": _repeat(timestep),
        "encoder_attention_mask": _text_mask(torch.bool),
    }


def _cosmos(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, _BATCH, 4, _FRAMES, _HEIGHT, _WIDTH),
        "condition_mask": torch.zeros(_BATCH, 1, _FRAMES, _HEIGHT, _WIDTH),
        # One timestep per frame: frames that are given have their own.
        "timestep": _repeat(timestep / 1000, _BATCH, 1, _FRAMES, 1, 1),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
    }


def _cosmos3(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    """One sample, packed: text tokens, then video, then sound."""
    grid = (_FRAMES, _HEIGHT // 2, _WIDTH // 2)
    text, video, sound = torch.arange(_TEXT_TOKENS + 8 + 3).split((_TEXT_TOKENS, 8, 3))
    tokens = len(text) + len(video) + len(sound)
    return {
        "input_ids": torch.randint(32, (len(text),), generator=generator),
        "text_indexes": text,
        "position_ids": torch.arange(tokens).expand(3, -1),
        "und_len": len(text),
        "sequence_length": tokens,
        "vision_tokens": [_noise(generator, 1, 4, _FRAMES, _HEIGHT, _WIDTH)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": _repeat(timestep, len(video)),
        "vision_noisy_frame_indexes": [torch.arange(_FRAMES)],
        "sound_tokens": [_noise(generator, 4, len(sound))],
        "sound_token_shapes": [(len(sound), 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": _repeat(timestep, len(sound)),
        "sound_noisy_frame_indexes": [torch.arange(len(sound))],
    }


def _kandinsky5(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, _BATCH, _FRAMES, _HEIGHT, _WIDTH, 4),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
        "pooled_projections": _noise(generator, _BATCH, 8),
        "timestep": _repeat(timestep),
        "visual_rope_pos": [torch.arange(size) for size in (_FRAMES, _HEIGHT // 2, _WIDTH // 2)],
        "text_rope_pos": torch.arange(_TEXT_TOKENS),
        "scale_factor": (1, 2, 2),
    }


def _with_condition(latents: torch.Tensor) -> torch.Tensor:
    """The latents, an empty condition and its empty mask, in their channels."""
    return torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], dim=-1)


def _kandinsky6(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _with_condition(_noise(generator, _BATCH, _FRAMES, _HEIGHT, _WIDTH, 4)),
        "audio_hidden_states": _noise(generator, _BATCH, 6, 4),
        "encoder_hidden_states": _noise(generator, _BATCH, _TEXT_TOKENS, 16),
        "pooled_projections": _noise(generator, _BATCH, 8),
        "timestep": _repeat(timestep),
        "encoder_attention_mask": _text_mask(torch.bool),
    }


def _kandinsky6_super_resolution(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # Its sparse attention works on squares of 8 × 8 tokens.
    return {
        "hidden_states": _with_condition(_noise(generator, _BATCH, _FRAMES, 8, 8, 4)),
        "timestep": _repeat(timestep),
    }


def _minimax_h3(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    text, audio, video = torch.arange(_TEXT_TOKENS + 4 + 8).split((_TEXT_TOKENS, 4, 8))
    tokens = len(text) + len(audio) + len(video)
    modality = torch.zeros(tokens, dtype=torch.int64)
    modality[text], modality[audio] = 1, 2
    # Video and audio have schedules of their own: the shift of the audio's is a quarter of the video's.
    timesteps = _repeat(timestep / 1000, tokens)
    timesteps[audio] = 4 * timesteps[audio] / (1 + 3 * timesteps[audio])
    distinct, indices = torch.unique(timesteps, sorted=True, return_inverse=True)
    return {
        "hidden_states": _noise(generator, _BATCH, len(video), 16),
        "audio_hidden_states": _noise(generator, _BATCH, len(audio), 4),
        "encoder_hidden_states": _noise(generator, _BATCH, len(text), 16),
        "timestep": distinct,
        "timestep_indices": indices,
        "token_tags": modality,
        "position_ids": torch.arange(tokens)[:, None].expand(-1, 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


MODELS: tuple[TinyModel, ...] = (
    TinyModel(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 16,
        },
        _ltx,
    ),
    TinyModel(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "num_layers": 3,
            "use_prompt_embeddings": False,
        },
        _ltx2,
    ),
    TinyModel(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
        },
        _mochi,
    ),
    TinyModel(
        "CosmosTransformer3DModel",
        {
            "in_channels": 5,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,
            "text_embed_dim": 16,
            "adaln_lora_dim": 8,
            "max_size": (4, 8, 8),
            # Its padding mask is scaled by torchvision, which may not be installed.
            "concat_padding_mask": False,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 16,
            "encoder_hidden_states_channels": 16,
        },
        _cosmos,
    ),
    TinyModel(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "rope_axes_dim": (4, 2, 2),
            "sound_dim": 4,
            "sound_gen": True,
            "vocab_size": 32,
        },
        _cosmos3,
    ),
    TinyModel(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 2,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky5,
    ),
    TinyModel(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 2,
            "num_visual_blocks": 3,
            "axes_dims": (4, 2, 2),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "model_dim_a": 16,
            "time_dim_a": 8,
            "ff_dim_a": 32,
            "text_token_padding": True,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        _kandinsky6,
    ),
    TinyModel(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky6_super_resolution,
    ),
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
)

UNBUILT: dict[str, str] = {
    "TransformerTemporalModel": "it is a layer of video U-Nets rather than a denoiser: its blocks ignore the timestep",
}
