"""The two sides of a pair: what is enabled around a generation, ours or a peer's, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol

import sostenuto
from sostenuto.bench.cases import PEER, UNCACHED
from sostenuto.bench.peers import available_peers
from sostenuto.bench.specs import method_of, nearest
from sostenuto.bench.subjects import Subject
from sostenuto.errors import InputError, MethodError
from sostenuto.methods.base import Method
from sostenuto.table import CacheTable


class Side(Protocol):
    """What is enabled around a generation.

    Attributes:
        peer: library and version of a peer.
        name: of the method, for the row.
        parameters: what it is set to.
        compile_first: whether the denoiser is compiled before it is enabled, or after.
    """

    peer: str | None
    name: str
    parameters: dict[str, Any]
    compile_first: bool

    def attached(self, subject: Subject) -> Any:
        """Enables it on enter, removes it on exit; yields a handle with ``stats``, or ``None``."""
        ...


def side_of(text: str, subject: Subject, num_inference_steps: int) -> Side:
    """What a word such as ``uncached``, ``fora:interval=3`` or ``peer:cache-dit`` stands for on this model.

    Raises:
        InputError: there is no such method or peer.
        MethodError: a peer can't run on this model here.
    """
    if text == UNCACHED:
        return _Nothing()
    if not text.startswith(PEER):
        return _Ours(method_of(text, num_inference_steps))
    name, peers = text.removeprefix(PEER), available_peers()
    if name not in peers:
        raise InputError(f"there is no peer {name!r}; {nearest(name, peers)}")
    problem = peers[name].problem(subject.target)
    if problem is not None:
        raise MethodError(f"{name} can't run here: {problem}")
    return _Theirs(peers[name], num_inference_steps)


class _Nothing:
    peer, name, compile_first = None, UNCACHED, True

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    @contextmanager
    def attached(self, subject: Subject) -> Iterator[None]:
        yield


class _Ours:
    peer, compile_first = None, True

    def __init__(self, method: Method) -> None:
        self._method = method
        self.name = getattr(method, "name", "") or type(method).__name__
        self.parameters = {name: _plain(value) for name, value in parameters_of(method).items()}

    @contextmanager
    def attached(self, subject: Subject) -> Iterator[Any]:
        scheduler = subject.owner.scheduler if subject.target is subject.denoiser else None
        with sostenuto.enable(subject.target, self._method, scheduler=scheduler) as handle:
            yield handle


class _Theirs:
    compile_first = False

    def __init__(self, peer: Any, num_inference_steps: int) -> None:
        self._peer, self._steps = peer, num_inference_steps
        self.name = f"{PEER}{peer.name}"
        self.peer = f"{peer.library} {peer.version()}"
        self.parameters = {str(name): _plain(value) for name, value in peer.settings.items()}

    @contextmanager
    def attached(self, subject: Subject) -> Iterator[None]:
        with self._peer.attached(subject.target, self._steps):
            yield


def parameters_of(method: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def _plain(value: Any) -> Any:
    """A parameter as plain data; a table by what it costs, not by all its entries."""
    if isinstance(value, CacheTable):
        return {"steps": value.num_inference_steps, "fill": value.fill, "macs_fraction": value.macs_fraction}
    if isinstance(value, Method):
        return {"method": value.name, **{name: _plain(part) for name, part in parameters_of(value).items()}}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)[:200]
