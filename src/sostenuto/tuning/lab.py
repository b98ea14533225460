"""Measurements and trials for the tuner: what they cost is counted, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sostenuto.calibrations.base import Settings
from sostenuto.clock import Tick
from sostenuto.distributed.world import apart, gather, on_main, spread, world
from sostenuto.engine import Handle
from sostenuto.errors import InputError, MethodError
from sostenuto.files import publish_json
from sostenuto.measured import is_number, parse_json
from sostenuto.methods import EBCache, NoCache
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tuning.generate import generate
from sostenuto.tuning.instrument import filled_call, ops_of, tapped_for
from sostenuto.tuning.instrumented import forget_begun, instrumented_run
from sostenuto.tuning.measurement import Kind, Measurement, instrumented_share, joined_kinds, reaches
from sostenuto.tuning.rehearsal import Rehearsal, rehearse

T = TypeVar("T")
R = TypeVar("R")


AGAIN = "again"
"""The bench on which what was scored is scored once more, with noise of its own."""
CLOSER = "closer"
"""The bench on which what is nearest is compared once more, on other and more samples."""


class _Bench(NamedTuple):
    """What a trial runs.

    Attributes:
        like: the bench whose sample it takes, and that was rehearsed.
        stream: what is added to the seed.
        times: samples, times those of a trial; where images are scored the sample says how many.
        alone: whether nothing uncached stands beside it.
    """

    like: str
    stream: int
    times: int = 1
    alone: bool = False


_BENCHES = {
    "paired": _Bench("paired", 1),
    "scored": _Bench("scored", 2),
    AGAIN: _Bench("scored", 3, alone=True),
    CLOSER: _Bench("paired", 4, times=4),
}
_WORST = 1e29  # error and score of a plan that makes what is not finite: no other is worse


@dataclass(frozen=True)
class Trial:
    """What some generations with a table were like, against uncached ones with the same noise.

    Attributes:
        error: of the latents that the last step is given the mean square difference of each sample, over the variance of all
            uncached ones; the geometric mean over the samples, as PSNR is averaged: few that became another picture say
            little of how near the others are. Nothing where a score was all that was asked for.
        score: what ``score`` says of the results, lower is better; ``None`` where it was not asked.
        norms: mean over samples of the root mean square of the predicted noise at every step, before it is scaled; empty where
            what the network predicts has no known noise.
        work: multiply-accumulates, in uncached generations of one row.
        seconds: wall time for each row.
        machine: that it was timed on.
    """

    error: float
    score: float | None
    norms: tuple[float, ...]
    work: float
    seconds: float
    machine: str = ""


_TRIAL, _RESPONSE = {field.name for field in fields(Trial)}, {"left", "work"}


class Lab:
    """Runs what the tuner wants to know, keeps it in a folder, and counts what it cost.

    Instrumented runs, trials and scored trials have noise of their own each. The processes of a launch share what is asked for,
    all of them know what one found, and the first one writes it.

    Args:
        settings: target, sampler and samples, as for a calibration.
        folder: where results are kept; ``None``: nowhere.
        trial_samples: rows of a trial that is not scored.
        spent: is told how much was done, in uncached generations of one row.
        max_work: the most that may be done, the same way.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path | None,
        trial_samples: int,
        spent: Callable[[float], object],
        max_work: float = math.inf,
    ) -> None:
        self.settings, self.folder, self._trial_samples, self._spent = settings, folder, trial_samples, spent
        self.max_work, self.reserve, self.was_short = max_work, 0.0, False
        """``reserve`` is kept for what must yet be done; ``was_short`` tells whether anything was left out for want of work."""
        self.work = 0.0
        """What was done so far, in uncached generations of one row; what was found in the folder counts too."""
        self._ahead = 0.0  # of that what was shown as it was done, and is counted when it is asked for
        self.rehearsals: dict[str, Rehearsal] = {}
        self._counted: set[str] = set()
        self._final: dict[str, torch.Tensor] = {}  # latents of the uncached trials
        self._probed: torch.Tensor | None = None
        self._trials = {key: Trial(**{**t, "norms": tuple(t["norms"])}) for key, t in self._load("trials.json").items()}
        self._responses: dict[str, dict[str, float]] = self._load("response.json")

    # --- what it costs -------------------------------------------------------------------------------------------

    def rehearse(self, kinds: Sequence[Kind]) -> None:
        """Learn what the samples are, before any of it is done for real."""
        benches = ["paired"] if self.settings.score is None else ["paired", "scored"]
        tapped = tapped_for(tuple(kinds))

        def one(bench: str) -> Rehearsal:
            settings, stream = self._bench(bench)
            return rehearse(replace(settings, num_samples=1), stream, tapped, kinds)

        self.rehearsals = dict(zip(benches, shared(one, benches), strict=True))
        self.count(sum(rehearsal.work for rehearsal in self.rehearsals.values()), "rehearsals")

    def rows(self, num_samples: int, bench: str = "paired") -> int:
        """Rows that so many samples are generated in: whole calls of the sample, once it was rehearsed."""
        rehearsal = self.rehearsals.get(_BENCHES[bench].like)
        size = 1 if rehearsal is None else rehearsal.rows
        return math.ceil(num_samples / size) * size

    def size(self, bench: str) -> int:
        """Rows of a trial."""
        return self.rows(self._bench(bench)[0].num_samples, bench)

    def price(self, bench: str, table: CacheTable | None) -> float:
        """What a trial costs, in uncached generations of one row; nothing once it was counted."""
        return 0.0 if _name(bench, table) in self._counted else self.size(bench) * _share(table)

    def affordable(self, bench: str, tables: Sequence[CacheTable | None], keep: float = 0.0) -> list[bool]:
        """Which of some trials may be made, the first ones first, when so much is kept for what comes after them."""
        able, work = [], keep
        for table in tables:
            price = self.price(bench, table)
            able.append(not price or self.can_spend(work + price))
            work += price * able[-1]
        return able

    def can_spend(self, work: float) -> bool:
        """Whether so much more may be done without touching the reserve."""
        can = self.fits(work + self.reserve)
        self.was_short |= not can
        return can

    @property
    def free(self) -> float:
        """How much more may be done without touching the reserve."""
        return max(0.0, self.max_work - self.work - self.reserve)

    def fits(self, work: float) -> bool:
        """Whether so much more may be done at all."""
        return self.work + work <= self.max_work * (1 + 1e-9)

    # --- trials --------------------------------------------------------------------------------------------------

    def trial(self, table: CacheTable | None) -> Trial:
        """What generations with a table are like; ``None``: uncached ones."""
        return self._try("paired", table)

    def scored(self, table: CacheTable | None) -> Trial:
        """The same with the score of what ``score_sample`` makes."""
        return self._try("scored", table)

    def scored_again(self, table: CacheTable) -> Trial:
        """A second score, of other noise: of the plans that scored best on the first some were lucky."""
        return self._try(AGAIN, table)

    def closer(self, table: CacheTable | None) -> Trial:
        """What more generations are like: of the plans that were nearest on few samples some were lucky."""
        return self._try(CLOSER, table)

    def prepare(self, bench: str, tables: Sequence[CacheTable | None]) -> None:
        """Make trials that will be asked for; they count when they are.

        Args:
            bench: ``"paired"``, ``"scored"``, :data:`AGAIN` or :data:`CLOSER`.
            tables: of the trials.
        """
        wanted = {_name(bench, table): table for table in tables}
        fresh = [table for key, table in wanted.items() if key not in self._trials]
        cached = [table for table in fresh if table is not None]
        if cached == fresh != [] and bench not in self._final and not _BENCHES[bench].alone:
            # An earlier run of this folder noted what the uncached ones were like, not their latents.
            self._final[bench] = shared(lambda table: self._made(bench, table)[1], [None])[0]
        for part in ([None],) * (cached != fresh) + tuple(_rounds(cached)):  # nothing is tried before the uncached one
            for table, (trial, latents) in zip(part, shared(lambda one: self._made(bench, one), part), strict=True):
                self._trials[_name(bench, table)] = trial
                self._show(trial.work)
                if table is None:
                    self._final[bench] = latents
            self._save("trials.json", {key: asdict(trial) for key, trial in self._trials.items()})

    def _try(self, bench: str, table: CacheTable | None) -> Trial:
        self.prepare(bench, [table])
        key = _name(bench, table)
        self.count(self._trials[key].work, key)
        return self._trials[key]

    def _made(self, bench: str, table: CacheTable | None) -> tuple[Trial, torch.Tensor]:
        """A trial, and the latents of an uncached one."""
        settings, stream = self._bench(bench)
        run = generate(settings, stream, NoCache() if table is None else EBCache(table))
        latents = torch.cat(run.latents)
        final = latents if table is None else self._final.get(bench, latents)
        differences = (latents - final).square().mean(1)
        error = float(differences.clamp_min(1e-30).log().mean().exp() / final.var().clamp_min(1e-30))
        score = None if settings.score is None else float(settings.score(run.result))
        norms = tuple(float(np.mean(run.norms[step])) for step in sorted(run.norms))
        if not all(abs(value) < _WORST for value in (error, *norms, *(() if score is None else (score,)))):
            if table is None:
                raise MethodError(
                    f"the uncached sampler's {'score is ' + str(score) if math.isfinite(error) else 'latents are not finite'}: "
                    "there is nothing to tune towards"
                )
            error, score, norms = _WORST, None if score is None else _WORST, ()
        work = run.rows * _share(table)
        trial = Trial(error, score, norms, work, run.seconds / run.rows, settings.machine)
        return trial, latents if table is None else latents[:0]

    def _bench(self, bench: str) -> tuple[Settings, int]:
        """What is generated in a trial, and what is added to the seed."""
        settings, (like, stream, times, _) = self.settings, _BENCHES[bench]
        if like == "scored":
            return replace(settings, sample=settings.score_sample or settings.sample, num_samples=1), stream
        return replace(settings, num_samples=times * self._trial_samples, score=None), stream

    # --- what is kept --------------------------------------------------------------------------------------------

    def _load(self, name: str) -> dict[str, Any]:
        return gather(self._read(name))[0]  # the first one's: the others may look when it has begun to write

    def _read(self, name: str) -> dict[str, Any]:
        path = None if self.folder is None else self.folder / name
        if path is None or not path.exists():
            return {}
        try:
            found = dict(parse_json(path.read_text(encoding="utf-8")))
            if not all(_is_known(known) for known in found.values()):
                raise ValueError("it holds something else than numbers")
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} can't be read ({error}): delete it, or use another folder") from None
        return found

    def _save(self, name: str, content: dict[str, Any]) -> None:
        if self.folder is not None and world().is_main:
            known = self._read(name)  # another launch may be at it too
            publish_json(self.folder / name, {**known, **content}, indent=1)

    # --- measurements --------------------------------------------------------------------------------------------

    def measure(self, kinds: tuple[Kind, ...], undisturbed: bool = False) -> Measurement:
        """The instrumented run.

        Args:
            kinds: what it is about; processes share the kinds.
            undisturbed: the first process measures all of them while the others wait: what runs at the same time on one
                machine disturbs its clock.
        """
        path = None if self.folder is None else self.folder / "measurement.npz"
        measured = on_main(lambda: Measurement.load(path) if path is not None and path.exists() else None)
        if measured is None:
            groups = [kinds] if undisturbed or world().size == 1 else [(kind,) for kind in kinds]
            measured = joined_kinds(shared(lambda group: self._measured(group, kinds), groups))
            if path is not None and world().is_main:
                measured.save(path)
                forget_begun(path.parent)
        self.count(measured.work, "measurement")
        return measured

    def _measured(self, kinds: tuple[Kind, ...], all_kinds: tuple[Kind, ...]) -> Measurement:
        rehearsal = self.rehearsals.get("paired")

        def done(rows: int) -> None:
            if rehearsal is not None:
                steps = rehearsal.num_steps
                self._show(rows * instrumented_share(reaches(kinds, steps, all_kinds), rehearsal.macs, steps))

        return instrumented_run(self.settings, self.folder, kinds, all_kinds, done)

    def response(self, kind: Kind, order: int, step: int) -> float:
        """How much of the squared error that one reuse makes in the output is left at the end, after all that follows.

        From a generation that is uncached but for this step, which reuses what the step before kept, or forecasts from as many
        steps as it needs. Both errors are mean squares.
        """
        self.respond([(kind, order, step)])
        known = self._responses[_response(kind, order, step)]
        self.count(known["work"], "probed")  # the uncached generation beside it
        self.count(known["work"], _response(kind, order, step))
        return known["left"]

    def respond(self, reuses: Sequence[tuple[Kind, int, int]]) -> None:
        """Find responses that will be asked for; they count when they are."""
        for part in _rounds([reuse for reuse in reuses if _response(*reuse) not in self._responses]):
            found = shared(lambda reuse: self._responded(*reuse), part)
            self._responses |= {_response(*reuse): one for reuse, one in zip(part, found, strict=True)}
            self._show(sum(one["work"] for one in found))
            self._save("response.json", self._responses)

    @property
    def num_probed(self) -> int:
        """Samples that a response is measured on."""
        return max(1, self.settings.num_samples // 4)

    def _responded(self, kind: Kind, order: int, step: int) -> dict[str, float]:
        probing = replace(self.settings, num_samples=self.num_probed)
        if self._probed is None:
            self._probed = torch.cat(generate(probing, 0, NoCache()).latents)
        caused: list[tuple[float, int]] = []
        work = 0.0
        for near in (step, step + 1, step - 1, step + 2, step - 2):
            run = generate(probing, 0, tapped_for((kind,)), _perturb_at(near, kind, order, caused), order + 1)
            work += run.rows
            # Where a pass began there, as where guidance ends in the middle, it had nothing to reuse; or the reuse overflowed.
            left = float((torch.cat(run.latents) - self._probed).square().mean())
            error = sum(e * n for e, n in caused) / max(1, sum(n for _, n in caused))
            if caused and math.isfinite(left) and math.isfinite(error):
                return {"left": left / max(error, 1e-30), "work": work}
            caused.clear()
        raise MethodError(
            f"nothing could be reused at the steps around {step}: guidance that changes from step to step can't be tuned"
        )

    # --- generations ---------------------------------------------------------------------------------------------

    def count(self, work: float, what: str) -> None:
        """Count what was done, however often it is asked for."""
        if what not in self._counted:
            self._counted.add(what)
            self.work += work
            shown = min(work, self._ahead)
            self._ahead -= shown
            self._spent(work - shown)

    def _show(self, work: float) -> None:
        """Show work as it is done."""
        self._ahead += work
        self._spent(work)


def _is_known(known: Any) -> bool:
    """Whether an entry of a file is a trial, or a response."""
    if not isinstance(known, dict) or known.keys() not in (_TRIAL, _TRIAL - {"machine"}, _RESPONSE):
        return False
    norms, machine = known.get("norms", []), known.get("machine", "")
    values = [
        value for name, value in known.items() if name not in ("norms", "machine") and (name, value) != ("score", None)
    ]
    return isinstance(norms, list) and isinstance(machine, str) and all(map(is_number, [*norms, *values]))


def shared(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """A function of all items on every process, each of which does its share alone."""

    def alone(item: T) -> R:
        with apart():
            return function(item)

    return spread(alone, items)


def _rounds(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as there are processes: what was found is kept after each round."""
    size = world().size
    return (items[start : start + size] for start in range(0, len(items), size))


def _response(kind: Kind, order: int, step: int) -> str:
    return f"{kind.value} {order} {step}"


def _perturb_at(
    step: int, kind: Kind, order: int, caused: list[tuple[float, int]]
) -> Callable[[Handle, Tick, Prober], Any]:
    """Drives a generation that is uncached but for one step, and takes down that step's squared error with its rows."""

    def drive(handle: Handle, tick: Tick, prober: Prober) -> Any:
        read = [op is Op.REUSE for op in ops_of(handle.sites, kind, Op.REUSE)]
        computed = [Op.COMPUTE] * len(read)
        if tick.step != step:
            near = step - order - 1 <= tick.step < step
            return prober.run([Op.STORE if near and own else Op.COMPUTE for own in read])
        wanted = [i for i, own in enumerate(read) if own and i not in prober.state.absent]
        kept = [sum(value is not None for value in prober.state.slots[i]) for i in wanted]
        if min(kept, default=0) <= order:  # a pass that began a moment ago
            return prober.run(computed)
        fresh = prober.run(computed)
        reused = filled_call(prober, kind, range(1, order + 2))
        error = (prober.prediction(reused).float() - prober.prediction(fresh).float()).square().mean()
        caused.append((float(error), prober.batch_size))
        return reused

    return drive


def _share(table: CacheTable | None) -> float:
    """Multiply-accumulates of a table, of the uncached ones."""
    return 1.0 if table is None or table.macs_fraction is None else table.macs_fraction


def _name(bench: str, table: CacheTable | None) -> str:
    return f"{bench} {'uncached' if table is None else key_of(table)}"


def key_of(table: CacheTable) -> str:
    """Names what a table does."""
    does = [
        state.value if isinstance(state, StepState) else sorted((s, a.value) for s, a in state.items())
        for state in table.actions
    ]
    text = json.dumps([does, table.forecast_orders, [round(b, 9) for b in table.eps_scale], table.fill])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
