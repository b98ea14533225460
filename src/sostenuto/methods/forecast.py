"""A forecaster for the gaps of another method: its table decides when, this how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sostenuto.errors import MethodError
from sostenuto.forecast import check_forecast_order, lagrange_weights, taylor_weights
from sostenuto.methods.base import Method
from sostenuto.methods.checks import check_choice
from sostenuto.plan import Action, Plan


@dataclass(frozen=True)
class Forecast(Method):
    """Fill the gaps that another method leaves in another way: ``FORA(3) | Forecast(order=2)``.

    Which steps and sites are skipped stays the other method's decision; every site that it reuses or forecasts is forecast
    by this rule instead, from the outputs computed at that site. Abscissa is the step number.

    Attributes:
        order: degree of the forecast, 0 (last value) to 4; where fewer than order + 1 outputs were computed it falls.
        rule: ``"lagrange"``, the polynomial through the outputs; ``"taylor"``, TaylorSeer's recursion (arXiv 2503.06923), the
            same up to order 1; ``"last"``, the last value whatever the order.
    """

    order: int = 1
    rule: Literal["lagrange", "taylor", "last"] = "lagrange"

    name: ClassVar[str] = "forecast"
    summary: ClassVar[str] = "fills the gaps of the method it is combined with by a forecast"
    denoisers: ClassVar[str] = "any"
    state: ClassVar[str] = "order + 1 outputs where the other method keeps one"
    bytes_per_token: ClassVar[str] = "× (order + 1)"

    def __post_init__(self) -> None:
        check_forecast_order(self.order, "Forecast's order")
        check_choice("Forecast's rule", self.rule, ("lagrange", "taylor", "last"))

    def refine(self, plan: Plan) -> Plan:
        """The same plan with every reuse or forecast by this rule.

        Raises:
            MethodError: the plan runs some tokens only, whose outputs are of different steps.
        """
        if any(action is Action.PARTIAL for row in plan.actions for action in row):
            raise MethodError(
                "Forecast extrapolates whole outputs, but the method it is combined with runs some tokens only: leave one out"
            )
        gap = Action.REUSE if self.rule == "last" or self.order == 0 else Action.FORECAST
        actions = tuple(
            tuple(gap if action in (Action.REUSE, Action.FORECAST) else action for action in row)
            for row in plan.actions
        )
        return replace(
            plan,
            actions=actions,
            forecast_order=max(1, self.order),
            weights=taylor_weights if self.rule == "taylor" else lagrange_weights,
            keep_forecasts=False,
        )
