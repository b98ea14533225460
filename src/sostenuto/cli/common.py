"""What the commands share: which model, sampler and method; writing numbers to a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sostenuto.errors import InputError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelChoice:
    """Which model, sampler and method."""

    model: str = "demo"
    """A diffusers folder, a hub id, "demo", or a folder that sostenuto.demo.train wrote."""
    method: str = "eb"
    """A name from "sostenuto methods", or "none"."""
    table: Path | None = None
    """What "sostenuto calibrate" made for the method."""
    config: Path | None = None
    """A configuration file (.json, .yaml) that says the method, its parameters and max_cache_bytes, instead of --method."""
    scheduler: str | None = None
    """Class of the diffusers scheduler to sample with, such as DDIMScheduler; by default the model's own, and for l2c DDIM."""
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Class labels."""
    seed: int = 0

    def pipeline(self) -> Any:
        """The pipeline with its scheduler."""
        pipe = self._load()
        method = self.method if self.config is None else self.method_object().name
        name = self.scheduler or ("DDIMScheduler" if method == "l2c" else None)
        if name is not None:
            from sostenuto.bench.subjects import scheduler_like

            pipe.scheduler = scheduler_like(name, pipe.scheduler)
        return pipe

    def _load(self) -> Any:
        if self.model == "demo":
            from sostenuto.demo.pipeline import load_demo_pipeline

            return load_demo_pipeline()
        if (Path(self.model) / "ema.safetensors").is_file():
            from sostenuto.demo.pipeline import load_trained_pipeline

            return load_trained_pipeline(self.model)
        if not Path(self.model).is_dir() and not _HUB_ID.fullmatch(self.model):
            raise InputError(
                f"there is no folder {self.model!r}, and it is no hub id such as 'owner/name': name a folder that "
                "pipe.save_pretrained wrote, or demo"
            )
        from sostenuto.bench.subjects import load_pipeline

        return load_pipeline(self.model)

    def method_object(self) -> Any:
        """The method with its table."""
        from sostenuto.calibrations import available_calibrations
        from sostenuto.config import load_config
        from sostenuto.errors import MethodError
        from sostenuto.methods import available_methods, by_name

        if self.config is not None:
            if self.table is not None:
                raise InputError("--config says the method with its table: leave out --table")
            return load_config(self.config).method
        method = by_name(self.method)
        if self.table is None:
            return method
        if not method.calibrated and self.method not in available_calibrations():
            raise MethodError(f"--table is for a method that is calibrated, {self.method} takes no table")
        make: Any = available_methods()[self.method]
        return make(self.table)  # what was calibrated is the first parameter of all of them

    def max_cache_bytes(self) -> int | None:
        """The limit in the configuration file, if there is one."""
        from sostenuto.config import load_config

        return None if self.config is None else load_config(self.config).max_cache_bytes

    def sample(self, output_type: str = "pt") -> Any:
        """A ``sample`` for calibrate and verify."""

        def sample(pipe: Any, generator: Any, num_inference_steps: int = self.num_inference_steps) -> Any:
            return pipe(
                class_labels=list(self.labels),
                num_inference_steps=num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=generator,
                output_type=output_type,
            ).images

        return sample


def write_json(path: Path | None, content: Any) -> None:
    """Write the numbers where ``--json`` says, if it does."""
    if path is not None:
        from sostenuto.files import publish_json

        publish_json(path, content, indent=1)
