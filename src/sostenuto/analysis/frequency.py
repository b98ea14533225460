"""Which frequencies does reused attention disturb, and which reused MLPs? (FEB-Cache, figure 2)"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch

from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.trajectory import Trajectory
from sostenuto.errors import InputError
from sostenuto.step_state import StepState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUTS = (0.1, 0.25, 0.5)
"""Radii between low and high, as shares of the highest frequency of an axis (Nyquist's); figures show the second."""

_INTERVAL = 3


def low_and_high(images: torch.Tensor, cut: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norms of the low and the high frequencies of images ``[rows, channels, height, width]``, each ``[rows]``.

    Of the orthonormal Fourier transform, so that both squared add up to the image's squared norm.

    Args:
        images: the images.
        cut: the radius up to which a frequency counts as low, as a share of Nyquist's.
    """
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height).abs()[:, None] / 0.5
    across = torch.fft.fftfreq(width).abs()[None, :] / 0.5
    low = (down**2 + across**2).sqrt() <= cut
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().sum(1)  # over channels
    return (power * low).sum((-2, -1)).sqrt(), (power * ~low).sum((-2, -1)).sqrt()


def measure(subject: Subject) -> Data:
    """Norms over the steps, and how far the cached paths are from the uncached one in either band."""
    states = {"attention cached": StepState.REUSE_ATTENTION, "MLP cached": StepState.REUSE_MLP}
    if not all(subject.places[kind] for kind in ("attention", "MLP")):
        raise InputError("the network has no attention and MLP apart, so that they can't be cached apart")
    base, steps = subject.uncached, subject.pictured_steps
    subject.images(base.latents[0][:1])  # refuses latents that are no images before anything is sampled
    paths = {name: subject.path(name, subject.kinds_cached(state, _INTERVAL)) for name, state in states.items()}
    bands: dict[str, dict[str, list[float]]] = {}
    deviations: dict[str, dict[str, list[float]]] = {}

    def pixels(path: Trajectory, step: int) -> torch.Tensor:
        return subject.images(path.latents[step])

    for step in steps:
        reference = pixels(base, step)
        for name, path in {"uncached": base, **paths}.items():
            images = reference if path is base else pixels(path, step)
            for cut in CUTS:
                own, error = low_and_high(images, cut), low_and_high(images - reference, cut)
                whole = low_and_high(reference, cut)
                for band, norm, off, of in zip(("low", "high"), own, error, whole, strict=True):
                    key = f"{band} {cut:g}"
                    bands.setdefault(name, {}).setdefault(key, []).append(norm.mean().item())
                    deviations.setdefault(name, {}).setdefault(key, []).append(
                        (off / of.clamp(min=1e-12)).mean().item()
                    )
    deviations.pop("uncached")
    return {
        "steps": steps,
        "norms": bands,
        "relative_error": deviations,
        "cuts": list(CUTS),
        "cut": CUTS[1],
        "interval": _INTERVAL,
        "space": "the sampler's own space" if subject.decode is None else "decoded images",
    }


def draw(data: Data) -> Figure:
    """Norms above, relative errors below; low frequencies on the left, high ones on the right."""
    from sostenuto.analysis.style import dress, figure, line

    made, axes = figure(2, 2, height=2.4)
    for column, band in enumerate(("low", "high")):
        key = f"{band} {data['cut']:g}"
        for index, (name, norms) in enumerate(data["norms"].items()):
            line(axes[0][column], norms[key], name, index, x=data["steps"])
            if name in data["relative_error"]:
                line(axes[1][column], data["relative_error"][name][key], name, index, x=data["steps"])
        dress(axes[0][column], f"{band} frequencies", "L2 norm", legend=column == 0)
        dress(axes[1][column], f"{band} frequencies, off the uncached path", "relative error", legend=False)
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    half = len(data["steps"]) // 2
    attention, mlp = data["relative_error"]["attention cached"], data["relative_error"]["MLP cached"]
    words = []
    for band, part, which in (("low", slice(1, half), "noisy"), ("high", slice(half, None), "clean")):
        key = f"{band} {data['cut']:g}"
        a, m = fmean(attention[key][part] or [0.0]), fmean(mlp[key][part] or [0.0])
        worse = "attention" if a > m else "the MLP"
        agrees = (a > m) == (band == "low")
        words.append(
            f"in the {which} half {worse} disturbs {band} frequencies more ({a:.4f} for attention, {m:.4f} for the MLP, "
            f"{'as' if agrees else 'not as'} the paper says)"
        )
    return (
        f"Reusing one kind in 2 of {data['interval']} steps, by errors relative to the uncached path in {data['space']}: "
        + "; ".join(words)
        + "."
    )


FREQUENCY = Instrument(
    name="frequency",
    work=2,
    title="Low and high frequencies with attention or MLP cached",
    source="FEB-Cache (arXiv 2503.07120v3), figure 2",
    claim=(
        "Attention makes the low frequencies and the MLP the high ones: caching attention disturbs low frequencies while there "
        "is much noise, caching the MLP high ones at the end."
    ),
    method=(
        "Orthonormal Fourier transform of what the network is given at each step, split at a quarter of Nyquist's radius (the "
        "paper gives none; 0.1 and 0.5 are in the data). The error is that of the band's content, on the same noise."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
