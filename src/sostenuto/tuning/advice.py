"""``sostenuto.advise``: is caching worth it for this model and sampler, with which method, at what gain and memory?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sostenuto import compat
from sostenuto.calibrations.base import Sample, Settings, made_for
from sostenuto.clock import Tick
from sostenuto.engine import Handle, scheduler_of
from sostenuto.errors import InputError
from sostenuto.methods import DeepCache, EBCache
from sostenuto.methods.base import Method
from sostenuto.pipelines import pipeline_sample, suited
from sostenuto.plan import Action, Op
from sostenuto.prediction import tells_clean_samples
from sostenuto.probe import Prober
from sostenuto.progress import progress
from sostenuto.sites import has_stack
from sostenuto.table import CacheTable
from sostenuto.tuning.generate import Drive, Generated, generate
from sostenuto.tuning.instrument import Instrument, tapped_for
from sostenuto.tuning.measurement import Kind, Measurement, Reach
from sostenuto.tuning.search import Schedule, Segment, table_of
from sostenuto.unet import is_unet

_TOLERANCE = 0.1  # relative error of the network's output that a step of reuse may make
_NOISY = 0.02  # share of the squared error of reuse one step later, about a quarter a quarter of a step later
_WORTH = 1.15  # speed-up by multiply-accumulates
_NOT_WORTH = (
    f"too few steps change the output by less than {_TOLERANCE:.0%} when they are reused: neighbouring steps have little in "
    "common, as those of a few-step distilled model; use fewer steps instead of a cache"
)


@dataclass(frozen=True)
class Advice:
    """What caching can do for a model with its sampler; ``print`` it.

    Attributes:
        worth: whether caching pays.
        method: what to begin with; ``None`` where nothing is worth it.
        forecasts: whether forecasts beat the last value.
        expected_speedup: of that method, by multiply-accumulates that its plan spares.
        cache_bytes: most bytes of features that it keeps, for the rows of the sample.
        num_inference_steps: steps of the sampler.
        reuse_error: error of the network's output when one step reuses all of the one before, relative, median over the steps;
            of a U-Net as :class:`~sostenuto.DeepCache` reuses its deep part.
        forecast_gain: error of a linear forecast over that of the last value; above 1 forecasts hurt. ``None`` for a U-Net, and
            with too few steps to forecast one.
        noise_share: share of the squared error of reuse one step later that is noise of the features, 0 to 1.
        notes: the reasons.
    """

    worth: bool
    method: Method | None
    forecasts: bool
    expected_speedup: float
    cache_bytes: int
    num_inference_steps: int
    reuse_error: float | None
    forecast_gain: float | None
    noise_share: float | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain data, the method by its name and its plan."""
        table = self.method.table if isinstance(self.method, EBCache) else None
        content = dict(vars(self)) | {
            "notes": list(self.notes),
            "method": None if self.method is None else self.method.name,
        }
        return content | {"plan": table.strip() if isinstance(table, CacheTable) else None}

    def __str__(self) -> str:
        if self.method is None or not self.worth:
            first = f"caching is not worth it with {self.num_inference_steps} steps of this sampler"
        else:
            first = (
                f"worth it: {type(self.method).__name__}, about {self.expected_speedup:.2f}× by multiply-accumulates with "
                f"{self.num_inference_steps} steps, {self.cache_bytes / 2**20:.1f} MiB of features for this sample"
            )
        return "\n".join([first, *(f"- {note}" for note in self.notes)])


