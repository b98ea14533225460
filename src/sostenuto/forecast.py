"""How: weights that fill the gap of a skipped branch from its last computed outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sostenuto.errors import MethodError

MAX_ORDER = 4


def check_forecast_order(order: object, name: str = "forecast_order") -> None:
    """Refuse what is no degree of extrapolation.

    Raises:
        MethodError: it is not a whole number from 0 (last value) to 4.
    """
    if not isinstance(order, int) or isinstance(order, bool) or not 0 <= order <= MAX_ORDER:
        raise MethodError(f"{name} must be a whole number from 0 to {MAX_ORDER}, not {order!r}")


def lagrange_weights(abscissae: Sequence[float], target: float) -> list[float]:
    """Weights ``w`` with ``f(target) ≈ Σ w_j f(abscissae_j)``, exact for polynomials of degree below ``len(abscissae)``.

    One abscissa gives plain reuse (weight 1), two give linear extrapolation. It is the polynomial that Newton's divided
    differences give; on a uniform grid one step past the newest the weights are :func:`binomial_weights`.

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


def binomial_weights(count: int) -> list[float]:
    """AB-Cache's weights (arXiv 2504.10540) ``(−1)^{j−1} C(k, j)`` of the last ``k`` outputs, newest first.

    Adams-Bashforth updates of orders k and k + 1 differ by the k-th backward difference, ``∇^k f_n = O(h^k)``. Setting it to
    zero gives ``f_n ≈ Σ_j (−1)^{j−1} C(k, j) f_{n−j}``: 1; 2, −1; 3, −3, 1; 4, −6, 4, −1; 5, −10, 10, −5, 1. Exact for
    polynomials of degree below k, one step past the newest of equally spaced outputs; noise in them grows up to
    ``2^k − 1`` times.
    """
    return [(-1.0) ** (j - 1) * math.comb(count, j) for j in range(1, count + 1)]


def taylor_weights(steps: Sequence[float], target: float) -> list[float]:
    """TaylorSeer's weights (arXiv 2503.06923) of the outputs computed at ``steps``, newest first.

    The forecast is ``Σ_i F_i x^i / i!`` with ``x = target − q`` and q the newest step. A newly computed output f replaces the
    factors by ``F'_0 = f`` and ``F'_{i+1} = (F'_i − F_i) / (newest gap)``, as long as F_i exists. All factors are linear in
    the outputs, so the recursion runs on their coefficients. Every order is divided by the newest gap alone, which is a
    derivative on a uniform grid only, and ``x^i / i!`` is not Newton's basis: from order 2 on the forecast is not exact for
    polynomials; :func:`lagrange_weights` are.
    """
    count = len(steps)
    factors: list[list[float]] = []  # F_i as coefficients of the outputs
    for place in reversed(range(count)):  # oldest first
        updated = [[float(j == place) for j in range(count)]]
        for older in factors:
            gap = steps[place] - steps[place + 1]
            updated.append([(a - b) / gap for a, b in zip(updated[-1], older, strict=True)])
        factors = updated
    x = target - steps[0]
    return [sum(f[j] * x**i / math.factorial(i) for i, f in enumerate(factors)) for j in range(count)]
