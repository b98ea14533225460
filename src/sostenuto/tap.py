"""One tapped branch: what replaces ``forward`` of its submodule and of the norm in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sostenuto.anatomy import Site
from sostenuto.errors import EngineError
from sostenuto.plan import Op


class Tap:
    """Carries out one op at one site. ``op``, ``slots`` and ``weights`` are set by the engine before each denoiser call.

    ``op`` is a plain integer that the compiler sees as a constant: one graph for each combination of ops, whatever the
    step. The weights of a forecast change every step and are therefore a tensor.
    """

    def __init__(self, site: Site, denoiser: nn.Module) -> None:
        self.site = site
        self.op: int = Op.COMPUTE  # also what a detached tap does whose replacement somebody else still holds
        self.reached = False
        self.slots: list[torch.Tensor | None] = []  # newest first
        self.weights: torch.Tensor | None = None
        self._module = denoiser.get_submodule(site.id)
        self._norm = denoiser.get_submodule(site.norm) if site.norm else None
        self._restore: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Replace the ``forward`` of the branch and of its norm, on these instances alone."""
        self.op = Op.OUTSIDE
        self._restore.append(replace_forward(self._module, self._branch(self._module.forward)))
        if self._norm is not None:
            self._restore.append(replace_forward(self._norm, self._narrow(self._norm.forward)))

    def detach(self) -> None:
        """Take every replacement away, last first."""
        while self._restore:
            self._restore.pop()()
        self.op = Op.COMPUTE

    def _branch(self, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            op = self.op
            if not torch.compiler.is_compiling():
                self.reached = True
            if op == Op.COMPUTE:
                return compute(*args, **kwargs)
            if op == Op.STORE:
                output = compute(*args, **kwargs)
                slot = self.slots[0]
                if slot is None:  # only outside of torch.compile, which is given its slots beforehand
                    slot = self.slots[0] = empty_slot(output.shape, output.dtype, output.device)
                slot.copy_(output.detach())
                return output
            if op == Op.REUSE:
                return kept(self.slots[0])
            if op == Op.FORECAST:
                return self._forecast()
            raise EngineError(
                f"{self.site.id} was called outside of a denoiser call that sostenuto sees: compile or wrap the denoiser "
                "first and enable afterwards"
            )

        return forward

    def _narrow(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.op >= Op.REUSE:
                hidden_states = hidden_states[:, :1]  # the branch is skipped: only the norm's other outputs are read
            return compute(hidden_states, *args, **kwargs)

        return forward

    def _forecast(self) -> torch.Tensor:
        # output = Σ_j w_j · kept_j, newest first; the weights sum to 1
        weights = self.weights
        assert weights is not None
        if weights.shape[0] == 2:  # one pass over memory: older + w₀·(newest − older)
            return torch.lerp(kept(self.slots[1]), kept(self.slots[0]), weights[0])
        output = kept(self.slots[0]) * weights[0]
        for index in range(1, weights.shape[0]):
            output = torch.addcmul(output, kept(self.slots[index]), weights[index])
        return output


def empty_slot(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for one kept output, usable inside and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def kept(slot: torch.Tensor | None) -> torch.Tensor:
    """What a slot holds, which must be something."""
    if slot is None:
        raise EngineError("a kept feature is missing: please report this as a fault of sostenuto")
    return slot


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put ``forward`` in place of a module's, on this instance alone; the function returned takes it away again."""
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
