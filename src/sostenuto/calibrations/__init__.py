"""What the calibrated methods need measured on a model and sampler, one file per method. :func:`calibrate` runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sostenuto.calibrations.base import Calibration, Sample, Score, Settings
from sostenuto.calibrations.claims import SEARCHED, claim, measured_with
from sostenuto.calibrations.ditfastattn import DiTFastAttnCalibration
from sostenuto.calibrations.eb import EBCalibration
from sostenuto.calibrations.epsilon_scaling import EpsilonScalingCalibration
from sostenuto.calibrations.feb import FEBCalibration
from sostenuto.calibrations.l2c import L2CCalibration
from sostenuto.calibrations.magcache import MagCacheCalibration
from sostenuto.calibrations.smoothcache import SmoothCacheCalibration
from sostenuto.calibrations.teacache import TeaCacheCalibration
from sostenuto.errors import MethodError
from sostenuto.methods.base import Method

_CALIBRATIONS: tuple[type[Calibration], ...] = (
    EBCalibration,
    FEBCalibration,
    SmoothCacheCalibration,
    L2CCalibration,
    DiTFastAttnCalibration,
    TeaCacheCalibration,
    MagCacheCalibration,
    EpsilonScalingCalibration,
)

__all__ = [
    "Calibration",
    "DiTFastAttnCalibration",
    "EBCalibration",
    "EpsilonScalingCalibration",
    "FEBCalibration",
    "L2CCalibration",
    "MagCacheCalibration",
    "Settings",
    "SmoothCacheCalibration",
    "TeaCacheCalibration",
    "available_calibrations",
    "calibrate",
]


def available_calibrations() -> dict[str, type[Calibration]]:
    """The calibrations by the name of their method."""
    return {calibration.method: calibration for calibration in _CALIBRATIONS}


def calibrate(
    target: Any,
    method: str | type[Method] | Calibration,
    sample: Sample | None = None,
    *,
    num_inference_steps: int = 50,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
    score: Score | None = None,
    score_sample: Sample | None = None,
    scheduler: Any = None,
    show_progress: bool = False,
    folder: str | Path | None = None,
) -> Any:
    """Measure on a model and sampler what a method needs: a cache table, or what else the method's calibration returns.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        method: a name such as ``"eb"``, a method class, or a calibration object such as :class:`EBCalibration` with options
            of one's own.
        sample: runs one generation of the user's own kind, of any batch size: ``sample(pipe, generator,
            num_inference_steps=…)``. Calibrations that learn from data of their own (l2c) do without.
        num_inference_steps: steps of the sampler that the table is for.
        num_samples: rows of the denoiser's batch to calibrate on, 8 suffice (FEB-Cache, arXiv 2503.07120v3). ``sample`` is
            called until there are so many.
        generator: source of the noise; every run starts from its seed.
        score: judges what ``score_sample`` returned, lower is better (such as a Fréchet distance). If given, b is chosen
            from the grid by it, on both sides of 1. Norms can't choose it: reuse lowers the norm of the prediction, and
            yet images may be best with b below 1.
        score_sample: as ``sample``, for scoring; by default ``sample``.
        scheduler: for a bare denoiser.
        show_progress: show a progress bar.
        folder: where the search of EB-Cache and FEB-Cache keeps what each of its runs found: the same call goes on where an
            interrupted one stopped. Another model, sampler, seed or calibration is refused; ``sample`` and ``score`` must be
            the same. The other calibrations are one run each, L2C's training has a ``checkpoint``.

    Returns:
        What the method takes as its table, with the model, scheduler and measurements in it.

    Raises:
        MethodError: the method has no calibration, or an option makes no sense.
        InputError: the folder holds another calibration.
        AlreadyEnabledError: a method is enabled on the model.
    """
    settings = Settings(
        target,
        sample or _no_sample,
        num_inference_steps,
        num_samples,
        generator,
        score,
        score_sample,
        scheduler,
        show_progress,
    )
    calibration = method if isinstance(method, Calibration) else _named(method).default_for(settings)
    if folder is not None:
        made_with = {**measured_with(settings), "calibration": repr(calibration)}
        claim(Path(folder), "calibration", made_with, SEARCHED, timed=False, record="calibration.json")
        settings = replace(settings, kept=Path(folder))
    return calibration.run(settings)


def _named(method: str | type[Method]) -> type[Calibration]:
    known = available_calibrations()
    name = method if isinstance(method, str) else str(getattr(method, "name", method))
    if name not in known:
        raise MethodError(f"{method!r} has no calibration; {', '.join(sorted(known))} have")
    return known[name]


def _no_sample(*_: Any, **__: Any) -> Any:
    raise MethodError(
        "this calibration needs sample(pipe, generator, num_inference_steps=…): one generation of your kind"
    )
