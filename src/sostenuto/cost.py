"""What a denoiser call costs: multiply-accumulates in all and per site, and the shape of what each site keeps.

Dry runs on tensors without data tell all of it, so it needs no time on the device and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.block_tap import BlocksTap
from sostenuto.errors import EngineError
from sostenuto.plan import Op
from sostenuto.tap import Tap


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

    def empty(self) -> torch.Tensor:
        """A tensor of this kind."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Cost:
    """The cost of one computed denoiser call.

    Attributes:
        macs: multiply-accumulates of the whole call, all rows of the batch.
        site_macs: those of each site.
        site_outputs: what each site would keep.
        site_residuals: what it would keep of its attention to far tokens.
    """

    macs: int
    site_macs: tuple[int, ...]
    site_outputs: tuple[TensorSpec, ...]
    site_residuals: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Carried:
    """What one denoiser call carried out: one op per site, and of the sites that ran partially how many tokens."""

    ops: tuple[Op, ...]
    num_tokens: tuple[int, ...] = ()
    decided: bool = False
    """Whether a policy decided while the call ran, so that its signal was computed."""
    scoring_macs: int = 0
    """Multiply-accumulates spent on scores of tokens."""


def spec(value: Any) -> Any:
    """Tensors as specs, everything else as it is."""
    return TensorSpec(tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


class DryRun:
    """Counts calls of a denoiser with given arguments, without running them. The taps must be attached.

    Attention is counted with the math backend: torch's counter sees nothing of the fused kernel on a CPU.
    """

    def __init__(self, denoiser: nn.Module, taps: Sequence[Tap], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._denoiser, self._taps, self._args, self._kwargs = denoiser, taps, args, kwargs
        self._cost: Cost | None = None
        self._macs: dict[Carried, int] = {}

    @property
    def cost(self) -> Cost:
        """Cost of the call with every site computed.

        Raises:
            EngineError: the model can't run on tensors without data, or a site was not reached.
        """
        if self._cost is None:
            self._cost = self._measure()
        return self._cost

    def macs(self, carried: Carried) -> int:
        """Multiply-accumulates of a call that carries out these ops, counted, not derived."""
        if carried not in self._macs:
            self._macs[carried] = self._count(carried)
        return self._macs[carried] + carried.scoring_macs

    def _measure(self) -> Cost:
        outputs: dict[int, Any] = {}
        flops = [0] * len(self._taps)
        with ExitStack() as stack:
            counter = FlopCounterMode(display=False)
            for index, tap in enumerate(self._taps):
                watched = tap.watched()
                if watched is None:
                    continue

                def before(*_: Any, index: int = index) -> None:
                    flops[index] -= counter.get_total_flops()

                def after(_module: Any, _inputs: Any, output: Any, index: int = index) -> None:
                    flops[index] += counter.get_total_flops()
                    outputs[index] = spec(compat.only_tensor(output))

                first, last = watched
                stack.callback(first.register_forward_pre_hook(before).remove)
                stack.callback(last.register_forward_hook(after).remove)
            for tap in self._taps:
                tap.op = Op.COMPUTE
            result = self._run(counter)
            total = counter.get_total_flops()
        for index, tap in enumerate(self._taps):
            if tap.site.kind is SiteKind.OUTPUT:
                outputs[index], flops[index] = spec(compat.first_tensor(result)), total
        missed = [tap.site.id for index, tap in enumerate(self._taps) if index not in outputs]
        name = type(self._denoiser).__name__
        if missed:
            raise EngineError(f"a call of {name} never reached {', '.join(missed[:3])}: its anatomy is wrong")
        wrong = [self._taps[index].site.id for index, out in outputs.items() if not isinstance(out, TensorSpec)]
        if wrong:
            raise EngineError(f"{wrong[0]} returns something other than one tensor: it can't be kept")
        kept = tuple(outputs[index] for index in range(len(self._taps)))
        residuals = (replace(o, shape=tap.residual_shape(o.shape)) for tap, o in zip(self._taps, kept, strict=True))
        return Cost(total // 2, tuple(f // 2 for f in flops), kept, tuple(residuals))

    def _count(self, carried: Carried) -> int:
        for tap, op in zip(self._taps, carried.ops, strict=True):
            if tap.site.kind is SiteKind.OUTPUT and op.is_filled:
                return 0
        if all(op == Op.COMPUTE for op in carried.ops) and not carried.decided:
            return self.cost.macs
        counter = FlopCounterMode(display=False)
        outputs = self.cost.site_outputs
        tokens = carried.num_tokens or (0,) * len(self._taps)

        def set_taps(fake: FakeTensorMode) -> None:
            for tap, op, output, count in zip(self._taps, carried.ops, outputs, tokens, strict=True):
                tap.op, tap.slots, tap.residual = int(op), [output.empty() for _ in range(8)], [None]
                if op & (Op.RESIDUAL | Op.WINDOW):
                    tap.residual = [replace(output, shape=tap.residual_shape(output.shape)).empty()]
                tap.weights = torch.empty(2, dtype=output.dtype, device=output.device)
                tap.tokens = torch.empty(count, dtype=torch.long, device=output.device)
                if carried.decided and isinstance(tap, BlocksTap):
                    tap.op, tap.decide = Op.DECIDE, lambda _, op=op: op

        self._run(counter, set_taps)
        return counter.get_total_flops() // 2

    def _run(self, counter: FlopCounterMode, set_taps: Any = lambda fake: None) -> Any:
        """The denoiser's output on fake tensors, everything counted."""
        with ExitStack() as stack:
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(counter)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.no_grad())
            state = [(tap, tap.op) for tap in self._taps]
            stack.callback(lambda: [tap.reset() or setattr(tap, "op", op) for tap, op in state])

            def to_fake(value: Any) -> Any:
                value = spec(value)
                return value.empty() if isinstance(value, TensorSpec) else value

            try:
                set_taps(fake)
                return self._denoiser.forward(*tree_map(to_fake, self._args), **tree_map(to_fake, self._kwargs))
            except Exception as error:
                raise EngineError(
                    f"{type(self._denoiser).__name__} can't be run on tensors without data, so its cost is unknown: {error}"
                ) from error
