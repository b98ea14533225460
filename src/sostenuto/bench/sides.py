"""The two sides of a pair: what is enabled around a generation, ours or a peer's, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import sostenuto
from sostenuto.bench.cases import PEER, UNCACHED
from sostenuto.bench.peers import peer
from sostenuto.bench.specs import method_of
from sostenuto.bench.subjects import Subject
from sostenuto.errors import MethodError
from sostenuto.methods.base import Method
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class Side:
    """What is enabled around a generation.

    Attributes:
        attached: enables it on a model on enter, removes it on exit; gives a handle with ``stats``, or ``None``.
        parameters: what it is set to.
        peer: library and version of a peer.
        compile_first: whether the denoiser is compiled before it is enabled, or after.
    """

    attached: Callable[[Subject], AbstractContextManager[Any]] = lambda _: nullcontext()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    peer: str | None = None
    compile_first: bool = True


def side_of(text: str, subject: Subject, num_inference_steps: int) -> Side:
    """What a word such as ``uncached``, ``fora:interval=3`` or ``peer:cache-dit`` stands for on this model.

    Raises:
        InputError: there is no such method or peer.
        MethodError: a peer can't run on this model here.
    """
    if text == UNCACHED:
        return Side()
    if text.startswith(PEER):
        return _theirs(text.removeprefix(PEER), subject, num_inference_steps)
    method = method_of(text, num_inference_steps)

    def attached(subject: Subject) -> AbstractContextManager[Any]:
        scheduler = subject.owner.scheduler if subject.target is subject.denoiser else None
        return sostenuto.enable(subject.target, method, scheduler=scheduler)

    return Side(attached, parameters_of(method))


def _theirs(name: str, subject: Subject, num_inference_steps: int) -> Side:
    found = peer(name)
    problem = found.problem(subject.target)
    if problem is not None:
        raise MethodError(f"{name} can't run here: {problem}")
    return Side(
        lambda subject: found.attached(subject.target, num_inference_steps),
        {name: _plain(value) for name, value in found.settings.items()},
        f"{found.library} {found.version()}",
        compile_first=False,
    )


def parameters_of(method: Method) -> dict[str, Any]:
    """A method's parameters as plain data."""
    return {parameter.name: _plain(getattr(method, parameter.name)) for parameter in fields(method)}


def _plain(value: Any) -> Any:
    """A parameter as plain data; a table by what it costs, not by all its entries, a file by its name."""
    if isinstance(value, CacheTable):
        return {"steps": value.num_inference_steps, "fill": value.fill, "macs_fraction": value.macs_fraction}
    if isinstance(value, (str, Path)) and Path(value).is_file():
        return Path(value).name  # where it lies says nothing on another machine
    if isinstance(value, Method):
        return {"method": value.name} | parameters_of(value)
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)[:200]
