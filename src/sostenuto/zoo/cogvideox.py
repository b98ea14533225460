"""CogVideoX and CogView, Qwen-Image, EasyAnimate, Nucleus and RFD4-Proteina, each very small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sostenuto.compat import diffusers_name
from sostenuto.source import accepts
from sostenuto.zoo.tiny import TinyModel

_BATCH = 2
_TEXT_TOKENS = 5
_CHANNELS = 4
_TEXT_WIDTH = 8
_SIDE = 4
"""Height and width of the latents, or of their token grid where the pipeline hands over patches."""

_VIDEO_TOKENS = 2 * (_SIDE // 2) ** 2
"""Of two latent frames, in patches of 2 × 2."""


class _TinyExperts(TinyModel):
    def build(self, seed: int = 0) -> nn.Module:
        """As every tiny model, but diffusers leaves the packed experts as uninitialised memory."""
        model = super().build(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.normal_(std=0.1, generator=generator)
        return model


def _times(timestep: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((_BATCH,), timestep, dtype=dtype)


def _text(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_BATCH, _TEXT_TOKENS, _TEXT_WIDTH, generator=generator)


def _text_mask() -> torch.Tensor:
    """The second prompt is one token shorter."""
    mask = torch.ones(_BATCH, _TEXT_TOKENS, dtype=torch.bool)
    mask[1, -1] = False
    return mask


def _sizes(*names: str) -> dict[str, torch.Tensor]:
    """The micro-conditioning of CogView: pairs of pixels."""
    pixels = {"original_size": 32.0, "target_size": 32.0, "crop_coords": 0.0}
    return {name: torch.full((_BATCH, 2), pixels[name]) for name in names}


def _cogvideox_inputs(timestep: float, generator: torch.Generator, image_channels: int = 0) -> dict[str, Any]:
    """With ``image_channels``, a conditioning image is concatenated to the noisy latents."""
    angles = torch.rand(_VIDEO_TOKENS, _COGVIDEOX["attention_head_dim"], generator=generator)
    return {
        "hidden_states": torch.randn(_BATCH, 2, _CHANNELS + image_channels, _SIDE, _SIDE, generator=generator),
        "encoder_hidden_states": _text(generator),
        "timestep": _times(timestep, torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _consisid_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # One face for the whole batch, seen by the vision tower at two depths.
    return _cogvideox_inputs(timestep, generator, image_channels=_CHANNELS) | {
        "id_cond": torch.randn(1, 6, generator=generator),
        "id_vit_hidden": [torch.randn(1, 3, 8, generator=generator) for _ in range(2)],
    }


def _image_inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE, generator=generator),
        "encoder_hidden_states": _text(generator),
    }


def _cogview3plus_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return _image_inputs(generator) | {
        "timestep": _times(timestep, torch.int64),
        **_sizes("original_size", "target_size", "crop_coords"),
    }


def _cogview4_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return _image_inputs(generator) | {
        "timestep": _times(timestep),
        **_sizes("original_size", "target_size", "crop_coords"),
    }


def _glm_image_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    prior = torch.randint(8, (_BATCH, (_SIDE // 2) ** 2), generator=generator)
    return _image_inputs(generator) | {
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
        "timestep": _times(timestep - 1),
        **_sizes("target_size", "crop_coords"),
    }


def _token_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(_BATCH, _SIDE * _SIDE, _CHANNELS, generator=generator),
        "encoder_hidden_states": _text(generator),
        "encoder_hidden_states_mask": _text_mask(),
        "timestep": _times(timestep) / 1000,
    }


def _qwen_image_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    shapes: dict[str, Any] = {"img_shapes": [[(1, _SIDE, _SIDE)]] * _BATCH}
    if accepts(diffusers_name("QwenImageTransformer2DModel"), "txt_seq_lens"):  # as it needed them at first
        shapes["txt_seq_lens"] = [_TEXT_TOKENS] * _BATCH
    return _token_inputs(timestep, generator) | shapes


def _qwen_image21_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    # As with use_kv_cache=False: text to image, a slot of the language model for every 2 × 2 tokens of the image.
    slots = torch.arange(_TEXT_TOKENS + _SIDE * _SIDE // 4) >= _TEXT_TOKENS
    return _qwen_image_inputs(timestep, generator) | {"img_mask": slots.expand(_BATCH, -1)}


def _nucleus_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return _token_inputs(timestep, generator) | {"img_shapes": [(1, _SIDE, _SIDE)] * _BATCH}


def _easyanimate_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(_BATCH, _CHANNELS, 2, _SIDE, _SIDE, generator=generator),
        "timestep": _times(timestep),
        "encoder_hidden_states": _text(generator),
    }


def _rfd4_inputs(timestep: float, generator: torch.Generator) -> dict[str, Any]:
    tokens = (_BATCH, 6)
    times = 1 - _times(timestep) / 1000  # both modalities run from noise at 0 to data at 1
    return {
        "bb_ca": torch.randn(*tokens, 3, generator=generator),
        "local_latents": torch.randn(*tokens, _CHANNELS, generator=generator),
        "bb_ca_time": times,
        "local_latents_time": times,
        "padding_mask": torch.ones(tokens, dtype=torch.bool),
        "token_type": torch.randint(7, tokens, generator=generator),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(tokens, dtype=torch.bool),
            "supports_local_latent": torch.ones(tokens, dtype=torch.bool),
        },
        "recycle_depth": 1,
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_ROTARY_AXES = (4, 6, 6)

_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": _TEXT_WIDTH,
    "num_layers": 3,
    "use_rotary_positional_embeddings": True,
}

_CONSISID: dict[str, Any] = _COGVIDEOX | {
    "in_channels": 2 * _CHANNELS,
    "num_layers": 4,  # even, for every second block is followed by one of the cross-attentions to the face
    "is_train_face": True,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 6,
    "LFE_vit_dim": 8,
    "LFE_depth": 2,
    "LFE_dim_head": 4,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 3,
    "LFE_output_dim": 16,  # two thirds of the blocks' width
    "LFE_ff_mult": 2,
    "LFE_num_scale": 2,
}

_COGVIEW: dict[str, Any] = _HEADS | {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "num_layers": 3,
    "text_embed_dim": _TEXT_WIDTH,
    "time_embed_dim": 8,
    "condition_dim": 4,
}

_QWEN_IMAGE: dict[str, Any] = _HEADS | {
    "patch_size": 1,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "num_layers": 3,
    "axes_dims_rope": _ROTARY_AXES,
}

_NUCLEUS: dict[str, Any] = _QWEN_IMAGE | {
    "num_key_value_heads": 1,
    "joint_attention_dim": _TEXT_WIDTH,
    "mlp_ratio": 6.0,  # the dense block's inner width is a multiple of 128
    "dense_moe_strategy": "leave_first_block_dense",
    "num_experts": 4,
    "moe_intermediate_dim": 16,
    "capacity_factors": 2.0,
}

_EASYANIMATE: dict[str, Any] = _HEADS | {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "patch_size": 2,
    "num_layers": 3,
    "time_embed_dim": 8,
    "text_embed_dim": _TEXT_WIDTH,
}

_RFD4: dict[str, Any] = {
    "nlayers": 3,
    "token_dim": 32,
    "nheads": 2,
    "dim_cond": 16,
    "pair_repr_dim": 8,
    "latent_dim": _CHANNELS,
    "token_type_emb_dim": 4,
    "t_emb_dim": 8,
    "xt_pair_dist_dim": 6,
    # The released features, but for those that need a prepared molecule.
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists",),
    "tri_mult_c": 8,
    "num_sequence_classes": 5,
}

MODELS: tuple[TinyModel, ...] = (
    TinyModel("CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox_inputs),
    TinyModel("ConsisIDTransformer3DModel", _CONSISID, _consisid_inputs),
    TinyModel("CogView3PlusTransformer2DModel", _COGVIEW | {"pos_embed_max_size": _SIDE // 2}, _cogview3plus_inputs),
    TinyModel("CogView4Transformer2DModel", _COGVIEW, _cogview4_inputs),
    TinyModel("GlmImageTransformer2DModel", _COGVIEW | {"prior_vq_quantizer_codebook_size": 8}, _glm_image_inputs),
    TinyModel("QwenImageTransformer2DModel", _QWEN_IMAGE | {"joint_attention_dim": _TEXT_WIDTH}, _qwen_image_inputs),
    TinyModel("QwenImage21Transformer2DModel", _QWEN_IMAGE | {"context_in_dim": _TEXT_WIDTH}, _qwen_image21_inputs),
    TinyModel("EasyAnimateTransformer3DModel", _EASYANIMATE, _easyanimate_inputs),
    _TinyExperts("NucleusMoEImageTransformer2DModel", _NUCLEUS, _nucleus_inputs),
    TinyModel("RFD4ProteinaTransformer", _RFD4, _rfd4_inputs),
)
