"""The tap of a self-attention that runs over a window, with a kept residual, or for one half of a guided batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from sostenuto import compat
from sostenuto.errors import MethodError
from sostenuto.features import Feature, as_rows, keep, kept
from sostenuto.plan import Action, Op
from sostenuto.sites import Site
from sostenuto.source import accepts
from sostenuto.tap import BranchTap

ConditionalHalf = Literal["first", "second"]

_OWN = int(Op.WINDOW | Op.SHARE | Op.RESIDUAL)
_ATTENDS = int(Op.WINDOW | Op.RESIDUAL)
_ABSENT = ("group_norm", "spatial_norm", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "residual_connection")
_PROCESSOR = "AttnProcessor2_0"


class AttentionTap(BranchTap):
    """Carries out ``WINDOW``, ``SHARE`` and ``RESIDUAL`` besides what every branch can; else the module's own forward runs.

    Args:
        site: a self-attention, ``[batch, tokens, channels]`` in and out.
        denoiser: the network.
        window: a token attends to those at most so many places before and after it; ``None``: an eighth of the tokens.
        conditional_half: where in the batch the conditional pass is.

    Raises:
        MethodError: the module is not a plain self-attention.
    """

    def __init__(
        self, site: Site, denoiser: nn.Module, window: int | None = None, conditional_half: ConditionalHalf = "first"
    ) -> None:
        super().__init__(site, denoiser)
        check_plain(site.id, self.module)
        self.window, self.conditional_half = window, conditional_half

    def can(self, action: Action) -> bool:
        """Every action."""
        return True

    def residual_shape(self, output: Sequence[int]) -> tuple[int, ...]:
        """The residual lies before the output projection: ``[batch, tokens, heads · head channels]``."""
        module: Any = self.module
        return (*output[:-1], int(module.to_v.out_features))

    def branch(self, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """What stands in for the attention's ``forward``."""
        plain = super().branch(compute)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            op = self.op
            if not op & _OWN:
                return plain(*args, **kwargs)
            self.reach()
            hidden_states, *others = (*args, *kwargs.values())
            if hidden_states.ndim != 3 or any(value is not None for value in others):
                raise MethodError(f"{self.site.id} is called with more than [batch, tokens, channels]: {_REMEDY}")
            if op & int(Op.SHARE):
                hidden_states = self._conditional(hidden_states)
            output = self._attend(hidden_states, op) if op & _ATTENDS else compute(hidden_states)
            if op & int(Op.SHARE):
                output = torch.cat([output, output])
            if op & int(Op.STORE):
                self.store(output)
            return output

        return forward

    def _conditional(self, batch: torch.Tensor) -> torch.Tensor:
        half = batch.shape[0] // 2
        return batch[:half] if self.conditional_half == "first" else batch[half:]

    def _attend(self, hidden_states: torch.Tensor, op: int) -> torch.Tensor:
        """``proj(O)``, with ``O = window + residual`` or else ``O = full``, which leaves ``residual = full − window``."""
        module: Any = self.module
        query, key, value = (
            project(hidden_states).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for project in (module.to_q, module.to_k, module.to_v)
        )  # [batch, heads, tokens, head channels]
        if getattr(module, "norm_q", None) is not None:
            query = module.norm_q(query)
        if getattr(module, "norm_k", None) is not None:
            key = module.norm_k(key)
        window = max(1, hidden_states.shape[1] // 8) if self.window is None else self.window
        near = _merged(window_attention(query, key, value, window))
        if op & int(Op.WINDOW):
            residual = kept(self.residual[0])
            mixed = near + (self._conditional(residual) if op & int(Op.SHARE) else residual)
        else:
            mixed = _merged(F.scaled_dot_product_attention(query, key, value))
            residual = mixed - near
            keep(self.residual, torch.cat([residual, residual]) if op & int(Op.SHARE) else residual)
        for layer in module.to_out:
            mixed = layer(mixed)
        return mixed


def window_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Attention in which token ``i`` sees the tokens ``i − window … i + window``, all ``[batch, heads, tokens, channels]``.

    Chunks of ``window`` queries attend to their neighbourhood of three windows, so that the work grows with tokens times
    window. A window over all tokens is full attention.
    """
    tokens = query.shape[2]
    if window >= tokens - 1:
        return F.scaled_dot_product_attention(query, key, value)
    outputs = []
    for start in range(0, tokens, window):
        stop = min(start + window, tokens)
        first, last = max(0, start - window), min(tokens, stop + window)
        rows = torch.arange(start, stop, device=query.device)
        columns = torch.arange(first, last, device=query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:last],
                value[:, :, first:last],
                attn_mask=(rows[:, None] - columns).abs() <= window,
            )
        )
    return torch.cat(outputs, dim=2)


def _merged(heads: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, channels]`` → ``[batch, tokens, heads · channels]``."""
    return heads.transpose(1, 2).flatten(2)


_REMEDY = "attention over a window works on plain self-attention without mask, rotary embedding or added projections"


def check_plain(name: str, module: nn.Module) -> None:
    """Refuse what is not a plain multi-head self-attention, as diffusers' ``Attention`` is with its default processor.

    Raises:
        MethodError: with the module's name and what is in the way.
    """
    processor = type(getattr(module, "processor", None)).__name__
    if processor not in ("NoneType", _PROCESSOR):
        raise MethodError(f"{name} has the processor {processor}: {_REMEDY}; set diffusers' {_PROCESSOR} where it fits")
    needed = ("to_q", "to_k", "to_v", "to_out", "heads")
    lacking = next((part for part in needed if not getattr(module, part, None)), None)
    if lacking is not None:
        raise MethodError(f"{name}, a {type(module).__name__}, has no {lacking}: {_REMEDY}")
    present = next((part for part in _ABSENT if getattr(module, part, None)), None)
    if present is not None or getattr(module, "rescale_output_factor", 1) != 1:
        raise MethodError(f"{name} has {present or 'a rescale_output_factor'}: {_REMEDY}")
    sizes = [getattr(getattr(module, part), "out_features", None) for part in ("to_q", "to_k", "to_v")]
    heads: Any = module.heads
    if sizes[0] is None or len(set(sizes)) > 1 or sizes[0] % heads:
        raise MethodError(f"{name} projects to {sizes} channels for {heads} heads: queries, keys and values must agree")


def usual_half(denoiser: nn.Module) -> ConditionalHalf:
    """Where diffusers' pipelines put the conditional pass: behind the other one, where the network is given a prompt."""
    kind = type(compat.unwrapped(denoiser))
    return "second" if accepts(kind, "encoder_hidden_states") and not accepts(kind, "class_labels") else "first"


def is_guided(latents: Feature) -> bool:
    """Whether a batch, or a list of samples, holds the same latents twice, as guidance in one call does."""
    rows = as_rows(latents)
    half, rest = divmod(rows.shape[0], 2)
    return half > 0 and rest == 0 and torch.equal(rows[:half], rows[half:])


def check_guidance_halves(latents: Feature) -> None:
    """Refuse a batch whose halves are not the two passes of guidance: sharing would mix up the samples.

    Raises:
        MethodError: with the remedy.
    """
    if not is_guided(latents):
        raise MethodError(
            f"the plan shares attention between the halves of guidance, but the batch of {len(latents)} does not hold the "
            "same latents twice: call the denoiser with both passes in one batch, or calibrate without the sharing candidates"
        )
