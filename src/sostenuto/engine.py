"""Attach a method to a denoiser, carry out its plan, hold the state of one generation; detach restores the model exactly."""

from __future__ import annotations

import inspect as python_inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from sostenuto import compat
from sostenuto.anatomy import anatomy_of, inspect
from sostenuto.clock import Clock, Tick
from sostenuto.correct import Conversion, check_noise_scale, conversions, scale_noise
from sostenuto.cost import Cost, measure, spec
from sostenuto.errors import AlreadyEnabledError, ClockError, EngineError, MethodError
from sostenuto.forecast import lagrange_weights
from sostenuto.methods import by_name
from sostenuto.methods.base import Facts, Method
from sostenuto.plan import Op, Plan, Program, fit, lower, peak_bytes
from sostenuto.probe import Call, PassState, Prober
from sostenuto.stats import Record, Statistics
from sostenuto.tap import Tap, empty_slot, kept

_ATTRIBUTE = "_sostenuto_handle"


class Handle:
    """A method attached to a denoiser. Also a context manager that disables at its end."""

    def __init__(self, denoiser: nn.Module, scheduler: Callable[[], Any], method: Method, max_cache_bytes: int | None):
        self.sites = inspect(denoiser)
        self.method = method.prepare(compat.unwrapped(denoiser), scheduler())
        self._caller = denoiser  # what the pipeline calls; may be what torch.compile made of the denoiser
        self._denoiser = compat.unwrapped(denoiser)
        self._scheduler = scheduler
        self._clock = Clock(scheduler)
        self._taps = [Tap(site, self._denoiser) for site in self.sites]
        self._max_cache_bytes = max_cache_bytes
        self._names = [
            name for name in python_inspect.signature(type(self._denoiser).forward).parameters if name != "self"
        ]
        self._timestep_name = anatomy_of(self._denoiser).timestep
        if self._timestep_name not in self._names:
            raise EngineError(f"{type(self._denoiser).__name__}.forward has no argument {self._timestep_name!r}")
        self._compiled = compat.is_compiled(denoiser)
        self.driver: Callable[[Tick, Prober], Any] | None = None  # takes the place of the plan during calibration
        self.driver_slots = 1
        self._detach: list[Callable[[], None]] = []
        self._plan: Plan | None = None
        self._noise_scale: tuple[float, ...] | None = None
        self._conversions: tuple[Conversion, ...] | None = None  # of this generation, once something asks for them
        self._passes: dict[int, PassState] = {}
        self._record: Record | None = None
        self._costs: list[tuple[Any, Cost | None]] = []  # arguments as specs, the cost once asked for
        self._signatures: dict[Any, int] = {}
        self._generation_signature = 0
        self._busy = threading.Lock()

    # --- attaching -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        try:
            self._detach.append(self._detach_taps)
            self._attach_taps()
            vars(self._denoiser)[_ATTRIBUTE] = self
            self._detach.append(
                compat.intercept_calls(self._caller, lambda inner: lambda *a, **k: self._call(inner, a, k))
            )
        except BaseException:
            self.disable()
            raise

    def _attach_taps(self) -> None:
        for tap in self._taps:
            tap.attach()

    def _detach_taps(self) -> None:
        for tap in reversed(self._taps):
            tap.detach()

    def disable(self) -> None:
        """Take every trace away; does nothing when already disabled."""
        while self._detach:
            self._detach.pop()()
        self._drop_state()
        vars(self._denoiser).pop(_ATTRIBUTE, None)

    @property
    def enabled(self) -> bool:
        """Whether the method is attached."""
        return bool(self._detach)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise EngineError("a denoiser with sostenuto enabled can't be copied or pickled: disable it first")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise EngineError("a denoiser with sostenuto enabled can't be copied or pickled: disable it first")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    # --- what it did ---------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Statistics:
        """Statistics of the last generation, also of one under way.

        Raises:
            EngineError: nothing was generated yet.
        """
        if self._record is None:
            raise EngineError("no statistics: the denoiser has not been called since sostenuto was enabled")
        return self._record.statistics(self._cost)

    @property
    def predicted_cache_bytes(self) -> int | None:
        """Most bytes that a generation like the one last begun keeps, from its plan; ``None`` before the first call."""
        if self._record is None:
            return None
        if self._plan is None:
            return 0
        outputs = self._cost(self._generation_signature).site_outputs
        per_pass = peak_bytes(lower(self._plan), self._plan.num_slots, [output.num_bytes for output in outputs])
        return per_pass * self._record.num_passes

    def _cost(self, signature: int) -> Cost:
        arguments, cost = self._costs[signature]
        if cost is None:
            for tap in self._taps:
                tap.op = Op.COMPUTE
            try:
                cost = measure(self._denoiser, self.sites, *arguments)
            finally:
                for tap in self._taps:
                    tap.op = Op.OUTSIDE if self.enabled else Op.COMPUTE
            self._costs[signature] = (arguments, cost)
        return cost

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        specs = tree_map(spec, args), tree_map(spec, kwargs)
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        key = repr((specs, autocast))
        if key not in self._signatures:
            self._signatures[key] = len(self._costs)
            self._costs.append((specs, None))
        return self._signatures[key]

    # --- one denoiser call ---------------------------------------------------------------------------------------

    def _call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            raise EngineError("the denoiser was compiled after sostenuto was enabled: compile it first, then enable")
        if not self._busy.acquire(blocking=False):
            raise EngineError("the denoiser is in a call already: one enabled denoiser serves one thread at a time")
        try:
            return self._placed_call(inner, args, kwargs)
        except BaseException:
            self._drop_state()
            raise
        finally:
            self._busy.release()

    def _placed_call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        latents, timestep = named.pop(self._names[0], None), named.pop(self._timestep_name, None)
        if not isinstance(latents, torch.Tensor) or timestep is None:
            raise ClockError(f"the denoiser was called without {self._names[0]} or {self._timestep_name}")
        conditioning = [value for value in tree_leaves(named) if isinstance(value, torch.Tensor)]
        tick = self._clock.tick(timestep, latents, conditioning)
        call = Call(inner, args, kwargs, self._signature(args, kwargs), latents)
        if tick.new_generation:
            self._begin(tick, call)
        output = self._step(tick, call)
        return output if self._noise_scale is None else self._scaled(tick, call, output, self._noise_scale[tick.step])

    def _scaled(self, tick: Tick, call: Call, output: Any, scale: float) -> Any:
        if scale == 1.0:
            return output
        conversion = self._conversion(tick)
        return compat.map_output(output, lambda prediction: scale_noise(prediction, scale, call.latents, conversion))

    def _conversion(self, tick: Tick) -> Conversion:
        """How the noise follows from what the network predicts at this step."""
        if self._conversions is None:
            self._conversions = conversions(self._scheduler(), tick.timesteps)
        return self._conversions[tick.step]

    def _begin(self, tick: Tick, call: Call) -> None:
        """Decide the plan of a new generation; nothing of the one before is kept."""
        self._passes, self._conversions = {}, None
        facts = Facts(self.sites, tick.timesteps, self._denoiser, self._scheduler())
        plan = self.method.plan(facts)
        if plan is not None and plan.num_steps != tick.num_steps:
            raise MethodError(f"the plan has {plan.num_steps} steps, the sampler runs {tick.num_steps}")
        if plan is not None and self._max_cache_bytes is not None:
            sizes = [output.num_bytes for output in self._cost(call.signature).site_outputs]
            plan = fit(plan, sizes, self._max_cache_bytes)
        scale = self.method.noise_scale(facts)
        if scale is not None and any(factor != 1 for factor in scale):
            self._conversion(tick)  # refuses what can't be scaled before anything is computed
        self._plan = plan
        self._noise_scale = None if scale is None else check_noise_scale(scale, tick.num_steps)
        self._record, self._generation_signature = Record(), call.signature

    def _step(self, tick: Tick, call: Call) -> Any:
        state = self._passes.get(tick.pass_index)
        if state is None or tick.step != state.last_step + 1 or state.latents != spec(call.latents):
            # The pass begins here, left out steps, or goes on with another batch: what it kept is not what its plan assumes.
            state = self._passes[tick.pass_index] = self._fresh_pass(tick)
            state.latents = spec(call.latents)
        if self.driver is not None:
            output = self.driver(tick, Prober(self, tick, state, call))
        else:
            output = self._follow(tick, state, call)
        state.last_step = tick.step
        return output

    def _follow(self, tick: Tick, state: PassState, call: Call) -> Any:
        """Carry out the step of the plan."""
        program = state.program
        output = self._execute(tick, state, call, program.ops[tick.step], program.history[tick.step])
        for index, last in enumerate(program.last_reader):
            if last == tick.step:
                state.clear(index)
        return output

    def _fresh_pass(self, tick: Tick) -> PassState:
        if self._plan is not None:
            return PassState(lower(self._plan, tick.step), len(self.sites), self._plan.num_slots)
        # Nothing is ever skipped: one row serves every step.
        computed = (Op.COMPUTE,) * len(self.sites)
        program = Program((computed,) * tick.num_steps, ((),) * tick.num_steps, (-1,) * len(self.sites))
        return PassState(program, len(self.sites), self.driver_slots)

    def _execute(
        self, tick: Tick, state: PassState, call: Call, ops: Sequence[Op], history: Sequence[tuple[int, ...]]
    ) -> Any:
        """Run the denoiser with one op per site."""
        weights: dict[tuple[int, ...], torch.Tensor] = {}
        for index, (tap, op) in enumerate(zip(self._taps, ops, strict=True)):
            slots = state.slots[index]
            if op == Op.STORE:
                slots.insert(0, slots.pop())  # the oldest kept output makes room for the newest
                if slots[0] is None and self._compiled:
                    output = self._cost(call.signature).site_outputs[index]
                    slots[0] = empty_slot(output.shape, output.dtype, output.device)
            elif op == Op.FORECAST:
                read = history[index]
                if read not in weights:
                    values = lagrange_weights(read, tick.step)
                    newest = kept(slots[0])
                    weights[read] = torch.tensor(values, dtype=newest.dtype, device=newest.device)
                tap.weights = weights[read]
            tap.slots = slots
            tap.op = int(op)
            tap.reached = False
        reused = [(tap, kept(tap.slots[0])) for tap in self._taps if tap.op == Op.REUSE]
        versions = [slot._version for _, slot in reused]
        try:
            output = call.inner(*call.args, **call.kwargs)
            if not self._compiled:
                for tap in self._taps:
                    if not tap.reached:
                        raise EngineError(f"a call of the denoiser never reached {tap.site.id}: it can't be cached")
                for (tap, slot), version in zip(reused, versions, strict=True):
                    if slot._version != version:
                        raise EngineError(f"the network writes into the output of {tap.site.id}: it can't be reused")
            return output
        finally:
            for tap in self._taps:
                tap.op = Op.OUTSIDE
            if self._record is not None:
                self._record.calls.append((tick.step, tick.pass_index, call.signature, tuple(ops)))
                self._record.note_bytes(sum(state.num_bytes for state in self._passes.values()))

    def _drop_state(self) -> None:
        self._passes = {}
        self._clock.forget()
        for tap in self._taps:
            tap.op, tap.slots, tap.weights = Op.OUTSIDE, [], None


