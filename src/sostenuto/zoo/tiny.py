"""What a tiny network of the zoo is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sostenuto.compat import diffusers_name, diffusers_version
from sostenuto.errors import DependencyError


@dataclass(frozen=True)
class TinyModel:
    """A network of a diffusers class, small enough to build and run in a moment, with random weights.

    Attributes:
        name: the diffusers class.
        config: arguments of its constructor.
        inputs: ``inputs(timestep, generator)``: keyword arguments of one ``forward`` for the scheduler's timestep (0 … 1000),
            as the class's pipelines pass it (t, t / 1000 or 1 − t / 1000), with random latents and conditioning.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[float, torch.Generator], dict[str, Any]]

    def build(self, seed: int = 0) -> nn.Module:
        """The network in evaluation mode; random weights, none of them zero (as gates at their initialisation are).

        Raises:
            DependencyError: the installed diffusers has no such class, or the class takes no such arguments yet.
        """
        model_class = diffusers_name(self.name)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of the GPUs, which nobody would set back
            try:
                model = model_class(**self.config)
            except TypeError as error:
                raise DependencyError(f"{self.name} of diffusers {diffusers_version()} is too old: {error}") from error
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.05)
        return model.eval()
