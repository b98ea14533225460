"""Exposure bias: the norm of the predicted noise while sampling and on noised real data, and how errors of reuse add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sostenuto.analysis.trajectory import one_tensor
from sostenuto.analysis.variance_probe import fitted
from sostenuto.clock import Tick
from sostenuto.engine import attach
from sostenuto.errors import InputError
from sostenuto.methods.base import Method
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.schedulers import noise_levels


def error_variance_growth(num_reuses: int, correlation: float) -> float:
    """Variance of the sum of the errors of consecutive steps that reuse one prediction (FEB-Cache, arXiv 2503.07120v3).

    ``Var = N + 2 · Σ_{d=1}^{N−1} (N − d) · ρ^d``, in units of one error's variance, for errors whose correlation falls as ρ^d
    with their distance d. Independent errors (ρ = 0) give N, fully correlated ones (ρ = 1) EB-Cache's N².

    Args:
        num_reuses: N, the number of steps, 1 or more.
        correlation: ρ, the correlation of neighbouring steps' errors, from −1 to 1.

    Raises:
        InputError: an argument is out of range.
    """
    if not isinstance(num_reuses, int) or isinstance(num_reuses, bool) or num_reuses < 1:
        raise InputError(f"num_reuses must be a whole number of 1 or more, not {num_reuses!r}")
    if not isinstance(correlation, (int, float)) or isinstance(correlation, bool) or not -1 <= correlation <= 1:
        raise InputError(f"correlation must be a number from −1 to 1, not {correlation!r}")
    return num_reuses + 2 * sum((num_reuses - d) * correlation**d for d in range(1, num_reuses))


@dataclass(frozen=True)
class NormCurves:
    """Mean over samples of the Euclidean norm of the predicted noise, one entry per step in sampling order.

    Attributes:
        timesteps: the sampler's timesteps.
        chain: mean norm on the sampling chain, as the network predicts it (before any scaling of the noise).
        real: mean norm on real latents noised to the step's level, all computed.
        num_samples: rows that each mean is over.
        reused: whether the chain's prediction was filled in, in whole or in part, at each step.
    """

    timesteps: tuple[float, ...]
    chain: tuple[float, ...]
    real: tuple[float, ...]
    num_samples: int
    reused: tuple[bool, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Chain over real at every step; above 1 the sampler's noise is over-predicted: exposure bias."""
        return tuple(chain / real for chain, real in zip(self.chain, self.real, strict=True))


@torch.no_grad()
def noise_norm_curves(
    target: Any,
    sample: Callable[..., Any],
    real_latents: torch.Tensor | Sequence[torch.Tensor],
    *,
    method: str | Method = "none",
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
) -> NormCurves:
    """Norms of the predicted noise on the sampling chain and on noised real data (Epsilon Scaling, arXiv 2308.15321).

    At every denoiser call of a generation the network is also called, with the same timestep and conditioning, on
    ``x_t = α_t·x₀ + σ_t·ε`` of the real latents x₀, with one ε for all steps. Norms are of ε also where the network predicts
    velocity, x₀ or a flow. Rows of a guided call each count by themselves, so measure without guidance.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        real_latents: real data as the denoiser takes it, ``[rows, …]``: row i must be of the label or prompt that ``sample``
            gives row i of the denoiser's batch. Where that batch holds the rows several times (guidance), they are repeated.
            A sequence: one generation for each of its tensors.
        method: what to cache and scale while sampling; the chain is that of the method.
        num_inference_steps: steps of the sampler, passed to ``sample``.
        generator: source of all noise; by default one seeded with 0.
        scheduler: for a bare denoiser.

    Raises:
        InputError: the rows don't fit the denoiser's batch, or ``sample`` left out steps.
        MethodError: the scheduler's noise levels are not known, or the latents are no single tensor.
        AlreadyEnabledError: a method is enabled on the model.
    """
    batches = [real_latents] if isinstance(real_latents, torch.Tensor) else list(real_latents)
    generator = generator or torch.Generator().manual_seed(0)
    meters: list[_Meter] = []
    with attach(target, method, scheduler=scheduler) as handle:
        for batch in batches:
            noise = torch.randn(batch.shape, generator=generator, device=generator.device)
            meters.append(_Meter(handle._scheduler, batch, noise))
            handle.driver = meters[-1]
            sample(target, generator, num_inference_steps=num_inference_steps)
    if not meters or any(len(meter.chain) != max(1, len(meter.timesteps)) for meter in meters):
        raise InputError("give at least one batch of real latents, and a sample that runs all steps of a generation")
    steps = range(len(meters[0].timesteps))
    if any(meter.timesteps != meters[0].timesteps for meter in meters):
        raise InputError("sample must run the same timesteps every time")

    def means(curves: Sequence[dict[int, list[float]]]) -> tuple[float, ...]:
        rows = [[norm for curve in curves for norm in curve[step]] for step in steps]
        return tuple(math.fsum(row) / len(row) for row in rows)

    chain, real = [meter.chain for meter in meters], [meter.real for meter in meters]
    rows = sum(len(curve[0]) for curve in chain)
    return NormCurves(meters[0].timesteps, means(chain), means(real), rows, tuple(meters[0].reused))


class _Meter:
    """Stands in for the plan during one generation: follows it, and notes the norms of every call."""

    def __init__(self, scheduler: Callable[[], Any], real: torch.Tensor, noise: torch.Tensor) -> None:
        self.scheduler, self.real_latents, self.added = scheduler, real, noise
        self.timesteps: tuple[float, ...] = ()
        self.levels: tuple[tuple[float, float], ...] = ()
        self.chain: dict[int, list[float]] = {}  # step → norm of every row
        self.real: dict[int, list[float]] = {}
        self.reused: list[bool] = []

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        if tick.new_generation:
            self.timesteps = tick.timesteps
            self.levels = noise_levels(self.scheduler(), tick.timesteps)
        probe = prober.with_latents(self._noised(tick, one_tensor(prober.call.latents)))
        computed = probe.run([Op.COMPUTE] * len(prober.handle.sites))
        self.real.setdefault(tick.step, []).extend(_norms(probe.noise(computed)))
        output = prober.follow()
        if tick.pass_index == 0:
            self.reused.append(prober.handle._reused)
        self.chain.setdefault(tick.step, []).extend(_norms(prober.noise(output)))
        return output

    def _noised(self, tick: Tick, latents: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.levels[tick.step]
        return alpha * fitted(self.real_latents, latents) + sigma * fitted(self.added, latents)


def _norms(noise: torch.Tensor) -> list[float]:
    return noise.flatten(1).float().norm(dim=1).tolist()