def enable(target: Any, method: str | Method, *, scheduler: Any = None, max_cache_bytes: int | None = None) -> Handle:
    """Attach a method to a pipeline's denoiser, or to a denoiser itself.

    Args:
        target: a diffusers pipeline with a transformer, or the ``torch.nn.Module`` that is its denoiser. Compile it before.
        method: a method, a combination ``A | B``, or a name of :func:`sostenuto.available_methods`.
        scheduler: the scheduler that drives the denoiser; by default the pipeline's, also when that is replaced later.
        max_cache_bytes: most bytes of kept features for each pass of a generation; where the plan needs more, the last
            sites of the network are computed always.

    Returns:
        A handle with the statistics and ``disable()``; also a context manager.

    Raises:
        AlreadyEnabledError: a method is attached already.
        AnatomyError: the object has no denoiser, or its sites are not known.
        MethodError, TableError: the method is unknown, or doesn't fit this model and scheduler.
    """
    denoiser = compat.find_denoiser(target)
    if handle_of(denoiser) is not None:
        raise AlreadyEnabledError(
            f"sostenuto is enabled on this {type(compat.unwrapped(denoiser)).__name__} already: disable it first"
        )
    if isinstance(method, str):
        method = by_name(method)
    if not isinstance(method, Method):
        raise MethodError(f"a method is a name or a method object, not {method!r}: see sostenuto.available_methods()")
    if max_cache_bytes is not None and not (isinstance(max_cache_bytes, int) and max_cache_bytes >= 0):
        raise MethodError(f"max_cache_bytes must be a whole number of 0 or more, not {max_cache_bytes!r}")
    if scheduler is None and denoiser is target:
        raise MethodError("a bare denoiser needs its scheduler to tell the step of a call: pass scheduler=…")
    handle = Handle(denoiser, lambda: target.scheduler if scheduler is None else scheduler, method, max_cache_bytes)
    handle._attach()
    return handle


def disable(target: Any) -> None:
    """Take a method off a pipeline's denoiser or a denoiser; does nothing where none is attached.

    Raises:
        AnatomyError: the object has no denoiser.
    """
    handle = handle_of(compat.find_denoiser(target))
    if handle is not None:
        handle.disable()


def handle_of(denoiser: nn.Module) -> Handle | None:
    """The handle of what is attached to a denoiser."""
    return vars(compat.unwrapped(denoiser)).get(_ATTRIBUTE)
