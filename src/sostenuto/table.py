"""The cache table: a static plan on disk, validated on load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from sostenuto.correct import check_noise_scale
from sostenuto.errors import MethodError, TableError
from sostenuto.files import publish_json
from sostenuto.forecast import check_forecast_order
from sostenuto.measured import check_made_for, check_timesteps, read_json, table_file
from sostenuto.plan import Action, Plan
from sostenuto.sites import CLEAN_SAMPLE, Site, inspect, stack
from sostenuto.step_state import StepActions, StepState, check_state, is_computed
from sostenuto.table_content import FORMAT, MAX_STEPS, VERSION, read_fields, read_npy, states_of

Fill = Literal["branches", "stack", "sample"]
"""What is kept for a step that reuses everything, see :class:`CacheTable`."""
FILLS: tuple[Fill, ...] = get_args(Fill)


@dataclass(frozen=True)
class CacheTable:
    """Actions and noise scale of every step, in sampling order (step 0 is the noisiest).

    Attributes:
        actions: for each step a :class:`StepState`, or a map from site id to :class:`~sostenuto.plan.Action`.
        method: name of the method that made it.
        eps_scale: factor of the predicted noise, one per step.
        forecast_order: how reused branches are filled: 0 last value, 1 linear extrapolation, …; one number or one per step.
        fill: what is kept for a step that reuses everything: the outputs of its ``"branches"``, as in the papers; or one
            tensor, what the whole ``"stack"`` of blocks adds to its input: the step then costs next to nothing; or the clean
            ``"sample"`` that follows from what the network predicts: the step spares the whole call, and its prediction
            follows the noise that an ancestral sampler has put in since.
        model: ``class``, ``num_blocks`` and ``fingerprint`` of the network it was made for; empty: any.
        scheduler: ``class``, ``prediction_type`` and ``timesteps`` of the scheduler it was made for; empty: any.
        calibration: how it was made.
        macs_fraction: multiply-accumulates of a generation with it, of one without.
        include_cross: whether a :class:`StepState` that reuses attention reuses cross-attention too; else that is computed at
            every step, which only ``fill="branches"`` can do. The papers don't say.
    """

    actions: tuple[StepActions, ...]
    method: str = "eb"
    eps_scale: tuple[float, ...] = ()
    forecast_order: int | tuple[int, ...] = 0
    fill: Fill = "branches"
    model: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    macs_fraction: float | None = None
    include_cross: bool = True

    def __post_init__(self) -> None:
        if not self.actions:
            raise TableError("a cache table needs at least one step")
        for step, state in enumerate(self.actions):
            check_state(state, step)
        if not is_computed(self.actions[0]):
            raise TableError(
                "step 0 must be 'compute': there is nothing to reuse yet (is the order of the table right?)"
            )
        if self.fill not in FILLS:
            raise TableError(f"fill must be {', '.join(map(repr, FILLS[:-1]))} or {FILLS[-1]!r}, not {self.fill!r}")
        try:
            check_include_cross(self.include_cross, self.fill)
            for order in self.forecast_orders:
                check_forecast_order(order)
            if len(self.forecast_orders) != self.num_inference_steps:
                raise MethodError(
                    f"forecast_order has {len(self.forecast_orders)} entries for {len(self.actions)} steps"
                )
            scale = check_noise_scale(1.0 if self.eps_scale == () else self.eps_scale, self.num_inference_steps)
        except MethodError as error:
            raise TableError(f"cache table: {error}") from None
        object.__setattr__(self, "eps_scale", scale)

    @property
    def num_inference_steps(self) -> int:
        """Number of steps."""
        return len(self.actions)

    @property
    def forecast_orders(self) -> tuple[int, ...]:
        """How reused branches are filled at every step."""
        order = self.forecast_order
        return order if isinstance(order, tuple) else (order,) * self.num_inference_steps

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The sites that the table is about: all branches, and after them the whole stack or the sample where that is kept.

        A table that reuses whole samples and nothing else is about no branch, and fits any denoiser.
        """
        wholes = whole_sites(denoiser, self.fill) if StepState.REUSE_BOTH in self.actions else []
        if (
            self.fill == "sample"
            and wholes
            and all(a in (StepState.COMPUTE, StepState.REUSE_BOTH) for a in self.actions)
        ):
            return wholes
        return inspect(denoiser) + wholes

    def plan(self, sites: Sequence[Site]) -> Plan:
        """The plan for a network with these sites, see :meth:`sites`.

        Raises:
            TableError: a step names a site that the network lacks, or leaves one out.
        """
        whole = next((site for site in sites if site.kind.is_whole), None)
        ids = {site.id for site in sites if site is not whole}
        rows = []
        for step, (state, order) in enumerate(zip(self.actions, self.forecast_orders, strict=True)):
            gap = Action.FORECAST if order else Action.REUSE
            if state is StepState.REUSE_BOTH and whole is not None:
                rows.append(tuple(Action.SKIP if whole.covers(site) else gap for site in sites))
                continue
            if isinstance(state, StepState):
                skipped = [site is not whole and state.skips(site, self.include_cross) for site in sites]
                rows.append(tuple(gap if skip else Action.COMPUTE for skip in skipped))
                continue
            if set(state) != ids:
                odd = sorted(set(state) ^ ids)[0]
                raise TableError(
                    f"step {step} of the cache table and the network disagree about site {odd!r}: calibrate a table for this "
                    "network with sostenuto.calibrate"
                )
            rows.append(tuple(Action.COMPUTE if site is whole else state[site.id] for site in sites))
        order = self.forecast_order
        lowest = tuple(max(1, o) for o in order) if isinstance(order, tuple) else max(1, order)
        return Plan(tuple(rows), forecast_order=lowest)

    def check(self, denoiser: nn.Module, scheduler: Any) -> None:
        """Refuse a network or scheduler that the table was not made for.

        Raises:
            TableError: with both names and the remedy.
        """
        check_made_for("cache table", self.model, self.scheduler, denoiser, scheduler)

    def check_steps(self, timesteps: Sequence[float]) -> None:
        """Refuse a generation of another length or with other timesteps.

        Raises:
            TableError: with both numbers and the remedy.
        """
        if len(timesteps) != self.num_inference_steps:
            raise TableError(
                f"the cache table has {self.num_inference_steps} steps, the sampler runs {len(timesteps)}: pass "
                f"num_inference_steps={self.num_inference_steps}, calibrate again, or use table.resample({len(timesteps)})"
            )
        own = self.scheduler.get("timesteps")
        if own:
            check_timesteps("cache table", own, timesteps)

    def resample(self, num_inference_steps: int) -> CacheTable:
        """The table stretched or squeezed to another number of steps, by position in the trajectory; step 0 computes."""
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= MAX_STEPS:
            raise TableError(
                f"num_inference_steps must be a whole number from 1 to {MAX_STEPS}, not {num_inference_steps!r}"
            )
        scale = self.num_inference_steps / num_inference_steps
        source = [min(self.num_inference_steps - 1, int((p + 0.5) * scale)) for p in range(num_inference_steps)]
        source[0] = 0
        scheduler = {key: value for key, value in self.scheduler.items() if key != "timesteps"}
        return replace(
            self,
            actions=tuple(self.actions[p] for p in source),
            eps_scale=tuple(self.eps_scale[p] for p in source),
            forecast_order=_one_or_all(tuple(self.forecast_orders[p] for p in source)),
            scheduler=scheduler,
            macs_fraction=None,
        )

    def filled(self, forecast_order: int) -> CacheTable:
        """The table with its skipped branches filled by a polynomial of this degree: 0 last value, 1 linear, …"""
        gap = Action.FORECAST if forecast_order else Action.REUSE
        skipped = (Action.REUSE, Action.FORECAST)
        actions = tuple(
            state
            if isinstance(state, StepState)
            else {site: gap if action in skipped else action for site, action in state.items()}
            for state in self.actions
        )
        return replace(self, actions=actions, forecast_order=forecast_order)

    def strip(self) -> str:
        """One letter per step: ``·`` compute, ``a`` reuse attention, ``m`` reuse MLP, ``B`` reuse both, ``?`` per site."""
        letters = dict(zip(StepState, "·amB", strict=True))
        return "".join(letters[state] if isinstance(state, StepState) else "?" for state in self.actions)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        actions = [
            state.value if isinstance(state, StepState) else {site: action.value for site, action in state.items()}
            for state in self.actions
        ]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "order": "sampling",
            "num_inference_steps": self.num_inference_steps,
            "eps_scale": _one_or_all(self.eps_scale),
            "forecast_order": self.forecast_order,
            "fill": self.fill,
            "include_cross": self.include_cross,
            "actions": actions,
            "model": dict(self.model),
            "scheduler": dict(self.scheduler),
            "calibration": dict(self.calibration),
            "macs_fraction": self.macs_fraction,
        }
        publish_json(path, content, indent=1)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CacheTable:
        """The table that a file with this content holds.

        Raises:
            TableError: the content is no valid table.
        """
        return cls(**read_fields(content, None))

    @classmethod
    def from_numbers(cls, numbers: Sequence[int], order: str = "timestep_index", **fields: Any) -> CacheTable:
        """The table that EB-Cache's authors write in numbers.

        Args:
            numbers: one per step: 0 compute, 1 reuse attention, 2 reuse both; 3, of FEB-Cache's text, reuse the MLP.
            order: ``"timestep_index"`` (entry 0 is the last, cleanest step), as their loop reads them, or ``"sampling"``.
            fields: the other fields of the table.

        Raises:
            TableError: a number or the order is not known, or step 0 reuses.
        """
        return cls(states_of(numbers, order), **fields)

    @classmethod
    def load(cls, path: str | Path, order: str | None = None) -> CacheTable:
        """Read a table: our JSON, or the EB-Cache authors' bare ``.npy`` of 0, 1, 2.

        Args:
            path: the file.
            order: ``"sampling"`` or ``"timestep_index"`` (entry 0 is the last, cleanest step). For JSON by default what the
                file says; for ``.npy`` the default is ``"timestep_index"``, the order in which the authors' loop reads it.

        Raises:
            TableError: the file can't be read or its content is wrong; the message names the field and value.
        """
        path = table_file(path, "cache table")
        is_npy = path.suffix == ".npy"
        content = read_npy(path) if is_npy else read_json(path, "cache table")
        try:
            if is_npy:
                return cls.from_numbers(content, order or "timestep_index")
            return cls(**read_fields(content, order))
        except TableError as error:
            raise TableError(f"{path}: {error}") from None


def whole_sites(denoiser: nn.Module, fill: Fill) -> list[Site]:
    """The site of a step that reuses everything at once; none where every branch is kept by itself."""
    if fill == "branches":
        return []
    return [stack(denoiser) if fill == "stack" else CLEAN_SAMPLE]


def check_include_cross(include_cross: object, fill: str) -> None:
    """Refuse cross-attention that is computed at every step where the whole stack is kept as one.

    Raises:
        MethodError: that, or the value is neither true nor false.
    """
    if not isinstance(include_cross, bool):
        raise MethodError(f"include_cross must be true or false, not {include_cross!r}")
    if fill != "branches" and not include_cross:
        raise MethodError(
            f"include_cross=False computes cross-attention at every step, but fill={fill!r} skips it with its block: use "
            "fill='branches'"
        )


def _one_or_all(values: tuple[Any, ...]) -> Any:
    """One value where all are the same."""
    return values[0] if len(set(values)) == 1 else values
