"""FEB-Cache's calibration: EB-Cache's with candidates that depend on the stage and a noise scale on the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sostenuto.calibrations.eb import EBCalibration
from sostenuto.errors import MethodError
from sostenuto.methods.feb import Denominator, noise_scale_curve
from sostenuto.step_state import StepState


@dataclass(frozen=True)
class FEBCalibration(EBCalibration):
    """FEB-Cache's calibration (arXiv 2503.07120v3, Algorithm 1); the other options are those of EB-Cache's.

    At τ > τ_threshold the candidates are reuse of both and of the MLP alone, later of both and of attention alone; the
    candidate is scaled by b(τ), the uncached prediction it is compared with is not (where the criterion compares norms), and
    the trajectory advances with b(τ). The paper finds 8 samples enough.

    Attributes:
        candidates: the states that are tried at all, deepest reuse first; each stage leaves out the other stage's.
        b_high: as in :class:`~sostenuto.methods.feb.FEBCache`, also the next three.
        b_low: see there.
        tau_threshold: see there; also where the candidates change.
        denominator: see there.
        eps_scale: what b(τ) is multiplied by while calibrating, 1 in the paper.
        eps_scale_rule: as for EB-Cache, without ``"match_norm"``, whose factors are no multiple of b(τ).
        eps_scale_grid: multipliers of b(τ) that are tried when a ``score`` is given; the table keeps the best, and
            :class:`~sostenuto.methods.feb.FEBCache` takes it from there.
    """

    candidates: tuple[StepState, ...] = (StepState.REUSE_BOTH, StepState.REUSE_MLP, StepState.REUSE_ATTENTION)
    b_high: float = 0.98
    b_low: float = 0.96
    tau_threshold: float = 0.4
    denominator: Denominator = "as_reported"

    method: ClassVar[str] = "feb"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curve_at(1.0)  # refuses parameters out of range
        if self.eps_scale_rule == "match_norm":
            raise MethodError(
                "FEB-Cache's noise scale is a multiple of b(τ): eps_scale_rule 'match_norm' is EB-Cache's"
            )

    def candidates_at(self, tau: float) -> tuple[StepState, ...]:
        """The states that are tried at normalised time τ: MLP-only early, attention-only late."""
        other = StepState.REUSE_ATTENTION if tau > self.tau_threshold else StepState.REUSE_MLP
        return tuple(state for state in self.candidates if state is not other)

    def curve_at(self, tau: float) -> float:
        """b(τ)."""
        return noise_scale_curve([tau], self.b_high, self.b_low, self.tau_threshold, self.denominator)[0]
