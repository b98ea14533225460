"""How: weights that fill the gap of a skipped branch from its last computed outputs."""

from __future__ import annotations

from collections.abc import Sequence

from sostenuto.errors import MethodError

MAX_ORDER = 4


def check_forecast_order(order: object) -> None:
    """Refuse what is no degree of extrapolation.

    Raises:
        MethodError: it is not a whole number from 0 (last value) to 4.
    """
    if not isinstance(order, int) or isinstance(order, bool) or not 0 <= order <= MAX_ORDER:
        raise MethodError(f"forecast_order must be a whole number from 0 to {MAX_ORDER}, not {order!r}")


def lagrange_weights(abscissae: Sequence[float], target: float) -> list[float]:
    """Weights ``w`` with ``f(target) ≈ Σ w_j f(abscissae_j)``, exact for polynomials of degree below ``len(abscissae)``.

    One abscissa gives plain reuse (weight 1), two give linear extrapolation. On a uniform grid one step past the newest
    these are the backward-difference weights of AB-Cache (arXiv 2504.10540): 1; 2, −1; 3, −3, 1; …

    Raises:
        ValueError: two abscissae are equal.
    """
    if len(set(abscissae)) != len(abscissae):
        raise ValueError(f"abscissae must differ: {list(abscissae)}")
    weights = []
    for j, x_j in enumerate(abscissae):
        weight = 1.0
        for m, x_m in enumerate(abscissae):
            if m != j:
                weight *= (target - x_m) / (x_j - x_m)
        weights.append(weight)
    return weights
