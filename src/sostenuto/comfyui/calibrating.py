"""Calibration inside of ComfyUI: a sampling that measures what a method needs, and keeps it as a configuration file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sostenuto.calibrations import available_calibrations, calibrate
from sostenuto.calibrations.base import Calibration
from sostenuto.comfyui.caching import network_and_schedule, sampler_told
from sostenuto.config import Config
from sostenuto.errors import ConfigError, MethodError
from sostenuto.methods import available_methods
from sostenuto.switch import is_switched_off

METHODS = ("smoothcache", "magcache", "teacache", "eb", "feb")
"""The methods that are calibrated by sampling alone, on any network."""

FOLDER = "sostenuto"
_NAME = re.compile(r"[\w-][\w .-]*")  # a workflow of a stranger's writes into no other folder
_SEED = 0
_NOISE = 2  # the place of the noise among a sampler's arguments behind the guider and the noise levels


class Calibrating:
    """What the wrapper of a model to be calibrated does; one for each node that patches.

    Args:
        method: one of ``METHODS``.
        options: of the method's calibration.
        num_samples: rows of the network's batch to measure on, 1 or more; the first ones are the workflow's own noise.
        name: of the file, in the folder ``sostenuto`` of ComfyUI's working folder.

    Raises:
        ConfigError: the name is no plain file name.
        MethodError: there is no such calibration or option.
    """

    def __init__(self, method: str, options: Mapping[str, Any], num_samples: int, name: str) -> None:
        if not _NAME.fullmatch(name) or Path(name).suffix not in ("", ".json"):
            raise ConfigError(
                f"{name!r} is no plain file name: give one such as 'flux-28-steps', which is kept in the folder {FOLDER}"
            )
        self.calibration = calibration_of(method, options)
        self.num_samples = num_samples
        self.path = Path(FOLDER) / (name if name.endswith(".json") else f"{name}.json")
        self.report = "nothing was sampled with this model yet"

    def sample(self, executor: Callable[..., Any], guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's ``SAMPLER_SAMPLE`` wrapper: sample as often as the calibration needs it, then write the file.

        Args:
            executor: samples.
            guider: what the sampler calls.
            sigmas: the noise levels of this sampling, one more than steps.
            args: the sampler's other arguments, the noise among them.
            kwargs: the same, by name.

        Returns:
            What the first generation gave.

        Raises:
            ClockError: the sampler calls the model at noise levels that its own don't tell.
            MethodError: the calibration found nothing to go by.
        """
        if is_switched_off() or len(sigmas) < 3:
            self.report = "nothing was measured: " + ("SOSTENUTO_DISABLE is set" if is_switched_off() else "one step")
            return executor(guider, sigmas, *args, **kwargs)
        network, schedule = network_and_schedule(executor, guider, sigmas)
        made: list[Any] = []

        def generation(_: Any, generator: torch.Generator, num_inference_steps: int) -> Any:
            given = list(args)
            if generator.initial_seed() != _SEED:
                given[_NOISE] = torch.randn(args[_NOISE].shape, generator=generator).to(args[_NOISE])
            with sampler_told():
                made.append(executor(guider, sigmas, *given, **kwargs))
            return made[-1]

        measured = calibrate(
            network,
            self.calibration,
            generation,
            num_inference_steps=len(schedule.timesteps),
            num_samples=self.num_samples,
            generator=torch.Generator().manual_seed(_SEED),
            scheduler=schedule,
        )
        self.path.parent.mkdir(exist_ok=True)
        make: Any = available_methods()[self.calibration.method]
        Config(make(measured)).save(self.path)
        self.report = (
            f"{self.calibration.method} measured over {len(schedule.timesteps)} calls of the model: {self.path}"
        )
        return made[0]


def calibration_of(method: str, options: Mapping[str, Any]) -> Calibration:
    """A method's calibration by its name and options.

    Raises:
        MethodError: there is no such calibration or option.
    """
    if method not in METHODS:
        raise MethodError(f"{method!r} isn't calibrated here; {', '.join(METHODS)} are")
    make: Any = available_calibrations()[method]
    known = [field.name for field in fields(make)]
    odd = [name for name in options if name not in known]
    if odd:
        raise MethodError(f"the calibration of {method} has no option {odd[0]!r}; it has {', '.join(known)}")
    return make(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
