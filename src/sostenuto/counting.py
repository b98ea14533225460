"""Counts the multiply-accumulates of what runs, with the formulas of torch's own counter."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_STANCE = threading.RLock()  # torch's stance is the same for all threads: one counts at a time, and gives it back


class MacCounter:
    """Counts matrix products, convolutions and attention of what runs within it; everything else is not counted.

    ``torch.utils.flop_counter.FlopCounterMode`` sees nothing of the fused attention on a CPU, refuses flexible attention, and
    follows modules, which fails on some networks.
    """

    def __init__(self) -> None:
        self._flops = 0
        self._stack = ExitStack()

    @property
    def macs(self) -> int:
        """Multiply-accumulates since it was last entered."""
        return self._flops // 2

    def add(self, flops: int) -> None:
        """Count so many floating-point operations."""
        self._flops += flops

    def __enter__(self) -> MacCounter:
        _STANCE.acquire()
        self._stack.callback(_STANCE.release)
        self._flops = 0
        # Flexible attention compiles itself when it is called, which doesn't go together with counting.
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(_Listener(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Listener(TorchDispatchMode):
    """Hears of every operation."""

    supports_higher_order_operators = True

    def __init__(self, counter: MacCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
            return NotImplemented  # it comes again with this process's parts
        is_plain = not isinstance(func, HigherOrderOperator)
        formula = _FORMULAS.get(func._overloadpacket if is_plain else func)
        if formula is None and is_plain and func.namespace != "prim":
            with self:  # an operation made of others, which are counted
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self._counter.add(formula(*args, **kwargs, out_val=output))
        return output


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Two products of matrices, of tensors ``[batch, heads, tokens, channels]``."""
    batch, heads, queries, channels = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (channels + value.shape[-1])


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
