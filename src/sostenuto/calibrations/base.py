"""What every calibration is given, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sostenuto.anatomy import Site
from sostenuto.cost import Cost
from sostenuto.engine import Handle
from sostenuto.errors import MethodError
from sostenuto.plan import Action
from sostenuto.table import CacheTable, fingerprint

Sample = Callable[..., Any]
Score = Callable[[Any], float]


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`sostenuto.calibrate` that are the same for every method."""

    target: Any
    sample: Sample
    num_inference_steps: int
    num_samples: int
    generator: torch.Generator | None = None
    score: Score | None = None
    score_sample: Sample | None = None
    scheduler: Any = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.num_inference_steps < 2 or self.num_samples < 1:
            raise MethodError(
                f"calibration needs 2 steps and 1 sample at least, not {self.num_inference_steps} and {self.num_samples}"
            )

    @property
    def seed(self) -> int:
        """The seed that every run starts from."""
        return self.generator.initial_seed() if self.generator else 0

    def fresh_generator(self) -> torch.Generator:
        """A generator at the seed, on the device of the one that was given."""
        return torch.Generator(self.generator.device if self.generator else "cpu").manual_seed(self.seed)

    def generate(self, generator: torch.Generator) -> Any:
        """One generation of the user's own kind."""
        return self.sample(self.target, generator, num_inference_steps=self.num_inference_steps)


class Calibration:
    """Base of the calibrations: frozen dataclasses of a method's options, which :func:`sostenuto.calibrate` runs."""

    method: ClassVar[str] = ""

    @classmethod
    def default_for(cls, settings: Settings) -> Calibration:
        """The options where the method is asked for by its name alone."""
        return cls()

    def run(self, settings: Settings) -> Any:
        """Measure and return what the method needs, such as a :class:`~sostenuto.table.CacheTable`."""
        raise NotImplementedError


def made_for(handle: Handle) -> dict[str, dict[str, Any]]:
    """The identity of model and scheduler that goes into a table: ``{"model": …, "scheduler": …}``."""
    scheduler = handle._scheduler()
    denoiser = handle._denoiser
    config = getattr(scheduler, "config", {})
    return {
        "model": {
            "class": type(denoiser).__name__,
            "num_blocks": 1 + max(site.block for site in handle.sites),
            "fingerprint": fingerprint(denoiser),
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            "prediction_type": config.get("prediction_type") if hasattr(config, "get") else None,
            "timesteps": [float(t) for t in scheduler.timesteps],
        },
    }


def macs_fraction(table: CacheTable, sites: Sequence[Site], cost: Cost) -> float:
    """Multiply-accumulates of a generation with the table, of one without."""
    skipped = sum(
        macs
        for row in table.plan(sites).actions
        for macs, action in zip(cost.site_macs, row, strict=True)
        if action is not Action.COMPUTE
    )
    return 1 - skipped / (cost.macs * table.num_inference_steps)
