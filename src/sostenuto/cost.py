"""What a denoiser call costs: multiply-accumulates in all and per site, and the shape of what each site keeps.

One dry run on tensors without data tells all of it, so it needs no time on the device and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sostenuto.anatomy import Site
from sostenuto.errors import EngineError


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """The cost of one computed denoiser call.

    Attributes:
        macs: multiply-accumulates of the whole call, all rows of the batch.
        site_macs: those of each site's branch.
        site_outputs: what each site would keep.
    """

    macs: int
    site_macs: tuple[int, ...]
    site_outputs: tuple[TensorSpec, ...]


def spec(value: Any) -> Any:
    """Tensors as specs, everything else as it is."""
    return TensorSpec(tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


def measure(denoiser: nn.Module, sites: Sequence[Site], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    """Cost of calling ``denoiser(*args, **kwargs)``; tensors may be given as :class:`TensorSpec`.

    Attention is counted with the math backend: torch's counter sees nothing of the fused kernel on a CPU.

    Raises:
        EngineError: the model can't run on tensors without data, or a site was not reached.
    """
    outputs: dict[int, Any] = {}
    flops = [0] * len(sites)
    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.no_grad())
        for index, site in enumerate(sites):
            module = denoiser.get_submodule(site.id)

            def before(*_: Any, index: int = index) -> None:
                flops[index] -= counter.get_total_flops()

            def after(_module: Any, _inputs: Any, output: Any, index: int = index) -> None:
                flops[index] += counter.get_total_flops()
                outputs[index] = spec(output)

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)

        def to_fake(value: Any) -> Any:
            value = spec(value)
            if not isinstance(value, TensorSpec):
                return value
            with fake:
                return torch.empty(value.shape, dtype=value.dtype, device=value.device)

        try:
            denoiser.forward(*tree_map(to_fake, args), **tree_map(to_fake, kwargs))
        except Exception as error:
            raise EngineError(
                f"{type(denoiser).__name__} can't be run on tensors without data, so its cost is unknown: {error}"
            ) from error
        total = counter.get_total_flops()
    missed = [site.id for index, site in enumerate(sites) if index not in outputs]
    if missed:
        raise EngineError(
            f"a call of {type(denoiser).__name__} never reached {', '.join(missed[:3])}: its anatomy is wrong"
        )
    wrong = [sites[index].id for index, output in outputs.items() if not isinstance(output, TensorSpec)]
    if wrong:
        raise EngineError(f"{wrong[0]} returns something other than one tensor: it can't be kept")
    return Cost(total // 2, tuple(f // 2 for f in flops), tuple(outputs[i] for i in range(len(sites))))
