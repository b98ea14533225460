"""What the commands share: which model, sampler and method, where it runs; reading prompts, writing numbers to a file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sostenuto.distributed.world import world
from sostenuto.errors import InputError
from sostenuto.pipelines import Conditions, are_prompts, pipeline_sample, suited

_OWN_OPTIONS = {
    "num_inference_steps": "use --num-inference-steps",
    "guidance_scale": "use --guidance-scale",
    "class_labels": "use --labels",
    "prompt": "use --prompt",
    "generator": "use --seed",
    "output_type": "the command chooses it",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class SamplerChoice:
    """Which model and sampler."""

    model: str = "demo"
    """A diffusers folder, a hub id, "demo", or a folder that sostenuto.demo.train wrote."""
    scheduler: str | None = None
    """Class of the diffusers scheduler to sample with, such as DDIMScheduler; by default the model's own."""
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    """By default 1, which is none, with class labels, and the pipeline's own with prompts."""
    labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Class labels, all in one batch."""
    prompt: tuple[str, ...] = ()
    """Texts, all in one batch, for a pipeline that takes prompts in place of labels."""
    prompts: Path | None = None
    """A text file with a prompt in each line, or a JSON list, in place of --prompt."""
    pipe_arguments: tuple[str, ...] = ()
    """Further arguments of the pipeline's call, as NAME=VALUE: height=512 width=512 num_frames=17."""
    seed: int = 0
    device: str = "auto"
    """Where the pipeline runs: cpu, cuda, or auto, which takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What its weights are loaded as: auto takes bfloat16 on a GPU and float32 on a CPU, and float32 for the demo model."""
    offload: Literal["none", "model", "sequential"] = "none"
    """On a GPU that holds less than the whole pipeline, as diffusers offloads (with accelerate): whole models in turn, or
    layer by layer, which is slow."""

    @property
    def is_demo(self) -> bool:
        """Whether it is the demo model, or one that ``sostenuto.demo.train`` made."""
        return self.model == "demo" or (Path(self.model) / "ema.safetensors").is_file()

    def pipeline(self) -> Any:
        """The pipeline with its scheduler, on its device."""
        device = device_of(self.device)
        if self.offload != "none" and device.type == "cpu":
            raise InputError(f"--offload {self.offload} keeps on the CPU what the GPU has no room for: it needs a GPU")
        pipe = self._placed(self._load(), device)
        name = self.scheduler or self._usual_scheduler()
        if name is not None:
            from sostenuto.bench.subjects import scheduler_like

            pipe.scheduler = scheduler_like(name, pipe.scheduler)
        return pipe

    def _usual_scheduler(self) -> str | None:
        """Class of the scheduler where none was asked for; ``None``: the model's own."""
        return None

    def _load(self) -> Any:
        if self.is_demo:
            from sostenuto.demo.pipeline import load_demo_pipeline, load_trained_pipeline

            return self._in_dtype(load_demo_pipeline() if self.model == "demo" else load_trained_pipeline(self.model))
        if not Path(self.model).is_dir() and not _HUB_ID.fullmatch(self.model):
            raise InputError(
                f"there is no folder {self.model!r}, and it is no hub id such as 'owner/name': name a folder that "
                "pipe.save_pretrained wrote, or demo"
            )
        from sostenuto.bench.subjects import load_pipeline

        automatic = torch.float32 if device_of(self.device).type == "cpu" else torch.bfloat16
        return load_pipeline(self.model, torch_dtype=self._dtype() or automatic)

    def _dtype(self) -> torch.dtype | None:
        """What was asked for, if anything."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def _in_dtype(self, pipe: Any) -> Any:
        """A pipeline that lies in float32, as asked for."""
        return pipe if self._dtype() is None else pipe.to(self._dtype())

    def _placed(self, pipe: Any, device: torch.device) -> Any:
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        elif device.type != "cpu":
            pipe.to(device)
        return pipe

    def conditions(self) -> Conditions:
        """The prompts where there are any, else the class labels."""
        if self.prompts is None:
            return self.prompt or self.labels
        if self.prompt:
            raise InputError("--prompt and --prompts say the same: give one of them")
        return read_prompts(self.prompts)

    def arguments(self, conditions: Conditions) -> dict[str, Any]:
        """What :func:`~sostenuto.pipelines.pipeline_sample` takes besides the conditions."""
        usual = None if are_prompts(conditions) else 1.0
        scale = usual if self.guidance_scale is None else self.guidance_scale
        return {"guidance_scale": scale, "arguments": dict(map(_argument, self.pipe_arguments))}

    def sample(self, pipe: Any, output_type: str = "latent", prompt: str | None = None) -> Any:
        """A ``sample`` for calibrate, tune and verify; ``prompt`` serves a pipeline that takes one where none is given.

        Raises:
            InputError: the pipeline can't be called like this.
        """
        conditions = self.conditions()
        if prompt is not None and conditions is self.labels:
            conditions = suited(pipe, self.labels, [prompt])
        return pipeline_sample(pipe, conditions, output_type=output_type, **self.arguments(conditions))


@dataclass(frozen=True)
class ModelChoice(SamplerChoice):
    """Which model, sampler and method."""

    scheduler: str | None = None
    """Class of the diffusers scheduler to sample with, such as DDIMScheduler; by default the model's own, and for l2c DDIM."""
    method: str = "eb"
    """A name from "sostenuto methods", or "none"; with parameters, taylorseer:interval=4,order=2; a preset, fora.flux_dev; or
    several, fora:interval=3|forecast."""
    table: Path | None = None
    """What "sostenuto calibrate" made for the method."""
    config: Path | None = None
    """A configuration file (.json, .yaml) that says the method, its parameters and max_cache_bytes, instead of --method."""

    def _usual_scheduler(self) -> str | None:
        return "DDIMScheduler" if self.method_object().name == "l2c" else None

    def method_object(self) -> Any:
        """The method with its table."""
        from sostenuto.bench.specs import method_of
        from sostenuto.calibrations import available_calibrations
        from sostenuto.config import load_config
        from sostenuto.errors import MethodError
        from sostenuto.methods import Combination

        if self.config is not None:
            if self.table is not None:
                raise InputError("--config says the method with its table: leave out --table")
            return load_config(self.config).method
        method = method_of(self.method, self.num_inference_steps)
        if self.table is None:
            return method
        if isinstance(method, Combination):
            raise MethodError("--table is for one method: in a combination write it as eb:table=FILE")
        if not method.calibrated and method.name not in available_calibrations():
            raise MethodError(f"--table is for a method that is calibrated, {method.name} takes no table")
        # What was calibrated is the first parameter of all of them.
        return replace(method, **{next(field.name for field in fields(method) if not field.kw_only): self.table})

    def max_cache_bytes(self) -> int | None:
        """The limit in the configuration file, if there is one."""
        from sostenuto.config import load_config

        return None if self.config is None else load_config(self.config).max_cache_bytes


