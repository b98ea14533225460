"""Does caching raise the ratio of signal to noise along the path, and does scaling bring it back? (EB-Cache, figure 2)"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.trajectory import Trajectory
from sostenuto.errors import SostenutoError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SLIGHT = 0.02  # dB, below which a difference is not worth a word


def signal_to_noise(path: Trajectory) -> tuple[list[float | None], list[float | None]]:
    """The ratio in dB and the noise's standard deviation over σ, one value per step.

    ``SNR_t = α²·mean(x₀²) / mean((x_t − α·x₀)²)`` with x₀ the clean sample that the path itself ends at.
    """
    ratios: list[float | None] = []
    intensities: list[float | None] = []
    power = path.clean.double().square().mean().item()
    for (alpha, sigma), latents in zip(path.levels, path.latents, strict=True):
        noise = (latents.double() - alpha * path.clean.double()).square().mean().item()
        signal = alpha**2 * power
        ratios.append(10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None)
        intensities.append(math.sqrt(noise) / sigma if sigma > 0 else None)
    return ratios, intensities


def measure(subject: Subject) -> Data:
    """Curves of the uncached path, of uniform caching at several intervals, scaled, and of EB-Cache."""
    curves: dict[str, Any] = {}

    def add(name: str, path: Trajectory) -> None:
        ratios, intensities = signal_to_noise(path)
        curves[name] = {"snr_db": ratios, "noise_over_sigma": intensities}

    uncached = subject.uncached
    add("uncached", uncached)
    for interval in subject.intervals:
        add(f"every {interval}", subject.path(f"every {interval}", subject.uniform(interval)))
    first = subject.intervals[0]
    add(f"every {first}, b", subject.path(f"every {first}, b", subject.scaled(subject.uniform(first))))
    left_out = {}
    try:
        add("EB-Cache", subject.path("EB-Cache", subject.eb()))
    except SostenutoError as error:
        left_out["EB-Cache"] = str(error)
    power = uncached.clean.double().square().mean().item()
    theory = [
        10 * math.log10(alpha**2 * power / sigma**2) if alpha > 0 and sigma > 0 else None
        for alpha, sigma in uncached.levels
    ]
    return {
        "curves": curves,
        "forward_process_db": theory,
        "b": subject.noise_scale,
        "intervals": list(subject.intervals),
        "left_out": left_out,
    }


def mean_difference(curve: list[float | None], base: list[float | None]) -> float:
    """Mean over the steps at which both have a value."""
    pairs = [(a, b) for a, b in zip(curve, base, strict=True) if a is not None and b is not None]
    return fmean(a - b for a, b in pairs) if pairs else 0.0


def draw(data: Data) -> Figure:
    """The ratio, its difference from the uncached path, and the intensity of the noise."""
    from sostenuto.analysis.style import dress, figure, line

    made, axes = figure(1, 3, width=9.5, height=2.8)
    left, middle, right = axes[0]
    base = data["curves"]["uncached"]["snr_db"]
    line(left, data["forward_process_db"], "forward process", 5)
    for index, (name, curve) in enumerate(data["curves"].items()):
        line(left, curve["snr_db"], name, index)
        if name != "uncached":
            gap = [None if a is None or b is None else a - b for a, b in zip(curve["snr_db"], base, strict=True)]
            line(middle, gap, name, index)
        line(right, curve["noise_over_sigma"], name, index)
    middle.axhline(0, color="black", linewidth=0.8)
    dress(left, "signal to noise", "SNR (dB)")
    dress(middle, "against uncached", "difference (dB)")
    dress(right, "intensity of the noise", "std(x − αx₀) / σ", legend=False)
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    curves = data["curves"]
    base = curves["uncached"]["snr_db"]
    gaps = {name: mean_difference(curve["snr_db"], base) for name, curve in curves.items() if name != "uncached"}
    uniform = [gaps[f"every {interval}"] for interval in data["intervals"]]
    verdict = "raises it at some intervals and lowers it at others"
    if all(gap > _SLIGHT for gap in uniform):
        verdict = "raises it, as the papers say"
    elif all(gap < -_SLIGHT for gap in uniform):
        verdict = "lowers it, contrary to the papers"
    elif all(abs(gap) <= _SLIGHT for gap in uniform):
        verdict = "hardly changes it"
    first = data["intervals"][0]
    before, after = gaps[f"every {first}"], gaps[f"every {first}, b"]
    repaired = "nearer to" if abs(after) < abs(before) else "farther from"
    listed = ", ".join(f"{name} {gap:+.2f} dB" for name, gap in gaps.items())
    return (
        f"Averaged over the steps, against the uncached path: {listed}. So uniform caching {verdict}; a constant "
        f"b = {data['b']:.3f} brings the path at interval {first} {repaired} uncached ({before:+.2f} to {after:+.2f} dB)."
    )


SNR = Instrument(
    name="snr",
    work=3.5,
    title="Signal to noise over the steps",
    source="EB-Cache (arXiv 2503.07120v1), figures 2, 3 and 9; FEB-Cache (v3), figures 1 and 5",
    claim=(
        "Feature caching raises the signal-to-noise ratio of the intermediate images and lowers their noise, the more the "
        "longer the interval, as exposure bias does; scaling the noise brings the path back towards the uncached one."
    ),
    method=(
        "α²·mean(x₀²) / mean((x − αx₀)²) of what the network is given, with x₀ the sample that the path itself ends at, since "
        "the papers don't give their estimator; in the sampler's own space, not decoded."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
