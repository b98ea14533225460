"""A progress bar where tqdm is installed and wanted, silence otherwise; of several processes the main one shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Bar(Protocol):
    """What is used of a progress bar.

    Attributes:
        total: pieces of work that are expected; ``None`` as long as that isn't known.
    """

    total: float | None

    def update(self, n: int = 1) -> object:
        """Note that ``n`` more are done."""
        ...


class _Silent:
    total: float | None = None

    def update(self, n: int = 1) -> None:
        pass


@contextlib.contextmanager
def progress(total: int | None, desc: str, show: bool = True) -> Iterator[Bar]:
    """A bar over ``total`` pieces of work (``None``: not known yet); nothing if unwanted, shown elsewhere, or without tqdm."""
    from sostenuto.distributed.world import world  # its package shows progress too

    if not (show and world().is_main):
        yield _Silent()
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Silent()
        return
    with tqdm(total=total, desc=desc) as bar:
        yield bar
