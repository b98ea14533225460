"""Other libraries' hooks on a denoiser's modules (accelerate's, diffusers'): where ours stand among them, and set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.errors import EngineError

_PLACING = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting")
_SHARDING = "cp_"  # diffusers' context parallelism names its hooks so


class Entry:
    """The place through which the calls of one module go, so that a function there is called in the module's stead.

    It is outside of everything (hooks that bring the weights to the device needn't run for what is skipped), but for what
    splits the module's arguments among processes: features are kept as they are after the split. Of a module that was
    compiled by itself it is outside of the compiled graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        shard = next((ref for name, ref in _diffusers_hooks(module) if name.startswith(_SHARDING)), None)
        self.is_compiled = compat.is_compiled(module)
        if self.is_compiled and shard is not None:
            raise EngineError(
                f"a {type(module).__name__} is compiled together with its part in context parallelism: compile the whole "
                "denoiser, or none of it"
            )
        self._place = vars(shard) if shard is not None else vars(module)
        self._name = compat.CALL_SLOT if self.is_compiled else "forward"

    @property
    def function(self) -> Callable[..., Any]:
        """What the module runs now."""
        return self._place.get(self._name, self.module.forward)

    def replace(self, function: Callable[..., Any]) -> Replaced:
        """Put a function there."""
        return Replaced(self.module, self._place, self._name, function)

    def leads_to(self, function: Callable[..., Any]) -> bool:
        """Whether the module still runs the function, as far as can be told."""
        if self.is_compiled or compat.is_compiled(self.module):
            return _wraps(vars(self.module).get(compat.CALL_SLOT), function)
        if _wraps(self._place.get(self._name), function):
            return True
        forward = vars(self.module).get("forward")
        if forward is None or isinstance(forward, MethodType):
            return False
        places = list(_places(self.module))
        return not places or any(_wraps(place[name], function) for place, name in places)


class Replaced:
    """A function that stands where the calls of a module go through, and may step aside for a while.

    Args:
        module: the module.
        place: where its calls go through.
        name: under which name there.
        function: what is put there.
    """

    def __init__(self, module: nn.Module, place: dict[str, Any], name: str, function: Callable[..., Any]) -> None:
        self._module, self._place, self._name, self._function = module, place, name, function
        self._own = place.get(name)  # a class's ``forward`` isn't there
        self._before = module.forward if self._own is None else self._own
        self._is_aside = False
        place[name] = function

    def step_aside(self) -> bool:
        """Let the module run what it would without the function; refused where somebody's hook has come around it."""
        if self._place.get(self._name) is not self._function:
            return False
        self._is_aside = True
        self._put_before()
        return True

    def step_in(self) -> None:
        """Take the place again; where somebody has put a hook there meanwhile the function stays out, and is missed."""
        if self._is_aside and self._place.get(self._name) is self._own:
            self._is_aside = False
            self._place[self._name] = self._function

    def restore(self) -> None:
        """Take the function away for good."""
        if self._is_aside:
            return
        if self._place.get(self._name) is self._function:
            self._put_before()
        else:
            _splice(self._module, self._function, self._before)

    def _put_before(self) -> None:
        if self._own is None:
            del self._place[self._name]
        else:
            self._place[self._name] = self._own


def _wraps(outer: Any, function: Callable[..., Any]) -> bool:
    """Whether one function is another, or one of ours around it."""
    while outer is not None and outer is not function:
        outer = getattr(getattr(outer, "__self__", None), "before", None)
    return outer is function


def _diffusers_hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and functions of every diffusers hook on a module, the innermost first."""
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from zip(registry._hook_order, registry._fn_refs, strict=True)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where hooks on a module hold what they wrap."""
    if "_old_forward" in vars(module):  # accelerate's
        yield vars(module), "_old_forward"
    for _, ref in _diffusers_hooks(module):
        for name in ("forward", "original_forward"):
            if vars(ref).get(name) is not None:
                yield vars(ref), name


def _splice(module: nn.Module, function: Callable[..., Any], before: Callable[..., Any]) -> None:
    """Take a function out of the middle of the hooks that came after it."""
    for place, name in list(_places(module)):
        if place[name] is function:
            place[name] = before


def has_foreign_cache(denoiser: nn.Module) -> bool:
    """Whether one of diffusers' own caches is enabled on a denoiser."""
    if getattr(denoiser, "is_cache_enabled", False):
        return True
    registries = (vars(module).get("_diffusers_hook") for module in denoiser.modules())
    return any(
        getattr(hook, "_is_stateful", False) for registry in registries if registry for hook in registry.hooks.values()
    )


@contextmanager
def set_aside(denoiser: nn.Module, device: torch.device) -> Iterator[None]:
    """Without the hooks that move or cast weights: as if all weights lay on ``device`` in the dtype that they compute in.

    Meant for the inside of a ``FakeTensorMode``: a hook that moved a weight there would leave one without data.
    """
    with ExitStack() as stack:
        dtypes: dict[nn.Module, torch.dtype] = {}
        found = False
        for module in denoiser.modules():
            if "_hf_hook" in vars(module):
                found = True
                _swap(stack, vars(module), "_hf_hook", _Idle())
            for name, ref in _diffusers_hooks(module):
                if name in _PLACING:
                    found = True
                    dtype = getattr(vars(module)["_diffusers_hook"].hooks[name], "compute_dtype", None)
                    if dtype is not None:
                        dtypes.update((inner, dtype) for inner in module.modules())
                    _swap(stack, vars(ref), "pre_forward", _idle_before)
                    _swap(stack, vars(ref), "post_forward", _idle_after)
        made: dict[int, torch.Tensor] = {}
        for module in denoiser.modules() if found else ():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        dtype = dtypes.get(module, tensor.dtype) if tensor.is_floating_point() else tensor.dtype
                        made[id(tensor)] = torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)
                    _swap(stack, tensors, name, made[id(tensor)])
        yield


def _swap(stack: ExitStack, place: Any, name: str, value: Any) -> None:
    stack.callback(place.__setitem__, name, place[name])
    place[name] = value


def _idle_before(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def _idle_after(_module: nn.Module, output: Any) -> Any:
    return output


class _Idle:
    """A hook of accelerate's that does nothing."""

    no_grad = False
    pre_forward = staticmethod(_idle_before)
    post_forward = staticmethod(_idle_after)
