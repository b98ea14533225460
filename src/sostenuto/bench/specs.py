"""How a method, a peer or a network is written in one word: ``fora:interval=3``, ``peer:cache-dit``, ``dit:layers=6``."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any

from sostenuto.errors import InputError
from sostenuto.methods import EBCache, Method, available_methods
from sostenuto.methods.base import presets_of
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of ``name`` or ``name:key=value,key=(1,2),key=word``; a file name with commas or brackets in quotes.

    Raises:
        InputError: it is written in another way.
    """
    name, _, rest = text.partition(":")
    try:
        call = ast.parse(f"f({_VALUE.sub(lambda value: repr(literal(value[0])), rest)})", mode="eval").body
        if not name or not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        return name, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise InputError(f"{text!r} isn't name:key=value,key=value, such as fora:interval=3") from None


_VALUE = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1|(?<==)[^'"(),=\[\]{}]+(?=,|$)""")
"""A quoted string, or a whole value without quotes and brackets."""


def literal(text: str) -> Any:
    """What is written as in Python, or the text itself where it is nothing such: a word, a file's path."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return text.strip()


def method_of(text: str, num_inference_steps: int) -> Method:
    """The method that a word stands for.

    Args:
        text: a name of ``sostenuto methods`` with parameters (``taylorseer:interval=4,order=2``), a preset
            (``fora.flux_dev``), also with parameters of its own (``fora.flux_dev:interval=6``), a combination of them with
            ``|``, or one of :data:`PROBES`. ``table`` is a file, or the name of a shipped one.
        num_inference_steps: of the generation that it is for.

    Raises:
        InputError: there is no such method or parameter.
        MethodError: a parameter's value makes no sense.
    """
    return reduce(or_, (_single(part.strip(), num_inference_steps) for part in text.split("|")))


def _single(text: str, num_inference_steps: int) -> Method:
    name, given = parse(text)
    if name in PROBES:
        return _called(PROBES[name], {"num_inference_steps": num_inference_steps} | given, text)
    name, _, preset = name.partition(".")
    known = available_methods()
    if name not in known:
        raise InputError(f"there is no method {name!r}; {nearest(name, [*known, *PROBES])}")
    make: Any = known[name]
    taken = [field.name for field in fields(make)]
    if preset:
        presets = presets_of(make)
        if preset not in presets:
            raise InputError(f"{name} has no preset {preset!r}; {nearest(preset, presets)}")
        make = partial(_changed, getattr(make, preset))
        taken += inspect.signature(make.args[0]).parameters
    odd = next((key for key in given if key not in taken), None)
    if odd is not None:
        raise InputError(f"{name} has no parameter {odd!r}; {nearest(odd, taken)}")
    if isinstance(given.get("table"), str):
        given["table"] = _table(given["table"])
    return _called(make, given, text)


def _changed(preset: Callable[..., Method], **given: Any) -> Method:
    """A preset with what it takes itself, and then with other fields."""
    own = inspect.signature(preset).parameters
    made = preset(**{key: value for key, value in given.items() if key in own})
    return replace(made, **{key: value for key, value in given.items() if key not in own})


def _called(make: Callable[..., Method], given: dict[str, Any], text: str) -> Method:
    try:
        return make(**given)
    except TypeError as error:
        raise InputError(f"{text!r}: {error}") from None


def _table(name: str) -> str:
    import sostenuto

    shipped = Path(sostenuto.__file__).parent / "tables" / f"{name}.json"
    return str(shipped) if shipped.exists() and not Path(name).exists() else name


def nearest(name: str, known: Iterable[str]) -> str:
    """A half-sentence with the names that are meant most likely."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names) or 'none'}"


def _reuse(num_inference_steps: int, interval: int, fill: Any) -> Method:
    states = (
        StepState.COMPUTE if step % interval == 0 else StepState.REUSE_BOTH for step in range(num_inference_steps)
    )
    return EBCache(CacheTable(tuple(states), fill=fill))


def _reuse_branches(num_inference_steps: int, interval: int = 4) -> Method:
    return _reuse(num_inference_steps, interval, "branches")


def _reuse_stack(num_inference_steps: int, interval: int = 4) -> Method:
    return _reuse(num_inference_steps, interval, "stack")


PROBES: dict[str, Callable[..., Method]] = {"reuse-branches": _reuse_branches, "reuse-stack": _reuse_stack}
"""What the overhead of the engine is measured with: every so many steps all is computed, in between all is reused, each branch
by its own output or the whole stack by one residual."""
