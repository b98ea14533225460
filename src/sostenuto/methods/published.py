"""The networks that published tables, ratios and polynomials were measured on, by which these are refused on any other.

By class alone: pruned and small networks of a class may try what was measured on the large one.
"""

from __future__ import annotations

from typing import Any

Network = dict[str, Any]

DIT_XL_2: Network = {"class": "DiTTransformer2DModel"}
FLUX_DEV: Network = {"class": "FluxTransformer2DModel"}
COGVIDEOX_2B: Network = {"class": "CogVideoXTransformer3DModel"}
COGVIDEOX_5B: Network = {"class": "CogVideoXTransformer3DModel"}
CONSISID: Network = {"class": "ConsisIDTransformer3DModel"}
HIDREAM: Network = {"class": "HiDreamImageTransformer2DModel"}
HUNYUAN_VIDEO: Network = {"class": "HunyuanVideoTransformer3DModel"}
LATTE: Network = {"class": "LatteTransformer3DModel"}
LTX_VIDEO: Network = {"class": "LTXVideoTransformer3DModel"}
LUMINA_2: Network = {"class": "Lumina2Transformer2DModel"}
LUMINA_T2X: Network = {"class": "LuminaNextDiT2DModel"}
MOCHI: Network = {"class": "MochiTransformer3DModel"}
OPEN_SORA: Network = {"class": "STDiT3"}  # this one and the next in their authors' code; diffusers has neither
OPEN_SORA_PLAN: Network = {"class": "LatteT2V"}
