"""TeaCache's calibration: the polynomial from the change of the modulated input to the change of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch

from sostenuto.calibrations.base import Calibration, Settings, measure_uncached
from sostenuto.clock import Tick
from sostenuto.engine import Prober
from sostenuto.errors import MethodError
from sostenuto.methods.checks import check_finite, check_whole
from sostenuto.methods.teacache import MODULATED_INPUT, TeaCache, TeaCacheFit
from sostenuto.plan import Op
from sostenuto.signals import relative_l1

_Pair = tuple[float, float]


@dataclass(frozen=True)
class TeaCacheCalibration(Calibration):
    """TeaCache's calibration (arXiv 2411.19108): least squares between two series of uncached generations.

    At every step but the first it notes the relative L1 change of the first attention's input and that of the predicted noise
    (without a learned variance). All samples and passes are fitted together; the paper took about 70 prompts.

    Attributes:
        degree: of the polynomial, 0 or more; the paper's 4; in its ablation 1 is almost as good.
        target_skipped: share of the steps to be skipped, 0 to 1, for which a threshold is chosen by replaying the policy on the
            series; the uncached series, so that a cached generation may skip a few more or fewer. ``None``: no threshold.
        policy: the policy to replay, whose coefficients and threshold are replaced; its signal is what is measured.
    """

    degree: int = 4
    target_skipped: float | None = 0.5
    policy: TeaCache = field(default_factory=TeaCache)

    method: ClassVar[str] = TeaCache.name

    def __post_init__(self) -> None:
        check_whole("TeaCacheCalibration's degree", self.degree, least=0)
        if self.target_skipped is not None:
            check_finite("TeaCacheCalibration's target_skipped", self.target_skipped, 0, 1)
        if not isinstance(self.policy, TeaCache):
            raise MethodError(f"TeaCacheCalibration's policy is a TeaCache, not {self.policy!r}")

    @classmethod
    def at_cost(cls, fraction: float) -> TeaCacheCalibration:
        """Skip as many steps as the cost leaves over; a skipped step costs next to nothing."""
        return cls(target_skipped=1 - fraction)

    def run(self, settings: Settings) -> TeaCacheFit:
        """Measure, fit, choose the threshold."""
        signal = self.policy.signal or MODULATED_INPUT
        series, identity = measure_uncached(settings, TeaCache(signal=signal), _changes)
        known = [[pair for pair in pairs.values() if pair is not None] for pairs in series]
        inputs = [[change for change, _ in pairs] for pairs in known]
        outputs = [[change for _, change in pairs] for pairs in known]
        coefficients = _fitted([*chain(*inputs)], [*chain(*outputs)], self.degree)
        threshold = skipped = None
        if self.target_skipped is not None:
            threshold, skipped = self._choose(coefficients, inputs, self.target_skipped)
        calibration = {
            **identity["calibration"],
            "degree": self.degree,
            "signal": signal,
            "target_skipped": self.target_skipped,
            "skipped": skipped,
            "modulated_input": inputs,
            "output": outputs,
        }
        return TeaCacheFit(coefficients, threshold, **{**identity, "calibration": calibration})

    def _choose(
        self, coefficients: tuple[float, ...], inputs: Sequence[Sequence[float]], target: float
    ) -> tuple[float, float]:
        """By bisection the threshold that comes closest, and what is skipped with it; more is skipped as it grows."""

        def skipped(threshold: float) -> float:
            method = replace(self.policy, coefficients=coefficients, threshold=threshold)
            return fmean(fmean(method.replay(distances)) for distances in inputs)

        computed = self.policy.first_steps + self.policy.last_steps
        most = fmean(max(0, len(series) + 1 - computed) / (len(series) + 1) for series in inputs)
        if target > most + 1e-9:  # 1 − fraction is rounded
            raise MethodError(
                f"target_skipped is {target:g}, but of {len(inputs[0]) + 1} steps {most:.3g} can be skipped at most: ask for "
                "less"
            )
        low, high = 0.0, 1.0
        while skipped(high) < target - 1e-9:
            high *= 2
        tried = {bound: skipped(bound) for bound in (low, high)}
        for _ in range(40):
            middle = (low + high) / 2
            tried[middle] = skipped(middle)
            low, high = (middle, high) if tried[middle] < target else (low, middle)
        return min(tried.items(), key=lambda item: abs(item[1] - target))


def _fitted(inputs: Sequence[float], outputs: Sequence[float], degree: int) -> tuple[float, ...]:
    if not all(map(math.isfinite, (*inputs, *outputs))):
        raise MethodError("a calibration run made numbers that are not finite: is the model in a dtype that overflows?")
    if len(set(inputs)) <= degree:
        raise MethodError(
            f"a polynomial of degree {degree} needs {degree + 1} changes of the input at least, but there are "
            f"{len(set(inputs))}: take more steps or samples, or a lower degree"
        )
    return tuple(float(c) for c in np.polyfit(np.array(inputs), np.array(outputs), degree))


class _Listener:
    """Stands in the place of the policy: never skips, and notes how much input and output changed."""

    forecast_order = num_bytes = 0

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []  # the last two, newest first
        self.outputs: list[torch.Tensor] = []

    def skips(self, step: int, num_steps: int, signal: torch.Tensor, computed: Sequence[int]) -> bool:
        self.inputs = [signal.detach(), *self.inputs[:1]]
        return False

    def changes(self, prediction: torch.Tensor) -> _Pair | None:
        self.outputs = [prediction, *self.outputs[:1]]
        if len(self.outputs) == 1:
            return None
        return relative_l1(*self.inputs), relative_l1(*self.outputs)


def _changes(tick: Tick, prober: Prober) -> tuple[Any, _Pair | None]:
    if not isinstance(prober.state.policy, _Listener):  # in the place of the method's own
        prober.state.policy = _Listener()
    listener = prober.state.policy
    output = prober.run([Op.DECIDE])
    return output, listener.changes(
        prober.prediction(output).detach().clone()
    )  # a clone: the sampler may write in place
