"""What can be chosen about a tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sostenuto.correct import check_noise_scale
from sostenuto.errors import InputError
from sostenuto.methods.checks import check_choice, check_number, check_whole, is_number
from sostenuto.tuning.measurement import WHOLES, Kind
from sostenuto.tuning.published import PUBLISHED

MAX_WORK = 50_000 / 30
"""What tuning may cost, in uncached generations of one row: a thirtieth of sampling 50 000 images, as EB-Cache's own table."""


@dataclass(frozen=True)
class TuneOptions:
    """How a plan is tuned.

    Attributes:
        speedups: the targets of the frontier, each above 1.
        budget: what speed is counted in: ``"macs"``, multiply-accumulates, or ``"time"``, what each kind of step took in the
            instrumented run, with what the sampler does between the denoiser's calls.
        prefer: what decides where quality has two sides: the ``"score"``, where one is given (ten times the error must buy a
            score better by a tenth), or ``"nearness"`` to the uncached images alone.
        trial_samples: rows of every real generation that plans are compared by.
        refinements: local changes that are tried at every point of the frontier.
        tilts: how much more an error may count at the end than at the beginning, as the logarithm of their ratio and
            beyond what was measured, since errors add up in more ways than the model knows, and images show the late ones
            most. Each is tried, the first two also with linear forecasts alone where a score decides; those that the work
            doesn't suffice for are left out from the end.
        eps_scale_grid: the values of b that are tried where a score decides, also apart for computed and reused steps, beside
            FEB-Cache's b(τ), a b for the noisy half of the time alone, and the factors that restore the norm of the uncached
            noise.
        published: the calibrations whose plans compete at the speed-up that is asked for: ``"eb"``, ``"feb"``,
            ``"smoothcache"``, and ``"smoothcache-site"``, which plans every branch of every block by itself; those that
            ``kinds`` leave out don't.
        kinds: what may be reused: ``"stack"``, ``"branches"``, ``"attention"``, ``"mlp"``, and the clean ``"sample"`` that
            follows from the network's output; by default all that network and scheduler can. Beside ``"stack"``
            ``"branches"`` are measured for what they tell of noise, and no plan is made of them: they are off as far and cost
            more. With ``"stack"`` and ``"sample"`` alone the instrumented run keeps a tensor each a step, else every branch.
        max_work: the most that tuning may cost, in uncached generations of one row.
    """

    speedups: tuple[float, ...] = (1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
    budget: Literal["macs", "time"] = "macs"
    prefer: Literal["score", "nearness"] = "score"
    trial_samples: int = 16
    refinements: int = 4
    tilts: tuple[float, ...] = (3.0, 6.0, 0.0, 9.0)
    eps_scale_grid: tuple[float, ...] = (0.95, 0.96, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02)
    published: tuple[str, ...] = PUBLISHED
    kinds: tuple[str, ...] | None = None
    max_work: float = MAX_WORK

    def __post_init__(self) -> None:
        for speedup in self.speedups:
            check_speedup(speedup)
        check_choice("budget", self.budget, ("macs", "time"))
        check_choice("prefer", self.prefer, ("score", "nearness"))
        check_whole("trial_samples", self.trial_samples, least=1)
        check_whole("refinements", self.refinements, least=0)
        check_number("max_work", self.max_work, above=0)
        if not self.tilts or not all(map(is_number, self.tilts)):
            raise InputError(f"tilts must be one finite number at least, not {self.tilts!r}")
        for kind in self.kinds or ():
            check_choice("kinds", kind, tuple(known.value for known in Kind))
        if self.kinds is not None and not {kind.value for kind in WHOLES} & set(self.kinds):
            raise InputError(
                "kinds must hold 'stack', 'branches' or 'sample': without a step that reuses everything little is gained"
            )
        for name in self.published:
            check_choice("published", name, PUBLISHED)
        check_noise_scale(self.eps_scale_grid)

    def as_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)


def check_speedup(speedup: object) -> None:
    """Refuse a speed-up that needs no tuning.

    Raises:
        InputError: it is not a number above 1.
    """
    if not is_number(speedup) or not speedup > 1:  # type: ignore[operator]
        raise InputError(f"a speed-up to tune for must be a number above 1, not {speedup!r}")
