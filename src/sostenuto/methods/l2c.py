"""Learning-to-Cache: a learned gate per step and branch, on every second step (arXiv 2406.01733)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sostenuto.errors import MethodError
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_number
from sostenuto.plan import Plan
from sostenuto.router import Router
from sostenuto.tables import shipped_router, shipped_routers


@dataclass(frozen=True)
class L2C(Method):
    """Learning-to-Cache (arXiv 2406.01733): full steps and cache steps in turn; a router says what a cache step computes.

    With the descending index ``i = S − 1 − p``, steps of odd i compute every branch. Steps of even i compute the branches
    whose gate ``β = sigmoid(w)`` exceeds θ, and reuse the others from the full step right before, so that nothing is ever
    reused twice. The official code begins with a cache step where S is odd, with nothing kept; here the first step is always
    full. Branch outputs are kept before their gate of the current timestep; both halves of guidance follow the same router.

    Attributes:
        router: the trained router, or its file; by default the one that ships for this model, scheduler and number of steps.
        threshold: the paper's θ, 0 or more and below 1: branches of a greater β are computed. By default the one that the
            router was trained with, of a router that names none 0.1.
    """

    router: Router | str | Path | None = None
    threshold: float | None = None

    name: ClassVar[str] = "l2c"
    paper: ClassVar[str] = "arXiv 2406.01733"
    summary: ClassVar[str] = "every second step computes the branches that a trained router keeps"
    calibrated: ClassVar[bool] = True
    state: ClassVar[str] = "one output of every branch that is reused"
    bytes_per_token: ClassVar[str] = "b × d × branches"

    def __post_init__(self) -> None:
        if self.router is not None and not isinstance(self.router, (Router, str, Path)):
            raise MethodError(f"L2C's router is a Router or the path of one, not {self.router!r}")
        if self.threshold is not None:
            check_number("L2C's threshold", self.threshold, least=0, below=1)

    @classmethod
    def dit_xl_2(cls, router: Router | str | Path, resolution: int = 256) -> L2C:
        """Published for DiT-XL/2 with DDIM: θ = 0.1 at 256², 0.9 at 512²."""
        if resolution not in (256, 512):
            raise MethodError(f"L2C published thresholds for DiT-XL/2 at 256 and 512, not at {resolution!r}")
        return cls(router, threshold=0.1 if resolution == 256 else 0.9)

    @classmethod
    def dit_l_2(cls, router: Router | str | Path) -> L2C:
        """Published for DiT-L/2 at 256² with DDIM: θ = 0.1."""
        return cls(router, threshold=0.1)

    @property
    def num_inference_steps(self) -> int | None:
        """The router's."""
        return self.router.num_inference_steps if isinstance(self.router, Router) else None

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> L2C:
        """Load the router and refuse one that was made for something else."""
        if self.router is None:
            shipped_routers(
                denoiser, scheduler
            )  # which of them is known with the number of steps; that there is one, now
            return self
        router = self.router if isinstance(self.router, Router) else Router.load(self.router)
        router.check(denoiser, scheduler)
        return replace(self, router=router)

    def plan(self, facts: Facts) -> Plan:
        """Everything at full steps, what the gates leave at cache steps."""
        router = self.router or shipped_router(facts.denoiser, facts.scheduler, facts.num_steps)
        assert isinstance(router, Router)
        router.check_steps(facts.timesteps)
        threshold = router.training.get("threshold", 0.1) if self.threshold is None else self.threshold
        check_number("the threshold that an L2C router was trained with", threshold, least=0, below=1)
        return router.to_table(threshold).plan(facts.sites)
