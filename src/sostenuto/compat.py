"""The only file that touches private names of torch or shapes of diffusers' objects; each is tested for before use."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sostenuto.errors import AnatomyError, DependencyError, EngineError
from sostenuto.features import leaves, mapped

OLDEST_DIFFUSERS = "0.35"
_INSTALL = "pip install -U 'sostenuto[diffusers]'"


def diffusers_package() -> Any:
    """The package diffusers.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        needed = f"this needs diffusers {OLDEST_DIFFUSERS} or newer: {_INSTALL}"
        raise DependencyError(f"diffusers can't be imported ({error}): {needed}") from error


def diffusers_name(name: str, module: str = "") -> Any:
    """What diffusers calls so; it is imported when it is asked for.

    Args:
        name: a class or function.
        module: the module of diffusers that holds it; by default the package itself.

    Raises:
        DependencyError: diffusers is not installed, or the installed one has no such name or can't import it; says what to do.
    """
    diffusers = diffusers_package()
    version = getattr(diffusers, "__version__", "of unknown version")
    try:
        return getattr(importlib.import_module(f"diffusers.{module}") if module else diffusers, name)
    except RuntimeError as error:  # so it wraps the errors of its own lazy imports
        reason = str(error).strip().splitlines()[-1]
        raise DependencyError(f"diffusers {version} can't import {name}: {reason}") from error
    except (ImportError, AttributeError) as error:
        newer = f"it needs a newer one, {OLDEST_DIFFUSERS} at the least: {_INSTALL}"
        raise DependencyError(f"diffusers {version} has no {name}: {newer}") from error


def attention_of_diffusers() -> str:
    """The backend that diffusers' own attention runs on; ``"?"`` in one that does not say."""
    dispatch = diffusers_name("attention_dispatch", "models")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return "?" if registry is None else registry.get_active_backend()[0].value


def diffusers_version() -> str:
    """The version of the installed diffusers.

    Raises:
        DependencyError: it is not installed.
    """
    return diffusers_name("__version__")


CALL_SLOT = "_compiled_call_impl"  # Module.__call__ prefers this instance attribute; Module.compile() fills it


