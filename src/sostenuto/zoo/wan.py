"""Wan's video transformers and their descendants, as tiny networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sostenuto.compat import diffusers_name
from sostenuto.zoo.tiny import TinyModel

_BATCH = 2
_HEADS, _HEAD_WIDTH = 2, 16
_CHANNELS, _FRAMES, _HEIGHT, _WIDTH = 4, 3, 4, 6
_PATCHES = (_HEIGHT // 2) * (_WIDTH // 2)
"""Tokens per latent frame: all patches are 1 × 2 × 2."""
_TEXT_TOKENS, _TEXT_WIDTH = 5, 16
_IMAGE_TOKENS, _IMAGE_WIDTH = 4, 16

_WAN: dict[str, Any] = dict(
    num_attention_heads=_HEADS,
    attention_head_dim=_HEAD_WIDTH,
    in_channels=_CHANNELS,
    out_channels=_CHANNELS,
    text_dim=_TEXT_WIDTH,
    freq_dim=32,
    ffn_dim=64,
    num_layers=3,
)
_JOY: dict[str, Any] = dict(
    in_channels=_CHANNELS,
    hidden_size=_HEADS * _HEAD_WIDTH,
    num_attention_heads=_HEADS,
    text_dim=_TEXT_WIDTH,
    mlp_width_ratio=2.0,
    num_layers=3,
    rope_dim_list=[8, 4, 4],
)

_Inputs = Callable[[float, torch.Generator], dict[str, Any]]


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(_BATCH, *shape, generator=generator)


def _text(generator: torch.Generator) -> torch.Tensor:
    return _noise(generator, _TEXT_TOKENS, _TEXT_WIDTH)


def _image(generator: torch.Generator) -> torch.Tensor:
    return _noise(generator, _IMAGE_TOKENS, _IMAGE_WIDTH)


def _video(generator: torch.Generator, channels: int = _CHANNELS, frames: int = _FRAMES) -> torch.Tensor:
    return _noise(generator, channels, frames, _HEIGHT, _WIDTH)


def _wan(channels: int = _CHANNELS, dtype: torch.dtype = torch.float32) -> _Inputs:
    """Inputs that all of Wan's classes have; the timestep's type is that of the scheduler in the pipeline."""

    def inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
        return dict(
            hidden_states=_video(generator, channels),
            timestep=torch.full((_BATCH,), timestep, dtype=dtype),
            encoder_hidden_states=_text(generator),
        )

    return inputs


def _vace(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return dict(
        **_wan()(timestep, generator),
        control_hidden_states=_video(generator, 2 * _CHANNELS),
        control_hidden_states_scale=torch.ones(2),
    )


def _animate(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return dict(
        # The noisy latents, the reference latents and a mask of 4 channels, stacked.
        **_wan(2 * _CHANNELS + 4, torch.int64)(timestep, generator),
        encoder_hidden_states_image=_image(generator),
        pose_hidden_states=_video(generator, frames=_FRAMES - 1),
        # Of 5 frames the face encoder makes 2: one per latent frame but the first.
        face_pixel_values=_noise(generator, 3, 5, 8, 8),
    )


def _animate_2(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    """A pass over lists of samples; the first call compiles its mask, unless the stance is ``force_eager``."""
    WanAnimate2KVCache = diffusers_name("WanAnimate2KVCache", "models.transformers.transformer_wan_animate_2")

    cache = WanAnimate2KVCache(3)
    for layer in cache.layer_caches:
        # What the pass over the driving video leaves behind.
        layer.store(*(_noise(generator, (_FRAMES - 1) * _PATCHES, _HEADS, _HEAD_WIDTH) for _ in range(2)))
    return dict(
        hidden_states=list(_video(generator)),
        timestep=torch.full((_BATCH,), timestep),
        encoder_hidden_states=list(_text(generator)),
        condition_latents=list(_video(generator, _CHANNELS + 4)),
        kv_cache=cache,
        kv_cache_mode="cached",
        seq_len=_FRAMES * _PATCHES,
        reference_grid_sizes=torch.tensor([[_FRAMES - 1, _HEIGHT // 2, _WIDTH // 2]] * _BATCH),
        origin_len=5,
        origin_area=[8 * _HEIGHT, 8 * _WIDTH],
    )


def _chronoedit(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # The noisy latents, the image's latents and a mask of 4 channels, stacked.
    return dict(**_wan(2 * _CHANNELS + 4)(timestep, generator), encoder_hidden_states_image=_image(generator))


def _helios(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    frames = {"history_long": 4, "history_mid": 2, "history_short": 2}
    places = torch.arange(sum(frames.values()) + _FRAMES).split([*frames.values(), _FRAMES])
    return dict(
        **_wan()(timestep, generator),
        indices_hidden_states=places[-1][None],
        **{f"indices_latents_{name}": place[None] for name, place in zip(frames, places[:-1], strict=True)},
        **{f"latents_{name}": _video(generator, frames=count) for name, count in frames.items()},
    )


def _anyflow(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    """A flow map from ``timestep`` to ``r_timestep``, each given per frame; the frames precede the channels."""
    return dict(
        hidden_states=_noise(generator, _FRAMES, _CHANNELS, _HEIGHT, _WIDTH),
        timestep=torch.full((_BATCH, _FRAMES), timestep, dtype=torch.float64),
        r_timestep=torch.full((_BATCH, _FRAMES), max(timestep - 50.0, 0.0), dtype=torch.float64),
        encoder_hidden_states=_text(generator),
    )


def _anyflow_far(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    """A step on the fourth chunk: the first is cached in large patches (one a frame), the next two in small ones."""

    def cache(tokens: int) -> torch.Tensor:
        return torch.randn(2, _BATCH, _HEADS, tokens, _HEAD_WIDTH, generator=generator)

    return dict(
        **_anyflow(timestep, generator),
        chunk_partition=[_FRAMES] * 4,
        kv_cache={
            layer: dict(full_cache=cache(2 * _FRAMES * _PATCHES), compressed_cache=cache(_FRAMES)) for layer in range(3)
        },
        kv_cache_flag=dict(num_cached_chunks=3, is_cache_step=False),
    )


def _joy(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return dict(
        # Two items: the image to edit, then the noisy latents.
        hidden_states=_noise(generator, 2, _CHANNELS, 1, _HEIGHT, _WIDTH),
        timestep=torch.full((_BATCH,), timestep),
        encoder_hidden_states=_text(generator),
    )


def _joy_plus(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(_BATCH, _TEXT_TOKENS, dtype=torch.int64)
    mask[0, -1] = 0
    return dict(
        # Patches of the noisy latents and of two images of other sizes, the second of which one sample lacks.
        hidden_states=_noise(generator, 14, _CHANNELS, 1, 2, 2),
        timestep=torch.full((_BATCH,), timestep),
        encoder_hidden_states=_text(generator),
        encoder_hidden_states_mask=mask,
        shape_list=[[(1, 2, 3), (1, 2, 2), (1, 2, 2)], [(1, 2, 3), (1, 2, 2)]],
    )


MODELS: tuple[TinyModel, ...] = (
    TinyModel("WanTransformer3DModel", _WAN, _wan()),
    TinyModel("WanVACETransformer3DModel", _WAN | dict(vace_layers=[0, 2], vace_in_channels=2 * _CHANNELS), _vace),
    TinyModel(
        "WanAnimateTransformer3DModel",
        _WAN
        | dict(
            in_channels=2 * _CHANNELS + 4,
            latent_channels=_CHANNELS,
            num_layers=4,
            image_dim=_IMAGE_WIDTH,
            motion_encoder_channel_sizes={"4": 8, "8": 8},
            motion_encoder_size=8,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        _animate,
    ),
    TinyModel(
        "WanAnimate2Transformer3DModel",
        dict(
            text_len=8,
            in_dim=2 * _CHANNELS + 4,
            dim=_HEADS * _HEAD_WIDTH,
            ffn_dim=64,
            freq_dim=32,
            text_dim=_TEXT_WIDTH,
            out_dim=_CHANNELS,
            num_heads=_HEADS,
            num_layers=3,
            # The image's embedding is 1280 wide in every configuration.
            use_img_emb=False,
        ),
        _animate_2,
    ),
    TinyModel(
        "ChronoEditTransformer3DModel",
        _WAN | dict(in_channels=2 * _CHANNELS + 4, image_dim=_IMAGE_WIDTH),
        _chronoedit,
    ),
    TinyModel("SkyReelsV2Transformer3DModel", _WAN, _wan(dtype=torch.int64)),
    TinyModel("HeliosTransformer3DModel", _WAN | dict(rope_dim=(8, 4, 4)), _helios),
    TinyModel("AnyFlowTransformer3DModel", _WAN, _anyflow),
    TinyModel("AnyFlowFARTransformer3DModel", _WAN, _anyflow_far),
    TinyModel("JoyImageEditTransformer3DModel", _JOY, _joy),
    TinyModel("JoyImageEditPlusTransformer3DModel", _JOY, _joy_plus),
)
"""One tiny network per class."""

UNBUILT: dict[str, str] = {}
"""Classes that can't be built or run here, and why."""
