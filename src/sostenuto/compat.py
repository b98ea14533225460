"""The only file that touches private names of torch or shapes of diffusers' objects; each is tested for before use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sostenuto.errors import AnatomyError, EngineError

_CALL_SLOT = "_compiled_call_impl"  # Module.__call__ prefers this instance attribute; Module.compile() fills it


def intercept_calls(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put a function around every call of ``module``, outside of its hooks and of what ``module.compile()`` made.

    Args:
        module: the module; also what ``torch.compile`` returned for one.
        around: takes the call as it is and returns the one to make.

    Returns:
        A function that takes the interception away again.
    """
    if not hasattr(nn.Module, _CALL_SLOT) or not hasattr(module, "_call_impl"):
        raise EngineError(f"torch {torch.__version__} has no {_CALL_SLOT}: sostenuto needs torch 2.6 or newer")
    had_own = _CALL_SLOT in module.__dict__
    before = getattr(module, _CALL_SLOT)
    inner = before if before is not None else module._call_impl
    outer = around(inner)
    object.__setattr__(module, _CALL_SLOT, outer)

    def restore() -> None:
        if getattr(module, _CALL_SLOT) is not outer:
            return  # compiled after us: that compilation is the user's
        if had_own:
            object.__setattr__(module, _CALL_SLOT, before)
        else:
            object.__delattr__(module, _CALL_SLOT)

    return restore


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module go through ``torch.compile``, by either of its forms."""
    return hasattr(module, "_orig_mod") or getattr(module, _CALL_SLOT, None) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without what ``torch.compile`` put around it."""
    return getattr(module, "_orig_mod", module)


def find_denoiser(target: Any) -> nn.Module:
    """The denoiser of a pipeline, or the module itself.

    Raises:
        AnatomyError: the object is neither a module nor a pipeline with a transformer or a U-Net.
    """
    if isinstance(target, nn.Module):
        return target
    for name in ("transformer", "unet"):
        denoiser = getattr(target, name, None)
        if isinstance(denoiser, nn.Module):
            return denoiser
    raise AnatomyError(
        f"{type(target).__name__} has no transformer or unet to cache: pass a diffusers pipeline that has one, or the "
        "denoiser itself"
    )


# What a network beside the denoiser (ControlNet, T2I-Adapter) adds to its features; other values at every step.
STEPWISE_ARGUMENTS = frozenset(
    {
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
    }
)


def config_of(denoiser: nn.Module) -> dict[str, Any]:
    """The public configuration of a denoiser as plain JSON data; of a module without one, its parameter shapes."""
    module = unwrapped(denoiser)
    config = getattr(module, "config", None)
    if config is None:
        return {name: list(p.shape) for name, p in module.named_parameters()}
    items = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(items, default=str))


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's noise levels are those of flow matching, ``x = (1 − σ) x₀ + σ ε``."""
    config = getattr(scheduler, "config", None)
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(config, "use_flow_sigmas", False))


def map_output(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A denoiser's output (tensor, tuple, or diffusers' output object) with its first tensor mapped."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, tuple) and type(output) is tuple:
        return (function(output[0]), *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        first = dataclasses.fields(output)[0].name
        return dataclasses.replace(output, **{first: function(getattr(output, first))})
    raise EngineError(
        f"a denoiser that returns a {type(output).__name__} can't be corrected: return a tensor or a tuple"
    )


def only_tensor(output: Any) -> Any:
    """The tensor in an output that holds nothing else (diffusers' attentions return a tuple of one); else the output."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


def first_tensor(output: Any) -> torch.Tensor:
    """The prediction in a denoiser's output."""
    found: list[torch.Tensor] = []
    map_output(output, lambda tensor: found.append(tensor) or tensor)
    return found[0]
