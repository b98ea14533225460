"""How much variance a sampler loses or adds on real data: each step by itself, and the chain of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sostenuto import compat
from sostenuto.analysis.trajectory import Trajectory, one_tensor, record
from sostenuto.clock import Tick
from sostenuto.engine import Handle, attach
from sostenuto.errors import InputError, MethodError
from sostenuto.methods.base import Method
from sostenuto.plan import Op
from sostenuto.prediction import keep_variance
from sostenuto.probe import Prober
from sostenuto.schedulers import FLOWS, is_preconditioned, noise_levels, predicts


@dataclass(frozen=True)
class Moments:
    """What a prediction ε̂ of the noise ε does to the next input ``x′(b) = x′ + c·(b·ε̂ − ε)`` of the network.

    x′ is the next input with the true noise, so that it is distributed as in training. All moments are sums over rows and
    elements; only their ratios matter.

    Attributes:
        response: c, how the next input depends on the noise that the sampler is told; below 0.
        size: ``⟨ε̂, ε̂⟩``.
        truth: ``⟨ε, ε⟩``.
        overlap: ``⟨ε̂, ε⟩``.
        next_overlap: ``⟨x′, ε̂⟩``.
        next_truth: ``⟨x′, ε⟩``.
        next_size: ``⟨x′, x′⟩``.
    """

    response: float
    size: float
    truth: float
    overlap: float
    next_overlap: float
    next_truth: float
    next_size: float

    def excess(self, factor: float = 1.0) -> float:
        """Relative excess of the next input's second moment where the noise is scaled: ``(‖x′(b)‖² − ‖x′‖²) / ‖x′‖²``."""
        error = factor**2 * self.size - 2 * factor * self.overlap + self.truth
        cross = factor * self.next_overlap - self.next_truth
        return (self.response**2 * error + 2 * self.response * cross) / self.next_size

    @property
    def norm_ratio(self) -> float:
        """Norm of the predicted noise over that of the true one."""
        return math.sqrt(self.size / self.truth)

    @property
    def least_squares(self) -> float:
        """The factor whose prediction is nearest to the truth, ``⟨ε̂, ε⟩ / ⟨ε̂, ε̂⟩``; 1 for a perfectly trained network."""
        return self.overlap / self.size

    @property
    def factor(self) -> float:
        """The factor b that gives the next input the second moment it has in training.

        The lower root of ``c²⟨ε̂,ε̂⟩·b² + 2c(⟨x′,ε̂⟩ − c⟨ε̂,ε⟩)·b + c²⟨ε,ε⟩ − 2c⟨x′,ε⟩ = 0``, up to which a larger factor takes
        variance away; where there is none, as no factor makes up for the error of the prediction, that of least squares.
        """
        c = self.response
        if c >= 0:
            return self.least_squares
        a, half = -c * self.size, self.next_overlap - c * self.overlap
        discriminant = half**2 - a * (2 * self.next_truth - c * self.truth)
        return self.least_squares if discriminant < 0 else (half - math.sqrt(discriminant)) / a


@dataclass(frozen=True)
class VarianceProbe:
    """What :func:`probe_variance` measured, one entry per step in sampling order.

    Attributes:
        timesteps: the sampler's timesteps.
        computed: with everything computed.
        reused: with the method's own prediction at the steps where it doesn't compute everything, else ``None``.
        num_samples: rows that each entry is over.
    """

    timesteps: tuple[float, ...]
    computed: tuple[Moments, ...]
    reused: tuple[Moments | None, ...]
    num_samples: int


