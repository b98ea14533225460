"""One denoiser call: an op at each site, the call, and what was carried out."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.attention_tap import check_guidance_halves
from sostenuto.block_tap import BlocksTap
from sostenuto.cost import Carried, Cost
from sostenuto.distributed.lockstep import groups_of, over
from sostenuto.errors import EngineError, MethodError
from sostenuto.features import kept, leaves, mapped, versions
from sostenuto.finite import FiniteCheck
from sostenuto.forecast import lagrange_weights
from sostenuto.plan import Action, Op, Plan, Row
from sostenuto.prediction import from_clean, keep_variance, to_clean
from sostenuto.shared import SharedTimesteps
from sostenuto.sites import Site
from sostenuto.state import Call, ForecastWeights, PassState, Wanted, allocate
from sostenuto.tap import Observer, Tap

_OUTSIDE = int(Op.OUTSIDE)


class Executor:
    """Carries out denoiser calls with the taps of one handle.

    Args:
        denoiser: the network.
        sites: the sites.
        taps: the tap of each site.
        observers: what listens to modules for a selector.
        shared: what the blocks compute of the timestep alone.
        finite: looks for NaN and infinity, where that was asked for.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        sites: Sequence[Site],
        taps: Sequence[Tap],
        observers: Sequence[Observer],
        shared: SharedTimesteps,
        finite: FiniteCheck | None = None,
    ) -> None:
        self._denoiser, self._shared, self._finite = denoiser, shared, finite
        self._sites, self._taps, self._observers = sites, taps, observers
        self.in_graph = False  # whether any tap runs within a compiled graph
        self._is_aside = False
        self._staying: list[Tap] = []  # taps that stay in place meanwhile
        self._output = next((tap for tap in taps if tap.site.kind is SiteKind.OUTPUT), None)
        self._observed_at = [  # the site that each observed module belongs to
            next((i for i, site in enumerate(sites) if f"{observer.path}.".startswith(f"{site.id}.")), None)
            for observer in observers
        ]

    def execute(
        self,
        step: int,
        num_steps: int,
        state: PassState,
        call: Call,
        row: Row,
        *,
        plan: Plan | None,
        cost: Callable[[], Cost],
        note: Callable[[Carried], None],
    ) -> Any:
        """The denoiser's output with one op per site.

        Args:
            step: position in sampling order.
            num_steps: steps of the generation.
            state: what the pass keeps.
            call: the call.
            row: what each site does.
            plan: the plan that the ops are of, for its weights and ratios.
            cost: tells what such a call costs.
            note: is told what was carried out, also when the call failed.

        Raises:
            EngineError: a site was not reached, or the network wrote into what is kept.
            NotFiniteError: a feature holds NaN or infinity, where that is looked for.
        """
        ops, taps = row.ops, self._taps
        # The first call of a pass tells which sites are reached, so there everything is watched.
        if row.is_plain and not state.begins and self._finite is None and not self.in_graph:
            return self._run_plain(state, call, ops, note)
        self.step_in()
        if row.shares_guidance:
            check_guidance_halves(call.latents)
        # Taps in a compiled graph are given their memory beforehand. Before the taps are set: a dry run resets them.
        known = cost() if self.in_graph else None
        weights = ForecastWeights(lagrange_weights if plan is None else plan.weights, step)
        num_tokens = self._choose_tokens(step, state, row, plan) if row.partial else ()
        for tap, op in zip(taps, row.numbers, strict=True):
            tap.begin(op)
        touched = row.stateful if known is None else range(len(ops))
        for index in touched:
            tap, op = taps[index], ops[index]
            if index in state.absent:
                op = Op.COMPUTE  # this pass leaves it out; should it come up after all, it is right to compute it
            elif op == Op.PARTIAL and not num_tokens[index]:
                op = Op.REUSE
            if op != ops[index]:
                tap.begin(op)
            if op & Op.STORE:
                state.make_room(index)
                if state.selector is not None:
                    state.selector.computed(step, index)
            elif op == Op.DECIDE:
                assert isinstance(tap, BlocksTap)
                tap.decide = partial(self._ask, step, num_steps, state, index, weights)
            tap.slots, tap.residual = state.slots[index], state.residuals[index]
            if known is not None and tap.in_graph and not self._allocate(state, known, index):
                tap.begin(Op.COMPUTE)
                continue
            if op in (Op.FORECAST, Op.EXTEND):
                tap.weights = weights(row.history[index], kept(tap.slots[1 if op == Op.EXTEND else 0]))
        for index in self._left_to_run(ops, state.absent):
            taps[index].begin(Op.COMPUTE)
        read = [
            (tap, kept(tap.slots[0])) for tap in map(taps.__getitem__, row.read) if tap.op in (Op.REUSE, Op.PARTIAL)
        ]
        written = [versions(slot) + (tap.op == Op.PARTIAL) for tap, slot in read]  # a partial site writes once
        if state.selector is not None and step in state.program.scored:
            for observer, index in zip(self._observers, self._observed_at, strict=True):
                if index is None or ops[index].action is Action.COMPUTE:
                    observer.hear = state.selector.observe
        scored = 0 if state.selector is None else state.selector.macs
        try:
            if self._finite is not None:
                self._finite.begin(call.latents)
            output = self._run(state, call)
            if self._finite is not None:
                self._finite.end(step, output)
            self._check_reached(state)
            for (tap, slot), version in zip(read, written, strict=True):
                if not tap.in_graph and versions(slot) != version:
                    raise EngineError(f"the network writes into the output of {tap.site.id}: it can't be reused")
            return output
        finally:
            scoring = 0 if state.selector is None else state.selector.macs - scored
            as_planned = not (row.decides or row.partial or state.absent)
            carried = ops if as_planned else tuple(Op(tap.op) for tap in taps)
            for tap in taps:
                tap.op = _OUTSIDE
            for index in touched:
                taps[index].reset()
            for observer in self._observers:
                observer.hear = None
            if self._finite is not None:
                self._finite.leave()
            note(Carried(carried, tuple(num_tokens), row.decides, scoring))

    def _left_to_run(self, ops: Sequence[Op], absent: Container[int]) -> list[int]:
        """The sites that are passed over within one that this pass leaves out: nothing stands in for them."""
        if not absent:
            return []
        standing = [self._sites[index] for index, op in enumerate(ops) if op.is_filled and index not in absent]
        return [
            index
            for index, op in enumerate(ops)
            if op == Op.SKIP and not any(site.covers(self._sites[index]) for site in standing)
        ]

    def _run_plain(self, state: PassState, call: Call, ops: tuple[Op, ...], note: Callable[[Carried], None]) -> Any:
        """A call that computes everything and keeps nothing: the network runs as if nothing was attached to it."""
        self._step_aside()
        for tap in self._staying:
            tap.begin(Op.COMPUTE)
        try:
            return self._run(state, call)
        finally:
            for tap in self._staying:
                tap.op = _OUTSIDE
            note(Carried(ops))

    def _step_aside(self) -> None:
        """Take the taps out of the way; the first one stays, to notice a call that the engine doesn't see."""
        if not self._is_aside:
            self._is_aside = True
            moved = [tap for tap in reversed(self._taps[1:]) if tap.step_aside()]
            self._staying = [tap for tap in self._taps if tap not in moved]

    def step_in(self) -> None:
        """Put the taps back into their places."""
        if self._is_aside:
            self._is_aside = False
            for tap in self._taps[1:]:
                tap.step_in()

    def _allocate(self, state: PassState, cost: Cost, index: int) -> bool:
        """Give a compiled denoiser's tap its memory beforehand; returns whether the call reaches the site."""
        tap, output = self._taps[index], cost.site_outputs[index]
        if output is None:
            if not (tap.site.optional or state.is_further):
                raise never_reached(tap.site)
            state.absent.add(index)
            return False
        if tap.op & Op.RESIDUAL:
            allocate(tap.residual, cost.site_residuals[index])
        if tap.op & Op.STORE:
            allocate(tap.slots, output)
        return True

    def _choose_tokens(self, step: int, state: PassState, row: Row, plan: Plan | None) -> list[int]:
        """Set the tokens that partial sites run; returns how many of each site, 0 where the site doesn't run partially."""
        num_tokens = [0] * len(row.ops)
        wanted = []
        for index in row.partial:
            if index not in state.absent:
                assert plan is not None
                slot = self._taps[index].output(kept(state.slots[index][0]))
                if isinstance(slot, torch.Tensor) and slot.ndim == 3:  # else it is reused as it is
                    num_tokens[index] = int(plan.ratios[step][index] * slot.shape[1])
                    wanted.append(Wanted(index, tuple(slot.shape), num_tokens[index]))
        wanted = [site for site in wanted if site.num_tokens]
        if not wanted:
            return num_tokens
        if state.selector is None:
            name = self._sites[wanted[0].site].id
            raise MethodError(f"the plan runs {name} for some tokens, but the method doesn't choose them")
        device = next(leaves(kept(state.slots[wanted[0].site][0]))).device
        for site, tokens in zip(wanted, state.selector.select(step, wanted, device), strict=True):
            self._taps[site.site].tokens = tokens
        return num_tokens

    def _ask(
        self, step: int, num_steps: int, state: PassState, index: int, weights: ForecastWeights, signal: Any
    ) -> Op:
        """Ask the pass's policy about its site, which is just being reached."""
        policy = state.policy
        assert policy is not None
        tap = self._taps[index]
        with over(groups_of(self._denoiser)):
            skips = policy.skips(step, num_steps, signal, tuple(state.decided))
        if not skips or not state.decided:
            tap.slots = state.make_room(index)
            state.decided.insert(0, step)
            return Op.STORE
        read = tuple(state.decided[: policy.forecast_order + 1])
        if len(read) == 1:
            return Op.REUSE
        tap.weights = weights(read, kept(tap.slots[0]))
        return Op.FORECAST

    def _run(self, state: PassState, call: Call) -> Any:
        """Call the denoiser, or spare the call where its output is filled in."""
        tap = self._output
        if tap is None:
            return self._network(call)
        tap.reached = 1
        if not Op(tap.op).is_filled:
            output = self._network(call)
            if tap.op == Op.STORE:
                tap.store(_converted(compat.values_of(output), call, to_clean))
                hollow = mapped(
                    lambda tensor: tensor.new_empty(0), compat.values_of(output)
                )  # a view would keep it all
                state.template = compat.with_values(output, hollow)
            return output
        newest = kept(tap.slots[1 if tap.op == Op.EXTEND else 0])
        with_variance = partial(keep_variance, noisy_last=call.noisy_last)
        values = compat.map_prediction(tap.filled(tap.op), with_variance, compat.prediction_of(newest), call.latents)
        if tap.op == Op.EXTEND:
            tap.store(values)
        return compat.with_values(state.template, mapped(torch.clone, _converted(values, call, from_clean)))

    def _network(self, call: Call) -> Any:
        self._shared.begin()
        try:
            return call.run()
        finally:
            self._shared.leave()

    def _check_reached(self, state: PassState) -> None:
        """Every site must be reached by every call, except one that is left out from the pass's first call on."""
        odd = [
            (index, tap)
            for index, tap in enumerate(self._taps)
            if tap.reached != tap.site.calls and tap.op != Op.SKIP and not tap.in_graph
        ]
        if not odd:
            return
        skipped = [tap.site for tap in self._taps if Op(tap.op).is_filled]
        for index, tap in odd:
            if any(site is not tap.site and site.meets(tap.site) for site in skipped):
                continue
            if tap.reached:
                raise tap.miscounted()
            if state.begins and (tap.site.optional or state.is_further):
                state.absent.add(index)
            elif index not in state.absent:
                raise never_reached(tap.site)


def _converted(values: Any, call: Call, function: Callable[..., torch.Tensor]) -> Any:
    """An output's values with the clean sample in place of the prediction, or the other way round, where that is kept."""
    if call.clean is None:
        return values
    convert = partial(function, conversion=call.clean, noisy_last=call.noisy_last)
    return compat.map_prediction(values, convert, call.latents)


class NeverReachedError(EngineError):
    """A call of the denoiser left out a site."""


def never_reached(site: Site) -> NeverReachedError:
    """The error of a site that a call left out."""
    return NeverReachedError(
        f"a call of the denoiser never reached {site.id}: it can't be cached; correct its anatomy (or, where torch's fused "
        "transformer layer ran in its place, torch.backends.mha.set_fastpath_enabled(False); where hooks or a compilation came "
        "after sostenuto, enable it after them)"
    )
