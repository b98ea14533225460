"""What a peer is: another caching library that can be put on a denoiser and taken off again without a trace."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.bench.specs import literal
from sostenuto.engine import handle_of
from sostenuto.errors import InputError, MethodError, SostenutoError
from sostenuto.foreign import has_foreign_cache


@dataclass(frozen=True)
class Peer(ABC):
    """A caching method of another library with its settings: the fields of the subclass, under the library's own names.

    Attributes:
        kind: the name without settings, such as ``cache-dit``.
        library: whose method it is.
        distribution: what the library is called where packages are installed from.
        wrong_on: networks on which its output is wrong, or its first call fails, by class, with the reason.
    """

    kind: ClassVar[str] = ""
    library: ClassVar[str] = ""
    distribution: ClassVar[str] = ""
    wrong_on: ClassVar[Mapping[str, str]] = {}

    @property
    def name(self) -> str:
        """The kind and the settings that aren't the defaults, as :func:`peer` reads them."""
        changed = [
            f"{field.name}={_written(getattr(self, field.name))}"
            for field in fields(self)
            if field.metadata.get("in_name", True) and getattr(self, field.name) != field.default
        ]
        return self.kind + (f":{','.join(changed)}" if changed else "")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that it is set to, also where that is the default."""
        return asdict(self)

    def version(self) -> str:
        """The installed version, or ``"not installed"``."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    def problem(self, target: Any) -> str | None:
        """Why it can't run on a pipeline or denoiser, in words, or ``None``; what it is asked for is left as it was.

        It is put on and taken off again to find out.
        """
        if self.version() == "not installed":
            return f"{self.distribution} is not installed: pip install {self.distribution}"
        denoisers = compat.find_denoisers(target)
        for denoiser in denoisers.values():
            if handle_of(denoiser) is not None:
                return f"sostenuto is enabled on this {type(denoiser).__name__}: disable it first"
            if has_foreign_cache(denoiser):
                return f"another cache is enabled on this {type(denoiser).__name__}: disable that first"
        for denoiser in denoisers.values():
            name = type(compat.unwrapped(denoiser)).__name__
            reason = self._unfit(target, denoiser) or self.wrong_on.get(name)
            if reason is not None:
                return reason
        return self._trial(target)

    def calibrated(self, target: Any, sample: Callable[..., Any], num_inference_steps: int) -> Peer:
        """The peer with what has to be measured on this model first; the peer itself where nothing has to.

        Args:
            target: the pipeline or denoiser.
            sample: ``sample(target, generator, num_inference_steps=…)`` runs one generation.
            num_inference_steps: steps of the sampler.
        """
        return self

    @contextmanager
    def attached(self, target: Any, num_inference_steps: int) -> Iterator[None]:
        """The peer enabled on a pipeline's denoisers or a denoiser; at the end, also after an error, no trace of it is left.

        Every generation begins without what the one before left behind. A generation of a pipeline is told by the timesteps
        that it sets anew. A bare denoiser is taken to be called once for each step, from the noisiest on, and timesteps that a
        library wants to know are then those of evenly spaced steps from 1000 down.

        Args:
            target: a pipeline or denoiser.
            num_inference_steps: steps of each generation.

        Raises:
            MethodError: it can't run there, for the reason that :meth:`problem` gives.
        """
        reason = self.problem(target)
        if reason is not None:
            raise MethodError(f"{self.name} can't run on this {type(target).__name__}: {reason}")
        stack = ExitStack()
        with Restored(target):
            try:
                with _quietly():
                    self._attach(target, num_inference_steps, stack)
                yield
            finally:
                with _quietly():
                    stack.close()

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        """What is known to stand against it, without trying."""
        return None

    def _trial(self, target: Any) -> str | None:
        with Restored(target) as before:
            try:
                with _quietly(), ExitStack() as stack:
                    self._attach(target, 2, stack)
                    nothing = not self._hooks_something(before)
            except SostenutoError as error:
                return str(error)
            except Exception as error:  # whatever the library raises is its reason
                return f"{self.library} {self.version()} refuses it with {type(error).__name__}: {_line(error)}"
        return "nothing of the network would be hooked: " + self._remedy() if nothing else None

    def _hooks_something(self, before: Restored) -> bool:
        """Whether something is skipped once it is attached: by default, whether modules within the denoisers are hooked."""
        return before.num_hooked > 0

    def _remedy(self) -> str:
        """What to do where nothing would be hooked."""
        return "its settings name no module of this network"

    @abstractmethod
    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        """Enable it, and leave with the stack what takes it off."""


class Restored:
    """A context at whose end the modules of a target's denoisers have the attributes and submodules of its beginning.

    Libraries leave some behind: ``forward`` as an attribute of the instance, statistics, submodules in another order.
    """

    def __init__(self, target: Any) -> None:
        self._denoisers = list(compat.find_denoisers(target).values())
        self._modules = {
            module: (dict(vars(module)), dict(module._modules))
            for denoiser in self._denoisers
            for module in denoiser.modules()
        }

    @property
    def num_hooked(self) -> int:
        """How many modules within the denoisers have another ``forward`` than at the beginning."""
        within = self._modules.keys() - set(self._denoisers)
        return sum(vars(module).get("forward") is not self._modules[module][0].get("forward") for module in within)

    def __enter__(self) -> Restored:
        return self

    def __exit__(self, *_: object) -> None:
        for module, (attributes, children) in self._modules.items():
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            if list(module._modules.items()) != list(children.items()):
                module._modules.clear()
                module._modules.update(children)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what libraries log while they are put on and taken off, up to warnings."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _adapters() -> tuple[type[Peer], ...]:
    from sostenuto.bench.peers import cache_dit, deepcache, diffusers_caches, para_attn, smoothcache

    return (
        *diffusers_caches.PEERS,
        *cache_dit.PEERS,
        smoothcache.SmoothCachePeer,
        deepcache.DeepCachePeer,
        para_attn.ParaAttn,
    )


def available_peers() -> dict[str, Peer]:
    """All peers that there is an adapter for, by name, with their default settings, whether or not they are installed."""
    return {adapter.kind: adapter() for adapter in _adapters()}


def peer(name: str, **options: Any) -> Peer:
    """A peer with settings.

    Args:
        name: a name of :func:`available_peers`, or one with settings, ``"cache-dit:residual_diff_threshold=0.12"``, whose
            values are written as in Python; a word that is none is a string.
        options: settings, which come before those in the name.

    Raises:
        InputError: there is no such peer, or it has no such setting.
    """
    kind, _, rest = name.partition(":")
    adapters = {adapter.kind: adapter for adapter in _adapters()}
    if kind not in adapters:
        raise InputError(f"there is no peer {kind!r}; there are {', '.join(sorted(adapters))}")
    given = {**_parsed(name, rest), **options}
    known = [field.name for field in fields(adapters[kind])]
    unknown = [option for option in given if option not in known]
    if unknown:
        raise InputError(f"{kind} has no setting {unknown[0]!r}, only {', '.join(known) or 'none at all'}")
    make: Any = adapters[kind]
    return make(**given)


def _parsed(name: str, text: str) -> dict[str, Any]:
    """``a=1,b=[2,3],c=word`` as values."""
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text else ():  # commas within lists are followed by no "name="
        option, equals, value = part.partition("=")
        if not equals or not option.strip():
            raise InputError(f"{name!r} is no peer with settings: write them as name:option=value,option=value")
        parsed = literal(value)
        options[option.strip()] = tuple(parsed) if isinstance(parsed, list) else parsed
    return options


def _written(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else str(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no reason given"