@torch.no_grad()
def probe_variance(
    target: Any,
    sample: Callable[..., Any],
    real_latents: torch.Tensor | Sequence[torch.Tensor],
    *,
    method: str | Method = "none",
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
) -> VarianceProbe:
    """Run the sampler with the true noise of known pairs (x₀, x_T), and note what the network would have told it.

    At every denoiser call ``ε = (x_t − α_t·x₀) / σ_t`` is the noise that is truly there. The sampler is told this ε, whatever
    it expects, so that it walks from x_T to x₀ with every input distributed as in training; the network's predictions,
    computed and as the method has them, are compared with it. A step's effect c on the next input is found by regression of
    the next input on x_t and ε, so that nothing need be known of the sampler but that its step is linear. Of a solver that
    remembers earlier outputs c is their effect and this one's together, as of a prediction that is off by the same factor from
    step to step. Rows of a guided call each count by themselves, so measure without guidance.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        real_latents: x₀ as the denoiser takes it, ``[rows, …]``: row i must be of the label or prompt that ``sample`` gives
            row i of the denoiser's batch. A sequence: one generation for each of its tensors.
        method: what to cache; its noise scale has no effect here.
        num_inference_steps: steps of the sampler, passed to ``sample``.
        generator: source of all noise; by default one seeded with 0.
        scheduler: for a bare denoiser.

    Raises:
        InputError: the rows don't fit the denoiser's batch, or ``sample`` left out steps.
        MethodError: what the scheduler expects, or how noisy its steps are, is not known, or the latents are no single tensor.
        AlreadyEnabledError: a method is enabled on the model.
    """
    batches = [real_latents] if isinstance(real_latents, torch.Tensor) else list(real_latents)
    generator = generator or torch.Generator().manual_seed(0)
    teachers: list[_Teacher] = []
    with attach(target, method, scheduler=scheduler) as handle:
        for batch in batches:
            teachers.append(_Teacher(handle, batch))
            handle.driver = teachers[-1]
            sample(target, generator, num_inference_steps=num_inference_steps)
            teachers[-1].finish()
    if not teachers or any(teacher.walked != max(1, len(teacher.timesteps)) for teacher in teachers):
        raise InputError("give at least one batch of real latents, and a sample that runs all steps of a generation")
    if any(teacher.timesteps != teachers[0].timesteps for teacher in teachers):
        raise InputError("sample must run the same timesteps every time")
    steps = range(len(teachers[0].timesteps))
    computed = [_joined([teacher.computed[step] for teacher in teachers]) for step in steps]
    reused = [[teacher.reused[step] for teacher in teachers if step in teacher.reused] for step in steps]
    rows = sum(teacher.clean.shape[0] for teacher in teachers)
    return VarianceProbe(
        teachers[0].timesteps, tuple(computed), tuple(_joined(found) if found else None for found in reused), rows
    )


@dataclass(frozen=True)
class ChainVariance:
    """How the noise of a sampling chain compares with that of training, one entry per step in sampling order.

    Attributes:
        timesteps: the sampler's timesteps.
        variance: ``Var(x̂_t − α_t·x₀)`` over rows and elements, x̂_t being the chain's input of the network.
        expected: ``σ_t²``, what it is for ``x_t = α_t·x₀ + σ_t·ε``; ``1 − ᾱ_t`` in diffusion.
        num_samples: rows that each entry is over.
    """

    timesteps: tuple[float, ...]
    variance: tuple[float, ...]
    expected: tuple[float, ...]
    num_samples: int

    @property
    def delta(self) -> tuple[float, ...]:
        """δ_t, the variance beyond what is expected; below 0 the chain has lost noise, as where too much is predicted."""
        return tuple(found - expected for found, expected in zip(self.variance, self.expected, strict=True))


@torch.no_grad()
def probe_chain(
    target: Any,
    sample: Callable[..., Any],
    real_latents: torch.Tensor | Sequence[torch.Tensor],
    *,
    method: str | Method = "none",
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
) -> ChainVariance:
    """Run the sampler by itself from known pairs (x₀, x_T), and compare its noise about x₀ with that of training.

    x_T is the noise that the sampler draws, paired with the x₀ of the same row. Nothing is corrected on the way, so that what
    each step does wrong adds up, where :func:`probe_variance` looks at every step afresh; noise that an ancestral sampler
    draws has no error, and dilutes it. A perfect denoiser that knows x₀ has
    δ_t = 0. One that doesn't ends at another sample, however well it is trained: its δ_t grows to ``α_t²`` times the mean
    square of the difference between two samples. What a method does is the difference from the uncached chain.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        real_latents: x₀ as in :func:`probe_variance`.
        method: what the chain runs with, its noise scale included.
        num_inference_steps: steps of the sampler, passed to ``sample``.
        generator: source of all noise; by default one seeded with 0. The same seed gives every method the same pairs.
        scheduler: for a bare denoiser.

    Raises:
        InputError: the rows don't fit the denoiser's batch, or ``sample`` left out steps.
        MethodError: how noisy the scheduler's steps are is not known, or the latents are no single tensor.
        AlreadyEnabledError: a method is enabled on the model.
    """
    batches = [real_latents] if isinstance(real_latents, torch.Tensor) else list(real_latents)
    generator = generator or torch.Generator().manual_seed(0)
    given = {"num_inference_steps": num_inference_steps, "generator": generator, "scheduler": scheduler}
    return chain_variance([record(target, sample, method, **given) for _ in batches], batches)


def chain_variance(paths: Sequence[Trajectory], batches: Sequence[torch.Tensor]) -> ChainVariance:
    """The same of paths that were recorded, with the x₀ of each of their generations in turn.

    Raises:
        InputError: there are none, rows don't fit, or the paths' timesteps differ.
    """
    generations = [latents for path in paths for latents in path.latents.split(path.rows, dim=1)]
    if not batches:
        raise InputError("give at least one batch of real latents")
    if any(path.timesteps != paths[0].timesteps for path in paths):
        raise InputError("sample must run the same timesteps every time")
    levels, variance = paths[0].levels, []
    for step, (alpha, _) in enumerate(levels):
        pairs = zip(generations, batches, strict=True)
        noise = torch.cat([(x[step] - alpha * fitted(clean, x[step])).flatten().double() for x, clean in pairs])
        variance.append(noise.var(correction=0).item())
    expected = tuple(sigma**2 for _, sigma in levels)
    return ChainVariance(paths[0].timesteps, tuple(variance), expected, sum(map(len, batches)))


