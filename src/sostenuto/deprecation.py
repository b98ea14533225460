"""Names that will go: each still works, and warns with what to use and the version that removes it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_Callable = TypeVar("_Callable", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Deprecation:
    """One name that will go.

    Attributes:
        name: what it is, as users write it.
        instead: what to use.
        removed_in: the version without it.
    """

    name: str
    instead: str
    removed_in: str

    def __post_init__(self) -> None:
        as_numbers(self.removed_in)
        _KNOWN[self.name] = self

    def __str__(self) -> str:
        return f"{self.name} is deprecated and will be removed in sostenuto {self.removed_in}: use {self.instead}"

    def warn(self, stacklevel: int) -> None:
        """Warn, at the line so many calls above the caller of this."""
        warnings.warn(str(self), DeprecationWarning, stacklevel=stacklevel + 1)


_KNOWN: dict[str, Deprecation] = {}  # the release check asks which of them are due


def due(version: str) -> list[Deprecation]:
    """The deprecations that a release of this version must no longer carry."""
    return [known for known in _KNOWN.values() if as_numbers(known.removed_in) <= as_numbers(version)]


def as_numbers(version: str) -> tuple[int, int, int]:
    """A version as numbers that compare.

    Raises:
        ValueError: it is not major.minor.patch in whole numbers; a pre-release's suffix (``rc1``, ``.dev0``) is left out.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is no version of the form major.minor.patch")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


def deprecated(instead: str, removed_in: str, name: str | None = None) -> Callable[[_Callable], _Callable]:
    """Mark a function or method as one that will go: it works and warns at the caller's line.

    Args:
        instead: what to use.
        removed_in: the version without it.
        name: what users write, by default its qualified name.
    """

    def mark(function: _Callable) -> _Callable:
        note = Deprecation(name or function.__qualname__, instead, removed_in)

        @functools.wraps(function)
        def warned(*args: Any, **kwargs: Any) -> Any:
            note.warn(stacklevel=2)
            return function(*args, **kwargs)

        return warned  # pyright: ignore[reportReturnType]

    return mark


def renamed_field(old: str, new: str, removed_in: str) -> Callable[[_Class], _Class]:
    """Let a dataclass still take and show a parameter under its old name, with a warning.

    Args:
        old: the name that will go.
        new: the field.
        removed_in: the version without the old name.
    """

    def mark(cls: _Class) -> _Class:
        note = Deprecation(f"{cls.__name__}({old}=…)", f"{new}=…", removed_in)
        init: Callable[..., None] = cls.__init__

        @functools.wraps(init)
        def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{cls.__name__} was given {new} and its old name {old}: keep {new}")
                note.warn(stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            init(self, *args, **kwargs)

        def read(self: Any) -> Any:
            note.warn(stacklevel=2)
            return getattr(self, new)

        setattr(cls, "__init__", renamed)  # noqa: B010 a type checker refuses the plain assignment
        setattr(cls, old, property(read, doc=str(note)))
        return cls

    return mark
