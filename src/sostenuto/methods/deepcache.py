"""DeepCache: keep what a U-Net computes beyond one skip connection (arXiv 2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.deep_tap import DeepTap
from sostenuto.errors import MethodError
from sostenuto.methods.base import Facts, Method, whole_steps
from sostenuto.methods.checks import check_choice, check_flag, check_number, check_whole
from sostenuto.plan import Plan
from sostenuto.sites import Site
from sostenuto.unet import beyond, is_unet, num_branches

_POWER_STEP = 0.02


@dataclass(frozen=True)
class DeepCache(Method):
    """DeepCache (arXiv 2312.00858): high-level features of a U-Net change slowly from step to step.

    A full step keeps what joins the skip connection ``branch_id`` in the up path, ``F_cache ← U_{m+1}``. A cached step runs
    the down path up to that connection and the up path from there on ``concat(D_m, F_cache)``; what lies beyond isn't run.
    One feature is kept for each pass; the official plug-in keeps the output of every module.

    Full steps of the 1:N strategy: every ``interval`` steps from the first one on (uniform), or dense around ``center`` and
    ever sparser away from it (non-uniform), with the same number of full steps ``n = ⌈S / N⌉``.

    Attributes:
        interval: the paper's N, 1 (no caching) or more.
        branch_id: number of the skip connection, 0 (the one from the input convolution; nearly all is skipped) up to the
            deepest. As in the official plug-in: ``3·block + layer`` with two layers per block, counted from the outermost;
            with other numbers ``(layers_per_block + 1)·block + layer``. The code of the paper's experiments on
            Stable Diffusion and DDPM doesn't count the connection from the input convolution: its branch is one less.
        schedule: ``"uniform"`` or ``"non-uniform"``.
        center: the step around which a non-uniform schedule is dense, 0 or more and below the number of steps.
        power: how quickly a non-uniform schedule gets sparse, above 1. Lowered by 0.02 until there are n different full
            steps.
        parity: whether a non-uniform schedule is the official code's. There the power of the negative end of the grid is
            complex, and the whole-number cast drops the imaginary part: full steps are then about evenly dense from the first
            one to past the centre. By default the power keeps the sign, which puts the dense part at the centre.
    """

    interval: int = 3
    branch_id: int = 0
    schedule: Literal["uniform", "non-uniform"] = "uniform"
    center: int = 15
    power: float = 1.2
    parity: bool = False

    name: ClassVar[str] = "deepcache"
    paper: ClassVar[str] = "arXiv 2312.00858"
    summary: ClassVar[str] = "keeps what a U-Net computes beyond one skip connection, for N steps"
    state: ClassVar[str] = "one feature of the up path"
    bytes_per_token: ClassVar[str] = "b × up"
    denoisers: ClassVar[str] = "U-Net"

    def __post_init__(self) -> None:
        check_whole("DeepCache's interval", self.interval, least=1)
        check_whole("DeepCache's branch_id", self.branch_id, least=0)
        check_choice("DeepCache's schedule", self.schedule, ("uniform", "non-uniform"))
        check_whole("DeepCache's center", self.center, least=0)
        check_flag("DeepCache's parity", self.parity)
        check_number("DeepCache's power", self.power, above=1, below=100)

    @classmethod
    def sd15(cls) -> DeepCache:
        """Stable Diffusion 1.5, 50 steps: N = 5, the experiments' layer 0 of block 0."""
        return cls(interval=5, branch_id=1)

    @classmethod
    def sdxl(cls) -> DeepCache:
        """Stable Diffusion XL, 50 steps: N = 3, the experiments' layer 0 of block 0."""
        return cls(interval=3, branch_id=1)

    @classmethod
    def ldm(cls) -> DeepCache:
        """LDM-4-G on ImageNet, 250 DDIM steps: N = 5, the connection from the input convolution; also N = 10 and 20."""
        return cls(interval=5, branch_id=0)

    @classmethod
    def cifar10(cls) -> DeepCache:
        """DDPM on CIFAR-10, 100 DDIM steps: N = 5, the experiments' branch 2."""
        return cls(interval=5, branch_id=3)

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Everything beyond the skip connection, as one site named after the module whose output is kept.

        Raises:
            AnatomyError: the structure of a block isn't known.
            MethodError: the denoiser is no U-Net, or has no such connection.
        """
        if not is_unet(denoiser):
            raise MethodError(
                f"DeepCache is for UNet2DModel and UNet2DConditionModel, this is a {type(denoiser).__name__}, which has no "
                "skip connections: use a method for transformers, such as FORA"
            )
        branches = num_branches(denoiser)
        if self.branch_id >= branches:
            raise MethodError(
                f"this {type(denoiser).__name__} has skip connections 0 to {branches - 1} with something beyond them: "
                f"branch_id can't be {self.branch_id}"
            )
        paths = beyond(denoiser, self.branch_id)
        parameters = sum(p.numel() for path in paths for p in denoiser.get_submodule(path).parameters())
        return [Site(paths[-1], SiteKind.DEEP, self.branch_id, parameters)]

    def tap(self, site: Site, denoiser: nn.Module) -> DeepTap:
        """Skips everything beyond the skip connection."""
        return DeepTap(site, denoiser, beyond(denoiser, site.block))

    def plan(self, facts: Facts) -> Plan:
        """Full steps by the schedule; image to image counts from its first step."""
        first, steps = facts.first_step, facts.num_steps
        full = {first + step for step in self.full_steps(steps - first)}
        return whole_steps(facts, [step not in full for step in range(steps)])

    def full_steps(self, num_steps: int) -> list[int]:
        """The full steps of a generation of ``num_steps`` steps, in sampling order; the first one is always full.

        Raises:
            MethodError: the centre lies beyond the steps, or no power gives as many different steps.
        """
        if self.schedule == "uniform" or self.interval == 1:
            return list(range(0, num_steps, self.interval))
        if self.center >= num_steps:
            raise MethodError(
                f"DeepCache's center {self.center} is not among the {num_steps} steps: give a smaller one"
            )
        wanted, power = -(-num_steps // self.interval), self.power
        while power > 1:
            inner = self._grid(num_steps, wanted, power)[1:-1]
            if 1 + len(inner) == wanted:
                return [0, *(self.center + offset for offset in inner)]
            power -= _POWER_STEP
        raise MethodError(
            f"no power of {self.power:g} or less puts {wanted} different full steps among {num_steps} around step "
            f"{self.center}: give another center or interval"
        )

    def _grid(self, num_steps: int, wanted: int, power: float) -> list[int]:
        """Whole parts of ``linspace((−c)^{1/p}, (S−c)^{1/p}, n+1)^p``, the different ones in rising order."""
        power_of = pow if self.parity else _signed_power
        low, high = power_of(-self.center, 1 / power), power_of(num_steps - self.center, 1 / power)
        values = power_of(np.linspace(low, high, wanted + 1), power)
        return np.unique(np.real(values).astype(int)).tolist()


def _signed_power(base: Any, exponent: float) -> Any:
    return np.sign(base) * np.abs(base) ** exponent
