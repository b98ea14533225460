"""Tiny networks of Flux and its relatives: text and image tokens in one attention, first as two streams, then as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from sostenuto.zoo.tiny import TinyModel

_BATCH, _TEXT, _HEIGHT, _WIDTH = 2, 5, 3, 4
_IMAGE = _HEIGHT * _WIDTH
_CHANNELS, _TEXT_CHANNELS = 4, 10


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(_BATCH, *shape, generator=generator)


def _each(value: float) -> Tensor:
    return torch.full((_BATCH,), value)


def _text_lengths() -> Tensor:
    return torch.tensor([_TEXT, _TEXT - 2])


def _text_mask() -> Tensor:
    """Which text tokens are no padding, shape ``[batch, text]``."""
    return torch.arange(_TEXT) < _text_lengths()[:, None]


def _grid() -> Tensor:
    """Positions (0, row, column) of the image tokens, shape ``[image, 3]``."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(_HEIGHT), torch.arange(_WIDTH))


def _tokens(level: float, generator: Generator) -> dict[str, Any]:
    """What most of these networks read: latents as tokens, the text's tokens, the noise level."""
    return dict(
        hidden_states=_normal(generator, _IMAGE, _CHANNELS),
        encoder_hidden_states=_normal(generator, _TEXT, _TEXT_CHANNELS),
        timestep=_each(level),
    )


def _flux_tokens(level: float, generator: Generator) -> dict[str, Any]:
    return _tokens(level, generator) | dict(img_ids=_grid(), txt_ids=torch.zeros(_TEXT, 3))


def _flux_like(timestep: float, generator: Generator) -> dict[str, Any]:
    return _flux_tokens(timestep / 1000, generator)


def _flux(timestep: float, generator: Generator) -> dict[str, Any]:
    return _flux_like(timestep, generator) | dict(pooled_projections=_normal(generator, 6), guidance=_each(3.5))


def _flux3(timestep: float, generator: Generator) -> dict[str, Any]:
    text_ids = pad(torch.arange(_TEXT)[:, None], (3, 0))
    return _tokens(timestep / 1000, generator) | dict(img_ids=pad(_grid(), (0, 1)), txt_ids=text_ids)


def _flux2(timestep: float, generator: Generator) -> dict[str, Any]:
    inputs = _flux3(timestep, generator) | dict(guidance=_each(4.0))
    return inputs | {ids: inputs[ids].expand(_BATCH, -1, -1) for ids in ("img_ids", "txt_ids")}


def _chroma(timestep: float, generator: Generator) -> dict[str, Any]:
    # Chroma's pipelines give the mask in the dtype of the text features.
    mask = torch.cat([_text_mask(), torch.ones(_BATCH, _IMAGE)], dim=1)
    return _flux_like(timestep, generator) | dict(attention_mask=mask)


def _bria_fibo(timestep: float, generator: Generator) -> dict[str, Any]:
    layers = [_normal(generator, _TEXT, 6) for _ in range(_FLUX["num_layers"] + _FLUX["num_single_layers"])]
    return _flux_tokens(timestep, generator) | dict(text_encoder_layers=layers)


def _bria_fibo2(timestep: float, generator: Generator) -> dict[str, Any]:
    return dict(
        hidden_states=_normal(generator, _CHANNELS, 2 * _HEIGHT, 2 * _WIDTH),
        timestep=_each(timestep / 1000),
        encoder_hidden_states=_normal(generator, 2, _TEXT, _TEXT_CHANNELS),
        encoder_attention_mask=_text_mask(),
    )


def _krea2(timestep: float, generator: Generator) -> dict[str, Any]:
    return _tokens(timestep / 1000, generator) | dict(
        encoder_hidden_states=_normal(generator, _TEXT, 2, _TEXT_CHANNELS),  # of two layers of the text encoder
        position_ids=torch.cat([torch.zeros(_TEXT, 3), _grid()]),
        encoder_attention_mask=_text_mask(),
    )


