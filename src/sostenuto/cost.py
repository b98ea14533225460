"""What a denoiser call costs: multiply-accumulates in all and per site, and the shape of what each site keeps.

Dry runs on tensors without data tell all of it, so it needs no time on the device and no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_leaves, tree_map

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.block_tap import BlocksTap
from sostenuto.counting import MacCounter
from sostenuto.errors import EngineError
from sostenuto.features import leaves, mapped
from sostenuto.foreign import set_aside
from sostenuto.plan import Op
from sostenuto.tap import Tap


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
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
        site_macs: those of each site, without what it spares in front of it.
        site_outputs: what each site would keep, tensors as :class:`TensorSpec`; ``None`` where the call doesn't reach it.
        site_residuals: what it would keep of its attention to far tokens; ``None`` where that can't be.
    """

    macs: int
    site_macs: tuple[int, ...]
    site_outputs: tuple[Any, ...]
    site_residuals: tuple[TensorSpec | None, ...]

    @property
    def output_bytes(self) -> list[int]:
        """Size of one output of every site."""
        return [sum(spec.nbytes for spec in leaves(output, TensorSpec)) for output in self.site_outputs]

    @property
    def residual_bytes(self) -> list[int]:
        """Size of one residual of every site."""
        return [0 if residual is None else residual.nbytes for residual in self.site_residuals]


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
    """A tensor as its spec, everything else as it is."""
    return TensorSpec(tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


def with_parts(change: Callable[[Any], Any], arguments: Any) -> Any:
    """Arguments with their leaves changed, also what an object holds, such as a key-value cache of the network's own.

    Such objects are copied.
    """
    known: dict[int, Any] = {}

    def leaf(value: Any) -> Any:
        changed = change(value)
        if changed is not value or not _holds(value):
            return changed
        if id(value) not in known:
            twin = known[id(value)] = copy.copy(value)
            vars(twin).update(tree_map(leaf, dict(vars(value))))
        return known[id(value)]

    return tree_map(leaf, arguments)


def _holds(value: Any) -> bool:
    """Whether it is an object whose attributes an argument consists of, rather than a value or something that is called."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Enum)


_DEEPEST = 8  # of objects in objects


def signature(value: Any, depth: int = _DEEPEST) -> Any:
    """What two arguments have in common that cost the same: hashable, quick to make."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, signature(part, depth)) for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(signature(part, depth) for part in value)
    if _holds(value):  # not by what it is: it may be another object in every generation, and would be kept
        return type(value), signature(vars(value), depth - 1) if depth else None
    return type(value), value if value.__hash__ is not None else repr(value)


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices that autocast is on for, each with its dtype."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def empty(output: Any) -> Any:
    """Tensors for specs, in the same structure."""
    return mapped(TensorSpec.empty, output, leaf=TensorSpec)


class DryRun:
    """Counts calls of a denoiser with given arguments, without running them. The taps must be attached.

    A network whose shapes depend on data (text trimmed to its length, experts that take what they are sent) can't run without
    it: it is run on the arguments themselves.
    """

    def __init__(self, denoiser: nn.Module, taps: Sequence[Tap], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._denoiser, self._taps = denoiser, taps
        self._specs = with_parts(spec, (args, kwargs))
        self._arguments: Any = None
        self._autocast = autocast_state()
        self._device = next(
            (leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None
        )
        self._needs_data = False
        # One for all runs: it remembers what stands for each weight.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._cost: Cost | None = None
        self._macs: dict[Carried, int] = {}

    def offer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments of such a call, for a network that can't run without data; the first ones are kept."""
        if self._arguments is None:
            self._arguments = (args, kwargs)

    def forget_arguments(self) -> None:
        """Let go of the arguments; a network that can't run without data can't be counted until others are offered."""
        self._arguments = None

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
        outputs: list[list[Any]] = [[] for _ in self._taps]
        macs = [0] * len(self._taps)
        begun: set[int] = set()
        with ExitStack() as stack:
            counter = MacCounter()
            for index, tap in enumerate(self._taps):
                watched = tap.watched()
                if watched is None:
                    continue

                def begin(*_: Any, index: int = index) -> None:
                    macs[index] -= counter.macs
                    begun.add(index)

                def end(_module: Any, _inputs: Any, output: Any, index: int = index) -> None:
                    if index not in begun:
                        return  # a call that leaves out the first block of a range
                    begun.remove(index)
                    macs[index] += counter.macs
                    outputs[index].append(mapped(spec, self._taps[index].feature(output)))

                first = watched.first
                hook = first.register_forward_hook(begin) if watched.behind else first.register_forward_pre_hook(begin)
                stack.callback(hook.remove)
                stack.callback(watched.last.register_forward_hook(end).remove)

            def set_taps() -> None:
                for index, tap in enumerate(self._taps):
                    tap.begin(Op.COMPUTE)
                    outputs[index].clear()
                    macs[index] = 0
                begun.clear()

            result = self._run(counter, set_taps)
            total = counter.macs
        for index, tap in enumerate(self._taps):
            if tap.site.kind is SiteKind.OUTPUT:
                outputs[index], macs[index] = [mapped(spec, compat.values_of(result))], total
        self._check_calls(outputs)
        kept = tuple(tuple(calls) if len(calls) > 1 else next(iter(calls), None) for calls in outputs)
        residuals = tuple(
            replace(o, shape=tap.residual_shape(o.shape)) if isinstance(o, TensorSpec) else None
            for tap, o in zip(self._taps, kept, strict=True)
        )
        return Cost(total, tuple(macs), kept, residuals)

    def _check_calls(self, outputs: Sequence[Sequence[Any]]) -> None:
        name = type(self._denoiser).__name__
        for tap, calls in zip(self._taps, outputs, strict=True):
            if calls and len(calls) != tap.site.calls:
                raise EngineError(
                    f"{tap.site.id} is called {len(calls)} times in a call of {name}, not {tap.site.calls}: its anatomy is "
                    "wrong"
                )
            if calls and not any(True for _ in leaves(calls[0], TensorSpec)):
                raise EngineError(f"{tap.site.id} returns no tensor: it can't be kept")

    def _count(self, carried: Carried) -> int:
        for tap, op in zip(self._taps, carried.ops, strict=True):
            if tap.site.kind is SiteKind.OUTPUT and op.is_filled:
                return 0
        if all(op == Op.COMPUTE for op in carried.ops) and not carried.decided:
            return self.cost.macs
        counter = MacCounter()
        cost = self.cost
        tokens = carried.num_tokens or (0,) * len(self._taps)

        def set_taps() -> None:
            for index, (tap, op) in enumerate(zip(self._taps, carried.ops, strict=True)):
                output = cost.site_outputs[index]
                if output is None:
                    tap.begin(Op.COMPUTE)
                    continue
                first = next(leaves(output, TensorSpec))
                decides = carried.decided and isinstance(tap, BlocksTap)
                tap.begin(Op.DECIDE if decides else op)
                tap.slots, tap.residual = [empty(output) for _ in range(8)], [empty(cost.site_residuals[index])]
                tap.weights = torch.empty(2, dtype=first.dtype, device=first.device)
                tap.tokens = torch.arange(tokens[index], device=first.device)  # the call may run on real data
                if decides and isinstance(tap, BlocksTap):
                    tap.decide = lambda _, op=op: op

        self._run(counter, set_taps)
        return counter.macs

    def _run(self, counter: MacCounter, set_taps: Callable[[], None]) -> Any:
        """The denoiser's output, everything counted."""
        ops = [tap.op for tap in self._taps]
        try:
            if not self._needs_data:
                try:
                    return self._run_without_data(counter, set_taps)
                except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
                    self._needs_data = True
            with ExitStack() as stack:
                if self._arguments is None:
                    raise EngineError("its arguments are gone: read the statistics before the next generation begins")
                self._enter(stack, counter)
                set_taps()
                args, kwargs = self._arguments
                return self._denoiser.forward(*args, **kwargs)
        except Exception as error:
            raise EngineError(f"the cost of a call of {type(self._denoiser).__name__} is unknown: {error}") from error
        finally:
            self._reset_taps(ops)

    def _run_without_data(self, counter: MacCounter, set_taps: Callable[[], None]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(set_aside(self._denoiser, self._device or torch.device("cpu")))
            self._enter(stack, counter)
            set_taps()
            args, kwargs = with_parts(_without_spec, self._specs)
            return self._denoiser.forward(*args, **kwargs)

    def _enter(self, stack: ExitStack, counter: MacCounter) -> None:
        stack.enter_context(counter)
        stack.enter_context(torch.no_grad())
        for kind, dtype in self._autocast:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))

    def _reset_taps(self, ops: Sequence[int]) -> None:
        for tap, op in zip(self._taps, ops, strict=True):
            tap.reset()
            tap.op = op


def _without_spec(value: Any) -> Any:
    return value.empty() if isinstance(value, TensorSpec) else value
