"""How is a file written so that a full disk, an error or a killed process leaves the old one, or the new one, whole?"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = ".partial-"


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A file to write in the place of ``path``, which it becomes at the end, whole and on the disk, or not at all.

    Several processes may do this with one path at a time: the last one stands. What was written is removed on any error, and
    whoever may read a new file here may read it, whatever wrote it.
    What is no regular file (a pipe, a terminal) is given as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    # A name of this process's own, which ends as the path does: some writers go by that.
    partial = path.with_name(f"{_PARTIAL}{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        partial.unlink()
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a machine that fails may leave the new name with none of its bytes
        partial.chmod(mode)  # safetensors writes what only its owner may read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def publish_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write plain data as JSON, whole or not at all.

    Raises:
        ValueError: a number is not finite.
    """
    publish_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def publish_text(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with publish(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def tidy(folder: Path) -> None:
    """Remove what processes that were killed left half written; for when all that belongs in the folder is in place."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        partial.unlink(missing_ok=True)
