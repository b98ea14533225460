"""What the arguments of a denoiser call are: the latents, the timestep, what changes every step, and the conditioning."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sostenuto import compat
from sostenuto.anatomy import Anatomy
from sostenuto.discovery import arguments_of
from sostenuto.errors import AnatomyError, ClockError
from sostenuto.features import Feature, leaves
from sostenuto.sites import known_anatomy
from sostenuto.source import argument_names
from sostenuto.timesteps import GivenAs

_UNTIL = ("timestep_r", "r_timestep", "target_timestep")
_VALUES = (torch.Tensor, bool, int, float, complex, str)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Given(NamedTuple):
    """What one call was given.

    Attributes:
        latents: the noisy sample, ``[batch, …]``, or a list of one tensor per sample.
        timestep: a number or tensor, as the network is given it.
        conditioning: the names of all other arguments, and what those hold that stay the same from step to step: tensors
            and plain values.
        prefill: whether the call fills a key-value cache of the network's own.
        until: the timestep up to which a network predicts the mean velocity, where it does.
    """

    latents: Feature
    timestep: Any
    conditioning: list[Any]
    prefill: bool = False
    until: Any = None


class Reader:
    """Reads and rewrites the arguments of one class of denoisers.

    Raises:
        AnatomyError: its ``forward`` lacks an argument that its anatomy names, or none has the name of a timestep.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        anatomy = known_anatomy(denoiser) or arguments_of(denoiser)
        self._names = argument_names(type(denoiser))
        self.latents = anatomy.latents or self._names[0]
        self.timestep = anatomy.timestep
        self.given_as = _given_as(anatomy)
        self.negated_prediction = anatomy.negated_prediction
        self.noisy_last = anatomy.noisy_last
        self.converts = anatomy.converted is not None and anatomy.converted(compat.config_of(denoiser))
        self._prefill = anatomy.prefill
        self._stepwise = compat.STEPWISE_ARGUMENTS | {*anatomy.stepwise}
        for role, name in (("latents", self.latents), ("timestep", self.timestep)):
            if name not in self._names:
                raise AnatomyError(
                    f"{type(denoiser).__name__}.forward has no argument {name!r} for the {role}, only "
                    f"{', '.join(self._names)}: name it in its anatomy, Anatomy(…, {role}=…)"
                )

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """Tell the arguments of a call apart.

        Raises:
            ClockError: latents or timestep are missing.
        """
        named = dict(zip(self._names, args, strict=False)) | kwargs
        latents, timestep = named.pop(self.latents, None), named.pop(self.timestep, None)
        if timestep is None or next(leaves(latents), None) is None:
            raise ClockError(f"the denoiser was called without {self.latents} or {self.timestep}")
        conditioning: list[Any] = []
        for name in sorted(named):
            value = named[name]
            if value is None:
                continue
            plain = isinstance(value, _VALUES)
            values = [value] if plain else [leaf for leaf in tree_leaves(value) if isinstance(leaf, _VALUES)]
            if values:  # of what changes every step only whether it is there
                conditioning += [name] if name in self._stepwise else [name, *values]
        until = next((named[name] for name in _UNTIL if named.get(name) is not None), None)
        prefill = self._prefill is not None and self._prefill(named)
        return Given(_noisy(latents), timestep, conditioning, prefill, until)

    def with_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any], timestep: Any) -> Arguments:
        """The arguments with another timestep."""
        return self._with(self.timestep, args, kwargs, timestep)

    def with_latents(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Feature) -> Arguments:
        """The arguments with other latents."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        known: Any = named.get(self.latents)
        if _is_nested(known):
            latents = [[*sample[:-1], latent] for sample, latent in zip(known, latents, strict=True)]
        return self._with(self.latents, args, kwargs, latents)

    def _with(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Arguments:
        place = self._names.index(name)
        if place < len(args):
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}


def _is_nested(latents: Any) -> bool:
    return isinstance(latents, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in latents)


def _noisy(latents: Feature) -> Feature:
    """The noisy latents, of a list whose samples are lists of conditions and latents (Z-Image Omni) the last of each."""
    return [sample[-1] for sample in latents] if _is_nested(latents) else latents


def _given_as(anatomy: Anatomy) -> GivenAs | None:
    """What such a network is given for the scheduler's timesteps, where the clock can't tell by itself."""
    if anatomy.reversed_timestep:
        return lambda timesteps: 1 - timesteps / 1000
    if anatomy.timestep_offset:
        return lambda timesteps: timesteps + anatomy.timestep_offset
    return None
