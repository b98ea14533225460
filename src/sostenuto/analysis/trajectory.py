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
from sostenuto.features import Feature
from sostenuto.methods.base import Method
from sostenuto.prediction import shared_part
from sostenuto.probe import Prober
from sostenuto.schedulers import clipped_to, noise_levels

Watch = Callable[[Handle, Tick, Prober], Any]
"""Makes a denoiser call and looks on: returns the output. Also called for the further passes of a step."""


@dataclass(frozen=True)
class Trajectory:
    """One or more generations by one method, rows one after the other.

    Attributes:
        timesteps: the sampler's timesteps.
        levels: α and σ of every step in ``x_t = α·x₀ + σ·ε``.
        latents: the network's inputs x_t, ``[steps, rows, …]`` in float32 on the CPU, of each step's first pass.
        noise: the noise ε that the sampler was told, after any scaling, in the same shape.
        predictions: what the network predicted, before any scaling; the same as the noise where it predicts that.
        reused: whether a step filled in anything.
        clean: the clean samples that the last step ends at, ``[rows, …]``.
        rows: rows of each generation.
        macs: multiply-accumulates, all generations together; 0 where they were not counted.
        macs_uncached: the same had every call been computed.
    """

    timesteps: tuple[float, ...]
    levels: tuple[tuple[float, float], ...]
    latents: torch.Tensor
    noise: torch.Tensor
    predictions: torch.Tensor
    reused: tuple[bool, ...]
    clean: torch.Tensor
    rows: tuple[int, ...]
    macs: int
    macs_uncached: int

    @property
    def num_steps(self) -> int:
        """Steps of a generation."""
        return len(self.timesteps)

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
        MethodError: the scheduler's noise levels are not known, or the latents are no single tensor.
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

    clean = torch.cat([recorder.clean() for recorder in recorders])
    return Trajectory(
        first.timesteps,
        first.levels,
        joined("latents"),
        joined("noise"),
        joined("predictions"),
        tuple(first.reused),
        clean,
        tuple(recorder.rows for recorder in recorders),
        macs,
        macs_uncached,
    )


class _Recorder:
    """Stands in for the plan during one generation: follows it, and keeps what passes by."""

    def __init__(self, handle: Handle, watch: Watch | None) -> None:
        self.handle, self.watch = handle, watch
        self.timesteps: tuple[float, ...] = ()
        self.levels: tuple[tuple[float, float], ...] = ()
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
            one_tensor(prober.call.latents)
            self.timesteps = tick.timesteps
            self.levels = noise_levels(self.handle._scheduler(), tick.timesteps)
        output = prober.follow() if self.watch is None else self.watch(self.handle, tick, prober)
        if tick.pass_index:
            return output
        scale, reused = self.handle._noise_scale, self.handle._reused
        noise = prober.noise(output).float() * (1.0 if scale is None else scale.at(tick.step, reused))
        latents = prober.call.latents.float()
        shared = shared_part(noise, latents, prober.call.noisy_last)  # without an appended condition
        for name, values in (
            ("latents", shared.of(latents)),
            ("noise", noise),
            ("predictions", prober.prediction(output).float()),
        ):
            if not self.reused:
                setattr(self, name, room((len(self.timesteps), *values.shape)))
            getattr(self, name)[tick.step] = values
        self.reused.append(reused)
        return output

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
