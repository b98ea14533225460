"""``sostenuto calibrate``."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from sostenuto.cli.common import ModelChoice, write_json
from sostenuto.cli.judging import Judging
from sostenuto.distributed.world import apart, world
from sostenuto.errors import InputError, MethodError

_ON_REAL_IMAGES = ("l2c", "epsilon-scaling")
_OF_TABLES = (
    "target_fraction",
    "forecast_order",
    "eps_scale_grid",
    "theta",
    "window",
    "conditional_half",
    "caching",
    "match",
)
"""What only some calibrations have; none is of the training of routers."""


@dataclass(frozen=True)
class Calibrate:
    """Measure what a method needs for a model and sampler: a cache table, a polynomial, a router (on the demo model), …"""

    shared: ClassVar[bool] = True

    choice: Annotated[ModelChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelChoice)
    output: Path | None = None
    """By default table.json, and table.safetensors for a router."""
    target_fraction: float | None = None
    """Share of the uncached multiply-accumulates that the table may cost."""
    forecast_order: int | None = None
    """How reused branches are filled: 0 last value, 1 linear extrapolation."""
    theta: float | None = None
    """The error that compressed attention may cause (ditfastattn); published: 0.025 to 0.15."""
    window: int | None = None
    """ditfastattn: tokens to each side that a token attends to, by default an eighth of all; epsilon-scaling: steps in the
    running mean of the factors, odd."""
    caching: str | None = None
    """epsilon-scaling: the method that the factors are combined with, such as "taylorseer:interval=3,order=1" or
    "eb:table=table.json,eps_scale=1.0"; by default fora:interval=2."""
    match: Literal["variance", "norm"] | None = None
    """epsilon-scaling: what the factors restore, the variance of what the network is given next or the norm of its
    prediction; by default the variance."""
    conditional_half: Literal["first", "second"] | None = None
    """Where a guided batch has its conditional half (ditfastattn, eb, feb); by default where diffusers' pipelines put it."""
    num_samples: int | None = None
    """Samples to measure on; by default 8."""
    search_images: int | None = None
    """On the demo model, or with --reference: images per value when the noise scale is searched, by default 200; 0 leaves it
    as it is."""
    judging: Annotated[Judging, tyro.conf.OmitArgPrefixes] = field(default_factory=Judging)
    eps_scale_grid: tuple[float, ...] | None = None
    """Values to try: of the noise scale (eb), of what its curve is multiplied by (feb)."""
    data: Path | None = None
    """l2c, epsilon-scaling: folder with Fashion-MNIST's four IDX files; by default where Debian's package puts them."""
    penalty: float | None = None
    """l2c: the paper's λ, the price of a computed branch; by default the preset for the number of steps."""
    num_iterations: int | None = None
    """l2c: batches to train on; by default the preset for the number of steps."""
    json: Path | None = None
    """Also write a summary to this file."""

    def run(self) -> None:
        """Calibrate and save."""
        for name in ("config", "table"):
            if getattr(self.choice, name) is not None:
                raise InputError(f"--{name} is for running a method: say with --method what to calibrate")
        if self.data is not None and self.choice.method not in _ON_REAL_IMAGES:
            self._refuse("data")
        if self.data is not None and not self.choice.is_demo:
            raise InputError("--data is of the demo model; another's real images are passed from Python")
        self.judging.check("--search-images", self._search_images)
        if self.choice.method != "l2c":
            self._make_table()
        elif world().is_main:  # one training run is no work to share
            with apart():
                self._train_router()

    @property
    def _search_images(self) -> int:
        return 200 if self.search_images is None else self.search_images

    def _train_router(self) -> None:
        from dataclasses import replace

        import torch

        import sostenuto

        if self.target_fraction is not None:
            raise MethodError(
                "a router is trained at a price of computed branches, not to a cost: set --penalty (more of it reuses more) in "
                "place of --target-fraction"
            )
        self._refuse(*_OF_TABLES, "num_samples", "search_images")
        if self.judging.reference is not None:
            raise MethodError(
                "a router is trained on real images, not chosen by a distance to them: leave out --reference"
            )
        output = self.output or Path("table.safetensors")
        if output.suffix != ".safetensors":
            raise InputError(f"a router is written as .safetensors, not {output.name}: name the --output so")
        if not self.choice.is_demo:
            raise MethodError(
                "this command trains routers for the demo model and what sostenuto.demo.train made: for another one call "
                "sostenuto.calibrate"
            )
        checkpoint = output.with_suffix(".checkpoint")
        steps = self.choice.num_inference_steps
        given = {"penalty": self.penalty, "num_iterations": self.num_iterations}
        router = sostenuto.calibrate(
            self.choice.pipeline(),
            replace(
                sostenuto.L2CCalibration.demo(steps, self.data),
                checkpoint=checkpoint,
                **{name: value for name, value in given.items() if value is not None},
            ),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(self.choice.seed),
            show_progress=True,
        )
        router.save(output)
        checkpoint.unlink()
        write_json(self.json, {"dropped": router.dropped(), "training": dict(router.training)})
        print(f"{output}: {router.dropped():.1%} of the cache steps' branches are reused at θ = 0.1")
        print(router.strip())

    def _make_table(self) -> None:
        import torch

        import sostenuto

        calibration = self.calibration()
        num_samples = 8 if self.num_samples is None else self.num_samples
        output = self.output or Path("table.json")
        searches = isinstance(calibration, sostenuto.EBCalibration)
        known = self.judging.reference is not None or self.choice.is_demo
        scored = searches and known and self._search_images > 0
        if not scored and (self.search_images or self.judging.reference is not None):
            raise InputError(
                "images are scored for the noise scale of eb and feb, on the demo model or with --reference: leave out "
                "--search-images and --reference"
            )
        if not scored and self.eps_scale_grid is not None:
            raise InputError(
                "--eps-scale-grid is searched by a distance of images: give real ones with --reference (the demo model has its "
                "own), and --search-images above 0"
            )
        folder = self._kept(output, repr(calibration)) if searches else None
        pipe = self.choice.pipeline()
        scoring = self.judging.scoring(pipe, self.choice, self._search_images, folder) if scored else {}
        if self.choice.is_demo and isinstance(calibration, sostenuto.EpsilonScalingCalibration):
            calibration = self._with_real_images(calibration, num_samples)
        made = sostenuto.calibrate(
            pipe,
            calibration,
            self.choice.sample(pipe),
            num_inference_steps=self.choice.num_inference_steps,
            num_samples=num_samples,
            generator=torch.Generator().manual_seed(self.choice.seed),
            show_progress=True,
            folder=folder,
            **scoring,
        )
        if not world().is_main:
            return
        made.save(output)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(made, sostenuto.CacheTable):
            values: dict[str, Any] = {"macs_fraction": made.macs_fraction, "eps_scale": _short(made.eps_scale)}
            print(made.strip())
        else:
            values = made.values
        write_json(self.json, values)
        print(f"{output}: " + ", ".join(f"{name} = {value}" for name, value in values.items()))

    def _kept(self, output: Path, calibration: str) -> Path:
        """Where the search keeps what it found until its table is written: a folder for each way of asking."""
        choice = self.choice
        asked = (
            choice.model, choice.scheduler, choice.num_inference_steps, choice.conditions(), choice.guidance_scale,
            choice.pipe_arguments, choice.seed, choice.dtype, self.num_samples, self.search_images, self.judging, calibration,
        )  # fmt: skip
        return output.with_name(f"{output.name}.{hashlib.sha256(repr(asked).encode()).hexdigest()[:8]}.partial")

    def _with_real_images(self, calibration: Any, num_samples: int) -> Any:
        """The calibration on training images, where the set is at hand."""
        from dataclasses import replace

        from sostenuto.demo import data

        labels = [*self.choice.labels]
        try:
            real = data.of_labels("train", labels * -(-num_samples // len(labels)), self.data)
        except FileNotFoundError:
            if self.data is not None:
                raise
            return calibration
        return replace(calibration, real_latents=real)

    def calibration(self) -> Any:
        """The calibration of the method, with the options that were given."""
        import inspect

        from sostenuto.calibrations import available_calibrations

        known = available_calibrations()
        if self.choice.method not in known:
            raise MethodError(f"{self.choice.method!r} has no calibration; {', '.join(sorted(known))} have")
        self._refuse("penalty", "num_iterations")  # of the training of routers
        kind = known[self.choice.method]
        given = {name: value for name in _OF_TABLES if (value := getattr(self, name)) is not None}
        takes = inspect.signature(kind).parameters
        target = given.pop("target_fraction", None) if "target_fraction" not in takes else None
        self._refuse(*(name for name in given if name not in takes))
        if "caching" in given:
            from sostenuto.bench.specs import method_of

            given["caching"] = method_of(given["caching"], self.choice.num_inference_steps)
        if "guidance_scale" in takes and self.choice.guidance_scale is not None:
            given["guidance_scale"] = self.choice.guidance_scale
        return kind(**given) if target is None else kind.at_cost(target)

    def _refuse(self, *names: str) -> None:
        """Refuse options that were given and that the method's calibration has not."""
        for name in names:
            if getattr(self, name) is not None:
                raise MethodError(
                    f"the calibration of {self.choice.method} has no --{name.replace('_', '-')}: leave it out"
                )


def _short(values: Sequence[float]) -> float | list[float]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else list(values)
