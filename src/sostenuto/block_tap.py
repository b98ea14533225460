"""The tap of a range of whole blocks, skipped by plan or by a decision taken when it is reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from sostenuto.anatomy import Site, inspect
from sostenuto.errors import EngineError
from sostenuto.plan import Op
from sostenuto.tap import Tap, first_argument, replace_forward

Watch = Literal["modulated-input", "front-residual"]
Decide = Callable[[torch.Tensor], Op]


class BlocksTap(Tap):
    """Skips the blocks ``first … last``: the first one returns what stands in for the range, the others hand it on.

    With a ``watch`` the engine may give it the op ``DECIDE``: it then measures the signal and asks ``decide``.

    Args:
        site: the range.
        denoiser: the network.
        watch: ``"modulated-input"``, what the first attention of the range is given (normalised and modulated by the timestep);
            or ``"front-residual"``, what the blocks in front of the range add to their input.
    """

    def __init__(self, site: Site, denoiser: nn.Module, watch: Watch | None = None) -> None:
        super().__init__(site)
        assert site.last_block is not None
        self.watch = watch
        self.decide: Decide | None = None
        path = site.id.rpartition(".")[0]
        blocks = list(denoiser.get_submodule(path).children())
        self.blocks = blocks[site.block : site.last_block + 1]
        self._front = blocks[0] if watch == "front-residual" else None
        if self._front is self.blocks[0]:
            raise EngineError(f"{site.id} has no blocks in front of it whose residual could be watched")
        self._attention = _first_branch(denoiser, site) if watch == "modulated-input" else None
        self._beginning: torch.Tensor | None = None  # what the first of all blocks was given
        self._entry: torch.Tensor | None = None  # what the range was given

    def watched(self) -> tuple[nn.Module, nn.Module]:
        """The first and the last block."""
        return self.blocks[0], self.blocks[-1]

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """All blocks of the range, and the first of all blocks where the residual in front of the range is watched."""
        found = []
        if self._front is not None:
            found.append((self._front, self._remember(self._front.forward)))
        for index, block in enumerate(self.blocks):
            wrap = self._first if index == 0 else self._later
            found.append((block, wrap(block.forward, index == len(self.blocks) - 1)))
        return found

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        super().reset()
        self.decide = self._beginning = self._entry = None

    def _remember(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op == Op.DECIDE:
                self._beginning = first_argument(args, kwargs)[0]
            return compute(*args, **kwargs)

        return forward

    def _first(self, compute: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.reached = True
            if self.op == Op.OUTSIDE:
                raise self.outside()
            hidden_states = first_argument(args, kwargs)[0]
            if self.op == Op.DECIDE:
                assert self.decide is not None
                self.op = int(self.decide(self._signal(compute, hidden_states, args, kwargs)))
            op = self.op
            if op == Op.COMPUTE or op == Op.SKIP:  # what is skipped here is skipped by the tap of a range around it
                return compute(*args, **kwargs)
            if op == Op.STORE:
                self._entry = hidden_states
                output = compute(*args, **kwargs)
                return self._keep(output) if is_last else output
            filled = self.filled(op)
            return hidden_states + filled if self.site.residual else filled

        return forward

    def _later(self, compute: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            op = self.op
            if op == Op.COMPUTE or op == Op.SKIP:
                return compute(*args, **kwargs)
            if op == Op.STORE:
                output = compute(*args, **kwargs)
                return self._keep(output) if is_last else output
            if op == Op.OUTSIDE:
                raise self.outside()
            return first_argument(args, kwargs)[0]

        return forward

    def _keep(self, output: torch.Tensor) -> torch.Tensor:
        assert self._entry is not None
        self.store(output - self._entry if self.site.residual else output)
        self._entry = None
        return output

    def _signal(
        self, compute: Callable[..., Any], hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        if self.watch == "front-residual":
            assert self._beginning is not None
            return hidden_states - self._beginning
        # Run the block as far as its first attention: the same normalisation and modulation in every family of networks.
        assert self._attention is not None

        def stop(*inner: Any, **named: Any) -> Any:
            raise _ReachedError(first_argument(inner, named)[0])

        restore = replace_forward(self._attention, stop)
        try:
            compute(*args, **kwargs)
        except _ReachedError as reached:
            return reached.hidden_states
        finally:
            restore()
        raise EngineError(
            f"the first block of {self.site.id} never reached its attention: nothing can be measured there"
        )


class _ReachedError(Exception):
    """Carries what an attention was about to be given out of its block."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _first_branch(denoiser: nn.Module, site: Site) -> nn.Module:
    return denoiser.get_submodule(next(branch.id for branch in inspect(denoiser) if branch.block == site.block))
