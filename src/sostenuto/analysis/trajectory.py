"""The path of one generation: what the network was given and what it predicted at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sostenuto.analysis.room import room
from sostenuto.clock import Tick
from sostenuto.engine import Handle, attach
from sostenuto.errors import InputError, MethodError
from sostenuto.features import Feature, as_rows
from sostenuto.methods.base import Method
from sostenuto.prediction import shared_part
from sostenuto.probe import Prober
from sostenuto.schedulers import clipped_to, noise_levels

Watch = Callable[[Handle, Tick, Prober], Any]
"""Makes a denoiser call and looks on: returns the output. Also called for the further passes of a step."""


@dataclass(frozen=True)
class Told:
    """What a path tells where it is known how noisy each latent is and which noise the network predicts.

    Attributes:
        levels: α and σ of every step in ``x_t = α·x₀ + σ·ε``.
        noise: the noise ε that the sampler was told, after any scaling, ``[steps, rows, …]`` as the latents.
        clean: the clean samples that the last step ends at, ``[rows, …]``.
    """

    levels: tuple[tuple[float, float], ...]
    noise: torch.Tensor
    clean: torch.Tensor


@dataclass(frozen=True)
class Trajectory:
    """One or more generations by one method, rows one after the other.

    Attributes:
        timesteps: the sampler's timesteps.
        latents: the network's inputs x_t, ``[steps, rows, …]`` in float32 on the CPU, of each step's first pass.
        predictions: what the network predicted, before any scaling, in the same shape.
        reused: whether a step filled in anything.
        rows: rows of each generation.
        macs: multiply-accumulates, all generations together; 0 where they were not counted.
        macs_uncached: the same had every call been computed.
        told: noise levels, noise and clean samples, or why this scheduler and network don't tell them.
    """

    timesteps: tuple[float, ...]
    latents: torch.Tensor
    predictions: torch.Tensor
    reused: tuple[bool, ...]
    rows: tuple[int, ...]
    macs: int
    macs_uncached: int
    told: Told | MethodError

    @property
    def num_steps(self) -> int:
        """Steps of a generation."""
        return len(self.timesteps)

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """α and σ of every step; raises the :class:`MethodError` that says why they aren't told."""
        return self._known.levels

    @property
    def noise(self) -> torch.Tensor:
        """The noise ε that the sampler was told; raises as above."""
        return self._known.noise

    @property
    def clean(self) -> torch.Tensor:
        """The clean samples that the last step ends at; raises as above."""
        return self._known.clean

    @property
    def _known(self) -> Told:
        if isinstance(self.told, MethodError):
            raise MethodError(str(self.told))
        return self.told

    def clean_estimates(self, step: int) -> torch.Tensor:
        """The network's estimate of the clean samples at one step, ``x̂₀ = (x_t − σ·ε) / α``, ``[rows, …]``."""
        alpha, sigma = self.levels[step]
        return (self.latents[step] - sigma * self.noise[step]) / max(alpha, 1e-6)


def one_tensor(latents: Feature) -> torch.Tensor:
    """The latents of a call, of all samples together.

    Raises:
        MethodError: they are a list of one tensor for each sample.
    """
    if not isinstance(latents, torch.Tensor):
        raise MethodError("the latents are a list of tensors: the path of such a model can't be kept in one")
    return latents


