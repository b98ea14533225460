"""The files that ship with the demo: denoiser, judge and reference statistics."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "assets"


def asset(name: str) -> Path:
    """The path of a shipped file.

    Raises:
        FileNotFoundError: it isn't there.
    """
    path = _FOLDER / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is missing from this installation of sostenuto: install it again")
    return path
