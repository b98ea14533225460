"""The table of what is known: one row per class of networks.

Left out are lists that run on the conditioning alone, or a few refining blocks in front of the main list: they are cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sostenuto.anatomy import Anatomy, BlockList, Branch, SiteKind

_SELF, _CROSS, _TEMPORAL = SiteKind.SELF_ATTENTION, SiteKind.CROSS_ATTENTION, SiteKind.TEMPORAL_ATTENTION
_JOINT, _MLP, _FUSED = SiteKind.JOINT_ATTENTION, SiteKind.MLP, SiteKind.FUSED

# --- branches that several classes share ---------------------------------------------------------------------------

_ATTN = Branch(_SELF, "attn", ("norm1",))
_ATTN1 = Branch(_SELF, "attn1", ("norm1",))
_ATTN2 = Branch(_CROSS, "attn2")  # reads the residual stream itself
_ATTN2_NORMED = Branch(_CROSS, "attn2", ("norm2",))
_FF = Branch(_MLP, "ff", ("norm2",))
_FF_AFTER_CROSS = Branch(_MLP, "ff", ("norm3",))
_FF_ON_GRID = Branch(_MLP, "ff", tokenwise=False)  # convolutions over the image

_DIT = (_ATTN1, _FF_AFTER_CROSS)
_PIXART = (_ATTN1, _ATTN2, _FF)
_THREE_NORMS = (_ATTN1, _ATTN2_NORMED, _FF_AFTER_CROSS)
_SANA = (_ATTN1, _ATTN2, _FF_ON_GRID)
_ANY_NORM = (_ATTN1, _ATTN2, Branch(_MLP, "ff"))  # which norm serves which branch depends on the configuration
_TWO_STREAMS = (
    Branch(_JOINT, "attn", ("norm1", "norm1_context")),
    _FF,
    Branch(_MLP, "ff_context", ("norm2_context",)),
)
_SHARED_PROJECTION = (Branch(_FUSED, "proj_out", ("norm",), hollow=("attn",)),)
_SANDWICH = (Branch(_SELF, "attention", ("attention_norm1",)), Branch(_MLP, "feed_forward", ("ffn_norm1",)))
_JOY = (
    Branch(_JOINT, "attn", ("img_norm1", "txt_norm1")),
    Branch(_MLP, "img_mlp", ("img_norm2",)),
    Branch(_MLP, "txt_mlp", ("txt_norm2",)),
)
_WAN = (_ATTN1, _ATTN2_NORMED, Branch(_MLP, "ffn", ("norm3",)))

_STREAMS = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")


def _one_list(path: str, *branches: Branch, streams: tuple[str, ...] = ("hidden_states",), **more: Any) -> Anatomy:
    return Anatomy((BlockList(path, branches, streams),), **more)


def _fills_cache(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("kv_cache_mode") not in (None, "cached", "inject")


def _glm_fills_cache(arguments: Mapping[str, Any]) -> bool:
    caches = arguments.get("kv_caches")
    return caches is not None and getattr(caches[0], "mode", None) == "write"


def _far_fills_cache(arguments: Mapping[str, Any]) -> bool:
    return bool((arguments.get("kv_cache_flag") or {}).get("is_cache_step"))


# --- families whose classes have the same anatomy --------------------------------------------------------------------

_DOUBLE = BlockList("transformer_blocks", _TWO_STREAMS, _STREAMS, _TEXT_FIRST)
_FLUX = Anatomy((_DOUBLE, BlockList("single_transformer_blocks", _SHARED_PROJECTION, _STREAMS, _TEXT_FIRST)))
_CHROMA = Anatomy((_DOUBLE, BlockList("single_transformer_blocks", _SHARED_PROJECTION)))  # its two streams are joined
_HUNYUAN = Anatomy(
    (
        BlockList("transformer_blocks", _TWO_STREAMS, _STREAMS),
        BlockList("single_transformer_blocks", _SHARED_PROJECTION, _STREAMS),
    )
)
_COGVIDEOX = _one_list("transformer_blocks", Branch(_JOINT, "attn1", ("norm1",)), _FF, streams=_STREAMS)
_COGVIEW4 = (
    Branch(_JOINT, "attn1", ("norm1",)),
    Branch(_MLP, "ff", ("norm2", "norm2_context"), calls=2),  # the image, then the text
)
_WAN_BLOCKS = BlockList("blocks", _WAN)

ANATOMIES: dict[str, Anatomy] = {
    # --- one stream
    "DiTTransformer2DModel": _one_list("transformer_blocks", *_DIT),
    "PixArtTransformer2DModel": _one_list("transformer_blocks", *_PIXART),
    "AllegroTransformer3DModel": _one_list("transformer_blocks", *_PIXART),
    "LatteTransformer3DModel": Anatomy(
        (
            BlockList("transformer_blocks", _PIXART),
            BlockList("temporal_transformer_blocks", (Branch(_TEMPORAL, "attn1", ("norm1",)), _FF)),
        ),
        interleaved=True,
    ),
    "SanaTransformer2DModel": _one_list("transformer_blocks", *_SANA),
    "SanaVideoTransformer3DModel": _one_list("transformer_blocks", *_SANA),
    "SanaWMTransformer3DModel": _one_list(  # the norms' outputs are split by frames
        "blocks",
        Branch(_SELF, "attn", tokenwise=False),
        Branch(_CROSS, "cross_attn"),
        Branch(_MLP, "mlp", tokenwise=False),
        streams=("x",),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": _one_list("transformer_blocks", *_THREE_NORMS, prefill=_fills_cache),
    "Transformer2DModel": _one_list("transformer_blocks", *_ANY_NORM),
    "DreamLiteTransformer2DModel": _one_list("transformer_blocks", *_ANY_NORM),
    "TransformerTemporalModel": _one_list(
        "transformer_blocks",
        Branch(_TEMPORAL, "attn1", ("norm1",)),
        Branch(_TEMPORAL, "attn2", ("norm2",)),
        _FF_AFTER_CROSS,
    ),
    "PriorTransformer": _one_list("transformer_blocks", *_DIT),
    "HunyuanDiT2DModel": Anatomy(
        (
            BlockList(
                "blocks",
                (
                    _ATTN1,
                    Branch(_CROSS, "attn2", ("norm2",), tokenwise=False),  # rotates its tokens by position
                    _FF_AFTER_CROSS,
                ),
                long_skips=True,
            ),
        )
    ),
    "LTXVideoTransformer3DModel": _one_list("transformer_blocks", _ATTN1, _ATTN2, _FF),
    "CosmosTransformer3DModel": _one_list("transformer_blocks", *_THREE_NORMS),
    "Kandinsky5Transformer3DModel": _one_list(
        "visual_transformer_blocks",
        Branch(_SELF, "self_attention", ("self_attention_norm",)),
        Branch(_CROSS, "cross_attention", ("cross_attention_norm",)),
        Branch(_MLP, "feed_forward", ("feed_forward_norm",)),
        streams=("visual_embed",),
    ),
    "Kandinsky6SRTransformer3DModel": _one_list(
        "visual_transformer_blocks",
        Branch(_SELF, "self_attention", ("self_attention_norm",)),
        Branch(_MLP, "feed_forward", ("feed_forward_norm",)),
    ),
    "BriaFibo2Transformer2DModel": _one_list(
        "layers",
        _SANDWICH[0],
        Branch(_CROSS, "cross_attention", ("cross_attn_norm1",)),  # in some blocks
        _SANDWICH[1],
        streams=("x",),
    ),
    "Krea2Transformer2DModel": _one_list("transformer_blocks", _ATTN, _FF),
    "Ideogram4Transformer2DModel": _one_list("layers", *_SANDWICH, reversed_timestep=True, negated_prediction=True),
    "ErnieImageTransformer2DModel": _one_list(  # its stream is [tokens, batch, channels]: no norm can see one token
        "layers", Branch(_SELF, "self_attention"), Branch(_MLP, "mlp", tokenwise=False), streams=("x",)
    ),
    "Lumina2Transformer2DModel": _one_list(
        "layers",
        Branch(_SELF, "attn", ("norm1",)),
        Branch(_MLP, "feed_forward", ("ffn_norm1",)),
        reversed_timestep=True,
        negated_prediction=True,
    ),
    "LuminaNextDiT2DModel": _one_list(  # both attentions read norm1
        "layers",
        Branch(_SELF, "attn1"),
        Branch(_CROSS, "attn2", ("norm1_context",)),
        Branch(_MLP, "feed_forward", ("ffn_norm1",)),
        reversed_timestep=True,
        negated_prediction=True,
        stepwise=("image_rotary_emb",),
    ),
    "ZImageTransformer2DModel": _one_list(
        "layers", *_SANDWICH, streams=("x",), timestep="t", reversed_timestep=True, negated_prediction=True
    ),
    "OmniGenTransformer2DModel": _one_list(
        "layers", Branch(_SELF, "self_attn", ("input_layernorm",)), Branch(_MLP, "mlp", ("post_attention_layernorm",))
    ),
    "PRXTransformer2DModel": _one_list(  # in pixels, behind a bottleneck, it predicts x₀, of which the pipeline makes a flow
        "blocks",
        Branch(_SELF, "attention", ("img_pre_norm",)),
        Branch(_MLP, "down_proj", ("post_attention_layernorm",)),
        converted=lambda config: config.get("bottleneck_size") is not None,
    ),
    "NucleusMoEImageTransformer2DModel": _one_list(  # every block projects the text anew and none changes it
        "transformer_blocks",
        Branch(_SELF, "attn", ("encoder_proj", "pre_attn_norm")),
        Branch(_MLP, "img_mlp", ("pre_mlp_norm",), tokenwise=False),  # experts choose their tokens
        negated_prediction=True,
    ),
    "QwenImage21Transformer2DModel": _one_list(
        "transformer_blocks",
        Branch(_SELF, "attn", ("img_norm1",)),
        Branch(_MLP, "img_mlp", ("img_norm2",)),
        noisy_last=True,
        prefill=_fills_cache,
    ),
    "RFD4ProteinaTransformer": Anatomy(
        (
            BlockList(
                "transformer_layers",
                (
                    Branch(_SELF, "mhba.mha", ("mhba.adaln",)),
                    Branch(
                        _MLP, "transition.transition", ("transition.adaln",), tokenwise=False
                    ),  # has a mask by token
                ),
                ("values",),
                whole=False,  # the updates of the pairs read what every second layer returns
            ),
        ),
        timestep="bb_ca_time",
        reversed_timestep=True,
        stepwise=("local_latents", "local_latents_time"),
    ),
    # --- audio
    "AceStepTransformer1DModel": _one_list(
        "layers",
        Branch(_SELF, "self_attn", ("self_attn_norm",)),
        Branch(_CROSS, "cross_attn", ("cross_attn_norm",)),
        Branch(_MLP, "mlp", ("mlp_norm",)),
        stepwise=("timestep_r",),
    ),
    "StableAudioDiTModel": _one_list("transformer_blocks", *_THREE_NORMS),
    "StableAudio3DiTModel": _one_list(
        "transformer_blocks",
        Branch(_SELF, "self_attn", ("pre_norm",)),
        Branch(_CROSS, "cross_attn", ("cross_attend_norm",)),
        Branch(_MLP, "ff", ("ff_norm",)),
    ),
    "LongCatAudioDiTTransformer": _one_list(  # normalised by a function, which can't be given one token
        "blocks",
        Branch(_SELF, "self_attn"),
        Branch(_CROSS, "cross_attn", ("cross_attn_norm", "cross_attn_norm_c"), tokenwise=False),  # rotates its tokens
        Branch(_MLP, "ffn"),
    ),
    "MiniMaxMusic3Transformer1DModel": _one_list("transformer_blocks", _ATTN, Branch(_MLP, "ff_out", ("norm2",))),
    # --- video, after Wan
    "WanTransformer3DModel": Anatomy((_WAN_BLOCKS,)),
    "WanVACETransformer3DModel": Anatomy(
        (
            # The hint that each of these blocks returns is added behind one of the main blocks.
            BlockList("vace_blocks", _WAN, ("control_hidden_states",), whole=False),
            _WAN_BLOCKS,
        )
    ),
    "WanAnimateTransformer3DModel": Anatomy((_WAN_BLOCKS,)),  # the face adapters stand between the blocks
    "WanAnimate2Transformer3DModel": _one_list(
        "blocks",
        Branch(_SELF, "self_attn", ("norm1",), optional=True),  # without guidance one block is not called
        Branch(_CROSS, "cross_attn", ("norm3",), optional=True),
        Branch(_MLP, "ffn", ("norm2",), optional=True),
        prefill=_fills_cache,
    ),
    "ChronoEditTransformer3DModel": Anatomy((_WAN_BLOCKS,)),
    "SkyReelsV2Transformer3DModel": Anatomy((_WAN_BLOCKS,)),
    "HeliosTransformer3DModel": Anatomy((_WAN_BLOCKS,)),
    "AnyFlowTransformer3DModel": Anatomy((_WAN_BLOCKS,), stepwise=("r_timestep",)),
    "AnyFlowFARTransformer3DModel": Anatomy(
        (_WAN_BLOCKS,), stepwise=("r_timestep", "kv_cache", "kv_cache_flag"), prefill=_far_fills_cache
    ),
    # --- two streams
    "SD3Transformer2DModel": Anatomy(
        (
            BlockList(
                "transformer_blocks",
                (
                    Branch(_JOINT, "attn", ("norm1_context",)),  # with dual attention norm1 serves attn2 too
                    Branch(_SELF, "attn2"),  # in the blocks with dual attention
                    _FF,
                    Branch(_MLP, "ff_context", ("norm2_context",)),
                ),
                _STREAMS,
                _TEXT_FIRST,
            ),
        )
    ),
    "QwenImageTransformer2DModel": Anatomy((BlockList("transformer_blocks", _JOY, _STREAMS, _TEXT_FIRST),)),
    "JoyImageEditTransformer3DModel": Anatomy((BlockList("double_blocks", _JOY, _STREAMS),)),
    "JoyImageEditPlusTransformer3DModel": Anatomy((BlockList("double_blocks", _JOY, _STREAMS),)),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": _COGVIDEOX,
    "CogView3PlusTransformer2DModel": _one_list(
        "transformer_blocks",
        Branch(_JOINT, "attn1", ("norm1",)),
        Branch(_MLP, "ff", ("norm2", "norm2_context")),
        streams=_STREAMS,
    ),
    "CogView4Transformer2DModel": _one_list("transformer_blocks", *_COGVIEW4, streams=_STREAMS),
    "GlmImageTransformer2DModel": _one_list(
        "transformer_blocks",
        *_COGVIEW4,
        streams=_STREAMS,
        timestep_offset=-1.0,
        stepwise=("kv_caches",),
        prefill=_glm_fills_cache,
    ),
    "EasyAnimateTransformer3DModel": _one_list(  # norm2 serves both MLPs
        "transformer_blocks",
        Branch(_JOINT, "attn1", ("norm1",)),
        Branch(_MLP, "ff"),
        Branch(_MLP, "txt_ff"),
        streams=_STREAMS,
    ),
    "MochiTransformer3DModel": _one_list(
        "transformer_blocks",
        Branch(_JOINT, "attn1", ("norm1", "norm1_context")),
        _FF_AFTER_CROSS,
        Branch(_MLP, "ff_context", ("norm3_context",)),
        streams=_STREAMS,
    ),
    "HunyuanVideo15Transformer3DModel": Anatomy(
        (BlockList("transformer_blocks", _TWO_STREAMS, _STREAMS),), stepwise=("timestep_r",)
    ),
    "Cosmos3OmniTransformer": _one_list(  # its packed tokens are the first dimension: no norm can see one token
        "layers",
        Branch(_JOINT, "self_attn"),
        Branch(_MLP, "mlp"),
        Branch(_MLP, "mlp_moe_gen"),
        streams=("und_seq", "gen_seq"),
        timestep="vision_timesteps",
        latents="vision_tokens",
        stepwise=("sound_tokens", "sound_timesteps", "action_tokens", "action_timesteps"),
    ),
    # --- video and audio
    "LTX2VideoTransformer3DModel": _one_list(
        "transformer_blocks",
        _ATTN1,
        Branch(_SELF, "audio_attn1", ("audio_norm1",)),
        _ATTN2_NORMED,
        Branch(_CROSS, "audio_attn2", ("audio_norm2",)),
        # Their two norms serve both: one stream's queries are the other's keys. They rotate tokens by position.
        Branch(_CROSS, "audio_to_video_attn", tokenwise=False, optional=True),
        Branch(_CROSS, "video_to_audio_attn", tokenwise=False, optional=True),
        _FF_AFTER_CROSS,
        Branch(_MLP, "audio_ff", ("audio_norm3",)),
        streams=("hidden_states", "audio_hidden_states"),
        stepwise=("audio_hidden_states", "audio_timestep", "sigma", "audio_sigma"),
    ),
    "Kandinsky6Transformer3DModel": _one_list(
        "visual_transformer_blocks",
        Branch(_SELF, "video_dec_block.self_attention", ("video_dec_block.self_attention_norm",)),
        # The norm in front of a stream's attention to the text is also what the other stream attends to.
        Branch(_CROSS, "video_dec_block.cross_attention"),
        Branch(_SELF, "audio_dec_block.self_attention", ("audio_dec_block.self_attention_norm",), optional=True),
        Branch(_CROSS, "audio_dec_block.cross_attention", optional=True),
        Branch(
            _CROSS, "va_cross_attention", ("va_normalization",), tokenwise=False, optional=True
        ),  # rotates its tokens
        Branch(_CROSS, "av_cross_attention", ("av_normalization",), tokenwise=False, optional=True),
        Branch(_MLP, "video_dec_block.feed_forward", ("video_dec_block.feed_forward_norm",)),
        Branch(_MLP, "audio_dec_block.feed_forward", ("audio_dec_block.feed_forward_norm",), optional=True),
        streams=("vis", "aud"),
        stepwise=("audio_hidden_states",),
    ),
    "MiniMaxH3Transformer3DModel": _one_list(
        "transformer_blocks", _ATTN, _FF, stepwise=("audio_hidden_states", "timestep_indices")
    ),
    # --- two streams, then one
    "FluxTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "BriaFiboTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": Anatomy(
        (_DOUBLE, BlockList("single_transformer_blocks", (Branch(_FUSED, "attn", ("norm",)),))), prefill=_fills_cache
    ),
    "Flux3Transformer2DModel": Anatomy(  # one norm serves both branches
        (
            BlockList("mode_blocks.image", (Branch(_SELF, "attn"), Branch(_MLP, "ff"))),
            BlockList("single_transformer_blocks", (Branch(_JOINT, "attn"), Branch(_MLP, "ff")), _STREAMS, _TEXT_FIRST),
        ),
        stepwise=("target_timestep",),
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN,
    "HunyuanImageTransformer2DModel": Anatomy(_HUNYUAN.blocks, stepwise=("timestep_r",)),
    "AuraFlowTransformer2DModel": Anatomy(
        (
            BlockList("joint_transformer_blocks", _TWO_STREAMS, _STREAMS, _TEXT_FIRST),
            BlockList("single_transformer_blocks", (_ATTN, _FF)),
        )
    ),
    "HiDreamImageTransformer2DModel": Anatomy(
        (
            BlockList(
                "double_stream_blocks",
                (
                    Branch(_JOINT, "block.attn1", ("block.norm1_i", "block.norm1_t")),
                    Branch(_MLP, "block.ff_i", ("block.norm3_i",)),
                    Branch(_MLP, "block.ff_t", ("block.norm3_t",)),
                ),
                _STREAMS,
            ),
            BlockList(
                "single_stream_blocks",
                (Branch(_SELF, "block.attn1", ("block.norm1_i",)), Branch(_MLP, "block.ff_i", ("block.norm3_i",))),
            ),
        ),
        timestep="timesteps",
        negated_prediction=True,
    ),
    "MotifVideoTransformer3DModel": Anatomy(
        (
            BlockList(
                "transformer_blocks",
                (
                    Branch(_JOINT, "attn", ("norm1",)),  # norm1_context serves the cross-attention too
                    Branch(_CROSS, "cross_attn", tokenwise=False),  # reads joint attention's output, rotates its tokens
                    _FF,
                    Branch(_MLP, "ff_context", ("norm2_context",)),
                ),
                _STREAMS,
            ),
            BlockList(
                "single_transformer_blocks",
                (Branch(_FUSED, "proj_out", ("norm",), hollow=("attn", "cross_attn")),),
                _STREAMS,
                whole=False,  # the decoder, its last blocks, starts from other streams
            ),
        )
    ),
}
