"""A whole run: case after case, each row on the disk as soon as it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sostenuto.bench.cases import Case, Settings, key_of
from sostenuto.bench.isolation import measure_isolated
from sostenuto.bench.machine import prepare
from sostenuto.bench.rows import ResultsFile, Row
from sostenuto.bench.runner import check, measure
from sostenuto.bench.sharing import environment_of_a_row, forget, measure_shared
from sostenuto.distributed.world import on_main, world
from sostenuto.errors import InputError
from sostenuto.progress import progress

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a run has to show.

    Attributes:
        rows: of the cases that were asked for, in their order.
        machine: what they were measured on.
        settings: how the run was set.
        unwritten: why rows are missing in the results file, where some are.
    """

    rows: list[Row]
    machine: dict[str, Any]
    settings: Settings
    unwritten: str | None = None

    def content(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        sampled = [row.n for row in self.rows if row.n]
        return {
            "rows": [row.as_dict() for row in self.rows],
            "n": max(sampled, default=0),
            "seed": self.settings.seed,
            "machine": self.machine,
        }


def run(
    cases: Sequence[Case],
    settings: Settings,
    folder: Path,
    *,
    isolate: bool = True,
    time_limit: float = 1800.0,
    retry: bool = False,
    fresh: bool = False,
    show: bool = True,
) -> Outcome | None:
    """Measure what is missing of the cases in ``folder/results.jsonl``.

    Processes that are :func:`~sostenuto.distributed.joined` share the rows where that leaves the times what they are
    (:mod:`sostenuto.bench.sharing`); the first one returns the outcome, the others ``None``.

    Args:
        cases: what to measure.
        settings: of the run.
        folder: where the results and the first images lie; made if need be.
        isolate: whether each row has a process of its own, with ``time_limit`` seconds to its end; else all run in this
            one, without a limit.
        time_limit: seconds for a row.
        retry: whether to measure again what ended in an error.
        fresh: whether to forget what the folder holds, once it is known that the cases can be measured.
        show: a progress bar.

    Raises:
        InputError: a case is misspelt, or the folder holds results of another version or machine.
    """
    if not cases:
        raise InputError("there is nothing to measure: name a --suite or --methods, and check --only")
    if time_limit <= 0:
        raise InputError(f"--time-limit must be above 0 seconds, not {time_limit:g}")
    for case in cases:
        check(case)
    keys = [key_of(case, settings) for case in cases]
    keyed = dict(zip(keys, cases, strict=True))
    machine, unwritten = prepare(settings), None
    if fresh:
        on_main(lambda: (forget(folder), (folder / RESULTS).unlink(missing_ok=True)))

    def measured(case: Case) -> Row:
        if not isolate or case.kind != "measure":
            return measure(case, settings, folder)
        return measure_isolated(case, settings, folder, time_limit, environment=environment_of_a_row())

    def missing(file: ResultsFile) -> list[str]:
        return [key for key in keyed if key not in file.rows or (retry and file.rows[key].error)]

    if world().size > 1:

        def begin() -> list[str]:
            known = ResultsFile(folder / RESULTS, machine)
            todo = missing(known)
            forget(folder, [key for key in todo if key in known.rows])
            return todo

        found = measure_shared(folder, machine, settings, begin, lambda key: measured(keyed[key]))
        if found is None or not world().is_main:
            return None
        file = ResultsFile(folder / RESULTS, machine)
        for row in found.values():
            unwritten = file.append(row)
    else:
        file = ResultsFile(folder / RESULTS, machine)
        todo = missing(file)
        with progress(total=len(cases), desc="bench", show=show) as bar:
            bar.update(len(cases) - len(todo))
            for key in todo:
                unwritten = file.append(measured(keyed[key]))
                bar.update()
    return Outcome([file.rows[key] for key in keys], machine, settings, unwritten)
