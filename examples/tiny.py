"""The pipelines of the examples with tiny random parts: the real classes, nothing to download, a second on one CPU core."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from string import ascii_lowercase
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sostenuto.zoo import TINY_MODELS

TEXT = 16  # channels of the text features
LATENT = 4  # channels of the latents

# --- parts -------------------------------------------------------------------------------------------------------------


def _seeded(build: Any, *args: Any, **options: Any) -> Any:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **options).eval()


def _transformer(name: str, **changes: Any) -> torch.nn.Module:
    tiny = TINY_MODELS[name]
    return replace(tiny, config=tiny.config | changes).build()


def _tokenizer(max_length: int = 77) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins letters in pairs: any text works, and other texts are other tokens."""
    pairs = list(product(ascii_lowercase, repeat=2))
    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=max_length,
        chat_template=chat,
    )


_IDS = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
_ENCODER = dict(vocab_size=1000, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
_DECODER = _ENCODER | dict(num_key_value_heads=1, **_IDS)


def _clip(projected: bool = False) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(**_ENCODER, **_IDS, projection_dim=TEXT)
    return _seeded(transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel, config)


def _t5(width: int = TEXT, multilingual: bool = False) -> torch.nn.Module:
    config_class = transformers.UMT5Config if multilingual else transformers.T5Config
    model_class = transformers.UMT5EncoderModel if multilingual else transformers.T5EncoderModel
    return _seeded(
        model_class, config_class(vocab_size=1000, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def _image_vae(levels: int = 2) -> diffusers.AutoencoderKL:
    """Halves height and width ``levels − 1`` times."""
    return _seeded(
        diffusers.AutoencoderKL,
        latent_channels=LATENT,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
        shift_factor=0.0,
    )


def _flow(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


# --- images --------------------------------------------------------------------------------------------------------------


def dit_xl_2() -> diffusers.DiTPipeline:
    """Class-conditional DiT, images of 16 × 16."""
    return diffusers.DiTPipeline(
        transformer=_transformer("DiTTransformer2DModel", in_channels=LATENT, out_channels=8, num_embeds_ada_norm=1000),
        vae=_image_vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    """PixArt-Σ, for images of about 256 × 256: its pipeline knows no smaller ones."""
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=_image_vae(levels=4),
        transformer=_transformer(
            "PixArtTransformer2DModel", in_channels=LATENT, out_channels=8, caption_channels=TEXT, sample_size=32
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3 with its three text encoders."""
    both = 2 * TEXT  # the two CLIPs side by side
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=_tokenizer(),
        text_encoder=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_3=_tokenizer(256),
        text_encoder_3=_t5(both),
        vae=_image_vae(),
        transformer=_transformer(
            "SD3Transformer2DModel",
            joint_attention_dim=both,
            pooled_projection_dim=both,
            sample_size=16,
            pos_embed_max_size=16,
        ),
        scheduler=_flow(shift=3.0),
    )


def flux() -> diffusers.FluxPipeline:
    """FLUX.1-dev: guidance is an input."""
    return diffusers.FluxPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_clip(),
        tokenizer_2=_tokenizer(512),
        text_encoder_2=_t5(),
        vae=_image_vae(),
        transformer=_transformer(
            "FluxTransformer2DModel", in_channels=4 * LATENT, joint_attention_dim=TEXT, pooled_projection_dim=TEXT
        ),
        scheduler=_flow(use_dynamic_shifting=True),
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    """Qwen-Image: true guidance in two calls per step."""
    text = transformers.Qwen2_5_VLConfig(
        text_config=_DECODER | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])),
        vision_config=dict(depth=1, hidden_size=TEXT, num_heads=2, intermediate_size=32, out_hidden_size=TEXT),
    )
    vae = _seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=LATENT,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
    )
    return diffusers.QwenImagePipeline(
        tokenizer=_tokenizer(1100),
        text_encoder=_seeded(transformers.Qwen2_5_VLForConditionalGeneration, text),
        vae=vae,
        transformer=_transformer(
            "QwenImageTransformer2DModel", patch_size=2, in_channels=4 * LATENT, joint_attention_dim=TEXT
        ),
        scheduler=_flow(use_dynamic_shifting=True),
    )


def z_image() -> diffusers.ZImagePipeline:
    """Z-Image-Turbo: lists of images, time runs backwards."""
    return diffusers.ZImagePipeline(
        tokenizer=_tokenizer(512),
        text_encoder=_seeded(transformers.Qwen3Model, transformers.Qwen3Config(**_DECODER, head_dim=8)),
        vae=_image_vae(),
        transformer=_transformer(
            "ZImageTransformer2DModel", in_channels=LATENT, cap_feat_dim=TEXT, axes_lens=[1024, 32, 32]
        ),
        scheduler=_flow(shift=3.0),
    )


# --- videos --------------------------------------------------------------------------------------------------------------


def wan() -> diffusers.WanPipeline:
    """Wan 2.1: guidance in two calls per step."""
    vae = _seeded(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
    )
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(512),
        text_encoder=_t5(multilingual=True),
        vae=vae,
        transformer=_transformer("WanTransformer3DModel", text_dim=TEXT),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    """HunyuanVideo: guidance is an input."""
    vae = _seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=LATENT,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        tokenizer=_tokenizer(512),
        text_encoder=_seeded(transformers.LlamaModel, transformers.LlamaConfig(**_DECODER)),
        tokenizer_2=_tokenizer(),
        text_encoder_2=_clip(),
        vae=vae,
        transformer=_transformer("HunyuanVideoTransformer3DModel", text_embed_dim=TEXT, pooled_projection_dim=TEXT),
        scheduler=_flow(shift=7.0),
    )


def cogvideox() -> diffusers.CogVideoXPipeline:
    """CogVideoX: guidance in one batch."""
    vae = _seeded(
        diffusers.AutoencoderKLCogVideoX,
        latent_channels=LATENT,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=_tokenizer(226),
        text_encoder=_t5(),
        vae=vae,
        transformer=_transformer("CogVideoXTransformer3DModel", attention_head_dim=16, text_embed_dim=TEXT),
        scheduler=diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
    )


def ltx_video() -> diffusers.LTXPipeline:
    """LTX-Video: guidance in one batch, latents as tokens."""
    vae = _seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    )
    return diffusers.LTXPipeline(
        tokenizer=_tokenizer(128),
        text_encoder=_t5(),
        vae=vae,
        transformer=_transformer("LTXVideoTransformer3DModel", caption_channels=TEXT),
        scheduler=_flow(use_dynamic_shifting=True),
    )
