"""Epsilon Scaling's calibration: factors of the noise that repair exposure bias, apart for computed and reused calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from sostenuto.analysis.exposure_bias import noise_norm_curves
from sostenuto.analysis.trajectory import record
from sostenuto.analysis.variance_probe import probe_variance
from sostenuto.attention_tap import is_guided
from sostenuto.calibrations.base import Calibration, Settings, made_for
from sostenuto.clock import Tick
from sostenuto.engine import attach
from sostenuto.errors import InputError, MethodError
from sostenuto.methods import FORA, EpsilonScaling, NoCache, by_name
from sostenuto.methods.base import Method
from sostenuto.methods.checks import check_choice, check_number, is_whole
from sostenuto.methods.epsilon_scaling import NoiseScales, smoothed
from sostenuto.probe import Prober
from sostenuto.progress import progress
from sostenuto.seeds import OWN_SAMPLES


@dataclass(frozen=True)
class EpsilonScalingCalibration(Calibration):
    """Exposure bias of a model, sampler and caching method, measured, and the factors b of the noise that repair it.

    Exposure bias is that the network's inputs are distributed otherwise in sampling than in training. Fresh and reused
    predictions are wrong in different ways, even in opposite directions, so each kind has factors of its own; which side of
    1 they lie on comes from the measurement.

    - ``match="variance"``: the factor that gives the network's next input the second moment that it has in training, from
      :func:`~sostenuto.analysis.probe_variance`. With the optimal denoiser that is below 1 for a sampler that adds noise of its
      own (its steps lose variance), 1 for an ODE solver in the limit of small steps, and as a rule above 1 for a reused
      prediction, which is of the past.
    - ``match="norm"``: the factor that gives the prediction the norm that a computed one has on noised real data, from
      :func:`~sostenuto.analysis.noise_norm_curves` (the
      measurement of Epsilon Scaling, arXiv 2308.15321, per kind of call; that paper takes the ratio for what all steps so far
      have done together, as :meth:`~sostenuto.EpsilonScaling.measured` does).

    Where the method doesn't reuse, factors of reused calls are interpolated from the steps where it does, and the other
    way round for the norm. A method that never reuses gives both kinds the same factors.

    Attributes:
        caching: the method that the factors are to be combined with, or its name; one that scales the noise itself is
            refused (``EBCache(…, eps_scale=1.0)`` doesn't).
        real_latents: real data as the denoiser takes it, ``[rows, …]``: the rows that ``sample`` generates, generation after
            generation, must be of the same labels or prompts. ``None``: what the uncached sampler generates, which repairs
            what caching does and what the steps lose, but not what the model itself lacks.
        match: what is matched.
        window: steps in the running mean of the factors' logarithm, odd, 1 for no smoothing.
        limit: how far a factor may be from 1, above 0 and below 1.
    """

    caching: Method | str = field(default_factory=lambda: FORA(2))
    real_latents: torch.Tensor | None = None
    match: Literal["variance", "norm"] = "variance"
    window: int = 3
    limit: float = 0.1

    method: ClassVar[str] = EpsilonScaling.name

    def __post_init__(self) -> None:
        check_choice("match", self.match, ("variance", "norm"))
        check_number("limit", self.limit, above=0, below=1)
        if not is_whole(self.window, least=1) or self.window % 2 == 0:
            raise MethodError(f"window must be an odd whole number of 1 or more, not {self.window!r}")
        if not isinstance(self.caching, (Method, str)):
            raise MethodError(f"caching is a method or the name of one, not {self.caching!r}")
        if self.real_latents is not None and not isinstance(self.real_latents, torch.Tensor):
            raise MethodError("real_latents is a tensor [rows, …] or None")

    def run(self, settings: Settings) -> NoiseScales:
        """Measure, and turn the measurement into factors."""
        caching = by_name(self.caching) if isinstance(self.caching, str) else self.caching
        if caching.scales_noise:
            raise MethodError(
                f"{type(caching).__name__} scales the noise itself: calibrate for it without, such as EBCache(eps_scale=1.0)"
            )
        with progress(2, "calibrate", settings.show_progress) as bar:
            batches = self._batches(settings)
            bar.update()
            measured = self._by_variance if self.match == "variance" else self._by_norm
            computed, reused, timesteps, rows = measured(settings, caching, batches)
            bar.update()
        settings.check_steps(len(timesteps), len(timesteps))
        known = self._filled(computed)
        stale = self._filled(reused) or known
        with attach(settings.target, NoCache(), scheduler=settings.scheduler) as handle:
            identity = made_for(handle)
        identity["scheduler"]["timesteps"] = list(timesteps)
        how = {
            "num_samples": rows,
            "seed": settings.seed,
            "match": self.match,
            "window": self.window,
            "limit": self.limit,
            "caching": repr(caching)[:300],
            "real_latents": "given" if self.real_latents is not None else "generated",
            "measured": {"computed": computed, "reused": reused},
        }
        return NoiseScales(tuple(known), tuple(stale), **identity, calibration=how)

    def _batches(self, settings: Settings) -> list[torch.Tensor]:
        """Clean latents, one tensor for each generation to measure on."""
        # Of noise of their own: paired with the noise that made it, a sample would be known by it.
        generator = settings.generator_of(OWN_SAMPLES)
        own: list[torch.Tensor] = []
        while sum(map(len, own)) < settings.num_samples:
            own.append(_unguided(settings, generator))
            if self.real_latents is not None:
                break  # one tells how many rows a generation has
        if self.real_latents is None:
            return own
        size = len(own[0])
        whole = min(len(self.real_latents) // size, math.ceil(settings.num_samples / size)) * size
        if whole == 0:
            raise InputError(
                f"real_latents has {len(self.real_latents)} rows, a generation {size}: give one for each row at least"
            )
        return list(self.real_latents[:whole].split(size))

    def _by_variance(self, settings: Settings, caching: Method, batches: Sequence[torch.Tensor]) -> Any:
        probe = probe_variance(
            settings.target,
            settings.sample,
            batches,
            method=caching,
            num_inference_steps=settings.num_inference_steps,
            generator=settings.fresh_generator(),
            scheduler=settings.scheduler,
        )
        computed = [moments.factor for moments in probe.computed]
        reused = [None if moments is None else moments.factor for moments in probe.reused]
        return computed, reused, probe.timesteps, probe.num_samples

    def _by_norm(self, settings: Settings, caching: Method, batches: Sequence[torch.Tensor]) -> Any:
        curves = noise_norm_curves(
            settings.target,
            settings.sample,
            batches,
            method=caching,
            num_inference_steps=settings.num_inference_steps,
            generator=settings.fresh_generator(),
            scheduler=settings.scheduler,
        )
        factors = [1 / ratio for ratio in curves.ratios]
        computed = [None if stale else factor for factor, stale in zip(factors, curves.reused, strict=True)]
        reused = [factor if stale else None for factor, stale in zip(factors, curves.reused, strict=True)]
        return computed, reused, curves.timesteps, curves.num_samples

    def _filled(self, factors: Sequence[float | None]) -> list[float]:
        """A factor for every step: interpolated over the steps where none was measured, within the limit, and smoothed."""
        known = [step for step, factor in enumerate(factors) if factor is not None]
        if not known:
            return []
        logs = {
            step: math.log(min(max(factor, 1 - self.limit), 1 + self.limit))
            for step, factor in enumerate(factors)
            if factor is not None
        }
        filled = []
        for step in range(len(factors)):
            before = max((k for k in known if k <= step), default=known[0])
            after = min((k for k in known if k >= step), default=known[-1])
            share = 0.0 if after == before else (step - before) / (after - before)
            filled.append((1 - share) * logs[before] + share * logs[after])
        return [math.exp(value) for value in smoothed(filled, self.window // 2)]


def _unguided(settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """The clean latents of one uncached generation ``[rows, …]``.

    Raises:
        MethodError: it is guided, so that the network's own predictions are not what the sampler is told.
    """
    guided: set[bool] = set()

    def watch(_handle: Any, tick: Tick, prober: Prober) -> Any:
        guided.add(tick.pass_index > 0 or is_guided(prober.call.latents))
        return prober.follow()

    path = record(
        settings.target, lambda *_, **__: settings.generate(generator), scheduler=settings.scheduler, watch=watch
    )
    if True in guided:
        raise MethodError(
            "this sample is guided, and exposure bias is measured on what the network itself predicts: let sample leave "
            "guidance out, as with guidance_scale=1"
        )
    return path.clean