def intercept_calls(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put a function around every call of ``module``, outside of its hooks and of what ``module.compile()`` made.

    Args:
        module: the module; also what ``torch.compile`` returned for one.
        around: takes the call as it is and returns the one to make.

    Returns:
        A function that takes the interception away again.
    """
    if not hasattr(nn.Module, CALL_SLOT) or not hasattr(module, "_call_impl"):
        raise EngineError(f"torch {torch.__version__} has no {CALL_SLOT}: sostenuto needs torch 2.6 or newer")
    had_own = CALL_SLOT in module.__dict__
    before = getattr(module, CALL_SLOT)
    inner = before if before is not None else module._call_impl
    outer = around(inner)
    object.__setattr__(module, CALL_SLOT, outer)

    def restore() -> None:
        if getattr(module, CALL_SLOT) is not outer:
            return  # compiled after us: that compilation is the user's
        if had_own:
            object.__setattr__(module, CALL_SLOT, before)
        else:
            object.__delattr__(module, CALL_SLOT)

    return restore


def is_traced() -> bool:
    """Whether ``torch.compile`` traces what runs, or, after a break in its graph, watches it."""
    if torch.compiler.is_dynamo_compiling():
        return True
    frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    told = getattr(frames, "get_eval_frame_callback", None)
    return told is not None and callable(told())


def place(owner: Any, **attributes: Any) -> Callable[[], None]:
    """Put attributes on this instance of a class; returns what restores those that were there, but for a newer one."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)

    def restore() -> None:
        for name, value in attributes.items():
            if own.get(name) is value:
                del own[name]
                own.update({name: before[name]} if name in before else {})

    return restore


@contextmanager
def after_calls(owner: Any, **tell: Callable[[], object]) -> Iterator[None]:
    """Within it, tell of each call of these methods of an object, when it has returned."""

    def telling(method: Callable[..., Any], told: Callable[[], object]) -> Callable[..., Any]:
        @functools.wraps(method)  # pipelines read the signatures of a scheduler's methods
        def called(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            told()
            return result

        return called

    restore = place(owner, **{name: telling(getattr(owner, name), told) for name, told in tell.items()})
    try:
        yield
    finally:
        restore()


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module go through ``torch.compile``, by either of its forms."""
    # As a network with many modules is asked this for each of them: nn.Module is slow to tell that it lacks an attribute.
    return "_orig_mod" in module._modules or getattr(module, CALL_SLOT, None) is not None


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in which gradient checkpointing repeats calls."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._current_graph_task_id() != -1


def timestep_embedding_of(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module of diffusers that embeds timesteps by sines, without weights, hangs on; ``None`` of any other module."""
    kind = type(module)
    if (kind.__module__, kind.__qualname__) != ("diffusers.models.embeddings", "Timesteps"):
        return None
    names = ("num_channels", "flip_sin_to_cos", "downscale_freq_shift", "scale")
    return tuple(getattr(module, name, None) for name in names)


@dataclasses.dataclass(frozen=True)
class CompilerCounts:
    """What ``torch.compile`` has done so far in this process: graphs compiled, and places where it broke one."""

    graphs: int
    graph_breaks: int


def compiler_counts() -> CompilerCounts:
    """Graphs and graph breaks of ``torch.compile`` so far."""
    from torch._dynamo.utils import counters

    return CompilerCounts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


def reset_compiler() -> None:
    """Forget what was compiled: a function keeps few graphs, and each method has its own."""
    torch._dynamo.reset()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without what ``torch.compile`` put around it."""
    return getattr(module, "_orig_mod", module)


# What pipelines call their denoisers. The others serve a part of the schedule (Wan 2.2), one pass (Ideogram 4), or references.
DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "transformer_ref", "unet")


def find_denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by their names in it, each once, or the module itself; optional ones may be missing.

    Raises:
        AnatomyError: the object is neither a module nor a pipeline with a transformer or a U-Net.
    """
    if isinstance(target, nn.Module):
        return {"denoiser": target}
    found: dict[str, nn.Module] = {}
    for name in DENOISERS:
        denoiser = getattr(target, name, None)
        if isinstance(denoiser, nn.Module) and all(denoiser is not other for other in found.values()):
            found[name] = denoiser
    if not found:
        parts = {**getattr(target, "components", {}), **getattr(target, "__dict__", {})}
        modules = [f"{name} ({type(part).__name__})" for name, part in parts.items() if isinstance(part, nn.Module)]
        what = f"only {', '.join(modules)}" if modules else "nor any other network"
        raise AnatomyError(
            f"{type(target).__name__} has no transformer or unet to cache, {what}: "
            "pass a diffusers pipeline that has one, or the denoiser itself with its scheduler, "
            "enable(denoiser, method, scheduler=…)"
        )
    return found


def find_denoiser(target: Any) -> nn.Module:
    """The only denoiser of a pipeline, or the module itself.

    Raises:
        AnatomyError: the object is neither a module nor a pipeline with one transformer or U-Net.
    """
    found = find_denoisers(target)
    if len(found) > 1:
        raise AnatomyError(
            f"{type(target).__name__} has several denoisers ({', '.join(found)}): pass one of them, with "
            "scheduler=pipe.scheduler, and do this for each"
        )
    return next(iter(found.values()))


# What a network beside the denoiser (ControlNet, T2I-Adapter) adds to its features, and what ComfyUI tells its networks of
# the sampling; other values at every step.
STEPWISE_ARGUMENTS = frozenset(
    {
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
        "control",
        "transformer_options",
    }
)


def config_of(denoiser: Any) -> dict[str, Any]:
    """The public configuration of a denoiser or scheduler as plain JSON data; of a module without one, its parameter shapes."""
    module = unwrapped(denoiser)
    config = getattr(module, "config", None)
    if config is None:
        return {name: list(p.shape) for name, p in module.named_parameters()}
    items = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(items, default=str))


def values_of(output: Any) -> Any:
    """What a denoiser returned, a tensor or a tuple of values, without diffusers' output object around it.

    Raises:
        EngineError: an output of another kind.
    """
    if isinstance(output, torch.Tensor) or type(output) is tuple:
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return tuple(getattr(output, field.name) for field in dataclasses.fields(output))
    raise EngineError(
        f"a denoiser that returns a {type(output).__name__} can't be corrected: return a tensor or a tuple"
    )


def with_values(output: Any, values: Any) -> Any:
    """An output of the same kind that holds other values."""
    if isinstance(output, torch.Tensor) or type(output) is tuple:
        return values
    names = [field.name for field in dataclasses.fields(output)]
    return dataclasses.replace(output, **dict(zip(names, values, strict=True)))


def map_prediction(output: Any, function: Callable[..., torch.Tensor], *others: Any) -> Any:
    """A denoiser's output with its prediction mapped: its first value, a tensor or a list of one tensor per sample.

    ``function`` is given each tensor, and those at the same place of ``others``.
    """
    values = values_of(output)
    if isinstance(values, torch.Tensor):
        return with_values(output, function(values, *others))
    return with_values(output, (mapped(function, values[0], *others), *values[1:]))


def prediction_of(output: Any) -> Any:
    """The prediction in a denoiser's output: a tensor, or a list of one per sample."""
    values = values_of(output)
    return values if isinstance(values, torch.Tensor) else values[0]


def first_tensor(output: Any) -> torch.Tensor:
    """The prediction, or its part for the first sample where there is one tensor per sample."""
    return next(leaves(prediction_of(output)))


def only_tensor(output: Any) -> Any:
    """The tensor in an output that holds nothing else (diffusers' attentions return a tuple of one); else the output."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


class CacheStates:
    """What diffusers' cache hooks on a denoiser keep, found through their managers, which want to know each call's context.

    Args:
        denoiser: the network, with the hooks in place.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        found: dict[int, Any] = {}
        for _, hook in diffusers_hooks(denoiser):
            for value in vars(hook).values():
                if callable(getattr(value, "set_context", None)) and hasattr(value, "_state_cache"):
                    found[id(value)] = value
        self._managers = list(found.values())

    @property
    def context(self) -> Any:
        """The context that a pipeline has set for the call, or ``None``."""
        manager = next(iter(self._managers), None)
        return getattr(manager, "_context", getattr(manager, "_current_context", None))

    def set_context(self, context: Any) -> None:
        """Set it, or take it away with ``None``."""
        for manager in self._managers:
            manager.set_context(context)

    def values(self, name: str) -> list[Any]:
        """The attribute of that name of every state: one for each context."""
        states = (state for manager in self._managers for state in manager._state_cache.values())
        return [getattr(state, name) for state in states if hasattr(state, name)]


def new_cache_context(name: str, **fields: Any) -> Any:
    """A context of diffusers' caches: an object with these fields, or its name alone in diffusers before 0.42."""
    make = getattr(diffusers_name("hooks", "hooks"), "CacheContext", None)
    return name if make is None else make(name, **fields)


def diffusers_hooks(denoiser: nn.Module) -> list[tuple[Any, Any]]:
    """Every hook of diffusers' on a denoiser's modules, as its registry and itself."""
    registries = [vars(module).get("_diffusers_hook") for module in denoiser.modules()]
    return [(registry, hook) for registry in registries if registry is not None for hook in registry.hooks.values()]


def remove_diffusers_hooks(denoiser: nn.Module, kept: list[tuple[Any, Any]]) -> None:
    """Take off the hooks that are not among the ones to keep, last first."""
    known = {id(hook) for _, hook in kept}
    for registry, hook in reversed(diffusers_hooks(denoiser)):
        if id(hook) not in known:
            registry.remove_hook(next(n for n, other in registry.hooks.items() if other is hook), recurse=False)


def renew_diffusers_hooks(denoiser: nn.Module) -> None:
    """Make diffusers look for hooks anew: it remembers which modules had some (0.36 and later)."""
    for module in denoiser.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        if hasattr(registry, "_child_registries_cache"):
            registry._child_registries_cache = None


def reset_diffusers_hooks(denoiser: nn.Module) -> None:
    """Drop what diffusers' caches keep from the generation before."""
    registry = vars(denoiser).get("_diffusers_hook")
    if registry is None:
        registry = diffusers_name("HookRegistry", "hooks").check_if_exists_or_initialize(denoiser)
    registry.reset_stateful_hooks(recurse=True)


def block_is_registered(block_class: type[nn.Module]) -> bool:
    """Whether diffusers' caches know what blocks of this class take and return."""
    try:
        _block_registry().get(block_class)
    except ValueError:
        return False
    return True


def register_block(block_class: type[nn.Module], streams: Sequence[str], returns: Sequence[str]) -> Callable[[], None]:
    """Tell diffusers' caches which arguments of a block are the sample's and the text's, and in which order it returns them.

    Args:
        block_class: the class of the blocks.
        streams: the names of the arguments: the sample's, and the text's where there is one.
        returns: the same names in the order in which a block returns them.

    Returns:
        A function that makes diffusers forget it again.
    """
    metadata = diffusers_name("TransformerBlockMetadata", "hooks._helpers")
    fields: dict[str, Any] = {"return_hidden_states_index": returns.index(streams[0])}
    fields["hidden_states_argument_name"] = streams[0]
    if len(streams) > 1:
        fields["return_encoder_hidden_states_index"] = returns.index(streams[1])
        fields["encoder_hidden_states_argument_name"] = streams[1]
    known = {field.name for field in dataclasses.fields(metadata)}  # older ones lack the arguments' names
    registry = _block_registry()
    registry.register(block_class, metadata(**{k: v for k, v in fields.items() if k in known}))
    return lambda: registry._registry.pop(block_class, None)


def block_lists_of_diffusers() -> tuple[str, ...]:
    """The names under which diffusers' caches look for lists of blocks."""
    common = diffusers_name("_common", "hooks")
    return tuple(getattr(common, "_ALL_TRANSFORMER_BLOCK_IDENTIFIERS", ("blocks", "transformer_blocks")))


def _block_registry() -> Any:
    return diffusers_name("TransformerBlockRegistry", "hooks._helpers")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that come with an extra of this package.

    Raises:
        DependencyError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed: pip install 'sostenuto[{name}]'") from None
    except ImportError as error:
        raise DependencyError(f"{error}; what is needed comes with sostenuto[{name}]") from error


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told, so that a clock sees it."""
    synchronized = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronized is not None and device.type != "cpu":
        synchronized(*(() if device.type == "mps" else (device,)))


def _hooks(part: nn.Module) -> Sequence[Any]:
    """What accelerate hooked to a module to load it where it is needed."""
    hook = getattr(part, "_hf_hook", None)
    return getattr(hook, "hooks", () if hook is None else (hook,))


def execution_device(module: nn.Module) -> torch.device:
    """Where a network computes, also where offloading keeps its weights elsewhere in between."""
    parts = list(unwrapped(module).modules())
    devices = [getattr(hook, "execution_device", None) for part in parts for hook in _hooks(part)]
    registries = [
        vars(part)["_diffusers_hook"] for part in parts if "_diffusers_hook" in vars(part)
    ]  # offloading by groups
    groups = [hook for registry in registries for hook in registry.hooks.values()]
    devices += [getattr(getattr(hook, "config", None), "onload_device", None) for hook in groups]
    found = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if found is None else torch.device(found)


def weights_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters by name, each once; those that are loaded layer by layer from where they are kept."""
    seen: set[int] = set()
    for path, part in unwrapped(module).named_modules():
        maps = [getattr(hook, "weights_map", None) for hook in _hooks(part)]
        kept = next((one for one in maps if one is not None), {})
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (
                    f"{path}.{name}" if path else name,
                    kept[name] if parameter.is_meta and name in kept else parameter,
                )
