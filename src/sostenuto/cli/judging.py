"""What judges the images of a tuning or a calibration: the distance to real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sostenuto.cli.common import SamplerChoice, device_of
from sostenuto.errors import InputError
from sostenuto.pipelines import image_sample

_FEWEST = 4


def is_demo(pipe: Any) -> bool:
    """Whether a pipeline is of the demo's kind, whose images a judge ships for: the shipped one, or one that a user trained."""
    return type(pipe).__name__ == "DemoPipeline"


@dataclass(frozen=True)
class Judging:
    """Which real images and in whose features."""

    reference: str | None = None
    """Real images that the pipeline's own are scored against, in any form that "sostenuto evaluate" takes."""
    network: str = "inception"
    """With --reference: the feature network of the distance."""
    weights: tuple[str, ...] = ()
    """With --reference: its weights, as NAME=PATH, where they don't lie in torch's cache."""

    def check(self, option: str, num_images: int) -> None:
        """Refuse what makes no sense, before a model is loaded.

        Raises:
            InputError: too few images, or options of a reference without one.
        """
        if num_images < _FEWEST and (num_images or self.reference):
            raise InputError(
                f"{option}: a distance needs {_FEWEST} images at least, not {num_images}; 0 takes none, without --reference"
            )
        if self.reference is None and (self.weights or self.network != "inception"):
            raise InputError("--network and --weights are of the distance to real images: give them with --reference")

    def scoring(self, pipe: Any, choice: SamplerChoice, num_images: int, folder: Path | None) -> dict[str, Any]:
        """``score`` and ``score_sample`` of so many images sampled as the choice says; empty where nothing can judge them.

        Args:
            pipe: the pipeline.
            choice: how it is called.
            num_images: 0 for none.
            folder: where what is measured of the reference is kept.
        """
        if self.reference is not None:
            from sostenuto.quality.distance import FrechetDistance
            from sostenuto.quality.weights import parse_weights

            weights = parse_weights(self.weights)
            judge = FrechetDistance(self.reference, self.network, weights, str(device_of(choice.device)), folder=folder)
            return {"score": judge, "score_sample": image_sample(choice.sample(pipe, "pt"), num_images)}
        if num_images and is_demo(pipe):
            from sostenuto.demo.judge import Judge
            from sostenuto.demo.rows import demo_sample

            scale = 1.0 if choice.guidance_scale is None else choice.guidance_scale
            return {"score": Judge().distance, "score_sample": demo_sample(num_images, scale)}
        return {}
