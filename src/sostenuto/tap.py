"""What replaces ``forward`` of tapped modules: of a residual branch and of the norm in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sostenuto.anatomy import Site
from sostenuto.errors import EngineError
from sostenuto.plan import Action, Op


class Attachment:
    """Replaces ``forward`` of some modules, on these instances alone, and restores it."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The modules whose ``forward`` is replaced, each with the replacement."""
        return []

    def attach(self) -> None:
        """Replace every ``forward``."""
        for module, forward in self.replacements():
            self._restore.append(replace_forward(module, forward))

    def detach(self) -> None:
        """Take every replacement away, last first."""
        while self._restore:
            self._restore.pop()()


class Tap(Attachment):
    """Carries out one op at one site; the base of all taps, itself a site that no module stands for (the output).

    ``op``, ``slots``, ``residual``, ``weights`` and ``tokens`` are set by the engine before each denoiser call. ``op`` is a
    plain integer that the compiler sees as a constant: one graph for each combination of ops, whatever the step. What
    changes every step (the weights of a forecast, the chosen tokens) is a tensor.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.op: int = Op.COMPUTE  # also what a detached tap does whose replacement somebody else still holds
        self.reached = False
        self.slots: list[torch.Tensor | None] = []  # newest first
        self.residual: list[torch.Tensor | None] = [None]
        self.weights: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None

    def watched(self) -> tuple[nn.Module, nn.Module] | None:
        """The modules at whose beginning and end the site begins and ends."""
        return None

    def can(self, action: Action) -> bool:
        """Whether it can carry out an action."""
        return not action.changes_attention

    def residual_shape(self, output: Sequence[int]) -> tuple[int, ...]:
        """The shape of the residual that it keeps, from that of its output."""
        return tuple(output)

    def attach(self) -> None:
        """Replace the ``forward`` of what is tapped."""
        super().attach()
        self.op = Op.OUTSIDE

    def detach(self) -> None:
        """Restore what was there; whoever still holds a replacement computes."""
        super().detach()
        self.op = Op.COMPUTE

    def reset(self) -> None:
        """Let go of everything that belongs to a call."""
        self.op, self.slots, self.weights, self.tokens = Op.OUTSIDE, [], None, None
        self.residual = [None]

    def store(self, output: torch.Tensor) -> None:
        """Keep an output as the newest."""
        keep(self.slots, output)

    def filled(self, op: int) -> torch.Tensor:
        """What stands in for the output of a skipped site."""
        if op == Op.REUSE:
            return kept(self.slots[0])
        assert self.weights is not None
        if op == Op.FORECAST:
            return combine(self.slots, self.weights)
        output = combine(self.slots[1:], self.weights)  # EXTEND: the newest slot is for the forecast itself
        self.store(output)
        return output

    def outside(self) -> EngineError:
        """The error of a call that the engine doesn't know of."""
        return EngineError(
            f"{self.site.id} was called outside of a denoiser call that sostenuto sees: compile or wrap the denoiser "
            "first and enable afterwards"
        )


