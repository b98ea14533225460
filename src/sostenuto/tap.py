"""What replaces ``forward`` of tapped modules: of a residual branch and of the modules in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.attachment import Attachment, runs
from sostenuto.attended import Attended, Listening
from sostenuto.errors import EngineError
from sostenuto.features import Feature, Slots, combine, keep, kept
from sostenuto.plan import Action, Op
from sostenuto.sites import Site

# Members of an enum are slow to look up, and these are asked for at every call of every module that is tapped.
_COMPUTE, _FILLED = int(Op.COMPUTE), int(Op.REUSE | Op.FORECAST)


class Watched(NamedTuple):
    """The modules at whose beginning (or end, if ``behind``) and end a site begins and ends."""

    first: nn.Module
    last: nn.Module
    behind: bool = False


class Tap(Attachment):
    """Carries out one op at one site; the base of all taps, itself a site that no module stands for (the output).

    ``op``, ``slots``, ``residual``, ``weights`` and ``tokens`` are set by the engine before each denoiser call. ``op`` is a
    plain integer that the compiler sees as a constant: one graph for each combination of ops, whatever the step. What
    changes every step (the weights of a forecast, the chosen tokens) is a tensor.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.op: int = int(Op.COMPUTE)  # also what a detached tap does whose replacement somebody else still holds
        self.reached = 0  # calls of it in this denoiser call
        self.slots: Slots = []
        self.residual: Slots = [None]
        self.weights: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None

    def watched(self) -> Watched | None:
        """Where the site begins and ends."""
        return None

    def feature(self, output: Any) -> Feature:
        """What of the last module's output is kept."""
        return output

    def output(self, feature: Feature) -> Feature:
        """What of a kept feature stands in for the last module's output."""
        return feature

    def can(self, action: Action) -> bool:
        """Whether it can carry out an action."""
        return not action.changes_attention

    def residual_shape(self, output: Sequence[int]) -> tuple[int, ...]:
        """The shape of the residual that it keeps, from that of its output."""
        return tuple(output)

    def attach(self) -> None:
        """Replace the ``forward`` of what is tapped."""
        super().attach()
        self.op = int(Op.OUTSIDE)

    def detach(self) -> None:
        """Restore what was there; whoever still holds a replacement computes."""
        super().detach()
        self.op = int(Op.COMPUTE)

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        self.op, self.slots, self.weights, self.tokens = int(Op.OUTSIDE), [], None, None
        self.residual = [None]

    def begin(self, op: int) -> None:
        """Get ready for a denoiser call."""
        # Not the flag itself: torch.compile doesn't guard the second of two attributes that hold the same object.
        self.op, self.reached = int(op), 0

    def reach(self) -> None:
        """Note a call of the site; a compiled network is not watched.

        Raises:
            EngineError: it is called more often than its anatomy says, and what is kept belongs to one of the calls.
        """
        # Not is_compiling, here as elsewhere: that is one flag for all threads, also for those that run while another compiles.
        if torch.compiler.is_dynamo_compiling():
            return
        self.reached += 1
        if self.reached > self.site.calls and self.op not in (Op.COMPUTE, Op.OUTSIDE):
            raise self.miscounted("more than ")

    def miscounted(self, more: str = "") -> EngineError:
        """The error of a site that is not called as often as its anatomy says."""
        times = self.site.calls if more else self.reached
        return EngineError(
            f"a call of the denoiser calls {self.site.id} {more}{times} time{'s' * (times != 1)}: its anatomy is wrong, "
            f"correct Branch(…, calls={self.site.calls}) with sostenuto.register_anatomy"
        )

    def store(self, output: Feature) -> None:
        """Keep an output as the newest."""
        keep(self.slots, output)

    def filled(self, op: int) -> Feature:
        """What stands in for the output of a skipped site."""
        if op == Op.REUSE:
            return kept(self.slots[0])
        assert self.weights is not None
        if op == Op.FORECAST:
            return combine(self.slots, self.weights)
        output = combine(self.slots[1:], self.weights)  # EXTEND: the newest slot is for the forecast itself
        self.store(output)
        return output

    def outside_of_call(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call does that the engine doesn't know of: nothing but the repetition of a computed one is right.

        Gradient checkpointing repeats it in the backward pass; the engine lets it do so only for calls that skip nothing.

        Raises:
            EngineError: it is no such repetition.
        """
        if compat.in_backward():
            return compute(*args, **kwargs)
        raise self.outside()

    def outside(self) -> EngineError:
        """The error of a call that the engine doesn't know of."""
        return EngineError(
            f"{self.site.id} was called outside of a denoiser call that sostenuto sees: compile or wrap the denoiser "
            "first and enable afterwards"
        )


class Observer(Attachment):
    """Tells of every call of a module in which it is computed, while ``hear`` is set.

    Args:
        path: what is told of it besides its output and what attention was given within it.
        module: the module.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.hear: Callable[[str, Any, Sequence[Attended]], None] | None = None
        self._module = module

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The module."""
        compute = runs(self._module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.hear is None:
                return compute(*args, **kwargs)
            with Listening() as listening:
                output = compute(*args, **kwargs)
            self.hear(self.path, output, listening.calls)
            return output

        return [(self._module, forward)]


class BranchTap(Tap):
    """The tap of one residual branch of a block, with the modules in front of it that feed nothing else."""

    def __init__(self, site: Site, denoiser: nn.Module) -> None:
        super().__init__(site)
        self.module = denoiser.get_submodule(site.id)
        self.front = [denoiser.get_submodule(path) for path in site.front]
        self.hollow = [denoiser.get_submodule(path) for path in site.hollow]
        self._num_streams = [0] * len(self.hollow)  # how many tensors each returns as a tuple; 0: one tensor
        self._call = 0  # of the calls of the module in one denoiser call, where it has several
        self._outputs: list[Feature] = []  # of the calls so far
        self._filled: Feature = None

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The branch, what is in front of it and what is on the way."""
        branch = self.branch(runs(self.module))
        found = [(self.module, branch if self.site.calls == 1 else self.repeated(runs(self.module)))]
        found += [(module, self.narrow(runs(module))) for module in self.front]
        return found + [(module, self.hand_on(index, runs(module))) for index, module in enumerate(self.hollow)]

    def watched(self) -> Watched:
        """The branch with what is skipped on the way; a fused one begins behind what is in front of it."""
        if self.site.kind is SiteKind.FUSED and self.front:
            return Watched(self.front[-1], self.module, behind=True)
        return Watched(next(iter(self.hollow), self.module), self.module)

    def can(self, action: Action) -> bool:
        """Some tokens only where tokens go in one by one and come out so."""
        return self.site.takes_some_tokens if action is Action.PARTIAL else super().can(action)

    def begin(self, op: int) -> None:
        """Get ready for a denoiser call."""
        self.op, self.reached = int(op), 0
        if self.site.calls > 1:
            self._call, self._outputs, self._filled = 0, [], None

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        super().reset()
        if self.site.calls > 1:
            self._outputs, self._filled = [], None

    def branch(self, compute: Callable[..., Feature]) -> Callable[..., Feature]:
        """What stands in for the branch's ``forward``."""

        def forward(*args: Any, **kwargs: Any) -> Feature:
            op = self.op
            if op == _COMPUTE and not self.in_graph:  # the short way for what happens most, as reach() does it
                self.reached += 1
                return compute(*args, **kwargs)
            self.reach()
            if op == _COMPUTE:
                return compute(*args, **kwargs)
            if op == Op.STORE:
                output = compute(*args, **kwargs)
                self.store(output)
                return output
            if op == Op.PARTIAL:
                return self.partial(compute, args, kwargs)
            if op == Op.OUTSIDE:
                return self.outside_of_call(compute, args, kwargs)
            return self.filled(op)

        return forward

    def repeated(self, compute: Callable[..., Feature]) -> Callable[..., Feature]:
        """The same for a module that a block calls several times: the outputs of all its calls are one feature."""

        def forward(*args: Any, **kwargs: Any) -> Feature:
            op, call = self.op, self._call
            self._call = call + 1
            self.reach()
            if op == Op.COMPUTE:
                return compute(*args, **kwargs)
            if op == Op.STORE:
                self._outputs.append(compute(*args, **kwargs))
                if self._call == self.site.calls:
                    self.store(tuple(self._outputs))
                return self._outputs[-1]
            if op == Op.OUTSIDE:
                return self.outside_of_call(compute, args, kwargs)
            if call == 0:
                self._filled = self.filled(op)
            return self._filled[call]

        return forward

    def partial(
        self, compute: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run the branch for the chosen tokens; the others keep their last output."""
        slot, tokens = self.output(kept(self.slots[0])), self.tokens
        assert tokens is not None
        args, kwargs = self.picked(args, kwargs, tokens)
        output = compute(*args, **kwargs)
        if output.requires_grad:  # the gradients of the chosen tokens are kept
            places = tokens if tokens.ndim == 1 else tokens[..., None].expand_as(output)
            refreshed = (slot.index_copy if tokens.ndim == 1 else slot.scatter)(1, places, output)
            slot.copy_(refreshed.detach())
            return refreshed
        if tokens.ndim == 1:
            slot.index_copy_(1, tokens, output.detach())
        else:
            slot.scatter_(1, tokens[..., None].expand_as(output), output.detach())
        return slot

    def picked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the branch for the chosen tokens.

        Not those of the norm in front: where every token has a timestep of its own, so has the modulation between the two.
        """
        return with_first(args, kwargs, lambda hidden_states: pick(hidden_states, tokens))

    def narrow(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the ``forward`` of a module in front."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op & _FILLED:
                args, kwargs = with_first(args, kwargs, _first_token)  # of what it returns only the rest is read
            return compute(*args, **kwargs)

        return forward

    def hand_on(self, index: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the ``forward`` of a module on the way: when skipped it returns what it is given."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.op & _FILLED:
                given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
                return tuple(given[: self._num_streams[index]]) if self._num_streams[index] else given[0]
            output = compute(*args, **kwargs)
            if not torch.compiler.is_dynamo_compiling():  # a compiled network knows it from the dry run
                self._num_streams[index] = len(output) if isinstance(output, tuple) else 0
            return output

        return forward


def _first_token(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states[:, :1] if hidden_states.ndim > 2 else hidden_states


def with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``function`` of its first one, given by place or by name, in its place."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = _first_name(kwargs)
    return args, {**kwargs, name: function(kwargs[name])}


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The first argument of a call, by place or by name."""
    return args[0] if args else kwargs[_first_name(kwargs)]


def _first_name(kwargs: Mapping[str, Any]) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))


def pick(hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The chosen tokens ``[k]`` (of every row) or ``[batch, k]`` of ``[batch, tokens, channels]``."""
    if tokens.ndim == 1:
        return hidden_states.index_select(1, tokens)
    return hidden_states.gather(1, tokens[..., None].expand(-1, -1, hidden_states.shape[-1]))
