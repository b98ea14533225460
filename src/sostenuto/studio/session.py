"""What the studio does: generate with two methods from the same noise and tell of every step; keep edited plans."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sostenuto
from sostenuto.anatomy import SiteKind
from sostenuto.compat import after_calls
from sostenuto.engine import Handle
from sostenuto.errors import InputError
from sostenuto.measured import identity
from sostenuto.methods import EBCache, NoCache
from sostenuto.methods.base import Method
from sostenuto.pipelines import parameters_of, pictures
from sostenuto.plan import Action
from sostenuto.sites import has_stack
from sostenuto.step_state import StepState
from sostenuto.studio.catalogue import choose, names
from sostenuto.switch import check_not_switched_off
from sostenuto.table import CacheTable
from sostenuto.timesteps import called_timesteps

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_STEPS = 1000
EDITED = "edited plan"
"""The choice that runs the plan which is being edited."""


class _CancelledError(Exception):
    """The page went away."""


@dataclass(frozen=True)
class Wish:
    """What to generate, checked.

    Attributes:
        subject: a class label for a pipeline that takes labels, else a prompt.
        seed: of the initial noise and the sampler's own.
        num_inference_steps: steps.
        guidance_scale: classifier-free guidance.
        sides: for each of the two sides the method's name, the budget, and the edited plan where that is chosen.
    """

    subject: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sides: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Wish:
        """Checked values of what the page sent.

        Raises:
            InputError: a value is missing or makes no sense.
        """
        try:
            wish = cls(
                str(data["subject"]),
                int(data["seed"]),
                int(data["num_inference_steps"]),
                float(data["guidance_scale"]),
                tuple(data["sides"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the request can't be read: {error}") from None
        if not 2 <= wish.num_inference_steps <= _MOST_STEPS:
            raise InputError(f"the number of steps must be 2 to {_MOST_STEPS}, not {wish.num_inference_steps}")
        if not 1 <= len(wish.sides) <= 2 or not all(isinstance(side, Mapping) for side in wish.sides):
            raise InputError("a request has one or two sides")
        return wish


class Session:
    """One pipeline and a folder of tables.

    Args:
        pipe: the pipeline.
        tables: folder of the saved tables; made when the first one is saved.
        results: a results file with a frontier to show, or ``None``.

    Raises:
        EngineError: caching is switched off.
    """

    def __init__(self, pipe: Any, tables: Path, results: Path | None = None) -> None:
        check_not_switched_off("the studio")
        self.pipe, self.tables, self.results = pipe, tables, results
        self._busy = threading.Lock()
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        self._takes = parameters_of(pipe)
        self._schedulers: dict[int, Any] = {}  # as a generation of so many steps left it

    def describe(self) -> dict[str, Any]:
        """What the page needs to know at its beginning."""
        labels = self._takes_labels
        names_of_classes: list[str] = []
        if labels and type(self.pipe).__name__ == "DemoPipeline":
            from sostenuto.demo.network import CLASS_NAMES

            names_of_classes = list(CLASS_NAMES)
        return {
            "model": type(self._denoiser).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "methods": [*names(), EDITED],
            "subjects": names_of_classes,
            "takes_labels": labels,
            "num_inference_steps": 50,
            "version": sostenuto.__version__,
        }

    def _scheduler(self, num_inference_steps: int) -> Any:
        """A scheduler like the pipeline's with the timesteps of so many steps: those that ran, where some did.

        Pipelines may choose their own (sigmas, shifts by the size of the image).
        """
        if num_inference_steps in self._schedulers:
            return self._schedulers[num_inference_steps]
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        shifted = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(num_inference_steps, **shifted)
        return scheduler

    def _num_calls(self, num_inference_steps: int) -> int:
        """Of the network, in a generation of so many steps."""
        return len(called_timesteps(self._scheduler(num_inference_steps)))

    @property
    def _takes_labels(self) -> bool:
        return "class_labels" in self._takes

    @property
    def _denoiser(self) -> Any:
        return next(getattr(self.pipe, name) for name in ("transformer", "unet") if hasattr(self.pipe, name))

    # --- generating ----------------------------------------------------------------------------------------------

    def generate(self, wish: Wish) -> Iterator[dict[str, Any]]:
        """Events: ``step`` for each step of each side, ``image`` at the end of a side, ``done``, or ``error``.

        Closing the iterator stops the generation at its next step.
        """
        if not self._busy.acquire(blocking=False):
            yield {"event": "error", "message": "another generation is under way: wait for its end"}
            return
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                for side, asked in enumerate(wish.sides):
                    self._side(side, asked, wish, events, cancelled)
                events.put({"event": "done"})
            except _CancelledError:
                pass
            except Exception as error:  # whatever a pipeline raises is told to the page
                events.put({"event": "error", "message": " ".join(str(error).split()) or type(error).__name__})
            finally:
                self._busy.release()
                events.put(None)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            cancelled.set()

    def _side(
        self,
        side: int,
        asked: Mapping[str, Any],
        wish: Wish,
        events: queue.Queue[dict[str, Any] | None],
        cancelled: threading.Event,
    ) -> None:
        method = self._method(asked, wish.num_inference_steps)
        with sostenuto.enable(self.pipe, method) as handle:

            def told(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if cancelled.is_set():
                    raise _CancelledError
                row = _groups(handle) if isinstance(handle, Handle) else {}
                total = len(called_timesteps(self.pipe.scheduler))  # of some schedulers more than steps were asked for
                events.put({"event": "step", "side": side, "step": step, "total": total, "row": row})
                return {}

            generator = torch.Generator().manual_seed(wish.seed)
            began = time.perf_counter()
            given = self._arguments(wish, generator)
            if "callback_on_step_end" in self._takes:
                output = self.pipe(**given, callback_on_step_end=told)
            else:
                done = itertools.count()
                with after_calls(self.pipe.scheduler, step=lambda: told(self.pipe, next(done), None, {})):
                    output = self.pipe(**given)
            seconds = time.perf_counter() - began
            stats = handle.stats
        self._schedulers[wish.num_inference_steps] = copy.deepcopy(self.pipe.scheduler)
        events.put(
            {
                "event": "image",
                "side": side,
                "image": _data_url(pictures(output)[0]),
                "method": repr(method) if not isinstance(method, EBCache) else asked.get("method", "eb"),
                "seconds": seconds,
                "macs": stats.macs,
                "macs_uncached": stats.macs_uncached,
                "ideal_speedup": stats.ideal_speedup,
                "cache_bytes_peak": stats.cache_bytes_peak,
                "states": _states(stats.plan, stats.site_kinds),
                "num_inference_steps": wish.num_inference_steps,
                **_filling(handle),
            }
        )

    def _arguments(self, wish: Wish, generator: torch.Generator) -> dict[str, Any]:
        given: dict[str, Any] = {"num_inference_steps": wish.num_inference_steps, "generator": generator}
        if "guidance_scale" in self._takes:
            given["guidance_scale"] = wish.guidance_scale
        if self._takes_labels:
            try:
                given["class_labels"] = [int(wish.subject)]
            except ValueError:
                raise InputError(f"{wish.subject!r} is no class label: it must be a whole number") from None
        else:
            given["prompt"] = wish.subject
        return given

    def _method(self, asked: Mapping[str, Any], num_steps: int) -> Method:
        name = asked.get("method")
        if name == EDITED:
            return EBCache(self.table_of(asked.get("plan") or {}, num_steps))
        if name == "none":
            return NoCache()
        scheduler = self._scheduler(num_steps)
        timesteps = tuple(called_timesteps(scheduler).tolist())
        speedup = asked.get("speedup", 2.0)
        if not isinstance(speedup, int | float):
            raise InputError(f"the budget must be a number, not {speedup!r}")
        return choose(str(name), float(speedup), self._denoiser, scheduler, timesteps)

    # --- plans ---------------------------------------------------------------------------------------------------

    def table_of(self, plan: Mapping[str, Any], num_steps: int | None = None) -> CacheTable:
        """The cache table of an edited plan: ``states``, ``eps_scale``, ``forecast_order`` and ``fill``.

        Raises:
            TableError: it is no valid plan.
            InputError: it has another number of steps than the generation.
        """
        states = plan.get("states")
        if not isinstance(states, list) or not states:
            raise InputError("there is no plan yet: generate once, or load a table")
        ran = None if num_steps is None else self._num_calls(num_steps)
        if ran is not None and len(states) != ran:
            raise InputError(f"the plan has {len(states)} steps, the generation {ran}: use the same number")
        content = {
            "format": "sostenuto-cache-table",
            "version": 1,
            "method": "eb",
            "order": "sampling",
            "num_inference_steps": len(states),
            "eps_scale": plan.get("eps_scale", 1.0),
            "forecast_order": plan.get("forecast_order", 0),
            "fill": plan.get("fill") or ("stack" if has_stack(self._denoiser) else "branches"),
            "actions": states,
        }
        return CacheTable.from_dict(content)

    def saved(self) -> list[str]:
        """Names of the saved tables."""
        return sorted(path.stem for path in self.tables.glob("*.json")) if self.tables.is_dir() else []

    def save(self, name: str, plan: Mapping[str, Any]) -> str:
        """Save an edited plan as a cache table of this model; returns the file's name.

        Raises:
            InputError: the name is not a plain one.
            TableError: the plan is not valid.
        """
        table = self.table_of(plan)
        steps = plan.get("num_inference_steps", table.num_inference_steps)
        if not isinstance(steps, int) or not 2 <= steps <= _MOST_STEPS:
            raise InputError(f"the number of steps must be 2 to {_MOST_STEPS}, not {steps!r}")
        scheduler = self._scheduler(steps)
        calls = len(called_timesteps(scheduler))
        if calls != table.num_inference_steps:
            raise InputError(
                f"the plan has {table.num_inference_steps} steps, a generation {calls}: generate with it first"
            )
        table = replace(table, **identity(self._denoiser, scheduler))
        path = self._path(name)
        self.tables.mkdir(parents=True, exist_ok=True)
        table.save(path)
        return path.name

    def load(self, name: str) -> dict[str, Any]:
        """A saved table as the page edits it.

        Raises:
            InputError: there is no such table, or it is not one of whole steps.
        """
        path = self._path(name)
        if not path.is_file():
            raise InputError(f"there is no table {name!r} in {self.tables}")
        table = CacheTable.load(path)
        if not (table.include_cross and all(isinstance(state, StepState) for state in table.actions)):
            raise InputError(
                f"{name} has actions of single sites, or of cross-attention apart: that can't be edited here"
            )
        calls = table.num_inference_steps
        # Of a solver of second order a step is two calls, and the last one or two.
        ways = (steps for steps in (calls, (calls + 1) // 2) if steps <= _MOST_STEPS)
        steps = next((steps for steps in ways if self._num_calls(steps) == calls), calls)
        return {
            "num_inference_steps": steps,
            "states": [state.value for state in table.actions if isinstance(state, StepState)],
            "eps_scale": list(table.eps_scale),
            "forecast_order": table.forecast_order,
            "fill": table.fill,
        }

    def _path(self, name: str) -> Path:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name for a table: use letters, digits, '.', '_' and '-'")
        return self.tables / f"{name.removesuffix('.json')}.json"

    def frontier(self) -> list[dict[str, Any]]:
        """The rows of the results file, as far as they can be drawn, with the plan of each where it has one.

        Raises:
            InputError: the file can't be read.
        """
        if self.results is None:
            return []
        try:
            text = self.results.read_text(encoding="utf-8")
            try:
                rows = json.loads(text)["rows"]
            except json.JSONDecodeError:  # a line for every row
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return [_point(row) for row in rows if row.get("speedup") and row.get("frechet_distance") is not None]
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{self.results} is no results file: {error}") from None


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    point = {key: row.get(key) for key in ("name", "method", "num_inference_steps", "speedup", "frechet_distance")}
    if row.get("plan") and row.get("site_kinds"):
        point["states"] = _states(row["plan"], row["site_kinds"])
        point["eps_scale"] = row.get("eps_scale") or 1.0
    return point


def _groups(handle: Handle) -> dict[str, str]:
    """What the last call did, by group of sites: the one action, or ``"mixed"``."""
    found: dict[str, set[str]] = {}
    for site, action in zip(handle.sites, handle.last_actions, strict=False):
        found.setdefault(_group(site.kind.value), set()).add(action)
    whole = found.pop("whole", set())
    if found and whole - {"compute"}:
        found = dict.fromkeys(found, whole)
    return {
        group: "mixed" if len(actions) > 1 else next(iter(actions), "compute")  # without a site everything is computed
        for group, actions in (found or {"whole": whole}).items()
    }


def _filling(handle: Any) -> dict[str, Any]:
    """How the gaps of the last generation were filled and its noise scaled, as a table says it."""
    plan, scale = getattr(handle, "plan", None), getattr(handle, "noise_scale", None)
    forecasts = plan is not None and any(Action.FORECAST in row for row in plan.actions)
    factors = 1.0
    if plan is not None and scale is not None:
        reused = [any(action is not Action.COMPUTE for action in row) for row in plan.actions]
        factors = [scale.at(step, skips) for step, skips in enumerate(reused)]
    return {
        "forecast_order": plan.forecast_order if plan is not None and forecasts else 0,
        "fill": _fill(getattr(handle, "sites", ())),
        "eps_scale": factors,
    }


def _fill(sites: Sequence[Any]) -> str:
    """What of these sites is kept for a step that reuses everything."""
    if any(site.clean for site in sites):
        return "sample"
    return "stack" if any(site.kind is SiteKind.BLOCKS for site in sites) else "branches"


def _group(kind: str) -> str:
    if "attention" in kind:
        return "attention"
    return "mlp" if kind in ("mlp", "fused") else "whole"


def _states(plan: list[list[str]], kinds: list[str]) -> list[str]:
    """The plan as states of whole steps: a group counts as reused where most of its sites are."""
    states = []
    for row in plan:
        skipped = {"attention": [], "mlp": [], "whole": []}
        for action, kind in zip(row, kinds, strict=True):
            skipped[_group(kind)].append(action not in ("compute", "partial"))
        if any(skipped["whole"]):
            states.append(StepState.REUSE_BOTH.value)
            continue
        reused = {group for group, values in skipped.items() if values and sum(values) * 2 > len(values)}
        state = next(state for state in StepState if state.groups == reused - {"whole"})
        states.append(state.value)
    return states


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
