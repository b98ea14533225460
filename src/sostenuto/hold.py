"""What is ours on a denoiser besides the taps: calls are intercepted, compiling is told, copies are of the plain network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from sostenuto import compat

_log = logging.getLogger("sostenuto")
_ATTRIBUTE = "_sostenuto_handle"


class Hold:
    """Takes hold of a denoiser, on this instance alone, and lets go of it.

    Args:
        denoiser: the network.
        caller: what the pipeline calls; may be what ``torch.compile`` made of the denoiser.
        owner: whom :func:`owner_of` names meanwhile.
        call: runs in place of a call of ``caller``; takes the call as it is, its positional and its named arguments.
        compile: runs in place of ``denoiser.compile``.
        bare: a context in which nothing is on the denoiser, the hold neither.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        caller: nn.Module,
        *,
        owner: Any,
        call: Callable[..., Any],
        compile: Callable[..., None],
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._denoiser, self._caller, self._owner = denoiser, caller, owner
        self._call, self._compile, self._bare = call, compile, bare
        self._undo: list[Callable[[], None]] = []

    def take(self) -> None:
        """Take hold."""
        denoiser, caller = self._denoiser, self._caller
        self._undo.append(compat.intercept_calls(caller, lambda inner: lambda *a, **k: self._call(inner, a, k)))
        self._undo.append(compat.place(denoiser, **{_ATTRIBUTE: self._owner}))
        if caller is denoiser:
            self._undo.append(compat.place(denoiser, compile=self._compile))
        for module in {denoiser, caller}:
            self._undo.append(compat.place(module, **_plain_copies(module, self._bare)))

    def release(self) -> None:
        """Let go; does nothing where nothing is held."""
        while self._undo:
            self._undo.pop()()


def owner_of(denoiser: nn.Module) -> Any | None:
    """Who holds a denoiser."""
    return vars(compat.unwrapped(denoiser)).get(_ATTRIBUTE)


def _plain_copies(module: nn.Module, bare: Callable[[], AbstractContextManager[None]]) -> dict[str, Callable[..., Any]]:
    """What ``copy.deepcopy`` and ``pickle`` ask a module for."""

    def deepcopied(memo: dict[int, Any]) -> nn.Module:
        with bare():
            twin = copy.deepcopy(module, memo)
        _log.warning("the copy of a %s is the plain network: enable a method on it too", type(module).__name__)
        return twin

    def reduced(protocol: int) -> str | tuple[Any, ...]:
        # A pickler goes through the modules after this, when all is in place again: it is given a twin that shares the weights.
        weights = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        with bare():
            return copy.deepcopy(module, weights).__reduce_ex__(protocol)

    return {"__deepcopy__": deepcopied, "__reduce_ex__": reduced}
