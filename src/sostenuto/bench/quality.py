"""How good the images of a row are, and how near to those of its baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sostenuto.bench.subjects import Subject
from sostenuto.errors import MetricError
from sostenuto.quality.perceptual import Scorer, load_lpips

JUDGED = ("frechet_distance", "inception_score", "class_accuracy", "precision", "recall")
PAIRED = ("psnr", "ssim", "lpips")
GRID_COLUMNS = 10
_AT_ONCE = 16  # images before the network of LPIPS
_FEWEST = 4  # precision and recall look at three neighbours


def judged(subject: Subject, outputs: Sequence[torch.Tensor]) -> tuple[dict[str, float], dict[str, str]]:
    """Quality of a set of images where a judge of the model is at hand; and for what is missing the reason."""
    if subject.labels is None:
        why = "the model is not trained" if not subject.makes_images else "no judge for this model's images is at hand"
        return {}, dict.fromkeys(JUDGED, why)
    images = torch.cat(list(outputs))
    if len(images) < _FEWEST:
        return {}, dict.fromkeys(JUDGED, f"{len(images)} images are too few to judge: {_FEWEST} at least")
    from sostenuto.demo.judge import Judge

    verdict = Judge().judge(images, subject.labels.repeat(len(outputs)))
    return asdict(verdict), {}


def compared(
    subject: Subject, outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], same_noise: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """How near the outputs are to those of the baseline from the same noise; and for what is missing the reason."""
    names = (*PAIRED, "relative_error")
    if not same_noise:
        return {}, dict.fromkeys(names, "the baseline's sampler draws other noise")
    own, other = torch.cat(list(outputs)), torch.cat(list(reference))
    values = {"relative_error": _relative_error(own, other)}
    missing: dict[str, str] = {}
    if not math.isfinite(values["relative_error"]):
        missing["relative_error"] = "the random weights' outputs are not finite"
    if not subject.makes_images:
        return values, missing | dict.fromkeys(PAIRED, "latents of a network without weights, no images")
    from sostenuto.quality.metrics import paired_psnr, paired_ssim

    values |= {"psnr": paired_psnr(own, other), "ssim": paired_ssim(own, other)}
    if math.isinf(values["psnr"]):
        missing["psnr"] = "infinite: the images are identical"
    try:
        values["lpips"] = _lpips(own, other)
    except (MetricError, RuntimeError) as error:  # RuntimeError: images too small for its network
        missing["lpips"] = str(error).partition("\n")[0]
    return values, missing


@cache
def _lpips_network() -> Scorer:
    return load_lpips({}, "cpu")


def _lpips(own: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over images in ``[0, 1]``."""
    score = _lpips_network()
    pairs = zip(*((images.clamp(0, 1) * 255).round().byte().split(_AT_ONCE) for images in (own, other)), strict=True)
    return float(torch.cat([score(*pair) for pair in pairs]).mean())


def _relative_error(own: torch.Tensor, other: torch.Tensor) -> float:
    """‖x − x₀‖ / ‖x₀‖."""
    return float((own - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


def save_samples(path: Path, images: torch.Tensor) -> str | None:
    """Save the first images ``[n, c, h, w]`` in ``[0, 1]`` side by side; returns the reason where that fails."""
    from PIL import Image

    strip: Any = torch.cat(list(images[:GRID_COLUMNS].clamp(0, 1)), dim=2)
    array = (strip * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3]).save(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        return f"not written: {error.strerror or error}"
    return None
