"""The benchmark networks: published and small configurations of diffusers' transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sostenuto.bench.specs import nearest, parse
from sostenuto.compat import diffusers_name
from sostenuto.errors import InputError

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network that can be sampled without weights of anyone's.

    Attributes:
        name: what users type.
        model_class: the class in diffusers.
        config: arguments of its constructor.
        inputs: ``inputs(network, batch, generator)``: latents under ``hidden_states`` and the conditioning; random.
        scheduler: class of the scheduler that it is sampled with.
        batch_size: rows of a call.
        timestep_scale: what the scheduler's timesteps are multiplied by for the network.
        size: what ``inputs`` needs to know beside the configuration.
        summary: one line.
    """

    name: str
    model_class: str
    config: Mapping[str, Any]
    inputs: Callable[[Network, int, Generator], Inputs]
    scheduler: str
    summary: str
    batch_size: int = 2
    timestep_scale: float = 1.0
    size: Mapping[str, Any] = field(default_factory=dict)

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in evaluation mode, random weights none of which is zero; on ``meta`` without weights.

        Raises:
            DependencyError: the installed diffusers has no such class.
        """
        model_class = diffusers_name(self.model_class)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model = model_class(**self.config)
            if device != "meta":
                with torch.no_grad():
                    for parameter in model.parameters():
                        if not parameter.any():
                            parameter.normal_(std=0.02)
        model = model.to(device)  # buffers of NumPy's making
        return (model if dtype is torch.float32 else model.to(dtype)).eval().requires_grad_(False)


def network_of(text: str) -> Network | None:
    """The benchmark network of ``name`` or ``name:key=value,…``; ``None`` where the name is another model's.

    Raises:
        InputError: it has no such parameter.
    """
    if text.partition(":")[0] not in NETWORKS:
        return None
    name, given = parse(text)
    known = NETWORKS[name]
    if not given:
        return known
    if name not in ("dit", "flux"):
        raise InputError(f"{name} is a published configuration without parameters: vary dit or flux")
    return {"dit": _dit, "flux": _flux}[name](known, given)


def _taken(given: dict[str, Any], defaults: dict[str, int], name: str) -> dict[str, int]:
    odd = next((key for key in given if key not in defaults), None)
    if odd is not None:
        raise InputError(f"{name} has no parameter {odd!r}; {nearest(odd, defaults)}")
    wrong = next((f"{key}={value!r}" for key, value in given.items() if not isinstance(value, int) or value < 1), None)
    if wrong is not None:
        raise InputError(f"{name}: {wrong} must be a whole number of 1 or more")
    return defaults | given


def _dit(known: Network, given: dict[str, Any]) -> Network:
    size = _taken(given, {"layers": 12, "width": 384, "tokens": 256}, known.name)
    side = round(size["tokens"] ** 0.5)
    heads = max(1, size["width"] // 64)
    if side * side != size["tokens"] or size["width"] % heads:
        raise InputError(f"dit needs a square number of tokens and a width that {heads} heads divide, not {size}")
    config = dict(known.config) | {
        "num_layers": size["layers"],
        "num_attention_heads": heads,
        "attention_head_dim": size["width"] // heads,
        "sample_size": 2 * side,
    }
    return replace(known, config=config)


def _flux(known: Network, given: dict[str, Any]) -> Network:
    defaults = {"double": 4, "single": 8, "width": 256, "tokens": 256, "text": 32}
    size = _taken(given, defaults, known.name)
    side = round(size["tokens"] ** 0.5)
    heads = max(1, size["width"] // 64)
    head = size["width"] // heads
    if side * side != size["tokens"] or size["width"] % heads or head % 8:
        raise InputError(f"flux needs a square number of tokens and a width whose heads divide by 8, not {size}")
    config = dict(known.config) | {
        "num_layers": size["double"],
        "num_single_layers": size["single"],
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "axes_dims_rope": (head // 4, 3 * head // 8, 3 * head // 8),
    }
    return replace(known, config=config, size={"side": side, "text": size["text"]})


def _labels_input(network: Network, batch: int, generator: Generator) -> Inputs:
    side, channels = network.config["sample_size"], network.config["in_channels"]
    return {
        "hidden_states": torch.randn(batch, channels, side, side, generator=generator),
        "class_labels": torch.arange(batch) % network.config["num_embeds_ada_norm"],
    }


def _flux_input(network: Network, batch: int, generator: Generator) -> Inputs:
    side, text, config = network.size["side"], network.size["text"], network.config
    inputs = {
        "hidden_states": torch.randn(batch, side * side, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=generator),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config.get("guidance_embeds") else {})


def _pixart_input(network: Network, batch: int, generator: Generator) -> Inputs:
    config, side = network.config, network.config["sample_size"]
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, generator=generator),
        "encoder_hidden_states": torch.randn(
            batch, network.size["text"], config["caption_channels"], generator=generator
        ),
        "encoder_attention_mask": torch.ones(batch, network.size["text"]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _video_input(network: Network, batch: int, generator: Generator) -> Inputs:
    config, size = network.config, network.size
    shape = (batch, size["frames"], config["in_channels"], config["sample_height"], config["sample_width"])
    text: Tensor = torch.randn(batch, config["max_text_seq_length"], config["text_embed_dim"], generator=generator)
    return {"hidden_states": torch.randn(shape, generator=generator), "encoder_hidden_states": text}


_DIT: dict[str, Any] = dict(in_channels=4, patch_size=2, num_embeds_ada_norm=1000)
_XL = _DIT | dict(num_attention_heads=16, attention_head_dim=72, out_channels=8, num_layers=28)
_FLUX: dict[str, Any] = dict(
    in_channels=64,
    joint_attention_dim=256,
    pooled_projection_dim=64,
    guidance_embeds=False,
    axes_dims_rope=(16, 24, 24),
)

_ALL = (
    Network(
        "dit",
        "DiTTransformer2DModel",
        _DIT | dict(num_attention_heads=6, attention_head_dim=64, out_channels=4, num_layers=12, sample_size=32),
        _labels_input,
        "DDIMScheduler",
        "12 blocks of width 384, 256 tokens; takes layers, width, tokens",
    ),
    Network(
        "flux",
        "FluxTransformer2DModel",
        _FLUX | dict(num_attention_heads=4, attention_head_dim=64, num_layers=4, num_single_layers=8),
        _flux_input,
        "FlowMatchEulerDiscreteScheduler",
        "4 two-stream and 8 one-stream blocks of width 256, 256 + 32 tokens; takes double, single, width, tokens, text",
        timestep_scale=1e-3,
        size={"side": 16, "text": 32},
    ),
    Network(
        "dit-xs",
        "DiTTransformer2DModel",
        _DIT | dict(num_attention_heads=1, attention_head_dim=32, out_channels=4, num_layers=8, sample_size=4),
        _labels_input,
        "DDIMScheduler",
        "8 blocks of width 32, 4 tokens: next to no arithmetic, so that the time is that of Python",
    ),
    Network(
        "dit-xl-2-256",
        "DiTTransformer2DModel",
        _XL | dict(sample_size=32),
        _labels_input,
        "DDPMScheduler",
        "DiT-XL/2 at 256²",
    ),
    Network(
        "dit-xl-2-512",
        "DiTTransformer2DModel",
        _XL | dict(sample_size=64),
        _labels_input,
        "DDPMScheduler",
        "DiT-XL/2 at 512²",
    ),
    Network(
        "pixart-sigma-1024",
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            cross_attention_dim=1152,
            sample_size=128,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            caption_channels=4096,
            interpolation_scale=2,
            use_additional_conditions=False,
        ),
        _pixart_input,
        "DPMSolverMultistepScheduler",
        "PixArt-Σ at 1024², 300 text tokens",
        size={"text": 300},
    ),
    Network(
        "flux-1-dev",
        "FluxTransformer2DModel",
        dict(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        _flux_input,
        "FlowMatchEulerDiscreteScheduler",
        "FLUX.1-dev at 1024², 4096 + 512 tokens",
        batch_size=1,
        timestep_scale=1e-3,
        size={"side": 64, "text": 512},
    ),
    Network(
        "cogvideox-2b",
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=30,
            attention_head_dim=64,
            in_channels=16,
            num_layers=30,
            sample_width=90,
            sample_height=60,
            sample_frames=49,
            text_embed_dim=4096,
            max_text_seq_length=226,
        ),
        _video_input,
        "DDIMScheduler",
        "CogVideoX-2B at 720×480, 49 frames",
        size={"frames": 13},
    ),
)

NETWORKS: dict[str, Network] = {network.name: network for network in _ALL}
"""All of them by name."""
