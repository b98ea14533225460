"""What stands in for the ``forward`` of modules, on these instances alone: put there, told whether still there, restored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from sostenuto import compat
from sostenuto.errors import EngineError
from sostenuto.foreign import Entry


def not_copied(what: str) -> EngineError:
    """The error of a copy that can't be made."""
    return EngineError(f"{what} can't be copied or pickled while sostenuto is enabled: disable it first")


class Replacement:
    """A function in the place of a module's ``forward``, which says why the module can't be copied now.

    Once it is detached whoever still holds it (a hook that was put around it) may copy it, as what was there before.

    Its :attr:`forward` is what is put there, a bound method: the compiler then guards on what the function reads and not on
    the object, so that the blocks of a regionally compiled network share their graphs.
    """

    def __init__(self, function: Callable[..., Any], before: Callable[..., Any], detached: bool = False) -> None:
        self.function, self.before, self.detached = function, before, detached
        self.forward = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replacement:
        if not self.detached:
            raise not_copied("a part of a denoiser")
        before = copy.deepcopy(self.before, memo)
        return Replacement(before, before, detached=True)

    def __reduce__(self) -> str | tuple[Any, ...]:
        if not self.detached:
            raise not_copied("a part of a denoiser")
        return Replacement, (self.before, self.before, True)


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``forward`` on an instance; returns the function that restores what was there."""
    return _Standing(module, function).restore


class _Standing:
    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.entry = Entry(module)
        self.replacement = Replacement(function, self.entry.function)
        self.replaced = self.entry.replace(self.replacement.forward)

    def restore(self) -> None:
        self.replaced.restore()
        self.replacement.detached = True

    @property
    def stands(self) -> bool:
        return not self.replaced.is_aside and self.entry.leads_to(self.replacement.forward)


class Attachment:
    """Replaces ``forward`` of some modules, on these instances alone, and restores it."""

    def __init__(self) -> None:
        self._standing: list[_Standing] = []
        self.in_graph = False  # whether the replacements run within a compiled graph

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The modules whose ``forward`` is replaced, each with the replacement."""
        return []

    def attach(self) -> None:
        """Replace every ``forward``."""
        for module, forward in self.replacements():
            self._standing.append(_Standing(module, forward))

    def detach(self) -> None:
        """Take every replacement away, last first."""
        while self._standing:
            self._standing.pop().restore()

    def step_aside(self) -> bool:
        """Let the modules run as if nothing was attached, until :meth:`step_in`; returns whether all could."""
        return all(standing.replaced.step_aside() for standing in reversed(self._standing))

    def step_in(self) -> None:
        """Stand in again."""
        for standing in self._standing:
            standing.replaced.step_in()

    @property
    def stands(self) -> bool:
        """Whether every replacement is still there."""
        return all(standing.stands for standing in self._standing)

    @property
    def modules_replaced(self) -> list[nn.Module]:
        """The modules whose ``forward`` is replaced."""
        return [standing.entry.module for standing in self._standing]


def runs(module: nn.Module) -> Callable[..., Any]:
    """What a module runs, to be called by what stands in for it."""
    return Entry(module).function


class Surroundings:
    """The modules on the way from a denoiser to its replaced ones, and which of those run within a compiled graph.

    Args:
        denoiser: the network.
        replaced: the modules whose ``forward`` is replaced.
    """

    def __init__(self, denoiser: nn.Module, replaced: Iterable[nn.Module]) -> None:
        self._denoiser, self._structure = denoiser, _structure(denoiser)
        self._links: dict[tuple[int, str], tuple[Any, str, nn.Module]] = {}
        self.in_graph: set[nn.Module] = set()
        wanted = set(replaced)
        for path, module in denoiser.named_modules():
            if module not in wanted:
                continue
            parent = denoiser
            for name in path.split("."):
                if parent is not denoiser and compat.is_compiled(parent):
                    self.in_graph.add(module)
                child = parent._modules[name]
                assert child is not None
                self._links[id(parent), name] = (parent._modules, name, child)
                parent = child

    def stand(self, thorough: bool) -> bool:
        """Whether all replaced modules are still part of the denoiser; thoroughly: whether no module was added or compiled."""
        for modules, name, module in self._links.values():
            if modules.get(name) is not module:
                return False
        return not thorough or self._structure == _structure(self._denoiser)


def _structure(denoiser: nn.Module) -> tuple[int, set[int]]:
    """How many modules there are (LoRA layers are modules), and which of them were compiled by themselves."""
    modules = list(denoiser.modules())
    return len(modules), {id(module) for module in modules if module is not denoiser and compat.is_compiled(module)}