@dataclass
class _Call:
    """One denoiser call, until the next input is known."""

    latents: torch.Tensor
    noise: torch.Tensor
    computed: torch.Tensor
    reused: torch.Tensor | None


class _Teacher:
    """Stands in for the plan during one generation: tells the sampler the truth, and notes what the network says."""

    def __init__(self, handle: Handle, clean: torch.Tensor) -> None:
        self.handle, self.clean = handle, clean
        self.timesteps: tuple[float, ...] = ()
        self.levels: tuple[tuple[float, float], ...] = ()
        self.computed: dict[int, list[torch.Tensor]] = {}
        self.reused: dict[int, list[torch.Tensor]] = {}
        self.pending: tuple[int, list[_Call]] = (-1, [])
        self.walked = 0

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        latents = one_tensor(prober.call.latents)
        if tick.new_generation:
            self.timesteps = tick.timesteps
            self.levels = noise_levels(self.handle._scheduler(), tick.timesteps)
            self.handle._noise_scale = None  # the sampler is to be told the truth
        if tick.step != self.pending[0]:
            self._settle(latents)
            self.pending = (tick.step, [])
            self.walked += 1
        exact = _exact(latents)
        clean = fitted(self.clean, exact)
        alpha, sigma = self.levels[tick.step]
        noise = (exact - alpha * clean) / max(sigma, 1e-12)
        fresh = prober.run([Op.COMPUTE] * len(self.handle.sites))
        output = prober.follow()
        reused = prober.noise(output) if self.handle._reused else None
        self.pending[1].append(_Call(latents, noise, prober.noise(fresh), reused))
        truth = self._truth(tick, clean, noise, exact).to(latents.dtype)
        last = prober.call.noisy_last
        return compat.map_prediction(output, lambda prediction, x: keep_variance(truth, prediction, x, last), latents)

    def finish(self) -> None:
        """The sampling ended, at the clean sample."""
        if self.pending[1]:
            self._settle(fitted(self.clean, _exact(self.pending[1][0].latents)))

    def _settle(self, following: torch.Tensor) -> None:
        step, calls = self.pending
        for call in calls:
            x, noise, reached = (tensor.flatten().double() for tensor in (call.latents, call.noise, following))
            for prediction, into in ((call.computed, self.computed), (call.reused, self.reused)):
                if prediction is not None:
                    y = prediction.flatten().double()
                    into.setdefault(step, []).append(
                        torch.stack(
                            [
                                *(y @ y, noise @ noise, y @ noise, reached @ y, reached @ noise, reached @ reached),
                                *(x @ x, x @ noise, x @ reached),
                            ]
                        )
                    )

    def _truth(self, tick: Tick, clean: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What a network that knows the noise predicts."""
        scheduler = self.handle._scheduler()
        alpha, sigma = self.levels[tick.step]
        kind = predicts(scheduler)
        if is_preconditioned(scheduler):
            return self.handle._conversion(tick).write(noise, latents)
        known = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * clean,
            "sample": clean,
            **dict(zip(FLOWS, (noise - clean, clean - noise), strict=True)),
        }
        if kind not in known:
            raise MethodError(f"this {type(scheduler).__name__} expects {kind}, whose noise is not known")
        return -known[kind] if self.handle._reader.negated_prediction else known[kind]


def _exact(latents: torch.Tensor) -> torch.Tensor:
    """In float32 at least: near the clean end half precision would round away most of what noise is left."""
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def fitted(real: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Real rows as often as a guided batch holds them.

    Raises:
        InputError: the rows don't fit the denoiser's batch.
    """
    repeats, left = divmod(latents.shape[0], real.shape[0])
    if left or real.shape[1:] != latents.shape[1:]:
        raise InputError(
            f"real_latents of shape {tuple(real.shape)} don't fit the denoiser's batch of shape {tuple(latents.shape)}: "
            "give one row for each row that sample generates"
        )
    return torch.cat([real.to(latents)] * repeats)


def _joined(sums: Sequence[Sequence[torch.Tensor]]) -> Moments:
    """One step's moments from the sums of its calls."""
    total = torch.stack([values for calls in sums for values in calls]).sum(0).tolist()
    size, truth, overlap, next_overlap, next_truth, next_size, xx, xn, xr = total
    determinant = xx * truth - xn**2  # x′ ≈ a·x + c·ε by least squares
    response = (xx * next_truth - xn * xr) / determinant if determinant > 1e-9 * xx * truth else 0.0
    return Moments(response, size, truth, overlap, next_overlap, next_truth, next_size)
