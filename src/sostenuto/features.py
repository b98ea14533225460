"""What a site puts out: a tensor, or tensors nested in tuples as its module returns them (an image and a text stream)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from sostenuto.errors import EngineError

Feature: TypeAlias = Any
"""A tensor, or a tuple or list of features; what else a module returns among them (as a rule ``None``) is handed on."""

Slots: TypeAlias = "list[Feature | None]"
"""Kept features of one site, newest first; ``None`` where there is no memory yet."""


def mapped(function: Callable[..., Any], *features: Feature, leaf: type = torch.Tensor) -> Feature:
    """``function`` of the tensors at the same place of features of the same structure, in that structure."""
    first = features[0]
    if isinstance(first, leaf):
        return function(*features)
    if isinstance(first, (tuple, list)):
        parts = [mapped(function, *places, leaf=leaf) for places in zip(*features, strict=True)]
        return tuple(parts) if isinstance(first, tuple) else parts
    return first


def leaves(feature: Feature, leaf: type = torch.Tensor) -> Iterator[Any]:
    """The tensors of a feature, in order."""
    if isinstance(feature, leaf):
        yield feature
    elif isinstance(feature, (tuple, list)):
        for part in feature:
            yield from leaves(part, leaf)


def as_rows(samples: Feature) -> torch.Tensor:
    """A tensor ``[rows, …]`` as it is, or the samples of a list as the rows of one.

    Samples of different sizes are filled up with zeros, ``[rows, values]``, and scaled so that the mean square of each stays.
    """
    if isinstance(samples, torch.Tensor):
        return samples
    each = list(leaves(samples))
    if len({sample.shape for sample in each}) == 1:
        return torch.stack(each)
    size = max(sample.numel() for sample in each)
    rows = [sample.flatten().float() * (size / sample.numel()) ** 0.5 for sample in each]
    return torch.stack([torch.nn.functional.pad(row, (0, size - len(row))) for row in rows])


def moved(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A tensor on a device, in a precision if it is one of floating point; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def num_bytes(feature: Feature | None) -> int:
    """Size of a feature's data in bytes."""
    return sum(tensor.nbytes for tensor in leaves(feature))


def versions(feature: Feature) -> int:
    """How often any of its tensors was written to; inference tensors don't tell."""
    return sum(tensor._version for tensor in leaves(feature) if not tensor.is_inference())


def empty_like(value: torch.Tensor) -> torch.Tensor:
    """Memory for one kept tensor, usable inside and outside of inference mode."""
    # In the value's memory format, which decides the kernels of the convolutions that read it.
    with torch.inference_mode(False):
        return torch.empty_like(value, requires_grad=False)


def keep(slots: Slots, value: Feature) -> None:
    """Write a value into the first slot."""
    recorded = not torch.compiler.is_dynamo_compiling() and any(tensor.requires_grad for tensor in leaves(value))
    if slots[0] is None or recorded:  # autograd may yet read what is there; torch.compile is given its slots beforehand
        slots[0] = mapped(empty_like, value)
    mapped(lambda slot, tensor: slot.copy_(tensor.detach()), slots[0], value)


def kept(slot: Feature | None) -> Feature:
    """What a slot holds, which must be something."""
    if slot is None:
        raise EngineError("a kept feature is missing: please report this as a fault of sostenuto")
    return slot


def combine(slots: Sequence[Feature | None], weights: torch.Tensor) -> Feature:
    """``Σ_j weights[j] · slots[j]``, newest first; the weights sum to 1."""
    read = [kept(slot) for slot in slots[: weights.shape[0]]]
    return mapped(lambda *tensors: _combine(tensors, weights), *read)


def _combine(tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """More than two are summed in float32 at least: the weights of high orders are large and alternate in sign."""
    newest = tensors[0]
    if len(tensors) == 2 and weights.dtype == newest.dtype:  # one pass over memory: older + w₀·(newest − older)
        return _within_range(torch.lerp(tensors[1], newest, weights[0]), newest.dtype)
    exact = torch.promote_types(newest.dtype, torch.float32)
    output = newest.to(exact) * weights[0]
    for index in range(1, len(tensors)):
        output = torch.addcmul(output, tensors[index].to(exact), weights[index])
    return _within_range(output, newest.dtype).to(newest.dtype)


def _within_range(output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A forecast may overshoot what it is made of: in float16 the largest number stands in for what would be infinite."""
    if dtype != torch.float16:
        return output
    bounds = torch.finfo(dtype)
    return output.clamp(bounds.min, bounds.max)