@torch.no_grad()
def record(
    target: Any,
    sample: Callable[..., Any],
    method: str | Method = "none",
    *,
    num_inference_steps: int = 50,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
    watch: Watch | None = None,
    num_slots: int = 1,
    count: bool = False,
) -> Trajectory:
    """Sample with a method attached and keep the path.

    The clean sample is where the last step's prediction points, ``(x − σ·ε) / α``, clipped as the scheduler clips it; it is
    what every sampler ends at whose last step removes all noise.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        method: what is attached.
        num_inference_steps: steps of the sampler, passed to ``sample``.
        num_samples: rows of the denoiser's batch to collect; ``sample`` is called until there are so many.
        generator: source of the noise; by default one seeded with 0.
        scheduler: for a bare denoiser.
        watch: makes the denoiser calls in place of the method's plan.
        num_slots: outputs that each site keeps for ``watch``.
        count: also count multiply-accumulates, which takes a dry run for each combination of what the sites do.

    Raises:
        InputError: ``sample`` left out steps, or its generations differ in their steps.
        MethodError: latents and prediction differ in more than one dimension.
        AlreadyEnabledError: a method is enabled on the model.
        EngineError: the network can't be counted.
    """
    generator = generator or torch.Generator().manual_seed(0)
    recorders: list[_Recorder] = []
    macs = macs_uncached = 0
    with attach(target, method, scheduler=scheduler) as handle:
        handle.driver_slots = num_slots
        while sum(recorder.rows for recorder in recorders) < num_samples:
            handle.driver = recorder = _Recorder(handle, watch)
            sample(target, generator, num_inference_steps=num_inference_steps)
            recorder.check()
            recorders.append(recorder)
            if count:
                stats = handle.stats
                macs, macs_uncached = macs + stats.macs, macs_uncached + stats.macs_uncached
    first = recorders[0]
    if any(recorder.timesteps != first.timesteps for recorder in recorders):
        raise InputError("sample must run the same timesteps every time")

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(recorder, name) for recorder in recorders]
        if len(parts) == 1:
            return parts[0]
        whole = room((len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:]))
        return torch.cat(parts, dim=1, out=whole)

    untold = next((recorder.untold for recorder in recorders if recorder.untold is not None), None)
    if untold is None:
        clean = torch.cat([recorder.clean() for recorder in recorders])
        told = Told(first.levels, joined("noise"), clean)
    else:
        told = untold
    return Trajectory(
        first.timesteps,
        joined("latents"),
        joined("predictions"),
        tuple(first.reused),
        tuple(recorder.rows for recorder in recorders),
        macs,
        macs_uncached,
        told,
    )


class _Recorder:
    """Stands in for the plan during one generation: follows it, and keeps what passes by."""

    def __init__(self, handle: Handle, watch: Watch | None) -> None:
        self.handle, self.watch = handle, watch
        self.timesteps: tuple[float, ...] = ()
        self.levels: tuple[tuple[float, float], ...] = ()
        self.untold: MethodError | None = None
        self.latents: torch.Tensor  # [steps, rows, …], as the others
        self.noise: torch.Tensor
        self.predictions: torch.Tensor
        self.reused: list[bool] = []

    @property
    def rows(self) -> int:
        return self.latents.shape[1]

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        if tick.new_generation:
            if self.reused:
                raise InputError("sample must run one generation at a time")
            self.timesteps = tick.timesteps
        output = prober.follow() if self.watch is None else self.watch(self.handle, tick, prober)
        if tick.pass_index:
            return output
        prediction, latents = prober.prediction(output).float(), as_rows(prober.call.latents).float()
        shared = shared_part(prediction, latents, prober.call.noisy_last)  # without an appended condition
        self._keep("latents", tick.step, shared.of(latents))
        self._keep("predictions", tick.step, prediction)
        reused = self.handle._reused
        try:
            self.levels = self.levels or noise_levels(self.handle._scheduler(), tick.timesteps)
            scale = self.handle._noise_scale
            factor = 1.0 if scale is None else scale.at(tick.step, reused)
            self._keep("noise", tick.step, prober.noise(output).float() * factor)
        except MethodError as error:
            self.untold = self.untold or MethodError(str(error))  # a raised one would keep the tensors of its frames
        self.reused.append(reused)
        return output

    def _keep(self, name: str, step: int, values: torch.Tensor) -> None:
        if not hasattr(self, name):
            setattr(self, name, room((len(self.timesteps), *values.shape)))
        kept = getattr(self, name)
        if values.shape != kept.shape[1:]:
            raise InputError(
                f"{name} of shape {list(values.shape)} follow such of {list(kept.shape[1:])}: sample must keep to one batch"
            )
        kept[step] = values

    def check(self) -> None:
        if not self.reused or len(self.reused) != len(self.timesteps):
            raise InputError(
                f"sample called the denoiser at {len(self.reused)} of {len(self.timesteps)} steps: it must run one whole "
                "generation"
            )

    def clean(self) -> torch.Tensor:
        alpha, sigma = self.levels[-1]
        bound = clipped_to(self.handle._scheduler())
        return ((self.latents[-1] - sigma * self.noise[-1]) / max(alpha, 1e-6)).clamp(-bound, bound)
