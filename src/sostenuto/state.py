"""What one pass of one generation keeps, and what decides within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sostenuto.attended import Attended
from sostenuto.cost import empty
from sostenuto.features import Feature, Slots, leaves, num_bytes
from sostenuto.plan import Program, Weights
from sostenuto.prediction import Conversion


@dataclass(frozen=True)
class Call:
    """One denoiser call as it came in; ``inner`` is what runs it, hooks and compilation included.

    ``noisy_last`` tells where in latents and output the noisy sample is, where one of them holds more besides; ``clean`` how
    the clean sample follows from the prediction, where a site keeps that.
    """

    inner: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: int
    latents: Feature
    noisy_last: bool = False
    clean: Conversion | None = None

    def run(self) -> Any:
        """The network's output; lists are given as copies, since a network may empty them and be asked again."""
        args = [list(value) if type(value) is list else value for value in self.args]
        kwargs = {name: list(value) if type(value) is list else value for name, value in self.kwargs.items()}
        return self.inner(*args, **kwargs)


class Policy(Protocol):
    """Decides at every step of one pass, once its site is reached, whether the site is skipped. One object per pass."""

    forecast_order: int
    """How the gap is filled: 0 last value, 1 linear, …"""

    def skips(self, step: int, num_steps: int, signal: torch.Tensor, computed: Sequence[int]) -> bool:
        """Whether the site is skipped at ``step``.

        Args:
            step: position in sampling order.
            num_steps: steps of the generation.
            signal: what the site's tap watches, of the current step.
            computed: the steps at which the site was computed, newest first; empty: it will be computed in any case.
        """
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the signals that it keeps from step to step."""
        ...


class Wanted(NamedTuple):
    """The tokens that a partial site needs: ``num_tokens`` of its output of ``[batch, tokens, channels]``, some but not all."""

    site: int
    shape: tuple[int, ...]
    num_tokens: int


class Selector(Protocol):
    """Chooses the tokens that partial sites run. One object per pass."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates spent on scores so far."""
        ...

    def observe(self, path: str, output: Any, attended: Sequence[Attended]) -> None:
        """Take in what an observed module has just returned, and what torch's attention was given within it.

        Called where the site that the module belongs to is computed for all tokens, at the steps whose outputs are
        partially refreshed later.
        """
        ...

    def computed(self, step: int, site: int) -> None:
        """The site with this index is computed for all tokens at this step."""
        ...

    def select(self, step: int, wanted: Sequence[Wanted], device: torch.device) -> Sequence[torch.Tensor]:
        """The tokens to run at a step, for each of the sites: indices ``[num_tokens]`` or ``[batch, num_tokens]`` (int64)."""
        ...


class PassState:
    """The kept features of one pass (such as the conditional one) of one generation."""

    def __init__(
        self,
        program: Program,
        num_sites: int,
        num_slots: int,
        policy: Policy | None = None,
        selector: Selector | None = None,
    ) -> None:
        self.program, self.policy, self.selector = program, policy, selector
        self.last_step = -1
        self.is_further = False  # whether it is not the first pass of its step
        self.absent: set[int] = set()  # sites that this pass leaves out
        self.batch: Any = None  # shape and kind of the latents
        self.slots: list[Slots] = [[None] * num_slots for _ in range(num_sites)]
        self.residuals: list[Slots] = [[None] for _ in range(num_sites)]
        self.decided: list[int] = []  # steps at which the policy had its site computed, newest first
        self.template: Any = None  # the last computed output of the denoiser, without its prediction

    @property
    def begins(self) -> bool:
        """Whether no call of the pass is done yet; also where it begins anew, as after a gap: nothing is kept of it."""
        return self.last_step < 0

    @property
    def num_bytes(self) -> int:
        """Bytes of kept features and signals."""
        kept = sum(num_bytes(slots) for slots in self.slots + self.residuals)
        return kept + (0 if self.policy is None else self.policy.num_bytes)

    def make_room(self, site: int) -> Slots:
        """The site's slots with the oldest one in front, to be overwritten."""
        slots = self.slots[site]
        slots.insert(0, slots.pop())
        return slots

    def free(self, step: int) -> None:
        """Free what no step after this one reads; in place, since the taps hold the same lists."""
        slots, residuals = self.program.freed_after(step)
        for site in slots:
            self.slots[site][:] = [None] * len(self.slots[site])
        for site in residuals:
            self.residuals[site][:] = [None]


def allocate(slots: Slots, output: Any) -> None:
    """Give the first slot memory for such an output, of :class:`TensorSpec` tensors, if it has none."""
    if slots[0] is None:
        with torch.inference_mode(False):  # usable inside and outside of inference mode
            slots[0] = empty(output)


class ForecastWeights:
    """The weights of one call's forecasts as tensors, made once for each combination of steps."""

    def __init__(self, weights: Weights, step: int) -> None:
        self._weights, self._step = weights, step
        self._made: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def __call__(self, read: tuple[int, ...], feature: Feature) -> torch.Tensor:
        """The weights of the outputs kept at the steps ``read``; in float32 at least where more than two are summed."""
        newest = next(leaves(feature))
        dtype = newest.dtype if len(read) == 2 else torch.promote_types(newest.dtype, torch.float32)
        if (read, dtype) not in self._made:
            values = self._weights(read, self._step)
            self._made[read, dtype] = torch.tensor(values, dtype=dtype, device=newest.device)
        return self._made[read, dtype]
