"""What torch's attention is given while a module runs: queries and keys as the network has normalised and rotated them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_ATTENTION = F.scaled_dot_product_attention  # itself, also while something else goes by its name and calls it


@dataclass(frozen=True)
class Attended:
    """The arguments of one ``scaled_dot_product_attention``.

    Attributes:
        query: ``[rows, heads, queries, channels]``.
        key: ``[rows, heads, keys, channels]``, of as many heads or of fewer that are shared.
        value: as the key.
        mask: added to the logits, or ``False`` where a key is hidden; broadcasts to ``[rows, heads, queries, keys]``.
        scale: of the logits; ``None``: ``channels^−½``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None

    def head_map(self, head: int, queries: slice = slice(None)) -> torch.Tensor:
        """The softmax map ``[rows, queries, keys]`` of one head in float32; a query that sees no key has zeros."""
        query = self.query[:, head, queries].float()
        key = self.key[:, head * self.key.shape[1] // self.query.shape[1]].float()
        logits = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.mask is None:
            return logits.softmax(dim=-1)
        mask = self.mask.expand(*self.query.shape[:3], key.shape[1])[:, head, queries]
        hidden = ~mask if mask.dtype == torch.bool else mask.isneginf()
        if mask.dtype != torch.bool:
            logits = logits + mask
        return logits.masked_fill(hidden, -math.inf).softmax(dim=-1).masked_fill(hidden, 0.0)


class Listening(TorchFunctionMode):
    """Notes in ``calls`` what torch's attention is given within it, by this thread.

    Attention of other libraries' kernels (diffusers' backends other than the native ones) goes unnoticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Attended] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ATTENTION:
            self.calls.append(_attended(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Attended:
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return Attended(query, key, value, attn_mask, scale)
