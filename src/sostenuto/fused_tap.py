"""The tap of a branch in which attention and MLP share a projection, and which may run for some of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sostenuto.features import Feature, kept
from sostenuto.plan import Op
from sostenuto.sites import Site
from sostenuto.tap import BranchTap, pick


class FusedTap(BranchTap):
    """Also keeps what attention puts into the shared projection, so that some tokens can run without attention.

    ToCa (arXiv 2410.05317) so runs a single-stream block of FLUX for some tokens: their MLP is computed, what attention
    gave them is taken from the last full step, and the shared projection is applied to both. What is kept is a pair, the
    output of the branch and that of attention ``[batch, tokens, channels]``, several streams of which lie behind one another.
    """

    def __init__(self, site: Site, denoiser: Any) -> None:
        super().__init__(site, denoiser)
        self._attention: torch.Tensor | None = None  # of the call under way

    def feature(self, output: Any) -> Feature:
        """The output and that of attention."""
        attention, self._attention = self._attention, None
        return output, attention

    def output(self, feature: Feature) -> Feature:
        """The first of the pair."""
        return feature[0]

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        super().reset()
        self._attention = None

    def store(self, output: Feature) -> None:
        """Keep both."""
        super().store(self.feature(output))

    def filled(self, op: int) -> Feature:
        """What stands in for the output."""
        return super().filled(op)[0]

    def picked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they are: the norm in front has picked the tokens, so that the MLP behind it runs for them alone."""
        return args, kwargs

    def narrow(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the norm in front."""
        narrowed = super().narrow(compute)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op == Op.PARTIAL:
                assert self.tokens is not None
                args, kwargs = super(FusedTap, self).picked(args, kwargs, self.tokens)
                return compute(*args, **kwargs)
            return narrowed(*args, **kwargs)

        return forward

    def hand_on(self, index: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for attention: for some tokens what it last gave them, in as many streams as it returns."""
        handed_on = super().hand_on(index, compute)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op == Op.PARTIAL:
                assert self.tokens is not None
                chosen = pick(kept(self.slots[0])[1], self.tokens)
                rest = (chosen[:, :0],) * (
                    self._num_streams[index] - 1
                )  # the block puts the streams behind one another
                return (chosen, *rest) if self._num_streams[index] else chosen
            output = handed_on(*args, **kwargs)
            if self.op & int(Op.STORE):
                self._attention = _joined(output)
            elif self.op == Op.COMPUTE and not torch.compiler.is_compiling():  # a dry run asks for the shape
                attention = _joined(output)
                self._attention = attention.new_empty(1).expand(attention.shape)
            return output

        return forward


def _joined(streams: Any) -> torch.Tensor:
    """The streams that attention returns as one sequence of tokens."""
    return torch.cat(streams, dim=1) if isinstance(streams, tuple) else streams
