"""Does caching raise the ratio of signal to noise along the path, and does scaling bring it back? (EB-Cache, figure 2)"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.trajectory import Trajectory
from sostenuto.errors import SostenutoError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SLIGHT = 0.02  # dB, below which a difference is not worth a word
_ESTIMATOR = "α²·mean(x₀²) / mean((x − αx₀)²)"
_DECODED_ESTIMATOR = "mean(D(αx₀)²) / mean((D(x) − D(αx₀))²)"


def signal_to_noise(path: Trajectory) -> tuple[list[float | None], list[float | None]]:
    """The ratio in dB and the noise's size over σ, one value per step: its root mean square, to which a shift of all counts.

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


def decoded_signal_to_noise(
    path: Trajectory, images: Callable[[torch.Tensor], torch.Tensor], steps: Sequence[int]
) -> list[float | None]:
    """The ratio among decoded images in dB at some steps, ``mean(D(α·x₀)²) / mean((D(x_t) − D(α·x₀))²)``.

    Where the decoder only scales, it is that of the latents.
    """
    ratios: list[float | None] = []
    for step in steps:
        clean = images(path.levels[step][0] * path.clean).double()
        signal = clean.square().mean().item()
        noise = (images(path.latents[step]).double() - clean).square().mean().item()
        ratios.append(10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None)
    return ratios


def measure(subject: Subject) -> Data:
    """Curves of the uncached path, of uniform caching at several intervals, scaled, and of EB-Cache."""
    curves: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    uncached = subject.uncached
    steps = subject.pictured_steps if subject.decode is not None else []

    def add(name: str, path: Trajectory) -> None:
        ratios, intensities = signal_to_noise(path)
        curves[name] = {"snr_db": ratios, "noise_over_sigma": intensities}
        if steps and "decoded" not in left_out:
            try:
                curves[name]["decoded_snr_db"] = decoded_signal_to_noise(path, subject.images, steps)
            except Exception as error:  # of a pipeline or its VAE: the curves of the latents aren't lost with it
                left_out["decoded"] = f"{type(error).__name__}: {error}"

    add("uncached", uncached)
    for interval in subject.intervals:
        add(f"every {interval}", subject.path(f"every {interval}", subject.uniform(interval)))
    first = subject.intervals[0]
    add(f"every {first}, b", subject.path(f"every {first}, b", subject.scaled(subject.uniform(first))))
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
        "decoded_steps": [] if "decoded" in left_out else steps,
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
    """The ratio, its difference from the uncached path, and the intensity of the noise; below, two of decoded images."""
    from sostenuto.analysis.style import dress, figure, line

    curves = data["curves"]
    rows = [("snr_db", None, "signal to noise", _ESTIMATOR)]
    if data["decoded_steps"]:
        rows.append(("decoded_snr_db", data["decoded_steps"], "signal to noise, decoded by D", _DECODED_ESTIMATOR))
    made, axes = figure(len(rows), 3, width=9.5, height=2.8)
    for (left, middle, right), (key, steps, title, estimator) in zip(axes, rows, strict=True):
        if steps is None:
            line(left, data["forward_process_db"], "forward process", 6)
        for index, (name, curve) in enumerate(curves.items()):
            line(left, curve[key], name, index, x=steps)
            if name != "uncached":
                pairs = zip(curve[key], curves["uncached"][key], strict=True)
                line(middle, [None if a is None or b is None else a - b for a, b in pairs], name, index, x=steps)
        middle.axhline(0, color="black", linewidth=0.8)
        dress(left, title, f"SNR (dB), {estimator}")
        left.yaxis.label.set_fontsize(6.5)
        dress(middle, "against uncached", "difference (dB)")
        right.set_axis_off()
    right = axes[0][2]
    right.set_axis_on()
    for index, (name, curve) in enumerate(curves.items()):
        line(right, curve["noise_over_sigma"], name, index)
    dress(right, "intensity of the noise", "std(x − αx₀) / σ", legend=False)
    return made


def _gaps(curves: dict[str, Any], key: str) -> dict[str, float]:
    """Mean difference of each curve from the uncached one."""
    base = curves["uncached"][key]
    return {name: mean_difference(curve[key], base) for name, curve in curves.items() if name != "uncached"}


def _listed(gaps: dict[str, float]) -> str:
    return ", ".join(f"{name} {gap:+.2f} dB" for name, gap in gaps.items())


def finding(data: Data) -> str:
    """What the numbers say."""
    gaps = _gaps(data["curves"], "snr_db")
    uniform = [gaps[f"every {interval}"] for interval in data["intervals"]]
    verdict = "raises it at some intervals and lowers it at others"
    if all(gap > _SLIGHT for gap in uniform):
        verdict = "raises it, as the papers say"
    elif all(gap < -_SLIGHT for gap in uniform):
        verdict = "lowers it, contrary to the papers"
    elif all(abs(gap) <= _SLIGHT for gap in uniform):
        verdict = "hardly changes it"
    first = data["intervals"][0]
    theory = data["forward_process_db"]
    before, after = (
        mean_difference(data["curves"][name]["snr_db"], theory) for name in (f"every {first}", f"every {first}, b")
    )
    repaired = "nearer to" if abs(after) < abs(before) else "farther from"
    decoded = (
        f" Of decoded images: {_listed(_gaps(data['curves'], 'decoded_snr_db'))}." if data["decoded_steps"] else ""
    )
    return (
        f"Averaged over the steps, against the uncached path: {_listed(gaps)}. So uniform caching {verdict}; a constant "
        f"b = {data['b']:.3f} brings the path at interval {first} {repaired} the forward process of training "
        f"({before:+.2f} to {after:+.2f} dB from it)."
        f"{decoded}"
    )


SNR = Instrument(
    name="snr",
    work=3.5,
    title="Signal to noise over the steps",
    source="EB-Cache (arXiv 2503.07120v1), figures 2, 3 and 9; FEB-Cache (v3), figures 1 and 5",
    claim=(
        "Feature caching raises the signal-to-noise ratio of the intermediate images and lowers their noise, the more the "
        "longer the interval, as exposure bias does; scaling the noise brings the path back towards that of training, without "
        "exposure bias."
    ),
    method=(
        f"{_ESTIMATOR} of what the network is given, with x₀ the sample that the path itself ends at, since the papers don't "
        f"give their estimator; in the sampler's own space. With a decoder D also {_DECODED_ESTIMATOR}."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