def _ideogram4(timestep: float, generator: Generator) -> dict[str, Any]:
    # One sequence, text first: latents and text features both have a row for each of its tokens.
    text_ids = torch.arange(_TEXT)[:, None].expand(-1, 3)
    roles = torch.tensor([3] * _TEXT + [2] * _IMAGE)
    return dict(
        hidden_states=pad(_normal(generator, _IMAGE, _CHANNELS), (0, 0, _TEXT, 0)),
        timestep=_each(1 - timestep / 1000),
        encoder_hidden_states=pad(_normal(generator, _TEXT, _TEXT_CHANNELS), (0, 0, 0, _IMAGE)),
        position_ids=torch.cat([text_ids, _grid() + 65536]).expand(_BATCH, -1, -1),
        segment_ids=torch.ones(_BATCH, _TEXT + _IMAGE, dtype=torch.long),
        indicator=roles.expand(_BATCH, -1),
    )


def _ernie_image(timestep: float, generator: Generator) -> dict[str, Any]:
    return dict(
        hidden_states=_normal(generator, _CHANNELS, _HEIGHT, _WIDTH),
        timestep=_each(timestep),
        text_bth=_normal(generator, _TEXT, _TEXT_CHANNELS),
        text_lens=_text_lengths(),
    )


_HEADS = dict(num_attention_heads=2, attention_head_dim=8)
_FLUX: dict[str, Any] = dict(
    in_channels=_CHANNELS,
    num_layers=2,
    num_single_layers=3,
    joint_attention_dim=_TEXT_CHANNELS,
    axes_dims_rope=(2, 2, 4),
    **_HEADS,
)
_FLUX2 = _FLUX | dict(axes_dims_rope=(2, 2, 2, 2))

MODELS: tuple[TinyModel, ...] = (
    TinyModel("FluxTransformer2DModel", _FLUX | dict(pooled_projection_dim=6, guidance_embeds=True), _flux),
    TinyModel("Flux2Transformer2DModel", _FLUX2 | dict(timestep_guidance_channels=16), _flux2),
    TinyModel("Flux3Transformer2DModel", _FLUX2 | dict(cond_in_channels=_CHANNELS, timestep_channels=16), _flux3),
    TinyModel(
        "ChromaTransformer2DModel",
        _FLUX | dict(approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=2),
        _chroma,
    ),
    TinyModel("BriaTransformer2DModel", _FLUX, _flux_tokens),
    TinyModel("BriaFiboTransformer2DModel", _FLUX | dict(text_encoder_dim=6), _bria_fibo),
    TinyModel(
        "BriaFibo2Transformer2DModel",
        dict(
            in_channels=_CHANNELS,
            dim=24,  # of less, the MLP would have no channels
            n_layers=3,
            n_heads=2,
            cap_feat_dim=_TEXT_CHANNELS,
            injection_layer_ids=(1,),
            min_num_gist_tokens=2,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=(4, 4, 4),
            axes_lens=(16, 8, 8),
        ),
        _bria_fibo2,
    ),
    TinyModel("LongCatImageTransformer2DModel", _FLUX, _flux_like),
    TinyModel("OvisImageTransformer2DModel", _FLUX | dict(out_channels=_CHANNELS), _flux_like),
    TinyModel(
        "Krea2Transformer2DModel",
        dict(
            in_channels=_CHANNELS,
            num_layers=3,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=_TEXT_CHANNELS,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            axes_dims_rope=(4, 2, 2),
            **_HEADS,
        ),
        _krea2,
    ),
    TinyModel(
        "Ideogram4Transformer2DModel",
        dict(
            in_channels=_CHANNELS,
            num_layers=3,
            intermediate_size=32,
            adaln_dim=8,
            llm_features_dim=_TEXT_CHANNELS,
            mrope_section=(2, 1, 1),
            **_HEADS,
        ),
        _ideogram4,
    ),
    TinyModel(
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=16,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=32,
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            text_in_dim=_TEXT_CHANNELS,
            rope_axes_dim=(4, 2, 2),
        ),
        _ernie_image,
    ),
)
"""One tiny network per class."""