def device_of(name: str) -> torch.device:
    """Where a command runs: ``auto`` and ``cuda`` are this process's GPU, without one ``auto`` is the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name in ("auto", "cuda"):
        device = world().device
        if name == "cuda" and device.type != "cuda":
            raise InputError("--device cuda: torch sees no GPU here; leave it out, or use cpu")
        return device
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {name!r}: give cpu, cuda or auto") from None


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, or the strings of a ``.json`` list.

    Raises:
        InputError: it can't be read, or one of them is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
        prompts = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as prompts: {error}") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f"{path} must hold a prompt in each line, none of them empty")
    return prompts


def _argument(words: str) -> tuple[str, Any]:
    """``NAME=VALUE``; a value that is no JSON is a text."""
    name, sign, value = words.partition("=")
    if not sign or not name.isidentifier():
        raise InputError(f"--pipe-arguments takes NAME=VALUE, such as height=512, not {words!r}")
    if name in _OWN_OPTIONS:
        raise InputError(f"{name} is not for --pipe-arguments: {_OWN_OPTIONS[name]}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def write_json(path: Path | None, content: Any) -> None:
    """Write the numbers where ``--json`` says, if it does."""
    if path is not None:
        from sostenuto.files import publish_json

        publish_json(path, content, indent=1)
