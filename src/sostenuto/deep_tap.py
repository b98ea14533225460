"""The tap of the deep part of a U-Net: its last module returns the kept feature, the others what nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.attachment import runs
from sostenuto.cost import TensorSpec, spec
from sostenuto.features import Feature, kept
from sostenuto.plan import Op
from sostenuto.sites import Site
from sostenuto.tap import Tap, Watched


class DeepTap(Tap):
    """Skips modules that run one after another and of which the rest of the network needs the last output alone.

    The network still hands their outputs from one to the next, and adds a ControlNet's residuals to them. So each of them
    that is skipped returns memory of the shape that it had returned when it was computed: nothing is written to it, and
    whatever is computed from it ends in the next skipped module.

    Args:
        site: the deep part.
        denoiser: the network.
        paths: the modules, in the order in which they run.
    """

    def __init__(self, site: Site, denoiser: nn.Module, paths: Sequence[str]) -> None:
        super().__init__(site)
        self.modules = [denoiser.get_submodule(path) for path in paths]
        self._seen: list[Any] = [None] * len(paths)
        self._outputs: dict[Any, tuple[Any, ...]] = {}  # by the kind of feature: what each module returned

    def watched(self) -> Watched:
        """The first and the last module."""
        return Watched(self.modules[0], self.modules[-1])

    def feature(self, output: Any) -> Feature:
        """The tensor in it: attentions return a tuple of one."""
        return compat.only_tensor(output)

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """All of the modules."""
        last = len(self.modules) - 1
        return [
            (module, self._last(runs(module)) if index == last else self._inner(runs(module), index))
            for index, module in enumerate(self.modules)
        ]

    def _inner(self, compute: Callable[..., Any], index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            op = self.op
            if op == Op.OUTSIDE:
                return self.outside_of_call(compute, args, kwargs)
            if op != Op.COMPUTE and op != Op.STORE:
                return _filled(self._shapes_of(index))
            output = compute(*args, **kwargs)
            if not torch.compiler.is_dynamo_compiling():  # a compiled network knows the shapes from the dry run
                self._seen[index] = _shapes(output)
            return output

        return forward

    def _shapes_of(self, index: int) -> Any:
        """What the module with this index returns in a call whose feature is like the kept ones."""
        newest = self.slots[1 if self.op == Op.EXTEND else 0]
        return self._outputs[_kind(kept(newest))][index]

    def _last(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            op = self.op
            self.reach()
            if op == Op.OUTSIDE:
                return self.outside_of_call(compute, args, kwargs)
            if op != Op.COMPUTE and op != Op.STORE:
                return _filled(self._shapes_of(-1), self.filled(op))
            output = compute(*args, **kwargs)
            feature = self.feature(output)
            if not torch.compiler.is_dynamo_compiling():
                self._seen[-1] = _shapes(output)
                self._outputs[_kind(feature)] = tuple(self._seen)
            if op == Op.STORE:
                self.store(feature)
            return output

        return forward


def _kind(feature: torch.Tensor) -> tuple[Any, ...]:
    """What tells batch, resolution, precision and device of a call, and with them the shapes of all outputs."""
    return (*feature.shape, feature.dtype, feature.device)


def _shapes(output: Any) -> Any:
    """An output, tensors or nested tuples of them, without its data."""
    return tuple(_shapes(part) for part in output) if isinstance(output, tuple) else spec(output)


def _filled(shapes: Any, feature: torch.Tensor | None = None) -> Any:
    """An output of these shapes: of ``feature``, or of uninitialised memory."""
    if isinstance(shapes, TensorSpec):
        return shapes.empty() if feature is None else feature
    return tuple(_filled(part, feature) for part in shapes)