class Observer(Attachment):
    """Tells of every call of a module that a selector observes, while ``hear`` is set."""

    def __init__(self, path: str, denoiser: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.hear: Callable[[str, Any, Mapping[str, Any]], None] | None = None
        self._module = denoiser.get_submodule(path)

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The module."""
        compute = self._module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = compute(*args, **kwargs)
            if self.hear is not None:
                self.hear(self.path, output, kwargs)
            return output

        return [(self._module, forward)]


class BranchTap(Tap):
    """The tap of one residual branch of a block, with the norm in front of it."""

    def __init__(self, site: Site, denoiser: nn.Module) -> None:
        super().__init__(site)
        self.module = denoiser.get_submodule(site.id)
        self.norm = denoiser.get_submodule(site.norm) if site.norm else None

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The branch and its norm."""
        found = [(self.module, self.branch(self.module.forward))]
        if self.norm is not None:
            found.append((self.norm, self.narrow(self.norm.forward)))
        return found

    def watched(self) -> tuple[nn.Module, nn.Module]:
        """The branch."""
        return self.module, self.module

    def branch(self, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """What stands in for the branch's ``forward``."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            op = self.op
            if not torch.compiler.is_compiling():
                self.reached = True
            if op == Op.COMPUTE:
                return compute(*args, **kwargs)
            if op == Op.STORE:
                output = compute(*args, **kwargs)
                self.store(output)
                return output
            if op == Op.PARTIAL:
                return self.partial(compute, args, kwargs)
            if op == Op.OUTSIDE:
                raise self.outside()
            return self.filled(op)

        return forward

    def partial(
        self, compute: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run the branch for the chosen tokens; the others keep their last output."""
        slot, tokens = kept(self.slots[0]), self.tokens
        assert tokens is not None
        if self.norm is None:  # else the norm has picked the tokens already
            hidden_states, args, kwargs = first_argument(args, kwargs)
            args = (pick(hidden_states, tokens), *args)
        output = compute(*args, **kwargs)
        if tokens.ndim == 1:
            slot.index_copy_(1, tokens, output.detach())
        else:
            slot.scatter_(1, tokens[..., None].expand_as(output), output.detach())
        return slot

    def narrow(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for the ``forward`` of the norm in front."""

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            op = self.op
            if op == Op.REUSE or op == Op.FORECAST or op == Op.EXTEND:
                hidden_states = hidden_states[:, :1]  # the branch is skipped: only the norm's other outputs are read
            elif op == Op.PARTIAL:
                assert self.tokens is not None
                hidden_states = pick(hidden_states, self.tokens)
            return compute(hidden_states, *args, **kwargs)

        return forward


def first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "hidden_states"
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The first argument of a call, by place or by name, and the remaining ones."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def pick(hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The chosen tokens ``[k]`` (of every row) or ``[batch, k]`` of ``[batch, tokens, channels]``."""
    if tokens.ndim == 1:
        return hidden_states.index_select(1, tokens)
    return hidden_states.gather(1, tokens[..., None].expand(-1, -1, hidden_states.shape[-1]))


def combine(slots: list[torch.Tensor | None], weights: torch.Tensor) -> torch.Tensor:
    """``Σ_j weights[j] · slots[j]``, newest first; the weights sum to 1.

    More than two are summed in float32: the weights of high orders are large and alternate in sign.
    """
    newest = kept(slots[0])
    if weights.shape[0] == 2:  # one pass over memory: older + w₀·(newest − older)
        return torch.lerp(kept(slots[1]), newest, weights[0])
    output = newest.float() * weights[0]
    for index in range(1, weights.shape[0]):
        output = torch.addcmul(output, kept(slots[index]).float(), weights[index])
    return output.to(newest.dtype)


def empty_slot(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one kept output, usable inside and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def keep(slots: list[torch.Tensor | None], value: torch.Tensor) -> None:
    """Write a value into the first slot."""
    slot = slots[0]
    if slot is None:  # only outside of torch.compile, which is given its slots beforehand
        # In the value's memory format, which decides the kernels of the convolutions that read it.
        with torch.inference_mode(False):
            slot = slots[0] = torch.empty_like(value, requires_grad=False)
    slot.copy_(value.detach())


def kept(slot: torch.Tensor | None) -> torch.Tensor:
    """What a slot holds, which must be something."""
    if slot is None:
        raise EngineError("a kept feature is missing: please report this as a fault of sostenuto")
    return slot


class Replacement:
    """A function in the place of a module's ``forward``, which says why the module can't be copied now."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise EngineError("a denoiser with sostenuto enabled can't be copied or pickled: disable it first")


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``forward`` on an instance; returns the function that restores what was there."""
    forward = Replacement(function)
    had_own = "forward" in module.__dict__
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> None:
        if module.__dict__.get("forward") is not forward:
            return  # somebody hooked the module after us: what they hold passes through once detached
        if had_own:
            module.__dict__["forward"] = before
        else:
            del module.__dict__["forward"]

    return restore
