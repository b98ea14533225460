"""How many bytes a generation keeps, and what of its plan is given up where that is more than it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sostenuto.cost import Cost, TensorSpec
from sostenuto.features import leaves
from sostenuto.methods.base import Facts, Method
from sostenuto.plan import Plan, fit, lower, peak_bytes
from sostenuto.state import Policy
from sostenuto.stats import Record


@dataclass(frozen=True)
class Budget:
    """The memory of one generation's passes.

    Attributes:
        method: the method.
        facts: of the generation.
        wanted: its plan, before anything is given up; ``None`` where decisions are taken while it runs.
        most: most bytes of kept features for each pass; ``None``: any.
        cost: the cost of a call, by its signature.
    """

    method: Method
    facts: Facts
    wanted: Plan | None
    most: int | None
    cost: Callable[[int], Cost]

    def plan(self, signature: int) -> Plan | None:
        """The plan of a pass that begins, with what it would keep too much of computed always."""
        if self.wanted is None or self.most is None:
            return self.wanted
        cost = self.cost(signature)
        return fit(self.wanted, cost.output_bytes, self.most, cost.residual_bytes)

    def policy(self, signature: int) -> Policy | None:
        """What decides for a pass that begins; none where what it would keep doesn't fit, and everything is computed."""
        policy = self.method.policy(self.facts)
        if policy is None or self.most is None or self._policy_bytes(policy, signature) <= self.most:
            return policy
        return None

    def per_pass(self, signature: int) -> int:
        """Most bytes that a pass whose calls have this signature keeps."""
        plan = self.plan(signature)
        if plan is not None:
            cost = self.cost(signature)
            program = lower(plan, self.facts.first_step)
            return peak_bytes(program, plan.num_slots, cost.output_bytes, cost.residual_bytes)
        policy = self.policy(signature)
        return 0 if policy is None else self._policy_bytes(policy, signature)

    def predicted(self, record: Record) -> int:
        """Most bytes that a generation like a recorded one keeps, its passes added up as far as they are kept together."""
        steps: dict[int, dict[int, int]] = {}  # the passes of each step, with the signature of their calls
        for step, pass_index, signature, _ in record.calls:
            steps.setdefault(step, {})[pass_index] = signature
        sizes = {signature: self.per_pass(signature) for passes in steps.values() for signature in set(passes.values())}
        # A pass that is not called at a step is given up at the next one.
        together = (steps.get(step - 1, {}) | passes for step, passes in steps.items())
        return max((sum(sizes[signature] for signature in passes.values()) for passes in together), default=0)

    def _policy_bytes(self, policy: Policy, signature: int) -> int:
        """Most bytes of a pass with a policy: outputs of its site, and its signal, which is as large as the main stream."""
        (output,) = self.cost(signature).site_outputs
        sizes = [spec.nbytes for spec in leaves(output, TensorSpec)]
        return sum(sizes) * (policy.forecast_order + 1) + max(sizes, default=0)