def advise(
    target: Any,
    sample: Sample | None = None,
    *,
    num_inference_steps: int = 50,
    num_samples: int = 2,
    generator: torch.Generator | None = None,
    scheduler: Any = None,
    show_progress: bool = False,
) -> Advice:
    """Say whether caching pays, from one uncached generation with measurements and one with the method that is advised.

    Args:
        target: the pipeline, or its denoiser (then with ``sample`` and ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``; by default the
            pipeline is called with a class label or a short prompt, as it takes them.
        num_inference_steps: steps of the sampler, 2 or more.
        num_samples: rows of the denoiser's batch to measure on.
        generator: source of the noise.
        scheduler: for a bare denoiser.
        show_progress: show a progress bar.

    Raises:
        InputError: no ``sample`` is given and the pipeline takes neither labels nor a prompt.
        AlreadyEnabledError: a method is enabled on the model.
    """
    sample = sample or default_sample(target)
    settings = Settings(
        target, sample, num_inference_steps, num_samples, generator, scheduler=scheduler, show_progress=show_progress
    )
    denoiser = compat.find_denoiser(target)
    if is_unet(compat.unwrapped(denoiser)):
        return _advise_unet(settings)
    measured, tells_noise = _measure(settings, Kind.STACK if has_stack(denoiser) else Kind.BRANCHES)
    schedule = _tolerable(measured)
    order = max((segment.order for segment in schedule), default=0)
    table = replace(table_of(schedule), **measured.made_for)
    speedup, cache_bytes = _tried(settings, EBCache(table))
    errors = measured.relative(measured.whole, 0, 0, 1)
    worth = speedup >= _WORTH
    notes = [f"reusing the whole step before changes the output by {np.nanmedian(errors):.1%} (median over the steps)"]
    notes += notes_on(measured, tells_noise and tells_clean_samples(scheduler_of(target, scheduler)))
    notes.append("sostenuto.tune finds the best plan for a speed-up; this one takes no search" if worth else _NOT_WORTH)
    return Advice(
        worth=worth,
        method=EBCache(table) if worth else None,
        forecasts=order > 0,
        expected_speedup=speedup if worth else 1.0,
        cache_bytes=cache_bytes if worth else 0,
        num_inference_steps=num_inference_steps,
        reuse_error=float(np.nanmedian(errors)),
        forecast_gain=measured.forecast_gain,
        noise_share=measured.noise_share,
        notes=tuple(notes),
    )


def notes_on(measured: Measurement, clean_samples: bool = False) -> list[str]:
    """What the features say of forecasts.

    Args:
        measured: the instrumented run.
        clean_samples: whether the scheduler tells the clean sample in a prediction.
    """
    gain, noise = measured.forecast_gain, measured.noise_share
    noisy = (
        f"noise floor of the features: {noise:.0%} of the squared error of reuse one step later is noise of the network, which "
        "answers even a small change of its input out of proportion (quantised activations)"
    )
    notes = [noisy] if noise > _NOISY else []
    if gain is None:
        notes.append("a generation of so few steps leaves nothing to forecast from")
    elif gain > 1:
        # Noise counts in a forecast's squared error three times, in the last value's once: is that most of what it is off more?
        of_noise = 2 * noise > (gain**2 - 1) / 2
        why = "features are noisy" if of_noise else "features turn from step to step (few steps, an ancestral sampler)"
        notes.append(
            f"forecasts hurt one step ahead: a linear one is off {gain:.2f} times as far as the last value, because {why}; "
            "reuse, don't forecast"
        )
        if not of_noise and clean_samples and Kind.SAMPLE not in measured.runs:
            notes.append(
                'where the sampler adds noise of its own, forecast the clean sample: ABCache(2, 2, 3, extrapolates="sample")'
            )
    else:
        notes.append(f"forecasts help: a linear one is off {gain:.2f} times as far as the last value")
    return notes


def default_sample(target: Any) -> Sample:
    """A ``sample`` that calls a pipeline with what it takes of a class label and a short prompt.

    Raises:
        InputError: it takes neither, or needs more.
    """
    if isinstance(target, torch.nn.Module):
        raise InputError(
            f"how to generate with a {type(target).__name__} is not known: pass sample(pipe, generator, num_inference_steps=…)"
        )
    return pipeline_sample(target, suited(target, [0, 1]))


