"""How much an error at each step counts in the end: measured at a few steps, with all that the network makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sostenuto.tuning.lab import Lab
from sostenuto.tuning.measurement import WHOLES, Kind, Measurement

_NUM_STEPS = 7  # steps that are probed, evenly spread


@dataclass(frozen=True)
class Weights:
    """The weight of a squared error by kind of reuse, degree of forecast and step.

    The network doesn't answer an error in the direction in which features drift as it does noise, so that the weight depends
    on what made the error.

    Attributes:
        probed: ``{(kind, order): {step: weight}}``.
        num_steps: steps of a generation.
        tilt: logarithm of what late errors count more than early ones, over the whole trajectory.
    """

    probed: Mapping[tuple[Kind, int], Mapping[int, float]]
    num_steps: int
    tilt: float = 0.0

    def __call__(self, kind: Kind, order: int, step: int) -> float:
        """The weight, by the logarithms of those at the nearest steps."""
        known = self.probed[self._nearest(kind, order)]
        steps = sorted(known)
        weight = np.interp(step, steps, [math.log(max(known[s], 1e-12)) for s in steps])
        return math.exp(float(weight) + self.tilt * step / max(1, self.num_steps - 1))

    def _nearest(self, kind: Kind, order: int) -> tuple[Kind, int]:
        """What was probed that is most like this: the kind counts more than the order."""
        alike = [known for known in self.probed if (known[0] in WHOLES) == (kind in WHOLES)] or list(self.probed)
        return min(alike, key=lambda known: (known[0] is not kind, abs(known[1] - order), known[1]))


def probed_steps(num_steps: int) -> list[int]:
    """The steps that are probed: from the first that can be forecast to the last but one."""
    first, last = min(3, num_steps - 2), num_steps - 2
    return sorted({round(step) for step in np.linspace(first, last, _NUM_STEPS)})


def probed_reuses(kinds: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
    """The kinds and orders that are probed: of those that reuse all features of a step, which make like errors, the first."""
    whole = [kind for kind in kinds if kind in (Kind.STACK, Kind.BRANCHES)][:1] + [Kind.SAMPLE] * (Kind.SAMPLE in kinds)
    partial = [kind for kind in kinds if kind not in WHOLES]
    return [(kind, order) for kind in whole for order in (0, 1)] + [(kind, 1) for kind in partial]


def probed(kinds: tuple[Kind, ...], num_steps: int) -> list[tuple[Kind, int, int]]:
    """What is probed: kind, order and step, where there is enough to forecast from."""
    reuses, steps = probed_reuses(kinds), probed_steps(num_steps)
    return [(kind, order, step) for kind, order in reuses for step in steps if step > order]


def probe(lab: Lab, measured: Measurement) -> Weights:
    """Measure the weights, a short run of generations for each."""
    wanted = probed(tuple(measured.runs), measured.num_steps)
    lab.respond(wanted)
    found: dict[tuple[Kind, int], dict[int, float]] = {}
    for kind, order, step in wanted:
        found.setdefault((kind, order), {})[step] = lab.response(kind, order, step)
    return Weights(found, measured.num_steps)
