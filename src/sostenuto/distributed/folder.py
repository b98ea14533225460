"""Pieces of work that any number of processes, launches and machines complete in one folder, whichever of them die."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sostenuto.distributed.world import world
from sostenuto.files import publish_json, tidy
from sostenuto.progress import progress

_PAUSE = 0.5  # seconds between two looks at what others have claimed


def complete(
    folder: Path, pieces: Sequence[str], do: Callable[[str], Any], desc: str, *, show_progress: bool = True
) -> list[Any]:
    """Do what is missing of some pieces of work, together with whoever else is at it; returns when all are done.

    A piece is done when ``folder`` holds its record, what ``do`` returned. Whoever works at one holds a lock on it, which the
    system takes back when the process ends, however it ends: then another takes the piece over. A process begins at a place
    of its own and goes on with what others have not begun, so that slow ones are helped. There is no other communication.

    Args:
        folder: for the records; made if need be. On several machines it lies on a file system that they share.
        pieces: their names, each fit for a file name.
        do: does one piece and returns plain data about it. It may be done twice (where the file system has no locks), so what
            it writes must be the same again and put in place by :func:`~sostenuto.files.publish`.
        desc: of the progress bar, which counts the pieces of all processes and is shown by the main one.
        show_progress: whether it is shown.

    Returns:
        The records of all pieces in their order, the same on every process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with progress(len(pieces), desc, show_progress) as bar:
        shown = 0
        while left := _missing(folder, pieces):
            bar.update(len(pieces) - len(left) - shown)
            shown = len(pieces) - len(left)
            if not _do_next(folder, left, do):
                time.sleep(_PAUSE)
        bar.update(len(pieces) - shown)
    if world().is_main:
        tidy(folder)
        for lock in folder.glob("*.lock"):
            lock.unlink(missing_ok=True)
    try:
        return [json.loads(_record(folder, piece).read_text(encoding="utf-8")) for piece in pieces]
    except FileNotFoundError:  # another launch has just found that what a record tells of is lost
        return complete(folder, pieces, do, desc, show_progress=show_progress)


def _record(folder: Path, piece: str) -> Path:
    return folder / f"{piece}.json"


def _missing(folder: Path, pieces: Sequence[str]) -> list[str]:
    """The pieces without a record, from this process's own place on."""
    present = set(os.listdir(folder))
    start = world().rank * len(pieces) // world().size
    return [piece for piece in (*pieces[start:], *pieces[:start]) if f"{piece}.json" not in present]


def _do_next(folder: Path, left: Sequence[str], do: Callable[[str], Any]) -> bool:
    """Do the first piece that nobody else holds; returns whether the list has to be made anew at once."""
    for piece in left:
        with _claimed(folder / f"{piece}.lock") as mine:
            if not mine:
                continue
            if not _record(folder, piece).exists():  # else another process did it since the list was made
                publish_json(_record(folder, piece), do(piece))
            return True
    return False


@contextmanager
def one_at_a_time(guard: Path) -> Iterator[None]:
    """Waits until no other process is within, for what is quickly done by whoever comes first."""
    from filelock import FileLock

    guard.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(guard):
        yield


@contextmanager
def _claimed(lock: Path) -> Iterator[bool]:
    """Whether the lock could be had at once; it is held within."""
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()