def _measure(settings: Settings, kind: Kind) -> tuple[Measurement, bool]:
    """The measurement, and whether the network predicts what its scheduler takes."""
    reach = {kind: Reach(2, ((0,), (1, 2, 3)))}  # two steps of reuse are the most, so a forecast looks back three
    instruments: list[Instrument] = []
    identity: dict[str, Any] = {}
    told: list[bool] = []

    def drive(handle: Handle, tick: Tick, prober: Prober) -> Any:
        told.append(prober.tells_noise)
        if not instruments:
            instruments.append(Instrument(handle, reach, tick.num_steps))
            identity.update(made_for(handle))
        return instruments[0](tick, prober)

    run = _watched(settings, tapped_for((kind,)), drive, "measure")
    return replace(instruments[0].result(run.rows, 0.0), made_for=identity), all(told)


def _tolerable(measured: Measurement) -> Schedule:
    """From the first step on the longest runs, of up to two steps, whose errors are tolerable."""
    kind, steps, gain = measured.whole, measured.num_steps, measured.forecast_gain
    forecasts = gain is not None and gain <= 1
    segments: list[Segment] = []
    step = gap = 0
    while step < steps:
        chosen = Segment(0, kind, 0)
        for length in (2, 1):
            if step + length >= steps - 1 or length > measured.reach[kind].max_run:
                continue
            errors = {
                order: max(measured.relative(kind, order, max(gap, 1), lag)[step + lag] for lag in range(1, length + 1))
                for order in ((0, 1) if gap and forecasts else (0,))
            }
            order = min(errors, key=lambda order: (np.nan_to_num(errors[order], nan=np.inf), order))
            if errors[order] <= _TOLERANCE:
                chosen = Segment(length, kind, order)
                break
        segments.append(chosen)
        gap, step = chosen.length + 1, step + chosen.length + 1
    return tuple(segments)


def _tried(settings: Settings, method: Method) -> tuple[float, int]:
    """Speed-up by multiply-accumulates and bytes of a method, as one generation has them."""
    found: list[tuple[float, int]] = []

    def look(handle: Handle, tick: Tick, prober: Prober) -> Any:
        output = prober.follow()
        if tick.step == tick.num_steps - 1:
            found.append((handle.stats.ideal_speedup, handle.predicted_cache_bytes or 0))
        return output

    _watched(replace(settings, num_samples=1), method, look, "try")
    return found[-1]


def _watched(settings: Settings, method: Method, drive: Drive, desc: str) -> Generated:
    """Generations under a driver, with a bar over their steps."""
    with progress(None, f"advise ({desc})", settings.show_progress) as bar:

        def counted(handle: Handle, tick: Tick, prober: Prober) -> Any:
            output = drive(handle, tick, prober)
            if tick.pass_index == 0:
                if tick.new_generation:
                    bar.total = (bar.total or 0) + tick.num_steps
                bar.update()
            return output

        return generate(settings, 0, method, counted)


def _advise_unet(settings: Settings) -> Advice:
    method = DeepCache()
    speedup, cache_bytes = _tried(settings, method)
    error = _error_of(settings, method)
    worth = speedup >= _WORTH and error <= _TOLERANCE
    notes = [
        f"reusing the deep part changes the output by {error:.1%} (median over the steps that reuse it); its features' noise "
        "floor is not measured on a U-Net",
        "a U-Net: the deep part is kept between steps; sostenuto.tune is for transformers" if worth else _NOT_WORTH,
    ]
    return Advice(
        worth,
        method if worth else None,
        False,
        speedup if worth else 1.0,
        cache_bytes if worth else 0,
        settings.num_inference_steps,
        error,
        None,
        None,
        tuple(notes),
    )


def _error_of(settings: Settings, method: Method) -> float:
    """Relative error of the network's output where a method reuses anything, median over the steps; 0 where it never does."""
    errors: list[float] = []

    def compare(handle: Handle, tick: Tick, prober: Prober) -> Any:
        output = prober.follow()
        if set(handle.last_actions) != {Action.COMPUTE.value}:
            fresh = prober.prediction(prober.run([Op.COMPUTE] * len(handle.sites))).float()
            errors.append(float((prober.prediction(output).float() - fresh).norm() / fresh.norm().clamp_min(1e-30)))
        return output

    _watched(replace(settings, num_samples=1), method, compare, "compare")
    return float(np.median(errors)) if errors else 0.0
