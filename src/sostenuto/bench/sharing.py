"""Which processes of a launch measure which rows? Whoever is free, but no two on one machine's processors at a time.

Two rows that are timed at once on the same cores slow each other down. So on CPUs one process of each machine measures and the
others end; on GPUs every process has one of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sostenuto.bench.cases import Settings
from sostenuto.bench.rows import Row
from sostenuto.distributed.folder import complete, one_at_a_time
from sostenuto.distributed.world import gather, on_main, world
from sostenuto.errors import InputError

# A row is measured by one process alone, whatever the libraries in it make of these.
_OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def takes_part(settings: Settings) -> bool:
    """Whether this process measures: on GPUs each does, on CPUs the first of every machine."""
    return settings.device == "cuda" or world().local_rank == 0


def measure_shared(
    folder: Path,
    machine: Mapping[str, Any],
    settings: Settings,
    begin: Callable[[], Sequence[str]],
    measure: Callable[[str], Row],
) -> dict[str, Row] | None:
    """Measure rows together with the other processes of the launch, of this machine and of others.

    Args:
        folder: of the run, on a file system that all machines share; a row is in ``folder/rows`` as soon as it is measured, so
            that a process that dies loses the one it was at.
        machine: what this process measures on; it must be the same for all.
        settings: of the run.
        begin: called by the first process before anything is measured; the keys of the rows that are missing.
        measure: measures the row of a key.

    Returns:
        The rows by their keys; ``None`` on a process that does not measure.

    Raises:
        InputError: the machines differ.
    """

    def begun() -> list[str]:
        with one_at_a_time(folder / "run.guard"):
            return list(begin())

    keys = on_main(begun)
    places = gather((dict(machine), takes_part(settings)))
    odd = next((name for name, value in machine.items() if places[0][0].get(name) != value), None)
    if odd is not None:
        raise InputError(
            f"process {world().rank} would measure with {odd} = {machine[odd]!r}, the first one with "
            f"{places[0][0].get(odd)!r}: times of the two can't be compared; launch on machines of one kind"
        )
    idle = sum(not measures for _, measures in places)
    if idle and world().is_main:
        print(
            f"bench: rows that are timed at once on one machine's processors would slow each other down: {idle} of the "
            f"{world().size} processes measure nothing; one process a machine is enough",
            file=sys.stderr,
        )
    if not takes_part(settings):
        return None
    if settings.device == "cuda":
        torch.cuda.set_device(world().device)
    records = complete(folder / "rows", keys, lambda key: measure(key).as_dict(), "bench")
    return {key: Row.from_dict(record) for key, record in zip(keys, records, strict=True)}


def environment_of_a_row() -> dict[str, str] | None:
    """The environment of a row's own process: no launch, and this process's GPU alone; ``None`` where nothing differs."""
    if world().size == 1:
        return None
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        known = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        kept["CUDA_VISIBLE_DEVICES"] = known[torch.cuda.current_device()]
    return kept


def forget(folder: Path, keys: Sequence[str] | None = None) -> None:
    """Delete what processes noted of rows, by default of all, so that they are measured again."""
    names = [f"{key}.json" for key in keys] if keys is not None else [path.name for path in folder.glob("rows/*.json")]
    for name in names:
        (folder / "rows" / name).unlink(missing_ok=True)
