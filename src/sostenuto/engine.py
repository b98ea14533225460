"""Attach a method to a denoiser, carry out its plan, hold the state of one generation; detach restores the model exactly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sostenuto import compat, refusals
from sostenuto.arguments import Arguments, Reader
from sostenuto.attachment import not_copied
from sostenuto.budget import Budget
from sostenuto.clock import Clock, Schedulers, Tick
from sostenuto.config import check_max_cache_bytes
from sostenuto.correct import NoiseScale, TimeShifter, scale_noise
from sostenuto.cost import Carried, signature
from sostenuto.distributed import lockstep
from sostenuto.dry_runs import DryRuns
from sostenuto.errors import AlreadyEnabledError, EngineError, MethodError
from sostenuto.execution import NeverReachedError
from sostenuto.features import Feature, leaves
from sostenuto.hold import Hold, owner_of
from sostenuto.methods import by_name
from sostenuto.methods.base import Facts, Method, check_steps
from sostenuto.mount import Mount
from sostenuto.plan import Action, Op, Plan, Program, Row, lower, uniform
from sostenuto.prediction import Conversion, check_prediction, clean_conversions, conversions
from sostenuto.probe import Prober
from sostenuto.sites import Site
from sostenuto.state import Call, PassState
from sostenuto.stats import Record, Statistics
from sostenuto.telemetry import Generation, Reporter

Conversions = Callable[[Any, Sequence[float], bool], tuple[Conversion, ...]]
"""Of a scheduler, its timesteps, and whether it is given the negative of the prediction."""


class Handle:
    """A method attached to a denoiser. Also a context manager that disables at its end."""

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Callable[[], Any],
        method: Method,
        max_cache_bytes: int | None,
        check_finite: bool = False,
    ) -> None:
        self._caller = denoiser  # what the pipeline calls; may be what torch.compile made of the denoiser
        self._denoiser = compat.unwrapped(denoiser)
        self.method = method.prepare(self._denoiser, scheduler())
        refusals.check_neighbours(self._denoiser)
        refusals.check_gaps(self.method)
        self._mount = Mount(self._denoiser, self.method, compat.is_compiled(denoiser), check_finite)
        self._scheduler = Schedulers(scheduler)
        self._reader = Reader(self._denoiser)
        self._clock = Clock(self._scheduler, self._reader.given_as)
        self._max_cache_bytes = max_cache_bytes
        self.driver: Callable[[Tick, Prober], Any] | None = None  # takes the place of the plan during calibration
        self.driver_slots = 1
        self._detach: list[Callable[[], None]] = []
        self._hold = Hold(
            self._denoiser, self._caller, owner=self, call=self._call, compile=self._compile, bare=self._bare
        )
        self._facts: Facts | None = None
        self._plan: Plan | None = None
        self._lowered_plan: Plan | None = None
        self._programs: dict[int, Program] = {}  # the lowered plan, by the step at which a pass begins
        self._shifter: TimeShifter | None = None
        self._noise_scale: NoiseScale | None = None
        self._mean_over: tuple[Any, Any] = (None, None)  # timesteps between which the network predicts a mean velocity
        self._reused = False  # whether the call under way filled anything in
        self._factor = -1, 1.0  # the step under way, and what its noise is multiplied by
        self._conversions: dict[Conversions, tuple[Conversion, ...]] = {}  # of this generation, once they are asked for
        self._passes: dict[int, PassState] = {}
        self._record: Record | None = None
        self._dry_runs = DryRuns(self._denoiser, self._mount, self._in_place)
        self._busy = threading.Lock()
        self._taps_in_use = threading.RLock()  # by a call or a dry run
        self._reporter = Reporter(self)

    # --- attaching -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        try:
            self._detach.append(self._mount.detach)
            self._mount.attach()
            self._detach.append(self._hold.release)
            self._hold.take()
        except BaseException:
            self.disable()
            raise

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The denoiser without a trace of ours, to be copied."""
        if not self._busy.acquire(blocking=False):
            raise not_copied("a denoiser in the middle of a call")
        try:
            self._hold.release()
            with self._mount.aside():
                yield
        finally:
            self._hold.take()
            self._busy.release()

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """What ``denoiser.compile()`` does meanwhile: calls are intercepted outside of the compiled one, taps run within it.

        Raises:
            MethodError: the method doesn't work on a compiled denoiser; it is left uncompiled.
        """
        refusals.check_graph(self.method, self._denoiser, in_graph=True)
        with self._taps_in_use:
            self._drop_state()
            self._hold.release()
            try:
                self._denoiser.compile(*args, **kwargs)
                self._mount.compiled = compat.is_compiled(self._denoiser)
            finally:
                self._hold.take()
            self._place_anew()

    def _settle(self, between: bool) -> None:
        """Make sure that every tap is still in its place; between generations put them in place again."""
        if self._mount.stands(between):
            return
        if not between:
            raise refusals.displaced()
        self._place_anew()

    def _place_anew(self) -> None:
        self._mount.attach_anew()
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._record = None
        self._dry_runs.forget()

    def disable(self) -> None:
        """Take every trace away; does nothing when already disabled."""
        was_enabled = self.enabled
        while self._detach:
            self._detach.pop()()
        self._drop_state()
        if was_enabled:
            self._reporter.tell()  # last: a listener may fail

    def share(self, pipeline: Any) -> None:
        """Tell of another pipeline that calls the same denoiser, with a scheduler of its own.

        The scheduler whose timesteps were set last is taken to drive the denoiser, as every pipeline sets them at its
        beginning.

        Raises:
            MethodError: the pipeline has another denoiser, or the method doesn't fit its scheduler.
        """
        denoisers = compat.find_denoisers(pipeline).values()
        if pipeline in denoisers or all(compat.unwrapped(denoiser) is not self._denoiser for denoiser in denoisers):
            raise MethodError(
                f"this {type(pipeline).__name__} doesn't call the {type(self._denoiser).__name__} that sostenuto is enabled "
                "on: share takes a pipeline made with the same network"
            )
        self.method.prepare(self._denoiser, pipeline.scheduler)
        self._scheduler.add(lambda: pipeline.scheduler)

    def listen(self, listener: Callable[[Generation], None]) -> None:
        """Call a function with every generation, when its last call is done."""
        self._reporter.listeners.append(listener)

    @property
    def enabled(self) -> bool:
        """Whether the method is attached."""
        return bool(self._detach)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise not_copied("a handle")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise not_copied("a handle")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    # --- what it did ---------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The sites of the method, in the order in which the network runs them."""
        return self._mount.sites

    @property
    def stats(self) -> Statistics:
        """Statistics of the last generation, also of one under way.

        Raises:
            EngineError: nothing was generated yet.
        """
        if self._record is None:
            raise EngineError("no statistics: the denoiser has not been called since sostenuto was enabled")
        return self._dry_runs.statistics(self._record)

    @property
    def plan(self) -> Plan | None:
        """The plan of the last generation; ``None`` before the first one, and where decisions are taken while it runs."""
        return self._plan

    @property
    def noise_scale(self) -> NoiseScale | None:
        """The factors of the predicted noise of the last generation; ``None``: left as it is."""
        return self._noise_scale

    @property
    def last_actions(self) -> list[str]:
        """What every site did in the last call of the denoiser, as in ``stats.plan``, without counting anything."""
        if self._record is None or not self._record.calls:
            return []
        *_, carried = self._record.calls[-1]
        return [op.action.value for op in carried.ops]

    @property
    def predicted_cache_bytes(self) -> int | None:
        """Most bytes that a generation like the one last begun keeps, from its plan; ``None`` before the first call.

        What its passes keep is added up as far as they are kept together, those that it has had by now.
        """
        return None if self._record is None else self._budget().predicted(self._record)

    def _budget(self) -> Budget:
        assert self._facts is not None
        return Budget(self.method, self._facts, self._plan, self._max_cache_bytes, self._dry_runs.cost)

    def count(self, signature: int, ops: Sequence[Op]) -> int:
        """Multiply-accumulates of a call of that signature with these ops."""
        return self._dry_runs.macs(signature, ops)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Taps attached for a dry run, also when disabled or when another handle's are in place by now."""
        with self._taps_in_use:
            if self.enabled:
                self._mount.executor.step_in()
                yield
                return
            other = handle_of(self._denoiser)
            with nullcontext() if other is None else other._out_of_place():
                try:
                    self._mount.attach()
                    yield
                finally:
                    self._mount.detach()

    @contextmanager
    def _out_of_place(self) -> Iterator[None]:
        """Taps off for a while, between two calls."""
        with self._taps_in_use:
            self._mount.detach()
            try:
                yield
            finally:
                self._mount.attach()

    # --- one denoiser call ---------------------------------------------------------------------------------------

    def _call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if compat.is_traced():
            raise EngineError(
                "torch.compile was put around the denoiser after sostenuto was enabled: compile it first, then enable, or "
                "call denoiser.compile()"
            )
        if not self._busy.acquire(blocking=False):
            raise EngineError("the denoiser is in a call already: one enabled denoiser serves one thread at a time")
        try:
            with self._taps_in_use:
                return self._placed_call(inner, args, kwargs)
        except BaseException:
            self._drop_state()
            raise
        finally:
            self._busy.release()

    def _placed_call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._reader.read(args, kwargs)
        if given.prefill:
            return self._filled(inner, args, kwargs)
        tick = self._clock.tick(given.timestep, given.latents, given.conditioning)
        self._mean_over = (None, None) if given.until is None else (given.timestep, given.until)
        if tick.new_generation:
            self._settle(between=True)
            self._reporter.tell()
            refusals.check_neighbours(self._denoiser)
            with lockstep.deciding(self._denoiser, next(leaves(given.latents)).device) as agree:
                self._decide(tick)
                decided = tick.timesteps, tick.step, self._noise_scale, [site.id for site in self.sites]
                agree(self.method, self._plan, self._mount.observes, *decided)
            if self._dry_runs.too_many:  # nothing is read of generations before this one
                self._forget_counts()
            self._dry_runs.let_go()
            self._record = Record(self._clock.source, num_steps=tick.num_steps)
        args, kwargs = self._shifted(tick, given.latents, args, kwargs)
        number = self._dry_runs.number(args, kwargs)
        clean = self._conversion(tick, clean_conversions) if self._mount.keeps_clean else None
        call = Call(inner, args, kwargs, number, given.latents, self._reader.noisy_last, clean)
        output = self._step(tick, call)
        if self._noise_scale is not None:
            # The passes of a step share its first call's factor: guidance would amplify a difference.
            if self._factor[0] != tick.step:
                self._factor = tick.step, self._noise_scale.at(tick.step, self._reused)
            output = self._scaled(tick, call, output, self._factor[1])
        self._reporter.called(tick.step, tick.num_steps)
        return output

    def _filled(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that fills the network's own key-value cache: all of it runs, and what comes after it begins anew."""
        self._drop_state()
        self._settle(between=True)
        for tap in self._mount.taps:
            tap.begin(Op.COMPUTE)
        try:
            return inner(*args, **kwargs)
        finally:
            self._mount.reset()

    def _scaled(self, tick: Tick, call: Call, output: Any, scale: float) -> Any:
        if scale == 1.0:
            return output
        conversion = self._conversion(tick)

        def scaled(prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            return scale_noise(prediction, scale, latents, conversion, call.noisy_last)

        return compat.map_prediction(output, scaled, call.latents)

    def _conversion(self, tick: Tick, kind: Conversions = conversions) -> Conversion:
        """How the noise, or the clean sample, follows from what the network predicts at this step."""
        check_prediction(self._denoiser, self._reader.converts, *self._mean_over)
        if kind not in self._conversions:
            self._conversions[kind] = kind(self._scheduler(), tick.timesteps, self._reader.negated_prediction)
        return self._conversions[kind][tick.step]

    def _decide(self, tick: Tick) -> None:
        """Decide the plan of a new generation; nothing of the one before is kept."""
        self._passes, self._conversions, self._factor = {}, {}, (-1, 1.0)
        facts = Facts(self.sites, tick.timesteps, self._denoiser, self._scheduler(), tick.step)
        plan = self.method.plan(facts)
        if plan is not None:
            check_steps(plan, tick.num_steps)
        refusals.check_taps(self.method, self._mount.taps, () if plan is None else plan.actions)
        factors = self.method.noise_scale(facts)
        scale = None if factors is None else NoiseScale.of(factors, tick.num_steps)
        if scale is not None and not scale.is_idle:
            self._conversion(tick)  # refuses what can't be scaled before anything is computed
        if self._mount.keeps_clean:
            self._conversion(tick, clean_conversions)
        self._facts, self._plan, self._shifter = facts, plan, self.method.time_shifter(facts)
        self._noise_scale = scale

    def _shifted(self, tick: Tick, latents: Feature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The call's arguments with the timestep that the method wants the network to see."""
        if self._shifter is None:
            return args, kwargs
        timestep = self._shifter.shift(tick.timesteps[tick.step], next(leaves(latents)))
        return (args, kwargs) if timestep is None else self._reader.with_timestep(args, kwargs, timestep)

    def _step(self, tick: Tick, call: Call) -> Any:
        # What a pass that left out a step keeps is of no use any more.
        self._passes = {index: state for index, state in self._passes.items() if state.last_step >= tick.step - 1}
        state = self._passes.get(tick.pass_index)
        batch = signature(call.latents)
        if state is None or tick.step != state.last_step + 1 or state.batch != batch:
            # The pass begins here, left out steps, or goes on with another batch: what it kept is not what its plan assumes.
            state = self._passes[tick.pass_index] = self._fresh_pass(tick, call)
            state.batch, state.is_further = batch, tick.pass_index > 0
        if self.driver is not None:
            output = self.driver(tick, Prober(self, tick, state, call))
        else:
            output = self._follow(tick, state, call)
        state.last_step = tick.step
        return output

    def _follow(self, tick: Tick, state: PassState, call: Call) -> Any:
        """Carry out the step of the plan."""
        row = state.program.rows[tick.step]
        if row.skips and torch.is_grad_enabled():
            refusals.check_gradients(self.method, self._denoiser)
        output = self._execute(tick, state, call, row)
        state.free(tick.step)
        return output

    def _fresh_pass(self, tick: Tick, call: Call) -> PassState:
        assert self._facts is not None
        sites = len(self.sites)
        selector = self.method.selector(self._facts, next(leaves(call.latents)))
        plan = self._budget().plan(call.signature)
        if plan is not None:
            return PassState(self._program(plan, tick.step), sites, plan.num_slots, selector=selector)
        policy = self._budget().policy(call.signature)  # a driver that follows the method follows it too
        num_slots = max(self.driver_slots, 0 if policy is None else policy.forecast_order + 1)
        op = Op.COMPUTE if policy is None else Op.DECIDE  # nothing is ever skipped, or the policy decides
        return PassState(uniform(op, sites, tick.num_steps), sites, num_slots, policy, selector)

    def _program(self, plan: Plan, start: int) -> Program:
        """The plan lowered; kept, as passes and generations follow the same one as a rule."""
        if self._lowered_plan != plan:
            self._lowered_plan, self._programs = plan, {}
        if start not in self._programs:
            self._programs[start] = lower(plan, start)
        return self._programs[start]

    def _execute(self, tick: Tick, state: PassState, call: Call, row: Row) -> Any:
        """Run the denoiser with one op per site."""

        def note(carried: Carried) -> None:
            self._reused = any(op.action is not Action.COMPUTE for op in carried.ops) if row.decides else row.skips
            if self._record is not None:
                self._record.calls.append((tick.step, tick.pass_index, call.signature, carried))
                if row.keeps:
                    self._record.note_bytes(sum(state.num_bytes for state in self._passes.values()))
                self._record.ended = time.monotonic()

        if not row.is_plain:
            self._settle(between=False)
        try:
            return self._mount.executor.execute(
                tick.step,
                tick.num_steps,
                state,
                call,
                row,
                plan=self._plan,
                cost=lambda: self._dry_runs.cost(call.signature),
                note=note,
            )
        except NeverReachedError:
            if self._mount.taps_stand:
                raise
            raise refusals.displaced() from None

    def _drop_state(self) -> None:
        self._passes, self._mean_over = {}, (None, None)
        self._clock.forget()
        self._mount.reset()


def attach(
    target: Any,
    method: str | Method,
    *,
    scheduler: Any = None,
    max_cache_bytes: int | None = None,
    check_finite: bool = False,
    denoiser: Any = None,
) -> Handle:
    """Attach a method to one denoiser, the only one of a pipeline where none is named; :func:`sostenuto.enable` says more.

    Raises:
        AlreadyEnabledError: a method is attached already.
        AnatomyError: the object has no denoiser or several, or its sites are not known.
        MethodError, TableError: the method is unknown, or doesn't fit this model and scheduler.
    """
    if denoiser is None:
        denoiser = compat.find_denoiser(target)
    if handle_of(denoiser) is not None:
        raise AlreadyEnabledError(
            f"sostenuto is enabled on this {type(compat.unwrapped(denoiser)).__name__} already: disable it first; for a "
            "second pipeline with the same denoiser call handle.share(pipeline)"
        )
    if isinstance(method, str):
        method = by_name(method)
    if not isinstance(method, Method):
        is_class = isinstance(method, type) and issubclass(method, Method)
        remedy = f"make one, {method.__name__}()" if is_class else "see sostenuto.available_methods()"
        raise MethodError(f"a method is a name or a method object, not {method!r}: {remedy}")
    check_max_cache_bytes(max_cache_bytes)
    if not isinstance(check_finite, bool):
        raise MethodError(f"check_finite is true or false, not {check_finite!r}")
    handle = Handle(denoiser, lambda: scheduler_of(target, scheduler), method, max_cache_bytes, check_finite)
    handle._attach()
    return handle


def scheduler_of(target: Any, scheduler: Any = None) -> Any:
    """The scheduler that drives a pipeline's denoisers, or a bare one: the given one, else the pipeline's of now.

    Raises:
        MethodError: a bare denoiser comes without one, or the pipeline has none.
    """
    if scheduler is not None:
        return scheduler
    if isinstance(target, nn.Module):
        raise MethodError("a bare denoiser needs its scheduler to tell the step of a call: pass scheduler=…")
    found = getattr(target, "scheduler", None)
    if found is None:
        names = [name for name in getattr(target, "components", {}) if name.endswith("_scheduler")]
        such = (
            f", such as scheduler=pipe.{names[0]}" if names else "; where it has none at all, its steps can't be told"
        )
        raise MethodError(
            f"this {type(target).__name__} has no scheduler by that name: pass the one that drives it{such}"
        )
    return found


def handle_of(denoiser: nn.Module) -> Handle | None:
    """The handle of what is attached to a denoiser."""
    return owner_of(denoiser)
